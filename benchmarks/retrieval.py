"""Re-ranking of images and texts by matching (ITM): ours against two peers on the same weights and features.

    python benchmarks/retrieval.py [--device cpu|cuda] [--dtype float32] [--repeats 3] [--threads 2] [--k 32 128]
        [--images 64] [--texts 320] [--captions captions.csv] [--sample 2] [--whole] [--flops-only] [--small]

64 images with 5 captions each; the Q-Former of the paper (12 layers of width 768, 32 queries; random weights); image
features [257, 1408] and contrastive similarities are there already. Both directions are re-ranked separately, as the
peers do: the k best texts of each image, the k best images of each text (k = 128: all 64). "both" is what an evaluation
needs, where ours matches a pair that both directions want once. Captions have the lengths of `--captions` (a CSV with a
column "caption": words and punctuation marks of the normalised text, and [CLS] and [SEP]) or those of
`LENGTHS`, which is the distribution of the 35,000 captions of Flickr8k; their words are drawn at random.

- "original": the procedure of the original code: per query, its candidates' texts padded to 35 tokens, the image's
  features repeated for each candidate and projected anew, all of the last layer. By leaf modules of our model (see
  `original_stage1.py`), with eager or fused attention, whichever is faster.
- "transformers": `Blip2ForImageTextRetrieval.forward` of the installed version, in chunks of `CHUNK` candidates of a
  query, padded to the longest of the chunk; its tower is replaced by one that returns the given features.

Scores must be equal (`TOLERANCE`). `gflop` counts the re-ranking of the whole set: cost per pair of every text length
that occurs, measured by torch's counter, times the number of pairs (checked on a real batch). Keys and values of images
are projected inside the measured part of ours ("features" of `KeyStore`; in an evaluation they may be left from the
contrastive stage). Time: the whole set takes hours on a CPU, so that by default the peers are timed on queries with
about 32 times `--sample` pairs, evenly spaced over the set, ours on the first images that have about 128 times
`--sample` pairs (at least one of each; fewer pairs would not fill batches of texts of similar length, which the set
does), and seconds per pair are compared; `--whole` times everything. `peak_mb` is beyond weights and features, that
of ours with keys and values of `BLOCK` images, as in a whole run.
"""

import argparse
import csv
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from common import add_arguments, emit, flops, in_turns, peak_mb, ratio, seconds, setting
from original_stage1 import KERNELS, OriginalStage1
from stage1_step import CLS, FIRST_WORD, SEP, build, config_of
from transformers import Blip2Config as TheirConfig, Blip2ForImageTextRetrieval as TheirModel

from blip2_hf.data import normalise_caption
from blip2_hf.evaluation.retrieval_scoring import candidates, contrastive_scores, match_pairs, rerank
from blip2_hf.evaluation.retrieval_store import GivenFeatures, KeyStore
from blip2_hf.evaluation.retrieval_texts import TextRows
from blip2_hf.evaluation.retrieval_tiles import plan_batches

