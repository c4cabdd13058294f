"""The table of what `profile_cases.py` found, in docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable

from benchmark_cells import short, simple
from benchmark_results import Results, Row

PROFILED = {
    "vqa-opt": "VQA, answers of 10 tokens: OPT",
    "caption-opt": "captions of 20 tokens: OPT",
    "vqa-t5": "VQA, answers of 10 tokens: T5",
    "full-caption": "captions of 20 tokens: `blip2-opt-2.7b`",
    "stage1": "stage-1 step, B = 8",
    "stage1-whole": "stage-1 step with ViT-g and optimiser, B = 100",
    "stage2-opt": "stage-2 step like `blip2-opt-2.7b`",
    "stage2-t5": "stage-2 step like `blip2-flan-t5-xl`",
    "rerank": "re-ranking, texts of images",
    "photo": "4 photos of 12 MP, default",
    "photo-exact": "4 photos of 12 MP, every pixel",
    "folder": "captions of a folder of 4 photos of 12 MP, no workers",
}
GROUPS = {
    "matmul": "matrix products",
    "attention": "attention",
    "softmax": "softmax and top-k",
    "norms": "norms, activations, sums",
    "copies": "copies",
    "index": "indexing",
    "optimiser": "optimiser",
    "images": "images",
    "other": "other operators",
    "dispatch": "Python and dispatch",
}


def profile(results: Results) -> str:
    def percent(shares: Iterable[tuple[str, float]]) -> str:
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares if share >= 0.005)

    def groups(row: Row) -> str:
        return percent(
            (GROUPS[name], share) for name, share in sorted(row["groups"].items(), key=lambda item: -item[1])
        )

    return simple(
        results,
        "profile",
        ("case",),
        ("case", "seconds", "where they go", "the operators that cost most", "GFLOP/s of matrix products, of the best"),
        lambda row: (
            PROFILED[row["case"]],
            short(row["seconds"]),
            groups(row),
            percent((f"`{name}`", share) for name, share, _ in row["operators"]),
            "–" if row.get("matmul_gflops") is None else f"{row['matmul_gflops']:.0f} of {row['best_gflops']:.0f}",
        ),
        order=lambda row: list(PROFILED).index(row["case"]),
    )
