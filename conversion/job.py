"""A conversion as a whole: what is read, what becomes of it, what is written. Planned from names and shapes alone.

Whatever the source is, it goes through our names; what is in another layout is made from them, tensor by tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from blip2_hf.checkpoint_facts import read_json
from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.configuration import Blip2Config
from blip2_hf.model_card import hub_id

from .configs import config_for, original_vocabulary, target_of
from .detect import Detected, detect
from .layouts import for_transformers, is_question_conditioned, transformers_target
from .precisions import cast, written_as
from .steps import Conversion, Step, TensorInfo, apply, check, plan
from .tables import LANGUAGES, reading_table, writing_table
from .tensor_sources import Sources, Weights, open_weights
from .writing import Planned, space_needed

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUTS = ("ours", "transformers", "lavis")
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Request:
    """What the user asks for; the fields are the options of `conversion/convert.py`."""

    source: str
    to: Path
    layout: Literal["ours", "transformers", "lavis"] = "ours"
    model: str | None = None
    config: str | None = None
    llm: str | None = None
    tower: str | None = None
    text: str | None = None
    dtype: torch.dtype | None = None
    trained_dtype: torch.dtype | None = None
    max_shard_bytes: int = SHARD_BYTES
    bridge_only: bool = False
    push_to_hub: str | None = None


@dataclass
class Job:
    """A planned conversion.

    Attributes:
        request: what the user asked for.
        sources: the opened files, "bridge" (the checkpoint), "tower" and "llm" where they are given.
        found: what the checkpoint is.
        config: of the model, in our class.
        inward: from the sources' names to ours.
        outward: from our names to those of the layout; None for our own layout.
    """

    request: Request
    sources: Sources
    found: Detected
    config: Blip2Config
    inward: Conversion
    outward: Conversion | None = None
    _ours: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ours = {step.target: step for step in self.inward.steps}

    @property
    def bridge(self) -> Weights:
        return self.sources.parts["bridge"]

    @property
    def from_original(self) -> bool:
        return self.found.kind.startswith("lavis")

    @property
    def model_class(self) -> str:
        generation = self.found.model == "generation"
        return "Blip2ForConditionalGeneration" if generation else "Blip2ForImageTextRetrieval"

    @cached_property
    def our_infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor under our names, as it is written."""
        return {step.target: TensorInfo(step.shape, self._dtype(step)) for step in self.inward.steps}

    @property
    def steps(self) -> dict[str, Step]:
        """The steps that give what is written, by the names that it is written under."""
        return self._ours if self.outward is None else {step.target: step for step in self.outward.steps}

    @cached_property
    def planned(self) -> list[Planned]:
        """What is written. (A `.pth` file holds tied tensors once, so it is smaller than their sum.)"""
        if self.outward is None:
            return [Planned(name, info) for name, info in self.our_infos.items()]
        return [Planned(step.target, TensorInfo(step.shape, step.dtype)) for step in self.outward.steps]

    @property
    def space(self) -> int:
        """Bytes of disk that are needed."""
        return space_needed(self.planned)

    @property
    def made_dtypes(self) -> set[torch.dtype]:
        return {planned.info.dtype for planned in self.planned if planned.info.dtype.is_floating_point}

    def our_tensor(self, name: str) -> torch.Tensor:
        """A tensor under our name, in the precision that is written."""
        step = self._ours[name]
        return cast(name, apply(step, self.sources.read), self._dtype(step))

    def run_checks(self) -> None:
        """Compares what is dropped as known with what it should be.

        Raises:
            ValueError: if something would be lost, naming it.
        """
        for rule in self.inward.checks:
            check(rule, self.sources.read)
        for rule in () if self.outward is None else self.outward.checks:
            check(rule, self._as_bridge)

    def make(self, name: str) -> torch.Tensor:
        """A tensor under the name that it is written under."""
        return self.make_step(self.steps[name])

    @cached_property
    def make_step(self) -> Callable[[Step], torch.Tensor]:
        if self.outward is None:
            return lambda step: self.our_tensor(step.target)
        return lambda step: apply(step, self._as_bridge)

    def _as_bridge(self, name: str) -> torch.Tensor:
        return self.our_tensor(name.removeprefix("bridge:"))

    def _dtype(self, step: Step) -> torch.dtype:
        return written_as(step.target, step.dtype, self.request.dtype, self.request.trained_dtype)


