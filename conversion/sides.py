"""What is compared: a folder, a Hub id, a short name, or a `.pth` file of the original with what it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from pathlib import Path

import torch

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.towers import tower_side
from conversion.original_tower import LN_VISION_EPS
from conversion.tensor_sources import Weights, open_weights
from conversion.tower_folders import TowerOfFolder

OURS, TRANSFORMERS, ORIGINAL = "ours", "transformers", "the original"
LIBRARIES = (OURS, TRANSFORMERS)
# A field that only our configs have.
_OUR_FIELD = "itc_gather_gradients"
_LANGUAGE = ("language_model.", "opt_model.", "t5_model.")
TOWER_PREFIX = "visual_encoder."  # of the tower in a whole model of the original; its own file has none
_TOWER = ("visual_encoder.", "vision_model.")
_TRAINED_OF_TOWER = "vision_model.post_layernorm."


@dataclass(frozen=True)
class Side:
    """One of two models that are compared.

    Attributes:
        source: folder or Hub id of ours, of `transformers`' BLIP-2 or of InstructBLIP, the short name of a released
            checkpoint, or a `.pth` file of the original.
        llm: folder or Hub id of the language model; for a stage-2 `.pth` that does not hold it.
        tower: the frozen tower, for a `.pth` without it: its file (`eva_vit_g.pth`, `clip_vit_L.pth`), a CLIP or a
            BLIP-2 folder.
        config: folder, Hub id or file of a BLIP-2 config, for numbers that no shape shows (heads); for a `.pth`
            of another size than the released ones.
        tokenizer: folder or Hub id of the Q-Former's tokenizer (stage 1) if neither side's source has one.
        library: "ours" or "transformers", whose classes compute a folder. None: `transformers`, unless the
            config has fields of ours, or no image placeholder.
    """

    source: str
    llm: str | None = None
    tower: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    library: str | None = None


@dataclass
class OpenedSide:
    """A side whose files are known, none of whose weights are loaded.

    Attributes:
        side: as it was given.
        engine: `OURS`, `TRANSFORMERS` or `ORIGINAL`: what computes it.
        weights: of the source.
        tower: of the original's tower file, or of what stands in for it.
        config: of a folder, or that given for a `.pth`; None for a `.pth` of a released size.
        facts: what must be the same on both sides to compare them, by names for messages.
        vocabularies: number of ids that text may have: "text" of the language model or (stage 1) of the Q-Former,
            "question" of a question-conditioned Q-Former.
        epsilons: of the norms of "tower", "ln_vision" and "Q-Former", which results hardly show; None: not known.
        precisions: the floating-point dtypes in which each part is stored: "tower", "language model", "the rest".
    """

    side: Side
    engine: str
    weights: Weights
    tower: Weights | TowerOfFolder | None
    config: Blip2Config | None
    facts: dict[str, object]
    vocabularies: dict[str, int]
    epsilons: dict[str, float | None]
    precisions: dict[str, frozenset[torch.dtype]] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor; one of the tower's file by the name it has in a whole model of the original.

        Raises:
            ValueError: if there is none, naming it.
        """
        weights, own = self.weights, name
        if name not in weights.infos and self.tower is not None:
            weights, own = self.tower, name.removeprefix(TOWER_PREFIX)
        if own not in weights.infos:
            raise ValueError(f"{weights.name} lacks {own!r}")
        return weights.read(own)

    @property
    def is_retrieval(self) -> bool:
        return self.facts["kind"] == "image-text retrieval"

    @property
    def is_seq2seq(self) -> bool:
        return self.facts["language model"] == "encoder-decoder"


