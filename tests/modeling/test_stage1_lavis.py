"""One step of representation learning against the original code: losses, gradients, negatives (fixtures/README.md).

The original's negatives are given to ours, and ITC's gradient is compared with `itc_gather_gradients=False`: the
original stops it at the gathered side. Gradients are compared per tensor, by the norm of the difference relative to the
norm of the original's, less the rounding of float32.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from blip2_hf import losses
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.outputs import Blip2ImageTextMatchingModelOutput
from conversion.lavis import to_ours
from lavis_names import fixture, model_with_original_weights
from parity import EXACT

CASES = ("", "_image_id", "_forced_neg")
# Ours and the original's name of each loss.
LOSSES = {"loss_itc": "itc", "loss_itm": "itm", "loss_itg": "lm", "loss": "total"}
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Norm of what float32 leaves of a sum that cancels; a loss's gradients of all other tensors have norms from 0.009 up.
# Of a bias of the keys, which cancels in the softmax, nothing else is left; and with given negatives the terms
# of `itm_head.bias` sum to 0.0004, where the original is 1.3e-4 relative from the gradient in float64, ours 4e-5.
ROUNDING = 3e-7

Gradients = dict[str, torch.Tensor]


def original(case: str, name: str) -> torch.Tensor:
    """`out_CASE/NAME` of the fixture; what does not depend on the case is stored once."""
    plain, more = fixture("stage1_tiny"), fixture("stage1_losses")
    return more.get(f"out{case}/{name}", plain[f"out/{name}"])


def original_gradients(case: str, loss: str) -> Gradients:
    """By our names. The fixture has no separate gradients with given negatives, and those of `lm` only once."""
    case = "" if loss == "lm" else case
    prefix = f"grads{case}/" if case == "_forced_neg" else f"grads{case}/{loss}/"
    stored = fixture("stage1_losses")
    found = to_ours({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    assert found
    return found


def inputs(case: str) -> dict[str, torch.Tensor]:
    stage1 = fixture("stage1_tiny")
    batch = {"pixel_values": stage1["image"], **{k: stage1[k] for k in ("input_ids", "attention_mask")}}
    batch["negative_image_indices"] = original(case, "neg_image_idx")
    batch["negative_text_indices"] = original(case, "neg_text_idx")
    if case == "_image_id":
        batch["image_ids"] = fixture("stage1_losses")["image_id"]
    return batch


def original_model(**overrides: object) -> Blip2ForImageTextRetrieval:
    model = model_with_original_weights(**{"itc_gather_gradients": False, **overrides})
    model.freeze_vision()
    return model


def gradients(model: Blip2ForImageTextRetrieval, loss: torch.Tensor) -> Gradients:
    """Of all that is trained; zeros where the loss does not reach."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


def loss_error(outputs: Blip2ImageTextMatchingModelOutput, case: str, name: str) -> float:
    expected = original(case, "loss" if name == "loss" else f"loss_{LOSSES[name]}")
    return ((outputs[name] - expected).abs() / expected.abs()).item()


def gradient_errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Relative error of each tensor; a tensor that the original's loss does not reach counts as zeros."""
    assert expected.keys() <= found.keys()
    errors = {}
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        difference = max((gradient - wanted).norm().item() - ROUNDING, 0.0)
        errors[name] = difference / max(wanted.norm().item(), 1e-12)
    return errors


def cosine(found: Gradients, expected: Gradients) -> float:
    one, other = (torch.cat([g[name].flatten() for name in sorted(expected)]) for g in (found, expected))
    return torch.cosine_similarity(one, other, dim=0).item()


@cache
def step(case: str) -> tuple[Blip2ForImageTextRetrieval, Blip2ImageTextMatchingModelOutput]:
    model = original_model()
    return model, model(**inputs(case), return_loss=True)


# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_losses(case: str, name: str) -> None:
    _, outputs = step(case)
    assert loss_error(outputs, case, name) < LOSS_TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["", "_image_id"])
def test_gradients(case: str, name: str) -> None:
    model, outputs = step(case)
    expected = original_gradients(case, LOSSES[name])
    errors = gradient_errors(gradients(model, outputs[name]), expected)
    assert max(errors.values()) < GRADIENT_TOLERANCE, max(errors, key=errors.get)
    compared = [key for key, gradient in expected.items() if gradient.norm() > 1000 * ROUNDING]
    assert len(compared) >= 100  # of 127 trained tensors each loss reaches most


def test_total_gradient_with_given_negatives() -> None:
    model, outputs = step("_forced_neg")
    errors = gradient_errors(gradients(model, outputs.loss), original_gradients("_forced_neg", "total"))
    assert max(errors.values()) < GRADIENT_TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize("case", ["", "_image_id"])
