"""examples/shapes: from nothing to evaluated models on the generated world, in small."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, stage1_processor, stage2_processor
from blip2_hf.data.shapes.corpus import corpus
from blip2_hf.data.shapes.scenes import COLOURS, SHAPES, Scene, Thing
from blip2_hf.presets import VQA_PROMPTS, fill
from example_scripts import EXAMPLES

SHORT = ["--steps", "3", "--batch-size", "4", "--eval-samples", "4", "--workers", "0", "--device", "cpu"]
SENTENCE = "a large striped red circle, two small crosses and one heart in the top left corner"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "corpus.txt"
    documents = corpus(np.random.default_rng(0))
    path.write_text("".join(f"{next(documents)}\n" for _ in range(300)))
    return path


def test_what_patches_show(script) -> None:
    """A large red square at the top left, a small white ring at the bottom right."""
    things = (
        Thing("square", "red", "large", "plain", 18, 18, 32),
        Thing("ring", "white", "small", "striped", 78, 78, 20),
    )
    found = script("tower_targets").targets(Scene(things, 1), 12)
    grid = {name: values.reshape(8, 8, -1)[..., 0] for name, values in found.items() if values.size == 64}
    assert grid["shape"][1, 1] == SHAPES.index("square") + 1 and grid["shape"][7, 0] == 0
    assert grid["colour"][6, 6] == list(COLOURS).index("white") + 1
    assert (grid["size"][1, 1], grid["size"][6, 6]) == (1, 0) and grid["texture"][6, 6] == 1
    assert grid["size"][7, 0] == -100  # the background has none
    np.testing.assert_allclose(found["centre"].reshape(8, 8, 2)[2, 1], [-2.5, -2.5])  # 18 px are 1.5 patches; 4 is half
    assert (grid["column"][6, 6], grid["row"][6, 6], grid["row"][7, 0]) == (6, 6, -100)
    assert found["set"].sum() == 2 and found["count"] == 1


def test_a_tower(script, tmp_path, monkeypatch, texts) -> None:
    """Trained, stopped and gone on, and taken by `from_backbones` with the BERT and its tokenizer."""
    train_tower, loop = script("train_tower"), script("training_loop")
    command = ["--size", "small", *SHORT]
    whole = train_tower.main([*command, "--output-dir", str(tmp_path / "tower")])
    assert 0 <= whole["accuracies"]["combinations"]["shape"] <= 1 and not (tmp_path / "tower" / "state.pt").exists()
    assert train_tower.main([*command, "--output-dir", str(tmp_path / "tower")]) == whole  # complete

    class Stopped(Exception):
        pass

    rate = loop.LoopOptions.rate

    def stop(self, step):
        if step == 2:
            raise Stopped
        return rate(self, step)

    monkeypatch.setattr(loop.LoopOptions, "rate", stop)
    again = [*command, "--output-dir", str(tmp_path / "again")]
    monkeypatch.setitem(train_tower.TRAINING["small"], "save_seconds", 0.0)
    with pytest.raises(Stopped):
        train_tower.main(again)
    monkeypatch.setattr(loop.LoopOptions, "rate", rate)
    assert torch.load(tmp_path / "again" / "state.pt")["step"] == 2
    with pytest.raises(ValueError, match="was trained with .*'seed': 0"):
        train_tower.main([*again, "--seed", "1"])
    assert train_tower.main(again)["accuracies"] == whole["accuracies"]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("tower", "again")]
    assert files[0] == files[1]

    bert = tmp_path / "bert"
    script("make_bert").main(["--corpus", str(texts), "--output-dir", str(bert)])
    processor = stage1_processor(tmp_path / "tower", bert)
    assert processor.tokenizer.tokenize(SENTENCE) == SENTENCE.replace(",", " ,").split()
    fields = {"num_query_tokens": 16, "image_text_hidden_size": 64}
    model = Blip2ForImageTextRetrieval.from_backbones(tmp_path / "tower", bert, **fields)
    features = model.get_image_features(pixel_values=torch.zeros(1, 3, 96, 96))
    assert features.shape == (1, 16, 64)


@pytest.mark.parametrize("size", ["opt-small", "t5"])
def test_a_language_model(script, tmp_path, texts, size: str) -> None:
    """Its tokenizer has whole words and survives saving; stage 2 takes the folder and knows where texts end."""
    command = ["--size", size, "--corpus", str(texts), "--eval-corpus", str(texts), *SHORT]
    folder = tmp_path / size
    report = script("train_language").main([*command, "--output-dir", str(folder)])
    assert report["perplexity"] > 1 and 0 <= report["answered"] <= 1 and report["vocabulary"] < 800
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = fill(VQA_PROMPTS["encoder-decoder"], "what color is the ring?")
    ids = tokenizer(f"{question} {SENTENCE}", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == f"{question} {SENTENCE}"
    assert len(ids) <= len(question.split()) + len(SENTENCE.split()) + 6  # words and marks
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 24, "patch_size": 12}
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = Blip2ForConditionalGeneration.from_backbones(tower, str(folder), num_query_tokens=4, qformer_config=qformer)
    processor = stage2_processor(tower, str(folder), num_query_tokens=4)
    row = processor(text=[question], suffix=["red"])
    assert row["labels"][0][-1] == model.generation_config.eos_token_id
    assert row["labels"][0][-1] == (1 if size == "t5" else tokenizer("\n", add_special_tokens=False)["input_ids"][0])
    assert processor.image_token_id < model.get_input_embeddings().num_embeddings


def test_documents_as_rows(script) -> None:
    rows = script("language_rows")
    text = "a red ring. Question: is it red? Short answer: yes. Question: how many? Short answer: one"
    asked = rows.Document.parsed(text)
    assert asked.turns == (("Question: is it red? Short answer:", "yes"), ("Question: how many? Short answer:", "one"))
    assert f"{asked.description} {asked.rest()}" == text
    described = rows.Document.parsed("a red ring. a photo of a small red ring")
    assert (described.description, described.caption) == ("a red ring.", "a small red ring")
    for document in corpus(np.random.default_rng(1)):  # nothing of a document is lost
        parsed = rows.Document.parsed(document)
        assert f"{parsed.description} {parsed.rest()}".strip() == document
        if len(parsed.turns) == 4:
            break
    assert described.rest_parts(prompted=False) == [("a small red ring", True)]
    assert described.repeated() == rows.Document("a small red ring", caption="a small red ring")
    assert rows.Document("a ring").repeated().caption == "a ring" and asked.repeated() == asked
    drawn = [rows.seq2seq_texts(asked, np.random.default_rng(number)) for number in range(40)]
    assert ("a red ring. Question: is it red? Short answer: yes. Question: how many? Short answer:", "one") in drawn
    assert ("Question: is it red? Short answer:", "yes") in drawn  # blind


def test_blind_guesses(script) -> None:
    blind = script("eval_blind")
    train = [{"type": kind, "question": "?", "answer": answer} for kind, answer in ("xa", "xa", "yb", "yb", "yb")]
    asked = [{"type": kind, "question": "?", "answers": [answer] * 10} for kind, answer in ("xa", "yb", "zb")]
    assert blind.frequent(train, asked, "type") == ["a", "b", "b"]
    assert blind.accuracy(blind.frequent(train, asked), asked) == pytest.approx(2 / 3, abs=1e-4)
    report = blind.compared({"all": blind.frequent(train, asked), "b": ["b", "b", "b"]}, asked)
    assert (report["questions"], report["b"]) == (3, pytest.approx(2 / 3, abs=1e-4))
    assert report["by_kind"]["x"] == {"questions": 1, "all": 0.0, "b": 0.0} and report["by_kind"]["y"]["b"] == 1.0


def test_the_truth_of_captions(script, tmp_path) -> None:
    scene = {"things": [vars(Thing("ring", "white", "small", "plain", 40, 40, 20))], "background": 0}
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps({"image_id": n, **scene}) + "\n" for n in (1, 2, 3)))
    captions = ["a small white ring", "a small red ring", "words at random"]
    results = [{"image_id": number, "caption": text} for number, text in enumerate(captions, start=1)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    options = ["--predictions", str(tmp_path), "--scenes", str(tmp_path / "scenes.jsonl")]
    report = script("eval_truth").main([*options, "--output", str(tmp_path / "truth.json")])
    assert (report["true"], report["parsed"]) == (pytest.approx(1 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4))
    assert report["statements_per_caption"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["things_mentioned"] == pytest.approx(1 / 3, abs=1e-4)  # there is no red one
    assert report["true_by_things"] == {"1": report["true"]}


def test_the_plan(script, tmp_path, capsys) -> None:
    """Every step's script is there, takes its options, and uses what steps before it have written."""
    steps, run_all = script("steps"), script("run_all")
    parsers = {
        "run_stage1.py": ("stage1", "parse_stage1"),
        "run_stage2.py": ("stage2", "parse_stage2"),
        "run_captioning.py": ("captioning", "parse_captioning"),
        "run_vqa.py": ("vqa", "parse_vqa"),
        "run_retrieval.py": ("retrieval", "parse_retrieval"),
    }
    written, seen, training_of = {"world", "bert", "."}, set(), {}
    for step in steps.all_steps(steps.Settings(seeds=2)):
        assert step.group in steps.GROUPS and (EXAMPLES / step.script).is_file() and step.name not in seen
        seen.add(step.name)
        options = dict(zip(step.options[::2], step.options[1::2], strict=True))
        for name in ("--vision", "--text", "--language", "--stage1", "--text_branch", "--model", "--world", "--run"):
            assert options.get(name) is None or options[name] in written, step.name
        written |= {options[name] for name in ("--output-dir", "--output_dir") if name in options}
        if step.script in parsers:
            module, parse = parsers[step.script]
            given = {name: value for name, value in options.items() if name not in ("--language", "--model")}
            assert given["--train_sets"].split("/")[0] in written
            argv = [part for pair in given.items() for part in pair]
            module = importlib.import_module(f"blip2_hf.training.{module}")
            _, training = getattr(module, parse)([*argv, "--output_dir", str(tmp_path / "run")])
            assert training.eval_strategy == "steps" and training.eval_steps == training.save_steps
            training_of[options["--output_dir"]] = training
            assert training.gradient_accumulation_steps == 1 and not (training.fp16 or training.bf16)
        if step.name.startswith("eval/curve"):  # all that it measures is kept
            assert training_of[options["--run"]].save_total_limit > steps._CURVE_POINTS
    run_all.main(["--output-dir", str(tmp_path / "none"), "--list", "--only", "stage1"])
    assert capsys.readouterr().out.startswith("stage1 stage1: run_stage1.py --recipe")
    with pytest.raises(ValueError, match="`only` must be groups"):
        run_all.main(["--output-dir", str(tmp_path), "--only", "stage9"])


