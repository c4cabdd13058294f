"""Checkpoints and photos for the tests of this folder."""

from tiny_checkpoints import checkpoint, photos  # noqa: F401
