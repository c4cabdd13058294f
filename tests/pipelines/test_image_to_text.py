"""Captions: the same tokens as `transformers`, every form of input, options, errors."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration as PeerModel,
    Blip2Processor as PeerProcessor,
    GenerationConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)
from transformers.pipelines.pt_utils import KeyDataset

from blip2_hf import EncodedImages, pipeline
from tiny_checkpoints import FAMILIES, PHOTOS, TowerCounter, peer_tokens, photo

GREEDY = {"max_new_tokens": 12}
BEAMS = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def describe(checkpoint):
    """A pipeline on OPT with a prompt."""
    return pipeline("image-to-text", model=checkpoint("opt"), device="cpu", prompt="a photo of", max_new_tokens=6)


def tokens_of(pipe, monkeypatch, *args, **kwargs) -> torch.Tensor:
    """The new tokens behind a pipeline's text."""
    seen = []
    decode = pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda tokens: seen.append(tokens) or decode(tokens))
    pipe(*args, **kwargs)
    (tokens,) = seen
    return tokens


# -- the same as `transformers` --------------------------------------------------------------------------------------


# `transformers` itself cannot run a T5 without a prompt.
PROMPTED = [(family, "a photo of") for family in FAMILIES] + [("opt", None), ("llama", None)]
THREE = {**BEAMS, "num_return_sequences": 3}


@pytest.mark.parametrize("options", [GREEDY, BEAMS, THREE], ids=["greedy", "beams", "three"])
@pytest.mark.parametrize(("family", "prompt"), PROMPTED)
def test_tokens_of_a_real_photo_are_those_of_transformers(family, prompt, options, checkpoint, photos, monkeypatch):
    folder = checkpoint(family)
    peer, processor = PeerModel.from_pretrained(folder), PeerProcessor.from_pretrained(folder)
    expected = peer_tokens(peer, processor, photo("chelsea"), prompt, **options)
    pipe = pipeline("image-to-text", model=folder, device="cpu")
    got = tokens_of(pipe, monkeypatch, photos["chelsea"], prompt=prompt, generate_kwargs=options)
    assert got.tolist() == expected.tolist()
    texts = [text.strip() for text in processor.batch_decode(expected, skip_special_tokens=True)]
    assert pipe(photos["chelsea"], prompt=prompt, generate_kwargs=options) == [{"generated_text": t} for t in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_photo_and_weights_matter(family, checkpoint, photos, monkeypatch) -> None:
    """The comparison above can fail."""
    pipe = pipeline("image-to-text", model=checkpoint(family), device="cpu", prompt="a photo of", max_new_tokens=12)
    tokens = {name: tokens_of(pipe, monkeypatch, photos[name]).tolist() for name in PHOTOS}
    assert tokens["chelsea"] != tokens["astronaut"]
    with torch.no_grad():
        pipe.model.query_tokens.neg_()
    assert tokens_of(pipe, monkeypatch, photos["chelsea"]).tolist() != tokens["chelsea"]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_question_conditioned_tokens_are_those_of_transformers(family, checkpoint, photos, monkeypatch) -> None:
    folder = checkpoint(f"instruct-{family}")
    peer = InstructBlipForConditionalGeneration.from_pretrained(folder)
    processor = InstructBlipProcessor.from_pretrained(folder)
    expected = peer_tokens(peer, processor, photo("coffee"), "what is this ?", **BEAMS)
    pipe = pipeline("image-to-text", model=folder, device="cpu")
    arguments = {"prompt": "what is this ?", "generate_kwargs": BEAMS}
    assert tokens_of(pipe, monkeypatch, photos["coffee"], **arguments).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="`prompt` must be given"):
        pipe(photos["coffee"])


def test_a_model_of_transformers_is_taken_over(checkpoint, photos) -> None:
    folder = checkpoint("llama")
    peer, processor = PeerModel.from_pretrained(folder), PeerProcessor.from_pretrained(folder)
    pipe = pipeline("image-to-text", model=peer, processor=processor, device="cpu")
    ours = pipeline("image-to-text", model=folder, device="cpu")
    assert pipe(photos["chelsea"]) == ours(photos["chelsea"])
    shared = {p.data_ptr() for p in peer.parameters()}
    assert {p.data_ptr() for p in pipe.model.parameters()} == shared
    assert pipe.model.language_model.get_output_embeddings() is peer.language_model.get_output_embeddings()


# -- forms of input --------------------------------------------------------------------------------------------------


def test_every_kind_of_image(describe, photos) -> None:
    path = photos["chelsea"]
    expected = describe(path)
    assert [set(entry) for entry in expected] == [{"generated_text"}]
    content = Path(path).read_bytes()
    image = Image.open(path)
    array = np.asarray(image)
    for same in (Path(path), content, io.BytesIO(content), image, array, torch.from_numpy(array.copy())):
        assert describe(same) == expected, type(same)
    assert describe({"image": path, "id": 7}) == expected
    assert describe(inputs=path) == expected


