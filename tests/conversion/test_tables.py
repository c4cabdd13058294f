"""The tables for towers, language models and the layouts of `transformers`, on small models with values."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPAttention

from blip2_hf.modeling.loading import _INSTRUCTBLIP_KEYS
from conversion.configs import target_of
from conversion.lavis import to_lavis, to_ours
from conversion.rows import Relation
from conversion.steps import Conversion, Target, apply, check, plan
from conversion.tables import reading_table, tower_table, writing_table
from lavis_names import original_state_dict
from original_keys import clip_shapes, infos
from tiny_models import peer_generation, peer_instructblip, peer_retrieval, randomised
from tiny_own_models import CLIP, generation, generation_config, retrieval, retrieval_config

Tensors = dict[str, torch.Tensor]
WIDTH = 32
CLIP_CONFIG = {**CLIP, "intermediate_size": 4 * WIDTH}


def named(source: str, tensors: Tensors) -> Tensors:
    return {f"{source}:{name}": tensor for name, tensor in tensors.items()}


def converted(table, tensors: Tensors, direction: str, target: Target | None = None) -> tuple[Tensors, Conversion]:
    conversion = plan(table, infos(tensors), direction, target)
    for rule in conversion.checks:
        check(rule, tensors.__getitem__)
    assert {name for step in conversion.steps for name in step.inputs} | set(conversion.dropped) == set(tensors)
    return {step.target: apply(step, tensors.__getitem__) for step in conversion.steps}, conversion


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def untied(model: nn.Module) -> Tensors:
    """What a file of the model holds."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def original_clip(layers: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = clip_shapes(layers, WIDTH, side=2)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rest_of(model: nn.Module) -> Tensors:
    """A checkpoint without its tower."""
    kept = ("vision_model.post_layernorm.",)
    whole = untied(model)
    return {name: whole[name] for name in whole if not name.startswith("vision_model.") or name.startswith(kept)}


# -- towers ------------------------------------------------------------------------------------------------------------


def test_clip_inside_an_original_file_there_and_back():
    trained = {name: t for name, t in original_state_dict().items() if not name.startswith("visual_encoder.")}
    original = trained | {f"visual_encoder.{name}": tensor for name, tensor in original_clip(2).items()}
    assert_equal(to_lavis(to_ours(original)), original)


def test_clip_of_its_own_file():
    """The layer behind the used ones and the projection are dropped, the last norm has a place."""
    file = original_clip(3)
    file |= {"ln_post.weight": torch.ones(WIDTH), "ln_post.bias": torch.ones(WIDTH), "proj": torch.ones(WIDTH, 8)}
    model = retrieval(CLIP_CONFIG)
    table = reading_table("ours", 2, "tower_clip")
    sources = named("bridge", rest_of(model)) | named("tower", file)
    ours, conversion = converted(table, sources, "to_ours", target_of(model.config, "retrieval"))
    assert len([name for name in conversion.dropped if name.startswith("tower:transformer.resblocks.2.")]) == 12
    assert set(conversion.dropped) - {name for name in sources if ".resblocks.2." in name} == {"tower:proj"}
    assert model.load_state_dict(ours, strict=False).unexpected_keys == []
    assert torch.equal(model.vision_model.tower.post_layernorm.bias, torch.ones(WIDTH))


def test_a_tower_without_its_last_norm_gets_one_that_changes_nothing():
    model = retrieval(CLIP_CONFIG)
    sources = named("bridge", rest_of(model)) | named("tower", original_clip(2))
    ours, conversion = converted(
        reading_table("ours", 2, "tower_clip"), sources, "to_ours", target_of(model.config, "retrieval")
    )
    assert sorted(conversion.generated) == [f"vision_model.tower.post_layernorm.{p}" for p in ("bias", "weight")]
    assert torch.equal(ours["vision_model.tower.post_layernorm.weight"], torch.ones(WIDTH))


