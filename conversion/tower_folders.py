"""A tower from a folder under the names of the original's tower files, for the original's forward."""

from __future__ import annotations

import torch

from .detect import detect
from .steps import TensorInfo, apply, plan
from .tables import original_table, tower_table
from .tensor_sources import Weights
from .tower_tables import IN_MODEL

_EVERY_LAYER = 10**6  # none of them is dropped as the last


class TowerOfFolder:
    """A CLIP of `transformers`, or the tower of a BLIP-2 folder; read as `Weights` are.

    Attributes:
        name: what the user gave.
        infos: shape and dtype of each tensor, by the original's name.

    Raises:
        ValueError: if there is no tower in it.
    """

    def __init__(self, weights: Weights) -> None:
        self.name, self._weights = weights.name, weights
        given = {f"tower:{name}": info for name, info in weights.infos.items()}
        inward = plan(tower_table(detect(weights.infos).kind, _EVERY_LAYER), given, "to_ours")
        self._inward = {f"bridge:{step.target}": step for step in inward.steps}
        ours = {name: TensorInfo(step.shape, step.dtype) for name, step in self._inward.items()}
        outward = plan(original_table(), ours, "from_ours")
        self._outward = {step.target.removeprefix(IN_MODEL): step for step in outward.steps}
        self.infos = {name: TensorInfo(step.shape, step.dtype) for name, step in self._outward.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor by the original's name."""
        return apply(self._outward[name], self._ours)

    def _ours(self, name: str) -> torch.Tensor:
        return apply(self._inward[name], lambda given: self._weights.read(given.removeprefix("tower:")))


def open_tower(weights: Weights) -> Weights | TowerOfFolder:
    """Whatever it is, under the names of the original's tower files.

    Raises:
        ValueError: if it holds no tower.
    """
    found = detect(weights.infos)
    if not found.has_tower:
        raise ValueError(f"`tower` {weights.name} holds no tower but a {found.kind}")
    return weights if found.kind in ("tower_eva", "tower_clip") else TowerOfFolder(weights)
