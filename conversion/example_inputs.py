"""Images and texts that two models are compared on: given or drawn, the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from blip2_hf.image_processing import CLIP_MEAN, CLIP_STD
from conversion.sides import ORIGINAL, OpenedSide, hub_file

TEXTS = ("a red ball on the green grass", "two large birds above a blue mountain near the water")
PROMPT = "Question: what is in the picture? Answer:"
LONGEST = 32  # tokens, as in the original's training
_FIRST_ORDINARY = 10  # special tokens of all families have smaller ids, or are at the end


@dataclass(frozen=True)
class Inputs:
    """Two images, each with a text, on the right of which shorter rows are padded.

    Attributes:
        pixels: [2, 3, H, W] float32.
        ids, mask: [2, T]; stage 1: [CLS], words, [SEP]. Generation: the prompt without image placeholders, and
            (decoder-only) the text behind it.
        labels: generation only: [2, T] what is learned of `ids`, or (encoder-decoder) [2, T'] the text; -100 elsewhere.
        question_ids, question_mask: [2, T''] for a question-conditioned Q-Former.
        negatives: [2] for each image the other text, for each text the other image.
        start: id of [DEC]; stage 1 only.
        words: where the ids come from, for the report.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor | None
    question_ids: torch.Tensor | None
    question_mask: torch.Tensor | None
    negatives: torch.Tensor
    start: int | None
    words: str

    def to(self, device: str) -> Inputs:
        moved = {f.name: value.to(device) for f in fields(self) if torch.is_tensor(value := getattr(self, f.name))}
        return replace(self, **moved)


def example_inputs(
    a: OpenedSide, b: OpenedSide, image: str | Path | None = None, texts: Sequence[str] | None = None
) -> Inputs:
    """What both sides are run on: ids by the tokenizer of either, else drawn ids.

    Args:
        image: file of the first image; default: both are drawn.
        texts: one text or two; default: `TEXTS`.

    Raises:
        ValueError: for texts without a tokenizer, an empty or too many texts, an image that cannot be read.
    """
    given = list(TEXTS if texts is None else texts)
    if not 1 <= len(given) <= 2 or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f"`texts` must be one text or two that are not empty, got {given!r}")
    given = given if len(given) == 2 else [given[0], TEXTS[1]]
    size = a.facts["image size"]
    images = [drawn_image(size, seed) if image is None or seed else _opened(image) for seed in range(2)]
    pixels = torch.stack([_normalised(picture, size) for picture in images])
    vocabulary = {name: min(a.vocabularies[name], b.vocabularies[name]) for name in a.vocabularies}
    tokenizer = _tokenizer(a, b)
    if tokenizer is None and texts is not None:
        raise ValueError("`texts` needs a tokenizer, and neither side has one")
    words = "drawn ids (neither side has a tokenizer)" if tokenizer is None else " / ".join(map(repr, given))
    start = question_ids = question_mask = labels = None
    if a.is_retrieval:
        rows = _texts_of(tokenizer, given) if tokenizer else _drawn((9, 14), vocabulary["text"], seed=1)
        start = None if tokenizer is None else tokenizer.bos_token_id
        start = vocabulary["text"] - 1 if start is None else start
        ids, mask = _padded(rows)
    else:
        prompts = _texts_of(tokenizer, [PROMPT] * 2) if tokenizer else _drawn((7, 7), vocabulary["text"], seed=1)
        answers = _answers(tokenizer, given) if tokenizer else _drawn((4, 8), vocabulary["text"], seed=2)
        if a.is_seq2seq:
            ids, mask = _padded(prompts)
            labels, real = _padded(answers)
        else:
            ids, mask = _padded([p + t for p, t in zip(prompts, answers, strict=True)])
            labels, real = _padded([p + t for p, t in zip(prompts, answers, strict=True)])
            labels[:, : len(prompts[0])] = -100
        labels = labels.masked_fill(real == 0, -100)
        if a.facts["questions to the Q-Former"]:
            reader = _load([a.weights.source, b.weights.source], "qformer_tokenizer")
            rows = _texts_of(reader, given) if reader else _drawn((6, 9), vocabulary["question"], seed=3)
            question_ids, question_mask = _padded(rows)
    for name, found in (("text", ids), ("text", labels), ("question", question_ids)):
        if found is not None and int(found.max()) >= vocabulary[name]:
            raise ValueError(f"the tokenizer gives id {int(found.max())}, the vocabulary has {vocabulary[name]}")
    return Inputs(pixels, ids, mask, labels, question_ids, question_mask, torch.tensor([1, 0]), start, words)


def drawn_image(size: int, seed: int) -> Image.Image:
    """A picture with edges, colours and gradients, always the same one for a seed."""
    shades = Image.linear_gradient("L").resize((size, size))
    picture = Image.merge("RGB", (shades, shades.rotate(90 * (1 + seed)), shades.rotate(180)))
    draw, generator = ImageDraw.Draw(picture), torch.Generator().manual_seed(seed)
    for _ in range(12):
        x, y, w, h, *colour = torch.randint(0, 256, (7,), generator=generator).tolist()
        x, y = x * size // 256, y * size // 256
        box = (x, y, x + 1 + w * size // 512, y + 1 + h * size // 512)
        (draw.ellipse if w > h else draw.rectangle)(box, fill=tuple(colour))
    return picture


def _opened(path: str | Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"`image` {path} cannot be read: {error}") from error


def _normalised(image: Image.Image, size: int) -> torch.Tensor:
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(2, 0, 1) / 255 - mean) / std


# -- ids ---------------------------------------------------------------------------------------------------------------


def _tokenizer(a: OpenedSide, b: OpenedSide):
    """That of a folder's processor, else what was named beside a file of the original; None: there is none."""
    named = [side.side.tokenizer if side.is_retrieval else side.side.llm for side in (a, b)]
    folders = [side.weights.source for side in (a, b) if side.engine != ORIGINAL]
    return _load([*folders, *(name for name in named if name is not None)])


def _load(sources: Sequence[str], subfolder: str = ""):
    from transformers import AutoTokenizer

    for source in sources:
        if hub_file(source, f"{subfolder}/tokenizer_config.json" if subfolder else "tokenizer_config.json"):
            return AutoTokenizer.from_pretrained(source, subfolder=subfolder)
    return None


def _texts_of(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [ids[:LONGEST] for ids in tokenizer(list(texts), padding=False)["input_ids"]]


def _answers(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Texts as what follows a prompt: without a start token, with an end token."""
    rows = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids[: LONGEST - 1] + ([] if end is None else [end]) for ids in rows]


def _drawn(lengths: Sequence[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Ids of ordinary words; the last of the vocabulary may be added tokens."""
    generator = torch.Generator().manual_seed(seed)
    last = max(_FIRST_ORDINARY + 1, vocabulary - 10)
    return [torch.randint(_FIRST_ORDINARY, last, (length,), generator=generator).tolist() for length in lengths]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], padded with 0 on the right."""
    longest = max(map(len, rows))
    ids = [[*row, *[0] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
