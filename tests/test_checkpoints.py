"""The table of released checkpoints, what short names stand for, and the configs built from the table."""

import copy
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from blip2_hf import Blip2Config
from blip2_hf.checkpoints import CHECKPOINTS, checkpoint_config, resolve_checkpoint

ON_THE_HUB = [name for name, entry in CHECKPOINTS.items() if entry.hub_id is not None]
NOT_ON_THE_HUB = [name for name in CHECKPOINTS if name not in ON_THE_HUB]
RELEASED = """
    blip2-opt-2.7b blip2-opt-6.7b blip2-flan-t5-xl blip2-flan-t5-xxl
    blip2-opt-2.7b-coco blip2-opt-6.7b-coco blip2-flan-t5-xl-coco
    blip2-itm-vit-g blip2-itm-vit-g-coco
""".split()

# What the Hub's config.json files say, without what names the writing software.
PUBLISHED_EXTRAS = {"dropout": 0.0, "initializer_factor": 1.0, "num_channels": 3, "projection_dim": 512}
PUBLISHED = {
    "blip2-opt-2.7b": {
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_text_hidden_size": 256,
        "image_token_index": 50265,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
        "text_config": {
            "_name_or_path": "facebook/opt-2.7b",
            "activation_dropout": 0.0,
            "eos_token_id": 50118,
            "ffn_dim": 10240,
            "hidden_size": 2560,
            "model_type": "opt",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "vocab_size": 50304,
            "word_embed_proj_dim": 2560,
        },
        "use_decoder_only_language_model": True,
        "vision_config": {"model_type": "blip_2_vision_model", **PUBLISHED_EXTRAS},
    },
    "blip2-flan-t5-xxl": {
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_text_hidden_size": 256,
        "image_token_index": 32100,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
        "text_config": {
            "bos_token_id": 1,
            "classifier_dropout": 0.0,
            "d_ff": 10240,
            "d_kv": 64,
            "d_model": 4096,
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "num_decoder_layers": 24,
            "num_heads": 64,
            "num_layers": 24,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "vocab_size": 32128,
        },
        "use_decoder_only_language_model": False,
        "vision_config": {"model_type": "blip_2_vision_model", **PUBLISHED_EXTRAS},
    },
    "blip2-itm-vit-g-coco": {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "image_text_hidden_size": 256,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "use_qformer_text_input": True,
            "vocab_size": 30523,
        },
        "text_config": {"model_type": "opt"},
        "use_decoder_only_language_model": True,
        "vision_config": {"image_size": 364, "model_type": "blip_2_vision_model"},
    },
}
# Recorded by whoever wrote the file, or of no effect on the model.
IGNORED = {"architectures", "_name_or_path", "activation_dropout", "output_past", "classifier_dropout"}
IGNORED |= set(PUBLISHED_EXTRAS) - {"initializer_factor"}


