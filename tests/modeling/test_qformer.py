"""The Q-Former against `transformers`' class of the same name."""

from __future__ import annotations

import pytest
import torch
import transformers

from blip2_hf.configuration import Blip2QFormerConfig
from blip2_hf.modeling.masks import contrastive_mask, generation_mask, matching_mask
from blip2_hf.modeling.qformer import Blip2QFormerModel, Blip2TextEmbeddings
from parity import EXACT, assert_same_gradients, changed, counted, enable_checkpointing, gradients, without_dropout
from tiny_models import QFORMER, randomised

ROWS, QUERIES, TEXT, TOKENS = 3, 4, 5, 6
WIDTH, IMAGE_WIDTH = QFORMER["hidden_size"], 32
PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
IMAGE_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])


def pair(**fields: object) -> tuple[Blip2QFormerModel, transformers.Blip2QFormerModel]:
    """Our Q-Former and `transformers`', with the same random weights."""
    shape = {**QFORMER, "encoder_hidden_size": IMAGE_WIDTH, "use_qformer_text_input": True, **fields}
    peer = randomised(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**shape)))
    ours = Blip2QFormerModel(Blip2QFormerConfig(**shape)).eval()
    ours.load_state_dict(peer.state_dict())  # strict: the same keys and shapes
    return ours, peer


@pytest.fixture(scope="module")
def models() -> tuple[Blip2QFormerModel, transformers.Blip2QFormerModel]:
    return pair()


@pytest.fixture(scope="module")
def model(models: tuple) -> Blip2QFormerModel:
    return models[0]


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = noise(ROWS, TOKENS, IMAGE_WIDTH)
STATES = noise(ROWS, QUERIES + TEXT, WIDTH, seed=4)  # queries, then text
FULL_MASK = torch.cat([torch.ones(ROWS, QUERIES, dtype=torch.long), PADDED], dim=1)

CASES = {
    "queries": {"query_embeds": STATES[:, :QUERIES], "encoder_hidden_states": IMAGES},
    "queries, padded images": {
        "query_embeds": STATES[:, :QUERIES],
        "encoder_hidden_states": IMAGES,
        "encoder_attention_mask": IMAGE_MASK,
    },
    "text": {"query_embeds": STATES[:, QUERIES:], "query_length": 0},
    "padded text": {"query_embeds": STATES[:, QUERIES:], "query_length": 0, "attention_mask": PADDED},
    "both": {"query_embeds": STATES, "query_length": QUERIES, "encoder_hidden_states": IMAGES},
    "both, padded": {
        "query_embeds": STATES,
        "query_length": QUERIES,
        "encoder_hidden_states": IMAGES,
        "attention_mask": FULL_MASK,
        "encoder_attention_mask": IMAGE_MASK,
    },
    "both, matching mask": {
        "query_embeds": STATES,
        "query_length": QUERIES,
        "encoder_hidden_states": IMAGES,
        "attention_mask": matching_mask(QUERIES, PADDED),
    },
    "both, generation mask": {
        "query_embeds": STATES,
        "query_length": QUERIES,
        "encoder_hidden_states": IMAGES,
        "attention_mask": generation_mask(QUERIES, PADDED),
    },
}


def for_peer(case: str, eager: bool = False) -> dict[str, object]:
    """`transformers` would give a two-dimensional image mask one row per query and text token, and fail."""
    arguments = dict(CASES[case])
    if "encoder_attention_mask" in arguments:
        mask = IMAGE_MASK[:, None, None].bool()
        arguments["encoder_attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, -1e9) if eager else mask
    return arguments


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(models: tuple, case: str) -> None:
    ours, peer = models
    expected = peer(**for_peer(case), output_hidden_states=True)
    outputs = ours(**CASES[case], output_hidden_states=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **EXACT)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **EXACT)
    assert len(outputs.hidden_states) == 5
    torch.testing.assert_close(outputs.hidden_states, tuple(expected.hidden_states), **EXACT)
    branch = "intermediate_query" if CASES[case].get("query_length") != 0 else "intermediate"
    with changed(ours, f"encoder.layer.3.{branch}.dense.weight"):
        assert (ours(**CASES[case]).last_hidden_state - expected.last_hidden_state).abs().max() > 1e-3


