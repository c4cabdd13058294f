"""What one stage-1 loss costs, in floating point operations, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from parity import counted
from tiny_models import QFORMER, QUERIES, VISION, VOCAB
from tiny_own_models import retrieval

LENGTHS = (5, 9, 3, 6)  # real tokens of each caption, [CLS] and [SEP] included
PAIRS, LONGEST, TARGETS = len(LENGTHS), max(LENGTHS), sum(LENGTHS) - len(LENGTHS)
IMAGE_TOKENS = (VISION["image_size"] // VISION["patch_size"]) ** 2 + 1
WIDTH, IMAGE_WIDTH, SHARED = QFORMER["hidden_size"], VISION["hidden_size"], 16
LAST = QFORMER["num_hidden_layers"] - 1
SEEING_LAYERS = (0, 2)  # those that attend to the image
CONTRASTIVE = {"query", "text", "similarity"}


@pytest.fixture(scope="module")
def shared_model() -> Blip2ForImageTextRetrieval:
    model = retrieval()
    with torch.no_grad():
        model.temperature.fill_(0.07)
    model.set_attn_implementation("eager")  # the counter does not see the fused kernels of the CPU
    return model


@pytest.fixture
def model(shared_model: Blip2ForImageTextRetrieval) -> Iterator[Blip2ForImageTextRetrieval]:
    names = ("itc_weight", "itm_weight", "itg_weight")
    before = {name: getattr(shared_model.config, name) for name in names}
    yield shared_model
    for name, value in before.items():
        setattr(shared_model.config, name, value)


def batch(lengths: tuple[int, ...] = LENGTHS, padding: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Features and captions with `padding` columns more than needed."""
    generator = torch.Generator().manual_seed(0)
    width = max(lengths) + padding
    places, ends = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (places < ends if side == "right" else places >= width - ends).long()
    return {
        "image_embeds": torch.randn(len(lengths), IMAGE_TOKENS, IMAGE_WIDTH, generator=generator),
        "input_ids": torch.randint(1, VOCAB - 1, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "generator": torch.Generator().manual_seed(0),
    }


def total(model: Blip2ForImageTextRetrieval, **inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs, return_loss=True)
    return counter.get_total_flops()


def by_module(model: Blip2ForImageTextRetrieval, run: Callable[[], object]) -> Callable[[str], int]:
    """FLOPs of `run()` by the module's name in the model."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()
    return lambda name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values())


def linear(rows: int, inputs: int = WIDTH, outputs: int = WIDTH) -> int:
    """A multiplication and an addition per weight and row."""
    return 2 * rows * inputs * outputs


def one_pass(
    rows: int, queries: int, text: int, cached: int = 0, computed: int | None = None, image_of: int = 0
) -> int:
    """The Q-Former on `rows` rows of `queries` + `text` positions.

    Args:
        cached: positions seen before these.
        computed: positions that the last layer computes, default all.
        image_of: images whose keys and values are projected in this pass.
    """
    positions = queries + text
    flops = 0
    for layer in range(LAST + 1):
        own = positions if computed is None or layer < LAST else computed
        flops += 2 * linear(rows * positions)  # keys and values
        flops += 2 * linear(rows * own)  # queries, output
        flops += 4 * rows * own * (cached + positions) * WIDTH  # scores and weighted sum
        flops += 2 * linear(rows * own, WIDTH, QFORMER["intermediate_size"])
        if queries and layer in SEEING_LAYERS:
            flops += 2 * linear(rows * queries) + 4 * rows * queries * IMAGE_TOKENS * WIDTH
            flops += 2 * linear(image_of * IMAGE_TOKENS, IMAGE_WIDTH)
    return flops


def expected(lengths: tuple[int, ...] = LENGTHS, full_last_layer: bool = False) -> dict[str, int]:
    """The parts of a loss by hand."""
    pairs, longest, targets = len(lengths), max(lengths), sum(lengths) - len(lengths)
    return {
        "query": one_pass(pairs, QUERIES, 0, image_of=pairs),
        "text": one_pass(pairs, 0, longest, computed=None if full_last_layer else 1),
        "similarity": linear(pairs * QUERIES, WIDTH, SHARED)
        + linear(pairs, WIDTH, SHARED)
        + linear(pairs * QUERIES, SHARED, pairs),
        "itm": one_pass(3 * pairs, QUERIES, longest, computed=None if full_last_layer else QUERIES)
        + linear(3 * pairs * QUERIES, WIDTH, 2),
        "itg": one_pass(pairs, 0, longest - 1, cached=QUERIES)
        + linear(targets, WIDTH, WIDTH)
        + linear(targets, WIDTH, VOCAB),
    }


def test_whole_loss(model: Blip2ForImageTextRetrieval) -> None:
    assert total(model, **batch()) == sum(expected().values())


def test_other_lengths(model: Blip2ForImageTextRetrieval) -> None:
    lengths = (3, 12, 4)
    assert total(model, **batch(lengths)) == sum(expected(lengths).values())


@pytest.mark.parametrize("zero", [set(), {"itg"}, {"itm"}], ids=lambda names: "-".join(names) or "none")
def test_backward_costs_twice_the_forward(model: Blip2ForImageTextRetrieval, zero: set[str]) -> None:
    """Every product has a gradient for both factors, with the images' features among them."""
    for name in zero:
        setattr(model.config, f"{name}_weight", 0.0)
    inputs = batch()
    inputs["image_embeds"].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, return_loss=True).loss.backward()
    model.zero_grad()
    assert counter.get_total_flops() == 3 * sum(flops for part, flops in expected().items() if part not in zero)


