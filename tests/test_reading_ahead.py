"""Work done ahead: order, overlap, bounds, errors, stopping. Nothing here depends on how long anything takes."""

import threading
from collections.abc import Iterator

import pytest

from blip2_hf.reading_ahead import read_ahead

PATIENCE = 60  # seconds after which a test fails instead of waiting for ever


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers) -> None:
    """Also where a later item is done first."""
    later = threading.Event()

    def work(number: int) -> int:
        if workers > 1 and number == 0:
            assert later.wait(PATIENCE)
        if number == 1:
            later.set()
        return number * number

    assert list(read_ahead(work, range(7), workers=workers, ahead=3)) == [n * n for n in range(7)]


def test_the_next_items_are_worked_on_while_the_caller_has_one() -> None:
    begun = [threading.Event() for _ in range(4)]
    results = read_ahead(lambda number: begun[number].set(), range(4), workers=1, ahead=2)
    next(results)
    assert begun[1].wait(PATIENCE) and begun[2].wait(PATIENCE)  # nobody has asked for them yet
    assert not begun[3].is_set()
    results.close()


@pytest.mark.parametrize("ahead", [1, 4])
def test_no_more_than_the_given_number_is_ahead(ahead) -> None:
    drawn, most = 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield number

    for number in read_ahead(lambda number: number, items(), workers=2, ahead=ahead):
        most = max(most, drawn - (number + 1))
    assert (drawn, most) == (20, ahead)


def test_without_workers_nothing_is_ahead() -> None:
    done = []
    results = read_ahead(done.append, range(3), workers=0, ahead=2)
    next(results)
    assert done == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_turn(workers) -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = read_ahead(work, range(9), workers=workers, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_closing_begins_nothing_more_and_leaves_no_thread() -> None:
    go, done, main = threading.Event(), [], threading.get_ident()

    def work(number: int) -> int:
        if number == 1:
            assert go.wait(PATIENCE)
        done.append((number, threading.get_ident() != main))
        return number

    results = read_ahead(work, range(50), workers=1, ahead=10)
    assert next(results) == 0
    threading.Timer(0.05, go.set).start()  # once `close` waits for item 1, if it came before the rest is dropped
    results.close()
    assert done in ([(0, True)], [(0, True), (1, True)])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]
