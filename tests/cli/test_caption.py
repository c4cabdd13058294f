"""`blip2 caption`."""

import json

import pytest
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blip2_hf import pipeline
from blip2_hf.presets import CAPTIONING
from tiny_checkpoints import FAMILIES, PHOTOS, peer_tokens, photo


def peer_caption(folder: str, name: str, prompt: str | None, **options) -> str:
    """What `transformers` writes about a photo."""
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    tokens = peer_tokens(model, processor, photo(name), prompt, **options)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_those_of_transformers(family, blip2, checkpoint, photos) -> None:
    folder = checkpoint(family)
    for name in ("chelsea", "astronaut"):
        default = blip2("caption", photos[name], "--model", folder, "--json")
        assert json.loads(default.out[0])["caption"] == peer_caption(folder, name, "a photo of", **CAPTIONING)
        flags = ["--prompt", "this is a", "--num-beams", "1", "--max-new-tokens", "7"]
        greedy = blip2("caption", photos[name], "--model", folder, "--json", *flags)
        expected = peer_caption(folder, name, "this is a", max_new_tokens=7)
        assert json.loads(greedy.out[0])["caption"] == expected
        assert default.out != greedy.out


def test_without_a_prompt(blip2, checkpoint, photos) -> None:
    folder = checkpoint("opt")
    done = blip2("caption", photos["coffee"], "--model", folder, "--prompt", "", "--num-beams", "1", "--json")
    assert json.loads(done.out[0])["caption"] == peer_caption(folder, "coffee", None, max_new_tokens=30)
    assert json.loads(done.out[0])["prompt"] == ""


def test_a_connector_without_processor_files(blip2, checkpoint, photos, tmp_path) -> None:
    from blip2_hf import Blip2ForConditionalGeneration

    Blip2ForConditionalGeneration.from_pretrained(checkpoint("opt")).save_pretrained(tmp_path, connector_only=True)
    expected = blip2("caption", photos["chelsea"], "--model", checkpoint("opt"))
    done = blip2("caption", photos["chelsea"], "--model", tmp_path)
    assert (done.code, done.err, done.out) == (0, [], expected.out)


def test_json_is_one_object_per_image(blip2, checkpoint, photos) -> None:
    paths = [photos[name] for name in PHOTOS]
    done = blip2("caption", *paths, "--model", checkpoint("llama"), "--json", "--batch-size", "2")
    assert (done.code, done.err) == (0, [])
    rows = [json.loads(line) for line in done.out]
    assert [set(row) for row in rows] == [{"image", "caption", "prompt", "model"}] * 3
    assert [row["image"] for row in rows] == paths
    assert rows[0]["prompt"] == "a photo of" and rows[0]["model"] == checkpoint("llama")
    alone = [blip2("caption", path, "--model", checkpoint("llama")).out for path in paths]
    assert [[row["caption"]] for row in rows] == alone


def test_text_has_the_names_of_several_images(blip2, checkpoint, photos) -> None:
    one = blip2("caption", photos["coffee"], "--model", checkpoint("t5"))
    two = blip2("caption", photos["chelsea"], photos["coffee"], "--model", checkpoint("t5"))
    assert len(one.out) == 1
    assert two.out[1] == f"{photos['coffee']}: {one.out[0]}"


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_other_images_are_processed_when_some_cannot_be_read(blip2, checkpoint, photos, broken, batch_size) -> None:
    good = [photos["chelsea"], photos["coffee"]]
    expected = blip2("caption", *good, "--model", checkpoint("opt"), "--json")
    arguments = [broken, good[0], "missing.png", good[1], broken]
    done = blip2("caption", *arguments, "--model", checkpoint("opt"), "--json", "--batch-size", batch_size)
    assert done.code == 2
    assert done.out == expected.out
    assert len(done.err) == 3
    assert "broken.jpg" in done.err[0] and "missing.png" in done.err[1] and "broken.jpg" in done.err[2]


def test_lengths(blip2, checkpoint, photos) -> None:
    pipe = pipeline("image-to-text", model=checkpoint("llama"), device="cpu", prompt="a photo of")

    def caption(*flags: str) -> list[str]:
        return blip2("caption", photos["chelsea"], "--model", checkpoint("llama"), *flags).out

    def expected(**options) -> list[str]:
        return [pipe(photos["chelsea"], generate_kwargs=options)[0]["generated_text"]]

    assert caption() == expected(num_beams=5, max_new_tokens=30, min_new_tokens=8)
    assert caption("--max-new-tokens", "5") == expected(num_beams=5, max_new_tokens=5, min_new_tokens=5)
    assert caption("--min-new-tokens", "0") == expected(num_beams=5, max_new_tokens=30)
    assert caption("--prompt", "a photo of") == expected(num_beams=5, max_new_tokens=30)


def test_a_question_conditioned_model(blip2, checkpoint, photos) -> None:
    folder = checkpoint("instruct-opt")
    assert len(blip2("caption", photos["chelsea"], "--model", folder).out) == 1
    done = blip2("caption", photos["chelsea"], "--model", folder, "--prompt", "")
    assert done.code == 1 and len(done.err) == 1 and "`prompt` must be given" in done.err[0]