# -- (a) keys and values of the images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", SEEING_LAYERS)
@pytest.mark.parametrize("projection", ["key", "value"])
def test_image_is_projected_once(model: Blip2ForImageTextRetrieval, layer: int, projection: str) -> None:
    """Although 1 + 3 rows of each pair attend to an image."""
    name = f"qformer.encoder.layer.{layer}.crossattention.attention.{projection}"
    inputs = batch()
    with counted(model.get_submodule(name)) as calls:
        flops = by_module(model, lambda: model(**inputs, return_loss=True))
    assert len(calls) == 1
    assert flops(name) == linear(PAIRS * IMAGE_TOKENS, IMAGE_WIDTH)
    queries = flops(f"qformer.encoder.layer.{layer}.crossattention.attention.query")
    assert queries == linear((1 + 3) * PAIRS * QUERIES)


def test_projecting_again_would_be_seen(model: Blip2ForImageTextRetrieval) -> None:
    name, inputs = "qformer.encoder.layer.0.crossattention.attention.key", batch()

    def loss_and_a_pass_more() -> None:
        model(**inputs, return_loss=True)
        text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        model(image_embeds=inputs["image_embeds"], use_image_text_matching_head=True, **text)

    with counted(model.get_submodule(name)) as calls:
        flops = by_module(model, loss_and_a_pass_more)
    assert len(calls) == 2
    assert flops(name) == 2 * linear(PAIRS * IMAGE_TOKENS, IMAGE_WIDTH)


# -- (b) text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_columns_of_padding_cost_nothing(model: Blip2ForImageTextRetrieval, side: str) -> None:
    assert total(model, **batch(padding=7, side=side)) == total(model, **batch())


def test_a_longer_text_costs_more(model: Blip2ForImageTextRetrieval) -> None:
    longer = (5, 10, 3, 6)
    difference = sum(expected(longer).values()) - sum(expected().values())
    assert difference > 0
    assert total(model, **batch(longer)) - total(model, **batch()) == difference


# -- (c) the last layer ------------------------------------------------------------------------------------------------