@torch.no_grad()
def test_equals_transformers_at_full_width() -> None:
    """Two layers of BERT-base on ViT-g features: 768 wide, 12 heads, 32 queries, 257 image tokens."""
    shape = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "encoder_hidden_size": 1408}
    peer = transformers.Blip2QFormerModel(
        transformers.Blip2QFormerConfig(**shape, num_hidden_layers=2, use_qformer_text_input=True)
    ).eval()
    for parameter in peer.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    ours = Blip2QFormerModel(Blip2QFormerConfig(**shape, num_hidden_layers=2, use_qformer_text_input=True)).eval()
    ours.load_state_dict(peer.state_dict())
    inputs = {
        "query_embeds": noise(2, 40, 768),
        "query_length": 32,
        "encoder_hidden_states": noise(2, 257, 1408),
        "attention_mask": torch.tensor([40 * [1], 36 * [1] + 4 * [0]]),
    }
    torch.testing.assert_close(ours(**inputs).last_hidden_state, peer(**inputs).last_hidden_state, **EXACT)


@torch.no_grad()
def test_without_text_branch() -> None:
    ours, peer = pair(use_qformer_text_input=False)
    torch.testing.assert_close(ours(**CASES["queries"])[0], peer(**CASES["queries"])[0], **EXACT)
    for arguments in (CASES["both"], CASES["text"]):
        with pytest.raises(ValueError, match="this Q-Former has no text branch"):
            ours(**arguments)


@pytest.mark.parametrize("frequency", [1, 3])
@torch.no_grad()
def test_cross_attention_frequency(frequency: int) -> None:
    ours, peer = pair(cross_attention_frequency=frequency)
    torch.testing.assert_close(ours(**CASES["both"])[0], peer(**CASES["both"])[0], **EXACT)
    outputs = ours(**CASES["both"], output_attentions=True, use_cache=True)
    assert len(outputs.cross_attentions) == {1: 4, 3: 2}[frequency]
    cached = ours(**{**CASES["both"], "encoder_hidden_states": None}, past_key_values=images_only(outputs))
    torch.testing.assert_close(cached.last_hidden_state, outputs.last_hidden_state, **EXACT)


def images_only(outputs) -> transformers.EncoderDecoderCache:
    return transformers.EncoderDecoderCache(transformers.DynamicCache(), outputs.past_key_values.cross_attention_cache)


@torch.no_grad()
def test_two_and_three_dimensional_masks(model: Blip2QFormerModel) -> None:
    """The same mask as [R, N], [R, S, N] and [R, 1, S, N], of any number type."""
    expected = model(**CASES["both, padded"]).last_hidden_state
    square = matching_mask(QUERIES, PADDED)
    for mask in (
        FULL_MASK.bool(),
        FULL_MASK.float(),
        square,
        square[:, 0],
        square.long(),
        square.expand(-1, 4, -1, -1),
    ):
        outputs = model(**{**CASES["both, padded"], "attention_mask": mask})
        torch.testing.assert_close(outputs.last_hidden_state, expected, **EXACT)
    other = model(**{**CASES["both, padded"], "attention_mask": contrastive_mask(QUERIES, PADDED)})
    assert (other.last_hidden_state - expected).abs().max() > 1e-3  # negative control


