"""Comparing two checkpoints of any layout: equal ones are, and one fault is found and named."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
import tiny_original
from blip2_hf.modeling.generation import Blip2ForConditionalGeneration
from blip2_hf.modeling.retrieval import Blip2ForImageTextRetrieval
from conversion.lavis import to_ours
from conversion.report import Report
from conversion.sides import OURS, Side
from conversion.verify import main, verify
from lavis_names import STAGE_1_QFORMER, VISION, model_with_original_weights

ROOT = Path(__file__).parents[2]
EVERY_STAGE = ("itm", "opt", "t5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], str]:
    """Folders of `transformers` (`opt`, `t5`, `llama`, `instruct-opt`, `retrieval`), the same as ours saves them
    (`ours-opt`, …), and our models of the original's fixtures (`from-itm`, `from-opt`, `from-t5`)."""
    made: dict[str, str] = {}

    def folder_of(kind: str) -> str:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            start, _, rest = kind.partition("-")
            if start == "ours":
                cls = Blip2ForImageTextRetrieval if rest == "retrieval" else Blip2ForConditionalGeneration
                cls.from_pretrained(folder_of(rest)).save_pretrained(path)
            elif start == "from":
                our_model(rest, path)
            elif start == "instruct":
                tiny_checkpoints.save_instructblip(path, rest)
            elif kind == "retrieval":
                tiny_checkpoints.save_retrieval(path)
            else:
                tiny_checkpoints.save_generation(path, kind)
            made[kind] = str(path)
        return made[kind]

    return folder_of


def our_model(stage: str, path: Path) -> None:
    if stage == "itm":
        return model_with_original_weights().save_pretrained(path)
    tiny_original.save_config(path / "config.json", stage)
    tensors = to_ours(tiny_original.whole(stage))
    second = {f"language_model.{n.partition('_model.')[2]}" for n in tiny_original.SECOND_NAMES[stage]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in second}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return None


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Callable[..., Side]:
    """A `.pth` of the original (bridge only) and what it lacks."""

    def side(stage: str, **changed: str) -> Side:
        path = tmp_path_factory.mktemp(stage)
        given = {"config": str(tiny_original.save_config(path / "config.json", stage))}
        given["tower"] = str(tiny_original.save_tower(path / "tower.pth", stage))
        if stage != "itm":
            given["llm"] = str(tiny_original.save_language_folder(path / "llm", stage))
        return Side(str(tiny_original.save_stored(path / "bridge.pth", stage, epoch=5)), **{**given, **changed})

    return side


def swapped(name: str, first: int, second: int) -> Callable[[dict], dict]:
    """Every tensor of two layers exchanged; `name` ends before their numbers."""

    def change(tensors: dict) -> dict:
        one, other = f"{name}.{first}.", f"{name}.{second}."
        renamed = {n.replace(one, other) if one in n else n.replace(other, one): t for n, t in tensors.items()}
        assert renamed.keys() == tensors.keys() and list(renamed) != list(tensors)
        return renamed

    return change


