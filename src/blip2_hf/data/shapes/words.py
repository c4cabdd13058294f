"""The words of the world. Writers (captions, questions, corpus) and readers (grammar) share this table."""

from __future__ import annotations

from .scenes import COLOURS, SHAPES, SIZES, TEXTURES

NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {noun: f"{noun}es" if noun.endswith("s") else f"{noun}s" for noun in (*SHAPES, "object")}
SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
LARGER = ("larger", "bigger")
SMALLER = ("smaller",)
# What can be asked about a thing, and the values.
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}

# The nine fields of a picture, and the edges alone. Keys are also the answers to "where".
SPOT_PHRASES = {
    "top left": ("in the top left", "in the top left corner", "in the upper left", "in the upper left corner"),
    "top": ("at the top",),
    "top right": ("in the top right", "in the top right corner", "in the upper right", "in the upper right corner"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "in the lower left", "in the lower left corner"),
    "bottom": ("at the bottom",),
    "bottom right": (
        "in the bottom right",
        "in the bottom right corner",
        "in the lower right",
        "in the lower right corner",
    ),
}
RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
