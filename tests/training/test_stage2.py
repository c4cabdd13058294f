"""A stage-2 run: from a stage-1 checkpoint and a language model, with what is frozen, saved and resumed."""

import json

import pytest
import torch
from safetensors import safe_open

from blip2_hf.modeling.checkpoint_files import CONNECTOR_NAME
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.training.arguments import Blip2TrainingArguments
from blip2_hf.training.checkpoints import has_connector
from blip2_hf.training.runs import run
from blip2_hf.training.stage2 import build_stage2, parse_stage2, stage2_trainer
from example_scripts import SMOKE, example

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Folders: stage 1, language models and drawn shapes."""
    random_checkpoint = example("random_checkpoint", monkeypatch)
    random_checkpoint.save_retrieval_checkpoint(tmp_path / "stage1")
    for family in ("opt", "t5"):
        random_checkpoint.save_language_checkpoint(tmp_path / family, family=family)
    example("smoke_shapes", monkeypatch).write_captions(tmp_path / "photos")
    return tmp_path


def command(sources, family: str = "opt", *options: str) -> list[str]:
    photos = str(sources / "photos")
    data = ["--train_folder", photos, "--eval_folder", photos, "--output_dir", str(sources / "run")]
    return [*SMOKE, "--stage1", str(sources / "stage1"), "--language", str(sources / family), *data, *STEPS, *options]


def start(arguments: list[str]):
    arguments, training = parse_stage2(arguments)
    model, processor = build_stage2(arguments, training)
    return stage2_trainer(model, processor, arguments, training)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_run(sources, family: str) -> None:
    trainer = start(command(sources, family, "--save_connector_only", "true"))
    model, output = trainer.model, sources / "run"
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"query_tokens", "qformer", "language_projection", "vision_model"}
    assert not any(weight.requires_grad for weight in model.language_model.parameters())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    metrics = run(trainer)
    assert metrics["eval_loss"] > 0 and "eval_generated_length" not in metrics
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "language_projection.weight" in changed and "vision_model.post_layernorm.weight" in changed
    assert not [name for name in changed if name.startswith("language_model.")]
    # the queries began as those of stage 1
    stage1 = Blip2ForImageTextRetrieval.from_pretrained(sources / "stage1")
    assert torch.equal(before["query_tokens"], stage1.query_tokens)
    assert (output / "start").is_dir() and has_connector(output) and has_connector(output / "checkpoint-2")
    saved = Blip2ForConditionalGeneration.from_pretrained(output).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert (output / "samples.jsonl").exists()
    # run again: the same starting point, and nothing is left to do
    again = start(command(sources, family, "--save_connector_only", "true"))
    run(again)
    assert again.state.global_step == 4
    assert all(torch.equal(weight, saved[name]) for name, weight in again.model.state_dict().items())


def test_targets(sources) -> None:
    """FlanT5: the rest of the caption, unless the whole one is asked for; evaluation is on whole ones."""
    trainer = start(command(sources, "t5"))
    assert trainer.train_dataset.transform.target == "prefix_lm"
    assert trainer.eval_dataset.transform.target == "whole"
    assert start(command(sources, "t5", "--target", "whole")).train_dataset.transform.target == "whole"
    assert start(command(sources, "opt")).train_dataset.transform.target == "whole"
    with pytest.raises(ValueError, match="`target` 'prefix_lm' needs an encoder"):
        start(command(sources, "opt", "--target", "prefix_lm"))


def test_columns_come_from_the_language_model(sources) -> None:
    options = ["--recipe", "paper", "--report_to", "none", "--use_cpu", "true", "--output_dir", str(sources / "run")]
    _, training = parse_stage2([*options, "--language", str(sources / "t5")])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 1520
    assert training.bf16 and training.frozen_language_dtype == training.frozen_vision_dtype == "bfloat16"
    _, training = parse_stage2([*options, "--language", str(sources / "opt")])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 1920
    assert training.fp16 and training.frozen_language_dtype == training.frozen_vision_dtype == "float16"


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_half_precision(sources, family: str) -> None:
    """What is frozen in bfloat16, what is trained in float32, and the whole of it learns."""
    trainer = start(command(sources, family, "--precision", "bfloat16", "--sample_texts", "0"))
    run(trainer)
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_lora(sources) -> None:
    trainer = start(command(sources, "opt", "--lora", "true", "--save_connector_only", "true"))
    run(trainer)
    saved = Blip2ForConditionalGeneration.from_pretrained(sources / "run")
    adapters = {name: weight for name, weight in saved.state_dict().items() if "lora" in name}
    assert adapters and (sources / "run" / "language_adapter").is_dir()
    own = trainer.model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in adapters.items())


@pytest.mark.parametrize("saved", ["false", "true"])
def test_new_weights_come_from_the_seed(sources, saved: str) -> None:
    """Whether the starting point was written now, is there already, or is not written at all."""

    def built(seed: str, folder: str) -> dict[str, torch.Tensor]:
        options = [
            "--lora",
            "true",
            "--seed",
            seed,
            "--save_connector_only",
            saved,
            "--output_dir",
            str(sources / folder),
        ]
        model, _ = build_stage2(*parse_stage2(command(sources, "opt", *options)))
        new = ("language_projection.weight", "lora_A")
        return {name: weight for name, weight in model.state_dict().items() if any(part in name for part in new)}

    first = built("1", "a")
    torch.rand(3)
    again, elsewhere, other = built("1", "a"), built("1", "b"), built("2", "c")
    assert len(first) > 1
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and torch.equal(weight, elsewhere[name]), name
        assert not torch.equal(weight, other[name]), name


def test_other_images_with_a_frozen_tower(sources) -> None:
    """Its positions are interpolated again, not saved."""
    trainer = start(command(sources, "opt", "--image_size", "56", "--save_connector_only", "true"))
    run(trainer)
    saved = Blip2ForConditionalGeneration.from_pretrained(sources / "run")
    assert saved.config.vision_config.image_size == 56
    own = trainer.model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in saved.state_dict().items())
    with safe_open(sources / "run" / CONNECTOR_NAME, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("vision_model.") and "post_layernorm" not in name]  # noqa: SIM118


def test_going_on_with_a_model(sources) -> None:
    run(start(command(sources, "opt")))
    options = [*SMOKE, "--model", str(sources / "run"), "--output_dir", str(sources / "more")]
    options += ["--train_folder", str(sources / "photos"), "--max_steps", "1"]
    trainer = start(options)
    assert not any(weight.requires_grad for weight in trainer.model.language_model.parameters())
    assert run(trainer)["train_loss"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "exactly one of `model` and `language` must be given, got None and None"),
        (["--model", "stage1", "--stage1", "stage1"], "`stage1` cannot be given beside `model` 'stage1'"),
        (["--model", "stage1", "--model_config", "{}"], "`model_config` cannot be given beside `model` 'stage1'"),
    ],
)
def test_what_does_not_go(given: list[str], message: str, tmp_path) -> None:
    from blip2_hf.training.stage2 import Stage2Arguments

    values = dict(zip((name.removeprefix("--") for name in given[::2]), given[1::2], strict=True))
    with pytest.raises(ValueError, match=message):
        training = Blip2TrainingArguments(tmp_path, report_to="none", use_cpu=True)
        build_stage2(Stage2Arguments(recipe="smoke", **values), training)


def test_fields_of_a_new_model(sources) -> None:
    """Without stage 1 the queries may be any number, and the processor writes as many placeholders."""
    options = ["--vision", str(sources / "stage1"), "--language", str(sources / "opt")]
    options += ["--model_config", '{"num_query_tokens": 3}', "--output_dir", str(sources / "run")]
    model, processor = build_stage2(*parse_stage2([*SMOKE, *options]))
    assert model.query_tokens.shape[1] == processor.num_query_tokens == 3


@pytest.mark.parametrize("llm", ["opt_2.7b", "flan_t5"])
def test_the_example(tmp_path, monkeypatch, llm: str) -> None:
    command = [*SMOKE, "--llm", llm, "--output_dir", str(tmp_path), "--max_steps", "3", "--save_steps", "2"]
    metrics = example("run_stage2", monkeypatch).main(command)
    assert metrics["eval_loss"] > 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry][0] == 2  # with the first checkpoint
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.is_encoder_decoder == (llm == "flan_t5")


def test_the_example_takes_what_is_given(sources, monkeypatch) -> None:
    """And makes up the rest, once."""
    script, given = example("run_stage2", monkeypatch), str(sources / "photos")
    options = ["--output_dir", str(sources), "--stage1", str(sources / "stage1"), "--eval_folder", given]
    arguments, training = parse_stage2([*SMOKE, *options])
    for _ in range(2):
        script.fill_in(arguments, training)
        assert (arguments.stage1, arguments.eval_folder) == (str(sources / "stage1"), given)
        assert arguments.train_folder == str(sources / "smoke_data" / "photos")
    assert sorted(path.name for path in (sources / "smoke_data").iterdir()) == ["opt", "photos"]
