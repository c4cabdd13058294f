"""A retrieval run: the objectives of stage 1 on larger images, with a trained tower."""

import pytest
import torch

from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.training.retrieval import build_retrieval, parse_retrieval, retrieval_trainer
from blip2_hf.training.runs import run
from example_scripts import SMOKE, example


@pytest.fixture
def folders(tmp_path, monkeypatch):
    model, photos = tmp_path / "model", tmp_path / "photos"
    example("random_checkpoint", monkeypatch).save_retrieval_checkpoint(model)
    example("smoke_shapes", monkeypatch).write_captions(photos)
    return ["--model", str(model), "--train_folder", str(photos), "--eval_folder", str(photos)]


def test_a_run(tmp_path, folders) -> None:
    output = tmp_path / "run"
    command = [*SMOKE, *folders, "--max_steps", "3", "--output_dir", str(output), "--save_connector_only", "true"]
    arguments, training = parse_retrieval(command)
    model, processor = build_retrieval(arguments, training)
    assert model.config.vision_config.image_size == 224
    trainer = retrieval_trainer(model, processor, arguments, training)
    examples = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    assert len(examples) == 12 and len({example["image_id"] for example in examples}) == 6
    assert trainer.train_dataset.transform.max_length == 32
    batch = trainer.data_collator([dict(example) for example in examples])
    assert batch["pixel_values"].shape[2:] == (224, 224) and len(batch["image_ids"].unique()) == 6
    assert (training.eval_strategy, training.eval_steps) == (training.save_strategy, training.save_steps)
    metrics = run(trainer)
    assert metrics["eval_loss_itc"] > 0 and metrics["eval_loss_itm"] > 0 and metrics["eval_loss_itg"] > 0
    before = Blip2ForImageTextRetrieval.from_pretrained(folders[1]).vision_model.state_dict()
    same = [name for name, weight in model.vision_model.state_dict().items() if torch.equal(weight, before[name])]
    assert not [name for name in same if name.endswith("weight")]
    saved = Blip2ForImageTextRetrieval.from_pretrained(output).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


def test_the_column_comes_from_the_tower(tmp_path, folders) -> None:
    """Narrow as it is, the tower is taken like ViT-L."""
    options = ["--report_to", "none", "--use_cpu", "true", "--precision", "float32", "--output_dir", str(tmp_path)]
    _, training = parse_retrieval([*options, "--model", folders[1]])
    assert (training.learning_rate, training.layer_decay, training.adam_beta2) == (5e-6, 1.0, 0.98)
    _, training = parse_retrieval([*options, "--model", folders[1], "--tower", "vit_g"])
    assert (training.learning_rate, training.layer_decay, training.adam_beta2) == (1e-5, 0.95, 0.999)
    assert not training.fp16 and training.frozen_vision_dtype is None


def test_without_a_model() -> None:
    arguments, training = parse_retrieval(SMOKE)
    with pytest.raises(ValueError, match="`model` must be a retrieval model"):
        build_retrieval(arguments, training)


def test_the_example(tmp_path, monkeypatch) -> None:
    metrics = example("run_retrieval", monkeypatch).main([*SMOKE, "--output_dir", str(tmp_path), "--max_steps", "3"])
    assert metrics["eval_itm_accuracy"] >= 0
    assert Blip2ForImageTextRetrieval.from_pretrained(tmp_path).config.vision_config.image_size == 224
