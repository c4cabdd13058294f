"""Images and text put together into one sequence."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blip2_hf.modeling.prompts import (
    Prompt,
    match_rows,
    pad_right,
    prompt_behind_ids,
    prompt_from_embeds,
    prompt_from_ids,
    start_ids,
)

IMAGE, WIDTH = 9, 4
IDS = torch.tensor([[9, 9, 1, 2, 3], [9, 9, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
IMAGES = torch.arange(16.0).reshape(2, 2, WIDTH)


@pytest.fixture
def embedding() -> nn.Embedding:
    return nn.Embedding(10, WIDTH)


def test_images_take_the_places_of_the_placeholders(embedding: nn.Embedding) -> None:
    prompt = prompt_from_ids(IMAGES, IDS, MASK, embedding, IMAGE)
    assert torch.equal(prompt.embeds[:, :2], IMAGES)
    assert torch.equal(prompt.embeds[:, 2:], embedding(IDS[:, 2:]))
    assert torch.equal(prompt.ids, IDS)
    assert torch.equal(prompt.mask, MASK)
    assert prompt.is_image.tolist() == [[True, True, False, False, False]] * 2


def test_placeholders_may_stand_anywhere(embedding: nn.Embedding) -> None:
    ids = torch.tensor([[1, 9, 2, 9, 3], [4, 5, 6, 9, 9]])
    prompt = prompt_from_ids(IMAGES, ids, None, embedding, IMAGE)
    assert torch.equal(prompt.embeds[0, [1, 3]], IMAGES[0])
    assert torch.equal(prompt.embeds[1, 3:], IMAGES[1])
    assert prompt.mask.eq(1).all()


def test_placeholder_outside_of_the_vocabulary() -> None:
    embedding = nn.Embedding(6, WIDTH)
    prompt = prompt_from_ids(IMAGES, IDS, MASK, embedding, IMAGE)
    assert torch.equal(prompt.embeds[:, :2], IMAGES)
    assert torch.equal(prompt.ids, IDS)


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        ([[1, 2, 3], [1, 2, 3]], r"\[0, 0\]"),
        ([[9, 9, 3], [9, 2, 3]], r"\[2, 1\]"),
        ([[9, 9, 9], [9, 9, 3]], r"\[3, 2\]"),
    ],
)
def test_wrong_number_of_placeholders(ids: list, counts: str, embedding: nn.Embedding) -> None:
    with pytest.raises(ValueError, match=rf"`input_ids` must have 2 image placeholders \(token 9\).*got {counts}"):
        prompt_from_ids(IMAGES, torch.tensor(ids), None, embedding, IMAGE)
    with pytest.raises(ValueError, match=rf"`inputs_embeds` must have 2 image placeholders.*got {counts}"):
        prompt_from_embeds(IMAGES, embedding(torch.tensor(ids)), None, None, embedding, IMAGE)


def test_a_masked_image_is_an_error(embedding: nn.Embedding) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="`attention_mask` must be 1 at the image placeholders"):
        prompt_from_ids(IMAGES, IDS, mask, embedding, IMAGE)


def test_without_a_placeholder_token_images_go_first(embedding: nn.Embedding) -> None:
    text, mask = IDS[:, 2:], MASK[:, 2:]
    prompt = prompt_from_ids(IMAGES, text, mask, embedding, None)
    with_placeholders = prompt_from_ids(IMAGES, IDS, MASK, embedding, IMAGE)
    for name in ("embeds", "mask", "is_image"):
        assert torch.equal(getattr(prompt, name), getattr(with_placeholders, name))
    assert prompt.ids.shape == IDS.shape
    assert torch.equal(prompt.ids[:, 2:], text)


def test_embeddings_with_and_without_ids(embedding: nn.Embedding) -> None:
    expected = prompt_from_ids(IMAGES, IDS, MASK, embedding, IMAGE)
    for ids in (IDS, None):
        prompt = prompt_from_embeds(IMAGES, embedding(IDS), ids, MASK, embedding, IMAGE)
        assert torch.equal(prompt.embeds, expected.embeds)
        assert torch.equal(prompt.is_image, expected.is_image)
        assert prompt.ids is ids


def test_shapes_that_do_not_fit(embedding: nn.Embedding) -> None:
    for wrong in (IDS[0], IDS[:0], IDS[:, :0], IDS.float()):
        with pytest.raises(ValueError, match=r"`input_ids` must be integers of shape \[batch, tokens\]"):
            prompt_from_ids(IMAGES, wrong, None, embedding, IMAGE)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of the tokens \(2, 5\), got \(2, 4\)"):
        prompt_from_ids(IMAGES, IDS, MASK[:, 1:], embedding, IMAGE)
    with pytest.raises(ValueError, match=r"`inputs_embeds` must have shape \[batch, tokens, 4\], got \(2, 5, 3\)"):
        prompt_from_embeds(IMAGES, torch.zeros(2, 5, 3), None, None, embedding, IMAGE)
    with pytest.raises(ValueError, match="must have the same rows and positions"):
        prompt_from_embeds(IMAGES, embedding(IDS), IDS[:, 1:], None, embedding, IMAGE)
    with pytest.raises(ValueError, match="2 images do not fit 3 rows of text"):
        prompt_from_ids(IMAGES, torch.cat([IDS, IDS[:1]]), None, embedding, IMAGE)


def test_one_image_serves_all_rows() -> None:
    assert match_rows(IMAGES[:1], 5).shape == (5, 2, WIDTH)
    assert match_rows(IMAGES, 2) is IMAGES


def test_images_get_device_and_dtype_of_the_text(embedding: nn.Embedding) -> None:
    prompt = prompt_from_ids(IMAGES, IDS, MASK, embedding.to(torch.bfloat16), IMAGE)
    assert prompt.embeds.dtype == torch.bfloat16


# -- padding ----------------------------------------------------------------------------------------------------------


def scattered() -> Prompt:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    ids = torch.arange(15).reshape(3, 5)
    return Prompt(ids[..., None].float().expand(3, 5, WIDTH), mask, ids, ids % 2 == 0)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("left", [[0, 3, 1, 2, 4], [5, 6, 7, 8, 9], [11, 12, 13, 14, 10]]),
        ("right", [[1, 2, 4, 0, 3], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]),
    ],
)
def test_padding_moves_to_one_side(side: str, expected: list) -> None:
    prompt = scattered().packed(side)
    assert prompt.ids.tolist() == expected
    assert torch.equal(prompt.embeds[..., 0].long(), prompt.ids)
    assert torch.equal(prompt.is_image, prompt.ids % 2 == 0)
    lengths = prompt.mask.sum(dim=1).tolist()
    assert lengths == [3, 5, 1]
    for row, length in zip(prompt.mask.tolist(), lengths, strict=True):
        assert row == ([0] * (5 - length) + [1] * length if side == "left" else [1] * length + [0] * (5 - length))


def test_packing_without_ids() -> None:
    prompt = scattered()
    prompt.ids = None
    assert prompt.packed("left").ids is None


def test_positions_count_real_tokens_only() -> None:
    positions = scattered().position_ids()
    assert positions[0, [1, 2, 4]].tolist() == [0, 1, 2]
    assert positions[1].tolist() == [0, 1, 2, 3, 4]
    assert positions.min() >= 0


def test_order_that_closes_gaps() -> None:
    prompt = scattered()
    order = prompt.closing_order()
    assert torch.equal(prompt.reordered(order).ids, prompt.packed("left").ids)
    for mask in ([[0, 0, 1, 1]], [[1, 1, 0, 0]], [[1, 1, 1, 1]], [[0, 1, 1, 0]]):
        edges = Prompt(torch.zeros(1, 4, WIDTH), torch.tensor(mask), None, torch.zeros(1, 4, dtype=torch.bool))
        assert edges.closing_order() is None
    assert torch.equal(pad_right(prompt.ids, prompt.mask)[0], prompt.packed("right").ids)
    assert pad_right(prompt.ids, None) == (prompt.ids, None)


# -- a prompt without text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "eos", "seq2seq", "expected"),
    [
        (2, 3, False, [9, 9, 2]),
        (None, 3, False, [9, 9]),
        (None, 3, True, [9, 9, 3]),
        (2, 3, True, [9, 9, 2]),
    ],
)
def test_start_of_an_empty_text(bos: int | None, eos: int, seq2seq: bool, expected: list[int]) -> None:
    config = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, is_encoder_decoder=seq2seq)
    assert start_ids(3, 2, IMAGE, config, "cpu").tolist() == [expected] * 3
    assert start_ids(3, 2, None, config, "cpu").tolist() == [expected[2:]] * 3


# -- a prompt behind its ids ------------------------------------------------------------------------------------------


def test_ids_of_the_prompt_stand_for_its_embeddings(embedding: nn.Embedding) -> None:
    prompt = prompt_from_ids(IMAGES[:1], IDS[:1], None, embedding, IMAGE)
    longer = torch.cat([IDS[:1], torch.tensor([[7, 8]])], dim=1)
    with prompt_behind_ids(prompt, embedding):
        assert torch.equal(embedding(IDS[:1]), prompt.embeds)
        assert torch.equal(embedding(longer), torch.cat([prompt.embeds, embedding(longer[:, 5:])], dim=1))
        assert torch.equal(embedding(longer[:, 1:]), embedding.weight[longer[:, 1:]]), "another text"
        assert torch.equal(embedding(IDS), embedding.weight[IDS]), "another number of rows"
    assert torch.equal(embedding(IDS[:1]), embedding.weight[IDS[:1]]), "over afterwards"


def test_the_hooks_go_when_something_fails(embedding: nn.Embedding) -> None:
    prompt = prompt_from_ids(IMAGES[:1], IDS[:1], None, embedding, IMAGE)
    with pytest.raises(RuntimeError), prompt_behind_ids(prompt, embedding):
        raise RuntimeError
    assert not embedding._forward_hooks
    assert not embedding._forward_pre_hooks


def test_placeholders_outside_of_the_vocabulary_behind_ids() -> None:
    embedding = nn.Embedding(6, WIDTH)
    prompt = prompt_from_ids(IMAGES[:1], IDS[:1], None, embedding, IMAGE)
    with prompt_behind_ids(prompt, embedding):
        assert torch.equal(embedding(IDS[:1]), prompt.embeds)


def test_a_compiled_graph_checks_the_placeholders_too(embedding: nn.Embedding) -> None:
    def embeds(ids: torch.Tensor) -> torch.Tensor:
        return prompt_from_ids(IMAGES, ids, MASK, embedding, IMAGE).embeds

    compiled = torch.compile(embeds, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), embeds(IDS))
    with pytest.raises(RuntimeError, match="every row must have 2 image placeholders"):
        compiled(IDS.masked_fill(IDS == IMAGE, 1))
