"""The command on tiny checkpoints of every kind: there, back, and the models that come out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import blip2_hf
import tiny_checkpoints
import tiny_original
from conversion.convert import main
from lavis_names import fixture, model_with_original_weights
from parity import EXACT
from tiny_models import QFORMER, VISION, pixels, randomised
from tiny_original import QUERIES, stored, whole
from tiny_tokenizers import tiny_bert_tokenizer

CLASSES = {"itm": "Blip2ForImageTextRetrieval", "opt": "Blip2ForConditionalGeneration"}
CLASSES["t5"] = CLASSES["opt"]


def convert(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def ours(original, tmp_path_factory):
    """Folders of ours, made from the original's files with all checks."""
    made: dict[str, Path] = {}

    def folder_of(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("ours") / stage
            convert(*original.command(stage, made[stage]))
        return made[stage]

    return folder_of


def assert_file_is(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(path, weights_only=True)
    assert found.keys() == {"model"}
    assert found["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert found["model"][name].dtype == tensor.dtype and torch.equal(found["model"][name], tensor), name


def assert_loads_in_transformers(name: str, folder: Path) -> torch.nn.Module:
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- the original, there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["itm", "opt", "t5"])
def test_bridge_there_and_back_bit_for_bit(ours, tmp_path, stage, capsys):
    target = tmp_path / "back.pth"
    convert(ours(stage), "--to", target, "--layout", "lavis", "--bridge-only")
    assert "converted back: every tensor is equal bit for bit" in capsys.readouterr().out
    assert_file_is(target, stored(stage))
    assert files_of(tmp_path) == {"back.pth"}


def test_whole_file_there_and_back_bit_for_bit(original, tmp_path):
    path = tiny_original.save_stored(tmp_path / "whole.pth", "itm", with_tower=True)
    given = ["--text", original / "bert", "--config", original / "itm.json", "--no-verify"]
    convert(path, "--to", tmp_path / "ours", *given)
    convert(tmp_path / "ours", "--to", tmp_path / "back.pth", "--layout", "lavis")
    assert_file_is(tmp_path / "back.pth", whole("itm"))


def test_retrieval_model_is_that_of_the_fixtures(ours):
    model = blip2_hf.Blip2ForImageTextRetrieval.from_pretrained(ours("itm"))
    expected = model_with_original_weights().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = blip2_hf.Blip2Processor.from_pretrained(ours("itm"))
    assert processor.tokenizer.bos_token_id == model.config.qformer_config.decoder_start_token_id == 129
    assert processor.image_processor.size == {"height": 28, "width": 28}


@torch.no_grad()
@pytest.mark.parametrize("case", ["noprompt", "prompt"])
def test_opt_gives_the_logits_of_the_fixtures(ours, case):
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(ours("opt")).eval()
    data = fixture("stage2_opt_tiny")
    ids, mask, labels = (data[f"{case}/{name}"] for name in ("input_ids", "attention_mask", "labels"))
    ids = torch.cat([torch.full((len(ids), QUERIES), 250), ids], dim=1)  # the placeholders
    mask = torch.cat([torch.ones(len(mask), QUERIES, dtype=mask.dtype), mask], dim=1)
    outputs = model(pixel_values=data["image"], input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(outputs.logits[mask.bool()], data[f"{case}/logits"][mask.bool()], **EXACT)
    torch.testing.assert_close(outputs.loss, data[f"{case}/loss"], **EXACT)


@torch.no_grad()
def test_t5_gives_the_logits_of_the_fixtures(ours):
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(ours("t5")).eval()
    data = fixture("stage2_t5_tiny")
    ids, mask = data["input_ids"], data["input_att"]
    ids = torch.cat([torch.full((len(ids), QUERIES), 100), ids], dim=1)
    mask = torch.cat([torch.ones(len(mask), QUERIES, dtype=mask.dtype), mask], dim=1)
    outputs = model(pixel_values=data["image"], input_ids=ids, attention_mask=mask, labels=data["labels"])
    taught = data["labels"] != -100
    torch.testing.assert_close(outputs.logits[taught], data["logits"][taught], **EXACT)
    torch.testing.assert_close(outputs.loss, data["loss"], **EXACT)


@pytest.mark.parametrize(("stage", "end"), [("opt", "\n"), ("t5", "</s>")])
def test_generation_folder_works_from_picture_to_words(ours, stage, end):
    folder = ours(stage)
    needed = {"config.json", "generation_config.json", "model.safetensors", "README.md", "processor_config.json"}
    assert needed <= files_of(folder)
    processor = blip2_hf.Blip2Processor.from_pretrained(folder)
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(folder)
    assert processor.image_token_id == model.config.image_token_index
    assert processor.tokenizer.decode([processor.suffix_end_id]) == end
    assert model.generation_config.eos_token_id == processor.suffix_end_id
    inputs = processor(images=tiny_checkpoints.photo("chelsea"), text="a photo", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    assert "Blip2ForConditionalGeneration" in json.loads((folder / "config.json").read_text())["architectures"]


def test_models_of_the_original_are_run_where_nothing_lacks(ours, original, tmp_path, capsys):
    """Of a file without its frozen parts, which the command line gives."""
    given = ["--tower", original / "opt_tower.pth", "--llm", original / "opt"]
    convert(ours("opt"), "--to", tmp_path / "back.pth", "--layout", "lavis", "--bridge-only", *given)
    said = capsys.readouterr().out
    assert "back.pth (computed by the original)" in said and "EQUAL" in said and "KL of the next token" in said


def test_clip_tower_there_and_back(tmp_path, capsys):
    """The original's names of CLIP, with queries, keys and values in one matrix."""
    vision = {**VISION, "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_hidden_layers": 3}
    qformer = {**QFORMER, "use_qformer_text_input": True, "vocab_size": len(tiny_bert_tokenizer())}
    config = blip2_hf.Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=4)
    model = randomised(blip2_hf.Blip2ForImageTextRetrieval(config))
    for name in ("weight", "bias"):  # of CLIP's last norm, which the original does not have
        torch.nn.init.constant_(getattr(model.vision_model.tower.post_layernorm, name), float(name == "weight"))
    model.save_pretrained(tmp_path / "ours")
    tiny_checkpoints.save_retrieval(tmp_path / "peer")
    blip2_hf.Blip2Processor.from_pretrained(tmp_path / "peer").save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "--to", tmp_path / "there.pth", "--layout", "lavis")
    assert "EQUAL" in capsys.readouterr().out
    names = torch.load(tmp_path / "there.pth", weights_only=True)["model"]
    assert "visual_encoder.transformer.resblocks.1.attn.in_proj_weight" in names
    config_file, text = tmp_path / "ours" / "config.json", tmp_path / "ours"
    convert(tmp_path / "there.pth", "--to", tmp_path / "again", "--config", config_file, "--text", text, "--no-verify")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "ours"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
    assert main([str(tmp_path / "ours"), "--to", str(tmp_path / "x"), "--layout", "transformers"]) == 1
    assert "needs the EVA tower" in capsys.readouterr().err


# -- transformers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stage", ["itm", "opt", "t5"])
def test_ours_loads_in_transformers(ours, tmp_path, stage):
    target = tmp_path / "there"
    convert(ours(stage), "--to", target, "--layout", "transformers", "--no-verify")
    theirs = assert_loads_in_transformers(CLASSES[stage], target)
    mine = getattr(blip2_hf, CLASSES[stage]).from_pretrained(ours(stage)).eval()
    image = fixture("stage1_tiny")["image"] if stage == "itm" else fixture(f"stage2_{stage}_tiny")["image"]
    # theirs has the tower's epsilon 1e-6 for the last norm, too
    found, expected = theirs.vision_model(image).last_hidden_state, mine.vision_model(image).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if stage == "opt":
        ids = torch.tensor([[250] * QUERIES + [2, 40, 50]] * len(image))
        torch.testing.assert_close(
            theirs(pixel_values=image, input_ids=ids).logits,
            mine(pixel_values=image, input_ids=ids).logits,
            atol=1e-4,
            rtol=1e-4,
        )


def test_from_the_original_to_transformers_at_once(ours, original, tmp_path):
    """The same weights as by way of a folder of ours."""
    convert(*original.command("opt", tmp_path / "direct", "--layout", "transformers"))
    assert_loads_in_transformers(CLASSES["opt"], tmp_path / "direct")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "direct", ours("opt")))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("kind", ["llama", "t5", "retrieval"])
