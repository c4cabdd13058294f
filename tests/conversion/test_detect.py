"""What files are told to be, by names and shapes, and the config that follows."""

from __future__ import annotations

import pytest
import torch

from blip2_hf.checkpoints import CHECKPOINTS
from blip2_hf.configuration import Blip2Config
from conversion.configs import config_for, original_vocabulary, target_of
from conversion.detect import Detected, detect, require_checkpoint
from conversion.lavis import to_lavis
from conversion.steps import TensorInfo
from lavis_names import original_state_dict, stage_2_state_dict
from original_keys import clip_file, eva_file, in_original_file, infos, language_folder, original_file
from tiny_models import peer_generation, peer_instructblip, peer_retrieval
from tiny_own_models import CLIP, generation, generation_config, retrieval


def found(state_dict: dict[str, torch.Tensor], **options) -> Detected:
    return detect(infos(state_dict), **options)


def test_towers():
    eva, clip = found(eva_file()), found(clip_file())
    assert (eva.kind, eva.tower, eva.image_size, eva.has_tower, eva.model) == ("tower_eva", "eva", 224, True, None)
    assert (clip.kind, clip.tower, clip.image_size) == ("tower_clip", "clip", 224)
    for prefix in ("", "vision_model."):
        tower = {f"{prefix}{name}": t for name, t in retrieval(CLIP).vision_model.tower.state_dict().items()}
        assert found(tower).kind == "tower_clip_folder" and found(tower).image_size == 28


@pytest.mark.parametrize("family", ["opt", "t5", "llama"])
def test_language_models(family):
    told = found(generation(family).language_model.state_dict())
    assert (told.kind, told.language, told.language_width, told.vocabulary) == ("language_model", family, 32, 300)
    assert told.has_language and not told.has_tower


def test_small_original_models():
    stage_1 = found(original_state_dict())
    assert (stage_1.kind, stage_1.model, stage_1.tower, stage_1.image_size) == ("lavis_stage1", "retrieval", "eva", 28)
    assert stage_1.candidates == () and stage_1.checkpoint is None
    whole = found(stage_2_state_dict("opt"))
    assert (whole.kind, whole.language, whole.language_width, whole.vocabulary) == ("lavis_stage2", "opt", 48, 260)
    assert whole.has_tower and whole.has_language
    in_file = found({name: t for name, t in stage_2_state_dict("t5").items() if in_original_file(name)})
    assert (in_file.language, in_file.has_tower, in_file.has_language) == ("t5", False, False)
    assert (in_file.tower, in_file.image_size) == (None, None)
    clip = found(to_lavis(retrieval(CLIP).state_dict()))
    assert (clip.kind, clip.tower, clip.image_size) == ("lavis_stage1", "clip", 28)


def test_folders():
    assert found(peer_generation("opt").state_dict()).kind == "transformers"
    assert found(peer_retrieval().state_dict()).kind == "transformers"
    assert found(retrieval().state_dict()).kind == "ours"
    assert found(generation("opt", CLIP).state_dict()).kind == "ours"
    told = found(peer_instructblip("llama").state_dict())
    assert (told.kind, told.model, told.language, told.image_size) == ("instructblip", "generation", "llama", 28)
    siglip = {**CLIP, "model_type": "siglip_vision_model"}
    other = found(retrieval(siglip).state_dict())
    assert (other.kind, other.tower, other.image_size, other.has_tower) == ("ours", None, None, True)


def test_a_folder_whose_q_former_reads_the_question_is_ours():
    keys = peer_generation("opt").state_dict() | {"embeddings.word_embeddings.weight": torch.ones(3, 24)}
    assert found(keys).kind == "ours"


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("blip2-opt-2.7b", ("blip2-opt-2.7b", "blip2-opt-2.7b-coco")),
        ("blip2-opt-6.7b", ("blip2-opt-6.7b", "blip2-opt-6.7b-coco")),
        ("blip2-flan-t5-xl", ("blip2-flan-t5-xl", "blip2-flan-t5-xl-coco")),
        ("blip2-itm-vit-g", ("blip2-itm-vit-g", "blip2-itm-vit-g-coco")),
    ],
)
def test_without_the_tower_a_renamed_file_is_ambiguous(name, candidates):
    told = found(original_file(name), file_name="checkpoint_best.pth")
    assert told.candidates == candidates and told.checkpoint is None
    with pytest.raises(ValueError, match=f"are those of {' and '.join(candidates)}, .* `--model NAME`"):
        require_checkpoint(told)
    for candidate in candidates:
        assert require_checkpoint(found(original_file(name), model=candidate)) == candidate
    original = CHECKPOINTS[name].original_file
    assert require_checkpoint(found(original_file(name), file_name=original)) == name


@pytest.mark.parametrize("name", ["blip2-flan-t5-xxl", "blip2-opt-2.7b-vit-l", "blip2-itm-vit-g-coco"])
def test_shapes_alone_may_tell(name):
    assert require_checkpoint(found(original_file(name))) == name


