"""Documents of the corpus as rows of token ids for a decoder-only language model and for an encoder-decoder.

A document is a description, then perhaps questions with answers, or a caption after "a photo of" (see
`blip2_hf.data.shapes.corpus`). In BLIP-2 the image's queries stand before a text that begins with the tokenizer's start
token, so that token stands between description and rest in half of the rows of a decoder-only model, too.

Shapes: B documents, T tokens of the longest row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blip2_hf.presets import CAPTION_PROMPT

IGNORED = -100
_TURN = re.compile(r"(Question: .*?\? (?:Short a|A)nswer:) (.*?)(?:\. (?=Question: )|$)")
_REST = re.compile(rf"(?:^| )(Question: |{CAPTION_PROMPT} )")
# Shares of the documents: those that lose their description, so that questions alone are known as well; captions that
# lose their prompt; decoder-only rows that have a start token behind the description; of these, rows whose description
# and questions are learned, too (they are mostly chance).
_BLIND, _BARE, _SEPARATED, _ALL_LEARNED = 0.1, 0.5, 0.9, 0.2
# Of those with a caption: the caption itself takes the place of the description. To say again what was read is a skill
# that large language models have, and that queries can rely on.
_REPEATED = 0.15
# Encoder-decoder: documents that are cut before any of their words.
_CUT_ANYWHERE = 0.15
_POOL = 16  # batches whose documents are sorted by length


@dataclass(frozen=True)
class Document:
    """A document in its parts.

    Attributes:
        description: may be empty.
        turns: questions with the prompt around them, and answers.
        caption: behind "a photo of", or None.
    """

    description: str
    turns: tuple[tuple[str, str], ...] = ()
    caption: str | None = None

    @classmethod
    def parsed(cls, text: str) -> Document:
        found = _REST.search(text)
        if found is None:
            return cls(text)
        description, rest = text[: found.start()], text[found.start(1) :]
        if rest.startswith("Question: "):
            return cls(description, tuple((turn[1], turn[2]) for turn in _TURN.finditer(rest)))
        return cls(description, caption=rest.removeprefix(CAPTION_PROMPT).lstrip())

    def repeated(self) -> Document:
        """One whose caption, if it has any, is its description, too."""
        text = self.description if self.caption is None else self.caption
        return self if self.turns else Document(text, caption=text)

    def rest(self) -> str:
        """What stands behind the description."""
        return "".join(text for text, _ in self.rest_parts())

    def rest_parts(self, *, prompted: bool = True) -> list[tuple[str, bool]]:
        """Texts, which follow each other as they are, and whether each is to be said: a caption, an answer.

        Args:
            prompted: with "a photo of" before a caption.
        """
        if self.caption is not None:
            return [(CAPTION_PROMPT, False), (f" {self.caption}", True)] if prompted else [(self.caption, True)]
        parts = []
        for number, (question, answer) in enumerate(self.turns):
            parts += [(f". {question}" if number else question, False), (f" {answer}", True)]
        return parts


# -- decoder-only ----------------------------------------------------------------------------------------------------


def decoder_row(document: Document, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> tuple[list, list]:
    """Ids and labels of a row that ends with a line break."""
    document = document.repeated() if rng.random() < _REPEATED else document
    parts = document.rest_parts(prompted=rng.random() >= _BARE)
    blind, separated, all_learned = (rng.random(3) < (_BLIND, _SEPARATED, _ALL_LEARNED)).tolist()
    start = tokenizer("")["input_ids"]
    (end,) = _ids("\n", tokenizer)
    context = [] if blind or not parts else _ids(document.description, tokenizer)
    ids = [*context, *start] if separated else [*start, *context]
    # a start token is not to be foreseen
    labels = [one if all_learned and one not in start else IGNORED for one in ids]
    for number, (text, said) in enumerate(parts or [(document.description, True)]):
        part = _ids(f" {text}" if context and not (separated or number) else text, tokenizer)
        ids += part
        labels += part if said or all_learned or blind else [IGNORED] * len(part)
    return [*ids, end], [*labels, end]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoder_batch(rows: Sequence[tuple[list, list]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` int64 [B, T], padded on the right."""
    return {
        "input_ids": _padded([ids for ids, _ in rows], pad),
        "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": _padded([labels for _, labels in rows], IGNORED),
    }


# -- encoder-decoder -------------------------------------------------------------------------------------------------


def seq2seq_texts(document: Document, rng: np.random.Generator) -> tuple[str, str]:
    """What the encoder reads and what the decoder writes."""
    document = document.repeated() if rng.random() < _REPEATED else document
    before = "" if rng.random() < _BLIND else document.description
    if not document.rest() or rng.random() < _CUT_ANYWHERE:
        return _cut(f"{document.description} {document.rest()}".strip(), rng)
    if document.caption is None:
        turn = int(rng.integers(len(document.turns)))
        earlier = [f"{question} {answer}." for question, answer in document.turns[:turn]]
        question, answer = document.turns[turn]
        return " ".join(part for part in (before, *earlier, question) if part), answer
    if rng.random() < 0.5:
        start, caption = "", document.caption
    else:  # the beginning of a caption is given, as in prefix language modelling
        start, caption = _cut(document.caption, rng)
    prompt = "" if rng.random() < _BARE else CAPTION_PROMPT
    return " ".join(part for part in (before, prompt, start) if part), caption


def _cut(text: str, rng: np.random.Generator) -> tuple[str, str]:
    words = text.split()
    place = int(rng.integers(len(words)))
    return " ".join(words[:place]), " ".join(words[place:])


def seq2seq_batch(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels`, int64 [B, T of each]; all texts end with the end token."""
    sources = tokenizer([source for source, _ in texts])["input_ids"]
    targets = tokenizer([target for _, target in texts])["input_ids"]
    return {
        "input_ids": _padded(sources, tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids in sources], 0),
        "labels": _padded(targets, IGNORED),
    }


# -- batches ---------------------------------------------------------------------------------------------------------


class LanguageBatches(Dataset):
    """Item `step` is a batch of documents; each epoch goes through all of them in another order."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_decoder: bool,
        steps: int,
        batch_size: int,
        seed: int,
    ):
        if len(texts) < batch_size:
            raise ValueError(f"`texts` must be at least {batch_size} documents, one batch, got {len(texts)}")
        self.texts, self.tokenizer, self.encoder_decoder = texts, tokenizer, encoder_decoder
        self.steps, self.batch_size, self.seed = steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 0, step])
        epoch, number = divmod(step, len(self.texts) // self.batch_size)
        places = _order(self, epoch)[number]
        return self.batch([Document.parsed(self.texts[place]) for place in places], rng)

    def batch(self, documents: Sequence[Document], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if self.encoder_decoder:
            return seq2seq_batch([seq2seq_texts(document, rng) for document in documents], self.tokenizer)
        rows = [decoder_row(document, self.tokenizer, rng) for document in documents]
        return decoder_batch(rows, self.tokenizer.pad_token_id)


@lru_cache(maxsize=2)
def _order(batches: LanguageBatches, epoch: int) -> np.ndarray:
    """The documents of each batch of an epoch [batches, batch size]: random, but of similar lengths."""
    rng = np.random.default_rng([batches.seed, 1, epoch])
    size = batches.batch_size
    lengths = np.array([len(text) for text in batches.texts])
    places = rng.permutation(len(lengths))[: len(lengths) // size * size]
    pools = [places[start : start + _POOL * size] for start in range(0, len(places), _POOL * size)]
    rows = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]).reshape(-1, size)
    return rows[rng.permutation(len(rows))]


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
