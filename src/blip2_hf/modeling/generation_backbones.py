"""A model for generative learning from its backbones (Li et al. 2023, sec. 3.3 and 3.4), and a text branch for it."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..checkpoints import path_or_id, resolve_checkpoint
from ..configuration import Blip2Config, Blip2QFormerConfig
from .backbone_assembly import (
    NOT_IN_BERT,
    build_from,
    check_dtype,
    check_width,
    made_origins,
    name_part,
    new_keys,
    qformer_fields,
    take_overrides,
    tensor_origins,
)
from .backbone_report import BackboneReport, SourceWeights
from .base import Blip2PreTrainedModel
from .bert_weights import bert_fields, read_bert
from .language_weights import LanguageSource, language_source
from .qformer import Blip2TextEmbeddings
from .quantization import language_model_only
from .stage1_weights import NO_TEXT_BRANCH, STAGE1_HEADS, read_stage1
from .text_branch import TEXT_FIELDS, insert_text_branch, text_branch_shapes
from .vision_weights import UNUSED_KEYS, VisionSource, drop_later_layers, tower_fields, vision_source

logger = logging.get_logger(__name__)

# Fields of `Blip2Config` that come from the backbones, or mean nothing in a generation model.
_REFUSED = {
    "vision_config",
    "text_config",
    "connector_of",
    "language_adapter",
    "image_text_hidden_size",
    "itc_weight",
    "itm_weight",
    "itg_weight",
    "label_smoothing",
    "temperature_init",
    "temperature_floor",
    "itc_gather_gradients",
}
_PROJECTION = r"^language_projection\."
_QFORMER = r"^(query_tokens$|qformer\.|embeddings\.)"
_TOWER = r"^vision_model\."
_NORM = r"^vision_model\.post_layernorm\."
# Of a quantised model.
_QUANTIZED = (
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_8bit",
    "is_8bit_serializable",
    "is_loaded_in_4bit",
    "is_4bit_serializable",
)
# What two configs of one tower have in common; the image size may differ.
_SAME_TOWER = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "hidden_act",
)


class LanguageConnectorMixin:
    """For `Blip2PreTrainedModel`: what stands between the bridge and the language model."""

    def _add_connector(self, config: Blip2Config) -> None:
        """Bridge, embeddings of the question (if there is a text branch) and projection."""
        self._add_bridge(config)
        if config.qformer_config.use_qformer_text_input:
            self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        width = config.text_config.get_text_config().hidden_size
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)


class _WithoutLanguageModel(LanguageConnectorMixin, Blip2PreTrainedModel):
    """A generation model without its language model, which is loaded by itself."""

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self._add_connector(config)
        self.post_init()


class Stage2BackbonesMixin(LanguageConnectorMixin):
    """`from_backbones` and `add_text_branch` of `Blip2ForConditionalGeneration`."""

    # Where each tensor came from; None unless the model was made by `from_backbones` or got a text branch.
    backbone_report: BackboneReport | None = None

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | dict[str, Any] | PreTrainedConfig | None = None,
        language: str | os.PathLike | dict[str, Any] | PreTrainedConfig | None = None,
        stage1: str | os.PathLike | None = None,
        *,
        text: str | os.PathLike | None = None,
        text_branch: bool = False,
        vision_dtype: torch.dtype | None = None,
        language_dtype: torch.dtype | None = None,
        freeze_vision: bool = True,
        freeze_language_model: bool = True,
        quantization_config: Any = None,
        **overrides: Any,
    ):
        """A model to train from the result of stage 1 and a language model, as the paper starts generative learning.

        Only `language_projection` is new: N(0, 0.02) (`initializer_range`) from torch's global generator. Nothing is
        dropped or made up unseen: `model.backbone_report` has where each tensor came from (logged at INFO).

        The image placeholder is the language tokenizer's image token, else the id behind its vocabulary. Its embedding
        is never looked up, so the language model's embeddings are left as they are. `transformers`' own BLIP-2 does
        look it up: it reads such checkpoints where the matrix has spare rows, as those of OPT and T5 have.

        A text ends with the tokenizer's end token, with OPT with a line break, as in the original code.

        Args:
            vision: as in `Blip2ForImageTextRetrieval.from_backbones`; None: the tower of `stage1`. With `stage1` it
                must be a checkpoint of the same tower (the image size may differ), and `post_layernorm` is that of
                `stage1`, which was trained with its Q-Former.
            language: a folder or a Hub id of a causal or sequence-to-sequence language model, which is held in memory
                once; or a config or its dictionary, for a random one.
            stage1: a retrieval checkpoint (folder, Hub id, short name, connector-only folder) for queries, Q-Former and
                tower. None: no representation learning, which the paper finds to be much worse (fig. 5).
            text: without `stage1`, a BERT that the Q-Former starts from (as stage 1 starts); None: a random Q-Former.
            text_branch: keep the Q-Former's text embeddings and feed-forward layers, for questions (fig. 7).
            vision_dtype: precision of the frozen tower; None: float32.
            language_dtype: precision of the frozen language model; None: that of its files (a random one: float32). The
                paper has float16 for OPT and bfloat16 for FlanT5. Everything trained is float32.
            freeze_vision, freeze_language_model: whether the parts are frozen (see the methods of these names).
            quantization_config: of the language model alone, as of its `from_pretrained`.
            overrides: fields of `Blip2Config`, such as `vision_feature_layer`, or without `stage1`
                `num_query_tokens`; `qformer_config` is a dictionary of the fields to be other than the source's.

        Returns:
            The model in evaluation mode; `stage2_processor` with the same arguments gives its processor. Save it in
            full before `save_pretrained(connector_only=True)`.

        Raises:
            ValueError: for sources that do not go together, models of the wrong kind, a T5 in float16, unknown fields,
                files with keys that do not belong there, that lack some or have others' shapes (naming them).
            OSError: for a name that is neither a folder nor on the Hub.
        """
        qformer = take_overrides(overrides, _REFUSED)
        if "use_qformer_text_input" in qformer:
            raise ValueError("`qformer_config` must not have `use_qformer_text_input`; give `text_branch`")
        check_dtype("vision_dtype", vision_dtype, freeze_vision)
        check_dtype("language_dtype", language_dtype, freeze_language_model)
        _check_sources(vision, language, stage1, text)
        if quantization_config is not None and not freeze_language_model:
            raise ValueError("`quantization_config` needs `freeze_language_model=True`, got False")
        if not freeze_language_model:
            language_dtype = torch.float32
        words = language_source(language, language_dtype, quantization_config)
        bridge = _bridge_source(stage1, text, text_branch, qformer)
        tower = _tower(vision, bridge, vision_dtype or torch.float32)
        fields = {"image_token_index": words.image_token_index, **bridge.fields, **tower.fields, **overrides}
        config = Blip2Config(**fields, text_config=words.config)
        check_width(config, qformer)
        drop_later_layers(tower, config)
        if vision is not None:
            name_part(config.vision_config, tower.name)
        if text is not None:
            name_part(config.qformer_config, bridge.origin[1])
        name_part(config.text_config, words.name)
        with torch.device("meta"):
            model = cls(config)
        _check_embeddings(model, words)
        tensors = {**tower.tensors, **bridge.weights.tensors}
        connector, info = build_from(_WithoutLanguageModel, config, tensors)
        new = new_keys(connector, info, tower, bridge.origin, bridge.optional)
        made = made_origins(connector, new, tower)
        del tensors, tower.tensors, bridge.weights.tensors
        if vision_dtype is not None:
            connector.vision_model.to(vision_dtype)
            connector.vision_model.post_layernorm.float()
        _put_together(model, connector, words.load())
        model.eval()
        if freeze_vision:
            model.freeze_vision()
        if freeze_language_model:
            model.freeze_language_model()
        model.backbone_report = tensor_origins([tower, bridge.weights, words.weights], [*made, *words.made])
        logger.info(f"{cls.__name__} from backbones:\n{model.backbone_report}")
        if stage1 is None:
            start = "is random" if text is None else f"starts from {bridge.origin[1]}"
            logger.warning(f"no `stage1`: the Q-Former {start}, without representation learning")
        return model

    def add_text_branch(self, source: str | os.PathLike) -> None:
        """Gives the Q-Former a text branch, in place, to read the question as well (the paper's figure 7 for VQA).

        Its embeddings and the text's feed-forward layers come from `source`; everything else stays as trained. From
        then on the model needs `qformer_input_ids`: `processor.qformer_tokenizer = stage1_tokenizer(source)`. Call this
        before an optimiser is made. Where the tensors came from is added to `backbone_report` (logged at INFO).

        Args:
            source: the checkpoint of stage 1 (folder, Hub id, short name, connector-only folder), or a BERT.

        Raises:
            ValueError: if there is a text branch already, or that of `source` does not fit the Q-Former (naming what).
            OSError: for a name that is neither a folder nor on the Hub.
        """
        config = copy.deepcopy(self.config.qformer_config)
        if config.use_qformer_text_input:
            raise ValueError("the Q-Former has a text branch already")
        name = resolve_checkpoint(path_or_id("source", source))
        raw, _ = PreTrainedConfig.get_config_dict(name)
        if raw.get("model_type") == "bert":
            fields = qformer_fields(name, {})
        else:
            name, stage1, weights = read_stage1("source", name)
            fields = stage1.qformer_config.to_dict()
        if fields["hidden_act"] != config.hidden_act:
            raise ValueError(
                f"`source` {name} has the activation {fields['hidden_act']!r}, the Q-Former has {config.hidden_act!r}"
            )
        for field_name in TEXT_FIELDS:
            setattr(config, field_name, fields[field_name])
        if raw.get("model_type") == "bert":
            weights = read_bert(name, config, bert_fields(name)["vocab_size"])
        shapes = text_branch_shapes(config)
        weights.drop({rf"^(?!({'|'.join(map(re.escape, shapes))})$)": "the model has its own"})
        found = {key: tensor.shape for key, tensor in weights.tensors.items()}
        wrong = [key for key, shape in shapes.items() if found.get(key) != shape]
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"`source` {name} does not fit the Q-Former: {len(wrong)} tensors are missing or have another shape, "
                f"such as {key}: {list(found[key]) if key in found else None} instead of {list(shapes[key])}"
            )
        insert_text_branch(self, config, weights.tensors)
        report = tensor_origins([weights], [])
        logger.info(f"text branch of the Q-Former:\n{report}")
        self.backbone_report = report if self.backbone_report is None else self.backbone_report + report


@dataclass
class _BridgeSource:
    """Queries and Q-Former that are yet to be built.

    Attributes:
        fields: of `Blip2Config`.
        origin: argument and name of where they come from.
        optional: keys (regular expressions) that are newly initialised.
        weights: their tensors.
        vision: of stage 1, the tower.
    """

    fields: dict[str, Any]
    origin: tuple[str, str | None]
    optional: tuple[str, ...]
    weights: SourceWeights = field(default_factory=SourceWeights)
    vision: VisionSource | None = None


def _check_sources(vision: Any, language: Any, stage1: Any, text: Any) -> None:
    if language is None:
        raise ValueError("`language` must be a folder, a Hub id, a config or its dictionary, got None")
    if stage1 is None and vision is None:
        raise ValueError("`vision` must be given without `stage1`, got None")
    if stage1 is not None and text is not None:
        raise ValueError(f"`text` must be None with `stage1`, which has a Q-Former, got {text!r}")
    if stage1 is not None and vision is not None and not isinstance(vision, str | os.PathLike):
        raise ValueError(f"`vision` must be a checkpoint of the tower of `stage1`, got {type(vision).__name__}")


def _bridge_source(stage1: Any, text: Any, text_branch: bool, overrides: dict[str, Any]) -> _BridgeSource:
    if stage1 is not None:
        name, config, weights = read_stage1("stage1", stage1)
        fields = {**config.qformer_config.to_dict(), **overrides}
        source = _BridgeSource({"num_query_tokens": config.num_query_tokens}, ("stage1", name), (_PROJECTION,), weights)
        source.vision = VisionSource(fields=tower_fields(config), name=name, optional=UNUSED_KEYS)
        weights.split(_TOWER, source.vision)
        weights.drop(STAGE1_HEADS)
    elif text is not None:
        name = path_or_id("text", text)
        fields = qformer_fields(name, overrides)
        weights = read_bert(name, Blip2QFormerConfig(**fields), bert_fields(name)["vocab_size"])
        weights.drop(STAGE1_HEADS)
        source = _BridgeSource({}, ("text", name), (*NOT_IN_BERT, _PROJECTION), weights)
    else:
        fields = overrides
        source = _BridgeSource({}, ("text", None), (_QFORMER, _PROJECTION))
    if not text_branch:
        source.weights.drop(NO_TEXT_BRANCH)
    source.fields["qformer_config"] = Blip2QFormerConfig(**{**fields, "use_qformer_text_input": text_branch})
    return source


def _tower(vision: Any, bridge: _BridgeSource, dtype: torch.dtype) -> VisionSource:
    """The tower of `vision`, or that of stage 1.

    Raises:
        ValueError: if there are both, but they are not of one kind.
    """
    if vision is None:
        return bridge.vision
    tower = vision_source(vision, dtype)
    if bridge.vision is None:
        return tower
    trained = bridge.vision
    own, theirs = (Blip2Config(**source.fields).vision_config for source in (tower, trained))
    other = {name: [getattr(part, name, None) for part in (own, theirs)] for name in _SAME_TOWER}
    if other := {name: values for name, values in other.items() if values[0] != values[1]}:
        raise ValueError(
            f"`vision` {tower.name} must be the tower that `stage1` {trained.name} was trained with, but differs in "
            + ", ".join(f"{name}: {values[0]!r} instead of {values[1]!r}" for name, values in other.items())
        )
    shared = [
        key for key, tensor in trained.tensors.items() if getattr(tower.tensors.get(key), "shape", 0) == tensor.shape
    ]
    changed = [
        key for key in shared if not re.match(_NORM, key) and not _close(tower.tensors[key], trained.tensors[key])
    ]
    if changed:
        logger.warning(
            f"{len(changed)} of {len(shared)} tensors of `vision` {tower.name} differ from those that `stage1` "
            f"{trained.name} was trained with, such as {changed[0]}"
        )
    fields = ("vision_feature_layer", "vision_layernorm_eps")
    tower.fields |= {name: trained.fields[name] for name in fields}
    tower.drop({_NORM: "that of `stage1` was trained with its Q-Former"})
    norm = SourceWeights()
    trained.split(_NORM, norm)
    bridge.weights.tensors |= norm.tensors
    bridge.weights.loaded += norm.loaded
    trained.drop({"": f"the tower is that of {tower.name}"})
    bridge.weights.dropped += trained.dropped
    return tower


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal as far as half precision goes."""
    return torch.allclose(first.float(), second.float(), rtol=1e-2, atol=1e-3)


def _check_embeddings(model, words: LanguageSource) -> None:
    embeddings, config = model.get_input_embeddings(), model.config
    if embeddings.embedding_dim != model.language_projection.out_features:
        raise ValueError(
            f"`language` {words.name} has embeddings of width {embeddings.embedding_dim}, but hidden states of width "
            f"{model.language_projection.out_features}; such models are not supported"
        )
    if config.image_token_index is not None and config.image_token_index >= embeddings.num_embeddings:
        logger.info(
            f"the image placeholder {config.image_token_index} lies behind the {embeddings.num_embeddings} embeddings "
            "of the language model, where `transformers`' own BLIP-2 cannot look it up"
        )


def _put_together(model, connector: nn.Module, language: PreTrainedModel) -> None:
    """Puts the parts into a model without weights, whose config then names what the language model is like."""
    if language.device.type != "cpu":  # quantised ones are loaded to where they are used
        connector.to(language.device)
    for name, part in connector.named_children():
        setattr(model, name, part)
    model.query_tokens = connector.query_tokens
    model.language_model = language
    language.config._name_or_path = model.config.text_config._name_or_path
    model.config = connector.config  # the very objects that the parts have
    model.config.text_config = language.config
    model.generation_config = copy.deepcopy(language.generation_config)
    # A head that is not tied to the embeddings, although the config says so (Flan-T5), stays untied.
    tied = {key: source for key, source in model.all_tied_weights_keys.items() if not key.startswith("language_model.")}
    for key, source in language.all_tied_weights_keys.items():
        tied[f"language_model.{key}"] = f"language_model.{source}"
    model.all_tied_weights_keys = tied
    _share_quantization(model, language)


def _share_quantization(model, language: PreTrainedModel) -> None:
    """What `from_pretrained` would put onto the whole model: saving and the Trainer look for it there."""
    given = getattr(language.config, "quantization_config", None)
    if given is None:
        return
    parts = (type(model)._parts | type(model)._optional_parts) - {"language_model"}
    del language.config.quantization_config
    model.config.quantization_config = language_model_only(given, type(model), model.config, parts)
    for name in _QUANTIZED:
        if hasattr(language, name):
            setattr(model, name, getattr(language, name))
