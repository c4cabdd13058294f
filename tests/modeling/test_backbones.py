"""A model from BERT and a vision tower: every tensor where it belongs, and a report of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, GPT2Config

from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from blip2_hf.stage1_processing import stage1_processor, stage1_tokenizer
from parity import EXACT
from tiny_backbones import bert, random_tower, same, save_bert, tower_model
from tiny_models import pixels
from tiny_own_models import retrieval


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"), bert())


@pytest.fixture(scope="module")
def model(text_folder: str) -> Blip2ForImageTextRetrieval:
    return Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder, num_query_tokens=5)


def batch(text: str) -> dict[str, torch.Tensor]:
    tokenizer = stage1_tokenizer(text)
    return dict(tokenizer(["a dog on the beach", "two cats"], padding=True, return_tensors="pt"))


def without_token_types(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.base_model.embeddings.token_type_embeddings.weight[0].zero_()
    return model


# -- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@torch.no_grad()
def test_text_features_are_berts(tmp_path: Path, kind: str) -> None:
    source = bert(kind)
    text = save_bert(tmp_path, source)
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)
    inputs = batch(text)
    real = inputs["attention_mask"].bool()
    assert not real.all()
    features = ours._text_pass(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    with_types = source.base_model(**inputs).last_hidden_state
    assert (features - with_types)[real].abs().max() > 0.1  # negative control: the row that is dropped counts
    without_token_types(source)
    expected = source.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(features[real], expected[real], **EXACT)
    if kind == "BertModel":
        return
    outputs = source(**inputs)
    logits = outputs.logits if kind == "BertForMaskedLM" else outputs.prediction_logits
    torch.testing.assert_close(ours.lm_head(features)[real][:, : logits.shape[-1]], logits[real], **EXACT)
    ours.lm_head.layer_norm.bias += 0.1
    assert not torch.allclose(ours.lm_head(features)[real][:, : logits.shape[-1]], logits[real], **EXACT)


def test_values_tensor_by_tensor(model: Blip2ForImageTextRetrieval) -> None:
    own, theirs = model.state_dict(), bert().state_dict()
    for layer in range(3):
        source, target = f"bert.encoder.layer.{layer}.", f"qformer.encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            for name in ("query", "key", "value"):
                assert same(
                    own[f"{target}attention.attention.{name}.{kind}"], theirs[f"{source}attention.self.{name}.{kind}"]
                )
            for name in ("attention.output.dense", "attention.output.LayerNorm"):
                assert same(own[f"{target}{name}.{kind}"], theirs[f"{source}{name}.{kind}"])
            for part, name in (("intermediate", "dense"), ("output", "dense"), ("output", "LayerNorm")):
                expected = theirs[f"{source}{part}.{name}.{kind}"]
                text, query = own[f"{target}{part}.{name}.{kind}"], own[f"{target}{part}_query.{name}.{kind}"]
                assert same(text, expected)
                assert same(query, expected)
                assert text.data_ptr() != query.data_ptr()  # they part in training
    for kind in ("weight", "bias"):
        assert same(own[f"qformer.layernorm.{kind}"], theirs[f"bert.embeddings.LayerNorm.{kind}"])
        assert same(own[f"lm_head.dense.{kind}"], theirs[f"cls.predictions.transform.dense.{kind}"])
        assert same(own[f"lm_head.layer_norm.{kind}"], theirs[f"cls.predictions.transform.LayerNorm.{kind}"])
    assert same(own["embeddings.position_embeddings.weight"], theirs["bert.embeddings.position_embeddings.weight"])
    assert same(own["embeddings.word_embeddings.weight"][:-1], theirs["bert.embeddings.word_embeddings.weight"])
    assert same(own["lm_head.decoder.bias"][:-1], theirs["cls.predictions.bias"])


def test_config_is_berts(model: Blip2ForImageTextRetrieval, text_folder: str) -> None:
    config, tokenizer = model.config.qformer_config, stage1_tokenizer(text_folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 4)
    assert (config.intermediate_size, config.max_position_embeddings, config.layer_norm_eps) == (40, 64, 1e-6)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.3)
    assert config.vocab_size == len(tokenizer) == bert().config.vocab_size + 1
    assert config.bos_token_id == tokenizer.convert_tokens_to_ids("[DEC]") == len(tokenizer) - 1
    assert config.eos_token_id == tokenizer.sep_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.use_qformer_text_input
    assert model.config.num_query_tokens == 5
    assert not model.training


def test_new_tensors_are_drawn(text_folder: str) -> None:
    torch.manual_seed(0)
    first = Blip2ForImageTextRetrieval.from_backbones(
        random_tower(), text_folder, num_query_tokens=32, image_text_hidden_size=64
    )
    cross = first.qformer.encoder.layer[0].crossattention
    for weight in (cross.attention.query.weight, cross.attention.key.weight, first.query_tokens):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(weight.mean().item()) < 0.003
    assert not cross.attention.query.bias.any()
    assert (cross.output.LayerNorm.weight == 1).all()
    assert first.embeddings.word_embeddings.weight[-1].std().item() == pytest.approx(0.02, rel=0.5)
    assert first.lm_head.decoder.bias[-1] == 0
    assert first.temperature.item() == pytest.approx(0.07)
    assert first.lm_head.decoder.weight is first.embeddings.word_embeddings.weight
    torch.manual_seed(0)
    again = Blip2ForImageTextRetrieval.from_backbones(
        random_tower(), text_folder, num_query_tokens=32, image_text_hidden_size=64
    )
    assert all(same(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    other = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder, num_query_tokens=32)
    assert not same(other.query_tokens, first.query_tokens)


def test_vocabulary_that_has_the_start_token(tmp_path: Path) -> None:
    source = bert()
    source.resize_token_embeddings(source.config.vocab_size + 1)
    text = save_bert(tmp_path, source, decoder_start=True)
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)
    assert ours.config.qformer_config.vocab_size == source.config.vocab_size
    assert ours.config.qformer_config.bos_token_id == source.config.vocab_size - 1
    assert same(ours.embeddings.word_embeddings.weight, source.bert.embeddings.word_embeddings.weight)
    assert not any("[" in (row.target or "") for row in ours.backbone_report.initialised)


def test_without_tokenizer(tmp_path: Path) -> None:
    source = bert()
    source.save_pretrained(tmp_path)
    config = Blip2ForImageTextRetrieval.from_backbones(random_tower(), tmp_path).config.qformer_config
    assert (config.bos_token_id, config.vocab_size) == (source.config.vocab_size, source.config.vocab_size + 1)
    with pytest.raises(ValueError, match="has no tokenizer"):
        stage1_tokenizer(tmp_path)


def test_old_names_and_files(tmp_path: Path, model: Blip2ForImageTextRetrieval) -> None:
    """LayerNorm's gamma and beta, `position_ids`, the decoder twice, in a pickle."""
    source = bert()
    text = save_bert(tmp_path / "old", source)
    (tmp_path / "old" / "model.safetensors").unlink()
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in source.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(64)[None]
    state["cls.predictions.decoder.weight"] = source.bert.embeddings.word_embeddings.weight.detach()
    state["cls.predictions.decoder.bias"] = source.cls.predictions.bias.detach()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)
    _same_text(ours, model)
    why = {row.source_keys: row.note for row in ours.backbone_report.dropped}
    assert why["cls.predictions.decoder.*"].startswith("same as")
    assert why["bert.embeddings.position_ids"] == "not a weight"