def test_last_layer_computes_what_is_read(model: Blip2ForImageTextRetrieval) -> None:
    """Of the text pass [CLS], of the matching pass the queries; it sees all positions."""
    inputs = batch()
    flops = by_module(model, lambda: model(**inputs, return_loss=True))
    queries = (1 + 3) * PAIRS * QUERIES
    generated = PAIRS * (LONGEST - 1)
    text_rows = {LAST - 1: (1 + 3) * PAIRS * LONGEST + generated, LAST: PAIRS * 1 + generated}
    for layer, text in text_rows.items():  # the layer before is the negative control
        prefix = f"qformer.encoder.layer.{layer}."
        assert flops(f"{prefix}attention.attention.query") == linear(queries + text)
        assert flops(f"{prefix}attention.output.dense") == linear(queries + text)
        assert flops(f"{prefix}attention.attention.key") == linear(queries + text_rows[LAST - 1])
        assert flops(f"{prefix}intermediate.dense") == linear(text, WIDTH, QFORMER["intermediate_size"])
        assert flops(f"{prefix}intermediate_query.dense") == linear(queries, WIDTH, QFORMER["intermediate_size"])


def test_saving_of_the_last_layer(model: Blip2ForImageTextRetrieval) -> None:
    """All but one position of the text pass, and the text of the matching pass: query, output, feed-forward, scores."""
    skipped = {LONGEST: PAIRS * (LONGEST - 1), QUERIES + LONGEST: 3 * PAIRS * LONGEST}  # by what each would see
    saving = sum(
        2 * linear(rows) + 2 * linear(rows, WIDTH, QFORMER["intermediate_size"]) + 4 * rows * seen * WIDTH
        for seen, rows in skipped.items()
    )
    assert sum(expected(full_last_layer=True).values()) - total(model, **batch()) == saving


# -- (d) weights of 0 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "parts"),
    [
        ({"itg"}, {*CONTRASTIVE, "itm"}),
        ({"itm"}, {*CONTRASTIVE, "itg"}),
        ({"itm", "itg"}, CONTRASTIVE),
        ({"itc"}, {*CONTRASTIVE, "itm", "itg"}),  # the hard negatives are drawn by the contrastive logits
        ({"itc", "itm"}, {"query", "itg"}),
    ],
    ids=lambda names: "-".join(sorted(names)),
)
def test_a_loss_of_weight_0_costs_nothing(model: Blip2ForImageTextRetrieval, zero: set[str], parts: set[str]) -> None:
    for name in zero:
        setattr(model.config, f"{name}_weight", 0.0)
    assert total(model, **batch()) == sum(flops for part, flops in expected().items() if part in parts)


def test_given_negatives_need_no_contrastive_logits(model: Blip2ForImageTextRetrieval) -> None:
    model.config.itc_weight = 0.0
    given = {f"negative_{kind}_indices": torch.arange(PAIRS).roll(1) for kind in ("image", "text")}
    inputs = {name: value for name, value in batch().items() if name != "generator"}
    assert total(model, **inputs, **given) == sum(expected()[part] for part in ("query", "itm", "itg"))


def test_a_small_weight_costs_all(model: Blip2ForImageTextRetrieval) -> None:
    model.config.itc_weight = model.config.itm_weight = model.config.itg_weight = 1e-6
    assert total(model, **batch()) == sum(expected().values())


# -- (e) the language-modelling head -----------------------------------------------------------------------------------


def test_head_runs_on_real_targets(model: Blip2ForImageTextRetrieval) -> None:
    """Each real token but the first of its caption."""
    one_more = (6, 9, 3, 6)  # not the longest: only the head has more to do
    for lengths, targets in ((LENGTHS, TARGETS), (one_more, TARGETS + 1)):
        inputs = batch(lengths, padding=4)
        flops = by_module(model, lambda inputs=inputs: model(**inputs, return_loss=True))
        assert flops("lm_head.decoder") == linear(targets, WIDTH, VOCAB)
        assert flops("lm_head.dense") == linear(targets)
    assert total(model, **batch(one_more)) - total(model, **batch()) == linear(1) + linear(1, WIDTH, VOCAB)