def test_lists(describe, photos) -> None:
    each = [describe(photos[name]) for name in PHOTOS]
    paths = [photos[name] for name in PHOTOS]
    assert describe(paths) == each
    assert describe(tuple(paths)) == each
    assert describe([{"image": path} for path in paths], batch_size=2) == each
    assert describe([photos["coffee"]]) == each[2:]
    assert describe([]) == []


def test_images_by_the_name_of_transformers_4(describe, photos) -> None:
    paths = [photos["chelsea"], photos["coffee"]]
    assert describe(images=paths[0]) == describe(paths[0])
    assert describe(images=paths) == describe(paths)


def test_a_four_dimensional_array_is_a_list(describe) -> None:
    arrays = np.stack([np.asarray(photo(name).resize((40, 40))) for name in PHOTOS])
    assert describe(arrays) == [describe(array) for array in arrays]


def test_generators_are_read_while_they_are_worked_on(describe, photos) -> None:
    read = []

    def source():
        for name in PHOTOS:
            read.append(name)
            yield photos[name]

    results = describe(source(), batch_size=2)
    assert read == []
    assert next(results) == describe(photos[PHOTOS[0]])
    assert read == list(PHOTOS[:2])
    assert list(results) == [describe(photos[name]) for name in PHOTOS[1:]]
    with pytest.raises(TypeError, match="unknown"):
        len(results)


@pytest.mark.parametrize("workers", [0, 1])
def test_datasets(describe, photos, workers) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(PHOTOS)

        def __getitem__(self, index):
            return {"image": photos[PHOTOS[index]], "label": index}

    expected = [describe(photos[name]) for name in PHOTOS]
    results = describe(Rows(), batch_size=2, num_workers=workers)
    assert len(results) == len(PHOTOS)
    assert list(results) == expected
    assert list(describe(KeyDataset(Rows(), "image"), num_workers=workers)) == expected


def test_a_dataset_of_the_datasets_library(describe, photos) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [photos[name] for name in PHOTOS]})
    rows = rows.cast_column("image", datasets.Image())
    expected = [describe(photos[name]) for name in PHOTOS]
    assert list(describe(rows, batch_size=3)) == expected
    assert list(describe(rows["image"])) == expected


# -- batches and encoded images --------------------------------------------------------------------------------------


def test_images_of_a_batch_go_through_the_tower_together(describe, photos) -> None:
    paths = [photos[name] for name in (*PHOTOS, *PHOTOS)]
    with TowerCounter(describe.model) as tower:
        batched = describe(paths, batch_size=4)
    assert tower.runs == [4, 2]
    with TowerCounter(describe.model) as tower:
        assert describe(paths) == batched
    assert tower.runs == [1] * 6


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_encoded_images_are_not_encoded_again(family, checkpoint, photos) -> None:
    pipe = pipeline("image-to-text", model=checkpoint(family), device="cpu", prompt="a photo of", max_new_tokens=6)
    expected = [pipe(photos["chelsea"]), pipe(photos["coffee"])]
    encoded = [pipe.encode_image(photos["chelsea"]), pipe.encode_image(photos["coffee"])]
    features = [each.image_embeds for each in encoded]
    with TowerCounter(pipe.model) as tower:
        assert isinstance(encoded[0], EncodedImages)
        assert pipe(encoded[0]) == expected[0]
        assert pipe(encoded, batch_size=2) == expected
        assert pipe(image_embeds=encoded[1]) == expected[1]
        assert pipe(image_embeds=features[1]) == pipe(image_embeds=features[1][0]) == expected[1]
        assert pipe([{"image_embeds": each} for each in features], batch_size=2) == expected
    assert tower.runs == []
    with TowerCounter(pipe.model) as tower:
        assert pipe([encoded[0], photos["coffee"]], batch_size=2) == expected
    assert tower.runs == [1]


def test_several_encoded_images_are_a_list_of_single_ones(describe, photos) -> None:
    pixels = describe.processor(images=[photos["chelsea"], photos["coffee"]], return_tensors="pt")
    encoded = describe.model.encode_image(**pixels)
    with pytest.raises(ValueError, match="one encoded image, got 2"):
        describe(encoded)
    assert describe(list(encoded)) == [describe(photos["chelsea"]), describe(photos["coffee"])]


# -- options ---------------------------------------------------------------------------------------------------------


def test_new_text_only(describe, photos) -> None:
    for prompt in ("a photo of", "Question: what is this? Answer:", ""):
        text = describe(photos["chelsea"], prompt=prompt)[0]["generated_text"]
        assert "<image>" not in text and "</s>" not in text and text == text.strip()
        assert not text.startswith("a photo of") or prompt == ""


def test_braces_in_a_prompt_are_text(describe, photos) -> None:
    assert describe(photos["chelsea"], prompt="a {} of") != describe(photos["chelsea"], prompt="a of")


