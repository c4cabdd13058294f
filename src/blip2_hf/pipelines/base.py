"""What both pipelines share: batches of images and texts through tower, Q-Former and language model.

Shapes: I images and R rows of text in a batch, P image tokens, E width of the tower, S positions of a prompt.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.pipelines.base import Pipeline
from transformers.utils import logging

from ..modeling.encoded import EncodedImages
from ..presets import with_defaults
from ..reading_ahead import read_ahead
from .components import find_processor, our_model
from .requests import Preparer, Request, ToRequests, as_list, is_image, lazily

logger = logging.get_logger(__name__)

# Options of `generate` that the pipelines set themselves.
_RESERVED = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_MODEL_INPUTS = ("pixel_values", "image_embeds", "vision_features", "input_ids", "inputs_embeds", "attention_mask")
_MODEL_INPUTS += ("qformer_input_ids", "qformer_attention_mask")


class Results:
    """The results for a dataset or generator, one after the other; computed while they are asked for."""

    def __init__(self, iterator: Iterator[Any], total: int | None) -> None:
        self._iterator, self._total = iterator, total

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("the length of a generator's results is unknown")
        return self._total


class Blip2Pipeline(Pipeline):
    """Base class; see `Blip2ImageToTextPipeline` and `Blip2VisualQuestionAnsweringPipeline`.

    Args:
        model: a `Blip2ForConditionalGeneration`, ours or `transformers`' (its weights are taken over, not copied).
        processor: its processor, ours or `transformers`'. None: made of `tokenizer` and `image_processor` if these
            are given, else loaded from where the model came from.
        device, num_workers: as in `transformers.Pipeline`.
        batch_size: how many images (and rows of text) go through the model together.
        progress: whether to show a bar for lists and datasets; None: if standard error is a terminal.
        kwargs: what a call takes as well; the defaults of every call.

    Raises:
        ValueError: for another model, or a missing processor, or one that does not fit the model; for a `dtype` that
            the model does not have (it is converted where it is loaded: `blip2_hf.pipeline(..., dtype=...)`).
        TypeError: for arguments that nobody takes.
    """

    # The processor is found by ourselves: `transformers` would load its own class.
    _load_processor = False
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> None:
        model = our_model(model)
        _check_dropped(model, kwargs)
        image_processor = feature_extractor if image_processor is None else image_processor
        processor = find_processor(model, processor, tokenizer, image_processor)
        if kwargs.get("batch_size") is not None:
            check_batch_size(kwargs["batch_size"])
        self._progress = progress
        super().__init__(model=model, processor=processor, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor; `kwargs` are the model's."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    # -- options -----------------------------------------------------------------------------------------------------

    def _sanitize_parameters(
        self,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        options = dict(generate_kwargs or {})
        taken = sorted(options.keys() & {*_RESERVED, *_MODEL_INPUTS})
        if taken:
            raise ValueError(f"`generate_kwargs` must not have {', '.join(taken)}: the pipeline sets them")
        if max_new_tokens is not None:
            if "max_new_tokens" in options:
                raise ValueError("`max_new_tokens` is given twice: by itself and in `generate_kwargs`")
            options["max_new_tokens"] = max_new_tokens
        prepare = {"prompt": prompt, "timeout": timeout}
        return _given(prepare), {"generate_kwargs": options} if options else {}, {}

    def _options(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of this call over those of the constructor: for `preprocess` and for `_forward`."""
        prepare, forward, _ = self._sanitize_parameters(**given)
        prepare, forward = {**self._preprocess_params, **prepare}, {**self._forward_params, **forward}
        options = with_defaults(forward.get("generate_kwargs", {}), self._forward_params.get("generate_kwargs", {}))
        return prepare, {**forward, "generate_kwargs": with_defaults(options, self._default_options())}

    @abstractmethod
    def _default_options(self) -> dict[str, Any]:
        """Generation options for what neither caller nor constructor say."""

    @abstractmethod
    def _default_prompt(self) -> str | None:
        """The prompt if none is given."""

    # -- running -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        requests: list[Request] | Dataset,
        total: int | None,
        *,
        batch_size: int | None,
        num_workers: int | None,
        progress: bool | None,
        show: bool,
        **given: Any,
    ) -> Iterator[Any]:
        """The result of each item of the requests. Options are checked at once, images and texts when it is run."""
        prepare, forward = self._options(**given)
        if batch_size is None:
            batch_size = self._batch_size or 1
        check_batch_size(batch_size)
        workers = (self._num_workers if num_workers is None else num_workers) or 0
        if workers > 1 and not hasattr(requests, "__len__"):
            logger.warning("`num_workers` is 1 for generators and iterable datasets: several would repeat the inputs")
            workers = 1
        preparer = self._preparer(**prepare)
        if workers == 0 and isinstance(requests, list):
            # Images only: a tokenizer cannot be used in two threads. And lists only: a generator may wait for what
            # the caller does with a result.
            chunks = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
            batches = map(preparer, read_ahead(preparer.read, chunks, workers=int(len(chunks) > 1), ahead=1))
        else:
            batches = DataLoader(
                requests,
                batch_size=batch_size,
                num_workers=workers,
                collate_fn=preparer,
                generator=torch.Generator(),  # else it draws from the global one, and sampled texts change
            )
        progress = self._progress if progress is None else progress
        hidden = True if not show else None if progress is None else not progress
        return self._batches(batches, forward | {"batch_size": batch_size}, total, hidden)

    def _batches(self, batches: Iterable, forward: dict[str, Any], total: int | None, hidden: bool | None):
        with tqdm(total=total, disable=hidden, desc=self.task or None) as bar:
            for batch in batches:
                for result in self.postprocess(self.forward(batch, **forward)):
                    bar.update()
                    yield result

    def _answer(self, inputs: Any, to_requests: ToRequests, **options: Any) -> Any:
        """Results in the form of the inputs: of one input itself, of a list a list, of a dataset an iterator."""
        if isinstance(inputs, dict) or is_image(inputs):
            return next(self._run(to_requests([inputs]), 1, show=False, **options))
        items = as_list(inputs)
        if items is not None:
            requests = to_requests(items)
            return list(self._run(requests, len(items), show=len(items) > 1, **options)) if requests else []
        requests = lazily(inputs, to_requests)
        total = len(requests) if hasattr(requests, "__len__") else None
        return Results(self._run(requests, total, show=True, **options), total)

    def _preparer(self, prompt: str | None = None, timeout: float | None = None) -> Preparer:
        prompt = self._default_prompt() if prompt is None else prompt
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"`prompt` must be a string, got {type(prompt).__name__}")
        if prompt is None and self.model.config.qformer_config.use_qformer_text_input:
            raise ValueError("`prompt` must be given, got None: this model's Q-Former reads it too")
        return Preparer(self.processor, self.model.config, prompt, timeout)

    def preprocess(self, inputs: list[Request], **options: Any) -> dict[str, Any]:
        """The tensors of one batch (see `Preparer`)."""
        return self._preparer(**options)(inputs)

    # -- the model ---------------------------------------------------------------------------------------------------

    def encode_image(self, image: Any, timeout: float | None = None) -> EncodedImages:
        """Encodes one image, for any number of calls with it as `image_embeds`.

        Raises:
            ValueError: if it is not an image that can be read, naming it.
        """
        preparer = Preparer(self.processor, self.model.config, None, timeout)
        batch = self._ensure_tensor_on_device(preparer([Request(image=image)]), self.device)
        with self.device_placement(), torch.no_grad(), _evaluating(self.model):
            return self.model.encode_image(batch["pixel_values"])

    def _forward(
        self,
        batch: dict[str, Any],
        generate_kwargs: dict[str, Any],
        batch_size: int = 1,
        **settings: Any,
    ) -> dict[str, Any]:
        """What is generated for each row, `batch_size` rows at a time; every image is encoded once."""
        options = dict(generate_kwargs)
        interpolate = options.pop("interpolate_pos_encoding", False)
        rows = batch["image_of_row"]
        generated = []
        with _evaluating(self.model):
            images = self._images(batch, interpolate)
            for start in range(0, len(rows), batch_size):
                chunk = slice(start, start + batch_size)
                text = {name: tensor[chunk] for name, tensor in batch["text"].items()}
                inputs = {**text, **_select(images, rows[chunk]), "interpolate_pos_encoding": interpolate}
                generated += self._generate(inputs, options, **settings)
        return {"rows": generated, "sizes": batch["sizes"]}

    def _images(self, batch: dict[str, Any], interpolate: bool) -> dict[str, Any]:
        """The images as an argument of `generate`: encoded first wherever an image has several rows."""
        pixel_values, embeds = batch["pixel_values"], batch["embeds"]
        each_once = len(batch["image_of_row"]) == len(embeds)
        if all(given is None for given in embeds):
            if each_once:
                return {"pixel_values": pixel_values}
            encoded = self.model.encode_image(pixel_values, interpolate_pos_encoding=interpolate)
            return {"image_embeds": encoded}
        if len(embeds) == 1 and isinstance(embeds[0], EncodedImages):
            return {"image_embeds": embeds[0].to(self.device)}
        computed = iter(())
        if pixel_values is not None:
            features = self.model.vision_model(pixel_values, interpolate_pos_encoding=interpolate)
            computed = iter(features.last_hidden_state.split(1))
        parts = [next(computed) if given is None else _features(given) for given in embeds]
        features = torch.cat([part.to(self.device, parts[0].dtype) for part in parts])
        return {"image_embeds": features if each_once else self.model.encode_image(image_embeds=features)}

    @abstractmethod
    def _generate(self, inputs: dict[str, Any], options: dict[str, Any]) -> list[Any]:
        """The result of each row."""

    def new_tokens(self, sequences: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """[sequences, new tokens]: what `generate` added to the prompt ids [R, S]."""
        start = 1 if self.model.config.is_encoder_decoder else prompt.shape[1]
        return sequences[:, start:]

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Texts of new tokens [sequences, T], without special tokens and surrounding whitespace."""
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def postprocess(self, model_outputs: dict[str, Any]) -> Iterator[Any]:
        """The result of each item: one row's, or a list of several rows'."""
        rows = iter(model_outputs["rows"])
        for size in model_outputs["sizes"]:
            yield next(rows) if size is None else [next(rows) for _ in range(size)]


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError unless `batch_size` is a positive integer."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}")


def _check_dropped(model: torch.nn.Module, given: dict[str, Any]) -> None:
    """Raises for arguments that `transformers.Pipeline` drops in silence.

    Its function `pipeline` hands on the dtype that it has loaded the model in, which is not an error.
    """
    if given.get("args_parser") is not None:
        raise TypeError("`args_parser` is not an argument of this pipeline")
    for name in ("dtype", "torch_dtype"):
        dtype = given.get(name)
        expected = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if expected not in (None, "auto") and all(tensor.dtype != expected for tensor in model.parameters()):
            raise ValueError(
                f"`{name}` cannot be {dtype} for a model that is loaded already, in {model.dtype}: load it with "
                f"`dtype`, or convert it with `model.to({expected})`"
            )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _features(given: EncodedImages | torch.Tensor) -> torch.Tensor:
    return given.image_embeds if isinstance(given, EncodedImages) else given


def _select(images: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The images of some rows; one image for all of them is not repeated."""
    (name, value) = next(iter(images.items()))
    if len(value) == 1 or rows == list(range(len(value))):
        return images
    if len(set(rows)) == 1:
        return {name: value[rows[:1]]}
    return {name: value[rows]}


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, also if somebody is training the model; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