# 64 quantiles of the lengths of Flickr8k's captions (mean 12.97; of all captions 12.95).
LENGTHS = (
    [6, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 12]
    + [13, 13, 13, 13, 13, 13, 13, 14, 14, 14, 14, 14, 15, 15, 15, 15, 15, 16, 16, 16, 16, 17, 17, 17, 18, 18, 18, 19]
    + [20, 21, 22, 25]
)
PADDED_LENGTH = 35
CHUNK = 32
BLOCK, BATCH = 32, 64  # ours: images, pairs
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def caption_lengths(path: str | None, texts: int) -> torch.Tensor:
    """[texts] tokens, evenly spaced through the file."""
    lengths = list(LENGTHS)
    if path is not None:
        with open(path, encoding="utf-8", newline="") as file:
            captions = [normalise_caption(row["caption"]) for row in csv.DictReader(file)]
        lengths = [min(len(re.findall(r"\w+|[^\w\s]", text)) + 2, PADDED_LENGTH) for text in captions]
    shuffled = torch.tensor(lengths)[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))]
    return shuffled.repeat(-(-texts // len(lengths)))[:texts]


def random_texts(lengths: torch.Tensor, vocabulary: int, device: str) -> TextRows:
    ids = torch.randint(
        FIRST_WORD, vocabulary - 1, (len(lengths), PADDED_LENGTH), generator=torch.Generator().manual_seed(1)
    )
    ids[:, 0] = CLS
    ids[torch.arange(len(lengths)), lengths - 1] = SEP
    ids[torch.arange(PADDED_LENGTH) >= lengths[:, None]] = 0
    return TextRows(ids.to(device), lengths)


class GivenTower(torch.nn.Module):
    """Returns what it is given."""

    def forward(self, pixel_values: torch.Tensor, **options: object) -> tuple[torch.Tensor]:
        return (pixel_values,)


@dataclass(eq=False)
class Bench:
    """Models, features and texts, and the three ways to score pairs."""

    model: torch.nn.Module
    features: torch.Tensor
    texts: TextRows
    device: str
    kernel: str = "sdpa"

    def __post_init__(self) -> None:
        config = self.model.config.to_dict()
        with torch.device("meta"):
            self.peer = TheirModel(TheirConfig(**{**config, "image_token_index": None}))
        self.peer.vision_model = GivenTower()
        own = {k: v for k, v in self.model.state_dict().items() if not k.startswith("vision_model.")}
        self.peer.load_state_dict(own, strict=False, assign=True)
        for module in self.peer.modules():  # buffers are in no file
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    filled = torch.arange(buffer.shape[-1], device=self.device).expand(buffer.shape)
                    setattr(module, name, filled.clone())
        assert not any(parameter.is_meta for parameter in self.peer.parameters())
        self.peer.eval()
        store = KeyStore(self.model, GivenFeatures(self.features), BLOCK)
        self.similarity, self.readable = contrastive_scores(store, self.texts)

    # -- per query, as the peers go ----------------------------------------------------------------------------------

    def original(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores of the candidates of one query: pairs images[i], rows[i]."""
        ids, mask = self.texts.ids[rows], self._mask(rows, PADDED_LENGTH)
        repeated = self.features[images]  # (contiguous copies, as by `repeat`)
        peer = OriginalStage1(self.model, self.kernel)
        queries = self.model.config.num_query_tokens
        output = peer.matching_pass(repeated, ids, mask)[:, :queries]
        return self.model.itm_head(output)[:, :, 1].mean(dim=1)

    def transformers(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        parts = []
        for chunk, chunk_rows in zip(images.split(CHUNK), rows.split(CHUNK), strict=True):
            longest = int(self.texts.lengths[chunk_rows].max())
            ids, mask = self.texts.ids[chunk_rows, :longest], self._mask(chunk_rows, longest)
            scores = self.peer(self.features[chunk], ids, mask, use_image_text_matching_head=True)
            parts.append(scores.logits_per_image[:, 1])
        return torch.cat(parts)

    def ours(self, wanted: torch.Tensor, images: int | None = None) -> torch.Tensor:
        """Logits of pairs, in the order of `wanted.nonzero()`; of the first `images` alone, if the others have none (so
        that no time goes into keys and values of images that are not sampled)."""
        part = slice(images)
        store = KeyStore(self.model, GivenFeatures(self.features[part]), BLOCK)
        return rerank(store, self.readable[part], self.texts, wanted[part], batch_size=BATCH)

    def _mask(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        return (torch.arange(length) < self.texts.lengths[rows][:, None]).long().to(self.device)

    # -- floating point operations -----------------------------------------------------------------------------------

    @cache  # noqa: B019 (there is one)
    def _pair_flops(self, name: str, length: int) -> int:
        """Of one pair with a text of this length (ours: keys and values are there)."""
        image = torch.tensor([0])
        texts = self.texts
        self.texts = TextRows(texts.ids[:1], torch.tensor([length]))
        keys = self.model.encode_for_matching(image_embeds=self.features[:1])
        try:
            if name == "ours":
                return flops(lambda: match_pairs(self.model, keys, image, self.texts, image, 1), self.model.qformer)
            kernel, self.kernel = self.kernel, "eager"
            run = getattr(self, name)
            counted = flops(lambda: run(image, image), self.model.qformer, self.peer.qformer)
            self.kernel = kernel
            return counted
        finally:
            self.texts = texts

    def key_flops(self) -> int:
        return flops(lambda: self.model.encode_for_matching(image_embeds=self.features[:1]), self.model.qformer)

    def whole_flops(self, name: str, wanted: torch.Tensor, queries: str) -> int:
        """Of all pairs."""
        lengths = self.texts.lengths
        if name == "ours":
            total = self.key_flops() * int(wanted.any(dim=1).sum())
            images, rows = wanted.nonzero(as_tuple=True)
            for start in range(0, len(wanted), BLOCK):
                inside = (images >= start) & (images < start + BLOCK)
                block = lengths[rows[inside]]
                for batch in plan_batches(images[inside], block, BATCH):
                    total += batch.numel() * self._pair_flops("ours", int(block[batch].max()))
            return total
        if name == "original":
            return int(wanted.sum()) * self._pair_flops(name, PADDED_LENGTH)
        total = 0
        for _, _, rows in queries_of(wanted, self.similarity, queries):
            for chunk in rows.split(CHUNK):
                total += len(chunk) * self._pair_flops(name, int(lengths[chunk].max()))
        return total


def bench_of(args: argparse.Namespace, lengths: torch.Tensor) -> Bench:
    """Random weights, `--images` features and a text of each length."""
    config = config_of(args.small)
    model = build(args, config).to(getattr(torch, args.dtype)).requires_grad_(False)
    vision = config.vision_config
    generator = torch.Generator().manual_seed(2)
    shape = (args.images, (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size)
    features = torch.randn(shape, generator=generator) + torch.randn(args.images, 1, shape[2], generator=generator)
    return Bench(
        model,
        features.to(args.device, getattr(torch, args.dtype)),
        random_texts(lengths, config.qformer_config.vocab_size, args.device),
        args.device,
    )


def queries_of(wanted: torch.Tensor, similarity: torch.Tensor, direction: str):
    """(query, images, texts) of the candidates of each query, the best first."""
    if direction == "image_to_text":
        for image, row in enumerate(wanted):
            rows = row.nonzero().flatten()
            rows = rows[similarity[image, rows].argsort(descending=True)]
            yield image, torch.full_like(rows, image), rows
        return
    for text, column in enumerate(wanted.t()):
        images = column.nonzero().flatten()
        images = images[similarity[images, text].argsort(descending=True)]
        yield text, images, torch.full_like(images, text)


def evenly(count: int, wanted: int) -> list[int]:
    return [int((index + 0.5) * count / wanted) for index in range(min(wanted, count))]


class Case:
    """One direction and k."""

    def __init__(self, bench: Bench, direction: str, k: int, args: argparse.Namespace):
        self.bench, self.direction, self.args = bench, direction, args
        of_images, of_texts = candidates(bench.similarity, k)
        self.wanted = of_images if direction == "image_to_text" else of_texts
        queries = list(queries_of(self.wanted, bench.similarity, direction))
        images = len(self.wanted)
        if not args.whole:  # pairs: about 32 `--sample` for the peers, 128 for ours, whose batches are filled
            share = len(queries) / int(self.wanted.sum())
            queries = [queries[n] for n in evenly(len(queries), max(1, round(32 * args.sample * share)))]
            images = max(1, round(128 * args.sample * images / int(self.wanted.sum())))
        self.queries = queries
        self.block = torch.zeros_like(self.wanted)
        self.block[:images] = self.wanted[:images]
        self.images = images

    @torch.no_grad()
    def loop(self, name: str) -> list[torch.Tensor]:
        run = getattr(self.bench, name)
        return [run(images, rows) for _, images, rows in self.queries]

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference to the scores of ours, of both peers, on the sampled queries (logits are of order 1).

        Raises:
            SystemExit: if it is beyond `TOLERANCE`.
        """
        pairs = torch.zeros_like(self.wanted)
        for _, images, rows in self.queries:
            pairs[images, rows] = True
        ours = torch.zeros(pairs.shape)
        ours[pairs] = self.bench.ours(pairs)
        differences = []
        for name in ("original", "transformers"):
            for (_, images, rows), scores in zip(self.queries, self.loop(name), strict=True):
                differences.append((ours[images, rows] - scores.float().cpu()).abs().max())
        worst = float(torch.stack(differences).max())  # NaN stays
        if not worst <= TOLERANCE[self.args.dtype]:
            raise SystemExit(f"scores differ by {worst:.1e}")
        return worst

    def spread(self) -> float:
        return float(torch.cat(self.loop("transformers")).float().std())

    def timed(self) -> dict[str, object]:
        theirs, ours = sum(len(rows) for _, _, rows in self.queries), int(self.block.sum())
        runs: dict[str, Callable] = {
            "ours": lambda: self.bench.ours(self.block, self.images),
            "original": lambda: self.loop("original"),
            "transformers": lambda: self.loop("transformers"),
        }
        times = in_turns(runs, self.args.repeats, self.args.device)
        per_pair = {name: [t / (ours if name == "ours" else theirs) for t in values] for name, values in times.items()}
        ratios = {name: ratio(per_pair, of=name) for name in ("original", "transformers")}
        runs["ours"] = lambda: self.bench.ours(self.block)  # with keys and values of a whole block of images
        return {
            "timed_pairs": {"ours": ours, "theirs": theirs},
            "peer_attention": self.bench.kernel,
            "time_ratio": {name: middle for name, (middle, _) in ratios.items()},
            "time_ratio_range": {name: extremes for name, (_, extremes) in ratios.items()},
            "seconds_per_pair": {name: round(statistics.median(values), 5) for name, values in per_pair.items()},
            "peak_mb": peak_mb(runs, self.args.device),
        }


@torch.no_grad()
def measure(bench: Bench, direction: str, k: int, args: argparse.Namespace) -> dict[str, object]:
    case = Case(bench, direction, k, args)
    difference = case.difference()  # warms up as well
    counted = {name: bench.whole_flops(name, case.wanted, direction) for name in ("ours", "original", "transformers")}
    record = {
        "direction": direction,
        "k": k,
        "pairs": int(case.wanted.sum()),
        "largest_difference": float(f"{difference:.1e}"),
        "logit_deviation": float(f"{case.spread():.1e}"),
        "gflop": {name: round(value / 1e9, 1) for name, value in counted.items()},
        "flop_ratio": {name: round(counted[name] / counted["ours"], 2) for name in ("original", "transformers")},
    }
    return record if args.flops_only else record | case.timed()


def both(bench: Bench, k: int) -> dict[str, object]:
    """An evaluation: ours matches a pair that both directions want once."""
    of_images, of_texts = candidates(bench.similarity, k)
    ours = bench.whole_flops("ours", of_images | of_texts, "")
    theirs = {
        name: bench.whole_flops(name, of_images, "image_to_text") + bench.whole_flops(name, of_texts, "text_to_image")
        for name in ("original", "transformers")
    }
    return {
        "direction": "both",
        "k": k,
        "pairs": {"ours": int((of_images | of_texts).sum()), "theirs": int(of_images.sum() + of_texts.sum())},
        "gflop": {name: round(value / 1e9, 1) for name, value in {"ours": ours, **theirs}.items()},
        "flop_ratio": {name: round(value / ours, 2) for name, value in theirs.items()},
    }


def check_counting(bench: Bench) -> None:
    """The cost per pair times the pairs is what the counter sees of a real batch of two images."""
    wanted = torch.zeros(bench.similarity.shape, dtype=torch.bool)
    wanted[:2, :9] = True
    keys = bench.model.encode_for_matching(image_embeds=bench.features[:2])
    images, rows = wanted.nonzero(as_tuple=True)
    real = flops(lambda: match_pairs(bench.model, keys, images, bench.texts, rows, BATCH), bench.model.qformer)
    expected = bench.whole_flops("ours", wanted, "") - 2 * bench.key_flops()
    assert real == expected, (real, expected)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--k", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--captions", help="CSV with a column `caption`, for real lengths")
    parser.add_argument("--sample", type=int, default=2, help="times 32 pairs (theirs), 128 (ours) are timed")
    parser.add_argument("--whole", action="store_true", help="time all queries")
    parser.add_argument("--flops-only", action="store_true", help="compare and count, without timing")
    args = parser.parse_args()
    lengths = caption_lengths(args.captions, args.texts)
    described = {"mean": round(lengths.float().mean().item(), 2), "longest": int(lengths.max())}
    sizes = {"images": args.images, "texts": args.texts, "sample": None if args.whole else args.sample}
    emit({"benchmark": "retrieval", **sizes, "caption_tokens": described, **setting(args)})
    bench = bench_of(args, lengths)
    check_counting(bench)
    if not args.flops_only:
        probe = Case(bench, "image_to_text", 32, argparse.Namespace(**{**vars(args), "whole": False, "sample": 1}))
        tried = {}
        for name in KERNELS:
            bench.kernel = name
            probe.loop("original")
            tried[name] = seconds(lambda: probe.loop("original"), args.device)
        bench.kernel = min(tried, key=tried.get)
    for k in args.k:
        for direction in ("image_to_text", "text_to_image"):
            emit(measure(bench, direction, k, args))
        emit(both(bench, k))


if __name__ == "__main__":
    main()
