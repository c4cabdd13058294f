"""`SharedPromptLayer` against a plain `DynamicLayer` that is repeated, extended and reordered."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from blip2_hf.modeling.beam_cache import SharedPromptLayer, keep_rows, packed_places, share_prompt, shared_copy

ROWS, BEAMS, HEADS, PROMPT, WIDTH = 2, 3, 2, 5, 4


def states(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, length, WIDTH)


def both() -> tuple[DynamicLayer, SharedPromptLayer]:
    prompt = DynamicLayer()
    prompt.update(states(ROWS, PROMPT), states(ROWS, PROMPT))
    shared = SharedPromptLayer(prompt, BEAMS, room=30)
    prompt.batch_repeat_interleave(BEAMS)
    return prompt, shared


def assert_same(plain: DynamicLayer, shared: SharedPromptLayer) -> None:
    assert plain.get_seq_length() == shared.get_seq_length()
    torch.testing.assert_close(plain.keys, shared.keys, rtol=0, atol=0)
    torch.testing.assert_close(plain.values, shared.values, rtol=0, atol=0)


def append(plain: DynamicLayer, shared: SharedPromptLayer, length: int = 1, rows: int = ROWS * BEAMS) -> None:
    new = states(rows, length), states(rows, length)
    for expected, got in zip(plain.update(*new), shared.update(*new), strict=True):
        torch.testing.assert_close(expected, got, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 40, 100])
def test_equals_a_repeated_layer_that_is_extended_and_reordered(steps):
    plain, shared = both()
    assert_same(plain, shared)
    for _ in range(steps):  # 40 and 100 steps are more than the first room, so the buffer grows
        append(plain, shared)
        within = torch.randint(0, BEAMS, (ROWS, BEAMS))
        beams = (within + BEAMS * torch.arange(ROWS)[:, None]).flatten()
        plain.reorder_cache(beams)
        shared.reorder_cache(beams)
        assert_same(plain, shared)


def test_the_prompt_is_written_once_and_not_moved():
    _, shared = both()
    buffer = shared._buffers[0]
    for _ in range(20):
        shared.update(states(ROWS * BEAMS, 1), states(ROWS * BEAMS, 1))
        shared.reorder_cache(torch.arange(ROWS * BEAMS).flip(0))
    assert shared.keys.data_ptr() == buffer.data_ptr()


def test_survives_what_else_is_done_to_a_layer():
    plain, shared = both()
    append(plain, shared, 3)
    for layer in (plain, shared):
        layer.crop(-2)
    append(plain, shared)
    assert_same(plain, shared)
    for layer in (plain, shared):
        layer.batch_repeat_interleave(2)
    new = states(2 * ROWS * BEAMS, 1)
    plain.update(new, new)
    shared.update(new, new)
    assert_same(plain, shared)


def test_negative_control_another_order_differs():
    plain, shared = both()
    append(plain, shared)
    plain.reorder_cache(torch.tensor([1, 0, 2, 3, 4, 5]))
    with pytest.raises(AssertionError):
        assert_same(plain, shared)


def test_share_prompt_repeats_layers_with_a_sliding_window():
    from transformers import MistralConfig

    config = MistralConfig(num_hidden_layers=1, sliding_window=3, hidden_size=8, num_attention_heads=HEADS)
    cache = DynamicCache(config=config)
    cache.update(states(ROWS, PROMPT), states(ROWS, PROMPT), 0)
    window = cache.layers[0]
    share_prompt(cache, BEAMS)
    assert cache.layers[0] is window
    assert window.keys.shape[0] == ROWS * BEAMS


@pytest.mark.parametrize("window", [None, 3])
def test_a_copy_leaves_the_prompt_as_it_was(window):
    from transformers import MistralConfig

    config = MistralConfig(num_hidden_layers=1, sliding_window=window, hidden_size=8, num_attention_heads=HEADS)
    cache = DynamicCache(config=config)
    cache.update(states(ROWS, PROMPT), states(ROWS, PROMPT), 0)
    (layer,) = cache.layers
    keys, length = layer.keys.clone(), cache.get_seq_length()
    for times in (BEAMS, 1):
        copied = shared_copy(cache, times, room=2)
        torch.testing.assert_close(copied.layers[0].keys, keys.repeat_interleave(times, dim=0), rtol=0, atol=0)
        copied.update(states(ROWS * times, 1), states(ROWS * times, 1), 0)
        assert copied.get_seq_length() == length + 1
    assert cache.layers == [layer] and cache.get_seq_length() == length
    torch.testing.assert_close(layer.keys, keys, rtol=0, atol=0)


# -- rows and positions that leave ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stay", "kept"),
    [
        ([True, True], [0, 1]),
        ([False, True, True, True], [3, 1, 2]),
        ([True, False, True, False, True], [0, 4, 2]),
        ([False, False, True], [2]),
        ([True, False], [0]),
    ],
)
def test_only_rows_that_fill_a_gap_move(stay: list[bool], kept: list[int]) -> None:
    assert packed_places(stay) == kept


@pytest.mark.parametrize("times", [1, 3])
def test_rows_leave_in_place(times: int) -> None:
    prompt = DynamicLayer()
    prompt.update(states(5, PROMPT), states(5, PROMPT))
    shared = SharedPromptLayer(prompt, times, room=10)
    prompt.batch_repeat_interleave(times)
    append(prompt, shared, rows=5 * times)
    cache, place = DynamicCache(), shared.keys.data_ptr()
    cache.layers = [shared, DynamicLayer()]  # the second one holds nothing yet
    kept = packed_places([False, True, False, True, True])
    keep_rows(cache, kept, times)
    prompt.batch_select_indices(torch.tensor([row * times + i for row in kept for i in range(times)]))
    assert_same(prompt, shared)
    assert shared.keys.data_ptr() == place
    append(prompt, shared, rows=3 * times)
    assert_same(prompt, shared)
    assert shared.keys.data_ptr() == place


def test_rows_leave_after_others_replaced_the_states():
    plain, shared = both()
    for layer in (plain, shared):
        layer.batch_repeat_interleave(2)
    cache = DynamicCache()
    cache.layers = [shared]
    keep_rows(cache, [0, 1])
    plain.batch_select_indices(torch.tensor([0, 1]))
    assert_same(plain, shared)


def test_generated_positions_that_are_kept():
    plain, shared = both()
    append(plain, shared, 4)
    places = torch.stack([torch.randperm(4)[:2] for _ in range(ROWS * BEAMS)])
    shared.keep_generated(places)
    for row, kept in enumerate(places.tolist()):
        order = [*range(PROMPT), *(PROMPT + place for place in kept)]
        torch.testing.assert_close(shared.keys[row], plain.keys[row, :, order], rtol=0, atol=0)
        torch.testing.assert_close(shared.values[row], plain.values[row, :, order], rtol=0, atol=0)
    assert shared.get_seq_length() == PROMPT + 2
