"""A `.pth` of the original as a side of a comparison: its files, and its forward (`conversion.original`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection

import torch
from torch import nn

from blip2_hf.configuration import Blip2Config
from conversion.example_inputs import Inputs
from conversion.original import BERT_EPS, OriginalForward, OriginalShape, captioning_loss, contrastive_loss
from conversion.original_tower import CLIP_EPS, EVA_EPS, LN_VISION_EPS
from conversion.sides import ORIGINAL, TOWER_PREFIX, OpenedSide, Side, config_dict, quiet_loading, stored_precisions
from conversion.tensor_sources import Weights, open_weights
from conversion.tower_folders import TowerOfFolder, open_tower
from conversion.traces import Recorder, watched_language_model

# Width of a tower -> layers that the original builds of it, heads; ViT-g/14 of EVA-CLIP and ViT-L/14 of CLIP.
_RELEASED_TOWERS = {1408: (39, 16), 1024: (23, 16)}
_RELEASED_QFORMER = {768: 12}  # width -> heads
_STAGE_2 = {"opt_proj.weight": "opt", "t5_proj.weight": "t5"}
_PATCH_KEYS = {"eva": "visual_encoder.patch_embed.proj.weight", "clip": "visual_encoder.conv1.weight"}
_POSITION_KEYS = {"eva": "visual_encoder.pos_embed", "clip": "visual_encoder.positional_embedding"}
EPSILONS = {
    "eva": {"tower": EVA_EPS, "ln_vision": LN_VISION_EPS, "Q-Former": BERT_EPS},
    "clip": {"tower": CLIP_EPS, "ln_vision": LN_VISION_EPS, "Q-Former": BERT_EPS},
}
# transformers' names of what the original always builds its T5 with
T5_ACTIVATION = "gelu"  # exact, where Flan-T5's own is the tanh approximation

Rounding = Callable[[str, torch.Tensor], torch.Tensor]


def is_original(side: Side) -> bool:
    """Whether the source is a file, not a folder or a name."""
    return os.path.isfile(side.source) or side.source.endswith((".pth", ".pt"))


def needs_config(side: Side) -> bool:
    """Whether a file of the original is of none of the released sizes."""
    weights = open_weights(side.source, "source")
    shapes = _shapes(side, weights, _tower(side))
    widths = [shapes[key][0] for key in _PATCH_KEYS.values() if key in shapes]
    queries = shapes.get("query_tokens", (0,))
    return not (widths and widths[0] in _RELEASED_TOWERS and queries[-1] in _RELEASED_QFORMER)


def open_original(side: Side) -> OpenedSide:
    """A file of the original and what it lacks.

    Raises:
        ValueError: if tower or language model are missing, or numbers that no shape shows.
    """
    if side.library is not None:
        raise ValueError(f"`library` is for folders, {side.source} is a file of the original")
    weights = open_weights(side.source, "source")
    for name in ("query_tokens", "ln_vision.weight"):
        if name not in weights.infos:
            raise ValueError(f"{side.source} is not a BLIP-2 file of the original: it has no {name!r}")
    tower = _tower(side)
    shapes = _shapes(side, weights, tower)
    family = _family(weights)
    if family is None and "itm_head.weight" not in shapes:
        raise ValueError(f"{side.source} has neither a matching head (stage 1) nor opt_proj or t5_proj (stage 2)")
    config = None if side.config is None else Blip2Config.from_dict(config_dict(side.config))
    shape = original_shape(shapes, config, side.source)
    language = None if family is None else _language_config(side, weights, config, family)
    position = shapes[_POSITION_KEYS[shape.tower]]
    facts = {
        "image size": int((position[-2] - 1) ** 0.5) * shapes[_PATCH_KEYS[shape.tower]][-1],
        "layers of the tower": shape.tower_layers,
        "width of the tower": position[-1],
        "layers of the Q-Former": shape.qformer_layers,
        "width of the Q-Former": shapes["query_tokens"][-1],
        "queries": shapes["query_tokens"][1],
        "kind": "image-text retrieval" if family is None else "generation",
        "language model": {None: None, "opt": "decoder-only", "t5": "encoder-decoder"}[family],
        "questions to the Q-Former": False,
    }
    words = shapes.get("Qformer.bert.embeddings.word_embeddings.weight", (0,))[0]
    text = words if language is None else language.vocab_size
    precisions = stored_precisions(weights.infos)
    if tower is not None:
        precisions["tower"] = stored_precisions({f"{TOWER_PREFIX}{n}": i for n, i in tower.infos.items()})["tower"]
    if language is not None and not _holds_language_model(weights):
        precisions["language model"] = stored_precisions(
            {f"language_model.{n}": i for n, i in open_weights(side.llm, "llm").infos.items()}
        )["language model"]
    vocabularies = {"text": text, "question": words}
    return OpenedSide(side, ORIGINAL, weights, tower, config, facts, vocabularies, EPSILONS[shape.tower], precisions)


def original_shape(shapes: dict[str, tuple[int, ...]], config: Blip2Config | None, source: str) -> OriginalShape:
    """Numbers of layers and heads, from the config if there is one, else those of the released sizes."""
    kind = next((kind for kind, key in _PATCH_KEYS.items() if key in shapes), None)
    if kind is None:
        raise ValueError(f"{source} does not hold the tower; `tower` must be its file, got None")
    width, qformer_width = shapes[_PATCH_KEYS[kind]][0], shapes["query_tokens"][-1]
    layers = _count(r"Qformer\.bert\.encoder\.layer\.(\d+)\.", shapes)
    crossing = {int(m[1]) for m in map(re.compile(r".*\.layer\.(\d+)\.crossattention\.").match, shapes) if m}
    if config is not None:
        tower_layers, heads = config.vision_feature_index(), config.vision_config.num_attention_heads
        qformer_heads = config.qformer_config.num_attention_heads
    elif width in _RELEASED_TOWERS and qformer_width in _RELEASED_QFORMER:
        (tower_layers, heads), qformer_heads = _RELEASED_TOWERS[width], _RELEASED_QFORMER[qformer_width]
    else:
        raise ValueError(
            f"`config` must be given for {source}, whose widths {width} (tower) and {qformer_width} (Q-Former) are "
            "not those of a released checkpoint: no shape shows the number of heads"
        )
    return OriginalShape(kind, tower_layers, heads, qformer_heads, layers, frozenset(crossing))


@torch.no_grad()
def run_original(
    opened: OpenedSide, inputs: Inputs, recorder: Recorder, dtype: torch.dtype, device: str, rounded: Rounding
) -> None:
    """Writes the trace of a file of the original."""

    def read(name: str) -> torch.Tensor:
        return rounded(name, opened.read(name)).to(device, dtype)

    shapes = _shapes(opened.side, opened.weights, opened.tower)
    shape = original_shape(shapes, opened.config, opened.side.source)
    model, inputs = OriginalForward(read, shape, recorder), inputs.to(device)
    image = model.image(inputs.pixels.to(dtype))
    queries = model.queries(image)
    if opened.is_retrieval:
        has_head = any(name.startswith("Qformer.cls.") for name in opened.weights.infos)
        _stage_1(model, image, queries, inputs, recorder, has_head)
    else:
        family = _family(opened.weights)
        projected = nn.functional.linear(queries, read(f"{family}_proj.weight"), read(f"{family}_proj.bias"))
        _stage_2(opened, family, recorder("Q-Former, language projection", projected), inputs, recorder, dtype, rounded)


def _stage_1(
    model: OriginalForward,
    image: torch.Tensor,
    queries: torch.Tensor,
    inputs: Inputs,
    recorder: Recorder,
    has_head: bool,
) -> None:
    """The rows of matching: (image, text), (negative image, text), (image, negative text)."""
    ids, mask, negatives = inputs.ids, inputs.mask, inputs.negatives
    count, every = queries.shape[1], torch.arange(len(ids), device=ids.device)
    ones = torch.ones(len(ids), count, dtype=mask.dtype, device=mask.device)
    recorder.rows("Q-Former, text", mask)
    text = model.text(ids, mask)
    images, texts = torch.cat([every, negatives, every]), torch.cat([every, every, negatives])
    recorder.rows("Q-Former, matching", torch.cat([ones.repeat(3, 1), mask[texts]], dim=1))
    matched = model.matching(image[images], ids[texts], mask[texts])
    started = torch.cat([torch.full_like(ids[:, :1], inputs.start), ids[:, 1:]], dim=1)
    recorder.rows("Q-Former, captioning", torch.cat([ones, mask], dim=1))
    captioned = model.captioning(image, started, mask)
    image_vectors, text_vectors = model.vectors("vision_proj", queries), model.vectors("text_proj", text[:, 0])
    similarity = torch.einsum("iqd,td->itq", image_vectors, text_vectors).amax(dim=-1)
    match = model.match_logits(matched)
    recorder("end, image features", image_vectors)
    recorder("end, text features", text_vectors)
    recorder("end, ITC logits", similarity)
    recorder("end, ITM logits", match)
    labels = (torch.arange(len(match), device=match.device) < len(every)).long()
    recorder("end, ITC loss", contrastive_loss(similarity, model.read("temp")))
    recorder("end, ITM loss", nn.functional.cross_entropy(match, labels))
    if has_head:  # transformers' retrieval models have none, so that files made of them have none
        recorder.rows("end, ITG logits", mask)
        words = model.words_after(captioned[:, count:])
        recorder("end, ITG logits", words)
        recorder("end, ITG loss", captioning_loss(words, started, mask))


def _stage_2(
    opened: OpenedSide,
    family: str,
    images: torch.Tensor,
    inputs: Inputs,
    recorder: Recorder,
    dtype: torch.dtype,
    rounded: Rounding,
) -> None:
    """The language model reads the projected queries, then the text."""
    language = _language_model(opened, family, dtype, rounded).to(images.device)
    queries = torch.ones(images.shape[:2], dtype=inputs.mask.dtype, device=images.device)
    embeds = torch.cat([images, language.get_input_embeddings()(inputs.ids)], dim=1)
    whole = torch.cat([queries, inputs.mask], dim=1)
    labels = inputs.labels
    if family == "opt":
        labels = torch.cat([torch.full_like(queries, -100), labels], dim=1)
    recorder.rows("language model, decoder" if family == "opt" else "language model, encoder", whole)
    if family == "t5":
        recorder.rows("language model, decoder", labels != -100)
    with watched_language_model(language, recorder):
        outputs = language(inputs_embeds=embeds, attention_mask=whole, labels=labels, use_cache=False)
    recorder.rows("end, logits", whole if family == "opt" else labels != -100)
    recorder("end, logits", outputs.logits)
    recorder("end, loss", outputs.loss)


def _language_model(opened: OpenedSide, family: str, dtype: torch.dtype, rounded: Rounding) -> nn.Module:
    """`transformers`' OPT or T5 with the weights of the file itself, or of `llm`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForCausalLM if family == "opt" else AutoModelForSeq2SeqLM
    side, prefix = opened.side, f"{family}_model."
    config = _language_config(side, opened.weights, opened.config, family)
    if not _holds_language_model(opened.weights):
        with quiet_loading():
            model = auto.from_pretrained(side.llm, config=config, dtype=dtype)
    else:
        model = auto.from_config(config, dtype=dtype)
        own = [name for name in opened.weights.infos if name.startswith(prefix)]
        values = {name.removeprefix(prefix): opened.weights.read(name) for name in own}
        result = model.load_state_dict(values, strict=False)
        _check_own(side.source, model, values, result.missing_keys, result.unexpected_keys)
    for name, parameter in model.named_parameters():
        parameter.data = rounded(f"language_model.{name}", parameter.data).to(parameter.dtype)
    return model.eval()