def prepare(request: Request) -> Job:
    """Opens the sources and plans the conversion; reads no more than names and shapes (old `.pth` files: everything).

    Raises:
        ValueError: naming the option or the file that is wrong, missing or not needed, and what would do; listing
            tensors that have no place.
        OSError: for files that cannot be read.
    """
    bridge = open_weights(request.source)
    infos = bridge.infos
    found = detect(infos, request.model, os.path.basename(request.source) if bridge.is_pth else None)
    if found.model is None:
        raise ValueError(f"`SOURCE` {request.source} is no BLIP-2 but a part of one: {found.kind}")
    _check_options(request, found, bridge)
    config = _config(request, found, bridge)
    parts = {"bridge": bridge}
    tower = _tower(request, found, parts)
    _language_model(request, found, config, parts)
    sources = Sources(parts)
    language = config.text_config.model_type if found.model == "generation" else None
    table = reading_table(found.kind, config.vision_feature_index(), tower, language)
    inward = plan(table, sources.infos(), "to_ours", target_of(config, found.model))
    job = Job(request, sources, found, config, inward)
    _check_t5(job)
    if request.layout != "ours":
        job.outward = _outward(job, language)
    config.dtype = next(iter(job.made_dtypes)) if len(job.made_dtypes) == 1 else torch.float32
    for part in (config.vision_config, config.qformer_config, config.text_config):
        part.dtype = config.dtype
    return job


def released_as(job: Job) -> str | None:
    """Hub id of the released checkpoint that the source is, or None; for the model card."""
    if job.from_original:
        return CHECKPOINTS[job.found.checkpoint].hub_id if job.found.checkpoint and not job.request.config else None
    return hub_id(job.bridge.source)


def _check_options(request: Request, found: Detected, bridge: Weights) -> None:
    name, original = request.source, found.kind.startswith("lavis")
    if request.layout not in LAYOUTS:
        raise ValueError(f"`--layout` must be one of {', '.join(LAYOUTS)}, got {request.layout!r}")
    is_file = request.to.suffix == ".pth"
    if is_file != (request.layout == "lavis"):
        expected = "a file that ends with .pth" if request.layout == "lavis" else "a folder"
        raise ValueError(f"`--to` must be {expected} with `--layout {request.layout}`, got {request.to}")
    if request.bridge_only and request.layout != "lavis":
        raise ValueError(f"`--bridge-only` needs `--layout lavis`, got {request.layout!r}")
    if request.push_to_hub and request.layout == "lavis":
        raise ValueError("`--push-to-hub` needs a folder that can be loaded, got `--layout lavis`")
    if request.push_to_hub is not None:
        _check_repository(request.push_to_hub)
    not_needed = [
        ("--tower", request.tower, found.has_tower, "has a tower of its own"),
        ("--llm", request.llm, found.has_language, "has a language model of its own"),
        ("--llm", request.llm, found.model == "retrieval", "has no language model"),
        ("--text", request.text, not original, "has its tokenizers beside it"),
        ("--text", request.text, found.model == "generation", "has a Q-Former that reads no text"),
        ("--config", request.config, not original, "has a config of its own"),
    ]
    for option, given, not_used, why in not_needed:
        compared = request.layout == "lavis" and option in ("--tower", "--llm")  # with what the result lacks
        if given is not None and not_used and not compared:
            raise ValueError(f"`{option}` is not used: {name} {why}")
    if request.model is not None and request.config is not None:
        raise ValueError("`--model` and `--config` both say what the shapes are; give one of them")
    if not original and not os.path.isdir(bridge.source) and os.path.exists(bridge.source):
        raise ValueError(f"`SOURCE` must be the folder of {name}, with its config.json, got the file")


