"""State dicts of the original code <-> ours, by the table of `conversion.lavis_table`.

Thin wrappers of `conversion.steps` for state dicts that are in memory. Tensors are passed on, not copied, except
parts of merged ones. Both functions work on the meta device (where values that should be equal cannot be compared) and
on parts of a model, such as the original's files without the frozen tower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .rows import Table
from .steps import BERT_POSITIONS, TensorInfo, apply, check, plan
from .tables import LANGUAGES, original_table

StateDict = dict[str, torch.Tensor]


def to_ours(state_dict: Mapping[str, torch.Tensor], language: str | None = None) -> StateDict:
    """The original's state dict under our names; every key is accounted for.

    Args:
        language: "opt" or "t5"; None: as the names say.

    Raises:
        ValueError: naming the keys that no row of the table explains, or the key whose value is not what the table
            says of it (untied where it should be tied, half of a pair missing, …).
    """
    if language is None:
        found = {name.split("_")[0] for name in state_dict if name.startswith(tuple(f"{k}_" for k in LANGUAGES))}
        if len(found) > 1:
            raise ValueError(f"a state dict has one language model, got names of {' and '.join(sorted(found))}")
        language = next(iter(found), None)
    return _converted(original_table(language), state_dict, "to_ours")


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
    table = original_table(language)
    if language is None:
        for name in state_dict:
            if name.startswith("language_"):
                raise ValueError(f"`language` must be 'opt' or 't5' for a state dict with {name!r}, got None")
    return _converted(table, state_dict, "from_ours", positions)


def _converted(
    table: Table, state_dict: Mapping[str, torch.Tensor], direction, positions: int = BERT_POSITIONS
) -> StateDict:
    infos = {f"bridge:{name}": TensorInfo(tuple(t.shape), t.dtype) for name, t in state_dict.items()}

    def get(name: str) -> torch.Tensor:
        return state_dict[name.removeprefix("bridge:")]

    conversion = plan(table, infos, direction, positions=positions)
    for rule in conversion.checks:
        check(rule, get)
    converted = {step.target: apply(step, get) for step in conversion.steps}
    for second, first in conversion.tied.items():
        converted[second] = converted[first]
    return converted