def test_shards_and_half_precision(tmp_path: Path, model: Blip2ForImageTextRetrieval) -> None:
    text = save_bert(tmp_path, bert(), max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _same_text(Blip2ForImageTextRetrieval.from_backbones(random_tower(), text), model)
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="is missing"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)
    half = save_bert(tmp_path / "half", bert().half())
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), half)
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}


def _same_text(first: Blip2ForImageTextRetrieval, second: Blip2ForImageTextRetrieval) -> None:
    kept = [row.target.replace(".*", "") for row in second.backbone_report.initialised]
    compared = 0
    for key, value in first.state_dict().items():
        if key.startswith("vision_model.") or "crossattention" in key or key in ("query_tokens", *kept):
            continue
        if key.split(".")[0] in ("vision_projection", "text_projection", "itm_head"):
            continue
        rows = slice(-1) if key.startswith(("embeddings.word", "lm_head.decoder")) else slice(None)
        assert same(value[rows], second.state_dict()[key][rows]), key
        compared += 1
    assert compared > 70


# -- what is refused -----------------------------------------------------------------------------------------------


def test_other_models_are_refused(tmp_path: Path, text_folder: str) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`text` must be a BERT.*gpt2"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), tmp_path)
    with pytest.raises(ValueError, match="`text` must be a folder"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), None)
    with pytest.raises(ValueError, match="`vision` must be"):
        Blip2ForImageTextRetrieval.from_backbones(None, text_folder)
    with pytest.raises(ValueError, match="`vision` must be"):
        Blip2ForImageTextRetrieval.from_backbones(tower_model("clip"), text_folder)
    relative = bert()
    relative.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="absolute positions"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), save_bert(tmp_path / "relative", relative))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"bert.adapter.weight": torch.ones(2)}), "bert.adapter.weight"),
        (lambda s: s.pop("bert.encoder.layer.1.output.dense.weight"), "missing: qformer.encoder.layer.1.output.dense"),
        (lambda s: s.pop("cls.predictions.transform.dense.bias"), "missing: lm_head.dense.bias"),
        (
            lambda s: s.update({"bert.encoder.layer.0.output.dense.bias": torch.ones(7)}),
            r"qformer.encoder.layer.0.output.dense.bias \[7\] instead of \[24\]",
        ),
        (lambda s: s.update({"bert.embeddings.word_embeddings.weight": torch.ones(9, 24)}), "9 rows"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:
    source = bert()
    text = save_bert(tmp_path, source)
    (tmp_path / "model.safetensors").unlink()
    state = dict(source.state_dict())
    state.pop("cls.predictions.decoder.weight", None)
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)


