from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from blip2_hf.modeling.encoded import EncodedImages

IMAGES = 4


@pytest.fixture
def encoded() -> EncodedImages:
    """Four images whose every number is the image's number; cross-attention in layers 0 and 2 only."""
    number = torch.arange(float(IMAGES))
    own, image = DynamicCache(), DynamicCache()
    for layer in range(3):
        states = number[:, None, None, None].expand(-1, 2, 5, 3)
        own.update(states, 10 + states, layer)
        if layer % 2 == 0:
            image.update(20 + states, 30 + states, layer)
    features = number[:, None, None]
    return EncodedImages(features.expand(-1, 7, 6), features.expand(-1, 5, 6), EncoderDecoderCache(own, image))


def numbers(encoded: EncodedImages) -> list[int]:
    """Which images these are; every tensor must agree."""
    own, image = encoded.cache.self_attention_cache.layers, encoded.cache.cross_attention_cache.layers
    tensors = [encoded.image_embeds, encoded.query_output]
    tensors += [layer.keys for layer in own] + [layer.values - 10 for layer in own]
    tensors += [layer.keys - 20 for layer in image[::2]] + [layer.values - 30 for layer in image[::2]]
    assert not image[1].is_initialized
    first = tensors[0].flatten(1)[:, 0]
    for tensor in tensors:
        assert torch.equal(tensor, first.reshape(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor))
    assert len(encoded) == len(first)
    return first.int().tolist()


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, [0]),
        (-1, [3]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([0, 0, 2], [0, 0, 2]),
        ((3, -4), [3, 0]),
        (np.array([1, 3]), [1, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_indexing(encoded: EncodedImages, index: object, expected: list[int]) -> None:
    assert numbers(encoded[index]) == expected
    assert numbers(encoded) == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [4, -5, [0, 4], torch.tensor([-5]), torch.tensor([True, False])])
def test_images_that_do_not_exist(encoded: EncodedImages, index: object) -> None:
    with pytest.raises(IndexError):
        encoded[index]


def test_iteration_gives_single_images(encoded: EncodedImages) -> None:
    assert [numbers(image) for image in encoded] == [[0], [1], [2], [3]]


def test_indexing_an_index(encoded: EncodedImages) -> None:
    assert numbers(encoded[[3, 1, 2]][1:]) == [1, 2]


def test_to_converts_everything(encoded: EncodedImages) -> None:
    converted = encoded.to(torch.float64)
    assert numbers(converted) == [0, 1, 2, 3]
    assert converted.image_embeds.dtype == converted.query_output.dtype == torch.float64
    for part in (converted.cache.self_attention_cache, converted.cache.cross_attention_cache):
        assert {layer.keys.dtype for layer in part.layers if layer.is_initialized} == {torch.float64}
    assert encoded.image_embeds.dtype == torch.float32
    moved = encoded.to("meta")
    assert moved.cache.self_attention_cache.layers[0].values.device.type == "meta"


def test_a_selection_can_be_written_to(encoded: EncodedImages) -> None:
    """Decoding from a selection appends to its cache, not to the one it was taken from."""
    part = encoded[:2]
    part.cache.self_attention_cache.update(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 3), 0)
    assert part.cache.get_seq_length() == 6
    assert encoded.cache.get_seq_length() == 5
    assert numbers(encoded) == [0, 1, 2, 3]


def test_image_cache_shares_the_images_only(encoded: EncodedImages) -> None:
    cache = encoded.image_cache()
    assert cache.get_seq_length() == 0
    assert cache.is_updated == {0: True, 1: False, 2: True}
    assert cache.cross_attention_cache.layers[2].keys is encoded.cache.cross_attention_cache.layers[2].keys