def changed_folder(source: str, target: Path, change: Callable[[dict], dict]) -> str:
    """A copy of a folder with other weights."""
    for file in Path(source).iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = change(load_file(Path(source) / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return str(target)


def assert_equal(report: Report) -> None:
    assert report.equal and report.first_divergence is None, str(report)
    assert max(m.error for m in report.measures) < 1e-5
    assert str(report).endswith("EQUAL (tolerance 0.0001)") and "NOT" not in str(report)


# -- equal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_file_of_the_original_and_ours(stage: str, folder, original) -> None:
    report = verify(original(stage), Side(folder(f"from-{stage}")))
    assert_equal(report)
    places = [m.place for m in report.measures]
    assert places[:4] == ["tower, embeddings", "tower, layer 0", "tower, layer 1", "tower, ln_vision"]
    assert {m.depth for m in report.measures} >= {"tower", "Q-Former", "end"}
    if stage == "itm":
        assert list(report.losses) == ["ITC loss", "ITM loss", "ITG loss"]
        assert report.divergence is None and "Q-Former, captioning, layer 3" in places
    else:
        assert list(report.losses) == ["loss"] and report.divergence[1] < 1e-9 < report.divergence[2]
        assert "language model, decoder layer 1" in places


@pytest.mark.parametrize("kind", ["opt", "llama", "instruct-t5", "retrieval"])
def test_folder_of_transformers_and_ours(kind: str, folder) -> None:
    report = verify(Side(folder(kind)), Side(folder(f"ours-{kind}")))
    assert_equal(report)
    assert "computed by transformers" in report.a and "computed by ours" in report.b
    assert report.weights.compared > 100 and not report.weights.differing
    if kind == "retrieval":  # what only ours has is said, and no fault
        assert any("temperature" in note or "lm_head" in note for note in report.notes)
        assert verify(Side(folder("ours-retrieval")), Side(folder(kind))).equal


def test_two_files_of_the_original_and_their_config_from_the_other_side(original, folder, tmp_path) -> None:
    whole = tiny_original.save_stored(tmp_path / "whole.pth", "itm", with_tower=True)
    bridge = original("itm")
    assert_equal(verify(bridge, Side(str(whole), config=bridge.config)))
    assert_equal(verify(Side(folder("from-itm")), Side(str(whole))))


def test_tower_of_a_folder(folder, original, tmp_path) -> None:
    """It stands in for a tower's file: the same weights, and others."""
    assert_equal(verify(original("opt", tower=folder("from-opt")), Side(folder("from-opt"))))
    other = changed_folder(folder("from-opt"), tmp_path, swapped("vision_model.encoder.layers", 0, 1))
    report = verify(original("opt", tower=other), Side(folder("from-opt")))
    assert report.first_divergence == "tower, layer 0"


def test_clip_tower_of_the_original(tmp_path) -> None:
    """Its names: https://github.com/salesforce/LAVIS, `lavis/models/clip_vit.py`; values of a tower of ours."""
    from tiny_models import randomised
    from tiny_own_models import CLIP, retrieval_config

    config = retrieval_config({**CLIP, "hidden_act": "quick_gelu"})
    config.qformer_config.eos_token_id = 3
    model = randomised(Blip2ForImageTextRetrieval(config))
    with torch.no_grad():
        model.temperature.fill_(0.07)
    model.save_pretrained(tmp_path / "ours")
    tensors = original_clip_names(model.state_dict())
    torch.save({"model": tensors}, tmp_path / "clip.pth")
    ours = Side(str(tmp_path / "ours"))
    assert_equal(verify(Side(str(tmp_path / "clip.pth")), ours))
    name = "visual_encoder.transformer.resblocks.1.ln_2.weight"
    torch.save({"model": tensors | {name: 1.1 * tensors[name]}}, tmp_path / "other.pth")
    assert verify(ours, Side(str(tmp_path / "other.pth"))).culprits == ("tower, layer 1",)


def original_clip_names(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Written out here, apart from the tables."""
    tower = next(name for name in ours if name.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    get = {name.removeprefix(tower): tensor for name, tensor in ours.items() if name.startswith(tower)}
    found = {
        "conv1.weight": get["embeddings.patch_embedding.weight"],
        "class_embedding": get["embeddings.class_embedding"],
        "positional_embedding": get["embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        found[f"ln_pre.{part}"] = get[f"pre_layrnorm.{part}"]
        for n in range(2):
            theirs, layer = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
            inward = [get[f"{layer}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            found[f"{theirs}.attn.in_proj_{part}"] = torch.cat(inward)
            found[f"{theirs}.attn.out_proj.{part}"] = get[f"{layer}.self_attn.out_proj.{part}"]
            found[f"{theirs}.mlp.c_fc.{part}"] = get[f"{layer}.mlp.fc1.{part}"]
            found[f"{theirs}.mlp.c_proj.{part}"] = get[f"{layer}.mlp.fc2.{part}"]
            for number in "12":
                found[f"{theirs}.ln_{number}.{part}"] = get[f"{layer}.layer_norm{number}.{part}"]
    rest = {n: t for n, t in ours.items() if not n.startswith("vision_model.")}
    renamed = {n.replace("qformer.", "Qformer.bert."): t for n, t in rest.items() if n.startswith("qformer.encoder.")}
    renamed = {n.replace("ion.attention.", "ion.self."): t for n, t in renamed.items()}
    words = {n: t for n, t in rest.items() if n.startswith("embeddings.")}
    renamed |= {f"Qformer.bert.{n}": t for n, t in words.items()}
    for part in ("weight", "bias"):
        renamed[f"ln_vision.{part}"] = ours[f"vision_model.post_layernorm.{part}"]
        renamed[f"Qformer.bert.embeddings.LayerNorm.{part}"] = rest[f"qformer.layernorm.{part}"]
        renamed[f"vision_proj.{part}"] = rest[f"vision_projection.{part}"]
        renamed[f"text_proj.{part}"] = rest[f"text_projection.{part}"]
        renamed[f"itm_head.{part}"] = rest[f"itm_head.{part}"]
        head = "Qformer.cls.predictions"
        renamed[f"{head}.transform.dense.{part}"] = rest[f"lm_head.dense.{part}"]
        renamed[f"{head}.transform.LayerNorm.{part}"] = rest[f"lm_head.layer_norm.{part}"]
    renamed |= {f"{head}.bias": rest["lm_head.decoder.bias"], "temp": rest["temperature"].reshape(())}
    return {f"visual_encoder.{n}": t for n, t in found.items()} | renamed | {"query_tokens": rest["query_tokens"]}


def test_half_precision_of_a_part_is_rounding_on_both_sides(folder, tmp_path) -> None:
    """Equal within float32's rounding, and said."""

    def half(tensors: dict) -> dict:
        return {n: t.bfloat16() if n.startswith("language_model.") else t for n, t in tensors.items()}

    made = changed_folder(folder("ours-opt"), tmp_path, half)
    report = verify(Side(folder("opt")), Side(made))
    assert_equal(report)
    assert report.notes == ("language model: the weights of both are rounded to bfloat16",)
    # Computing in it is another matter: other kernels, other rounding.
    assert verify(Side(folder("opt")), Side(made), dtype="bfloat16").equal


# -- not equal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "layers", "culprits"),
    [
        ("visual_encoder.blocks", (0, 1), ["tower, layer 0", "tower, layer 1"]),
        ("Qformer.bert.encoder.layer", (1, 3), [f"Q-Former, queries, layer {n}" for n in (1, 3)]),
    ],
)
def test_swapped_layers_of_a_file_of_the_original(stack, layers, culprits, folder, tmp_path) -> None:
    """By the forward alone, as no names are shared."""
    tensors = swapped(stack, *layers)(tiny_original.stored("itm", with_tower=True))
    torch.save({"model": tensors}, tmp_path / "swapped.pth")
    report = verify(Side(folder("from-itm")), Side(str(tmp_path / "swapped.pth")))
    assert not report.equal and report.first_divergence == culprits[0]
    assert list(report.culprits[:2]) == culprits
    assert f"NOT EQUAL: first at {culprits[0]}" in str(report)


def test_swapped_layers_of_folders_are_named_as_weights_too(folder, tmp_path) -> None:
    made = changed_folder(folder("ours-t5"), tmp_path, swapped("vision_model.encoder.layers", 0, 2))
    report = verify(Side(folder("t5")), Side(made))
    assert not report.equal and report.culprits == ("tower, layer 0", "tower, layer 2")
    assert "vision_model.encoder.layers.0 of A is vision_model.encoder.layers.2 of B" in str(report)
    assert {name.split(".")[3] for name in report.weights.differing} == {"0", "2"}


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("llama", "language_model.lm_head.weight", "end, logits"),
        ("instruct-opt", "qformer.encoder.layer.1.output.dense.weight", "Q-Former, queries, layer 1"),
        ("opt", "vision_model.post_layernorm.bias", "tower, ln_vision"),
        ("retrieval", "itm_head.weight", "end, ITM logits"),
    ],
)
def test_one_changed_tensor(kind: str, name: str, place: str, folder, tmp_path) -> None:
    made = changed_folder(folder(f"ours-{kind}"), tmp_path, lambda tensors: tensors | {name: tensors[name] * 1.05})
    report = verify(Side(folder(kind)), Side(made))
    assert not report.equal and report.first_divergence == place and report.culprits[0] == place
    assert report.weights.differing == [name]
    if kind in ("opt", "t5", "llama"):
        assert report.divergence[1] > 0


