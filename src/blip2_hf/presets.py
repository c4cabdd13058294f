"""Prompts and generation settings of the paper (Li et al. 2023, sec. 4 and appendix), in one place.

Pipelines, command line and evaluation take them from here; what a caller gives always wins.
"""

from __future__ import annotations

from typing import Any

# Captioning (sec. 4.2): "a photo of", beam search with 5 beams, 8 to 30 tokens.
CAPTION_PROMPT = "a photo of"
CAPTIONING: dict[str, Any] = {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}

# Zero-shot visual question answering (sec. 4.1): 5 beams, a length penalty of -1 for short answers. The original
# code has 0 for OPT (`predict_answers`), the paper -1 for both families.
VQA_PROMPTS = {"decoder-only": "Question: {} Answer:", "encoder-decoder": "Question: {} Short answer:"}
VQA: dict[str, Any] = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}

# Conversation (fig. 4): earlier questions and answers stand before the new question.
CHAT_QUESTION = "Question: {} Answer:"
CHAT: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 30}


def vqa_prompt(is_encoder_decoder: bool) -> str:
    """The paper's prompt for visual question answering, `{}` where the question goes."""
    return VQA_PROMPTS["encoder-decoder" if is_encoder_decoder else "decoder-only"]


def fill(prompt: str, question: str) -> str:
    """`prompt` with `question` in the place of its `{}` (braces in the question stay as they are)."""
    return prompt.replace("{}", question)


def with_defaults(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Generation options completed by `defaults`, without those that contradict what was given.

    A `generation_config` replaces the defaults as a whole, either way to limit the length replaces the default one,
    and defaults for beam search go where there is one beam.
    """
    if options.get("generation_config") is not None:
        return dict(options)
    merged = {**defaults, **options}
    if "max_length" in options and "max_new_tokens" not in options:
        merged.pop("max_new_tokens", None)
    if "max_new_tokens" in options and "max_length" not in options:
        merged.pop("max_length", None)
    if merged.get("num_beams", 1) == 1 and "length_penalty" not in options:
        merged.pop("length_penalty", None)
    longest = merged.get("max_new_tokens")
    if longest is not None and "min_new_tokens" not in options and merged.get("min_new_tokens", 0) > longest:
        merged["min_new_tokens"] = longest
    return merged
