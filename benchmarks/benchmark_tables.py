"""The tables of docs/performance.md and of README.md's numbers, made of result files (see report.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmark_cells import BOTH, MISSING, each, ratio_of, short, simple
from benchmark_results import Results, Row
from profile_table import profile

LANGUAGE_MODELS = {
    "opt": "OPT, 24 layers x 1024",
    "t5": "T5, 12 + 12 layers x 1024",
    "t5-large": "T5, 24 + 24 layers x 1024",
}
ANSWERS = {
    "vqa-short": "VQA, answers of 2 tokens",
    "vqa": "VQA, answers of 10 tokens",
    "caption": "captions of 20 tokens",
    "questions": "5 questions on each of 2 images",
}
DIRECTIONS = {"image_to_text": "texts of images", "text_to_image": "images of texts", "both": "both"}
PEERS = ("original", "transformers")


def in_order(row: Row) -> tuple[int, int]:
    return list(LANGUAGE_MODELS).index(row["language_model"]), list(ANSWERS).index(row["case"])


def generation(results: Results) -> str:
    return simple(
        results,
        "generation",
        ("language_model", "case"),
        ("language model", "task", "time ratio", "FLOP ratio", "seconds", "GFLOP", "peak MB beyond weights"),
        lambda row: (
            f"{LANGUAGE_MODELS[row['language_model']]} ({row['parameters'] / 1e6:.0f}M)",
            ANSWERS[row["case"]],
            ratio_of(row),
            f"{row['flop_ratio']:.2f}",
            *(each(row[field]) for field in ("seconds", "gflop", "peak_mb")),
        ),
        needs=("time_ratio",),
        where=lambda row: row["language_model"] in LANGUAGE_MODELS and row.get("compiled") in (None, "no"),
        order=in_order,
    )


def throughput(results: Results) -> str:
    def per_second(row: Row) -> dict[str, float]:
        return {who: round(row["rows"] / taken, 3) for who, taken in row["seconds"].items()}

    return simple(
        results,
        "generation",
        ("language_model", "case", "rows", "compiled"),
        (
            "model",
            "task",
            "B",
            "ours compiled",
            "answers per second",
            "time ratio",
            "FLOP ratio",
            "same answers",
            "peak GB in all",
        ),
        lambda row: (
            f"`{row['language_model']}`",
            ANSWERS[row["case"]],
            str(row["rows"]),
            row["compiled"],
            each(per_second(row)),
            ratio_of(row),
            f"{row['flop_ratio']:.2f}",
            f"{100 * row['identical_rows']:.0f} %",
            in_all(row),
        ),
        needs=("time_ratio", "identical_rows"),
        where=lambda row: row["language_model"] not in LANGUAGE_MODELS,
        order=lambda row: (
            row["language_model"],
            list(ANSWERS).index(row["case"]),
            row["rows"],
            row["compiled"] != "no",
        ),
    )


def in_all(row: Row) -> str:
    """Peak memory in GiB with what was held before, where both were recorded."""
    held, peak = row.get("held_mb"), row.get("peak_mb")
    if held is None or peak is None or (isinstance(peak, dict) and None in peak.values()):
        return "–"
    if isinstance(peak, dict):
        return each({who: round((held + value) / 1024, 1) for who, value in peak.items()})
    return short(round((held + peak) / 1024, 1))


def stage1_step(results: Results) -> str:
    return simple(
        results,
        "stage1_step",
        ("batch",),
        ("B", "time ratio", "seconds", "GFLOP forward", "GFLOP forward and backward", "share of FLOPs")
        + ("peak MB beyond weights",),
        lambda row: (
            str(row["batch"]),
            ratio_of(row),
            *(each(row[field]) for field in ("seconds", "gflop", "gflop_step")),
            f"{row['flop_share']:.2f}",
            each(row["peak_mb"]),
        ),
        needs=("time_ratio", "gflop_step"),
        order=lambda row: row["batch"],
    )


def stage1_passes(results: Results) -> str:
    passes = ("query", "text", "itm", "itg")
    return simple(
        results,
        "stage1_step",
        ("batch",),
        ("GFLOP forward, ours / original's procedure", "queries", "text", "ITM", "ITG"),
        lambda row: (
            f"B = {row['batch']}",
            *(" / ".join(f"{row['gflop_passes'][who][name]:.1f}" for who in BOTH) for name in passes),
        ),
        needs=("gflop_passes",),
        order=lambda row: row["batch"],
    )


def stage1_whole(results: Results) -> str:
    return simple(
        results,
        "stage1_step",
        ("batch", "tower"),
        (
            "B",
            "tower",
            "samples per second",
            "to the paper's rate per GPU",
            "MFU",
            "GFLOP per sample",
            "peak GB in all",
        ),
        lambda row: (
            f"{row['batch']}{' (largest)' if row.get('largest_batch') else ''}",
            row["tower"],
            *(short(row.get(name)) for name in ("samples_per_second", "paper_ratio", "mfu", "gflop_per_sample")),
            in_all(row),
        ),
        needs=("paper_ratio",),
        order=lambda row: (row["batch"], row["tower"] != "eager"),
    )


def stage2_counts(results: Results) -> str:
    fields = ("weights_gb", "gradients_gb", "optimizer_gb", "gflop_per_sample", "checkpoint_gb")
    return simple(
        results,
        "stage2_counts",
        ("checkpoint",),
        ("model (224 px)", "trained", "weights GB", "gradients GB", "optimiser GB", "GFLOP", "connector checkpoint GB")
        + ("gradients + optimiser GB, nothing frozen",),
        lambda row: (
            f"`{row['checkpoint']}`",
            f"{row['stage2']['trained_parameters'] / 1e6:.1f}M",
            *(short(row["stage2"][name]) for name in fields),
            short(row["nothing_frozen"]["gradients_gb"] + row["nothing_frozen"]["optimizer_gb"]),
        ),
        where=lambda row: row["image_size"] == 224,
    )


def stage2_finetuning(results: Results) -> str:
    fields = ("weights_gb", "gradients_gb", "optimizer_gb", "gflop_per_sample")
    return simple(
        results,
        "stage2_counts",
        ("checkpoint",),
        ("fine-tuning, tower trained (364 px)", "trained", "weights GB", "gradients GB", "optimiser GB", "GFLOP"),
        lambda row: (
            f"`{row['checkpoint']}`",
            f"{row['finetuning']['trained_parameters'] / 1e6:.0f}M",
            *(short(row["finetuning"][name]) for name in fields),
        ),
        where=lambda row: row["image_size"] == 364,
    )


def stage2_step(results: Results) -> str:
    return simple(
        results,
        "stage2_step",
        ("model", "size", "batch"),
        ("like", "size", "B", "time ratio", "share of FLOPs", "GFLOP per sample and step", "samples per second", "MFU")
        + ("kept for the backward pass MB", "peak MB beyond weights", "peak GB in all"),
        lambda row: (
            f"`{row['model']}`",
            row["size"],
            str(row["batch"]),
            ratio_of(row),
            f"{row['flop_share']:.2f}",
            short(row["gflop_step_per_sample"]["ours"]),
            each(row["samples_per_second"]),
            short(row.get("mfu")),
            *(each(row[field]) for field in ("saved_mb", "peak_mb")),
            in_all(row),
        ),
        needs=("time_ratio", "gflop_step_per_sample"),
    )


def stage2_largest(results: Results) -> str:
    return simple(
        results,
        "stage2_step",
        ("model", "size"),
        ("model", "size", "largest B, ours / theirs"),
        lambda row: (f"`{row['model']}`", row["size"], each(row["largest_batch"])),
        needs=("largest_batch",),
    )


def retrieval_order(row: Row) -> tuple[int, int]:
    return row["k"], list(DIRECTIONS).index(row["direction"])


def retrieval_counts(results: Results) -> str:
    def pairs(row: Row) -> str:
        return each(row["pairs"]) if isinstance(row["pairs"], dict) else str(row["pairs"])

    return simple(
        results,
        "retrieval",
        ("k", "direction"),
        ("", "pairs, ours / theirs", "GFLOP, ours / original / transformers", "FLOP ratio to original")
        + ("to transformers",),
        lambda row: (
            f"k = {row['k']}, {DIRECTIONS[row['direction']]}",
            pairs(row),
            each(row["gflop"], ("ours", *PEERS)),
            *(f"{row['flop_ratio'][peer]:.2f}" for peer in PEERS),
        ),
        needs=("flop_ratio",),
        order=retrieval_order,
    )


def retrieval_times(results: Results) -> str:
    return simple(
        results,
        "retrieval",
        ("k", "direction"),
        ("", "time ratio to original", "to transformers", "seconds per pair, ours / original / transformers")
        + ("peak MB, ours / original / transformers", "original's attention"),
        lambda row: (
            f"k = {row['k']}, {DIRECTIONS[row['direction']]}",
            *(ratio_of(row, peer) for peer in PEERS),
            *(each(row[field], ("ours", *PEERS)) for field in ("seconds_per_pair", "peak_mb")),
            {"sdpa": "fused"}.get(row["peer_attention"], row["peer_attention"]),
        ),
        needs=("time_ratio",),
        order=retrieval_order,
    )


def augmentation(results: Results) -> str:
    return simple(
        results,
        "augmentation",
        ("photo", "exact"),
        ("photo", "decoded", "time ratio", "images per second", "mean difference in grey levels"),
        lambda row: (
            row["photo"],
            "every pixel" if row["exact"] else "default",
            ratio_of(row),
            each(row["images_per_second"]),
            f"{row['mean_grey_levels']:.2f}",
        ),
        order=lambda row: (-row["width"], row["exact"]),
    )


def loading(results: Results) -> str:
    precisions = ("float32", "bfloat16", "float16")
    return simple(
        results,
        "loading",
        ("family", "stored_as", "load_as"),
        ("file", "model", "seconds of `from_pretrained`", "until every weight was read", "time ratio of that")
        + ("ratio with the import of the class", "peak memory over weights", "without mapped pages"),
        lambda row: (
            row["stored_as"],
            row["load_as"],
            *(each(row[field], show=lambda value: f"{value:.2f}") for field in ("seconds", "ready_seconds")),
            ratio_of(row),
            ratio_of(row, name="started_ratio"),
            *(
                each(row[field], show=lambda value: f"{value:.2f}")
                for field in ("peak_over_weights", "anonymous_over_weights")
            ),
        ),
        order=lambda row: (row["family"], *(precisions.index(row[field]) for field in ("stored_as", "load_as"))),
    )


def importing(results: Results) -> str:
    parts = ("ours", "theirs", "base", "torch")
    return simple(
        results,
        "loading",
        ("imported",),
        ("class", "ratio of CPU time", "with a collection behind it", "CPU seconds", "seconds", "modules"),
        lambda row: (
            f"`{row['imported']}`",
            ratio_of(row),
            f"{row['collected_ratio']:.2f}",
            *(each(row[field], parts, show=lambda value: f"{value:.2f}") for field in ("cpu_seconds", "seconds")),
            each(row["modules"], parts),
        ),
    )


def processor(results: Results) -> str:
    return simple(
        results,
        "processor",
        ("photos", "images", "exact"),
        ("photos", "images per call", "decoded", "time ratio", "images per second"),
        lambda row: (
            row["photos"],
            str(row["images"]),
            "every pixel" if row["exact"] else "default",
            ratio_of(row),
            each(row["images_per_second"]),
        ),
        order=lambda row: (-row["width"], row["images"], row["exact"]),
    )


def folder(results: Results) -> str:
    fields = ("read", "model", "sum_of_parts", "workers_0", "workers_1", "workers_2")
    return simple(
        results,
        "folder",
        ("photos", "images", "batch_size", "num_beams"),
        ("photos", "B", "beams", "reading", "model", "sum of parts", "command, no workers", "1 worker", "2 workers")
        + ("2 workers over none",),
        lambda row: (
            row["photos"],
            str(row["batch_size"]),
            str(row["num_beams"]),
            *(short(row[field]) for field in fields),
            f"{row['against_off_2']:.2f}",
        ),
        needs=(*fields, "against_off_2"),
    )


def conversion(results: Results) -> str:
    how = ("streamed", "in memory")
    return simple(
        results,
        "conversion",
        ("precision",),
        ("written", "sources GB", "peak GB, streamed / all in memory", "largest shard GB", "seconds"),
        lambda row: (
            row["precision"],
            short(row["sources_gb"]),
            each(row["peak_gb"], how),
            short(row["largest_shard_gb"]),
            each(row["seconds"], how),
        ),
    )


# -- README ------------------------------------------------------------------------------------------------------------


def numbers(results: Results) -> str:
    """The most telling rows, on the CPU."""
    lines: list[tuple[str, str, Row]] = []

    def newest(benchmark: str, *case: str, needs: Sequence[str] = (), **values: object) -> list[Row]:
        def wanted(row: Row) -> bool:
            plain = row.setting.get("dtype") in (None, "float32") and row.get("compiled") in (None, "no")
            return plain and all(row.get(name) == value for name, value in values.items())

        return results.newest(benchmark, "cpu", case, needs, wanted)

    for row in sorted(newest("generation", "language_model", "case", needs=("time_ratio",)), key=in_order):
        model = LANGUAGE_MODELS[row["language_model"]]
        value = f"{row['time_ratio']:.2f}x in time, {row['flop_ratio']:.2f}x in FLOPs"
        lines.append((f"{ANSWERS[row['case']]}, beam 5: {model}", value, row))
    for row in newest("stage1_step", "batch", batch=16, needs=("time_ratio", "flop_share")):
        value = f"{row['time_ratio']:.2f}x in time, {row['flop_share']:.2f} of the FLOPs"
        lines.append(("stage-1 step, batch 16, against the original procedure", value, row))
    for row in newest("retrieval", "k", "direction", k=32, direction="both"):
        value = f"{row['gflop']['ours'] / row['gflop']['original']:.2f} of the FLOPs"
        lines.append(("re-ranking by ITM, k = 32, both directions, against the original procedure", value, row))
    photos = newest("processor", "photos", "images", "exact", photos="12 MP", images=4)
    for row in sorted(photos, key=lambda row: row["exact"]):
        pixels = "every pixel decoded" if row["exact"] else "default"
        what = f"12-megapixel JPEG files to pixel values, 4 at a time, {pixels}"
        lines.append((what, f"{row['time_ratio']:.1f}x in time", row))
    for row in newest("loading", "family", "stored_as", "load_as"):
        value = f"{row['time_ratio']:.1f}x in time, memory {row['peak_over_weights']['ours']:.2f}x the weights"
        value += f" (theirs {row['peak_over_weights']['theirs']:.2f}x)"
        what = f"`from_pretrained` of {row['file_mb'] / 1024:.1f} GiB of {row['stored_as']} as {row['load_as']}"
        lines.append((what, value, row))
    for row in newest("loading", "imported"):
        lines.append((f"importing `{row['imported']}`", f"{row['time_ratio']:.1f}x in CPU time", row))
    if not lines:
        return MISSING
    head = ["| what, on CPU cores | ratio | measured | threads |", "|---|---|---|---|"]
    return "\n".join(
        head + [f"| {what} | {value} | {row.date} | {row.setting['threads']} |" for what, value, row in lines]
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "generation": generation,
    "throughput": throughput,
    "stage1-step": stage1_step,
    "stage1-passes": stage1_passes,
    "stage1-whole": stage1_whole,
    "stage2-counts": stage2_counts,
    "stage2-finetuning": stage2_finetuning,
    "stage2-step": stage2_step,
    "stage2-largest": stage2_largest,
    "retrieval-counts": retrieval_counts,
    "retrieval-times": retrieval_times,
    "augmentation": augmentation,
    "loading": loading,
    "importing": importing,
    "processor": processor,
    "folder": folder,
    "conversion": conversion,
    "profile": profile,
    "numbers": numbers,
}