def test_broken_and_absent_files_are_refused(tmp_path: Path) -> None:
    text = save_bert(tmp_path, bert())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)
    file.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), text)


def test_overrides(text_folder: str) -> None:
    ours = Blip2ForImageTextRetrieval.from_backbones(
        random_tower(),
        text_folder,
        itg_weight=0.0,
        temperature_init=0.05,
        image_text_hidden_size=8,
        qformer_config={"cross_attention_frequency": 1, "hidden_dropout_prob": 0.0, "vocab_size": 256},
    )
    assert ours.config.itg_weight == 0.0
    assert ours.temperature.item() == pytest.approx(0.05)
    assert ours.vision_projection.out_features == 8
    assert all(layer.has_cross_attention for layer in ours.qformer.encoder.layer)
    assert ours.config.qformer_config.hidden_dropout_prob == 0.0
    assert ours.config.qformer_config.intermediate_size == 40
    assert ours.embeddings.word_embeddings.num_embeddings == 256
    shallow = Blip2ForImageTextRetrieval.from_backbones(
        random_tower(), text_folder, qformer_config={"num_hidden_layers": 2}
    )
    assert len(shallow.qformer.encoder.layer) == 2
    assert any("behind the last of 2 layers" in row.note for row in shallow.backbone_report.dropped)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_queries": 3}, "num_queries"),
        ({"vision_config": {}}, "vision_config"),
        ({"qformer_config": {"width": 3}}, "width"),
        ({"qformer_config": 3}, "`qformer_config` must be a dictionary"),
        ({"qformer_config": {"vocab_size": 50}}, "`vocab_size` must be at least"),
        ({"qformer_config": {"hidden_size": 32}}, "of another shape"),
        ({"qformer_config": {"num_hidden_layers": 4}}, "missing: qformer.encoder.layer.3"),
        ({"qformer_config": {"encoder_hidden_size": 7}}, "`encoder_hidden_size`"),
        ({"qformer_config": {"eos_token_id": 10**6}}, "`eos_token_id`"),
        ({"qformer_config": {"use_qformer_text_input": False}}, "use_qformer_text_input"),
        ({"num_query_tokens": 0}, "num_query_tokens"),
        ({"vision_dtype": torch.int8}, "`vision_dtype`"),
        ({"vision_dtype": torch.float16, "freeze_vision": False}, "`vision_dtype`"),
    ],
)
def test_wrong_overrides_are_refused(text_folder: str, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder, **overrides)


