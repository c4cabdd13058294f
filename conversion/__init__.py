"""Checkpoints of the original project <-> ours, as state dicts. Not part of the installed package."""
