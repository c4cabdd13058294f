"""The tables of docs/shapes.md, as Markdown. What has not been measured says so."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from measured import Measured, number
from steps import FINDING_QUERIES, QUERIES, SHIPPED, Settings, all_steps

from blip2_hf.data.shapes.questions import KINDS

MISSING = "not measured"
NONE = "–"  # there is no such number
SPLITS = {"test": "unseen scenes", "combinations": "unseen combinations"}
_BLIND = {
    "most_frequent": "most frequent answer",
    "most_frequent_of_type": "most frequent answer to this kind of question",
    "most_frequent_of_question": "most frequent answer to this question, word for word",
}
_EASY_KINDS = ("colour", "shape", "yes/no")

Number = float | None
Row = list[str]


# -- cells -----------------------------------------------------------------------------------------------------------


def percent(value: Number) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def plain(value: Number, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def spread(values: Sequence[Number]) -> str:
    """Mean and standard deviation (n − 1) over seeds in percent; how many of them, where some are missing."""
    found = [100 * value for value in values if value is not None]
    if not found:
        return MISSING
    text = f"{statistics.mean(found):.1f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.1f}"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)} seeds)"


def table(header: Sequence[str], rows: Sequence[Row], texts: int = 1) -> str:
    """`texts`: so many columns hold words, the others numbers."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- evaluation ------------------------------------------------------------------------------------------------------


def retrieval(run: Measured) -> str:
    names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
    rows = []
    for split, title in SPLITS.items():
        for model, said in (("stage1", "stage 1"), ("retrieval", "fine-tuned")):
            for score, how in (("itc", "ITC"), ("reranked", "re-ranked by ITM")):
                values = [run.metric("retrieval", split, model, score, name) for name in names]
                rows.append([f"{_scenes(run, split, title)}: {said}, {how}", *map(percent, values)])
        best = run.oracle(split)
        ceiling = {name: percent(number(best, name)) for name in ("txt_r1", "img_r1")}
        rows.append([f"{_scenes(run, split, title)}: oracle", *(ceiling.get(name, NONE) for name in names)])
    return table(["recall in %", "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"], rows)


def captions(run: Measured) -> str:
    rows = []
    for split, title in SPLITS.items():
        for model, said in _CAPTIONERS.items():
            rows.append([f"{_scenes(run, split, title)}: {said}", *_captioned(run, split, model)])
    header = ["", "CIDEr", "BLEU@4", "METEOR", "ROUGE-L", "true, %", "statements per caption", "things mentioned, %"]
    return _without_empty([*header, "different, %"], rows)


