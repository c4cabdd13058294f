import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from blip2_hf.data.seeding import random_generator

KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=5).map(tuple)


@given(KEYS, KEYS)
def test_different_keys_give_different_numbers(one: tuple, other: tuple) -> None:
    same = random_generator(*one).integers(2**63) == random_generator(*other).integers(2**63)
    assert same == (one == other)


def test_keys_that_numpy_itself_takes_for_equal() -> None:
    assert np.random.default_rng([1]).integers(2**63) == np.random.default_rng([1, 0]).integers(2**63)
    assert random_generator(1).integers(2**63) != random_generator(1, 0).integers(2**63)


def test_independent_of_global_state_and_process() -> None:
    code = "from blip2_hf.data.seeding import random_generator as r; print(r('a', 3).integers(2**63))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    np.random.seed(5)
    assert outputs == {str(random_generator("a", 3).integers(2**63))}


def test_a_key_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="`key`.*float"):
        random_generator(0.5)