def test_length_limits(checkpoint, photos, monkeypatch) -> None:
    pipe = pipeline("image-to-text", model=checkpoint("llama"), device="cpu")
    assert tokens_of(pipe, monkeypatch, photos["chelsea"]).shape[1] == 30
    assert tokens_of(pipe, monkeypatch, photos["chelsea"], max_new_tokens=4).shape[1] == 4
    prompt = pipe.model.config.num_query_tokens + 1
    limited = tokens_of(pipe, monkeypatch, photos["chelsea"], generate_kwargs={"max_length": prompt + 3})
    assert limited.shape[1] == 3
    pipe.model.generation_config.max_new_tokens = 7  # what the checkpoint says
    assert tokens_of(pipe, monkeypatch, photos["chelsea"]).shape[1] == 7


def test_options_of_a_call_win_over_those_of_the_constructor(checkpoint, photos, monkeypatch) -> None:
    pipe = pipeline(
        "image-to-text",
        model=checkpoint("llama"),
        device="cpu",
        generate_kwargs={"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 9},
    )
    assert tokens_of(pipe, monkeypatch, photos["chelsea"]).shape == (2, 9)
    assert tokens_of(pipe, monkeypatch, photos["chelsea"], max_new_tokens=3).shape == (2, 3)
    fewer = {"num_return_sequences": 1}
    assert tokens_of(pipe, monkeypatch, photos["chelsea"], generate_kwargs=fewer).shape == (1, 9)


def test_a_generation_config_is_taken_whole(describe, photos, monkeypatch) -> None:
    config = GenerationConfig(max_new_tokens=5, num_beams=2, return_dict_in_generate=True)
    expected = describe(photos["chelsea"], generate_kwargs={"max_new_tokens": 5, "num_beams": 2})
    assert describe(photos["chelsea"], generate_kwargs={"generation_config": config}) == expected


def test_sampling_is_repeatable(describe, photos) -> None:
    model, processor = describe.model, describe.processor
    inputs = processor(images=photos["chelsea"], text="a photo of", return_tensors="pt")
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}
    torch.manual_seed(3)
    sequences = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]
    torch.manual_seed(3)
    (result,) = describe([photos["chelsea"]], generate_kwargs=options)  # a list: through the data loader
    assert [entry["generated_text"] for entry in result] == texts


def test_a_model_in_training_keeps_its_mode(describe, photos) -> None:
    model, expected = describe.model, describe(photos["chelsea"])
    model.train()
    model.qformer.eval()
    try:
        modes = [module.training for module in model.modules()]
        assert any(modes) and not all(modes)
        assert describe(photos["chelsea"]) == expected
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress(describe, photos, progress, shown, capsys) -> None:
    describe([photos[name] for name in PHOTOS], progress=progress)
    assert ("3/3" in capsys.readouterr().err) == shown  # None: only at a terminal
    list(describe((photos[name] for name in PHOTOS), progress=progress))
    assert ("3it" in capsys.readouterr().err) == shown
    describe(photos["chelsea"], progress=progress)
    assert capsys.readouterr().err == ""


# -- errors ----------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named(describe, photos, tmp_path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ValueError, match="broken.jpg"):
        describe(str(broken))
    with pytest.raises(ValueError, match="broken.jpg"):
        describe([photos["chelsea"], broken], batch_size=2)
    with pytest.raises(ValueError, match="missing.png.*no such file"):
        describe(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="missing.png"):
        describe.encode_image(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `inputs`, `images` and `image_embeds`, got none"),
        ({"inputs": "a.png", "image_embeds": torch.zeros(1, 5, 32)}, "got `inputs` and `image_embeds`"),
        ({"inputs": "a.png", "images": "a.png"}, "got `inputs` and `images`"),
        ({"images": 3}, "`inputs` must be an image, a list, a dataset or a generator, got int"),
        ({"inputs": 3}, "`inputs` must be an image, a list, a dataset or a generator, got int"),
        ({"inputs": [["a.png"]]}, "`inputs` must be a path"),
        ({"inputs": {"picture": "a.png"}}, "`inputs` as a dictionary must have"),
        ({"image_embeds": torch.zeros(2, 5, 32)}, "`image_embeds` must be one encoded image"),
        ({"inputs": "a.png", "batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"inputs": "a.png", "prompt": ["a", "b"]}, "`prompt` must be a string, got list"),
        ({"inputs": "a.png", "generate_kwargs": {"input_ids": 1}}, "`generate_kwargs` must not have input_ids"),
        ({"inputs": "a.png", "max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 3}}, "given twice"),
    ],
)
def test_wrong_arguments(describe, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        describe(**arguments)


def test_unknown_arguments(describe, checkpoint, photos) -> None:
    with pytest.raises(TypeError, match="num_beam"):
        describe(photos["chelsea"], num_beam=5)
    with pytest.raises(TypeError, match="num_beam"):
        pipeline("image-to-text", model=checkpoint("opt"), num_beam=5)