def _without_empty(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A table without the columns of which nothing has been measured (METEOR needs Java), which are named below it."""
    empty = [n for n in range(1, len(header)) if all(row[n] == MISSING for row in rows)]
    if not empty or len(empty) == len(header) - 1:
        return table(header, rows)
    kept = [n for n in range(len(header)) if n not in empty]
    said = f"{MISSING.capitalize()}: {'; '.join(header[n] for n in empty)}."
    return f"{table([header[n] for n in kept], [[row[n] for n in kept] for row in rows])}\n\n{said}"


_CAPTIONERS = {
    "stage2-opt": "stage 2, OPT",
    "stage2-t5": "stage 2, T5",
    "captioning-opt": "fine-tuned, OPT",
    "captioning-t5": "fine-tuned, T5",
}


def _captioned(run: Measured, split: str, model: str) -> Row:
    truth = run.truth(split, model)
    scores = [run.metric("captioning", split, model, name) for name in ("cider", "bleu_4", "meteor", "rouge_l")]
    shares = {name: percent(number(truth, name)) for name in ("true", "things_mentioned", "different")}
    statements = plain(number(truth, "statements_per_caption"))
    return [*map(percent, scores), shares["true"], statements, shares["things_mentioned"], shares["different"]]


def questions(run: Measured) -> str:
    rows = [[title, *(percent(number(run.blind(s, "opt-base"), key)) for s in SPLITS)] for key, title in _BLIND.items()]
    for language, title in (("opt-base", "OPT"), ("t5", "T5")):
        said = [number(run.blind(split, language), "language_model") for split in SPLITS]
        rows.append([f"{title} alone, blind", *map(percent, said)])
    for model, title in {
        "stage2-opt": "stage 2, OPT (zero-shot)",
        "stage2-opt-small": "stage 2, smaller OPT (zero-shot)",
        "stage2-t5": "stage 2, T5 (zero-shot)",
        "vqa-opt": "fine-tuned, OPT",
        "vqa-t5": "fine-tuned, T5",
    }.items():
        rows.append([title, *(percent(run.metric("vqa", split, model, "overall")) for split in SPLITS)])
    return table(["accuracy in %", *SPLITS.values()], rows)


def kinds(run: Measured) -> str:
    """Unseen scenes only."""
    frequent = [run.blind("test", "opt-base"), "most_frequent_of_question"]
    rows = []
    for kind in KINDS:
        row = [percent(number(frequent[0], "by_kind", kind, frequent[1]))]
        row += [
            percent(number(run.blind("test", llm), "by_kind", kind, "language_model")) for llm in ("opt-base", "t5")
        ]
        for model in ("stage2-opt", "stage2-t5", "vqa-opt", "vqa-t5"):
            row.append(percent(run.metric("vqa", "test", model, "per_question_type", kind)))
        rows.append([kind, *row])
    header = ["accuracy in %", "most frequent to this question", "OPT alone", "T5 alone", "stage 2, OPT", "stage 2, T5"]
    return table([*header, "fine-tuned, OPT", "fine-tuned, T5"], rows)


def easy_vqa(run: Measured) -> str:
    rows = []
    guesses = [("opt-base", key, title) for key, title in _BLIND.items()]
    for language, key, title in (
        *guesses,
        ("opt-base", "language_model", "OPT alone, blind, not fine-tuned"),
        ("t5", "language_model", "T5 alone, blind, not fine-tuned"),
    ):
        found = run.blind("easy-vqa", language)
        of_kinds = [number(found, "by_kind", kind, key) for kind in _EASY_KINDS]
        rows.append([title, *map(percent, [number(found, key), *of_kinds])])
    for model, title in (("easy-vqa-opt", "fine-tuned, OPT"), ("easy-vqa-t5", "fine-tuned, T5")):
        of_kinds = [run.metric("vqa", "easy-vqa", model, "per_question_type", kind) for kind in _EASY_KINDS]
        rows.append([title, *map(percent, [run.metric("vqa", "easy-vqa", model, "overall"), *of_kinds])])
    return table(["accuracy in %", "all", *_EASY_KINDS], rows)


def shipped(run: Measured) -> str:
    rows = []
    for name in [name for name, source in SHIPPED.items() if source != "retrieval"]:
        model = f"shipped/{name}"
        cells = [run.metric("captioning", "test", model, "cider"), number(run.truth("test", model), "true")]
        cells.append(run.metric("vqa", "test", model, "overall"))
        rows.append([f"`{name}`", *map(percent, cells), NONE, NONE])
    cells = [run.metric("retrieval", "test", "shipped/blip2-tiny-itm", "reranked", name) for name in _FIRST]
    rows.append(["`blip2-tiny-itm`", NONE, NONE, NONE, *map(percent, cells)])
    return table(["unseen scenes", "CIDEr", "captions true, %", "questions, %", "TR@1", "IR@1"], rows)


_FIRST = ("txt_r1", "img_r1")


# -- findings --------------------------------------------------------------------------------------------------------


def _over_seeds(run: Measured, measure: Callable[[str], Number]) -> str:
    """`measure` takes the place of a seed's runs, such as "findings/0"."""
    return spread([measure(f"findings/{seed}") for seed in run.seeds()])


def _recalls(run: Measured, bridge: str, score: str) -> Row:
    return [
        _over_seeds(run, lambda place, name=name: run.metric("retrieval", "test", f"{place}/{bridge}", score, name))
        for name in _FIRST
    ]


def _generated(run: Measured, model: str) -> Row:
    """Answers without fine-tuning, CIDEr, captions that are true."""
    return [
        _over_seeds(run, lambda place: run.metric("vqa", "test", f"{place}/{model}", "overall")),
        _over_seeds(run, lambda place: run.metric("captioning", "test", f"{place}/{model}", "cider")),
        _over_seeds(run, lambda place: number(run.truth("test", f"{place}/{model}"), "true")),
    ]


_GENERATED = ["questions, zero-shot, %", "CIDEr", "captions true, %"]


def finding_itg(run: Measured) -> str:
    rows = [
        [title, *_recalls(run, bridge, "itc"), *_recalls(run, bridge, "reranked")]
        for bridge, title in (("stage1-no-itg", "ITC + ITM"), ("stage1", "ITC + ITM + ITG"))
    ]
    return table(["", "TR@1, ITC", "IR@1, ITC", "TR@1, re-ranked", "IR@1, re-ranked"], rows)


def finding_stage1(run: Measured) -> str:
    rows = [
        [f"{llm}, {start}", *_generated(run, model)]
        for model, llm, start in (
            ("stage2", "OPT", "with stage 1"),
            ("stage2-without-stage1", "OPT", "without"),
            ("stage2-t5", "T5", "with stage 1"),
            ("stage2-t5-without-stage1", "T5", "without"),
        )
    ]
    return table(["", *_GENERATED], rows)


def finding_backbones(run: Measured) -> str:
    rows = [
        [title, *_generated(run, model), *(_recalls(run, bridge, "reranked") if bridge else [NONE, NONE])]
        for model, bridge, title in (
            ("stage2", "stage1", "tower and OPT"),
            ("stage2-small-tower", "stage1-small-tower", "weaker tower"),
            ("stage2-small-llm", None, "smaller OPT"),
        )
    ]
    return table(["", *_GENERATED, "TR@1, re-ranked", "IR@1, re-ranked"], rows)


def finding_question(run: Measured) -> str:
    rows = [
        [title, _over_seeds(run, lambda place, name=name: run.metric("vqa", "test", f"{place}/{name}", "overall"))]
        for name, title in (
            ("vqa-unconditioned", "the Q-Former does not read the question"),
            ("vqa-conditioned", "the Q-Former reads the question"),
        )
    ]
    return table(["fine-tuned for questions", "accuracy in %"], rows)


def of_queries(queries: int) -> tuple[str, str]:
    """Names of the runs of stage 1 and 2 with so many queries."""
    suffix = "" if queries == QUERIES else f"-{queries}-queries"
    return f"stage1{suffix}", f"stage2{suffix}"


def finding_queries(run: Measured) -> str:
    rows = []
    for queries in sorted({QUERIES, *FINDING_QUERIES}):
        bridge, model = of_queries(queries)
        rows.append([str(queries), *_recalls(run, bridge, "reranked"), *_generated(run, model)])
    return table(["queries", "TR@1, re-ranked", "IR@1, re-ranked", *_GENERATED], rows)


# -- how it was made -------------------------------------------------------------------------------------------------


def towers(run: Measured) -> str:
    names = ("shape", "colour", "size", "texture", "thing", "column", "row")
    rows = []
    for size in ("base", "small"):
        found = run.backbone(f"towers/{size}")
        for split, title in (("scenes", "unseen scenes"), ("combinations", "unseen combinations")):
            values = [number(found, "accuracies", split, name) for name in names]
            parameters = number(found, "parameters")
            size_text = MISSING if parameters is None else f"{parameters / 1e6:.1f} M"
            rows.append([f"{size}, {title}", size_text, *map(percent, values)])
    return table(["accuracy of patches in %", "parameters", *names], rows)


def languages(run: Measured) -> str:
    rows = []
    for name in ("opt-base", "opt-small", "t5"):
        found = run.backbone(f"language/{name}")
        parameters = number(found, "parameters")
        row = [MISSING if parameters is None else f"{parameters / 1e6:.1f} M", plain(number(found, "perplexity"), 2)]
        rows.append([name, *row, *(percent(number(found, key)) for key in ("answered", "answered_blind"))])
    header = ["", "parameters", "perplexity", "answers from a description, %", "answers without, %"]
    return table(header, rows)


def times(run: Measured) -> str:
    plan = all_steps(Settings(seeds=max(1, len(run.seeds()))))
    rows = []
    for group, (seconds, ran, planned) in run.seconds(plan).items():
        rows.append([group, f"{seconds / 60:.1f}", f"{ran} of {planned}"])
    return table(["group of steps", "minutes", "steps"], rows or [[MISSING, NONE, NONE]])


def summary(run: Measured) -> str:
    """For README.md: the goals and what came out, on unseen scenes."""
    truth, blind = run.truth("test", "captioning-opt"), run.blind("test", "opt-base")
    re_ranked = [run.metric("retrieval", "test", "retrieval", "reranked", name) for name in _FIRST]
    itc = [run.metric("retrieval", "test", "retrieval", "itc", name) for name in _FIRST]
    best = [number(run.oracle("test"), name) for name in _FIRST]

    def pair(values: Sequence[Number]) -> str:
        return MISSING if None in values else " / ".join(map(percent, values))

    cider = run.metric("captioning", "test", "captioning-opt", "cider")
    rows = [
        ["retrieval, TR@1 / IR@1: ITC", pair(itc), f"oracle {pair(best)}"],
        ["retrieval, TR@1 / IR@1: re-ranked by ITM", pair(re_ranked), f"oracle {pair(best)}"],
        ["captions wholly true (OPT)", percent(number(truth, "true")), f"CIDEr {percent(cider)}"],
    ]
    alone = percent(number(blind, "language_model"))
    guess = percent(number(blind, "most_frequent_of_question"))
    for model, title in (("vqa-opt", "OPT"), ("vqa-t5", "T5")):
        said = run.metric("vqa", "test", model, "overall")
        rows.append([f"questions ({title})", percent(said), f"OPT alone {alone}, most frequent answers {guess}"])
    easy = run.metric("vqa", "easy-vqa", "easy-vqa-opt", "overall")
    guess = percent(number(run.blind("easy-vqa", "opt-base"), "most_frequent_of_question"))
    rows.append(["`easy-vqa`, test questions (OPT)", percent(easy), f"most frequent answers {guess}"])
    return table(["", "%", "beside it"], rows)


TABLES: dict[str, Callable[[Measured], str]] = {
    "summary": summary,
    "retrieval": retrieval,
    "captions": captions,
    "questions": questions,
    "kinds": kinds,
    "easy-vqa": easy_vqa,
    "shipped": shipped,
    "finding-itg": finding_itg,
    "finding-stage1": finding_stage1,
    "finding-backbones": finding_backbones,
    "finding-question": finding_question,
    "finding-queries": finding_queries,
    "towers": towers,
    "languages": languages,
    "times": times,
}


def _scenes(run: Measured, split: str, title: str) -> str:
    size = run.size(split)
    return title if size is None else f"{title} ({size:,})"
