"""A cache for several sequences per row (beams, samples) that start with the same prompt.

The sequences of a row share the prompt's keys and values, so exchanging beams moves only those of the generated
tokens; and new ones are written in place instead of copying everything at each step. Rows leave in place, too.
"""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache, DynamicLayer


class SharedPromptLayer(DynamicLayer):
    """Keys and values [rows * times, heads, prompt + generated, d] of one layer."""

    def __init__(self, prompt: DynamicLayer, times: int, room: int = 0):
        """
        Args:
            prompt: a filled layer of `rows`, the prompt's keys and values.
            times: sequences per row; those of a row are next to each other.
            room: generated tokens to have room for at once; for more, everything moves to a larger buffer.
        """
        super().__init__()
        self.prompt_length = prompt.get_seq_length()
        self.lazy_initialization(prompt.keys, prompt.values)
        self._fill(prompt.keys, prompt.values, times, room)

    def _fill(self, keys: torch.Tensor, values: torch.Tensor, times: int, room: int) -> None:
        """Puts keys and values of `rows`, each `times` times, into new buffers with room for more."""
        rows, length = keys.shape[0], keys.shape[2]
        buffers = []
        for states in (keys, values):
            buffer = states.new_empty(rows * times, states.shape[1], length + room, states.shape[3])
            buffer.unflatten(0, (rows, times))[..., :length, :] = states[:, None]
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)

    def _has_room(self, new: int) -> bool:
        """Whether keys and values lie in the buffers (others may have replaced them) with room behind them."""
        buffer = self._buffers[0]
        same = self.keys.data_ptr() == buffer.data_ptr() and self.keys.shape[0] == buffer.shape[0]
        return same and self.keys.shape[2] + new <= buffer.shape[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [rows * times, heads, N, d] and returns everything so far."""
        length, new = self.keys.shape[2], key_states.shape[2]
        if not self._has_room(new):
            self._fill(self.keys, self.values, 1, room=length + new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + new] = states
        self.keys, self.values = (buffer[:, :, : length + new] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beams change places within their row, so the prompt stays where it is."""
        for states in (self.keys, self.values):
            generated = states[:, :, self.prompt_length :]
            if generated.shape[2]:
                generated.copy_(generated.index_select(0, beam_idx.to(generated.device)))

    def keep_rows(self, kept: list[int]) -> None:
        """Leaves these rows, in the places that `packed_places` gives them: the others' are overwritten."""
        if self.keys.data_ptr() != self._buffers[0].data_ptr():  # others replaced the keys and values
            self._fill(self.keys, self.values, 1, room=0)
        length, buffers = self.keys.shape[2], []
        for buffer in self._buffers:
            for place, row in enumerate(kept):
                if place != row:
                    buffer[place, :, :length] = buffer[row, :, :length]
            buffers.append(buffer[: len(kept)])
        self._buffers = tuple(buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)

    def keep_generated(self, places: torch.Tensor) -> None:
        """Leaves of the positions behind the prompt those at `places` [rows, N] (counted from the prompt's end)."""
        end = self.prompt_length + places.shape[1]
        for states in (self.keys, self.values):
            index = places.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            states[:, :, self.prompt_length : end] = states[:, :, self.prompt_length :].gather(2, index)
        self.keys, self.values = (states[:, :, :end] for states in (self.keys, self.values))


def share_prompt(cache: Cache, times: int, room: int = 0) -> None:
    """Makes the cache of a prompt, [rows, …], one of `times` sequences per row, in place.

    Layers that do not keep the whole prompt (sliding windows) are repeated as `transformers` does it.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[index] = SharedPromptLayer(layer, times, room)
        else:
            layer.batch_repeat_interleave(times)


def shared_copy(cache: Cache, times: int, room: int = 0) -> Cache:
    """As `share_prompt`, with the given cache left as it is, to be copied again."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]  # which replace their tensors, and write into none
    share_prompt(copied, times, room)
    return copied


def packed_places(stay: list[bool]) -> list[int]:
    """Which row to put at each place when some leave: those that stay, moved only where that fills a gap."""
    count = sum(stay)
    moved = iter([row for row in range(count, len(stay)) if stay[row]])
    return [row if stay[row] else next(moved) for row in range(count)]


def keep_rows(cache: Cache, kept: list[int], times: int = 1) -> None:
    """Leaves these rows (see `packed_places`) of a cache with `times` sequences per row."""
    kept = [row * times + index for row in kept for index in range(times)]
    for layer in cache.layers:
        if isinstance(layer, SharedPromptLayer):
            layer.keep_rows(kept)
        elif layer.is_initialized:
            layer.batch_select_indices(torch.tensor(kept, device=layer.device))