def open_folder(side: Side) -> OpenedSide:
    """A folder, Hub id or short name.

    Raises:
        ValueError: if it is no checkpoint of BLIP-2, or for arguments that only a `.pth` takes.
    """
    unused = [name for name in ("llm", "tower", "config") if getattr(side, name) is not None]
    if unused:
        raise ValueError(f"`{unused[0]}` is for a `.pth` of the original, {side.source} is a whole checkpoint")
    if side.library not in (None, *LIBRARIES):
        raise ValueError(f"`library` must be 'ours', 'transformers' or None, got {side.library!r}")
    weights = open_weights(side.source, "source")
    raw = config_dict(weights.source)
    if raw.get("model_type") not in ("blip-2", "instructblip"):
        raise ValueError(f"{side.source} is not a BLIP-2 checkpoint: its model_type is {raw.get('model_type')!r}")
    config = Blip2Config.from_dict(raw)
    is_retrieval = "itm_head.weight" in weights.infos or "vision_projection.weight" in weights.infos
    without_placeholder = config.image_token_index is None and not is_retrieval  # which transformers cannot compute
    engine = side.library or (OURS if _OUR_FIELD in raw or without_placeholder else TRANSFORMERS)
    if engine == TRANSFORMERS and not config.uses_eva_tower:
        raise ValueError(
            f"{side.source} has a tower of model_type {config.vision_config.model_type!r}, which transformers' BLIP-2 "
            "cannot compute; `library` must be 'ours'"
        )
    reads_questions = config.qformer_config.use_qformer_text_input and not is_retrieval
    facts = config_facts(config) | {
        "kind": "image-text retrieval" if is_retrieval else "generation",
        "language model": None if is_retrieval else _language_kind(config),
        "questions to the Q-Former": reads_questions,
    }
    words = config.qformer_config.vocab_size
    text = words if is_retrieval else config.text_config.get_text_config().vocab_size
    return OpenedSide(
        side,
        engine,
        weights,
        None,
        config,
        facts,
        {"text": text, "question": words},
        _epsilons(config, engine),
        stored_precisions(weights.infos),
    )


def config_facts(config: Blip2Config) -> dict[str, object]:
    """The numbers of a config that every side has."""
    return {
        "image size": tower_side(config.vision_config, "image_size"),
        "layers of the tower": config.vision_feature_index(),
        "width of the tower": config.vision_config.hidden_size,
        "layers of the Q-Former": config.qformer_config.num_hidden_layers,
        "width of the Q-Former": config.qformer_config.hidden_size,
        "queries": config.num_query_tokens,
    }


def _epsilons(config: Blip2Config, engine: str) -> dict[str, float | None]:
    tower = getattr(config.vision_config, "layer_norm_eps", None)
    of_ln_vision = config.vision_layernorm_eps
    if engine == TRANSFORMERS or of_ln_vision is None:
        of_ln_vision = tower if config.uses_eva_tower else LN_VISION_EPS
    return {"tower": tower, "ln_vision": of_ln_vision, "Q-Former": config.qformer_config.layer_norm_eps}


def config_dict(source: str) -> dict:
    """The `config.json` of a folder or Hub id, or given as a file, as it is written.

    Raises:
        ValueError: if there is none, or none that can be read.
    """
    path = Path(source) if Path(source).is_file() else hub_file(source, "config.json")
    if path is None:
        raise ValueError(f"{source} is not a checkpoint: it has no config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def hub_file(source: str, name: str) -> Path | None:
    """The local path of a file of a folder or Hub id; None if there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the warnings of `transformers` and ours, and without progress bars."""
    from transformers.utils import logging

    ours = getLogger("blip2_hf")
    before, bars, level = logging.get_verbosity(), logging.is_progress_bar_enabled(), ours.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours.setLevel(ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def part_of(name: str) -> str:
    """Which part a parameter belongs to, of the parts that are stored in precisions of their own."""
    if name.startswith(_LANGUAGE):
        return "language model"
    return "tower" if name.startswith(_TOWER) and not name.startswith(_TRAINED_OF_TOWER) else "the rest"


def stored_precisions(infos: Mapping[str, object]) -> dict[str, frozenset[torch.dtype]]:
    """Floating-point dtypes of each part."""
    found: dict[str, set[torch.dtype]] = {}
    for name, info in infos.items():
        if info.dtype.is_floating_point:
            found.setdefault(part_of(name), set()).add(info.dtype)
    return {part: frozenset(dtypes) for part, dtypes in found.items()}


def _language_kind(config: Blip2Config) -> str:
    return "encoder-decoder" if config.is_encoder_decoder else "decoder-only"
