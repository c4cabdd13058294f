"""Stage 2 against the original code: logits, losses, gradients and captions from its weights (see fixtures/README.md).

The original has no image placeholder: the queries are put before the text.
"""

from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from blip2_hf.configuration import Blip2Config
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from conversion.lavis import to_ours
from lavis_names import QUERIES, fixture
from parity import EXACT, changed, gradients
from tiny_original import OPT, T5

PROMPT = {"noprompt": 1, "prompt": 11}  # tokens, with BOS: "" and "a photo of"


def renamed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those below a path, under our names."""
    return to_ours({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


@cache
def original_model(name: str) -> Blip2ForConditionalGeneration:
    import tempfile

    config = Blip2Config(
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 174,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
        },
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=OPT if name == "opt" else T5,
        num_query_tokens=QUERIES,
        vision_layernorm_eps=1e-5,
    )
    weights = renamed(fixture(f"stage2_{name}_tiny"), "state_dict/")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in weights.items()}, f"{folder}/model.safetensors", {"format": "pt"})
        return Blip2ForConditionalGeneration.from_pretrained(folder)


def opt_inputs(case: str) -> dict[str, torch.Tensor]:
    data = fixture("stage2_opt_tiny")
    text = {name: data[f"{case}/{name}"] for name in ("input_ids", "attention_mask")}
    return {"pixel_values": data["image"], **text, "labels": data[f"{case}/labels"][:, QUERIES:]}


def t5_inputs() -> dict[str, torch.Tensor]:
    data = fixture("stage2_t5_tiny")
    return {
        "pixel_values": data["image"],
        "input_ids": data["input_ids"],
        "attention_mask": data["input_att"],
        "labels": data["labels"],
    }


@pytest.mark.parametrize("case", PROMPT)
@torch.no_grad()
def test_opt_forward(case: str) -> None:
    ours, data, inputs = original_model("opt"), fixture("stage2_opt_tiny"), opt_inputs(case)
    outputs = ours(**inputs)
    real = torch.cat([torch.ones(3, QUERIES), inputs["attention_mask"]], dim=1).bool()
    torch.testing.assert_close(outputs.logits[real], data[f"{case}/logits"][real], **EXACT)
    torch.testing.assert_close(outputs.loss, data[f"{case}/loss"], **EXACT)
    with changed(ours, "query_tokens"):
        assert abs(ours(**inputs).loss - data[f"{case}/loss"]) > 1e-4


@torch.no_grad()
def test_layer_norm_epsilon_of_the_original_matters() -> None:
    ours, data = original_model("opt"), fixture("stage2_opt_tiny")
    norm = ours.vision_model.post_layernorm
    assert norm.eps == 1e-5
    norm.eps = 0.05
    try:
        assert (ours(**opt_inputs("prompt")).loss - data["prompt/loss"]).abs() > 1e-5
    finally:
        norm.eps = 1e-5


@pytest.mark.parametrize("case", PROMPT)
def test_opt_captions(case: str) -> None:
    """11 new tokens at most: the original's `max_length=12` counts a token that stands for the embeddings."""
    ours, data = original_model("opt"), fixture("stage2_opt_tiny")
    prompt = opt_inputs(case)["input_ids"][:, : PROMPT[case]]
    options = {"num_beams": 3, "max_new_tokens": 11, "min_new_tokens": 3, "eos_token_id": 14}
    tokens = ours.generate(data["image"], prompt, **options)
    assert torch.equal(tokens[:, : PROMPT[case]], prompt)
    assert torch.equal(tokens[:, PROMPT[case] :], data[f"{case}/generate_ids"][:, 1:])
    if case == "noprompt":
        assert torch.equal(ours.generate(data["image"], **options), tokens)


@torch.no_grad()
def test_t5_forward() -> None:
    ours, data = original_model("t5"), fixture("stage2_t5_tiny")
    outputs = ours(**t5_inputs())
    taught = data["labels"] != -100
    torch.testing.assert_close(outputs.logits[taught], data["logits"][taught], **EXACT)
    torch.testing.assert_close(outputs.loss, data["loss"], **EXACT)
    with changed(ours, "query_tokens"):
        assert abs(ours(**t5_inputs()).loss - data["loss"]) > 1e-4


