"""A run on questions: the Q-Former gets a text branch and reads them, the language model stays as it is."""

import logging

import pytest
import torch

from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.processing import Blip2Processor
from blip2_hf.training.runs import run
from blip2_hf.training.vqa import build_vqa, parse_vqa, vqa_trainer
from example_scripts import SMOKE, example
from tiny_backbones import bert, save_bert


@pytest.fixture
def sources(tmp_path, monkeypatch):
    random_checkpoint = example("random_checkpoint", monkeypatch)
    random_checkpoint.save_retrieval_checkpoint(tmp_path / "stage1")
    random_checkpoint.save_generation_checkpoint(tmp_path / "model")
    example("smoke_shapes", monkeypatch).write_questions(tmp_path / "photos")
    return tmp_path


def command(sources, *options: str) -> list[str]:
    photos = str(sources / "photos")
    data = ["--train_folder", photos, "--eval_folder", photos, "--output_dir", str(sources / "run")]
    return [*SMOKE, "--model", str(sources / "model"), *data, "--max_steps", "3", *options]


def start(arguments: list[str]):
    arguments, training = parse_vqa(arguments)
    model, processor = build_vqa(arguments, training)
    return vqa_trainer(model, processor, arguments, training)


@pytest.mark.parametrize("connector_only", ["true", "false"])
def test_a_run(sources, connector_only: str) -> None:
    options = ["--text_branch", str(sources / "stage1"), "--save_connector_only", connector_only]
    trainer = start(command(sources, *options))
    model = trainer.model
    assert model.config.qformer_config.use_qformer_text_input and model.config.vision_config.image_size == 224
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 12
    sample = trainer.train_dataset[0]
    words = trainer.processing_class.qformer_tokenizer.decode(sample["qformer_input_ids"], skip_special_tokens=True)
    assert words.startswith("what") and words.endswith("?")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    metrics = run(trainer)
    assert metrics["eval_loss"] > 0 and metrics["eval_exact_match"] >= 0
    # what reads the question has learned, the language model has not
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "embeddings.word_embeddings.weight" in changed
    assert any(".intermediate.dense.weight" in name for name in changed)
    assert not [name for name in changed if name.startswith("language_model.")]
    saved = Blip2ForConditionalGeneration.from_pretrained(sources / "run")
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    processor = Blip2Processor.from_pretrained(sources / "run")
    assert processor.qformer_tokenizer is not None and processor.image_processor.size["height"] == 224


def test_the_question_counts(sources) -> None:
    """Another question gives other query outputs; without a text branch it does not, and this is said."""
    arguments, training = parse_vqa(command(sources, "--text_branch", str(sources / "stage1")))
    model, processor = build_vqa(arguments, training)
    image = torch.rand(1, 3, 224, 224)
    outputs = []
    for question in ("what color is this ?", "what shape is this ?"):
        inputs = processor(text=question, image_placeholders=True, return_tensors="pt")
        with torch.no_grad():
            outputs.append(model.eval()(pixel_values=image, **inputs).qformer_outputs.last_hidden_state)
    queries = model.config.num_query_tokens
    assert not torch.allclose(outputs[0][:, :queries], outputs[1][:, :queries], atol=1e-3)


def test_without_a_text_branch(sources, caplog) -> None:
    logging.getLogger("blip2_hf").addHandler(caplog.handler)
    arguments, training = parse_vqa(command(sources))
    model, _ = build_vqa(arguments, training)
    assert not model.config.qformer_config.use_qformer_text_input
    assert "the Q-Former does not read the question" in caplog.text


def test_a_text_branch_of_bert(sources) -> None:
    width = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    folder = save_bert(sources / "bert", bert(**width))
    assert run(start(command(sources, "--text_branch", folder)))["train_loss"] > 0


def test_options(sources) -> None:
    trainer = start(command(sources, "--prompt", "question : {} the answer is", "--image_size", "56"))
    assert trainer.train_dataset.transform.prompt == "question : {} the answer is"
    assert trainer.train_dataset[0]["pixel_values"].shape == (3, 56, 56)
    assert start(command(sources)).eval_dataset.transform.prompt == "Question: {} Answer:"


def test_without_a_model() -> None:
    arguments, training = parse_vqa(SMOKE)
    with pytest.raises(ValueError, match="`model` must be a generation model"):
        build_vqa(arguments, training)


@pytest.mark.parametrize("llm", ["opt_2.7b", "flan_t5"])
def test_the_example(tmp_path, monkeypatch, llm: str) -> None:
    command = [*SMOKE, "--llm", llm, "--output_dir", str(tmp_path), "--max_steps", "3"]
    metrics = example("run_vqa", monkeypatch).main(command)
    assert metrics["eval_loss"] > 0 and "eval_exact_match" in metrics
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.qformer_config.use_qformer_text_input
