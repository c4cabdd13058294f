"""Checkpoints: what is read and written, and errors that name the file and the keys."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from blip2_hf.configuration import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.qformer import Blip2QFormerModel
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.modeling.vision import Blip2VisionModel
from generation_pairs import build
from tiny_models import (
    IMAGE_TOKEN,
    QFORMER,
    VISION,
    VOCAB,
    peer_generation,
    peer_retrieval,
    pixels,
    prompt_ids,
    text_config,
)

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "opt", "t5", "retrieval" and "sharded" (OPT) written by `transformers`; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    opt = peer_generation("opt")
    opt.save_pretrained(folder / "opt")
    opt.save_pretrained(folder / "sharded", max_shard_size="100KB")
    peer_generation("t5").save_pretrained(folder / "t5")
    peer_retrieval().save_pretrained(folder / "retrieval")
    return folder


@pytest.fixture
def opt(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the OPT checkpoint that may be damaged."""
    return Path(shutil.copytree(checkpoints / "opt", tmp_path / "opt"))


def load(folder: Path, **options) -> Blip2ForConditionalGeneration:
    return Blip2ForConditionalGeneration.from_pretrained(folder, **options)


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    own, other = first.state_dict(), second.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("opt", Blip2ForConditionalGeneration, transformers.Blip2ForConditionalGeneration),
        ("t5", Blip2ForConditionalGeneration, transformers.Blip2ForConditionalGeneration),
        ("retrieval", Blip2ForImageTextRetrieval, transformers.Blip2ForImageTextRetrieval),
    ],
)
def test_there_and_back(name: str, ours: type, theirs: type, checkpoints: Path, tmp_path: Path) -> None:
    model, info = ours.from_pretrained(checkpoints / name, output_loading_info=True)
    own = {key for key in model.state_dict() if re.match(r"temperature$|lm_head\.", key)}  # for training alone
    assert bool(own) is (name == "retrieval")
    assert info["missing_keys"] == own - {"lm_head.decoder.weight"}  # tied
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not model.training
    model.save_pretrained(tmp_path)
    again, info = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] == own - {"lm_head.decoder.weight"}
    assert_same_weights(again, theirs.from_pretrained(checkpoints / name))
    assert_same_weights(ours.from_pretrained(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "blip-2"
    assert config["architectures"] == [ours.__name__]


def test_shards(checkpoints: Path, tmp_path: Path) -> None:
    whole, sharded = load(checkpoints / "opt"), load(checkpoints / "sharded")
    assert_same_weights(whole, sharded)
    sharded.save_pretrained(tmp_path, max_shard_size="150KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 1
    assert names[0].startswith("model-00001-of-")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(load(tmp_path), whole)


@pytest.mark.parametrize(("first", "second"), [("50GB", "100KB"), ("100KB", "50GB")])
def test_the_other_layout_does_not_stay_behind(first: str, second: str, checkpoints: Path, tmp_path: Path) -> None:
    """A single file of an earlier save would be loaded instead of the shards of this one."""
    model = load(checkpoints / "opt")
    model.save_pretrained(tmp_path, max_shard_size=first)
    with torch.no_grad():
        model.query_tokens.add_(5)
    model.save_pretrained(tmp_path, max_shard_size=second)
    assert_same_weights(model, load(tmp_path))
    assert (tmp_path / WEIGHTS).exists() == (second == "50GB")


@pytest.mark.parametrize("cls", [Blip2VisionModel, Blip2QFormerModel])
def test_parts_on_their_own(cls: type, tmp_path: Path) -> None:
    config = Blip2VisionConfig(**VISION) if cls is Blip2VisionModel else Blip2QFormerConfig(**QFORMER)
    model = cls(config)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, cls.from_pretrained(tmp_path))


def test_variant(checkpoints: Path, tmp_path: Path) -> None:
    model = load(checkpoints / "opt")
    model.save_pretrained(tmp_path, variant="tiny")
    assert (tmp_path / "model.tiny.safetensors").exists()
    assert_same_weights(load(tmp_path, variant="tiny"), model)
    damage(tmp_path / "model.tiny.safetensors", lambda data: data[:-1])
    with pytest.raises(ValueError, match="model.tiny.safetensors is truncated"):
        load(tmp_path, variant="tiny")


def test_short_name_is_the_local_folder_of_that_name(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints / "opt", tmp_path / "blip2-opt-2.7b")
    monkeypatch.chdir(tmp_path)
    assert_same_weights(load("blip2-opt-2.7b"), load(checkpoints / "opt"))
    with pytest.raises(OSError, match="Salesforce/blip2-flan-t5-xl|huggingface.co"):
        load("blip2-flan-t5-xl")  # there is no such folder, and no network here


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_dtype(dtype: torch.dtype | str, checkpoints: Path) -> None:
    model = load(checkpoints / "opt", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.language_model.dtype == model.vision_model.dtype == wanted
    # The Q-Former stays float32 where the rest is float16 (as in transformers).
    assert model.qformer.dtype == (torch.float32 if wanted == torch.float16 else wanted)
    assert model.generate(pixels(), prompt_ids(), num_beams=2, max_new_tokens=2).shape[0] == 2
    peer = transformers.Blip2ForConditionalGeneration.from_pretrained(checkpoints / "opt", dtype=dtype)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in peer.named_parameters()}


def test_dtype_is_that_of_the_file_by_default(checkpoints: Path, tmp_path: Path) -> None:
    load(checkpoints / "opt", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_map(device_map: dict | str, checkpoints: Path) -> None:
    model, plain = load(checkpoints / "opt", device_map=device_map), load(checkpoints / "opt")
    assert_same_weights(model, plain)
    tokens = model.generate(pixels(), prompt_ids(), max_new_tokens=3)
    assert torch.equal(tokens, plain.generate(pixels(), prompt_ids(), max_new_tokens=3))


def test_generation_config_is_kept(checkpoints: Path, tmp_path: Path) -> None:
    model = load(checkpoints / "opt")
    model.generation_config.num_beams = 3
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (again.generation_config.num_beams, again.generation_config.max_new_tokens) == (3, 4)
    expected = model.generate(pixels(), prompt_ids(), num_beams=3, max_new_tokens=4)
    assert torch.equal(again.generate(pixels(), prompt_ids()), expected)


# -- config -----------------------------------------------------------------------------------------------------------


def test_fields_of_the_config_may_be_given(checkpoints: Path) -> None:
    model = load(checkpoints / "opt", image_token_index=7, output_attentions=True)
    assert model.config.image_token_index == 7
    assert model.config.output_attentions is True
    assert load(checkpoints / "opt").config.image_token_index == IMAGE_TOKEN
    inner = load(checkpoints / "opt", text_config={"dropout": 0.5}).config.text_config
    assert (inner.dropout, inner.hidden_size, inner.vocab_size) == (0.5, 32, VOCAB), "the others stay"
    with pytest.raises(ValueError, match="`num_query_tokens` must be a positive integer"):
        load(checkpoints / "opt", num_query_tokens=0)
    with pytest.raises(TypeError, match="num_querries"):
        load(checkpoints / "opt", num_querries=4)


def test_given_config_is_not_changed(checkpoints: Path) -> None:
    config = Blip2Config.from_pretrained(checkpoints / "opt")
    before = config.to_dict()
    model = load(checkpoints / "opt", config=config, dtype=torch.bfloat16)
    model.config.text_config.dropout = 0.7
    assert config.to_dict() == before


def test_config_in_any_form(checkpoints: Path) -> None:
    theirs = transformers.Blip2Config.from_pretrained(checkpoints / "opt")
    expected = load(checkpoints / "opt")
    for config in (checkpoints / "opt", str(checkpoints / "opt"), theirs, theirs.to_dict()):
        model = load(checkpoints / "opt", config=config)
        assert isinstance(model.config, Blip2Config)
        assert_same_weights(model, expected)


def test_attention_implementation(checkpoints: Path) -> None:
    model = load(checkpoints / "opt", attn_implementation="eager")
    parts = (model.vision_model, model.qformer, model.language_model)
    assert {part.config._attn_implementation for part in parts} == {"eager"}


# -- damaged files ----------------------------------------------------------------------------------------------------


def damage(file: Path, change) -> None:
    file.write_bytes(change(file.read_bytes()))


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


CUTS = {
    "nothing left": lambda data: 0,
    "in the length": lambda data: 4,
    "behind the length": lambda data: 8,
    "in the header": lambda data: header_length(data) // 2,
    "behind the header": header_length,
    "in the tensors": lambda data: len(data) // 2,
    "the last byte": lambda data: len(data) - 1,
}


@pytest.mark.parametrize("where", CUTS)
def test_truncated_file(where: str, opt: Path) -> None:
    damage(opt / WEIGHTS, lambda data: data[: CUTS[where](data)])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} .*truncated"):
        load(opt)


GARBAGE = {
    "noise": lambda data: bytes(range(256)) * 20,
    "a web page": lambda data: b"<html>404</html>" * 99,
    "more than the header says": lambda data: data + b"xx",
    "a list for a header": lambda data: (8).to_bytes(8, "little") + b"[1,2,3] ",
    "a Git LFS pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(what: str, opt: Path) -> None:
    damage(opt / WEIGHTS, GARBAGE[what])
    with pytest.raises(ValueError, match=WEIGHTS):
        load(opt)


def test_truncated_pickle(checkpoints: Path, opt: Path) -> None:
    torch.save(load(checkpoints / "opt").state_dict(), opt / "pytorch_model.bin")
    (opt / WEIGHTS).unlink()
    load(opt)
    whole = (opt / "pytorch_model.bin").read_bytes()
    (opt / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load(opt)


def test_shard_missing_or_truncated(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "sharded", tmp_path / "sharded"))
    shard = sorted(folder.glob("model-*"))[1]
    damage(shard, lambda data: data[:-3])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        load(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing, model.safetensors.index.json names it"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index"):
        load(folder)


def test_no_weights(opt: Path) -> None:
    (opt / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load(opt)


# -- foreign files ----------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    """Refused before anything is built (the default BLIP-2 has more than a billion parameters)."""
    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    for cls in (Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval):
        with pytest.raises(ValueError, match="is not a BLIP-2 checkpoint: it has model_type 'bert'"):
            cls.from_pretrained(tmp_path)


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load(tmp_path)


def test_retrieval_checkpoint_into_generation(checkpoints: Path, opt: Path) -> None:
    parts = r"is not a checkpoint of .*unexpected keys: itm_head\..*missing parts: language_model, language_projection"
    with pytest.raises(ValueError, match=parts):
        load(checkpoints / "retrieval")
    shutil.copy(checkpoints / "retrieval" / WEIGHTS, opt / WEIGHTS)
    with pytest.raises(ValueError, match=parts):
        load(opt)


def test_generation_checkpoint_into_retrieval(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"opt is not a checkpoint of .*unexpected keys: language_model\."):
        Blip2ForImageTextRetrieval.from_pretrained(checkpoints / "opt")
    folder = Path(shutil.copytree(checkpoints / "retrieval", tmp_path / "retrieval"))
    shutil.copy(checkpoints / "opt" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected keys: language_model\..*missing parts: embeddings, itm_head"):
        Blip2ForImageTextRetrieval.from_pretrained(folder)


def test_single_keys(opt: Path) -> None:
    def rewritten(**changes: torch.Tensor | None) -> None:
        weights = {**original, **changes}
        save_file({k: v for k, v in weights.items() if v is not None}, opt / WEIGHTS, {"format": "pt"})

    original = load_file(opt / WEIGHTS)
    rewritten(query_tokens=None)
    with pytest.raises(ValueError, match="opt.* is not a checkpoint of .*: 1 missing keys: query_tokens$"):
        load(opt)
    rewritten(surplus=torch.zeros(1))
    with pytest.raises(ValueError, match="1 unexpected keys: surplus$"):
        load(opt)
    rewritten(query_tokens=torch.zeros(1, 7, 24))
    with pytest.raises(ValueError, match=r"1 keys of another shape: query_tokens \[1, 7, 24\] instead of \[1, 4, 24\]"):
        load(opt)
    assert load(opt, ignore_mismatched_sizes=True).query_tokens.shape == (1, 4, 24)


def test_other_language_model(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=r"missing keys: language_model\."):
        load(checkpoints / "opt", config=build("llama").config)
    bigger = {**text_config("opt").to_dict(), "vocab_size": VOCAB + 1}
    with pytest.raises(ValueError, match=r"embed_tokens.weight \[300, 32\] instead of \[301, 32\]"):
        load(checkpoints / "opt", text_config=bigger)


def test_what_a_published_checkpoint_lacks_is_said_once(checkpoints: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        Blip2ForImageTextRetrieval.from_pretrained(checkpoints / "retrieval")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "does not hold lm_head.decoder.bias" in warning and warning.endswith("temperature: newly initialised")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(checkpoints / "opt")
    assert not caplog.records
