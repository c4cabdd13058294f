from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st

from blip2_hf.modeling.masks import contrastive_mask, generation_mask, matching_mask

BUILDERS = [contrastive_mask, matching_mask, generation_mask]
Builder = Callable[[int, torch.Tensor], torch.Tensor]


def who_may_see(builder: Builder, queries: int, row: int, column: int) -> bool:
    """Figure 2 of the paper, in words: may position `row` see position `column`, padding apart?"""
    looks_query, seen_query = row < queries, column < queries
    if builder is matching_mask:
        return True
    if builder is contrastive_mask:
        return looks_query == seen_query
    return seen_query if looks_query else (seen_query or column <= row)


def by_hand(builder: Builder, queries: int, text_mask: list[list[int]]) -> torch.Tensor:
    size = queries + len(text_mask[0])
    return torch.tensor(
        [
            [
                [
                    who_may_see(builder, queries, row, column) and (column < queries or real[column - queries] == 1)
                    for column in range(size)
                ]
                for row in range(size)
            ]
            for real in text_mask
        ]
    )[:, None]


def example_rows(builder: Builder) -> list[list[int]]:
    """The numbers of the docstring's example: a row of 0 and 1 for each of `q q t t`."""
    (block,) = re.findall(r"```\n(.*?)```", inspect.getdoc(builder), flags=re.DOTALL)
    lines = [line.split() for line in block.strip().splitlines()]
    assert lines[0] == ["q", "q", "|", "t", "t", "p"]
    assert [line[0] for line in lines[1:]] == ["q", "q", "t", "t"]
    return [[int(entry) for entry in line[1:] if entry != "|"] for line in lines[1:]]


@pytest.mark.parametrize("builder", BUILDERS)
def test_example_of_the_docstring(builder: Builder) -> None:
    mask = builder(2, torch.tensor([[1, 1, 0]]))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0, :4].int().tolist() == example_rows(builder)


@st.composite
def text_masks(draw: st.DrawFn) -> list[list[int]]:
    """Any mask, holes included: what is real need not be at one side."""
    length = draw(st.integers(1, 6))
    return draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=3))


@pytest.mark.parametrize("builder", BUILDERS)
@given(queries=st.integers(1, 5), text_mask=text_masks(), dtype=st.sampled_from([torch.int64, torch.bool, torch.float]))
@settings(max_examples=40, deadline=None)
def test_any_mask_is_what_the_figure_says(
    builder: Builder, queries: int, text_mask: list[list[int]], dtype: torch.dtype
) -> None:
    mask = builder(queries, torch.tensor(text_mask, dtype=dtype))
    assert torch.equal(mask, by_hand(builder, queries, text_mask))
    assert mask[:, :, :queries, :queries].all()  # queries see each other whatever the text is
    assert not mask[:, 0].transpose(1, 2)[:, queries:][~torch.tensor(text_mask).bool()].any()  # nobody sees padding


@given(queries=st.integers(1, 4), text_mask=text_masks(), added=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_more_padding_changes_nothing(queries: int, text_mask: list[list[int]], added: int) -> None:
    size = queries + len(text_mask[0])
    for builder in BUILDERS:
        short = builder(queries, torch.tensor(text_mask))
        long = builder(queries, torch.tensor([row + [0] * added for row in text_mask]))
        assert torch.equal(long[:, :, :size, :size], short)
        assert not long[:, :, :, size:].any()


def test_masks_differ() -> None:
    """Negative control of the comparison with the figure."""
    text_mask = [[1, 1, 0]]
    for builder in BUILDERS:
        for other in BUILDERS:
            same = torch.equal(builder(2, torch.tensor(text_mask)), by_hand(other, 2, text_mask))
            assert same == (builder is other)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_mask_of_other_dimensions_is_refused(builder: Builder) -> None:
    with pytest.raises(ValueError, match=r"`text_mask` must have shape \[batch, tokens\], got \(3,\)"):
        builder(2, torch.tensor([1, 1, 0]))