def _check_own(
    source: str, model: nn.Module, values: Collection[str], missing: list[str], unexpected: list[str]
) -> None:
    """Missing keys must be second names of tensors that were there."""
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    given = {where[name] for name in values if name in where}
    lost = [name for name in missing if where[name] not in given]
    if lost or unexpected:
        raise ValueError(f"{source} is not a language model of its config: {', '.join([*lost, *unexpected])}")


def _language_config(side: Side, weights: Weights, config: Blip2Config | None, family: str):
    from transformers import AutoConfig

    if side.llm is not None:
        language = AutoConfig.from_pretrained(side.llm)
    elif config is not None and _holds_language_model(weights):
        language = config.text_config
    else:
        raise ValueError(f"{side.source} does not hold the language model; `llm` must be its folder or Hub id")
    if language.model_type != family:
        raise ValueError(f"{side.source} belongs to {family}, the language model is {language.model_type}")
    if family == "t5":
        language.dense_act_fn = T5_ACTIVATION
    return language


def _tower(side: Side) -> Weights | TowerOfFolder | None:
    return None if side.tower is None else open_tower(open_weights(side.tower, "tower"))


def _family(weights: Weights) -> str | None:
    return next((family for name, family in _STAGE_2.items() if name in weights.infos), None)


def _holds_language_model(weights: Weights) -> bool:
    """The original's files hold at most second names of its word embeddings, which are tied to others."""
    return any(re.match(r"(opt|t5)_model\..*\.(layers|block)\.", name) for name in weights.infos)


def _shapes(side: Side, weights: Weights, tower: Weights | TowerOfFolder | None) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of a whole model of the original."""
    shapes = {name: tuple(info.shape) for name, info in weights.infos.items()}
    if tower is not None:
        if any(name.startswith(TOWER_PREFIX) for name in shapes):
            raise ValueError(f"`tower` was given, but {side.source} holds the tower itself")
        shapes |= {f"{TOWER_PREFIX}{name}": tuple(info.shape) for name, info in tower.infos.items()}
    return shapes


def _count(pattern: str, names: Collection[str]) -> int:
    return 1 + max(int(match[1]) for match in map(re.compile(pattern).match, names) if match)