@pytest.mark.parametrize("stage", ["opt", "t5"])
def test_another_language_model(stage: str, folder, original, tmp_path) -> None:
    """The file of the original with a language model one of whose tensors is another, or which computes otherwise."""
    side, ours = original(stage), Side(folder(f"from-{stage}"))
    path = Path(side.llm) / "model.safetensors"
    tensors = load_file(path)
    name = {"opt": "model.decoder.layers.0.fc1.bias", "t5": "decoder.block.0.layer.2.DenseReluDense.wi_0.weight"}[stage]
    save_file(tensors | {name: tensors[name] + 0.1}, path, {"format": "pt"})
    report = verify(side, ours)
    assert report.first_divergence == "language model, decoder layer 0" == report.culprits[0]
    assert report.divergence[0] > 1e-8


def test_activation_of_t5_in_the_config(folder, original, tmp_path) -> None:
    """Flan-T5's own config has another activation than the original computes with: the weights are equal."""

    made = changed_folder(folder("from-t5"), tmp_path, dict)
    tiny_original.save_config(tmp_path / "config.json", "t5", dense_act_fn="gelu_new")
    report = verify(original("t5"), Side(made), tolerance=1e-5)
    assert report.first_divergence == "language model, encoder layer 0"


def test_dropped_head(folder, tmp_path) -> None:
    """The head that ours may lack, and one that it may not."""
    for name, says in (("lm_head.", "B has no end, ITG logits, no end, ITG loss"), ("itm_head.", "itm_head.bias")):
        (tmp_path / name).mkdir()
        without = changed_folder(
            folder("from-itm"), tmp_path / name, lambda ts, name=name: {n: t for n, t in ts.items() if name not in n}
        )
        report = verify(Side(folder("from-itm")), Side(without, library=OURS))
        assert not report.equal and any(says in problem for problem in report.problems), str(report)
        assert all(missing.startswith(name) for missing in report.weights.missing["B"])
    whole = tiny_original.stored("itm", with_tower=True)
    torch.save({n: t for n, t in whole.items() if "Qformer.cls" not in n}, tmp_path / "a.pth")
    report = verify(Side(str(tmp_path / "a.pth")), Side(folder("from-itm")))
    assert not report.equal and report.problems == ("A has no end, ITG logits, no end, ITG loss",)


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("ln_vision", {"vision_layernorm_eps": 1e-6}),
        ("tower", {"vision_config": {**VISION, "layer_norm_eps": 1e-5}}),
        ("Q-Former", {"qformer_config": {**STAGE_1_QFORMER, "layer_norm_eps": 1e-6}}),
    ],
)
def test_another_epsilon(part: str, changed: dict, folder, tmp_path) -> None:
    """Results hardly show it."""
    whole = tiny_original.save_stored(tmp_path / "whole.pth", "itm", with_tower=True)
    made = changed_folder(folder("from-itm"), tmp_path, dict)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    report = verify(Side(str(whole), config=folder("from-itm")), Side(made))
    assert not report.equal
    assert [problem.split(":")[0] for problem in report.problems] == [f"epsilon of the norms, {part}"]


