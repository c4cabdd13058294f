"""Tokenizers trained on the world's corpus: byte-level BPE as OPT's, sentencepiece pieces as T5's, WordPiece as BERT's.

Special tokens and their numbers are those of the real ones, so that everything made for OPT, T5 and BERT fits.
"""

from __future__ import annotations

import io
import json
import re
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

_PRINTABLE = string.ascii_letters + string.digits + string.punctuation
# "\n" as byte-level BPE writes it: what ends a text of OPT.
_LINE_BREAK = "Ċ"
_SPACE = "\u2581"  # as sentencepiece writes it
# Besides the special tokens; words are few, so there are mostly whole words and bytes or letters.
_BPE, _PIECES, _WORD_PIECES = 700, 500, 500


def opt_tokenizer(documents: Sequence[str], longest: int) -> GPT2Tokenizer:
    """As OPT's: `</s>` (2) before every text, `<pad>` is 1, and "\\n" is one token.

    Args:
        documents: to learn the merges from.
        longest: most tokens of a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=_BPE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", _LINE_BREAK, *alphabet, *("".join(pair) for pair in merges)]
    return GPT2Tokenizer(
        vocab=_numbered(tokens),
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        model_max_length=longest,
    )


def t5_tokenizer(documents: Sequence[str], longest: int) -> T5Tokenizer:
    """As T5's: unigram pieces of sentencepiece, `<pad>` 0, `</s>` (1) behind every text, `<unk>` 2."""
    trained = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="pieces-") as folder:
        seeds = Path(folder, "seeds.tsv")
        seeds.write_text("".join(f"{piece}\t{count}\n" for piece, count in _seed_pieces(documents)), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=trained,
            model_type="unigram",
            vocab_size=_PIECES,
            hard_vocab_limit=False,
            seed_sentencepieces_file=str(seeds),
            normalization_rule_name="identity",
            required_chars=_PRINTABLE,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            num_threads=1,  # otherwise the pieces depend on the machine
            minloglevel=2,
        )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = [(pieces.id_to_piece(number), pieces.get_score(number)) for number in range(len(pieces))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=longest)


def _seed_pieces(documents: Sequence[str]) -> list[tuple[str, int]]:
    """Whole words, marks and characters with their counts. Sentencepiece's own candidates are what different words have
    in common, which leaves a language of a hundred words in fragments."""
    words = Counter(word for document in documents for word in document.split())
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece in (*re.findall(rf"{_SPACE}?\w+|[^\w\s]", _SPACE + word), *_SPACE, *word):
            pieces[piece] += count
    return sorted(pieces.items(), key=lambda item: (-item[1], item[0]))


def bert_tokenizer(documents: Sequence[str], longest: int) -> BertTokenizer:
    """As BERT's: lower case, whole words and letters, `[PAD]` 0, `[CLS]` … `[SEP]` around every text; stage 1 adds
    `[DEC]`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set(_PRINTABLE.lower()))
    normalise, split = normalizers.BertNormalizer().normalize_str, pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    counts = Counter(word for document in documents for word, _ in split(normalise(document)))
    words = sorted(counts, key=lambda word: (-counts[word], word))  # trained pieces would differ from run to run
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), *words][:_WORD_PIECES]
    return BertTokenizer(vocab=_numbered(tokens), model_max_length=longest)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
