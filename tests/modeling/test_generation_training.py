"""Training the generation model: freezing, half precision, checkpointing, and changes of its vocabulary."""

import pytest
import torch

from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from generation_pairs import FAMILIES, build, ragged
from parity import EXACT, assert_same_gradients, counted, enable_checkpointing, gradients, without_dropout
from tiny_models import QFORMER, VOCAB, pixels, prompt_ids, text_config

NO_DROPOUT = {"qformer_config": {**QFORMER, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}}
TARGETS = torch.tensor([[15, 16, 17, 3], [18, 3, -100, -100]])


def labels(ours: Blip2ForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    return TARGETS if ours.config.is_encoder_decoder else ids


def loss(ours: Blip2ForConditionalGeneration) -> torch.Tensor:
    batch = ragged("right")
    return ours(pixels(), **batch.text, labels=labels(ours, batch.input_ids)).loss


# -- freezing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(family: str) -> None:
    ours = build(family, **NO_DROPOUT)
    everything = gradients(ours, lambda: loss(ours))
    ours.freeze_vision()
    ours.freeze_language_model()
    ours.train()
    assert not ours.vision_model.encoder.training
    assert not ours.language_model.training
    assert not any(module.training for module in ours.language_model.modules())
    assert ours.qformer.training
    assert ours.vision_model.post_layernorm.training
    trained = gradients(ours, lambda: loss(ours))
    assert {name.split(".")[0] for name in trained} == {
        "vision_model",
        "query_tokens",
        "qformer",
        "language_projection",
    }
    assert {name for name in trained if name.startswith("vision_model")} == {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    }
    assert_same_gradients({name: everything[name] for name in trained}, trained)
    ours.unfreeze_language_model()
    assert ours.language_model.training
    assert any(name.startswith("language_model") for name in gradients(ours, lambda: loss(ours)))


def test_a_frozen_tower_keeps_no_graph() -> None:
    ours = build("opt")
    ours.freeze_vision()
    assert not ours.vision_model.backbone(pixels()).last_hidden_state.requires_grad
    assert ours.vision_model(pixels()).last_hidden_state.requires_grad


def test_freezing_outlives_the_mode() -> None:
    ours = build("opt")
    ours.freeze_language_model()
    ours.eval()
    ours.train()
    assert not ours.language_model.training
    assert not any(weight.requires_grad for weight in ours.language_model.parameters())
    trained = {name for name, weight in ours.named_parameters() if weight.requires_grad}
    assert any(name.startswith("vision_model.encoder") for name in trained)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    ours = build(family, **NO_DROPOUT)
    ids = prompt_ids()
    with torch.no_grad():
        expected = ours(pixels(), ids, labels=labels(ours, ids))
        low = build(family, **NO_DROPOUT).to(torch.bfloat16)
        found = low(pixels(), ids, labels=labels(low, ids))
    assert found.logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert low.generate(pixels(), ids, num_beams=3, max_new_tokens=4).shape[0] == 2


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_frozen_parts_in_half_precision(family: str) -> None:
    """The paper's set-up: the frozen parts in half precision, what is trained in float32."""
    ours = build(family, **NO_DROPOUT)
    expected = gradients(ours, lambda: loss(ours))
    ours.freeze_vision()
    ours.freeze_language_model()
    for part in ("vision_model", "language_model"):
        for _, weight in ours._backbones()[part]:
            weight.data = weight.data.to(torch.bfloat16)
    trained = gradients(ours, lambda: loss(ours))
    assert {gradient.dtype for gradient in trained.values()} == {torch.float32}
    found, wanted = (torch.cat([g[name].flatten() for name in trained]) for g in (trained, expected))
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.98
    assert ours.generate(pixels(), prompt_ids(), num_beams=3, max_new_tokens=4).shape[0] == 2


# -- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_gradient_checkpointing_changes_nothing(family: str, frozen: bool) -> None:
    ours = build(family, **NO_DROPOUT)
    if frozen:
        ours.freeze_vision()
        ours.freeze_language_model()
    without_dropout(ours)
    expected = gradients(ours, lambda: loss(ours))
    enable_checkpointing(ours, use_reentrant=False)
    with counted(ours.qformer.encoder.layer[1].intermediate_query) as calls:
        assert_same_gradients(expected, gradients(ours, lambda: loss(ours)))
    assert len(calls) == 2, "once forwards, once again for the gradient"


def test_reentrant_checkpointing_is_refused() -> None:
    """It would lose the gradient of what is trained below a frozen part."""
    ours = without_dropout(build("opt"))
    enable_checkpointing(ours, use_reentrant=True)
    with pytest.raises(ValueError, match='`gradient_checkpointing_kwargs` must have "use_reentrant" False'):
        loss(ours)


# -- vocabulary -------------------------------------------------------------------------------------------------------


def tied(ours: Blip2ForConditionalGeneration) -> bool:
    return ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_resizing_the_vocabulary(family: str, tmp_path) -> None:
    ours = build(family)
    ids = prompt_ids()
    with torch.no_grad():
        before = ours(pixels(), ids, labels=labels(ours, ids))
    was_tied = tied(ours)
    ours.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    with torch.no_grad():
        after = ours(pixels(), ids, labels=labels(ours, ids))
    assert after.logits.shape[-1] == VOCAB + 5
    torch.testing.assert_close(after.logits[..., :VOCAB], before.logits, **EXACT)
    assert tied(ours) is was_tied
    assert ours.config.text_config.vocab_size == ours.language_model.config.vocab_size == VOCAB + 5
    ours.save_pretrained(tmp_path)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels(), ids, labels=labels(again, ids)).logits, after.logits, **EXACT)
    ours.resize_token_embeddings(VOCAB + 6, pad_to_multiple_of=64)
    assert ours.get_input_embeddings().num_embeddings == 320


