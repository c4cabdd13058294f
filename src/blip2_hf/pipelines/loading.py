"""`blip2_hf.pipeline`: the tasks of BLIP-2 here, every other one in `transformers`."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..modeling.generation import Blip2ForConditionalGeneration
from ..processing import Blip2Processor
from .base import Blip2Pipeline
from .image_to_text import Blip2ImageToTextPipeline
from .visual_question_answering import Blip2VisualQuestionAnsweringPipeline

_CLASSES: dict[str, type[Blip2Pipeline]] = {
    "image-to-text": Blip2ImageToTextPipeline,
    "visual-question-answering": Blip2VisualQuestionAnsweringPipeline,
    "vqa": Blip2VisualQuestionAnsweringPipeline,
}


def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A pipeline for a task, as `transformers.pipeline`, with the two that its version 5 no longer has.

    Args:
        task: "image-to-text" gives a `Blip2ImageToTextPipeline`, "visual-question-answering" (or "vqa") a
            `Blip2VisualQuestionAnsweringPipeline`, with the arguments below. Any other task is handed to
            `transformers.pipeline` with all arguments as they are.
        model: a folder, a Hub id, the short name of a released checkpoint ("blip2-opt-2.7b"), or a
            `Blip2ForConditionalGeneration`.
        processor: a `Blip2Processor`, or the name or folder of one; default: the model's.
        device: "cpu", "cuda:1", a number, …; default: the first accelerator, else the CPU.
        dtype: of the weights: a `torch.dtype`, its name, or "auto", what the checkpoint has (the default).
            `torch_dtype` is its older name.
        device_map, revision, token, model_kwargs: further arguments of `from_pretrained` of the model; `revision` and
            `token` of the processor, too.
        batch_size, num_workers, progress: see `Blip2Pipeline`.
        kwargs: what a call takes (`prompt`, `max_new_tokens`, `generate_kwargs`, …): the defaults of every call.

    Raises:
        ValueError: without a model, or for one of another kind, or for arguments that do not go together.
        OSError: if there is no such checkpoint.
    """
    if task not in _CLASSES:
        import transformers

        return transformers.pipeline(task, model, *args, **kwargs)
    if args:
        raise ValueError(f"`pipeline` takes two positional arguments for {task!r} (task, model), got {2 + len(args)}")
    return _build(task, model, **kwargs)


def _build(
    task: str,
    model: Any,
    *,
    processor: Any = None,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Blip2Pipeline:
    if model is None:
        raise ValueError(
            f"`model` must be given for {task!r}: a folder, a Hub id or a short name like 'blip2-opt-2.7b'"
        )
    if torch_dtype is not None:
        if dtype is not None:
            raise ValueError("`dtype` and `torch_dtype`, its older name, exclude each other")
        dtype = torch_dtype
    loading = {"dtype": dtype, "device_map": device_map, "revision": revision, "token": token}
    loading = {name: value for name, value in loading.items() if value is not None} | (model_kwargs or {})
    if isinstance(model, str | os.PathLike):
        if device is not None and "device_map" in loading:
            raise ValueError("`device` and `device_map` exclude each other")
        if processor is None and not {"tokenizer", "image_processor"} <= options.keys():
            hub = {name: loading[name] for name in ("revision", "token") if name in loading}
            processor = Blip2Processor.from_pretrained(model, **hub)
        loading.setdefault("dtype", "auto")
        model = Blip2ForConditionalGeneration.from_pretrained(model, **loading)
    elif loading:
        raise ValueError(f"`{sorted(loading)[0]}` is for a model that is loaded by name, got a {type(model).__name__}")
    return _CLASSES[task](model=model, processor=processor, task=task, device=device, **options)
