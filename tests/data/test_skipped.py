import json

import pytest

from blip2_hf.data.skipped import SkippedSamples


def records(reason: str, *names: str) -> list[dict]:
    return [{"reason": reason, "where": name} for name in names]


def test_counts_and_first_examples() -> None:
    skipped = SkippedSamples(num_examples=2)
    skipped.add(records("blank caption", "a"))
    skipped.add(records("unreadable image", "b", "c", "d"))
    assert skipped.total == 4
    assert skipped.counts == {"blank caption": 1, "unreadable image": 3}
    assert skipped.examples["unreadable image"] == ["b", "c"]
    lines = skipped.report().splitlines()
    assert lines[0] == "4 samples were skipped:"
    assert lines[1].strip() == "unreadable image: 3 (b, c, …)"
    assert lines[2].strip() == "blank caption: 1 (a)"


def test_state_survives_json_and_goes_on_counting() -> None:
    before, after = SkippedSamples(), SkippedSamples()
    before.add(records("x", "a", "b"))
    after.add(records("y", "forgotten"))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.report() == before.report()
    after.add(records("x", "c"))
    assert (after.total, before.total) == (3, 2)


def test_nothing_skipped() -> None:
    assert SkippedSamples().report() == "no samples were skipped"


def test_refused() -> None:
    with pytest.raises(ValueError, match="`num_examples`"):
        SkippedSamples(-1)
    with pytest.raises(ValueError, match="`state` lacks.*counts"):
        SkippedSamples().load_state_dict({"examples": {}})
