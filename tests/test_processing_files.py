"""`Blip2Processor`'s files, shared with `transformers` in both directions, and its use in a pipeline."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.blip_2.processing_blip_2 import Blip2Processor as TheirProcessor
from transformers.models.instructblip.processing_instructblip import InstructBlipProcessor

from blip2_hf.image_processing import Blip2ImageProcessor
from blip2_hf.processing import Blip2Processor
from tiny_processors import ANSWERS, IMAGES, PROMPTS, QUERIES, TOKENIZERS, tiny_processor as make
from tiny_tokenizers import tiny_bert_tokenizer, tiny_opt_tokenizer


@pytest.fixture(params=sorted(TOKENIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def same_outputs(first, second, **given) -> None:
    got, expected = first(**given, return_tensors="pt"), second(**given, return_tensors="pt")
    assert set(got) == set(expected)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def auto_processor(folder: Path):
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # older transformers loads no image processor without torchvision
        pytest.skip(str(error).strip().splitlines()[0])


def test_save_and_load(kind: str, tmp_path: Path) -> None:
    ours = make(kind, suffix_end="a", is_encoder_decoder=kind != "t5")
    ours.save_pretrained(tmp_path)
    again = Blip2Processor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()
    assert (again.is_encoder_decoder, again.suffix_end_id) == (ours.is_encoder_decoder, ours.suffix_end_id)
    same_outputs(again, ours, images=IMAGES, text=PROMPTS, suffix=ANSWERS)
    changed = Blip2Processor.from_pretrained(tmp_path, num_query_tokens=7, is_encoder_decoder=False, suffix_end="b")
    assert (changed.num_query_tokens, changed.is_encoder_decoder, changed.suffix_end) == (7, False, "b")
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "BlipImageProcessor"
    )
    with pytest.raises(TypeError, match="num_query_token$"):
        Blip2Processor.from_pretrained(tmp_path, num_query_token=3)


def test_reads_what_transformers_saves(kind: str, tmp_path: Path) -> None:
    theirs = TheirProcessor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), QUERIES)
    theirs.save_pretrained(tmp_path)
    ours = Blip2Processor.from_pretrained(tmp_path)
    assert ours.num_query_tokens == QUERIES and ours.is_encoder_decoder == (kind == "t5")
    assert ours.qformer_tokenizer is None
    same_outputs(ours, theirs, images=IMAGES[0], text=PROMPTS[0])


def test_reads_the_layout_of_the_published_folders(kind: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path)
    token = {"__type": "AddedToken", "content": "<image>", "lstrip": False, "normalized": False, "special": True}
    published = {"image_token": token, "num_query_tokens": 32, "processor_class": "Blip2Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(published))
    ours = Blip2Processor.from_pretrained(tmp_path)
    assert ours.num_query_tokens == 32 and ours.image_processor.size == {"height": 14, "width": 14}


def test_transformers_reads_ours(kind: str, tmp_path: Path) -> None:
    ours = make(kind)
    ours.save_pretrained(tmp_path)
    theirs = auto_processor(tmp_path)
    assert isinstance(theirs, TheirProcessor)
    same_outputs(ours, theirs, images=IMAGES[0], text=PROMPTS[0])


def test_instructblip_folders(kind: str, tmp_path: Path) -> None:
    theirs = InstructBlipProcessor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), tiny_bert_tokenizer(), QUERIES)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Blip2Processor.from_pretrained(tmp_path / "theirs")
    same_outputs(ours, theirs, images=IMAGES[0], text=PROMPTS[0])
    ours.save_pretrained(tmp_path / "ours")
    again = Blip2Processor.from_pretrained(tmp_path / "ours")
    same_outputs(again, ours, images=IMAGES, text=PROMPTS, qformer_text=ANSWERS)
    back = auto_processor(tmp_path / "ours")
    assert isinstance(back, InstructBlipProcessor)
    same_outputs(back, theirs, images=IMAGES[0], text=PROMPTS[0])


CONFIGS = {
    "decoder-only": {"text_config": {"model_type": "opt"}, "use_decoder_only_language_model": True},
    "encoder-decoder": {"text_config": {"model_type": "t5"}, "use_decoder_only_language_model": False},
    "decoder-only by type": {"text_config": {"model_type": "qwen2"}},
    "encoder-decoder by type": {"text_config": {"model_type": "bart"}},
    "encoder-decoder by flag": {"text_config": {"model_type": "opt", "is_encoder_decoder": True}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_kind_of_language_model_is_read_from_its_config(kind: str, name: str, tmp_path: Path) -> None:
    """Whatever the tokenizer looks like."""
    TheirProcessor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), QUERIES).save_pretrained(tmp_path)
    config = {"model_type": "blip-2", "qformer_config": {}, "image_token_index": 5, **CONFIGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Blip2Processor.from_pretrained(tmp_path).is_encoder_decoder == name.startswith("encoder")


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_suffix_ends_where_generation_stops(where: str, tmp_path: Path) -> None:
    TheirProcessor(Blip2ImageProcessor(size=14), tiny_opt_tokenizer(), QUERIES).save_pretrained(tmp_path)
    config = {
        "model_type": "blip-2",
        "qformer_config": {},
        "image_token_index": 5,
        "text_config": {"model_type": "opt"},
    }
    newline = 4
    if where == "config.json":
        config["text_config"]["eos_token_id"] = newline
    else:
        (tmp_path / where).write_text(json.dumps({"eos_token_id": [newline, 2]}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = Blip2Processor.from_pretrained(tmp_path)
    assert (processor.suffix_end, processor.suffix_end_id) == ("\n", newline)
    assert Blip2Processor.from_pretrained(tmp_path, suffix_end="</s>").suffix_end_id == 2


def test_no_placeholders_for_a_model_without_a_placeholder_token(tmp_path: Path) -> None:
    make("opt").save_pretrained(tmp_path)
    config = {"model_type": "blip-2", "qformer_config": {}, "image_token_index": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = Blip2Processor.from_pretrained(tmp_path)
    assert processor.num_query_tokens is None
    batch = processor(images=IMAGES, text=PROMPTS, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0, "left-padded all the same"


def test_broken_files_are_named(tmp_path: Path) -> None:
    make("opt").save_pretrained(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match="generation_config.json"):
            Blip2Processor.from_pretrained(tmp_path)


def test_a_connector_uses_the_files_of_its_checkpoint(tmp_path: Path) -> None:
    full, connector = tmp_path / "full", tmp_path / "connector"
    make("opt", suffix_end="a").save_pretrained(full)
    connector.mkdir()
    (connector / "config.json").write_text(json.dumps({"connector_of": str(full)}))
    processor = Blip2Processor.from_pretrained(connector)
    assert processor.to_dict() == Blip2Processor.from_pretrained(full).to_dict()
    nested = Blip2Processor.from_pretrained(tmp_path, subfolder="connector", suffix_end="b")
    assert nested.suffix_end == "b" and nested.num_query_tokens == QUERIES
    make("opt", suffix_end="c").save_pretrained(connector)  # its own files win
    assert Blip2Processor.from_pretrained(connector).suffix_end == "c"
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "config.json").write_text(json.dumps({"connector_of": "nobody/nothing"}))
    with pytest.raises(OSError, match="nobody/nothing"):
        Blip2Processor.from_pretrained(tmp_path / "lost")


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Salesforce/blip2-opt-2.7b"):
        Blip2Processor.from_pretrained("blip2-opt-2.7b")
    make("opt").save_pretrained(tmp_path / "blip2-opt-2.7b")
    assert Blip2Processor.from_pretrained("blip2-opt-2.7b").num_query_tokens == QUERIES


# -- in a pipeline of transformers -----------------------------------------------------------------------------------


def tiny_model(kind: str, image_token_id: int):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = {"ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 4}
    t5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    own = {"opt": opt | width, "t5": t5, "llama": width}[kind]
    config = Blip2Config(
        vision_config=width | {"image_size": 14, "patch_size": 7},
        qformer_config=width | {"encoder_hidden_size": 16, "vocab_size": 20},
        text_config=own | {"model_type": kind, "vocab_size": image_token_id + 1},
        num_query_tokens=QUERIES,
        image_token_index=image_token_id,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    return model


@pytest.mark.parametrize("full", [True, False])
def test_image_text_to_text_pipeline(kind: str, full: bool) -> None:
    from transformers import pipeline

    ours, theirs = make(kind), TheirProcessor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), QUERIES)
    model = tiny_model(kind, ours.image_token_id)
    got, expected = (
        pipeline("image-text-to-text", model=model, processor=each)(
            IMAGES[0], text=PROMPTS[0], max_new_tokens=5, return_full_text=full
        )
        for each in (ours, theirs)
    )
    assert got == expected
    (record,) = got
    assert record["input_text"] == PROMPTS[0] and record["generated_text"].startswith(PROMPTS[0]) == full


def test_facts_are_read_from_the_files_of_a_model(kind: str, tmp_path: Path) -> None:
    processor = make(kind)
    tiny_model(kind, processor.image_token_id).save_pretrained(tmp_path)
    TheirProcessor(Blip2ImageProcessor(size=14), TOKENIZERS[kind](), QUERIES).save_pretrained(tmp_path)
    loaded = Blip2Processor.from_pretrained(tmp_path)
    assert loaded.is_encoder_decoder == (kind == "t5")
    assert loaded.suffix_end == ("\n" if kind == "opt" else None)
    assert loaded.num_query_tokens == QUERIES and loaded.image_token_id == processor.image_token_id
