"""Rows of text as representation learning needs them.

Shapes: n rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .prompts import check_text, check_vocabulary, pad_right


@dataclass(frozen=True)
class Texts:
    """Right-padded text: ids [n, T] and mask [n, T] (int64, 1 = real)."""

    ids: torch.Tensor
    mask: torch.Tensor

    def __getitem__(self, index: slice | torch.Tensor) -> Texts:
        return Texts(self.ids[index], self.mask[index])

    def __len__(self) -> int:
        return self.ids.shape[0]

    def targets(self) -> torch.Tensor:
        """[n, T - 1] bool: the tokens to be generated, all but the first."""
        return self.mask[:, 1:].bool()

    def split(self, sizes: Sequence[int]) -> list[Texts]:
        """Parts of so many rows."""
        parts = zip(self.ids.split(list(sizes)), self.mask.split(list(sizes)), strict=True)
        return [Texts(ids, mask) for ids, mask in parts]

    def widened(self, length: int) -> Texts:
        """[n, length], with padding behind."""
        more = [0, length - self.ids.shape[1]]
        return Texts(torch.nn.functional.pad(self.ids, more), torch.nn.functional.pad(self.mask, more))

    def interleaved(self, other: Texts) -> Texts:
        """[2n, T of both]: own row 0, the other's row 0, own row 1, …"""
        length = max(self.ids.shape[1], other.ids.shape[1])
        own, other = self.widened(length), other.widened(length)
        return Texts(
            torch.stack([own.ids, other.ids], dim=1).flatten(0, 1),
            torch.stack([own.mask, other.mask], dim=1).flatten(0, 1),
        )


def learning_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocabulary: int, pad_token_id: int | None
) -> Texts:
    """Text to learn from, with its padding behind it and no column of padding alone.

    Raises:
        ValueError: for ids outside the vocabulary, padding that is not masked, and rows of fewer than the three tokens
            [CLS], one of text, [SEP].
    """
    check_text(input_ids, attention_mask)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.ne(0)
    input_ids, mask = pad_right(input_ids.long(), mask.long())
    check_vocabulary(input_ids, mask, vocabulary)
    lengths = mask.sum(dim=1)
    real = mask.bool()
    unmasked = (input_ids == pad_token_id) & real if pad_token_id is not None else torch.zeros_like(real)
    shortest, longest, padding = torch.stack([lengths.min(), lengths.max(), unmasked.any().long()]).tolist()
    if padding:
        raise ValueError(
            f"`attention_mask` must be 0 where `input_ids` have padding (token {pad_token_id}), got 1 in rows "
            f"{unmasked.any(dim=1).nonzero().flatten().tolist()}"
        )
    if shortest < 3:
        rows = (lengths < 3).nonzero().flatten().tolist()
        raise ValueError(
            "`input_ids` must have at least three real tokens in every row ([CLS], text, [SEP]) for "
            f"`return_loss=True`; rows {rows} are empty texts with {lengths[rows].tolist()}"
        )
    return Texts(input_ids.masked_fill(~real, 0)[:, :longest], mask[:, :longest])
