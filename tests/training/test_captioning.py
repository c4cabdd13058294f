"""A captioning run: larger images, trained tower, frozen language model, texts in the evaluation."""

import json

import pytest
import torch

from blip2_hf.image_processing import Blip2ImageProcessor
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.processing import Blip2Processor
from blip2_hf.training.captioning import build_captioning, captioning_trainer, parse_captioning
from blip2_hf.training.runs import run
from example_scripts import SMOKE, example

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Arguments for a tiny model and drawn shapes."""
    model, photos = tmp_path / "model", tmp_path / "photos"
    example("random_checkpoint", monkeypatch).save_generation_checkpoint(model)
    example("smoke_shapes", monkeypatch).write_captions(photos)
    return ["--model", str(model), "--train_folder", str(photos), "--eval_folder", str(photos)]


def start(command: list[str]):
    arguments, training = parse_captioning(command)
    model, processor = build_captioning(arguments, training)
    return captioning_trainer(model, processor, arguments, training)


def same_weights(first, second) -> None:
    for (name, weight), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("connector_only", ["true", "false"])
def test_a_run(tmp_path, folders, connector_only: str) -> None:
    output = tmp_path / "run"
    command = [*SMOKE, *folders, *STEPS, "--output_dir", str(output), "--save_connector_only", connector_only]
    trainer = start(command)
    model, before = trainer.model, Blip2ForConditionalGeneration.from_pretrained(folders[1])
    metrics = run(trainer)
    assert metrics["eval_loss"] > 0 and "eval_generated_length" in metrics
    # every caption of every image in an epoch: 12 pairs, 3 batches of 4
    assert len(trainer.train_dataset) == 12 and len(trainer.eval_dataset) == 6
    # the tower has learned at the recipe's image size, the language model has not
    assert model.config.vision_config.image_size == 224
    patches = model.vision_model.embeddings.patch_embedding.weight
    assert not torch.equal(patches, before.vision_model.embeddings.patch_embedding.weight)
    same_weights(model.language_model, before.language_model)
    # what was saved is what was trained, and its processor makes images of that size
    same_weights(model, Blip2ForConditionalGeneration.from_pretrained(output))
    processor = Blip2Processor.from_pretrained(output)
    assert processor.image_processor.size == {"height": 224, "width": 224}
    # texts were written at each of the two evaluations, and the last one was not repeated
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 4, 4]
    assert samples[0]["prompt"] == "a photo of" and samples[0]["target"]
    # run again: nothing is left to do
    again = start(command)
    assert run(again)["eval_loss"] == metrics["eval_loss"]
    assert again.state.global_step == 4
    same_weights(model, again.model)


def test_resuming(tmp_path, folders) -> None:
    """Two steps, then two more in a new process's model: as four at once."""
    command = [*SMOKE, *folders, *STEPS, "--save_connector_only", "true"]
    whole = start([*command, "--output_dir", str(tmp_path / "whole")])
    run(whole)
    half = start([*command, "--output_dir", str(tmp_path / "half")])
    half.add_callback(stop_after(2))
    run(half)
    assert half.state.global_step == 2
    rest = start([*command, "--output_dir", str(tmp_path / "half")])
    run(rest)
    assert rest.state.global_step == 4
    same_weights(whole.model, rest.model)


def stop_after(steps: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


def test_options(folders, tmp_path) -> None:
    options = ["--image_size", "56", "--prompt", "a picture of", "--lora", "true", "--llm", "opt_6.7b"]
    arguments, training = parse_captioning([*SMOKE, *folders, *options, "--output_dir", str(tmp_path / "run")])
    model, processor = build_captioning(arguments, training)
    assert model.config.vision_config.image_size == 56
    trainer = captioning_trainer(model, processor, arguments, training)
    sample = trainer.train_dataset[0]
    assert sample["pixel_values"].shape == (3, 56, 56)
    assert processor.tokenizer.decode(sample["input_ids"]).endswith("</s>")
    text = processor.tokenizer.decode(
        [i for i, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100],
        skip_special_tokens=True,
    )
    assert text == "a picture of"
    adapters = [name for name, weight in model.language_model.named_parameters() if weight.requires_grad]
    assert adapters and all("lora" in name for name in adapters)


def test_columns_come_from_the_model(folders, tmp_path) -> None:
    """The precision that the language model needs, and the recipe's column that is nearest to it."""
    options = ["--report_to", "none", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    _, training = parse_captioning([*options, "--model", folders[1]])
    assert training.fp16 and training.frozen_language_dtype == "float16"  # OPT
    _, training = parse_captioning([*options, "--model", folders[1], "--precision", "bfloat16"])
    assert training.bf16 and training.frozen_language_dtype == "bfloat16" and training.frozen_vision_dtype is None
    assert training.layer_decay == 1.0 and training.generate_kwargs["num_beams"] == 5
    _, training = parse_captioning([*options, "--model", folders[1], "--precision", "bfloat16", "--llm", "opt_6.7b"])
    assert training.layer_decay == 0.95


def test_without_a_model() -> None:
    arguments, training = parse_captioning(SMOKE)
    with pytest.raises(ValueError, match="`model` must be a generation model"):
        build_captioning(arguments, training)


@pytest.mark.parametrize("llm", ["opt_2.7b", "flan_t5"])
def test_the_example(tmp_path, monkeypatch, llm: str) -> None:
    command = [*SMOKE, "--llm", llm, "--output_dir", str(tmp_path), "--max_steps", "3"]
    metrics = example("run_captioning", monkeypatch).main(command)
    assert metrics["eval_loss"] > 0 and (tmp_path / "samples.jsonl").exists()
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.is_encoder_decoder == (llm == "flan_t5")
    assert Blip2ImageProcessor.from_pretrained(tmp_path).size["height"] == 224