def _check_repository(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`--push-to-hub` must be a repository's name, got {repo_id!r}: {error}") from error


def _config(request: Request, found: Detected, bridge: Weights) -> Blip2Config:
    if found.kind.startswith("lavis"):
        config = config_for(found, request.config)
        if request.llm is not None and (name := hub_id(request.llm)) is not None:
            config.text_config._name_or_path = name
        return config
    raw = read_json(bridge.source, "config.json")
    if raw.get("model_type") not in ("blip-2", "instructblip"):
        raise ValueError(f"`SOURCE` {request.source} has no config.json of BLIP-2 or InstructBLIP")
    if raw.get("language_adapter"):
        raise ValueError(f"`SOURCE` {request.source} has a LoRA adapter; merge it into the language model first")
    return Blip2Config.from_pretrained(bridge.source)


def _tower(request: Request, found: Detected, parts: dict[str, Weights]) -> str | None:
    """Opens the tower's own file; its kind."""
    if found.has_tower:
        return None
    if request.tower is None:
        files = {"eva": "eva_vit_g.pth", "clip": "clip_vit_L.pth or openai/clip-vit-large-patch14"}
        which = files.get(found.tower, "eva_vit_g.pth or clip_vit_L.pth")
        raise ValueError(f"`--tower` is needed, {request.source} was stored without its frozen tower: {which}")
    parts["tower"] = open_weights(request.tower, "--tower")
    tower = detect(parts["tower"].infos)
    if not tower.has_tower:
        raise ValueError(f"`--tower` {request.tower} holds no tower but a {tower.kind}")
    if found.tower is not None and tower.tower != found.tower:
        raise ValueError(
            f"`--tower` {request.tower} is a tower of kind {tower.tower}, {request.source} was trained with "
            f"{found.tower}"
        )
    return tower.kind


def _language_model(request: Request, found: Detected, config: Blip2Config, parts: dict[str, Weights]) -> None:
    """Opens the language model's own files."""
    own = any(name.startswith("language_model.") for name in parts["bridge"].infos)  # of a kind that is not told apart
    if found.model == "retrieval" or found.has_language or own:
        return
    if request.llm is None:
        which = config.text_config._name_or_path or f"the {config.text_config.model_type} that it was trained with"
        raise ValueError(f"`--llm` is needed, {request.source} was stored without its language model: {which}")
    parts["llm"] = open_weights(request.llm, "--llm")
    language = detect(parts["llm"].infos)
    if language.kind != "language_model" or language.language != found.language:
        raise ValueError(
            f"`--llm` {request.llm} must be a language model of kind {found.language}, got "
            f"{language.language if language.kind == 'language_model' else language.kind}"
        )


def _check_t5(job: Job) -> None:
    if job.config.text_config.model_type in ("t5", "mt5", "umt5") and job.found.model == "generation":
        halves = {info.dtype for name, info in job.our_infos.items() if name.startswith("language_model.")}
        if torch.float16 in halves:
            raise ValueError(
                "`--dtype` must be bfloat16 or float32 for a T5, whose activations overflow in float16, got "
                f"{'float16 in its files' if job.request.dtype is None else 'float16'}"
            )


def _outward(job: Job, language: str | None) -> Conversion:
    config, request = job.config, job.request
    infos: Mapping[str, TensorInfo] = {f"bridge:{name}": info for name, info in job.our_infos.items()}
    if request.layout == "transformers":
        layout = "instructblip" if is_question_conditioned(config, job.found.model) else "transformers"
        return plan(writing_table(layout), infos, "from_ours", transformers_target(config, job.found.model))
    if language not in (None, *LANGUAGES):
        raise ValueError(f"`--layout lavis` has no names for a language model of type {language!r}")
    if is_question_conditioned(config, job.found.model):
        raise ValueError("`--layout lavis` has no BLIP-2 whose Q-Former reads the question")
    return plan(
        writing_table("lavis", language, with_tower=not request.bridge_only, with_language_model=False),
        infos,
        "from_ours",
        vocabulary=None if language is None else original_vocabulary(config),
        positions=config.qformer_config.max_position_embeddings,
    )


def written_config(job: Job) -> dict:
    """Content of the `config.json` that is written."""
    if job.request.layout == "transformers":
        return for_transformers(job.config, job.found.model)
    return {**job.config.to_dict(), "architectures": [job.model_class]}
