"""Gradient accumulation: the same gradients however an optimiser step is cut into batches."""

import pytest
import torch

from blip2_hf.data.collator import ImageTextCollator
from blip2_hf.training.trainer import BatchCounts
from parity import assert_same_gradients, without_dropout
from tiny_models import IMAGE_TOKEN, pixels, prompt_ids
from tiny_own_models import generation
from tiny_training import Fixed, arguments, fixed_pairs, logged, retrieval_model, trainer

CUTS = [(4, 1), (2, 2), (1, 4)]


def step_gradients(run) -> tuple[dict[str, torch.Tensor], list[tuple]]:
    """Gradients of the first optimiser step, before clipping changes them, and the losses logged."""
    found: dict[str, torch.Tensor] = {}
    original = run._clip_grad_norm

    def keep(model):
        found.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
        return original(model)

    run._clip_grad_norm = keep
    run.train()
    return found, run.state.log_history


def retrieval_step(folder, batch: int, steps: int, **weights):
    model = retrieval_model(**weights)
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    return trainer(model, args, fixed_pairs(4))


@pytest.mark.parametrize("cut", CUTS[1:])
def test_itg_is_exact(tmp_path, cut) -> None:
    weights = {"itc_weight": 0.0, "itm_weight": 0.0}
    whole, history = step_gradients(retrieval_step(tmp_path, *CUTS[0], **weights))
    parts, others = step_gradients(retrieval_step(tmp_path, *cut, **weights))
    assert_same_gradients(whole, parts)
    for name in ("loss", "loss_itg", "grad_norm"):
        assert others[0][name] == pytest.approx(history[0][name], rel=1e-5)
    assert "loss_itc" not in history[0] and "temperature" not in history[0]


def test_texts_differ_in_length() -> None:
    """Else a mean of means would be exact, too."""
    assert len({len(sample["input_ids"]) for sample in fixed_pairs(4).samples}) > 1


def test_without_the_counts_it_is_not_exact(tmp_path) -> None:
    weights = {"itc_weight": 0.0, "itm_weight": 0.0}
    whole, _ = step_gradients(retrieval_step(tmp_path, *CUTS[0], **weights))
    run = retrieval_step(tmp_path, *CUTS[1], **weights)
    run._get_num_items_in_batch = lambda batches, device: None
    parts, _ = step_gradients(run)
    name = "lm_head.dense.weight"
    assert not torch.allclose(whole[name], parts[name], rtol=1e-3)


def test_itm_is_exact_but_for_its_negatives(tmp_path) -> None:
    """Negatives come from within a batch; so two batches of two pairs against one of four with the same negatives."""
    weights = {"itc_weight": 0.0, "itg_weight": 0.0}

    def with_negatives(order: list[int]):
        def collate(samples: list[dict]) -> dict:
            batch = ImageTextCollator(pad_token_id=0)(samples)
            numbers = torch.tensor(order[: len(samples)])
            return batch | {"negative_image_indices": numbers, "negative_text_indices": numbers}

        return collate

    runs = []
    for cut in CUTS[:2]:
        run = retrieval_step(tmp_path, *cut, **weights)
        run.data_collator = with_negatives([1, 0, 3, 2])
        runs.append(step_gradients(run)[0])
    assert_same_gradients(*runs)


def test_itc_has_the_negatives_of_a_batch(tmp_path) -> None:
    """Not exact, and not meant to be: a sum of contrasts among two pairs each."""
    weights = {"itm_weight": 0.0, "itg_weight": 0.0}
    whole, _ = step_gradients(retrieval_step(tmp_path, *CUTS[0], **weights))
    parts, _ = step_gradients(retrieval_step(tmp_path, *CUTS[1], **weights))
    assert not torch.allclose(whole["query_tokens"], parts["query_tokens"], rtol=1e-3)


def test_counts_leave_out_padding_and_first_tokens(tmp_path) -> None:
    run = retrieval_step(tmp_path, 2, 2)
    batches = [
        {"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])},
        {"input_ids": torch.ones(3, 4)},
    ]
    counts = run._get_num_items_in_batch(batches, torch.device("cpu"))
    assert isinstance(counts, BatchCounts)
    assert (counts.pairs.item(), counts.tokens.item()) == (5, 2 + 4 + 3 * 3)
    assert run._get_num_items_in_batch([], torch.device("cpu")) is None


def test_the_last_step_of_an_epoch_may_be_smaller(tmp_path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1)
    run = trainer(retrieval_model(itc_weight=0.0, itm_weight=0.0), args, fixed_pairs(5))
    run.train()
    assert [step for step, _ in logged(run, "loss_itg")] == [1, 2]
    assert all(loss == pytest.approx(part) for _, loss, part in logged(run, "loss", "loss_itg"))


def captioning_samples(family: str) -> Fixed:
    samples = []
    for number in range(4):
        ids = prompt_ids(1, 3 + number, seed=number)[0]
        labels = ids.clone()
        labels[labels == IMAGE_TOKEN] = -100
        if family == "t5":
            labels = labels[labels != -100]
        samples.append({"pixel_values": pixels(1, seed=number)[0], "input_ids": ids, "labels": labels})
    return Fixed(samples)


def captioning_collator(samples: list[dict]) -> dict:
    def padded(name: str, value: int) -> torch.Tensor:
        rows = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = padded("input_ids", 1)
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "labels": padded("labels", -100),
        "truncated": 1,
        "skipped": [],
    }


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_generation_stays_exact(tmp_path, family: str) -> None:
    runs = []
    for batch, steps in (CUTS[0], CUTS[2]):
        model = without_dropout(generation(family))
        model.freeze_vision()
        model.freeze_language_model()
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        run = trainer(model, args, captioning_samples(family), data_collator=captioning_collator)
        runs.append(step_gradients(run))
    (whole, history), (parts, others) = runs
    assert_same_gradients(whole, parts)
    assert others[0]["loss"] == pytest.approx(history[0]["loss"], rel=1e-5)
    assert others[0]["truncated_captions"] == 4  # one for each batch