def test_a_file_name_tells_nothing_of_other_shapes():
    told = found(original_file("blip2-opt-6.7b"), file_name="blip2_pretrained_opt2.7b.pth")
    assert told.candidates == ("blip2-opt-6.7b", "blip2-opt-6.7b-coco")


def test_released_folders():
    config = Blip2Config.for_checkpoint("blip2-flan-t5-xl-coco")
    told = detect(target_of(config, "generation").infos)
    assert (told.kind, told.checkpoint, told.image_size) == ("transformers", "blip2-flan-t5-xl-coco", 364)


def test_a_wrong_model_is_refused():
    keys = original_file("blip2-opt-2.7b")
    with pytest.raises(ValueError, match="`model` must be one of blip2-opt-2.7b, .*; got 'blip3'"):
        found(keys, model="blip3")
    with pytest.raises(ValueError, match="`model` is 'blip2-opt-6.7b', but the tensors could be .*language width 2560"):
        found(keys, model="blip2-opt-6.7b")
    with pytest.raises(ValueError, match="but the tensors are those of no released checkpoint"):
        found(original_state_dict(), model="blip2-itm-vit-g")
    with pytest.raises(ValueError, match="the tensors are those of a tower_eva"):
        found(eva_file(), model="blip2-itm-vit-g")


def test_shapes_that_were_never_released_need_a_config():
    with pytest.raises(ValueError, match="of no released checkpoint: give the shapes with `--config FILE`"):
        require_checkpoint(found(original_state_dict()))


def test_what_is_none_of_these():
    with pytest.raises(ValueError, match=r"these 1 tensors are no BLIP-2, .* is known: conv.weight$"):
        found({"conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"these 30 tensors .* is known: a.0, .*, …$"):
        found({f"a.{n}": torch.ones(1) for n in range(30)})
    with pytest.raises(ValueError, match="InstructBLIP of the original project; convert that of `transformers`"):
        found({"Qformer.bert.x": torch.ones(1), "llm_proj.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="got names of opt and t5"):
        found(original_file("blip2-opt-2.7b") | {"t5_proj.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"must be a square of patches and one more, got \(1, 250, 1408\)"):
        detect(infos(eva_file()) | {"pos_embed": TensorInfo((1, 250, 1408), torch.float16)})


# -- configs -----------------------------------------------------------------------------------------------------------


def test_config_of_a_released_checkpoint():
    told = found(original_file("blip2-opt-6.7b"), model="blip2-opt-6.7b-coco")
    config = config_for(told)
    expected = Blip2Config.for_checkpoint("blip2-opt-6.7b-coco")
    assert expected.vision_layernorm_eps is None  # 1e-6, as the published folders
    assert config.vision_layernorm_eps == 1e-5  # as the original code
    assert config.text_config.to_dict() == expected.text_config.to_dict()
    assert config.vision_config.image_size == 364


def test_config_from_a_file(tmp_path):
    given = generation_config("opt")
    given.save_pretrained(tmp_path)
    told = Detected("lavis_stage2", "generation", "eva", "opt", image_size=56, has_tower=True)
    for source in (tmp_path, tmp_path / "config.json"):
        config = config_for(told, source)
        assert (config.vision_config.image_size, config.vision_layernorm_eps) == (56, 1e-5)
        assert config.text_config.hidden_size == 32
    given.vision_layernorm_eps = 1e-6  # what the file says counts
    given.save_pretrained(tmp_path)
    assert config_for(told, tmp_path).vision_layernorm_eps == 1e-6
    folder = Detected("transformers", "generation", "eva", "opt")
    generation_config("opt").save_pretrained(tmp_path)
    assert config_for(folder, tmp_path).vision_layernorm_eps is None


def test_config_of_something_else(tmp_path):
    generation_config("opt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'opt', but the tensors are those of a model with t5"):
        config_for(Detected("lavis_stage2", "generation", "eva", "t5"), tmp_path)
    with pytest.raises(ValueError, match="model_type 'blip_2_vision_model', but the tensors .* with clip"):
        config_for(Detected("lavis_stage2", "generation", "clip", "opt"), tmp_path)
    with pytest.raises(ValueError, match="`config` must be a config.json or a folder with one, got '.*none'"):
        config_for(Detected("lavis_stage2", "generation", "eva", "opt"), tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        config_for(Detected("lavis_stage2", "generation", "eva", "opt"), tmp_path)


def test_vocabulary_of_the_language_models_own_folder():
    rows = {name: original_vocabulary(Blip2Config.for_checkpoint(name)) for name in CHECKPOINTS if "itm" not in name}
    assert {name: 32128 if "t5" in name else 50272 for name in rows} == rows
    assert original_vocabulary(generation_config("opt")) == 300
    config = Blip2Config.for_checkpoint("blip2-opt-2.7b-coco")
    assert len(language_folder(config)["model.decoder.embed_tokens.weight"]) == 50272
