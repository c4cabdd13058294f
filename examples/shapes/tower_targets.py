"""Scenes as what a vision tower is trained on: pictures, and what each patch and the whole of it show. No captions.

Shapes: B scenes, P patches (row by row, without class token).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch.utils.data import Dataset

from blip2_hf.data.shapes.drawing import patch_owners, picture
from blip2_hf.data.shapes.scenes import COLOURS, MOST_THINGS, SHAPES, SIDE, SIZES, TEXTURES, Scene, draw_scene

IGNORED = -100
# Per patch: attribute -> names; of shape and colour, class 0 is the background.
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}
_WITH_BACKGROUND = ("shape", "colour")
COMBINATIONS = len(SHAPES) * len(COLOURS)
COUNTS = MOST_THINGS
# Of a thing's centre: along each axis so many places of the picture are told apart.
AXES, PLACES = ("column", "row"), 8
# Share of a patch that a thing must cover to be what it shows; less than `_TRACE` of all things is background.
_SHOWN, _TRACE = 0.15, 0.04


def classes(attribute: str) -> int:
    """Classes of the head for an attribute of a patch."""
    return len(ATTRIBUTES[attribute]) + (attribute in _WITH_BACKGROUND)


def targets(scene: Scene, patch: int) -> dict[str, np.ndarray]:
    """What a scene's patches and the whole of it show.

    Returns:
        "shape", "colour", "size", "texture": int64 [P], the class of the thing that covers most of the patch; 0 of
        shape and colour is the background, and `IGNORED` stands where it cannot be said. "centre": float32 [P, 2], from
        the patch to the thing's centre, right and down, in patches; NaN where there is none. "set": float32
        [COMBINATIONS], which (shape, colour) there are; "count": how many things, less one.
    """
    shares = patch_owners(scene, patch)
    shares = shares.reshape(len(shares), -1)  # [1 + things, P]
    thing = shares[1:].argmax(axis=0)
    shown = shares[1:].max(axis=0) >= _SHOWN
    empty = shares[0] > 1 - _TRACE
    found: dict[str, np.ndarray] = {}
    for attribute, names in ATTRIBUTES.items():
        background = attribute in _WITH_BACKGROUND
        own = np.array([list(names).index(getattr(one, attribute)) + background for one in scene.things])
        otherwise = np.where(empty, 0, IGNORED) if background else IGNORED
        found[attribute] = np.where(shown, own[thing], otherwise).astype(np.int64)
    # In the picture, not from the patch: a tower that is asked for the way to the centre alone unlearns where it looks.
    centres = np.array([[one.x, one.y] for one in scene.things], dtype=np.float32)[thing]
    found["centre"] = np.where(shown[:, None], (centres - SIDE / 2) / patch, np.nan).astype(np.float32)
    cells = (centres * PLACES / SIDE).astype(np.int64).clip(0, PLACES - 1)
    for axis, name in enumerate(AXES):
        found[name] = np.where(shown, cells[:, axis], IGNORED)
    found["set"] = np.zeros(COMBINATIONS, dtype=np.float32)
    for one in scene.things:
        place = SHAPES.index(one.shape) * len(COLOURS) + ATTRIBUTES["colour"].index(one.colour)
        found["set"][place] = 1.0
    found["count"] = np.array(len(scene.things) - 1)
    return found


def collate(scenes: list[Scene], patch: int) -> dict[str, torch.Tensor]:
    """A batch: the targets with a leading B, and "pixels" uint8 [B, 3, SIDE, SIDE]."""
    rows = [targets(scene, patch) for scene in scenes]
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    pixels = np.stack([picture(scene) for scene in scenes]).transpose(0, 3, 1, 2)
    return {**batch, "pixels": torch.from_numpy(np.ascontiguousarray(pixels))}


class TowerBatches(Dataset):
    """Item `step` is a batch of scenes that no other step has, none with a combination that is held out."""

    def __init__(self, steps: int, batch_size: int, patch: int, seed: int):
        self.steps, self.batch_size, self.patch, self.seed = steps, batch_size, patch, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 0, step])
        return collate([draw_scene(rng) for _ in range(self.batch_size)], self.patch)


def unseen_scenes(count: int, seed: int, *, needed: Collection[tuple[str, str]] | None = None) -> list[Scene]:
    """Scenes that no step trains on; with `needed`=`scenes.HELD_OUT`, of combinations that none has."""
    rng = np.random.default_rng([seed, 1, int(needed is not None)])
    return [draw_scene(rng, needed=needed) for _ in range(count)]