def test_transformers_to_ours(tmp_path, kind):
    source, target = tmp_path / "source", tmp_path / "ours"
    if kind == "retrieval":
        peer, _ = tiny_checkpoints.save_retrieval(source)
        name = "Blip2ForImageTextRetrieval"
    else:
        peer, _ = tiny_checkpoints.save_generation(source, kind)
        name = "Blip2ForConditionalGeneration"
    convert(source, "--to", target, *(["--no-verify"] if kind == "t5" else []))
    model = getattr(blip2_hf, name).from_pretrained(target)
    expected, found = peer.state_dict(), model.state_dict()
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    if kind != "retrieval":
        assert model.generation_config.to_diff_dict() == peer.generation_config.to_diff_dict()


def test_tower_with_biases_of_the_keys_and_no_captioning_head_to_the_original(tmp_path, capsys, caplog):
    """A trained tower has some, which the original's has no place for and which change nothing."""
    peer, _ = tiny_checkpoints.save_retrieval(tmp_path / "peer")
    assert peer.vision_model.encoder.layers[0].self_attn.qkv.bias.chunk(3)[1].all()
    convert(tmp_path / "peer", "--to", tmp_path / "there.pth", "--layout", "lavis")
    said = capsys.readouterr()
    assert "\nEQUAL" in said.out and said.err == "" and not caplog.records


