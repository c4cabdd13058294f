"""State dicts of the original code <-> ours, by the table of `conversion.lavis_table`.

Tensors are passed on, not copied, except the merged biases. Both functions work on the meta device (where values that
should be equal cannot be compared) and on parts of a model, such as the original's files without the frozen tower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .lavis_table import HEAD_BIAS, POSITION_EMBEDDINGS, TABLE, WORD_EMBEDDINGS, How, Row, read

StateDict = dict[str, torch.Tensor]
BERT_POSITIONS = 512


def to_ours(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The original's state dict under our names; every key is accounted for.

    Raises:
        ValueError: naming the keys that no row of the table explains, or the key whose value is not what the table
            says of it (untied where it should be tied, half of a pair missing, …).
    """
    found = {name: _rows(name, "lavis") for name in state_dict}
    _check_explained(found, "the original")
    converted: StateDict = {}
    for name, rows in found.items():
        row, values = rows[0]
        tensor = state_dict[name]
        if row.how is How.BUFFER:
            _check_same(name, tensor, _position_ids(tensor.shape[-1], tensor), "0, 1, 2, …")
        elif row.how is How.REPEATED:
            _check_same(name, tensor, _required(state_dict, HEAD_BIAS[0], name), HEAD_BIAS[0])
        elif row.how is How.TIED:
            converted[row.ours] = _required(state_dict, WORD_EMBEDDINGS[0], name)
            _check_same(name, tensor, converted[row.ours], WORD_EMBEDDINGS[0])
        elif row.how is How.MERGED:
            query, value = (_required(state_dict, row.lavis.format(n=values["n"], qv=qv), name) for qv in "qv")
            converted[row.ours.format(**values)] = torch.cat([query, torch.zeros_like(value), value])
        elif row.how is How.RESHAPED:
            converted[row.ours] = _reshaped(name, tensor, (1,))
        else:
            _add(converted, row.ours.format(**values), tensor, name)
    return converted


def to_lavis(
    state_dict: Mapping[str, torch.Tensor], language: str | None = None, positions: int = BERT_POSITIONS
) -> StateDict:
    """Our state dict under the original's names; every key is accounted for, and what only the original has is made.

    Args:
        language: "opt" or "t5", which the original names its language model by; needed for stage 2 only.
        positions: length of the buffer `position_ids` where there are no position embeddings (stage 2).

    Raises:
        ValueError: naming the keys that no row of the table explains; for stage 2 without `language`.
    """
    if language not in (None, "opt", "t5"):
        raise ValueError(f"`language` must be 'opt', 't5' or None, got {language!r}")
    found = {name: _rows(name, "ours") for name in state_dict}
    _check_explained(found, "ours")
    converted: StateDict = {}
    for name, rows in found.items():
        tensor = state_dict[name]
        if language is None and any(row.language for row, _ in rows):
            raise ValueError(f"`language` must be 'opt' or 't5' for a state dict with {name!r}, got None")
        for row, values in rows:
            if row.language not in (None, language):
                continue
            if row.how is How.TIED:
                _check_same(name, tensor, _required(state_dict, WORD_EMBEDDINGS[1], name), WORD_EMBEDDINGS[1])
            elif row.how is How.MERGED:
                if tensor.ndim != 1 or len(tensor) % 3:
                    raise ValueError(f"{name!r} must be a vector of three equal parts, got {tuple(tensor.shape)}")
                for qv, part in zip("qv", (tensor.chunk(3)[0], tensor.chunk(3)[2]), strict=True):
                    converted[row.lavis.format(qv=qv, **values)] = part.clone()
            elif row.how is How.RESHAPED:
                converted[row.lavis] = _reshaped(name, tensor, ())
            else:
                converted[row.lavis.format(**values)] = tensor
    if HEAD_BIAS[1] in state_dict:
        tied = next(row for row in TABLE if row.how is How.TIED)
        converted[tied.lavis] = _required(state_dict, WORD_EMBEDDINGS[1], tied.ours)
    if any(name.startswith("Qformer.") for name in converted):
        buffer = next(row for row in TABLE if row.how is How.BUFFER)
        table = state_dict.get(POSITION_EMBEDDINGS[1])
        like = next(iter(state_dict.values())) if table is None else table
        converted[buffer.lavis] = _position_ids(positions if table is None else len(table), like)
    return converted


def _rows(name: str, side: str) -> list[tuple[Row, dict[str, str]]]:
    """The rows that explain a name of one side; several only on ours."""
    read_rows = ((row, read(getattr(row, side), name)) for row in TABLE)
    return [(row, values) for row, values in read_rows if values is not None]


def _check_explained(found: Mapping[str, list], side: str) -> None:
    unexplained = [name for name, rows in found.items() if not rows]
    if unexplained:
        raise ValueError(f"{len(unexplained)} keys of {side} are not in the table: {', '.join(unexplained)}")


def _required(state_dict: Mapping[str, torch.Tensor], name: str, because_of: str) -> torch.Tensor:
    if name not in state_dict:
        raise ValueError(f"{name!r} is missing, which {because_of!r} needs")
    return state_dict[name]


def _check_same(name: str, tensor: torch.Tensor, other: torch.Tensor, other_name: str) -> None:
    same = tensor.shape == other.shape and (tensor.is_meta or other.is_meta or torch.equal(tensor, other))
    if not same:
        raise ValueError(f"{name!r} must be equal to {other_name}, and is not: it would be lost")


def _reshaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.numel() != 1:
        raise ValueError(f"{name!r} must hold one number, got shape {tuple(tensor.shape)}")
    return tensor.reshape(shape)


def _position_ids(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, device=like.device)[None]


def _add(converted: StateDict, name: str, tensor: torch.Tensor, source: str) -> None:
    if name in converted:  # a state dict of two models at once
        raise ValueError(f"{source!r} would become {name!r}, which another key became already")
    converted[name] = tensor
