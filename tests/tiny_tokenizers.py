"""Tiny tokenizers of the four kinds BLIP-2 meets, built in memory: OPT, T5, Llama and BERT.

Each has under 300 tokens, so that a tiny random model can have its full vocabulary, and a character or byte
fallback, so that any English sentence survives `decode(encode(text))` (BERT lower-cases; T5 and BERT drop
line breaks, as the real ones do). Special tokens and their numbers are those of the real ones: OPT starts
with `</s>` (2) and pads with `<pad>` (1), T5 ends with `</s>` (1), Llama starts with `<s>` (1) and has no
padding token until one is chosen, BERT has `[CLS] … [SEP]`.
"""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

WORDS = """
    a an the and of in on at with to is are it this that what where who how many which color there no yes
    photo picture image man woman boy girl dog cat horse bird child people person two three one group
    red blue green white black brown yellow small large young old
    sitting standing running playing walking riding holding wearing jumping looking
    ball water grass beach street table chair car bike tree snow mountain field shirt hat next front
    question answer short describe
""".split()
_PRINTABLE = string.ascii_letters + string.digits + string.punctuation
# What the byte-pair merges are learned from.
_CORPUS = [" ".join(WORDS)] * 4 + ["Question: what is this? Answer:", "a photo of", "Question: Short answer:"]


def _byte_characters() -> list[str]:
    """GPT-2's stand-in characters for ASCII bytes, and for those of accents, curly quotes and emoji."""
    text = _PRINTABLE + " \n\t" + "".join(chr(code) for code in range(0x80, 0x100)) + "“”–…🐕"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return sorted({character for piece, _ in level.pre_tokenize_str(text) for character in piece})


def _train_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, alphabet: list[str], merges: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _number(*groups: list[str]) -> dict[str, int]:
    tokens = dict.fromkeys(token for group in groups for token in group)
    return {token: index for index, token in enumerate(tokens)}


def tiny_opt_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE as OPT's: `</s>` first, also end and unknown token; "\\n" is one token (number 4)."""
    alphabet = _byte_characters()
    merges = _train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, 100)
    newline = "Ċ"
    vocab = _number(["<s>", "<pad>", "</s>", "<unk>", newline], alphabet, ["".join(pair) for pair in merges])
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        model_max_length=512,
    )


def tiny_t5_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram pieces as T5's: `<pad>` 0, `</s>` 1 at the end of every text, `<unk>` 2; no start token."""
    pieces = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces += [("▁", -3.0)] + [(character, -8.0) for character in _PRINTABLE]
    pieces += [("▁" + word, -4.0 - 0.01 * index) for index, word in enumerate(WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_llama_tokenizer() -> PreTrainedTokenizerBase:
    """SentencePiece-like BPE as Llama's: `<s>` first, nothing at the end, and no padding token."""
    alphabet = ["▁", *_PRINTABLE]
    merges = _train_bpe(pre_tokenizers.Metaspace(), alphabet, 150)
    vocab = _number(["<unk>", "<s>", "</s>", "<0x0A>"], alphabet, ["".join(pair) for pair in merges])
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, model_max_length=512)


def tiny_bert_tokenizer(decoder_start: bool = True) -> PreTrainedTokenizerBase:
    """Lower-casing WordPiece as BERT's; with `[DEC]` as start token, as stage 1 adds, unless told not to."""
    characters = sorted(set(_PRINTABLE.lower()))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = _number(specials, characters, ["##" + character for character in characters], WORDS)
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=512)
    if decoder_start:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