def test_parameters_that_transformers_has_no_place_for(folder, tmp_path) -> None:
    """None of the known ones is a fault, any other is."""
    surplus = {"qformer.encoder.layer.0.adapter.weight": torch.ones(2)}
    made = changed_folder(folder("opt"), tmp_path, lambda tensors: tensors | surplus)
    report = verify(Side(folder("opt")), Side(made))
    assert report.first_divergence is None and not report.equal
    assert any("B has 1 parameters too many" in problem for problem in report.problems)


def test_another_shape_is_not_run(folder) -> None:
    report = verify(Side(folder("opt")), Side(folder("from-opt")))
    assert not report.equal and report.measures == () and "queries: 4 in A, 8 in B" in report.problems
    report = verify(Side(folder("opt")), Side(folder("t5")))
    assert report.problems == ("language model: decoder-only in A, encoder-decoder in B",)


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_and_its_exit_codes(folder, original, tmp_path, capsys) -> None:
    side = original("opt")
    picture = tmp_path / "photo.png"
    tiny_checkpoints.photo("chelsea").save(picture)
    given = ["--llm", side.llm, "--tower", side.tower, "--config", side.config]
    assert main([side.source, folder("from-opt"), *given, "--image", str(picture), "--text", "a cat"]) == 0
    printed = capsys.readouterr().out
    assert "texts 'a cat'" in printed and "KL of the next token: mean" in printed
    made = changed_folder(folder("ours-opt"), tmp_path, swapped("vision_model.encoder.layers", 0, 1))
    assert main([folder("opt"), made]) == 1
    assert "NOT EQUAL: first at tower, layer 0" in capsys.readouterr().out


def test_script_finds_its_modules(tmp_path, monkeypatch, capsys) -> None:
    """As Python starts it: with the script's folder first on the path, whose modules have common names."""
    script = ROOT / "conversion" / "verify.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "missing.pth", "other.pth"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: `source` missing.pth does not exist\n"
    assert sys.path[0] == str(ROOT) and str(script.parent) not in sys.path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{opt}", "missing.pth"], "`source` missing.pth does not exist"),
        (["{opt}", "./nowhere"], "there is no folder './nowhere'"),
        (["{opt}", "{opt}", "--text", " "], "`texts` must be one text or two"),
        (["{opt}", "{opt}", "--image", "{opt}/config.json"], "`image` .* cannot be read"),
        (["{opt}", "{opt}", "--tolerance", "0"], "`tolerance` must be a positive number"),
        (["{opt}", "{bridge}"], "does not hold the tower; `tower` must be its file"),
        (["{bridge}", "{opt}", "--tower", "{tower}"], "does not hold the language model; `llm` must be"),
        (["{bridge}", "{bridge}", "--tower", "{tower}", "--llm", "{llm}"], "`config` must be given for"),
        (["{opt}", "{tower}"], "is not a BLIP-2 file of the original: it has no 'query_tokens'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, folder, original, capsys) -> None:
    side = original("opt")
    names = {"opt": folder("opt"), "bridge": side.source, "tower": side.tower, "llm": side.llm}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1
