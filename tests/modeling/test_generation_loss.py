"""Losses: what they train on, that they are `transformers`' on the same targets, and exact accumulation."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from generation_pairs import build, model, pair, ragged
from parity import EXACT, assert_same_gradients, changed, gradients
from tiny_models import QFORMER, QUERIES, VOCAB, pixels, prompt_ids

SEQ2SEQ_TARGETS = torch.tensor([[15, 16, 17, 3], [18, 3, -100, -100]])


def causal_targets(batch) -> torch.Tensor:
    """Of the text, without images and padding."""
    targets = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return targets.masked_fill(targets == VOCAB - 1, -100)


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama"])
@torch.no_grad()
def test_causal_loss_is_that_of_transformers_on_masked_labels(family: str) -> None:
    peer, ours = pair(family)
    batch = ragged("left") if family == "opt" else ragged("right")  # where its positions are right in forward
    targets = causal_targets(batch)
    expected = peer(pixels(), **batch.text, labels=targets).loss
    torch.testing.assert_close(ours(pixels(), **batch.text, labels=targets).loss, expected, **EXACT)
    with changed(ours, "language_projection.weight"):
        assert abs(ours(pixels(), **batch.text, labels=targets).loss - expected) > 1e-3


@pytest.mark.parametrize("layout", ["left", "right"])
@torch.no_grad()
def test_images_and_padding_are_never_targets(layout: str) -> None:
    ours, batch = model("opt"), ragged(layout)
    outputs = ours(pixels(), **batch.text, labels=causal_targets(batch))
    torch.testing.assert_close(ours(pixels(), **batch.text, labels=batch.input_ids).loss, outputs.loss, **EXACT)
    torch.testing.assert_close(by_hand(outputs.logits[:, :-1], causal_targets(batch)[:, 1:]), outputs.loss, **EXACT)
    everything = by_hand(outputs.logits[:, :-1], batch.input_ids[:, 1:])
    assert abs(everything - outputs.loss) > 1e-2, "training on images and padding would be another loss"


@torch.no_grad()
def test_the_prompt_can_be_left_out() -> None:
    ours, batch = model("opt"), ragged("right")
    answers = causal_targets(batch)
    answers[:, : QUERIES + 2] = -100
    outputs = ours(pixels(), **batch.text, labels=answers)
    torch.testing.assert_close(by_hand(outputs.logits[:, :-1], answers[:, 1:]), outputs.loss, **EXACT)


@torch.no_grad()
def test_seq2seq_loss_is_that_of_transformers() -> None:
    peer, ours = pair("t5")
    batch = ragged("right", pad=0)
    expected = peer(pixels(), **batch.text, labels=SEQ2SEQ_TARGETS)
    found = ours(pixels(), **batch.text, labels=SEQ2SEQ_TARGETS)
    torch.testing.assert_close(found.loss, expected.loss, **EXACT)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    torch.testing.assert_close(by_hand(found.logits, SEQ2SEQ_TARGETS), found.loss, **EXACT)
    padded = SEQ2SEQ_TARGETS.masked_fill(SEQ2SEQ_TARGETS == -100, 0)
    torch.testing.assert_close(ours(pixels(), **batch.text, labels=padded).loss, expected.loss, **EXACT)
    assert abs(peer(pixels(), **batch.text, labels=padded).loss - expected.loss) > 1e-2, "it trains on padding"


@torch.no_grad()
def test_decoder_inputs_may_be_given_with_labels() -> None:
    ours = model("t5")
    shifted = torch.tensor([[0, 15, 16, 17], [0, 18, 3, 0]])
    expected = ours(pixels(), prompt_ids(), labels=SEQ2SEQ_TARGETS)
    found = ours(pixels(), prompt_ids(), labels=SEQ2SEQ_TARGETS, decoder_input_ids=shifted)
    torch.testing.assert_close(found.loss, expected.loss, **EXACT)
    masked = ours(
        pixels(), prompt_ids(), decoder_input_ids=shifted, decoder_attention_mask=torch.tensor([[1] * 4, [1, 1, 1, 0]])
    )
    torch.testing.assert_close(masked.logits[1, :3], expected.logits[1, :3], **EXACT)


def test_labels_of_another_shape() -> None:
    ids = prompt_ids()
    with pytest.raises(ValueError, match=r"`labels` must have the shape of the tokens \(2, 10\), got \(2, 9\)"):
        model("opt")(pixels(), ids, labels=ids[:, 1:])


# -- accumulation -----------------------------------------------------------------------------------------------------


def samples(seq2seq: bool) -> list[dict[str, torch.Tensor]]:
    """Four rows whose targets have different lengths."""
    rows = []
    for index, length in enumerate((7, 3, 5, 1)):
        ids = prompt_ids(1, 8, seed=index)[0]
        targets = ids[-8:].clone() if seq2seq else ids.clone()
        targets[: len(targets) - length] = -100
        targets = targets.roll(length) if seq2seq else targets  # padding behind the text
        row = {"pixel_values": pixels(1, seed=index)[0], "input_ids": ids, "labels": targets}
        rows.append({**row, "attention_mask": torch.ones_like(ids)})
    return rows


def batches(rows: list, size: int) -> list[dict[str, torch.Tensor]]:
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{name: torch.stack([row[name] for row in group]) for name in group[0]} for group in groups]


@pytest.fixture(scope="module", params=["opt", "t5"])
def trainable(request: pytest.FixtureRequest) -> Blip2ForConditionalGeneration:
    return build(request.param, qformer_config={**QFORMER, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0})


def test_accumulation_is_exact(trainable: Blip2ForConditionalGeneration) -> None:
    """4 x 1 = 2 x 2 = 1 x 4 in loss and gradients, with the number of target tokens of the whole step."""
    rows = samples(trainable.config.is_encoder_decoder)
    items = torch.stack([row["labels"] for row in rows]).ne(-100).sum()
    whole = trainable(**batches(rows, 4)[0]).loss
    expected = gradients(trainable, lambda: trainable(**batches(rows, 4)[0]).loss)
    for size in (1, 2, 4):

        def accumulated(size: int = size) -> torch.Tensor:
            return sum(trainable(**batch, num_items_in_batch=items).loss for batch in batches(rows, size))

        torch.testing.assert_close(accumulated(), whole, **EXACT)
        assert_same_gradients(expected, gradients(trainable, accumulated))
    mean_of_means = sum(trainable(**batch).loss for batch in batches(rows, 1)) / 4
    assert abs(mean_of_means - whole) > 1e-2, "which is what is wrong without that number"


def test_accumulation_in_trainer(trainable: Blip2ForConditionalGeneration, tmp_path) -> None:
    rows = samples(trainable.config.is_encoder_decoder)
    start = {name: value.clone() for name, value in trainable.state_dict().items()}
    results = {}
    for size in (1, 2, 4):
        trainable.load_state_dict(start)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        Trainer(trainable, arguments, train_dataset=rows).train()
        results[size] = {name: value.clone() for name, value in trainable.state_dict().items()}
    trainable.load_state_dict(start)
    moved = max((results[4][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3
    for size in (1, 2):
        for name, value in results[4].items():
            torch.testing.assert_close(results[size][name], value, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_trainer_gathers_loss_and_logits_only(family: str, hidden: bool, tmp_path) -> None:
    """Caches, nested outputs and hidden states stay behind."""
    ours = build(family, output_hidden_states=hidden)
    rows = samples(ours.config.is_encoder_decoder)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(ours, arguments, eval_dataset=rows)
    whole = batches(rows, 4)[0]
    with torch.no_grad():
        outputs = ours(**whole)
    name = "decoder_hidden_states" if family == "t5" else "hidden_states"
    assert (outputs.language_model_outputs.get(name) is not None) is hidden
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == (4, whole["labels"].shape[1], VOCAB)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), outputs.logits, **EXACT)
    halves = [ours(**batch).loss.item() for batch in batches(rows, 2)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(halves) / 2, abs=1e-4)


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_output_as_a_tuple(family: str) -> None:
    ours = model(family)
    inputs = batches(samples(ours.config.is_encoder_decoder), 2)[0]
    outputs = ours(**inputs)
    as_tuple = ours(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert torch.equal(as_tuple[1], outputs.logits)
    assert len(as_tuple) == 5
    assert all(isinstance(part, tuple) for part in as_tuple[2:])
    assert torch.equal(outputs.to_tuple()[1], outputs[1])
    encoded = ours(image_embeds=ours.encode_image(inputs.pop("pixel_values")), **inputs)
    assert encoded.vision_outputs is None
    assert len(encoded.to_tuple()) == 3


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_attentions_and_hidden_states_of_every_part(family: str) -> None:
    ours = build(family)
    ours.set_attn_implementation("eager")
    inputs = batches(samples(ours.config.is_encoder_decoder), 2)[0]
    outputs = ours(**inputs, output_attentions=True, output_hidden_states=True)
    assert [len(outputs.vision_outputs[kind]) for kind in ("attentions", "hidden_states")] == [3, 4]
    assert [len(outputs.qformer_outputs[kind]) for kind in ("attentions", "hidden_states")] == [4, 5]
    language = outputs.language_model_outputs
    prefix = "decoder_" if family == "t5" else ""
    assert [len(language[f"{prefix}{kind}"]) for kind in ("attentions", "hidden_states")] == [2, 3]
    assert all(weights is not None for weights in language[f"{prefix}attentions"])
    plain = ours(**inputs)
    assert plain.vision_outputs.attentions is None
    assert plain.qformer_outputs.hidden_states is None
