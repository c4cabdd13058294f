import json

import pytest

from blip2_hf.data.positions import StreamPositions


def position(worker: int, at: int, **more: int) -> dict:
    return {"worker": worker, "workers": 3, "process": 0, "processes": 1, "pass": 0, "at": at, **more}


def test_the_newest_position_of_each_worker() -> None:
    positions = StreamPositions()
    assert positions.state_dict() == {}
    positions.observe([position(0, 1), position(0, 2)])
    positions.observe([position(1, 7)])
    assert positions.state_dict()["positions"] == {"0": 2, "1": 7}
    assert positions.state_dict()["next_worker"] == 2
    positions.observe([position(2, 1)])
    assert positions.state_dict()["next_worker"] == 0


def test_a_new_pass_forgets_the_old_one() -> None:
    positions = StreamPositions()
    positions.observe([position(0, 5), position(1, 5)])
    positions.observe([position(0, 1, **{"pass": 1})])
    assert positions.state_dict()["positions"] == {"0": 1}
    assert positions.state_dict()["pass"] == 1


def test_state_goes_on_after_loading() -> None:
    one, other = StreamPositions(), StreamPositions()
    one.observe([position(0, 5)])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    other.observe([position(1, 4)])
    assert other.state_dict()["positions"] == {"0": 5, "1": 4}
    other.load_state_dict({})
    assert other.state_dict() == {}


def test_refused() -> None:
    positions = StreamPositions()
    positions.observe([position(0, 5)])
    with pytest.raises(ValueError, match="`positions` belong to.*'workers': 2"):
        positions.observe([position(0, 5, workers=2)])
    with pytest.raises(ValueError, match="`state` must be"):
        positions.load_state_dict({"positions": {}})
