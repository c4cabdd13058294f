"""Writing what a job makes, and saying what it is to be compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .extras import Extras, generation_config, model_card, processor_for_original, processor_of
from .job import Job, released_as, written_config
from .lavis_files import write_pth
from .sides import Side
from .steps import How, apply, check, plan
from .tables import original_table
from .tensor_sources import Sources, open_weights
from .writing import write_shards

Progress = Callable[[int, int], None]


def write_folder(job: Job, folder: Path, progress: Progress) -> None:
    """Weights and everything else into `folder`; the small files first, as they are what may be missing.

    Raises:
        ValueError, OSError: for a tokenizer that is not there or does not fit, a full disk, numbers that are too large.
    """
    extras_of(job).write(folder)
    total, done = sum(tensor.nbytes for tensor in job.planned), 0

    def count(tensor) -> None:
        nonlocal done
        done += tensor.nbytes
        progress(done, total)

    write_shards(folder, job.planned, job.make, job.request.max_shard_bytes, count)


def write_lavis_file(job: Job, path: Path, progress: Progress) -> None:
    """The original's `.pth`.

    Raises:
        ValueError, OSError: as `write_folder`.
    """
    write_pth(path, list(job.steps.values()), job.make_step)
    progress(1, 1)


def extras_of(job: Job) -> Extras:
    """The small files of the target folder."""
    request, config = job.request, job.config
    if job.from_original:
        processor = processor_for_original(config, job.model_class, request.llm, request.text)
    else:
        processor = processor_of(job.bridge.source)
    generation = None
    if job.found.model == "generation":
        generation = generation_config(config, None if job.from_original else job.bridge.source, processor)
    card = model_card(config, job.model_class, job.our_infos, released_as(job), request.push_to_hub)
    return Extras(written_config(job), processor, generation, card)


def read_back(job: Job, path: Path) -> None:
    """Converts a written `.pth` back and compares every tensor bit for bit.

    Raises:
        ValueError: if one is not what it was made from, naming it.
    """
    weights = open_weights(path)
    sources = Sources({"bridge": weights})
    language = job.config.text_config.model_type if job.found.model == "generation" else None
    back = plan(original_table(language), sources.infos(), "to_ours")
    for rule in back.checks:
        check(rule, sources.read)
    for step in back.steps:
        name = job.inward.tied.get(step.target, step.target)
        found, expected = apply(step, sources.read), job.our_tensor(name)
        if found.ndim:  # without the rows for added tokens
            expected = expected[: len(found)]
        if step.how is How.MERGED:  # without the biases of the keys, which change nothing
            query, key, value = expected.chunk(3)
            expected = torch.cat([query, torch.zeros_like(key), value])
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise ValueError(f"{step.target!r} of {path.name} is not what it was made from")


def can_run(job: Job) -> bool:
    """Whether what is written is a whole model, or what it lacks is at hand."""
    if job.request.layout != "lavis":
        return True
    has_tower = not job.request.bridge_only or job.request.tower is not None
    return has_tower and (job.found.model == "retrieval" or job.request.llm is not None)


def sides(job: Job, made: Path) -> tuple[Side, Side]:
    """The source and what was made of it, for `conversion.verify.verify`."""
    request = job.request
    given = {"llm": request.llm, "tower": request.tower, "config": request.config, "tokenizer": request.text}
    source = Side(request.source, **given) if job.from_original else Side(request.source)
    if request.layout != "lavis":
        return source, Side(str(made))
    lacks = {"llm": request.llm, "tower": request.tower if request.bridge_only else None, "tokenizer": request.text}
    return source, Side(str(made), config=request.config if job.from_original else job.bridge.source, **lacks)