def test_easy_vqa_is_left_out_where_it_is_not(script, tmp_path, capsys, monkeypatch) -> None:
    run_all, files = script("run_all"), script("easy_vqa_files")
    for installed in (True, False):
        monkeypatch.setattr(
            files.importlib.util, "find_spec", lambda name, found=installed: object() if found else None
        )
        run_all.main(["--output-dir", str(tmp_path), "--list"])
        printed = capsys.readouterr()
        assert ("easy_vqa_files.py" in printed.out) == installed
        assert ("easy-vqa is left out: the package easy-vqa is not installed" in printed.err) != installed
    with pytest.raises(SystemExit, match="2"):
        files.main(["--output-dir", str(tmp_path / "easy")])
    assert "pip install easy-vqa" in capsys.readouterr().err


def test_steps_are_done_once(script, tmp_path, monkeypatch) -> None:
    run_all, steps = script("run_all"), script("steps")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "count.py").write_text(
        "import sys\nopen('count', 'a').write('.')\nsys.exit(int(sys.argv[1]))"
    )
    monkeypatch.setattr(run_all, "EXAMPLES", tmp_path / "scripts")
    plan = [steps.Step("good", "world", "count.py", ("0",)), steps.Step("bad", "world", "count.py", ("3",))]
    monkeypatch.setattr(run_all, "all_steps", lambda settings: plan)
    for expected in ("..", "..."):  # the step that failed is run again, the other is not
        with pytest.raises(SystemExit, match="3"):
            run_all.main(["--output-dir", str(tmp_path / "out")])
        assert (tmp_path / "out" / "count").read_text() == expected
    plan[0] = steps.Step("good", "world", "count.py", ("0",), always=True)
    with pytest.raises(SystemExit, match="3"):
        run_all.main(["--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "count").read_text() == "....."
    plan[0] = steps.Step("good", "world", "count.py", ("0", "more"))
    with pytest.raises(ValueError, match="is of another command"):
        run_all.main(["--output-dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_everything(script, tmp_path) -> None:
    """The quick run: every script with every recipe, to shipped checkpoints below 10 MB."""
    script("run_all").main(["--output-dir", str(tmp_path), "--quick"])
    for name in ("blip2-tiny-opt", "blip2-tiny-opt-vqa", "blip2-tiny-t5"):
        loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "shipped" / name)
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "eval" / "blind" / "test" / "t5.json").read_text())["questions"] == 8
    tables = (tmp_path / "results" / "tables.md").read_text()
    assert tables.startswith("Of the first few items only") and "unseen scenes (8): oracle" in tables
    assert "run_retrieval.py, retrieval.json" in (tmp_path / "shipped" / "blip2-tiny-itm" / "README.md").read_text()
    shutil.rmtree(tmp_path / "runs")


def test_the_vocabulary_of_the_bert_is_the_same_each_time(script) -> None:
    """Words by their number, then by the alphabet; trained pieces are not, as they hang on the order of a hash."""
    make = script("language_tokenizers").bert_tokenizer
    documents = ["a red star. a red ring", "two stars, two rings", "Question: is there a ring?"]
    tokenizer = make(documents, 64)
    assert tokenizer.get_vocab() == make(documents[::-1], 64).get_vocab()
    assert tokenizer.tokenize("Two RED stars?") == ["two", "red", "stars", "?"]
    assert tokenizer.tokenize("teal") == ["t", "##e", "##a", "##l"]