@torch.no_grad()
def test_instructblip_there_and_back(tmp_path):
    source, target, back = tmp_path / "source", tmp_path / "ours", tmp_path / "back"
    peer, processor = tiny_checkpoints.save_instructblip(source, "llama")
    convert(source, "--to", target)
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(target).eval()
    assert model.config.qformer_config.use_qformer_text_input
    inputs = processor(images=tiny_checkpoints.photo("coffee"), text="a photo of", return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, peer(**inputs).logits, atol=1e-5, rtol=1e-5)
    convert(target, "--to", back, "--layout", "transformers", "--no-verify")
    again = assert_loads_in_transformers("InstructBlipForConditionalGeneration", back)
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in again.state_dict().items())


# -- precision and shards ----------------------------------------------------------------------------------------------


def test_frozen_parts_are_halved_and_shards_are_small(original, tmp_path):
    target = tmp_path / "half"
    convert(*original.command("opt", target, "--dtype", "float16", "--max-shard-size", "150KB"))
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 170_000 for shard in shards)
    for shard in shards:
        for name, tensor in load_file(shard).items():
            frozen = name.startswith(("vision_model.", "language_model.")) and "post_layernorm" not in name
            assert tensor.dtype == (torch.float16 if frozen else torch.float32), name
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(target)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_everything_in_one_precision(original, tmp_path):
    target = tmp_path / "half"
    convert(*original.command("t5", target, "--dtype", "bfloat16", "--trained-dtype", "bfloat16", "--no-verify"))
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(target)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_grown_vocabulary(original, tmp_path):
    """A placeholder that needs more rows than the language model has; the other logits stay."""
    wide = tiny_original.save_config(tmp_path / "wide.json", "opt", 250, vocab_size=264)
    arguments = original.command("opt", tmp_path / "wide", "--no-verify")
    arguments[arguments.index("--config") + 1] = str(wide)
    convert(*arguments)
    model = blip2_hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "wide").eval()
    data = fixture("stage2_opt_tiny")
    ids = torch.cat([torch.full((3, QUERIES), 250), data["noprompt/input_ids"]], dim=1)
    outputs = model(pixel_values=data["image"], input_ids=ids)
    assert outputs.logits.shape[-1] == 264
    first = QUERIES + 1
    torch.testing.assert_close(outputs.logits[:, :first, :260], data["noprompt/logits"][:, :first], **EXACT)
    convert(tmp_path / "wide", "--to", tmp_path / "back.pth", "--layout", "lavis", "--bridge-only")


def test_converted_models_take_pictures_of_their_size(ours):
    model = blip2_hf.Blip2ForImageTextRetrieval.from_pretrained(ours("itm"))
    assert model.get_image_features(pixels(1, 28)).shape == (1, QUERIES, 16)
