"""The report as values and words that page and picture share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .results import Described, Models, Ranking


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        results: one for each picture.
        ranking: of texts by pictures.
        models: which they were.
        drawn: whether the pictures are scenes of the generated world, of which the truth is known.
        command: that makes the same report again.
        seconds: how long the models took, with loading.
    """

    results: Sequence[Described]
    ranking: Ranking
    models: Models
    drawn: bool
    command: str
    seconds: float

    @property
    def title(self) -> str:
        return "BLIP-2, small and trained from nothing" if self.drawn else "BLIP-2 on your pictures"

    @property
    def introduction(self) -> str:
        if not self.drawn:
            return "Captions, answers, where the queries look, and captions ranked against pictures."
        number = len(self.results)
        scenes = "One scene" if number == 1 else f"{_word(number).capitalize()} scenes"
        return (
            f"{scenes} drawn a moment ago, which no model has seen. A vision tower, a Q-Former and language models of "
            "a few million parameters describe them, answer questions about them, and find the picture for a text."
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Numbers and what they are of, for the top."""
        facts = []
        captions = [result.true for result in self.results if result.true is not None]
        if captions:
            facts.append((f"{sum(captions)} of {len(captions)}", "captions wholly true"))
        answers = [asked.right for result in self.results for asked in result.asked if asked.right is not None]
        if answers:
            facts.append((f"{sum(answers)} of {len(answers)}", "answers right"))
        if self.drawn and len(self.results) > 1:
            facts += [
                (f"{self.ranking.found(scores)} of {len(scores)}", f"pictures found by {name}")
                for name, scores in (("ITC", self.ranking.cosines), ("ITM", self.ranking.probabilities))
            ]
        facts.append((f"{self.seconds:.0f} s", "for all of it, on this machine"))
        return facts

    @property
    def queries(self) -> str:
        result = self.results[0]
        return f"Where {_word(len(result.queries))} of the queries look"

    @property
    def ranking_note(self) -> str:
        texts = "Each text is true of one picture" if self.drawn else "Each text is the caption of one picture"
        return (
            f"{texts}, the framed one; a dot marks the one that the model finds. ITC: cosine of the features of text "
            "and picture. ITM: probability that both belong together."
        )


def statement(result: Described) -> str:
    """Whether a caption is true, in words; "" where it is not known."""
    if result.true is None:
        return ""
    return "every statement is true" if result.true else "not every statement is true"


def percent(probability: float) -> str:
    """As people write it: never 100 % of what is not certain."""
    if probability < 0.005:
        return "< 1 %"
    return "> 99 %" if 0.995 <= probability < 1 else f"{100 * probability:.0f} %"


def decimal(value: float) -> str:
    """With two digits, and without a sign where they are zeros."""
    return f"{round(value, 2) + 0.0:.2f}"


def phrase_label(phrase: str) -> str:
    """ "a large plain red circle" without its article."""
    return phrase.split(" ", 1)[1] if phrase.startswith(("a ", "an ")) else phrase


def scaled(scores: np.ndarray, probabilities: bool) -> np.ndarray:
    """Scores as strengths of a colour, 0 to 1."""
    if probabilities:
        return scores
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low) if high > low else np.zeros_like(scores)


def _word(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[number] if number < len(words) else str(number)
