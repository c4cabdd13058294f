"""Several processes on parts of a batch give the losses and gradients of one process on the whole.

Reference: one process, the whole batch at once, the same negatives. Losses are averaged over processes, as
data-parallel training averages gradients.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import distributed_objectives
from distributed_objectives import IMAGE_IDS, LENGTHS, Case, Step, alone, batch_of, largest_error, unsharded
from distributed_worker import Failure, run
from lavis_names import fixture

TOLERANCE = 1e-5  # measured: 3e-6 at most
NO_ITC, NO_ITM, NO_ITG = ({f"{name}_weight": 0.0} for name in ("itc", "itm", "itg"))
UNEQUAL_IDS = Case(sizes=(5, 3), image_ids=IMAGE_IDS, negatives="sampled")

TWO = {
    "unequal lengths": Case(),
    "equal lengths": Case(lengths=(6,) * 8),
    "image ids": Case(image_ids=IMAGE_IDS),
    "sampled": Case(negatives="sampled"),
    "sampled, image ids": Case(negatives="sampled", image_ids=IMAGE_IDS),
    "one image, so no negatives": Case(negatives="sampled", image_ids=(7,) * 8),
    "sampled, one choice": Case(negatives="peaked"),
    "unequal numbers": Case(sizes=(5, 3)),
    "one pair in a process": Case(sizes=(1, 7), negatives="sampled"),
    "one pair in each process": Case(sizes=(1, 1)),
    "checkpointing": Case(checkpointing=True),
    "chunks": Case(chunk_size=3, image_ids=IMAGE_IDS),
    "chunks, unequal numbers": replace(UNEQUAL_IDS, chunk_size=2),
    "chunks, checkpointing": Case(chunk_size=2, checkpointing=True),
    "numbers given": Case(counts=True),
    "no ITC": Case(config=NO_ITC),
    "no ITC, sampled": Case(config=NO_ITC, negatives="sampled"),
    "no ITM": Case(config=NO_ITM),
    "no ITG": Case(config=NO_ITG),
    "ITG alone": Case(config=NO_ITC | NO_ITM),
    "weights": Case(config={"itc_weight": 0.5, "itm_weight": 2.0, "itg_weight": 3.0}),
    "gathered side without gradient": Case(config={"itc_gather_gradients": False}),
    "frozen tower": Case(frozen=True),
    "image features": Case(inputs="image_embeds"),
    "tower's features": Case(inputs="vision_features"),
    "the original's weights": Case(sizes=(3, 3), original=True, config={"itc_gather_gradients": False}),
    "the original's weights, unequal": Case(sizes=(2, 4), original=True),
}
THREE = {
    "equal numbers": Case(sizes=(2, 2, 2), lengths=(5, 9, 3, 6, 4, 7)),
    "unequal numbers, image ids": Case(sizes=(4, 1, 3), image_ids=IMAGE_IDS, negatives="sampled"),
    "chunks": Case(sizes=(3, 2, 3), chunk_size=2),
}
DDP = {
    "all": Case(negatives="sampled", image_ids=IMAGE_IDS),
    "unequal numbers": Case(sizes=(5, 3)),
    "checkpointing": Case(checkpointing=True),
    "chunks": Case(chunk_size=2, checkpointing=True),
    "chunks, unequal numbers": replace(UNEQUAL_IDS, chunk_size=2),
    "no ITC": Case(config=NO_ITC, checkpointing=True),
    "ITG alone": Case(config=NO_ITC | NO_ITM),
    "tower's features": Case(inputs="vision_features", frozen=True),
}
SHARDED = {
    "all": Case(negatives="sampled", image_ids=IMAGE_IDS),
    "checkpointing": Case(checkpointing=True),
    "unequal numbers": Case(sizes=(5, 3)),
    "frozen tower": Case(frozen=True, checkpointing=True),
    "frozen tower in half precision": Case(half_tower=True),
    "gathered side without gradient": Case(config={"itc_gather_gradients": False}),
    "no ITM": Case(config=NO_ITM),
    "no ITG": Case(config=NO_ITG),
    "no ITC": Case(config=NO_ITC),
    "ITG alone": Case(config=NO_ITC | NO_ITM),
    "chunks": Case(chunk_size=2, image_ids=IMAGE_IDS),
    "chunks, checkpointing": Case(chunk_size=3, checkpointing=True),
    "chunks, unequal numbers": replace(UNEQUAL_IDS, chunk_size=2),
    "chunks, one pair in a process": replace(UNEQUAL_IDS, sizes=(1, 7), chunk_size=2),
}
ACCELERATE = {name: SHARDED[name] for name in ("all", "checkpointing", "frozen tower", "no ITG", "no ITC", "chunks")}
GROUPS = {
    "two": (TWO, 2, "none"),
    "three": (THREE, 3, "none"),
    "ddp": (DDP, 2, "ddp"),
    "fsdp": (SHARDED, 2, "fsdp"),
    "fsdp by layer": (ACCELERATE, 2, "fsdp by layer"),
    "accelerate": (ACCELERATE, 2, "accelerate"),
}
ALL = [pytest.param(group, name, id=f"{group}: {name}") for group, (cases, *_) in GROUPS.items() for name in cases]


@cache
def results(group: str) -> list[dict[str, Step]]:
    """Of each process, for every case of a group: started once."""
    cases, processes, wrapper = GROUPS[group]
    return run(distributed_objectives.run, processes, cases, wrapper)


@cache
def whole(group: str, name: str) -> Step:
    case = GROUPS[group][0][name]
    return alone(case, found(group, name)["draws"] if case.negatives == "sampled" else None)


def found(group: str, name: str) -> Step:
    steps = [process[name] for process in results(group)]
    for index, step in enumerate(steps):
        assert not isinstance(step, Failure), f"process {index}: {step}"
    if GROUPS[group][2] not in ("none", "ddp"):
        return unsharded(steps)
    for step in steps[1:]:
        assert largest_error(step, steps[0])[0] < 1e-6  # what was averaged is the same on all
    return steps[0]


@pytest.mark.parametrize(("group", "name"), ALL)
def test_equals_one_process_on_the_whole_batch(group: str, name: str) -> None:
    error, where = largest_error(found(group, name), whole(group, name))
    assert error < TOLERANCE, f"{where}: {error}"


@pytest.mark.parametrize("name", ["sampled", "sampled, image ids", "one pair in a process"])
def test_drawn_negatives_are_of_other_images(name: str) -> None:
    draws = found("two", name)["draws"]
    ids = torch.tensor(IMAGE_IDS) if TWO[name].image_ids else torch.arange(8)
    assert set(draws) == {"images", "texts"}
    for drawn in draws.values():
        assert not (ids[drawn] == ids).any()
        assert (drawn[:4] >= 4).any() or (drawn[4:] < 4).any()  # also those of the other process


def test_losses_are_those_of_the_original_code() -> None:
    stored = fixture("stage1_tiny")
    for name in ("the original's weights", "the original's weights, unequal"):
        values = found("two", name)["losses"]
        for ours, theirs in (
            ("loss_itc", "loss_itc"),
            ("loss_itm", "loss_itm"),
            ("loss_itg", "loss_lm"),
            ("loss",) * 2,
        ):
            torch.testing.assert_close(values[ours], stored[f"out/{theirs}"].view_as(values[ours]), atol=0, rtol=1e-5)


def test_every_part_matters() -> None:
    """Negative controls: differences that the comparison must notice."""
    right = found("two", "unequal lengths")
    for other in ("image ids", "sampled", "gathered side without gradient", "numbers given", "weights"):
        wrong = found("two", other)
        assert wrong["gradients"].keys() == right["gradients"].keys()
        assert largest_error(wrong, right)[0] > 0.1
    # ITG's mean over all tokens is not the mean of the processes' means, as the original code has it
    lengths = torch.tensor(LENGTHS) - 1
    assert lengths[:4].sum() != lengths[4:].sum()


def test_gathered_side_without_gradient() -> None:
    """As recorded of the original code: the same on one and two processes (above), the temperature's gradient that of
    the true one, the others far from it."""
    true, cut = (alone(Case(config=NO_ITM | NO_ITG | {"itc_gather_gradients": flag})) for flag in (True, False))
    torch.testing.assert_close(true["losses"], cut["losses"])
    torch.testing.assert_close(true["gradients"]["temperature"], cut["gradients"]["temperature"])
    first, second = (
        torch.cat([step["gradients"][name].flatten() for name in true["gradients"] if name != "temperature"])
        for step in (true, cut)
    )
    assert (first - second).norm() / first.norm() > 0.2


def test_image_ids_on_one_process_only() -> None:
    for result in run(distributed_objectives.run_bad, 2):
        assert isinstance(result["image_ids"], Failure)
        assert "ValueError: `image_ids` must be given on all processes or on none, got [1, 0]" in result["image_ids"]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_accumulated_generation_loss_is_that_of_the_whole(chunk_size: int | None) -> None:
    """With the numbers of the whole given, the micro-batches' sums add up."""
    case = Case(counts=False, config=NO_ITC | NO_ITM)
    model = distributed_objectives.model_of(case)
    tokens = sum(LENGTHS) - len(LENGTHS)
    total = 0.0
    for rows in (slice(0, 3), slice(3, 8)):
        batch = batch_of(case, rows)
        for name in ("negative_image_indices", "negative_text_indices"):
            del batch[name]
        loss = model(**batch, return_loss=True, num_items_in_batch=tokens, chunk_size=chunk_size).loss
        loss.backward()
        total += loss.detach()
    step = {"losses": {"loss": total}, "gradients": distributed_objectives.gradients_of(model), "draws": {}}
    expected = alone(case)
    expected["losses"] = {"loss": expected["losses"]["loss"]}
    assert largest_error(step, expected)[0] < TOLERANCE
