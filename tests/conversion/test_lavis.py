"""The rename table of the original code and ours: every key of tiny and full-size models, both directions."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from conversion.lavis import to_lavis, to_ours
from conversion.lavis_table import TABLE
from conversion.rows import Relation, read
from lavis_names import fixture, model_with_original_weights, original_state_dict, stage_2_state_dict
from original_keys import clip_shapes, in_original_file, stage_1

# Counted by the original code.
ORIGINAL_QFORMER = 186_282_811
ORIGINAL_TRAINABLE = 186_705_470
ORIGINAL_VIT_G = 985_894_528
KEY_BIASES = 39 * 1408

StateDict = dict[str, torch.Tensor]


@cache
def full_size_model(name: str) -> Blip2ForImageTextRetrieval:
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(Blip2Config.for_checkpoint(name))
    model.freeze_vision()
    return model


def shapes(state_dict: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def assert_bit_for_bit(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# -- full size ---------------------------------------------------------------------------------------------------------


def test_the_list_of_keys_is_whole():
    assert len(stage_1()) == 857
    assert len(stage_1(in_file=True)) == 346


@pytest.mark.parametrize("name", ["blip2-itm-vit-g", "blip2-itm-vit-g-coco"])
def test_full_size_model_has_exactly_these_keys_and_shapes(name):
    ours = shapes(full_size_model(name).state_dict())
    if name.endswith("coco"):  # fine-tuned at 364 px: more positions, nothing else
        assert ours.pop("vision_model.embeddings.position_embedding") == (1, 26 * 26 + 1, 1408)
        ours["vision_model.embeddings.position_embedding"] = (1, 257, 1408)
    assert shapes(to_ours(stage_1())) == ours


def test_full_size_keys_there_and_back():
    assert shapes(to_lavis(to_ours(stage_1()))) == shapes(stage_1())
    assert shapes(to_lavis(full_size_model("blip2-itm-vit-g").state_dict())) == shapes(stage_1())


@pytest.mark.parametrize("name", ["blip2-itm-vit-g", "blip2-itm-vit-l"])
def test_file_without_the_tower_is_everything_else(name):
    """Also with the other tower, whose features are narrower."""
    model = full_size_model(name)
    width = model.config.vision_config.hidden_size
    trained = {n: t for n, t in model.state_dict().items() if not n.startswith("vision_model.")}
    trained |= {f"vision_model.post_layernorm.{p}": torch.empty(width, device="meta") for p in ("weight", "bias")}
    expected = shapes(to_ours(stage_1(in_file=True)))
    if name == "blip2-itm-vit-l":
        expected = {key: tuple(1024 if size == 1408 else size for size in shape) for key, shape in expected.items()}
    assert expected == shapes(trained)


def test_parameter_counts_of_the_original():
    """A parameter with two names counts once, as it does for the original and for `named_parameters`."""
    original = {
        name: tensor.numel()
        for name, tensor in stage_1().items()
        if not name.endswith((".position_ids", ".decoder.weight", ".decoder.bias"))
    }
    assert sum(count for name, count in original.items() if name.startswith("Qformer.")) == ORIGINAL_QFORMER
    assert sum(count for name, count in original.items() if name.startswith("visual_encoder.")) == ORIGINAL_VIT_G

    ours = {name: p.numel() for name, p in full_size_model("blip2-itm-vit-g").named_parameters()}
    assert sum(ours.values()) == sum(original.values()) + KEY_BIASES
    parts = ("qformer.", "embeddings.", "lm_head.")
    assert sum(count for name, count in ours.items() if name.startswith(parts)) == ORIGINAL_QFORMER
    trainable = [p.numel() for p in full_size_model("blip2-itm-vit-g").parameters() if p.requires_grad]
    assert sum(trainable) == ORIGINAL_TRAINABLE


# -- tiny models -------------------------------------------------------------------------------------------------------


def test_tiny_model_there_and_back():
    original = original_state_dict()
    ours = to_ours(original)
    assert_bit_for_bit(to_lavis(ours), original)
    model = model_with_original_weights()
    assert_bit_for_bit(model.state_dict(), ours)
    assert_bit_for_bit(to_lavis(model.state_dict()), original)
    assert model.lm_head.decoder.weight is model.embeddings.word_embeddings.weight


def test_saved_files_hold_the_tied_weight_once(tmp_path):
    from safetensors.torch import load_file

    model_with_original_weights().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.decoder.weight" not in saved
    assert_bit_for_bit(to_lavis(saved), original_state_dict())


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_stage_2_there_and_back(language):
    original = stage_2_state_dict(language)
    assert f"{language}_proj.weight" in original
    ours = to_ours(original)
    assert_bit_for_bit(to_lavis(ours, language=language, positions=48), original)
    in_file = {name: tensor for name, tensor in original.items() if in_original_file(name)}
    assert len(in_file) == {"opt": 93, "t5": 94}[language]  # counted by the original code
    assert_bit_for_bit(to_lavis(to_ours(in_file), language=language, positions=48), in_file)


def test_merged_biases():
    ours = to_ours(original_state_dict())["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    queries, keys, values = ours.chunk(3)
    assert torch.equal(queries, original_state_dict()["visual_encoder.blocks.1.attn.q_bias"])
    assert torch.equal(values, original_state_dict()["visual_encoder.blocks.1.attn.v_bias"])
    assert not keys.any()


@torch.no_grad()
def test_a_bias_of_the_keys_may_be_dropped():
    """What the table says of it: it changes nothing."""
    model = model_with_original_weights()
    pixels = fixture("stage1_tiny")["image"]
    before = model.vision_model(pixels).last_hidden_state
    model.vision_model.encoder.layers[0].self_attn.qkv.bias[40:80] = 1.0
    torch.testing.assert_close(model.vision_model(pixels).last_hidden_state, before)
    assert_bit_for_bit(to_lavis(model.state_dict()), original_state_dict())


def test_shape_of_the_temperature():
    assert original_state_dict()["temp"].shape == ()
    assert to_ours(original_state_dict())["temperature"].shape == (1,)


def test_tied_weights_are_one_tensor():
    ours = to_ours(original_state_dict())
    assert ours["lm_head.decoder.weight"] is ours["embeddings.word_embeddings.weight"]


# -- what must not pass ------------------------------------------------------------------------------------------------


def test_unexplained_keys_are_listed():
    surplus = {"Qformer.bert.encoder.layer.0.adapter.weight": torch.ones(1), "visual_encoder.norm.bias": torch.ones(1)}
    with pytest.raises(ValueError, match="2 keys of the source.*layer.0.adapter.weight, visual_encoder.norm.bias"):
        to_ours(original_state_dict() | surplus)
    with pytest.raises(ValueError, match="1 keys of ours.*: qformer.encoder.layer.0.output.dense.scale"):
        to_lavis({"qformer.encoder.layer.0.output.dense.scale": torch.ones(1)})
    with pytest.raises(ValueError, match="query_tokensx"):  # a name, not its beginning
        to_ours({"query_tokensx": torch.ones(1)})
    with pytest.raises(ValueError, match="module.query_tokens"):
        to_ours({"module.query_tokens": torch.ones(1)})


@pytest.mark.parametrize(
    "name",
    [
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
        "Qformer.bert.embeddings.position_ids",
    ],
)
def test_what_would_be_lost_is_an_error(name):
    original = original_state_dict()
    with pytest.raises(ValueError, match=f"'{name}' must be equal to .* it would be lost"):
        to_ours(original | {name: original[name] + 1})


def test_untied_head_of_ours_is_an_error():
    ours = to_ours(original_state_dict())
    with pytest.raises(ValueError, match="'lm_head.decoder.weight' must be equal to embeddings.word_embeddings.weight"):
        to_lavis(ours | {"lm_head.decoder.weight": ours["lm_head.decoder.weight"] + 1})


@pytest.mark.parametrize(
    ("missing", "needed_by"),
    [
        ("visual_encoder.blocks.0.attn.v_bias", "visual_encoder.blocks.0.attn.q_bias"),
        ("visual_encoder.blocks.1.attn.q_bias", "visual_encoder.blocks.1.attn.v_bias"),
        ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.decoder.weight"),
        ("Qformer.cls.predictions.bias", "Qformer.cls.predictions.decoder.bias"),
    ],
)
def test_half_of_a_pair_is_an_error(missing, needed_by):
    original = original_state_dict()
    del original[missing]
    with pytest.raises(ValueError, match=f"'{missing}' is missing, which '{needed_by}' needs"):
        to_ours(original)


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"'temp' must hold one number, got shape \(2,\)"):
        to_ours({"temp": torch.ones(2)})
    with pytest.raises(ValueError, match="must have three equal parts"):
        to_lavis({"vision_model.encoder.layers.0.self_attn.qkv.bias": torch.ones(4)})


def test_stage_2_needs_the_name_of_its_language_model():
    ours = to_ours(stage_2_state_dict("opt"))
    with pytest.raises(ValueError, match="`language` must be 'opt' or 't5' for a state dict with 'language_"):
        to_lavis(ours)
    with pytest.raises(ValueError, match="`language` must be 'opt', 't5' or None, got 'llama'"):
        to_lavis(ours, language="llama")
    with pytest.raises(ValueError, match="one language model, got names of opt and t5"):
        to_ours({"opt_proj.bias": torch.ones(1), "t5_proj.bias": torch.ones(1)})
    with pytest.raises(ValueError, match="1 keys of the source are not in the table: t5_proj.bias"):
        to_ours({"t5_proj.bias": torch.ones(1)}, language="opt")


# -- the table itself --------------------------------------------------------------------------------------------------


def names_of_all_models() -> set[str]:
    clip = {f"visual_encoder.{name}" for name in clip_shapes(2)}
    return {*original_state_dict(), *stage_2_state_dict("opt"), *stage_2_state_dict("t5"), *clip}


def test_every_row_is_used_by_one_of_the_models():
    for row in TABLE:
        if row.theirs is not None:
            assert any(read(row.theirs, name) is not None for name in names_of_all_models()), row


def test_every_name_has_one_row():
    """But names for which there is a row of their own before that for the rest."""
    for name in names_of_all_models() | set(stage_1()):
        rows = [row for row in TABLE if read(row.theirs, name) is not None]
        assert len(rows) == 1 or (rows[-1].theirs.endswith("_model.{rest}") and len(rows) == 2), name
    for name in full_size_model("blip2-itm-vit-g").state_dict():
        assert sum(read(row.ours, name) is not None for row in TABLE) == 1, name


def test_what_is_not_a_plain_renaming_has_a_reason():
    assert all(row.why for row in TABLE if row.how not in (Relation.RENAMED, Relation.VOCABULARY))