def test_gradients_in_chunks(case: str) -> None:
    """The gradient of the whole batch although activations are kept of four pairs at a time."""
    model = original_model()
    outputs = model(**inputs(case), return_loss=True, chunk_size=4)
    for name in LOSSES:
        assert loss_error(outputs, case, name) < LOSS_TOLERANCE
        errors = gradient_errors(gradients(model, outputs[name]), original_gradients(case, LOSSES[name]))
        assert max(errors.values()) < GRADIENT_TOLERANCE, (name, max(errors, key=errors.get))


def test_padding_on_the_other_side() -> None:
    model, batch = original_model(), inputs("")
    rows = torch.stack([batch["input_ids"], batch["attention_mask"]], dim=-1)
    left = torch.stack([row.roll(16 - int(row[:, 1].sum()), dims=0) for row in rows])
    batch["input_ids"], batch["attention_mask"] = left.unbind(-1)
    assert not batch["attention_mask"][:5, 0].any()
    outputs = model(**batch, return_loss=True)
    errors = gradient_errors(gradients(model, outputs.loss), original_gradients("", "total"))
    assert max(errors.values()) < GRADIENT_TOLERANCE
    assert loss_error(outputs, "", "loss") < LOSS_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_logits_and_features(case: str) -> None:
    _, outputs = step(case)
    torch.testing.assert_close(outputs.image_embeds, original(case, "image_feats"), **EXACT)
    torch.testing.assert_close(outputs.text_embeds, original(case, "text_feat"), **EXACT)
    torch.testing.assert_close(outputs.itm_logits, original(case, "itm_logits"), **EXACT)
    assert outputs.itm_labels.tolist() == [1] * 6 + [0] * 12
    cosines = original(case, "image_feats") @ original(case, "text_feat").t()
    torch.testing.assert_close(outputs.logits_per_image, cosines.amax(dim=1), **EXACT)
    torch.testing.assert_close(outputs.logits_per_text, cosines.amax(dim=1).t(), **EXACT)


@torch.no_grad()
def test_language_modelling_logits() -> None:
    """The head on the original's hidden states, and the whole path, which computes the rows that are read."""
    model, texts = original_model(), fixture("stage1_tiny")
    hidden, expected = original("", "lm_last_hidden_state"), original("", "lm_logits")
    torch.testing.assert_close(model.lm_head(hidden), expected, **EXACT)
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(**inputs(""), return_loss=True)
    handle.remove()
    before_a_target = texts["attention_mask"][:, 1:].bool()
    torch.testing.assert_close(seen[0], expected[:, :-1][before_a_target], **EXACT)


@pytest.mark.parametrize("case", ["", "_image_id"])
@torch.no_grad()
def test_probabilities_of_negatives(case: str) -> None:
    model, outputs = step(case)
    for logits, name, drawn in (
        (outputs.logits_per_image, "weights_i2t", "neg_text_idx"),
        (outputs.logits_per_text, "weights_t2i", "neg_image_idx"),
    ):
        found = losses.hard_negative_probabilities(logits / model.temperature, outputs.positives)
        torch.testing.assert_close(found, original(case, name), **EXACT)
        assert torch.equal(found.argmax(dim=1), original(case, drawn))  # the original drew the most likely ones
        assert not found[outputs.positives].any()


@torch.no_grad()
def test_positives_are_those_of_the_image_ids() -> None:
    image_ids = fixture("stage1_losses")["image_id"]
    assert torch.equal(step("_image_id")[1].positives, image_ids[:, None] == image_ids[None])
    assert torch.equal(step("")[1].positives, torch.eye(6, dtype=torch.bool))


# -- the true gradient of the contrastive loss -------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["", "_image_id"])
def test_gathered_gradient_is_that_of_the_formula(case: str) -> None:
    """With `itc_gather_gradients=True`: autograd of the loss written down plainly; not what the original has."""
    model, batch = original_model(itc_gather_gradients=True), inputs(case)
    ours = gradients(model, model(**batch, return_loss=True).loss_itc)

    images = model.get_image_features(batch["pixel_values"])
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    logits = torch.stack([(image @ texts.t()).max(dim=0).values for image in images]) / model.temperature
    ids = batch.get("image_ids", torch.arange(6))
    target = (ids[:, None] == ids[None]).float()
    target = 0.9 * target / target.sum(dim=1, keepdim=True) + 0.1 / 6
    loss = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    loss = (loss - (target * logits.t().log_softmax(dim=1)).sum(dim=1).mean()) / 2
    assert abs(loss - original(case, "loss_itc")) < 1e-4
    expected = gradients(model, loss)
    assert max(gradient_errors(ours, expected).values()) < GRADIENT_TOLERANCE

    detached = original_gradients(case, "itc")
    assert cosine(ours, detached) == pytest.approx(0.85, abs=0.01)
    assert gradient_errors(ours, detached)["vision_projection.weight"] > 1
    assert gradient_errors(ours, detached)["temperature"] < GRADIENT_TOLERANCE  # reads both sides' values only