def test_t5_captions() -> None:
    """The original's prompt is empty here, which its tokenizer writes as `</s>`."""
    ours, data = original_model("t5"), fixture("stage2_t5_tiny")
    options = {"num_beams": 3, "max_new_tokens": 8, "min_length": 2}
    assert torch.equal(ours.generate(data["image"], **options), data["generate_ids"])
    end = torch.ones(3, 1, dtype=torch.long)
    assert torch.equal(ours.generate(data["image"], end, **options), data["generate_ids"])
    with changed(ours, "query_tokens", by=1.0):
        assert not torch.equal(ours.generate(data["image"], **options), data["generate_ids"])


# The questions are not in the fixture; these are the ones of a length the mask gives that lead to the recorded answers.
OPT_QUESTIONS = ("what color", "how many dog", "a")  # in "Question: {} Answer:", one token per character
T5_QUESTIONS = ([59, 60], [61, 62, 16], [4])  # the same, in "Question: {} Short answer:"
T5_BEFORE, T5_AFTER = [3, 104, 83, 67, 81, 82, 71, 77, 76, 100], [3, 105, 70, 77, 80, 82, 57, 100, 1]


def padded(rows: list[list[int]], pad: int, left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    blanks = [[pad] * (longest - len(row)) for row in rows]
    ids = [blank + row if left else row + blank for row, blank in zip(rows, blanks, strict=True)]
    mask = [
        [0] * len(blank) + [1] * len(row) if left else [1] * len(row) + [0] * len(blank)
        for row, blank in zip(rows, blanks, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("left", [True, False])
def test_opt_answers(left: bool) -> None:
    """The original pads between the queries and the question; with the padding masked its place does not matter."""
    ours, data = original_model("opt"), fixture("stage2_opt_tiny")
    rows = [[2, *(ord(letter) + 4 for letter in f"Question: {question} Answer:")] for question in OPT_QUESTIONS]
    text = padded(rows, pad=1, left=left)
    if left:
        assert torch.equal(text["attention_mask"], data["noprompt/vqa_attention_mask"][:, QUERIES:])
    options = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 5, "eos_token_id": 14}
    length, expected = text["input_ids"].shape[1], data["noprompt/vqa_ids"][:, 1:]
    assert torch.equal(ours.generate(data["image"], **text, **options)[:, length:], expected)
    assert not torch.equal(ours.generate(data["image"].roll(1, 0), **text, **options)[:, length:], expected)
    text["attention_mask"] = torch.ones_like(text["attention_mask"])
    assert not torch.equal(ours.generate(data["image"], **text, **options)[:, length:], expected)


def test_t5_answers() -> None:
    ours, data = original_model("t5"), fixture("stage2_t5_tiny")
    text = padded([T5_BEFORE + question + T5_AFTER for question in T5_QUESTIONS], pad=0, left=False)
    options = {"num_beams": 3, "length_penalty": -1.0, "max_new_tokens": 5}
    assert torch.equal(ours.generate(data["image"], **text, **options), data["vqa_ids"])
    text["attention_mask"] = torch.ones_like(text["attention_mask"])
    assert not torch.equal(ours.generate(data["image"], **text, **options), data["vqa_ids"])


CASES = {"opt without a prompt": "noprompt/grads/", "opt": "prompt/grads/", "t5": "grads/"}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    """Of everything that is trained; relative to each tensor, in the 2-norm. Measured: 1.1e-6 (OPT), 1.0e-5 (T5)."""
    name, path = case.split()[0], CASES[case]
    ours, expected = original_model(name), renamed(fixture(f"stage2_{name}_tiny"), path)
    inputs = opt_inputs(path.split("/")[0]) if name == "opt" else t5_inputs()
    found = gradients(ours, lambda: ours(**inputs).loss)
    frozen = ("language_model.", "vision_model.encoder.", "vision_model.embeddings.")
    assert {key for key in found if not key.startswith(frozen)} == expected.keys()
    assert len(expected) == 91
    for key, gradient in expected.items():
        if key.endswith("attention.key.bias"):  # softmax does not see it: rounding alone
            assert max(found[key].norm(), gradient.norm()) < 1e-6, key
        else:
            assert (found[key] - gradient).norm() < 3e-5 * gradient.norm(), key
    with changed(ours, "language_projection.bias"):
        other = gradients(ours, lambda: ours(**inputs).loss)
    assert all((other[key] - g).norm() > 1e-3 * g.norm() for key, g in expected.items())
