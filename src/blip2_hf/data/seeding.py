"""Random numbers that are a function of a key, never of the state of a process or worker."""

from __future__ import annotations

import hashlib

import numpy as np


def random_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator for `key`, the same in every process; different keys give unrelated generators.

    The key is hashed first: NumPy's own seeding pads with zeros, so that (1,) and (1, 0) would coincide.

    Args:
        key: any number of integers and strings, such as a purpose, a seed, an epoch and an index.
    """
    for part in key:
        if not isinstance(part, (int, str)):
            raise ValueError(f"`key` must consist of int and str, got {type(part).__name__}")
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
