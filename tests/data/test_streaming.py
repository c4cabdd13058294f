import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from blip2_hf.data.positions import StreamPositions
from blip2_hf.data.samples import ImageTextSample
from blip2_hf.data.shards import TarShards
from blip2_hf.data.streaming import StreamingPairs, prepare_stream_loader
from tiny_sets import (
    ListShards,
    as_list,
    contents,
    reveal,
    stream_loader,
    tar_members,
    tiny_samples,
    tiny_shards,
    write_tar,
)

BROKEN = ImageTextSample(b"broken", ("a",), "tiny/broken")


def stream(shards=None, **options) -> StreamingPairs:
    defaults = {"seed": 5, "shuffle_buffer": 4, "process_index": 0, "num_processes": 1}
    shards = tiny_shards([7, 3, 5, 6]) if shards is None else shards
    return StreamingPairs(shards, reveal, **{**defaults, **options})


def numbers(examples) -> list[int]:
    return [example["number"] for example in examples]


def after(batches: list[list[dict]]) -> dict:
    """The stored state after these batches."""
    positions = StreamPositions()
    for batch in batches:
        positions.observe([example["stream_position"] for example in batch])
    return json.loads(json.dumps(positions.state_dict()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeat", [True, False])
def test_resume_is_exact(workers: int, repeat: bool) -> None:
    shards = [*tiny_shards([7, 3, 5, 6]).shards]
    shards[1].insert(1, BROKEN)

    def loader(state: dict | None = None):
        pairs = stream(ListShards(shards), repeat=repeat)
        if state is not None:
            pairs.load_state_dict(state)
        return stream_loader(pairs, workers, batch_size=2)

    whole = list(islice(loader(), 30))
    assert len(whole) == 30 if repeat else len(whole) == 11
    assert any("skipped" in example for batch in whole for example in batch)
    for done in (0, 1, 2, 3, 5, 8) if repeat else (1, 4, 7, 10, 11):
        resumed = list(islice(loader(after(whole[:done])), len(whole) - done))
        assert resumed == whole[done:], f"after {done} batches"


def test_a_resume_without_positions_differs() -> None:
    whole = list(islice(stream_loader(stream(), 2, batch_size=2), 6))
    state = after(whole[:3])
    for wrong in ({**state, "next_worker": 0}, {**state, "positions": {}}):
        pairs = stream()
        pairs.load_state_dict(wrong)
        assert list(islice(stream_loader(pairs, 2, batch_size=2), 3)) != whole[3:]


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum),
    buffer=st.integers(1, 9),
    seed=st.integers(),
    done=st.integers(1, 25),
    broken=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 5))),
)
@settings(max_examples=60, deadline=None)
def test_every_position_resumes(sizes: list[int], buffer: int, seed: int, done: int, broken: set) -> None:
    shards = tiny_shards(sizes)
    for shard, place in broken:
        if shard < len(sizes) and place < sizes[shard] and sum(map(len, shards.shards)) - len(broken) > 0:
            shards.shards[shard][place] = BROKEN
    if all(sample is BROKEN for shard in shards.shards for sample in shard):
        return
    whole = list(islice(stream(shards, seed=seed, shuffle_buffer=buffer), done + 20))
    resumed = stream(shards, seed=seed, shuffle_buffer=buffer)
    resumed.load_state_dict(after([whole[:done]]))
    assert list(islice(resumed, 20)) == whole[done:]


def test_resuming_reads_one_window_again_not_the_shard() -> None:
    shards = tiny_shards([500])
    whole = list(islice(stream(shards, shuffle_shards=False), 402))
    shards.read_entries = 0
    resumed = stream(shards)
    resumed.load_state_dict(after([whole[:401]]))
    assert next(iter(resumed)) == whole[401]
    assert shards.read_entries == 4


def test_tar_shards_resume_in_workers(tmp_path: Path) -> None:
    files = [write_tar(tmp_path / f"{n}.tar", tar_members(range(10 * n, 10 * n + 6))) for n in range(4)]
    shards = TarShards(files, name="laion")
    whole = list(islice(stream_loader(stream(shards), 2), 12))
    resumed = stream(shards)
    resumed.load_state_dict(after(whole[:5]))
    assert list(islice(stream_loader(resumed, 2), 7)) == whole[5:]
    assert all(example["caption"] == f"caption {example['number']}" for batch in whole for example in batch)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    processes=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_no_sample_is_seen_by_two_processes(sizes: list[int], processes: int, epoch: int) -> None:
    seen = []
    for process in range(processes):
        pairs = stream(tiny_shards(sizes), repeat=False, process_index=process, num_processes=processes)
        pairs.set_epoch(epoch)
        seen += numbers(pairs)
    assert sorted(seen) == list(range(sum(sizes)))


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4], [20]])
def test_no_sample_is_seen_by_two_workers(sizes: list[int]) -> None:
    seen = []
    for process in range(2):
        pairs = stream(tiny_shards(sizes), repeat=False, process_index=process, num_processes=2)
        seen += [number for batch in stream_loader(pairs, 2) for number in numbers(batch)]
    assert sorted(seen) == list(range(20))


def test_order_and_draws_depend_on_seed_and_epoch_alone() -> None:
    def epoch(number: int, **options) -> list[list[tuple]]:
        pairs = stream(repeat=False, **options)
        pairs.set_epoch(number)
        return contents([list(pairs)])

    first = epoch(0)
    torch.manual_seed(3)
    assert epoch(0) == first
    assert epoch(1) != first
    assert epoch(0, seed=6) != first
    in_order = epoch(0, shuffle_shards=False, shuffle_buffer=1)
    assert [number for number, _, _ in in_order[0]] == list(range(21))
    draws = {number: draw for number, _, draw in first[0]}
    split = stream(tiny_shards([7, 3, 5, 6]), repeat=False, process_index=1, num_processes=2)
    assert all(example["draw"] != 0 and example["number"] in draws for example in split)
    assert sorted(epoch(1)[0]) != sorted(first[0]), "the same images with other augmentations"
    assert [n for n, _, _ in sorted(epoch(1)[0])] == [n for n, _, _ in sorted(first[0])]


