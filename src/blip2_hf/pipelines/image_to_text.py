"""Captions, and any other text after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from ..modeling.encoded import EncodedImages
from .base import Blip2Pipeline, Results
from .requests import Request, one_embedding, one_image

# Where neither the caller nor the checkpoint limits the length: the paper's longest caption.
_MAX_NEW_TOKENS = 30

Generated = list[dict[str, str]]


class Blip2ImageToTextPipeline(Blip2Pipeline):
    """Image (and prompt) to text: `pipeline("image-to-text", model="blip2-opt-2.7b")("photo.jpg")`.

    Inputs and outputs are those of `transformers` 4. Generation is what the checkpoint says (greedy where it says
    nothing), up to 30 new tokens; the paper's captions have `prompt="a photo of"` and `generate_kwargs={"num_beams":
    5, "min_new_tokens": 8}`, see `blip2_hf.presets`.

    Arguments of the constructor: see `Blip2Pipeline`; what a call takes may be given there too.
    """

    def __call__(
        self,
        inputs: Any = None,
        *,
        images: Any = None,
        image_embeds: EncodedImages | torch.Tensor | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Generated | list[Generated] | Results:
        """
        Args:
            inputs: an image: path, URL, bytes, file object, PIL image, array, or one image from `encode_image`; a
                list of them; a dataset or generator of them, or of dictionaries with "image", "image_embeds" or
                "pixel_values" (float [3, H, W], as the image processor gives it). While the model works on a batch of
                a list, the next one is read.
            images: instead of `inputs`: another name of it, as in `transformers` 4.
            image_embeds: instead of `inputs`: one encoded image, or its features [1, P, E] after `ln_vision`.
            prompt: text that the model continues; the same for all images. Default: none.
            max_new_tokens: longest text in tokens.
            generate_kwargs: any option of `GenerationMixin.generate`.
            batch_size, num_workers, progress: as in the constructor, for this call.
            timeout: seconds after which a URL is given up.

        Returns:
            For one image `[{"generated_text": ...}]`, with as many entries as `num_return_sequences`; for a list a
            list of such lists; for a dataset or generator an iterator over them. The text is the new one only.

        Raises:
            ValueError: for an image that cannot be read, naming it; for wrong arguments, naming them.
        """
        named = {"inputs": inputs, "images": images, "image_embeds": image_embeds}
        given = [name for name, value in named.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(f"give exactly one of `inputs`, `images` and `image_embeds`, got {got}")
        if images is not None:
            inputs = images
        elif image_embeds is not None:
            inputs = {"image_embeds": one_embedding(image_embeds, "image_embeds")}
        return self._answer(
            inputs,
            _requests,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=progress,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            generate_kwargs=generate_kwargs,
            timeout=timeout,
        )

    def _default_prompt(self) -> None:
        return None

    def _default_options(self) -> dict[str, Any]:
        language_model = self.model.language_model
        for config in (self.model.generation_config, language_model.generation_config):
            if config.to_diff_dict().keys() & {"max_new_tokens", "max_length"}:
                return {}
        return {"max_new_tokens": _MAX_NEW_TOKENS}

    def _generate(self, inputs: dict[str, Any], options: dict[str, Any]) -> list[Generated]:
        sequences = self.model.generate(**inputs, **options, return_dict_in_generate=False)
        texts = self.decode(self.new_tokens(sequences, inputs["input_ids"]))
        each = len(texts) // len(inputs["input_ids"])
        return [
            [{"generated_text": text} for text in texts[start : start + each]] for start in range(0, len(texts), each)
        ]


def _requests(items: list[Any]) -> list[Request]:
    return [Request(**one_image(item, "inputs")) for item in items]