@torch.no_grad()
def test_attention_weights(models: tuple) -> None:
    ours, peer = models
    case = CASES["both, padded"]
    outputs = ours(**case, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == 4 * [(ROWS, 4, QUERIES + TEXT, QUERIES + TEXT)]
    assert [weights.shape for weights in outputs.cross_attentions] == 2 * [(ROWS, 4, QUERIES, TOKENS)]
    for weights in (*outputs.attentions, *outputs.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(outputs.last_hidden_state, ours(**case).last_hidden_state, **EXACT)
    for index, layer in enumerate(ours.encoder.layer):
        before = outputs.hidden_states[index]
        attention = layer.attention.attention
        expected = softmax_of_scores(attention, before, before, FULL_MASK)
        torch.testing.assert_close(outputs.attentions[index], expected, **EXACT)
        if index % 2 == 0:
            queries = layer.attention(before, attention.key_value(before), FULL_MASK[:, None, None].bool(), False)[0]
            expected = softmax_of_scores(layer.crossattention.attention, queries[:, :QUERIES], IMAGES, IMAGE_MASK)
            torch.testing.assert_close(outputs.cross_attentions[index // 2], expected, **EXACT)
    assert ours(**case).attentions is None
    peer.set_attn_implementation("eager")
    theirs = peer(**for_peer("both, padded", eager=True), output_attentions=True)
    peer.set_attn_implementation("sdpa")
    own = tuple(weights for weights in theirs.attentions if weights.shape[-1] == QUERIES + TEXT)  # it mixes both kinds
    torch.testing.assert_close(outputs.attentions, own, **EXACT)
    torch.testing.assert_close(outputs.cross_attentions, tuple(theirs.cross_attentions), **EXACT)


def softmax_of_scores(attention, looks: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention weights written out head by head."""
    query, key = attention.query(looks), attention.key(seen)
    heads = []
    for start in range(0, WIDTH, WIDTH // 4):
        part = slice(start, start + WIDTH // 4)
        scores = query[..., part] @ key[..., part].mT / (WIDTH // 4) ** 0.5
        heads.append(scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1))
    return torch.stack(heads, dim=1)


@torch.no_grad()
def test_config_switches_and_tuples(model: Blip2QFormerModel) -> None:
    model.config.output_hidden_states = True
    try:
        assert len(model(**CASES["queries"]).hidden_states) == 5
        plain = model(**CASES["queries"], output_hidden_states=False, return_dict=False)
    finally:
        model.config.output_hidden_states = False
    assert isinstance(plain, tuple)
    assert [entry.shape for entry in plain] == [(ROWS, QUERIES, WIDTH), (ROWS, WIDTH)]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_kernels_agree(case: str) -> None:
    ours, _ = pair()
    expected = ours(**CASES[case]).last_hidden_state
    ours.set_attn_implementation("eager")
    torch.testing.assert_close(ours(**CASES[case]).last_hidden_state, expected, **EXACT)


@pytest.mark.slow  # compiles for some seconds
@pytest.mark.parametrize("case", ["both, padded", "both, generation mask", "padded text"])
@torch.no_grad()
def test_flex_attention_agrees(case: str) -> None:
    ours, _ = pair()
    expected = ours(**CASES[case]).last_hidden_state
    ours.set_attn_implementation("flex_attention")
    torch.testing.assert_close(ours(**CASES[case]).last_hidden_state, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    ours, _ = pair()
    expected = ours(**CASES["both, padded"]).last_hidden_state
    mixed = ours(**{**CASES["both, padded"], "encoder_hidden_states": IMAGES.to(dtype)}).last_hidden_state
    assert mixed.dtype == torch.float32  # half-precision image features do not pull the Q-Former down
    torch.testing.assert_close(mixed, expected, atol=0.05, rtol=0.02)
    outputs = ours.to(dtype)(**CASES["both, padded"]).last_hidden_state
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_for_training_only(field: str) -> None:
    ours, _ = pair(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, field: 0.3})
    evaluated = ours(**CASES["both"]).last_hidden_state
    assert torch.equal(ours(**CASES["both"]).last_hidden_state, evaluated)
    ours.train()
    for kernel in ("sdpa", "eager"):
        ours.set_attn_implementation(kernel)
        assert (ours(**CASES["both"]).last_hidden_state - evaluated).abs().max() > 1e-2
    torch.testing.assert_close(without_dropout(ours)(**CASES["both"]).last_hidden_state, evaluated, **EXACT)


def test_dropout_is_where_bert_has_it() -> None:
    """Behind the embeddings, and behind the output of every attention and feed-forward sub-layer."""
    ours, _ = pair(hidden_dropout_prob=0.3)
    dropouts = [module for module in ours.modules() if isinstance(module, torch.nn.Dropout)]
    assert {module.p for module in dropouts} == {0.3}
    with counted(*dropouts) as calls:
        ours(**CASES["both"])
    assert len(calls) == len(set(calls)) == 1 + 4 * 3 + 2  # two of four layers attend to the image


@pytest.mark.parametrize("case", ["queries", "padded text", "both, padded"])
def test_gradients_equal_transformers_and_checkpointing(case: str) -> None:
    ours, peer = pair()
    without_dropout(ours)
    expected = gradients(peer, lambda: peer(**for_peer(case)).last_hidden_state.pow(2).sum())
    assert_same_gradients(expected, gradients(ours, lambda: ours(**CASES[case]).last_hidden_state.pow(2).sum()))
    enable_checkpointing(ours)
    assert_same_gradients(expected, gradients(ours, lambda: ours(**CASES[case]).last_hidden_state.pow(2).sum()))


def test_reentrant_checkpointing_is_refused() -> None:
    ours, _ = pair()
    enable_checkpointing(ours.train(), use_reentrant=True)
    with pytest.raises(ValueError, match='must have "use_reentrant" False'):
        ours(**CASES["both"])


@torch.no_grad()
def test_text_embeddings_equal_transformers() -> None:
    config = Blip2QFormerConfig(**QFORMER)
    peer = randomised(
        transformers.models.blip_2.modeling_blip_2.Blip2TextEmbeddings(transformers.Blip2QFormerConfig(**QFORMER))
    )
    ours = Blip2TextEmbeddings(config)
    ours.load_state_dict(peer.state_dict())
    ids, queries = torch.randint(10, 290, (2, 7)), noise(2, QUERIES, WIDTH)
    for arguments in (
        {"input_ids": ids},
        {"input_ids": ids, "query_embeds": queries},
        {"query_embeds": queries},
        {"input_ids": ids, "position_ids": torch.arange(3, 10)[None]},
    ):
        torch.testing.assert_close(ours(**arguments), peer(**arguments))
    with pytest.raises(ValueError, match="`input_ids` has 65 tokens, the Q-Former takes at most 64"):
        ours(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_length": 10}, r"`query_length` must be in 0 … 9 \(positions given\), got 10"),
        ({"query_length": -1}, "got -1"),
        ({"query_embeds": STATES[:, :0]}, r"`query_length` must be in 0 … 0"),
        ({"encoder_hidden_states": None}, "`encoder_hidden_states` must be given"),
        ({"encoder_hidden_states": IMAGES[:2]}, "`encoder_hidden_states` has 2 images for 3 rows"),
        ({"encoder_hidden_states": IMAGES[:0]}, "has 0 images for 3 rows"),
        ({"past_key_values": transformers.DynamicCache()}, "must be an EncoderDecoderCache, got DynamicCache"),
        ({"attention_mask": PADDED}, r"must cover the 9 positions seen \(0 of them cached\), got shape \(3, 5\)"),
        ({"attention_mask": torch.zeros(3, 1, 9, 9)}, "4 dimensions must be boolean or 0/1, got torch.float32"),
        ({"attention_mask": torch.ones(9)}, r"must have 2, 3 or 4 dimensions, got shape \(9,\)"),
    ],
)
def test_errors(model: Blip2QFormerModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"query_embeds": STATES, "query_length": 4, "encoder_hidden_states": IMAGES, **arguments})
