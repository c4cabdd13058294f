"""Writing a `.pth` file as the original's runner does: {"model": state dict}, what is tied stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .steps import Step


def write_pth(path: Path, steps: Sequence[Step], make: Callable[[Step], torch.Tensor]) -> None:
    """Writes the tensors of all steps.

    They are in memory together, as `torch.save` needs them: as much memory as the file has bytes.

    Args:
        make: gives the tensor of a step; called once for those that are the same.

    Raises:
        OSError: if it cannot be written, for example as the disk is full.
    """
    made: dict[tuple, torch.Tensor] = {}
    state_dict: dict[str, torch.Tensor] = {}
    for step in steps:
        # Two names of one tensor of ours stay two names of one tensor: only a scalar and a vector are not the same.
        key = (step.inputs, step.how, step.part, step.shape) if step.inputs else (step.target,)
        if key not in made:
            made[key] = make(step).clone(memory_format=torch.contiguous_format)  # nothing but its own values is stored
        state_dict[step.target] = made[key]
    try:
        torch.save({"model": state_dict}, path)
    except RuntimeError as error:  # what torch makes of an error of the file system
        raise OSError(f"{path.name} cannot be written (is the disk full?): {error}") from error
