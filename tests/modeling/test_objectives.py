"""Representation learning on one process: what the losses are made of, what may be left out, and bad input."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from blip2_hf import losses
from blip2_hf.modeling import objectives
from blip2_hf.modeling.masks import generation_mask
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from parity import EXACT, assert_same_gradients, enable_checkpointing, gradients, without_dropout
from tiny_models import QUERIES, VISION, VOCAB, pixels, randomised
from tiny_own_models import CLIP, retrieval, retrieval_config

PAIRS, LENGTH = 4, 7
IMAGES = pixels(PAIRS)
IDS = torch.randint(4, VOCAB - 1, (PAIRS, LENGTH), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * n + [0] * (LENGTH - n) for n in (6, 3, 5, 4)])
NEGATIVES = {"negative_image_indices": torch.tensor([1, 2, 3, 0]), "negative_text_indices": torch.tensor([3, 0, 1, 2])}


def model_with(**fields) -> Blip2ForImageTextRetrieval:
    config = retrieval_config()
    for name, value in fields.items():
        setattr(config, name, value)
    model = randomised(Blip2ForImageTextRetrieval(config))
    with torch.no_grad():
        model.temperature.fill_(0.07)
    return model


@pytest.fixture(scope="module")
def model() -> Blip2ForImageTextRetrieval:
    return model_with()


def learn(model: Blip2ForImageTextRetrieval, **options):
    return model(IMAGES, IDS, MASK, return_loss=True, **{**NEGATIVES, **options})


def plain_losses(model: Blip2ForImageTextRetrieval) -> dict[str, torch.Tensor]:
    """The three losses by the public scoring methods, one pair at a time where that is plainest."""
    features = model.vision_model(IMAGES).last_hidden_state
    cosines = model(IMAGES, IDS, MASK).logits_per_image / model.temperature
    target = torch.arange(PAIRS)
    itc = nn.functional.cross_entropy(cosines, target, label_smoothing=0.1)
    itc = (itc + nn.functional.cross_entropy(cosines.t(), target, label_smoothing=0.1)) / 2
    rows = []
    kinds = (
        (target, target),
        (NEGATIVES["negative_image_indices"], target),
        (target, NEGATIVES["negative_text_indices"]),
    )
    for images, texts in kinds:
        for image, text in zip(images.tolist(), texts.tolist(), strict=True):
            ids = IDS[text : text + 1, : int(MASK[text].sum())]
            one = features[image : image + 1]
            rows.append(model(image_embeds=one, input_ids=ids, use_image_text_matching_head=True).logits_per_image)
    itm = nn.functional.cross_entropy(torch.cat(rows), torch.tensor([1] * PAIRS + [0] * 2 * PAIRS))
    logits, targets = [], []
    for row in range(PAIRS):
        ids = IDS[row : row + 1, : int(MASK[row].sum())].clone()
        ids[:, 0] = model.config.qformer_config.decoder_start_token_id
        hidden = model.qformer(
            model.embeddings(ids, query_embeds=model.query_tokens),
            query_length=QUERIES,
            attention_mask=generation_mask(QUERIES, torch.ones_like(ids)),
            encoder_hidden_states=features[row : row + 1],
        ).last_hidden_state[:, QUERIES:]
        logits.append(model.lm_head(hidden)[0, :-1])
        targets.append(ids[0, 1:])
    itg = nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets), label_smoothing=0.1)
    return {"loss_itc": itc, "loss_itm": itm, "loss_itg": itg}


def test_losses_and_gradients_are_those_of_the_plain_formulas(model) -> None:
    found, expected = learn(model), plain_losses(model)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, **EXACT)
    torch.testing.assert_close(found.loss, sum(expected.values()), **EXACT)
    for name in expected:
        ours = gradients(model, lambda name=name: getattr(learn(model), name))
        plain = gradients(model, lambda name=name: plain_losses(model)[name])
        silent = {key for key, gradient in plain.items() if gradient.abs().max() < 1e-6}
        assert_same_gradients(
            {k: v for k, v in plain.items() if k not in silent}, {k: ours[k] for k in plain if k not in silent}
        )


def test_other_outputs(model) -> None:
    found = learn(model)
    torch.testing.assert_close(found.logits_per_image, model(IMAGES, IDS, MASK).logits_per_image, **EXACT)
    torch.testing.assert_close(found.logits_per_text, found.logits_per_image.t(), **EXACT)
    torch.testing.assert_close(found.image_embeds, model.get_image_features(IMAGES), **EXACT)
    torch.testing.assert_close(found.text_embeds, model.get_text_features(IDS, MASK), **EXACT)
    assert torch.equal(found.positives, torch.eye(PAIRS, dtype=torch.bool))
    encoded = model.encode_image(IMAGES)
    expected = [model.match(encoded, IDS, MASK)]
    expected.append(model.match(encoded[NEGATIVES["negative_image_indices"]], IDS, MASK))
    texts = NEGATIVES["negative_text_indices"]
    expected.append(model.match(encoded, IDS[texts], MASK[texts]))
    torch.testing.assert_close(found.itm_logits, torch.cat(expected), **EXACT)
    assert found.itm_labels.tolist() == [1] * PAIRS + [0] * 2 * PAIRS
    assert isinstance(model(IMAGES, IDS, MASK, return_loss=True, return_dict=False), tuple)


@pytest.mark.parametrize("source", ["image_embeds", "vision_features", "encoded"])
def test_every_kind_of_image_input(model, source: str) -> None:
    expected = learn(model).loss
    images = {
        "image_embeds": lambda: {"image_embeds": model.vision_model(IMAGES).last_hidden_state},
        "vision_features": lambda: {"vision_features": model.vision_model.backbone(IMAGES).last_hidden_state},
        "encoded": lambda: {"image_embeds": model.encode_image(IMAGES)},
    }[source]()
    found = model(**images, input_ids=IDS, attention_mask=MASK, return_loss=True, **NEGATIVES).loss
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("extra", [0, 3])
def test_padding_anywhere_changes_nothing(model, extra: int) -> None:
    """Columns of padding, on the left or the right, with any ids below them."""
    expected = learn(model).loss
    wide, mask = (nn.functional.pad(part, [extra, 5], value=value) for part, value in ((IDS, 9), (MASK, 0)))
    found = model(IMAGES, wide, mask, return_loss=True, **NEGATIVES).loss
    torch.testing.assert_close(found, expected, **EXACT)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights(model) -> None:
    weighted = learn(model_with(itc_weight=0.5, itm_weight=2.0, itg_weight=3.0))
    plain = learn(model)
    torch.testing.assert_close(weighted.loss, 0.5 * plain.loss_itc + 2 * plain.loss_itm + 3 * plain.loss_itg, **EXACT)
    torch.testing.assert_close(weighted.loss_itm, plain.loss_itm, **EXACT)


@pytest.mark.parametrize("name", ["itc", "itm", "itg"])
def test_a_weight_of_zero(model, name: str) -> None:
    without = learn(model_with(**{f"{name}_weight": 0.0}))
    assert getattr(without, f"loss_{name}") is None
    others = [f"loss_{other}" for other in ("itc", "itm", "itg") if other != name]
    torch.testing.assert_close(without.loss, sum(getattr(learn(model), other) for other in others), **EXACT)


def test_contrast_without_its_loss_has_no_gradient() -> None:
    """Hard negatives are still drawn by similarity, but nothing of it is kept for the backward pass."""
    model = model_with(itc_weight=0.0)
    found = model(IMAGES, IDS, MASK, return_loss=True)
    assert found.logits_per_image is not None and not found.logits_per_image.requires_grad
    assert learn(model).logits_per_image is None  # given negatives need none
    grads = gradients(model, lambda: model(IMAGES, IDS, MASK, return_loss=True).loss)
    assert not any(key.startswith(("vision_projection", "text_projection", "temperature")) for key in grads)


def test_all_weights_zero() -> None:
    with pytest.raises(ValueError, match="needs a weight that is not 0"):
        learn(model_with(itc_weight=0.0, itm_weight=0.0, itg_weight=0.0))


# -- negatives --------------------------------------------------------------------------------------------------------


def test_drawn_negatives_are_reproducible(model) -> None:
    def draw(seed: int) -> torch.Tensor:
        return model(IMAGES, IDS, MASK, return_loss=True, generator=torch.Generator().manual_seed(seed)).itm_logits

    assert torch.equal(draw(0), draw(0))
    assert len({tuple(draw(seed).flatten().tolist()) for seed in range(8)}) > 1
    torch.manual_seed(5)
    first = model(IMAGES, IDS, MASK, return_loss=True).loss
    torch.manual_seed(5)
    assert torch.equal(model(IMAGES, IDS, MASK, return_loss=True).loss, first)


def test_drawn_negatives_go_by_similarity(model) -> None:
    """The negatives that were used are found again by their logits; over many draws, as often as they should."""
    cosines = model(IMAGES, IDS, MASK).logits_per_image / model.temperature
    expected = losses.hard_negative_probabilities(cosines, torch.eye(PAIRS, dtype=torch.bool))
    with torch.no_grad():
        matrix = model.match_matrix(model.encode_image(IMAGES), IDS, MASK)
        encoded = model.encode_image(IMAGES)
        counts = torch.zeros(PAIRS, PAIRS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            logits = model(
                image_embeds=encoded, input_ids=IDS, attention_mask=MASK, return_loss=True, generator=generator
            )
            texts = logits.itm_logits[2 * PAIRS :]
            chosen = (matrix - texts[:, None]).abs().sum(dim=-1).argmin(dim=1)
            counts[torch.arange(PAIRS), chosen] += 1
    assert not counts.diagonal().any()
    torch.testing.assert_close(counts / 120, expected, atol=0.15, rtol=0)


def test_shared_ids_are_no_negatives(model) -> None:
    ids = torch.tensor([7, 7, 8, 7])
    found = model(IMAGES, IDS, MASK, return_loss=True, image_ids=ids)
    assert torch.equal(found.positives, ids[:, None] == ids[None])
    with pytest.raises(ValueError, match="`negative_image_indices` must name pairs that do not match"):
        learn(model, image_ids=ids)


@pytest.mark.parametrize("case", ["one pair", "one image"])
def test_without_any_negative(model, case: str, caplog, monkeypatch) -> None:
    """ITM is trained on the true pairs alone, and says so once."""
    monkeypatch.setattr(objectives.logger, "warning_once", objectives.logger.warning)
    monkeypatch.setattr(objectives.logger, "propagate", True)
    rows = 1 if case == "one pair" else PAIRS
    ids = None if case == "one pair" else torch.full((PAIRS,), 3)
    found = model(IMAGES[:rows], IDS[:rows], MASK[:rows], return_loss=True, image_ids=ids)
    expected = model.match(model.encode_image(IMAGES[:rows]), IDS[:rows], MASK[:rows])
    torch.testing.assert_close(found.itm_logits, expected, **EXACT)
    torch.testing.assert_close(
        found.loss_itm, nn.functional.cross_entropy(expected, torch.ones(rows, dtype=torch.long)), **EXACT
    )
    assert found.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, lambda: found.loss).values())
    assert "has no negatives" in caplog.text


# -- precision, checkpointing, accumulation ---------------------------------------------------------------------------


def test_autocast(model) -> None:
    expected = learn(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learn(model)
    assert found.loss.dtype == torch.float32
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=0.05, rtol=0.05)


def test_frozen_tower_in_half_precision() -> None:
    model = model_with()
    expected = learn(model).loss
    model.freeze_vision()
    model.vision_model.to(torch.bfloat16)
    model.vision_model.post_layernorm.float()
    found = learn(model)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected, atol=0.1, rtol=0.02)
    grads = gradients(model, lambda: learn(model).loss)
    assert {key for key in grads if key.startswith("vision_model.")} == {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    }
    assert all(gradient.dtype == torch.float32 for gradient in grads.values())


@pytest.mark.parametrize("tower", [VISION, CLIP], ids=["eva", "clip"])
def test_gradient_checkpointing(tower: dict) -> None:
    model = without_dropout(retrieval(tower))
    expected = gradients(model, lambda: learn(model).loss)
    enable_checkpointing(model, use_reentrant=False)
    assert_same_gradients(expected, gradients(model, lambda: learn(model).loss))


def test_sums_over_accumulated_batches() -> None:
    """ITM and ITG of two micro-batches add up to those of the whole; ITC has the negatives of its micro-batch."""
    model = model_with(itc_weight=0.0)
    tokens = (MASK.sum(dim=1) - 1).sum()
    swap = torch.tensor([1, 0])
    within = {f"negative_{kind}_indices": torch.tensor([1, 0, 3, 2]) for kind in ("image", "text")}
    whole = gradients(model, lambda: model(IMAGES, IDS, MASK, return_loss=True, **within).loss)
    halves = [slice(0, 2), slice(2, 4)]

    def accumulated() -> torch.Tensor:
        return sum(
            model(
                IMAGES[half],
                IDS[half],
                MASK[half],
                return_loss=True,
                negative_image_indices=swap,
                negative_text_indices=swap,
                num_pairs_in_batch=PAIRS,
                num_items_in_batch=tokens,
            ).loss
            for half in halves
        )

    found = gradients(model, accumulated)
    silent = {key for key, gradient in whole.items() if gradient.abs().max() < 1e-6}
    assert_same_gradients(
        {k: v for k, v in whole.items() if k not in silent}, {k: found[k] for k in whole if k not in silent}
    )


def test_temperature_below_the_floor_can_come_back() -> None:
    model = model_with(temperature_floor=0.05)
    with torch.no_grad():
        model.temperature.fill_(-1.0)
    found = learn(model)
    reference = model_with()
    with torch.no_grad():
        reference.temperature.fill_(0.05)
    torch.testing.assert_close(found.loss_itc, learn(reference).loss_itc, **EXACT)
    assert gradients(model, lambda: learn(model).loss_itc)["temperature"].abs() > 0


# -- bad input --------------------------------------------------------------------------------------------------------


def nan_images() -> torch.Tensor:
    broken = IMAGES.clone()
    broken[1, 0, 0, 0] = float("nan")
    return broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": None}, "`input_ids` must be given, got None"),
        ({"pixel_values": IMAGES[:3]}, "got `pixel_values` (3, 3, 28, 28) and `input_ids` of 4 rows"),
        ({"pixel_values": nan_images()}, "`pixel_values` (4, 3, 28, 28) has values that are not finite"),
        ({"pixel_values": None}, "exactly one of pixel_values, image_embeds, vision_features must be given, got none"),
        ({"attention_mask": MASK[:, :-1]}, "`attention_mask` must have the shape of `input_ids` (4, 7), got (4, 6)"),
        ({"attention_mask": MASK * (torch.arange(4) != 2)[:, None]}, "rows [2] are empty texts with [0]"),
        ({"attention_mask": MASK * (torch.arange(LENGTH) < 2)}, "rows [0, 1, 2, 3] are empty texts with [2, 2, 2, 2]"),
        ({"input_ids": IDS.clone().fill_(VOCAB)}, f"`input_ids` must be in 0 … {VOCAB - 1}, got"),
        ({"input_ids": IDS - 1000}, "`input_ids` must be in 0 …"),
        ({"input_ids": IDS.repeat(1, 10), "attention_mask": None}, "`input_ids` has 70 tokens, the Q-Former takes"),
        ({"image_ids": torch.arange(3)}, "`image_ids` must be integers of shape [4], one per pair, got torch.int64 of"),
        ({"image_ids": torch.zeros(4, 1).long()}, "shape (4, 1)"),
        (
            {"attention_mask": None, "input_ids": IDS * MASK},
            "`attention_mask` must be 0 where `input_ids` have padding",
        ),
        (
            {"pixel_values": IMAGES.byte()},
            "`pixel_values` must be floating-point numbers (normalised), got torch.uint8",
        ),
        ({"pixel_values": IMAGES.tolist()}, "`pixel_values` must be a tensor, got list"),
        ({"image_ids": [0, 1, 2, 3]}, "`image_ids` must be a tensor of integers of shape [4], got list"),
        ({"image_ids": torch.zeros(4).bool()}, "got torch.bool of shape (4,)"),
        ({"num_pairs_in_batch": 0}, "`num_pairs_in_batch` must be a positive number or a tensor of one, got 0"),
        ({"num_items_in_batch": torch.ones(2)}, "`num_items_in_batch` must be a positive number or a tensor of one"),
        ({"chunk_size": True}, "`chunk_size` must be a positive integer or None, got True"),
        ({"image_ids": torch.rand(4)}, "got torch.float32 of shape (4,)"),
        ({"negative_image_indices": torch.arange(3)}, "`negative_image_indices` must be integers of shape [4]"),
        ({"negative_text_indices": torch.tensor([1, 2, 3, 4])}, "`negative_text_indices` must be in 0 … 3"),
        ({"negative_text_indices": torch.tensor([1, 1, 3, 0])}, "`negative_text_indices` must name pairs that do not"),
        ({"chunk_size": 0}, "`chunk_size` must be a positive integer or None, got 0"),
        ({"use_image_text_matching_head": True}, "`return_loss=True` cannot be combined"),
        ({"output_attentions": True}, "`return_loss=True` cannot be combined"),
    ],
)
def test_errors(model, options: dict, message: str) -> None:
    arguments = {"pixel_values": IMAGES, "input_ids": IDS, "attention_mask": MASK, **NEGATIVES, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        model(return_loss=True, **arguments)


@pytest.mark.parametrize("name", ["image_ids", "negative_image_indices", "num_items_in_batch", "generator"])
def test_what_only_the_loss_takes(model, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` can only be given with `return_loss=True`"):
        model(IMAGES, IDS, MASK, **{name: torch.arange(PAIRS)})


def test_ids_of_any_integer_type(model) -> None:
    found = model(IMAGES, IDS.int(), MASK.bool(), return_loss=True, **NEGATIVES)
    torch.testing.assert_close(found.loss, learn(model).loss, **EXACT)


def test_encoded_images_must_fit(model) -> None:
    encoded = model.encode_image(IMAGES)
    with pytest.raises(ValueError, match="one text per image, got 3 and 4"):
        model(image_embeds=encoded[:3], input_ids=IDS, attention_mask=MASK, return_loss=True)
    with pytest.raises(ValueError, match="`chunk_size` needs images that are not encoded yet"):
        model(image_embeds=encoded, input_ids=IDS, attention_mask=MASK, return_loss=True, chunk_size=2)
