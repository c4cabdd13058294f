"""The run from the command line: arguments, model, data, and a whole run on a folder of pictures."""

import csv
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip2_hf.image_processing import Blip2ImageProcessor
from blip2_hf.processing import Blip2Processor
from blip2_hf.training.checkpoints import has_connector
from blip2_hf.training.stage1 import build_stage1, parse_stage1, run_stage1, stage1_trainer
from tiny_backbones import bert, save_bert, tower_model
from tiny_tokenizers import WORDS, tiny_bert_tokenizer
from tiny_training import retrieval_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMOKE = ["--recipe", "smoke", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.fixture
def photos(tmp_path):
    """Six pictures with captions, one of which is not a picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = random.Random(0)
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for number in range(6):
            Image.new("RGB", (40, 30), tuple(draw.choices(range(256), k=3))).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", " ".join(draw.choices(WORDS, k=4))])
    (folder / "5.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    model = retrieval_model()
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def processor() -> Blip2Processor:
    return Blip2Processor(Blip2ImageProcessor(size=28), tiny_bert_tokenizer())


def test_recipe_gives_the_defaults(tmp_path) -> None:
    arguments, training = parse_stage1([*SMOKE, "--output_dir", str(tmp_path), "--max_steps", "3"])
    assert arguments.recipe == "smoke" and arguments.text == "bert-base-uncased"
    assert (training.max_steps, training.warmup_steps, training.adam_beta2) == (3, 2, 0.98)
    assert training.lr_scheduler_kwargs == {"min_lr": 0.0} and training.output_dir == str(tmp_path)


def test_the_batch_is_accumulated(monkeypatch) -> None:
    options = ["--use_cpu", "true", "--fp16", "false", "--report_to", "none"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    _, training = parse_stage1(["--recipe", "paper", "--tower", "vit_l", *options])
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (145, 16)
    _, training = parse_stage1(["--recipe", "lavis", "--per_device_train_batch_size", "50", *options])
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (50, 32)
    with pytest.raises(ValueError, match="`recipe` must be one of"):
        parse_stage1(["--recipe", "unknown"])


def test_a_run_on_photos(tmp_path, photos, checkpoint) -> None:
    command = [*SMOKE, "--model", str(checkpoint), "--train_folder", str(photos), "--eval_folder", str(photos)]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    command += ["--save_connector_only", "true"]
    arguments, training = parse_stage1(command)
    run = stage1_trainer(*build_stage1(arguments, training), arguments, training)
    metrics = run_stage1(run)
    assert metrics["train_loss"] > 0 and metrics["eval_loss_itg"] > 0 and metrics["eval_skipped_samples"] == 1
    assert run.state.log_history[-2]["step"] == 4 or run.state.global_step == 4
    assert has_connector(tmp_path / "run") and has_connector(tmp_path / "run" / "checkpoint-2")
    assert any("skipped_samples" in entry for entry in run.state.log_history)
    assert not run.model.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    # run again: nothing is left to do
    again = stage1_trainer(*build_stage1(arguments, training), arguments, training)
    run_stage1(again)
    assert again.state.global_step == 4
    for first, second in zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_the_example(tmp_path, monkeypatch) -> None:
    """The command of its header: random weights, photos of scikit-image."""
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("run_stage1", EXAMPLES / "run_stage1.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    metrics = example.main([*SMOKE, "--output_dir", str(tmp_path)])
    sys.modules.pop("random_checkpoint", None)
    assert metrics["eval_loss"] > 0 and (tmp_path / "checkpoint-20").is_dir()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = [entry["loss_itg"] for entry in state["log_history"] if "loss_itg" in entry]
    assert losses[-1] < losses[0]


def test_from_backbones_with_a_starting_point(tmp_path, photos) -> None:
    text = save_bert(tmp_path / "bert", bert())
    vision = tmp_path / "vision"
    tower_model("clip_vision").save_pretrained(vision)
    command = [*SMOKE, "--vision", str(vision), "--text", text, "--output_dir", str(tmp_path / "run")]
    arguments, training = parse_stage1([*command, "--save_connector_only", "true"])
    model, words = build_stage1(arguments, training)
    start = tmp_path / "run" / "start"
    assert start.is_dir() and model.config._name_or_path == os.fspath(start)
    again, _ = build_stage1(arguments, training)  # the same starting point, not another draw
    assert torch.equal(model.query_tokens, again.query_tokens)
    assert words.tokenizer.bos_token == "[DEC]"
    arguments, training = parse_stage1(command)
    fresh, _ = build_stage1(arguments, training)
    assert fresh.config._name_or_path == "" and not fresh.vision_model.tower.training


def test_fields_of_a_new_model(tmp_path, checkpoint) -> None:
    text = save_bert(tmp_path / "bert", bert())
    vision = tmp_path / "vision"
    tower_model("clip_vision").save_pretrained(vision)
    fields = {"num_query_tokens": 5, "itg_weight": 0.0, "qformer_config": {"cross_attention_frequency": 1}}
    command = [*SMOKE, "--output_dir", str(tmp_path / "run"), "--model_config", json.dumps(fields)]
    model, _ = build_stage1(*parse_stage1([*command, "--vision", str(vision), "--text", text]))
    assert model.query_tokens.shape[1] == 5 and model.config.itg_weight == 0
    assert model.config.qformer_config.cross_attention_frequency == 1
    with pytest.raises(ValueError, match="`model_config` cannot be given beside `model`"):
        build_stage1(*parse_stage1([*command, "--model", str(checkpoint)]))
    with pytest.raises(ValueError, match="`model_config` must be a JSON object, got '5'"):
        build_stage1(*parse_stage1([*command[:-1], "5", "--vision", str(vision), "--text", text]))


def test_what_is_missing(tmp_path) -> None:
    arguments, training = parse_stage1([*SMOKE, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="exactly one of `model` and `vision` must be given, got None and None"):
        build_stage1(arguments, training)
    with pytest.raises(ValueError, match="`train_folder` must be a folder of photos"):
        stage1_trainer(retrieval_model(), processor(), arguments, training)


def test_described_sets(tmp_path, photos, checkpoint) -> None:
    """Two sets with weights, from a JSON file beside them."""
    sets = tmp_path / "sets.json"
    entry = {"source": "image_folder", "folder": "photos"}
    sets.write_text(json.dumps([{**entry, "weight": 1}, {**entry, "name": "again", "weight": 2}]))
    command = [*SMOKE, "--model", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    arguments, training = parse_stage1([*command, "--train_sets", str(sets), "--max_steps", "1"])
    run = stage1_trainer(*build_stage1(arguments, training), arguments, training)
    assert run.train_dataset.quotas == [4, 8]
    assert run_stage1(run)["train_loss"] > 0
    with pytest.raises(ValueError, match="`train_folder` and `train_sets` cannot both be given"):
        arguments, training = parse_stage1([*command, "--train_sets", str(sets), "--train_folder", str(photos)])
        stage1_trainer(*build_stage1(arguments, training), arguments, training)
    with pytest.raises(ValueError, match="got neither"):
        arguments, training = parse_stage1(command)
        stage1_trainer(*build_stage1(arguments, training), arguments, training)
