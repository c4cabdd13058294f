"""The plan of a conversion for people: what comes from where, what is dropped, how large it gets."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from .job import Job
from .steps import How, TensorInfo
from .writing import into_shards, readable

_KINDS = {
    "lavis_stage1": "stage 1 of the original",
    "lavis_stage2": "stage 2 of the original",
    "ours": "BLIP-2",
    "transformers": "BLIP-2",
    "instructblip": "InstructBLIP",
}
_PARTS = (
    ("vision tower", re.compile(r"(vision_model|visual_encoder)\.(?!post_layernorm)")),
    ("language model", re.compile(r"(language_model|opt_model|t5_model)\.")),
    ("Q-Former and heads", re.compile("")),
)
_NAMES_SHOWN = 3


def plan_text(job: Job) -> str:
    """What is read, made, left out and written, in some lines."""
    lines = [*_sources(job), *_target(job), "", *_table(job), ""]
    lines += _ways(job)
    lines += _left_out(job)
    return "\n".join(lines).rstrip()


def _sources(job: Job) -> list[str]:
    found = job.found
    facts = [found.model, found.tower and f"{found.tower} tower", found.language]
    facts += [f"{job.config.vision_config.image_size} px" if found.image_size else None, found.checkpoint]
    said = ", ".join(fact for fact in facts if fact)
    lines = [f"read     {job.request.source}: {_KINDS[found.kind]} ({said})"]
    names = {"tower": "vision tower", "llm": "language model"}
    parts = job.sources.parts
    lines += [f"         {parts[part].name}: {what}" for part, what in names.items() if part in parts]
    for weights in parts.values():
        for file in weights.files:
            if not file.mapped:
                lines.append(f"         {file.path.name} has torch's old format, which has to be read as a whole")
            if file.beside:
                lines.append(f"         {file.path.name} also holds {', '.join(file.beside)}: not converted")
    return lines


def _target(job: Job) -> list[str]:
    request = job.request
    layout = {"ours": "this package", "transformers": "transformers", "lavis": "the original"}[request.layout]
    size = sum(tensor.nbytes for tensor in job.planned)
    if request.layout == "lavis":
        return [f"write    {request.to}: {layout}, one file of at most {readable(size)}"]
    count = len(into_shards(job.planned, request.max_shard_bytes))
    shards = "one file" if count == 1 else f"{count} shards of at most {readable(request.max_shard_bytes)}"
    lines = [f"write    {request.to}: {layout}, {readable(size)} in {shards}"]
    eps = job.config.vision_layernorm_eps
    if request.layout == "transformers" and eps not in (None, job.config.vision_config.layer_norm_eps):
        theirs = job.config.vision_config.layer_norm_eps
        lines.append(f"         transformers computes the norm of the image features with {theirs:g} for {eps:g}")
    return lines


def _table(job: Job) -> list[str]:
    """Per part: tensors, parameters, bytes and dtypes."""
    groups: dict[str, list[TensorInfo]] = {title: [] for title, _ in _PARTS}
    for tensor in job.planned:
        groups[next(title for title, pattern in _PARTS if pattern.match(tensor.name))].append(tensor.info)
    groups["all"] = [tensor.info for tensor in job.planned]
    lines = [f"{'part':<20}{'tensors':>8}{'parameters':>16}{'size':>10}  precision"]
    for title, infos in groups.items():
        if infos:
            count = sum(torch.Size(info.shape).numel() for info in infos)
            size = readable(sum(info.nbytes for info in infos))
            dtypes = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
            lines.append(f"{title:<20}{len(infos):>8}{count:>16,}{size:>10}  {dtypes}")
    return lines


def _ways(job: Job) -> list[str]:
    """How many tensors come about in which way, with the names of those that are not only renamed."""
    lines = []
    conversions = [job.inward] if job.outward is None else [job.inward, job.outward]
    for conversion in conversions:
        ways: dict[How, list[str]] = defaultdict(list)
        for step in conversion.steps:
            ways[step.how].append(step.target)
        for how, names in ways.items():
            if how in (How.RENAMED, How.COUNTED, How.FILLED):
                continue
            lines.append(f"{len(names)} made otherwise than by renaming ({how.value}): {_some(names)}")
    return lines


def _left_out(job: Job) -> list[str]:
    lines = []
    conversions = [job.inward] if job.outward is None else [job.inward, job.outward]
    for conversion in conversions:
        lines += _by_reason("dropped", {name.split(":", 1)[-1]: why for name, why in conversion.dropped.items()})
        lines += _by_reason("generated", conversion.generated)
        lines += _by_reason("not there and left out", conversion.absent)
    return lines


def _by_reason(what: str, reasons: Mapping[str, str]) -> Iterable[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, why in reasons.items():
        names[why].append(name)
    for why, group in names.items():
        yield f"{len(group)} {what} ({why}): {_some(group)}"


def _some(names: list[str]) -> str:
    """The names, numbered layers in one ("blocks.*.norm1.weight"), the first of them only."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) if len(names) > 1 else name for name in names))
    more = f" and {len(distinct) - _NAMES_SHOWN} more" if len(distinct) > _NAMES_SHOWN else ""
    return ", ".join(distinct[:_NAMES_SHOWN]) + more