@torch.no_grad()
def test_queries_keys_and_values_of_clip_stay_what_they_are():
    """By computing: torch's attention with the original's tensors, CLIP's of `transformers` with ours."""
    file, prefix = original_clip(1), "transformer.resblocks.0.attn."
    theirs = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    theirs.load_state_dict({name.removeprefix(prefix): t for name, t in file.items() if name.startswith(prefix)})
    ours, _ = converted(tower_table("tower_clip", 1), named("tower", file), "to_ours")
    config = retrieval_config(CLIP_CONFIG).vision_config
    config._attn_implementation = "eager"
    attention, prefix = CLIPAttention(config), "vision_model.tower.encoder.layers.0.self_attn."
    attention.load_state_dict({name.removeprefix(prefix): t for name, t in ours.items() if name.startswith(prefix)})
    hidden = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1
    torch.testing.assert_close(attention(hidden)[0], theirs(hidden, hidden, hidden)[0])
    attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj  # the comparison can fail
    assert not torch.allclose(attention(hidden)[0], theirs(hidden, hidden, hidden)[0], atol=1e-3)


@pytest.mark.parametrize("alone", [False, True])
def test_clip_of_transformers(alone):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = randomised(CLIPModel(CLIPConfig(vision_config=CLIP_CONFIG, text_config={**text, "vocab_size": 9})))
    folder = clip.vision_model.state_dict() if alone else clip.state_dict()
    prefix = "" if alone else "vision_model."
    folder = folder | {f"{prefix}embeddings.position_ids": torch.arange(5)[None]}  # in old files
    model = retrieval(CLIP_CONFIG)
    sources = named("bridge", rest_of(model)) | named("tower", folder)
    table = reading_table("ours", 2, "tower_clip_folder")
    ours, conversion = converted(table, sources, "to_ours", target_of(model.config, "retrieval"))
    expected = {name.removeprefix(prefix): tensor for name, tensor in folder.items() if name.startswith(prefix)}
    for name, tensor in ours.items():
        if name.startswith("vision_model.tower."):
            assert torch.equal(tensor, expected[name.removeprefix("vision_model.tower.")]), name
    dropped = {name for name in conversion.dropped if "encoder.layers.2." not in name}
    assert ("tower:logit_scale" in dropped) is not alone
    assert all(
        "text" in name or "position_ids" in name
        for name in dropped - {"tower:logit_scale"} - {"tower:visual_projection.weight"}
    )


def test_the_tower_of_another_blip2():
    """But for the norm that was trained with its Q-Former."""
    tower, model = peer_generation("opt"), retrieval()
    sources = named("bridge", rest_of(model)) | named("tower", untied(tower))
    ours, conversion = converted(
        reading_table("ours", 3, "transformers"), sources, "to_ours", target_of(model.config, "retrieval")
    )
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(ours[key], tower.state_dict()[key])
    norm = "vision_model.post_layernorm.weight"
    assert torch.equal(ours[norm], model.state_dict()[norm])
    assert "Q-Former" in conversion.dropped[f"tower:{norm}"]


def test_which_towers_there_are_tables_for():
    with pytest.raises(ValueError, match="`tower` must be .* got one of kind 'language_model'"):
        tower_table("language_model", 39)


# -- language models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "t5", "llama"])
def test_a_language_model_of_its_own_folder(family):
    model = generation(family)
    language = untied(model.language_model)
    if family == "t5":  # as FlanT5's, although transformers also knows it tied
        language["lm_head.weight"] = torch.randn_like(language["shared.weight"])
    bridge = {name: t for name, t in untied(model).items() if not name.startswith("language_model.")}
    sources = named("bridge", bridge) | named("llm", language)
    table = reading_table("ours", 3, language=family)
    ours, _ = converted(table, sources, "to_ours", target_of(model.config, "generation"))
    assert_equal(ours, bridge | {f"language_model.{name}": tensor for name, tensor in language.items()})


