"""Blip2Trainer with the generation model: accumulation, resume, checkpointing, connectors, unused parameters."""

import pytest
import torch
from transformers import TrainingArguments

from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.training.checkpoints import has_connector, last_complete_checkpoint
from blip2_hf.training.generating import target_mask
from generation_pairs import build
from parity import assert_same_gradients
from tiny_generation import END, FAMILIES, Collator, example, examples, frozen_model, run
from tiny_models import IMAGE_TOKEN, QFORMER, pixels
from tiny_own_models import CLIP, generation
from tiny_training import Fixed, arguments, logged, retrieval_model, trainer

CUTS = [(4, 1), (2, 2), (1, 4)]


def step(family: str, folder, cut: tuple[int, int], change=None, data: Fixed | None = None):
    """Gradients of the first optimiser step, before clipping changes them, and what was logged."""
    batch, steps = cut
    one = run(
        family,
        folder,
        train=examples(family, 4) if data is None else data,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    if change is not None:
        change(one)
    found, clip = {}, one._clip_grad_norm

    def keep(model):
        found.update({n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None})
        return clip(model)

    one._clip_grad_norm = keep
    one.train()
    return found, one.state.log_history[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_is_exact(tmp_path, family: str) -> None:
    whole, log = step(family, tmp_path, CUTS[0])
    assert not any(name.startswith("language_model.") for name in whole)
    for cut in CUTS[1:]:
        parts, other = step(family, tmp_path, cut)
        assert_same_gradients(whole, parts)
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(log[name], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_counts_it_is_not(tmp_path, family: str) -> None:
    """As targets differ in length, a mean of means is another loss."""
    whole, log = step(family, tmp_path, CUTS[0])

    def uncounted(one) -> None:
        one._get_num_items_in_batch = lambda batches, device: None

    parts, other = step(family, tmp_path, CUTS[2], uncounted)
    assert other["loss"] != pytest.approx(log["loss"], rel=1e-3)
    assert not torch.allclose(whole["query_tokens"], parts["query_tokens"], rtol=1e-3)


def test_labels_that_the_loss_leaves_out_are_not_counted(tmp_path) -> None:
    """`labels=input_ids`, with image placeholders and padding in them: the mean is over the others."""

    class Whole(Collator):
        def __call__(self, samples):
            batch = super().__call__(samples)
            return batch | {"labels": batch["input_ids"].clone()}

    def change(one) -> None:
        one.data_collator = Whole("opt")

    whole, log = step("opt", tmp_path, CUTS[0], change)
    parts, other = step("opt", tmp_path, CUTS[1], change)
    assert_same_gradients(whole, parts)
    batch = Whole("opt")([examples("opt", 4)[index] for index in range(4)])
    with torch.no_grad():
        expected = frozen_model("opt")(**batch).loss.item()
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    assert other["loss"] == pytest.approx(expected, rel=1e-5)


def test_target_mask_is_that_of_the_loss() -> None:
    """Text before the image, padding on either side: the counted tokens are those that the model's mean is over."""
    ids = torch.tensor([[1, 1, 2, 40, *[IMAGE_TOKEN] * 4, 50, 51, END], [2, 40, *[IMAGE_TOKEN] * 4, 50, 51, END, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids, "pixel_values": pixels(2)}
    model = frozen_model("opt").eval()
    assert target_mask(batch, model.config).sum(dim=1).tolist() == [4, 4]
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    with torch.no_grad():
        mean = model(**batch).loss
        sums = [model(**row, num_items_in_batch=1).loss for row in rows]
    torch.testing.assert_close(sum(sums) / 8, mean)
    unpadded = {name: value[:, 2:] if value.ndim == 2 else value for name, value in rows[0].items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**unpadded, num_items_in_batch=1).loss, sums[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing(tmp_path, family: str) -> None:
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    logs = []
    for fields in ({}, {name: True}):
        one = run(family, tmp_path, train=examples(family, 4), max_steps=2, **fields)
        one.train()
        logs.append(logged(one, "loss", "grad_norm"))
        assert one.model.qformer.encoder.gradient_checkpointing is bool(fields)
    for first, second in zip(*logs, strict=True):
        assert second == pytest.approx(first, rel=1e-4)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_exact(tmp_path, family: str) -> None:
    """With dropout, shuffling and accumulation, from the last checkpoint that was written to its end."""
    names = ("loss", "grad_norm", "learning_rate", "epoch")
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 2}

    def start(folder):
        return run(family, folder, frozen_model(family, dropout=True), examples(family, 10), **fields)

    whole = start(tmp_path / "whole")
    torch.manual_seed(0)
    whole.train()
    ended = start(tmp_path / "again")
    save = ended._save_rng_state

    def killed(folder: str) -> None:
        save(folder)
        if ended.state.global_step == 4:
            raise Killed

    ended._save_rng_state = killed
    torch.manual_seed(0)
    with pytest.raises(Killed):
        ended.train()
    assert last_complete_checkpoint(tmp_path / "again") == str(tmp_path / "again" / "checkpoint-2")
    resumed = start(tmp_path / "again")
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, *names) == logged(whole, *names)
    assert len({loss for _, loss in logged(whole, "loss")}) == 6
    others = resumed.model.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in whole.model.state_dict().items())
    blind = start(tmp_path / "blind")  # the comparison could fail
    blind._load_rng_state = lambda checkpoint: None
    blind.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(blind, *names)[-1] != logged(whole, *names)[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_connectors(tmp_path, family: str) -> None:
    """Checkpoints without tower and language model, from which a run goes on exactly."""
    frozen_model(family).save_pretrained(tmp_path / "start")
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_connector_only": True}

    def start(folder, source):
        model = Blip2ForConditionalGeneration.from_pretrained(source)
        model.freeze_vision()
        model.freeze_language_model()
        return run(family, folder, model, examples(family, 6), **fields)

    whole = start(tmp_path / "run", tmp_path / "start")
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert has_connector(checkpoint) and not (checkpoint / "model.safetensors").exists()
    from safetensors import safe_open

    with safe_open(checkpoint / "connector.safetensors", framework="pt") as file:
        keys = set(file.keys())
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert keys == trained and not any(key.startswith("language_model.") for key in keys)
    again = start(tmp_path / "again", checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert logged(again, "loss", "grad_norm") == logged(whole, "loss", "grad_norm")


def questioning(family: str):
    return build(family, qformer_config={**QFORMER, "use_qformer_text_input": True})


UNUSED = {
    "frozen": (frozen_model, False),
    "all trained": (generation, False),
    "tower of its own kind": (lambda family: generation(family, tower=CLIP), True),
    "question": (questioning, False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", UNUSED)
def test_unused_parameters_are_told_rightly(tmp_path, family: str, kind: str) -> None:
    """DDP would wait for a gradient that never comes, or go through the graph in vain at every step."""
    make, expected = UNUSED[kind]
    model = make(family).train()
    batch = Collator(family)([example(family, number) for number in range(2)])
    if kind == "question":
        batch["qformer_input_ids"] = torch.randint(10, 290, (2, 5))
    model(**batch).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    args = arguments(tmp_path)
    trainer(model, args)
    assert args.ddp_find_unused_parameters is bool(missing), missing
    assert bool(missing) is expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 2}, "`chunk_size` is for representation learning, got 2"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` and `compute_loss_func` cannot be used"),
        ({"batch_eval_metrics": True, "predict_with_generate": True}, "`batch_eval_metrics=True` needs"),
        ({"sample_texts": 2}, "`sample_texts` needs a Blip2Processor as `processing_class`, got NoneType"),
    ],
)
def test_arguments_that_would_be_ignored(tmp_path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("opt", tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predict_with_generate": True}, "`predict_with_generate` needs a Blip2ForConditionalGeneration"),
        ({"sample_texts": 2}, "`sample_texts` needs a Blip2ForConditionalGeneration"),
        ({"frozen_language_dtype": "bfloat16"}, "`frozen_language_dtype` .* needs a language model"),
    ],
)
def test_arguments_for_the_other_model(tmp_path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(retrieval_model(), arguments(tmp_path, **fields))


def test_frozen_language_model_in_half_precision(tmp_path) -> None:
    fields = {"max_steps": 2, "bf16": True, "frozen_language_dtype": "bfloat16", "frozen_vision_dtype": "bfloat16"}
    for family in FAMILIES:
        one = run(family, tmp_path, train=examples(family, 4), eval_dataset=examples(family, 4), **fields)
        one.train()
        for name, parameter in one.model.named_parameters():
            assert parameter.requires_grad == (parameter.dtype == torch.float32), name
        assert one.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="overflow in float16"):
        run("t5", tmp_path, frozen_language_dtype="float16")
    with pytest.raises(ValueError, match="`frozen_language_dtype` must be one of float16, bfloat16"):
        arguments(tmp_path, frozen_language_dtype="int8")


@pytest.mark.parametrize("half", [True, False])
def test_the_language_model_trains_with_the_kernel_that_is_fast_backwards(tmp_path, half: bool) -> None:
    """`slow_backward`; what the model had is back afterwards."""
    one = run("opt", tmp_path, train=examples("opt", 4), max_steps=2, bf16=half)
    config, seen = one.model.language_model.config, []
    assert config._attn_implementation == "sdpa"
    one.model.language_model.register_forward_pre_hook(lambda *_: seen.append(config._attn_implementation))
    one.train()
    assert seen and set(seen) == {"eager" if half else "sdpa"}
    assert config._attn_implementation == "sdpa"