def test_embeddings_are_those_of_the_language_model() -> None:
    ours = build("opt")
    assert ours.get_input_embeddings() is ours.language_model.model.decoder.embed_tokens
    assert ours.get_output_embeddings() is ours.language_model.lm_head
    new = torch.nn.Embedding(VOCAB, 32)
    ours.set_input_embeddings(new)
    assert ours.language_model.model.decoder.embed_tokens is new
    head = torch.nn.Linear(32, VOCAB, bias=False)
    ours.set_output_embeddings(head)
    assert ours.language_model.lm_head is head
    assert build("t5").get_encoder().__class__.__name__ == "T5Stack"


def test_tied_weights_stay_tied(tmp_path) -> None:
    ours = build("opt")
    assert tied(ours)
    ours.save_pretrained(tmp_path)
    assert tied(Blip2ForConditionalGeneration.from_pretrained(tmp_path))


def test_untied_weights_stay_untied(tmp_path) -> None:
    """As in Flan-T5, whose head is a matrix of its own."""
    ours = build("t5")
    head = torch.nn.Parameter(torch.randn(VOCAB, 32))
    ours.language_model.lm_head.weight = head
    scaled = ours.language_model.config.scale_decoder_outputs
    ours.save_pretrained(tmp_path)
    again, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not tied(again)
    assert torch.equal(again.language_model.lm_head.weight, head)
    assert not torch.equal(again.get_input_embeddings().weight, head)
    assert again.language_model.config.scale_decoder_outputs is scaled is False
    again.save_pretrained(tmp_path / "again")
    third = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(third.language_model.lm_head.weight, head)


def test_untied_llama(tmp_path) -> None:
    ours = build("llama", text_config={**text_config("llama").to_dict(), "tie_word_embeddings": False})
    assert not tied(ours)
    ours.save_pretrained(tmp_path)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert not tied(again)
    assert torch.equal(again.language_model.lm_head.weight, ours.language_model.lm_head.weight)