def test_an_endless_stream_gives_every_sample_in_every_pass_in_another_order() -> None:
    examples = list(islice(stream(), 63))
    passes = [numbers(examples[start : start + 21]) for start in (0, 21, 42)]
    assert all(sorted(order) == list(range(21)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    single = stream(repeat=False)
    single.set_epoch(1)
    assert contents([list(single)]) == contents([examples[21:42]])


@pytest.mark.parametrize("persistent", [False, True])
def test_single_passes_go_on_after_a_resume(persistent: bool) -> None:
    def run(pairs: StreamingPairs, epochs: range) -> list[list[list[dict]]]:
        loader = stream_loader(pairs, 2, persistent_workers=persistent)
        found = []
        for epoch in epochs:
            pairs.set_epoch(epoch)
            found.append(list(loader))
        return found

    first, second, third = run(stream(repeat=False), range(3))
    assert contents(first) != contents(second)
    resumed = stream(repeat=False)
    resumed.load_state_dict(after(first + second[:2]))
    assert run(resumed, range(1, 3)) == [second[2:], third]
    counted_anew = stream(repeat=False)
    counted_anew.load_state_dict(after(first + second[:2]))
    assert run(counted_anew, range(2)) == [second[2:], third]


def test_skipped_samples_travel_with_the_next_example(caplog: pytest.LogCaptureFixture) -> None:
    record = {"reason": "malformed record", "where": "somewhere"}
    shards = ListShards([[BROKEN, record, *tiny_samples(2), BROKEN]])
    with caplog.at_level(logging.WARNING, "blip2_hf"):
        examples = list(stream(shards, shuffle_buffer=1, repeat=False))
    assert examples[0]["skipped"] == [{"reason": "unreadable image", "where": "tiny/broken"}, record]
    assert "skipped" not in examples[1]
    assert "1 samples were skipped" in caplog.text
    endless = list(islice(stream(shards, shuffle_buffer=1), 200))
    counts = Counter(r["where"] for example in endless for r in example.get("skipped", ()))
    assert counts == {"tiny/broken": 199, "somewhere": 100}


def test_a_transform_may_load_images_itself() -> None:
    pairs = StreamingPairs(tiny_shards([2]), lambda image, caption, rng: {"given": type(image)}, images="source")
    assert next(iter(pairs))["given"] is bytes


def test_only_broken_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="10 samples in a row cannot be used.*`max_skips`.*10 samples were skipped"):
        next(iter(stream(ListShards([[BROKEN] * 4]), max_skips=10)))


def test_a_reader_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="worker 0 of 1 got no sample from 2 shards"):
        next(iter(stream(ListShards([[], []]))))


def test_positions_count_consumed_batches_not_prefetched_ones() -> None:
    loader = iter(stream_loader(stream(), 2, prefetch_factor=4))
    state = after([next(loader)])
    assert list(state["positions"]) == ["0"]
    assert state["next_worker"] == 1


def test_prepared_for_accelerate() -> None:
    pairs = stream(repeat=False)
    loader = prepare_stream_loader(
        DataLoader(pairs, batch_size=5, collate_fn=lambda batch: {"n": torch.tensor(numbers(batch)), "raw": batch}),
        "cpu",
    )
    ends, batches = [], []
    for batch in loader:
        batches.append(batch)
        ends.append(loader.end_of_dataloader)
    assert ends == [False] * 4 + [True]
    assert torch.cat([batch["n"] for batch in batches]).tolist() == numbers(stream(repeat=False))
    resumed = stream(repeat=False)
    resumed.load_state_dict(after([batch["raw"] for batch in batches[:2]]))
    loader = prepare_stream_loader(DataLoader(resumed, batch_size=5, collate_fn=as_list))
    loader.set_epoch(0)
    assert list(loader) == [batch["raw"] for batch in batches[2:]]
    with pytest.raises(ValueError, match="`loader` must be over an ExampleStream"):
        prepare_stream_loader(DataLoader([1, 2]))


def test_processes_are_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    pairs = StreamingPairs(tiny_shards([1, 1, 1]), reveal, shuffle_shards=False)
    assert numbers(islice(pairs, 3)) == [2, 2, 2]
    assert (pairs.process_index, pairs.num_processes) == (2, 3)


def test_state_of_another_run_is_refused() -> None:
    state = after([list(islice(stream(), 2))])
    with pytest.raises(ValueError, match="'process' 0, here it is 1"):
        stream(process_index=1, num_processes=2).load_state_dict(state)
    with pytest.raises(ValueError, match="'processes' 1, here it is 2"):
        stream(num_processes=2).load_state_dict(state)
    with pytest.raises(ValueError, match="`state` must be what StreamPositions"):
        stream().load_state_dict({"epoch": 3})
    pairs = stream()
    pairs.load_state_dict(state)
    with pytest.raises(ValueError, match="stored with 1 workers.*here there are 2"):
        next(iter(stream_loader(pairs, 2)))


def test_refused() -> None:
    with pytest.raises(ValueError, match="`shards` is empty"):
        stream(ListShards([]))
    with pytest.raises(ValueError, match="`shuffle_buffer`"):
        stream(shuffle_buffer=0)
    with pytest.raises(ValueError, match="`process_index` must lie"):
        stream(process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="both"):
        stream(process_index=None)
    with pytest.raises(ValueError, match="`epoch`"):
        stream().set_epoch(-1)