def comparable(config: dict) -> dict:
    return {
        key: comparable(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in IGNORED and not (key == "initializer_factor" and config["model_type"] != "t5")
    }


# -- the table -----------------------------------------------------------------------------------------------


def test_every_released_name_is_there():
    assert sorted(ON_THE_HUB) == sorted(RELEASED)
    assert set(NOT_ON_THE_HUB) == {"blip2-opt-2.7b-vit-l", "blip2-flan-t5-xl-vit-l", "blip2-itm-vit-l"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_entries_agree_with_their_names(name):
    entry = CHECKPOINTS[name]
    assert entry.hub_id in (None, f"Salesforce/{name}")
    assert entry.license == ("mit" if entry.hub_id else None)
    assert entry.tower == ("clip_vit_l" if name.endswith("-vit-l") else "eva_vit_g")
    assert entry.image_size == (364 if name.endswith("-coco") else 224)
    assert ("COCO" in entry.trained_for) == name.endswith("-coco")
    if "-itm-" in name:
        assert entry.kind == "retrieval"
        assert (entry.language_model, entry.language_dtype, entry.image_token_index) == (None, None, None)
        return
    assert entry.kind == "generation"
    size = name.removeprefix("blip2-").removesuffix("-coco").removesuffix("-vit-l")
    assert entry.language_model.split("/")[1] == size
    family = entry.language_model.split("/")[0]
    assert entry.language_dtype == {"facebook": "float16", "google": "bfloat16"}[family]
    assert entry.image_token_index in (None, {"facebook": 50265, "google": 32100}[family])


def test_hub_ids_and_files_are_distinct():
    for field in ("hub_id", "original_file"):
        values = [getattr(entry, field) for entry in CHECKPOINTS.values()]
        known = [value for value in values if value is not None]
        assert len(set(known)) == len(known), field


def test_entries_are_frozen():
    with pytest.raises(FrozenInstanceError):
        CHECKPOINTS["blip2-opt-2.7b"].image_size = 364


def test_the_table_needs_neither_torch_nor_transformers():
    code = "import blip2_hf.checkpoints, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_source_path())
    assert done.stdout.strip() == "set()", done.stderr


def with_source_path() -> dict[str, str]:
    import blip2_hf

    return {**os.environ, "PYTHONPATH": str(Path(blip2_hf.__file__).parents[1])}


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_short_name_is_the_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(name) == f"Salesforce/{name}"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_local_folder_of_that_name_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    assert resolve_checkpoint(name) == name
    assert resolve_checkpoint(Path(name)) == name


def test_a_local_file_of_that_name_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("blip2-opt-2.7b").touch()
    assert resolve_checkpoint("blip2-opt-2.7b") == "Salesforce/blip2-opt-2.7b"


@pytest.mark.parametrize(
    "name", ["Salesforce/blip2-opt-2.7b", "someone/blip2-opt-2.7b", "./blip2-opt-2.7b", "BLIP2-OPT-2.7B", "blip3", ""]
)
def test_other_names_stay_as_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(name) == name


def test_paths_become_strings(tmp_path):
    assert resolve_checkpoint(tmp_path) == str(tmp_path)
    assert resolve_checkpoint(tmp_path / "missing") == str(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blip2-flan-t5-xl-vit-l", "must be converted from the original file 'blip2_pretrained_flant5xl_vitL.pth'"),
        ("blip2-itm-vit-l", "must be converted from the original file 'blip2_pretrained_vitL.pth'"),
        ("blip2-opt-2.7b-vit-l", "cannot be converted from an original file, for none was published"),
    ],
)
def test_what_is_not_on_the_hub_says_so(name, reason, tmp_path, monkeypatch):
    assert name in NOT_ON_THE_HUB
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' is .*{reason}.*there is no folder '{name}'"):
        resolve_checkpoint(name)


# -- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_ones(name):
    published = copy.deepcopy(PUBLISHED[name])
    ours = Blip2Config.for_checkpoint(name).to_dict()
    assert comparable(ours) == comparable(Blip2Config.from_dict(published).to_dict())


def test_negative_control_the_comparison_sees_a_wrong_value():
    published = copy.deepcopy(PUBLISHED["blip2-opt-2.7b"])
    published["text_config"]["ffn_dim"] = 10241
    ours = Blip2Config.for_checkpoint("blip2-opt-2.7b").to_dict()
    assert comparable(ours) != comparable(Blip2Config.from_dict(published).to_dict())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configs_agree_with_the_table(name):
    entry, config = CHECKPOINTS[name], Blip2Config.for_checkpoint(name)
    assert config.vision_config.image_size == entry.image_size
    assert config.image_token_index == entry.image_token_index
    assert config.num_query_tokens == 32
    assert config.qformer_config.use_qformer_text_input == (entry.kind == "retrieval")
    assert config.qformer_config.vocab_size == (30523 if entry.kind == "retrieval" else 30522)
    if entry.tower == "clip_vit_l":
        assert config.vision_config.model_type == "clip_vision_model"
        assert config.vision_feature_index() == 23  # the second-last of 24 layers
        assert config.vision_config._name_or_path == "openai/clip-vit-large-patch14"
    else:
        assert config.vision_config.layer_norm_eps == 1e-6
        assert config.vision_config.num_hidden_layers == 39
    if entry.kind == "generation":
        assert config.text_config._name_or_path == entry.language_model
        if entry.image_token_index is not None:
            assert entry.image_token_index < config.text_config.vocab_size


@pytest.mark.parametrize("name", ["blip2-flan-t5-xl", "blip2-flan-t5-xxl"])
def test_flan_t5_runs_with_the_exact_gelu(name):
    text = Blip2Config.for_checkpoint(name).text_config
    assert (text.dense_act_fn, text.is_gated_act) == ("gelu", True)
    assert text.scale_decoder_outputs is False  # what an untied head means to `transformers`


@pytest.mark.parametrize("name", ["blip2-opt-2.7b", "blip2-opt-6.7b"])
def test_opt_stops_at_the_line_break(name):
    assert Blip2Config.for_checkpoint(name).text_config.eos_token_id == 50118


def test_a_config_may_be_asked_for_by_hub_id():
    assert checkpoint_config("Salesforce/blip2-itm-vit-g") == checkpoint_config("blip2-itm-vit-g")


def test_each_call_gives_a_config_of_its_own():
    first = checkpoint_config("blip2-opt-2.7b")
    for part in ("vision_config", "qformer_config", "text_config"):
        first[part]["hidden_size"] = 0
    assert checkpoint_config("blip2-opt-2.7b")["text_config"]["hidden_size"] == 2560
    assert checkpoint_config("blip2-opt-6.7b")["vision_config"]["hidden_size"] == 1408


@pytest.mark.parametrize("name", ["blip3", "someone/blip2-opt-2.7b", "", None])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="`name` must be a released checkpoint") as error:
        checkpoint_config(name)
    assert all(known in str(error.value) for known in CHECKPOINTS)
    assert str(error.value).endswith(f"got {name!r}")
