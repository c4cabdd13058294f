import json
from collections import Counter
from itertools import islice

import pytest

from blip2_hf.data.positions import StreamPositions
from blip2_hf.data.stream_mixing import MixedStreams
from blip2_hf.data.streaming import StreamingPairs
from tiny_sets import ListShards, reveal, stream_loader, tiny_samples


def part(first: int, last: int, shards: int = 2, **options) -> StreamingPairs:
    samples = tiny_samples(last)[first:]
    return StreamingPairs(
        ListShards([samples[n::shards] for n in range(shards)]), reveal, shuffle_buffer=3, seed=first, **options
    )


def mixed(*weights: float, repeat: bool = True, **options) -> MixedStreams:
    streams = [part(0, 10, repeat=repeat), part(10, 16, repeat=repeat), part(16, 20, repeat=repeat)]
    parts = list(zip(streams, weights, strict=False))
    return MixedStreams(parts, **{"seed": 1, "process_index": 0, "num_processes": 1, **options})


def numbers(examples) -> list[int]:
    return [example["number"] for example in examples]


def test_proportions() -> None:
    drawn = numbers(islice(mixed(3, 1), 600))
    assert 400 < sum(number < 10 for number in drawn) < 500  # expected 450, standard deviation 10.6
    assert set(drawn) == set(range(16))
    assert drawn == numbers(islice(mixed(3, 1), 600))
    assert drawn != numbers(islice(mixed(3, 1, seed=2), 600))


@pytest.mark.parametrize("until", ["first", "last"])
def test_single_passes_end(until: str) -> None:
    drawn = numbers(mixed(1, 1, 1, repeat=False, until=until))
    assert len(set(drawn)) == len(drawn)
    if until == "last":
        assert sorted(drawn) == list(range(20))
    else:
        counts = Counter("a" if number < 10 else "b" if number < 16 else "c" for number in drawn)
        assert len(drawn) < 20
        assert counts["c"] == 4 or counts["b"] == 6 or counts["a"] == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeat", [True, False])
def test_resume_is_exact(workers: int, repeat: bool) -> None:
    def loader(state: dict | None = None):
        stream = mixed(3, 2, 1, repeat=repeat, until="last")
        if state:
            stream.load_state_dict(state)
        return stream_loader(stream, workers, batch_size=2)

    whole = list(islice(loader(), 25))
    for done in range(1, len(whole), 3):
        positions = StreamPositions()
        for batch in whole[:done]:
            positions.observe([example["stream_position"] for example in batch])
        state = json.loads(json.dumps(positions.state_dict()))
        assert list(islice(loader(state), len(whole) - done)) == whole[done:]


def test_processes_share_the_parts() -> None:
    seen = []
    for process in range(2):
        seen += numbers(mixed(1, 1, 1, repeat=False, until="last", process_index=process, num_processes=2))
    assert sorted(seen) == list(range(20))


def test_refused() -> None:
    with pytest.raises(ValueError, match="`weights`"):
        mixed(1, 0)
    with pytest.raises(ValueError, match="`until` must be one of"):
        mixed(1, until="never")
    with pytest.raises(ValueError, match="`parts` is empty"):
        MixedStreams([])
    with pytest.raises(ValueError, match="`parts` must hold.*list"):
        MixedStreams([([1], 1)])
    positions = StreamPositions()
    positions.observe([example["stream_position"] for example in islice(mixed(1, 1), 3)])
    stream = mixed(1, 1, 1)
    stream.load_state_dict(positions.state_dict())
    with pytest.raises(ValueError, match="mixture of 2 streams, this one has 3"):
        next(iter(stream))
