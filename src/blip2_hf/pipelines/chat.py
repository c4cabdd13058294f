"""Conversation about one image (Li et al. 2023, fig. 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..modeling.encoded import EncodedImages
from ..presets import CHAT, CHAT_QUESTION, fill, with_defaults
from .image_to_text import Blip2ImageToTextPipeline

_NO_LIMIT = 10**6  # tokenizers without a limit give 1e30 for it


@dataclass(frozen=True)
class Reply:
    """An answer, and how many of the oldest turns had to be left out of the prompt for it."""

    answer: str
    dropped_turns: int


class Conversation:
    """Questions about one image, each with the earlier questions and answers before it.

    The prompt is "Question: … Answer: …. Question: … Answer:". The image is encoded once. What does not fit into the
    language model's positions any more is dropped, oldest first, and the reply says so.

    Args:
        pipe: the pipeline that answers.
        image: an image (path, URL, PIL image, …) or one encoded image.
        generate_kwargs: options of `generate`; default: `blip2_hf.presets.CHAT`.

    Raises:
        ValueError: if the image cannot be read, naming it.
    """

    def __init__(
        self, pipe: Blip2ImageToTextPipeline, image: Any, generate_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.pipe = pipe
        self.image = image if isinstance(image, EncodedImages) else pipe.encode_image(image)
        self.generate_kwargs = with_defaults(generate_kwargs or {}, CHAT)
        self.turns: list[tuple[str, str]] = []

    def ask(self, question: str) -> Reply:
        """The answer to `question`, which is remembered with it.

        Raises:
            ValueError: if the question is empty, or does not fit even without earlier turns.
        """
        question = " ".join(question.split()) if isinstance(question, str) else ""
        if not question:
            raise ValueError("`question` must be a text that is not empty")
        dropped = self._turns_to_drop(question)
        self.turns = self.turns[dropped:]
        (generated,) = self.pipe(
            image_embeds=self.image, prompt=self._prompt(self.turns, question), generate_kwargs=self.generate_kwargs
        )
        answer = first_answer(generated["generated_text"])
        self.turns.append((question, answer))
        return Reply(answer, dropped)

    def _turns_to_drop(self, question: str) -> int:
        for dropped in range(len(self.turns) + 1):
            excess = self._excess(self._prompt(self.turns[dropped:], question))
            if excess is None:
                return dropped
        raise ValueError(f"`question` is too long even without earlier turns: {excess}")

    def _excess(self, prompt: str) -> str | None:
        """What a prompt is too long for; None if it fits."""
        config, processor = self.pipe.model.config, self.pipe.processor
        tokens = config.num_query_tokens + _length(processor.tokenizer, prompt)
        limit = self.positions()
        if limit is not None and tokens > limit:
            return f"{tokens} tokens with the image, where the language model takes {limit} and the answer"
        if config.qformer_config.use_qformer_text_input:
            tokens, limit = _length(processor.qformer_tokenizer, prompt), config.qformer_config.max_position_embeddings
            if tokens > limit:
                return f"{tokens} tokens, where the Q-Former takes {limit}"
        return None

    def positions(self) -> int | None:
        """The longest prompt that the language model takes, in tokens with the image; None if nothing limits it."""
        config = self.pipe.model.config
        limits = [self.pipe.processor.tokenizer.model_max_length]
        positions = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:
            answer = 0 if config.is_encoder_decoder else self.generate_kwargs.get("max_new_tokens") or 0
            limits.append(positions - answer)
        return min((limit for limit in limits if limit < _NO_LIMIT), default=None)

    @staticmethod
    def _prompt(turns: list[tuple[str, str]], question: str) -> str:
        earlier = [f"{fill(CHAT_QUESTION, asked)} {answer.rstrip('.')}." for asked, answer in turns]
        return " ".join([*earlier, fill(CHAT_QUESTION, question)])


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def first_answer(text: str) -> str:
    """The answer alone: language models like to go on with a question of their own."""
    return re.split(r"\n|\bQuestion:", text.strip(), maxsplit=1)[0].strip()