def test_other_losses_do_not_depend_on_the_setting() -> None:
    model = original_model(itc_gather_gradients=True)
    outputs = model(**inputs(""), return_loss=True)
    for name in ("loss_itm", "loss_itg"):
        errors = gradient_errors(gradients(model, outputs[name]), original_gradients("", LOSSES[name]))
        assert max(errors.values()) < GRADIENT_TOLERANCE


# -- several processes of the original, as far as one can check it -----------------------------------------------------


def test_language_modelling_is_averaged_over_all_tokens() -> None:
    """Two processes of the original average their means; ours is the mean over all tokens, as its one process has it.

    Its losses for 4 + 4 captions of unequal lengths: 5.240933 over 32 tokens and 5.483579 over 20; on one process
    5.334259.
    """
    over_all_tokens = (32 * 5.240932941436768 + 20 * 5.483579158782959) / 52
    assert over_all_tokens == pytest.approx(5.334258556365967, rel=1e-6)
    model, batch = original_model(itc_weight=0.0, itm_weight=0.0), inputs("")
    del batch["negative_image_indices"], batch["negative_text_indices"]
    tokens = batch["attention_mask"][:, 1:].sum(dim=1)
    whole = original("", "loss_lm")
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(3), slice(3, 6))]
    parts = [model(**half, return_loss=True, num_items_in_batch=int(tokens.sum())).loss_itg for half in halves]
    torch.testing.assert_close(sum(parts), whole, rtol=LOSS_TOLERANCE, atol=0)
    means = [model(**half, return_loss=True).loss_itg for half in halves]
    assert abs(sum(means) / 2 / whole - 1) > 1e-4  # what two processes of the original would have
    weighted = sum(m * t for m, t in zip(means, (tokens[:3].sum(), tokens[3:].sum()), strict=True)) / tokens.sum()
    torch.testing.assert_close(weighted, whole, rtol=LOSS_TOLERANCE, atol=0)


@torch.no_grad()
def test_contrastive_loss_is_the_mean_of_what_the_processes_have() -> None:
    model, outputs = step("_image_id")
    total = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        for logits in (outputs.logits_per_image, outputs.logits_per_text):
            total += losses.contrastive_loss(logits[rows] / model.temperature, outputs.positives[rows], 0.1) / 3 / 2
    torch.testing.assert_close(total / 2, original("_image_id", "loss_itc"), rtol=LOSS_TOLERANCE, atol=0)


# -- negative controls -------------------------------------------------------------------------------------------------


def swapped_layers(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    layers = model.qformer.encoder.layer
    layers[0], layers[2] = layers[2], layers[0]


def swapped_feed_forward(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    layer = model.qformer.encoder.layer[1]
    layer.intermediate, layer.intermediate_query = layer.intermediate_query, layer.intermediate


def shifted_mask(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    mask = batch["attention_mask"]
    batch["attention_mask"] = nn.functional.pad(mask[:, 1:], [0, 1])


def wrong_temperature(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    with torch.no_grad():
        model.temperature.mul_(1.01)


def other_negatives(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    batch["negative_text_indices"] = original("_forced_neg", "neg_text_idx")


def no_smoothing(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    model.config.label_smoothing = 0.0


def other_start(model: Blip2ForImageTextRetrieval, batch: dict) -> None:
    model.config.qformer_config.bos_token_id = 2  # [CLS]


@pytest.mark.parametrize(
    ("break_it", "noticed"),
    [
        (swapped_layers, {"loss_itc", "loss_itm", "loss_itg"}),
        (swapped_feed_forward, {"loss_itc", "loss_itm", "loss_itg"}),
        (shifted_mask, {"loss_itc", "loss_itm", "loss_itg"}),
        (wrong_temperature, {"loss_itc"}),
        (other_negatives, {"loss_itm"}),
        (no_smoothing, {"loss_itc", "loss_itg"}),
        (other_start, {"loss_itg"}),
    ],
)
def test_one_fault_is_noticed(break_it, noticed) -> None:
    """By the losses and by the gradients, of just the objectives that it concerns."""
    model, batch = original_model(), inputs("")
    break_it(model, batch)
    outputs = model(**batch, return_loss=True)
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        worst = max(gradient_errors(gradients(model, outputs[name]), original_gradients("", LOSSES[name])).values())
        assert (loss_error(outputs, "", name) > 3 * LOSS_TOLERANCE) == (name in noticed), name
        assert (worst > 10 * GRADIENT_TOLERANCE) == (name in noticed), name
    assert loss_error(outputs, "", "loss") > LOSS_TOLERANCE