# -- report and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "own", "random"])
def test_every_tensor_is_in_the_report(tmp_path: Path, text_folder: str, name: str) -> None:
    vision: dict | Path = random_tower()
    if name != "random":
        vision = tmp_path
        (tower_model("clip") if name == "clip" else retrieval()).save_pretrained(tmp_path)
    ours = Blip2ForImageTextRetrieval.from_backbones(vision, text_folder)
    report = ours.backbone_report
    state = ours.state_dict()
    partial = [row for row in report.initialised if "[" in row.target]
    assert len(partial) == 2  # [DEC]: its embedding and its bias
    rows = [*report.loaded, *report.initialised]
    assert sum(row.tensors for row in rows) - len(partial) == len(state)
    assert sum(row.parameters for row in rows) == ours.num_parameters()  # counts tied weights once
    theirs = bert().state_dict()
    for kind in ("weight", "bias"):
        theirs.pop(f"cls.predictions.decoder.{kind}", None)  # tied, so not in the file
    named = {row.source_keys for row in [*report.loaded, *report.dropped] if row.source == text_folder}
    twice = [row for row in report.loaded if "_query" in row.target and row.source == text_folder]
    read = [row for row in [*report.loaded, *report.dropped] if row.source == text_folder and row not in twice]
    assert sum(row.tensors for row in read) == len(theirs)
    assert sum(row.parameters for row in read) == sum(value.numel() for value in theirs.values())
    assert {"bert.pooler.dense.*", "cls.seq_relationship.*", "bert.embeddings.token_type_embeddings.*"} <= named
    text = str(report)
    for row in rows:
        assert row.target in text
    for title in ("Loaded:", "Newly initialised:", "Dropped:"):
        assert title in text


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower_model("clip").save_pretrained(tmp_path / "clip")
    text = save_bert(tmp_path / "bert", bert("BertModel"))
    with caplog.at_level(logging.INFO, logger="blip2_hf"):
        ours = Blip2ForImageTextRetrieval.from_backbones(tmp_path / "clip", text)
    records = [record for record in caplog.records if record.name.startswith("blip2_hf")]
    assert any(str(ours.backbone_report) in r.getMessage() and r.levelno == logging.INFO for r in records)
    assert any("no language-modelling head" in r.getMessage() and r.levelno == logging.WARNING for r in records)
    assert "LOAD REPORT" not in caplog.text
    with caplog.at_level(logging.INFO):  # negative control: it is there otherwise
        BertForMaskedLM.from_pretrained(text)
    assert "LOAD REPORT" in caplog.text


def test_untied_head_is_named(tmp_path: Path) -> None:
    source = bert(tie_word_embeddings=False)
    assert source.cls.predictions.decoder.weight is not source.bert.embeddings.word_embeddings.weight
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), save_bert(tmp_path, source))
    assert any("differs from the word embeddings" in row.note for row in ours.backbone_report.dropped)


def test_saving(tmp_path: Path, text_folder: str) -> None:
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder)
    with pytest.raises(ValueError, match="save it in full once"):
        ours.save_pretrained(tmp_path / "connector", connector_only=True)
    ours.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="save it in full once"):  # from there, not from here
        ours.save_pretrained(tmp_path / "connector", connector_only=True)
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "full")
    loaded.freeze_vision()
    with torch.no_grad():
        loaded.train().query_tokens.add_(1)
    loaded.save_pretrained(tmp_path / "connector", connector_only=True)
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "connector")
    for key, value in again.state_dict().items():
        assert same(value, ours.state_dict()[key] + (1 if key == "query_tokens" else 0)), key
    folder = Path(text_folder)
    assert str(folder) not in (tmp_path / "full" / "config.json").read_text()


def test_trains(text_folder: str) -> None:
    ours = Blip2ForImageTextRetrieval.from_backbones(random_tower(), text_folder).train()
    processor = stage1_processor(random_tower(), text_folder)
    inputs = processor(text=["a dog on the beach", "two cats"], return_tensors="pt")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    optimiser = torch.optim.SGD([weight for weight in ours.parameters() if weight.requires_grad], lr=0.1)
    scores = ours(pixels(), inputs["input_ids"], inputs["attention_mask"], use_image_text_matching_head=True)
    scores.logits_per_image.square().sum().backward()
    optimiser.step()
    layer = "qformer.encoder.layer.0."
    changed = {key for key, value in ours.state_dict().items() if not same(value, before[key])}
    assert f"{layer}crossattention.attention.value.weight" in changed
    assert "vision_model.post_layernorm.weight" in changed
    assert not any(key.startswith("vision_model.e") for key in changed)
    text, query = (ours.state_dict()[f"{layer}{name}.dense.weight"] for name in ("output", "output_query"))
    assert not same(text, query)
