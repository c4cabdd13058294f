"""`blip2_hf.pipeline`: tasks, names, models and processors; `transformers.pipeline` with our classes."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    Blip2ForConditionalGeneration as PeerModel,
    Blip2ForImageTextRetrieval as PeerRetrieval,
    Blip2Processor as PeerProcessor,
)

import blip2_hf
import tiny_tokenizers
from blip2_hf import (
    Blip2ForConditionalGeneration,
    Blip2ImageToTextPipeline,
    Blip2Processor,
    Blip2VisualQuestionAnsweringPipeline,
    pipeline,
)
from tiny_checkpoints import FAMILIES

OPTIONS = {"prompt": "a photo of", "max_new_tokens": 6}


@pytest.mark.parametrize("task", ["image-text-to-text", "text-generation", "image-classification", None])
def test_other_tasks_go_to_transformers_unchanged(task, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(transformers, "pipeline", lambda *args, **kwargs: seen.append((args, kwargs)) or "theirs")
    assert pipeline(task, "some/model", "config", tokenizer="tokenizer", device=3) == "theirs"
    assert pipeline(task) == "theirs"
    assert seen == [((task, "some/model", "config"), {"tokenizer": "tokenizer", "device": 3}), ((task, None), {})]


def test_unknown_task_is_an_error_of_transformers() -> None:
    with pytest.raises(KeyError, match="image-to-sound"):
        pipeline("image-to-sound")


def test_classes_of_our_tasks(checkpoint) -> None:
    folder = checkpoint("opt")
    assert type(pipeline("image-to-text", model=folder)) is Blip2ImageToTextPipeline
    assert type(pipeline("image-to-text", Path(folder))) is Blip2ImageToTextPipeline
    for task in ("visual-question-answering", "vqa"):
        assert type(pipeline(task, folder)) is Blip2VisualQuestionAnsweringPipeline
    assert blip2_hf.pipeline is pipeline


def test_short_name_is_a_local_folder_of_that_name(checkpoint, photos, tmp_path, monkeypatch) -> None:
    (tmp_path / "blip2-opt-2.7b").symlink_to(checkpoint("opt"))
    monkeypatch.chdir(tmp_path)
    assert pipeline("image-to-text", model="blip2-opt-2.7b")(photos["chelsea"])[0]["generated_text"]


def test_short_name_without_folder_is_the_hubs(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Salesforce/blip2-opt-2.7b"):
        pipeline("image-to-text", model="blip2-opt-2.7b")


def test_model_and_processor_objects(checkpoint, photos) -> None:
    folder = checkpoint("opt")
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    expected = pipeline("image-to-text", model=folder)(photos["chelsea"], **OPTIONS)
    peer = PeerProcessor.from_pretrained(folder)
    for arguments in (
        {"processor": processor},
        {"processor": folder},
        {"processor": peer},
        {},  # found where the model is from
        {"tokenizer": peer.tokenizer, "image_processor": peer.image_processor},
    ):
        pipe = pipeline("image-to-text", model=model, **arguments)
        assert pipe.model is model and isinstance(pipe.processor, Blip2Processor)
        assert pipe(photos["chelsea"], **OPTIONS) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_dtype(dtype, checkpoint, photos) -> None:
    pipe = pipeline("image-to-text", model=checkpoint("opt"), device="cpu", dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert pipe.model.language_model.dtype == pipe.model.vision_model.dtype == expected
    assert isinstance(pipe(photos["chelsea"])[0]["generated_text"], str)


def test_older_name_of_dtype(checkpoint) -> None:
    folder = checkpoint("opt")
    assert pipeline("image-to-text", model=folder, torch_dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert pipeline("vqa", model=folder, torch_dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` and `torch_dtype`"):
        pipeline("image-to-text", model=folder, dtype="float16", torch_dtype="float16")
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="`dtype` is for a model that is loaded by name"):
        pipeline("image-to-text", model=model, torch_dtype="float16")


@pytest.mark.parametrize("pipeline_class", [Blip2ImageToTextPipeline, Blip2VisualQuestionAnsweringPipeline])
def test_classes_refuse_what_transformers_drops_in_silence(pipeline_class, checkpoint) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint("opt"))
    for name in ("dtype", "torch_dtype"):
        for dtype in (torch.bfloat16, "bfloat16"):
            with pytest.raises(ValueError, match=f"`{name}` cannot be .*bfloat16 for a model that is loaded already"):
                pipeline_class(model, **{name: dtype})
        for dtype in (torch.float32, "float32", "auto", None):
            assert pipeline_class(model, **{name: dtype}).model.dtype == torch.float32
    with pytest.raises(TypeError, match="`args_parser`"):
        pipeline_class(model, args_parser=print)


def test_a_connector_has_the_processor_of_its_checkpoint(checkpoint, photos, tmp_path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint("opt"))
    with torch.no_grad():
        model.query_tokens += 1
    model.save_pretrained(tmp_path, connector_only=True)
    assert not list(tmp_path.glob("*processor*")) and not list(tmp_path.glob("token*"))
    processor = Blip2Processor.from_pretrained(checkpoint("opt"))
    expected = pipeline("image-to-text", model=model, processor=processor)(photos["chelsea"], **OPTIONS)
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), loaded):
        assert pipeline("image-to-text", model=source)(photos["chelsea"], **OPTIONS) == expected


def test_dtype_of_the_checkpoint_is_the_default(checkpoint, tmp_path) -> None:
    assert pipeline("image-to-text", model=checkpoint("opt")).model.dtype == torch.float32
    pipeline("image-to-text", model=checkpoint("opt"), dtype="bfloat16").save_pretrained(tmp_path)
    assert pipeline("image-to-text", model=tmp_path).model.dtype == torch.bfloat16


def test_save_and_load(checkpoint, photos, tmp_path) -> None:
    pipe = pipeline("image-to-text", model=checkpoint("llama"))
    pipe.save_pretrained(tmp_path)
    assert pipeline("image-to-text", model=tmp_path)(photos["coffee"]) == pipe(photos["coffee"])
    PeerProcessor.from_pretrained(tmp_path)
    PeerModel.from_pretrained(tmp_path)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_is_needed() -> None:
    with pytest.raises(ValueError, match="`model` must be given for 'image-to-text'"):
        pipeline("image-to-text")


def test_models_of_another_kind(checkpoint) -> None:
    with pytest.raises(ValueError, match="not a checkpoint of Blip2ForConditionalGeneration"):
        pipeline("image-to-text", model=checkpoint("retrieval"))
    with pytest.raises(ValueError, match="`model` must be a Blip2ForConditionalGeneration.*Linear"):
        pipeline("image-to-text", model=torch.nn.Linear(2, 2))
    peer = PeerRetrieval.from_pretrained(checkpoint("retrieval"))
    with pytest.raises(ValueError, match="`model` must be a Blip2ForConditionalGeneration"):
        pipeline("image-to-text", model=peer)


def test_arguments_that_exclude_each_other(checkpoint) -> None:
    folder = checkpoint("opt")
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="`dtype` is for a model that is loaded by name"):
        pipeline("image-to-text", model=model, dtype="float16")
    with pytest.raises(ValueError, match="`device` and `device_map`"):
        pipeline("image-to-text", model=folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="two positional arguments"):
        pipeline("image-to-text", folder, None, None)


def test_a_missing_processor(checkpoint) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint("opt"))
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="`processor` must be given"):
        pipeline("image-to-text", model=model)
    model.config._name_or_path = "nobody/nothing"
    with pytest.raises(ValueError, match="`processor` must be given.*nobody/nothing"):
        pipeline("image-to-text", model=model)
    with pytest.raises(ValueError, match="`processor` must be a Blip2Processor"):
        pipeline("image-to-text", model=model, processor=3)


def test_a_processor_that_does_not_fit(checkpoint) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint("opt"))
    peer = PeerProcessor.from_pretrained(checkpoint("opt"))
    wrong = [
        Blip2Processor(peer.image_processor, peer.tokenizer, num_query_tokens=7),
        Blip2Processor(peer.image_processor, peer.tokenizer),
        PeerProcessor.from_pretrained(checkpoint("t5")),
    ]
    for processor in wrong:
        with pytest.raises(ValueError, match="`processor` does not fit the model: it writes"):
            pipeline("image-to-text", model=model, processor=processor)
    reading = Blip2Processor(
        peer.image_processor,
        peer.tokenizer,
        num_query_tokens=4,
        qformer_tokenizer=tiny_tokenizers.tiny_bert_tokenizer(),
    )
    with pytest.raises(ValueError, match="its `qformer_tokenizer` must be None"):
        pipeline("image-to-text", model=model, processor=reading)


# -- `transformers.pipeline` -----------------------------------------------------------------------------------------


def their_pipeline(model, **kwargs):
    """`transformers.pipeline` for image-to-text, a name that 5.23 redirects and 5.17 does not know."""
    for task in ("image-to-text", "image-text-to-text"):
        try:
            return transformers.pipeline(task, model=model, device="cpu", **kwargs)
        except KeyError:
            continue
    raise AssertionError


@pytest.fixture(autouse=True)
def quiet_logging():
    """A line of `transformers` about its renamed task has arguments that logging cannot format."""
    import logging

    before, logging.raiseExceptions = logging.raiseExceptions, False
    yield
    logging.raiseExceptions = before


@pytest.mark.parametrize("family", FAMILIES)
def test_our_class_in_their_function(family, checkpoint, photos) -> None:
    folder = checkpoint(family)
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    expected = pipeline("image-to-text", model=model, processor=processor)(photos["chelsea"], **OPTIONS)
    pipe = their_pipeline(model, processor=processor, pipeline_class=Blip2ImageToTextPipeline)
    assert type(pipe) is Blip2ImageToTextPipeline and pipe.model is model and pipe.processor is processor
    assert pipe(photos["chelsea"], **OPTIONS) == expected
    pipe = their_pipeline(folder, pipeline_class=Blip2ImageToTextPipeline, dtype="bfloat16")
    assert pipe.model.dtype == torch.bfloat16
    pipe = their_pipeline(folder, pipeline_class=Blip2ImageToTextPipeline, batch_size=2, **OPTIONS)
    assert isinstance(pipe.model, Blip2ForConditionalGeneration)
    assert pipe([photos["chelsea"]] * 3) == [expected] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_our_model_in_their_class(family, checkpoint, photos) -> None:
    folder = checkpoint(family)
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    ours = pipeline("image-to-text", model=model, processor=processor)
    theirs = transformers.pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    (result,) = theirs(photos["chelsea"], text="a photo of", max_new_tokens=6, return_full_text=False)
    assert result["generated_text"].strip() == ours(photos["chelsea"], **OPTIONS)[0]["generated_text"]
    assert result["input_text"] == "a photo of"