@pytest.mark.parametrize(
    ("family", "changed", "dropped"),
    [
        ("opt", {"lm_head.weight": "model.decoder.embed_tokens.weight"}, {"lm_head.weight"}),
        (
            "t5",
            {f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")}
            | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "final"},
            {
                "encoder.embed_tokens.weight",
                "decoder.embed_tokens.weight",
                "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            },
        ),
        (
            "llama",
            {"model.layers.0.self_attn.rotary_emb.inv_freq": "final"},
            {"model.layers.0.self_attn.rotary_emb.inv_freq"},
        ),
    ],
)
def test_what_old_files_hold_besides(family, changed, dropped):
    model = generation(family)
    language = untied(model.language_model)
    language |= {name: language.get(like, torch.ones(4)) for name, like in changed.items()}
    bridge = {name: t for name, t in untied(model).items() if not name.startswith("language_model.")}
    sources = named("bridge", bridge) | named("llm", language)
    table = reading_table("ours", 3, language=family)
    _, conversion = converted(table, sources, "to_ours", target_of(model.config, "generation"))
    assert set(conversion.dropped) == {f"llm:{name}" for name in dropped}


def test_opt_without_its_head():
    model = generation("opt")
    language = {name.removeprefix("model."): t for name, t in untied(model.language_model).items()}
    ours, _ = converted(reading_table("ours", 3, language="opt"), named("llm", language), "to_ours")
    assert_equal(ours, {f"language_model.model.{name}": tensor for name, tensor in language.items()})


def test_a_file_trained_with_another_language_model_is_refused():
    """Its second name of the embeddings tells."""
    model = generation("opt")
    language = untied(model.language_model)
    words = language["model.decoder.embed_tokens.weight"]
    table = reading_table("lavis_stage2", 3, language="opt")
    own = {"bridge:opt_model.lm_head.weight": words.half()}
    converted(table, named("llm", language) | own, "to_ours")
    with pytest.raises(
        ValueError, match="'opt_model.lm_head.weight' must be equal to model.decoder.embed_tokens.weight"
    ):
        converted(table, named("llm", language) | {"bridge:opt_model.lm_head.weight": words + 0.01}, "to_ours")


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "t5", "llama"])
def test_generation_model_of_transformers(family):
    peer = peer_generation(family)
    target = target_of(generation_config(family), "generation")
    ours, _ = converted(reading_table("transformers", 3), named("bridge", untied(peer)), "to_ours", target)
    assert_equal(ours, untied(peer))
    back, conversion = converted(writing_table("transformers"), named("bridge", ours), "from_ours")
    assert_equal(back, ours)
    assert not conversion.dropped


def test_retrieval_model_of_transformers():
    peer, model = peer_retrieval(), retrieval()
    target = target_of(model.config, "retrieval")
    ours, conversion = converted(reading_table("transformers", 3), named("bridge", untied(peer)), "to_ours", target)
    assert list(conversion.generated) == ["temperature"]
    assert ours["temperature"] == pytest.approx(model.config.temperature_init)
    assert all(name.startswith("lm_head.") for name in conversion.absent) and len(conversion.absent) == 5
    assert_equal(ours, untied(peer) | {"temperature": ours["temperature"]})

    theirs, conversion = converted(writing_table("transformers"), named("bridge", untied(model)), "from_ours")
    assert theirs.keys() == untied(peer).keys()
    assert {name.removeprefix("bridge:").split(".")[0] for name in conversion.dropped} == {"temperature", "lm_head"}
    whole, conversion = converted(reading_table("ours", 3), named("bridge", model.state_dict()), "to_ours", target)
    assert_equal(whole, untied(model))
    assert conversion.dropped.keys() == {"bridge:lm_head.decoder.weight"}


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_instructblip(family):
    peer = peer_instructblip(family)
    config = generation_config(family)
    config.qformer_config.use_qformer_text_input = True
    theirs = untied(peer)
    target = target_of(config, "generation")
    ours, _ = converted(reading_table("instructblip", 3), named("bridge", theirs), "to_ours", target)
    assert torch.equal(ours["embeddings.word_embeddings.weight"], theirs["qformer.embeddings.word_embeddings.weight"])
    back, _ = converted(writing_table("instructblip"), named("bridge", ours), "from_ours")
    assert_equal(back, theirs)


def test_loading_renames_as_the_table_does():
    """`from_pretrained` reads InstructBLIP with rules of its own."""
    for row in reading_table("instructblip", 3):
        if row.how is Relation.RENAMED and row.ours != row.theirs and row.source == "bridge":
            theirs, ours = (name.format(p="weight") for name in (row.theirs, row.ours))
            for pattern, name in _INSTRUCTBLIP_KEYS.items():
                theirs = re.sub(pattern, name, theirs)
            assert theirs == ours


def test_which_layouts_and_kinds_there_are():
    with pytest.raises(ValueError, match="`layout` must be 'lavis', 'transformers' or 'instructblip', got 'timm'"):
        writing_table("timm")
    with pytest.raises(ValueError, match="`kind` must be a BLIP-2 checkpoint's, got 'tower_eva'"):
        reading_table("tower_eva", 39)
    with pytest.raises(ValueError, match="`language` must be 'opt', 't5' or None, got 'llama'"):
        writing_table("lavis", "llama")
