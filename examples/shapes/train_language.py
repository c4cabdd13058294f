"""A language model for the generated world, trained on text alone, with a tokenizer trained on the same text.

    python examples/shapes/train_language.py --size opt-base --corpus world/corpus_train.txt \\
        --eval-corpus world/corpus_val.txt --output-dir language/opt-base

--size opt-base and opt-small are decoder-only (OPT), t5 is an encoder-decoder (T5). They learn the language of the
world, and to answer questions from a description; no picture is ever seen. The folder is what `--language` of
run_stage2.py takes. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_rows import Document, LanguageBatches, decoder_batch, seq2seq_batch
from language_tokenizers import opt_tokenizer, t5_tokenizer
from training_loop import LoopOptions, add_options, finish, finished, options_of, train
from transformers import OPTConfig, OPTForCausalLM, PreTrainedConfig, PreTrainedModel, T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

POSITIONS = 256
SIZES: dict[str, dict[str, Any]] = {
    "opt-base": {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 640},
    "opt-small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256},
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 320, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4},
}
TRAINING: dict[str, dict[str, float]] = {
    "opt-base": {"steps": 9000, "batch_size": 32, "learning_rate": 1e-3, "warmup": 400},
    "opt-small": {"steps": 7000, "batch_size": 32, "learning_rate": 2e-3, "warmup": 400},
    "t5": {"steps": 7000, "batch_size": 32, "learning_rate": 7e-4, "warmup": 400},
}
_TOKENIZER_DOCUMENTS = 20_000
_LONGEST_ANSWER = 8  # tokens
# Of an OPT's weights (standard deviation). Its own, 0.02, is for wide models: in narrow ones nothing is looked up for
# thousands of steps.
_START = 0.06
# Embeddings have spare rows, as those of OPT and T5: one is that of BLIP-2's image placeholder.
_ROWS_MULTIPLE = 64


def language_model(size: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random one; the weights are drawn from torch's global generator."""
    rows = (len(tokenizer) // _ROWS_MULTIPLE + 1) * _ROWS_MULTIPLE
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if size == "t5":
        config: PreTrainedConfig = T5Config(
            **SIZES[size],
            vocab_size=rows,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id,
            relative_attention_num_buckets=32,
            **ids,
        )
        model = T5ForConditionalGeneration(config)
        # T5's own start, N(0, 1), is for a head that shares the embeddings and scales by this.
        with torch.no_grad():
            model.lm_head.weight.mul_(config.d_model**-0.5)
        return model
    config = OPTConfig(
        **SIZES[size],
        vocab_size=rows,
        word_embed_proj_dim=SIZES[size]["hidden_size"],
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=_START,
        bos_token_id=tokenizer.bos_token_id,
        **ids,
    )
    model = OPTForCausalLM(config)
    # Places that are alike at the start when they are near: to look one token back is then soon learned.
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.copy_(_START * _waves(POSITIONS + 2, SIZES[size]["hidden_size"]))
    return model


def _waves(places: int, width: int) -> torch.Tensor:
    """Sinusoids of all wavelengths [places, width]."""
    angles = torch.arange(places)[:, None] * torch.logspace(0, -3, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def read_corpus(path: str) -> list[str]:
    """The documents of a file, one on each line."""
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def loss_of_rows(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over rows of the sum over a row's targets, divided by the root of their number: so an answer of one word has
    its say beside captions, and looking up is learned."""
    labels = batch["labels"]
    inputs = {name: rows for name, rows in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        logits = model(**inputs, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits
    else:
        logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
    counts = (labels != -100).sum(dim=1)
    return (losses.sum(dim=1) / counts.clamp(min=1).sqrt()).mean()


# -- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: LanguageBatches, options: LoopOptions) -> float:
    """Of unseen documents, over all target tokens."""
    total = count = 0.0
    rng = np.random.default_rng(options.seed)
    for start in range(0, len(batches.texts), options.batch_size):
        documents = [Document.parsed(text) for text in batches.texts[start : start + options.batch_size]]
        batch = {name: rows.to(options.device) for name, rows in batches.batch(documents, rng).items()}
        labels = batch["labels"] if batches.encoder_decoder else batch["labels"][:, 1:]
        tokens = int((labels != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return math.exp(total / count)


@torch.no_grad()
def answered_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    batch_size: int,
    *,
    blind: bool,
) -> list[str]:
    """The likeliest answer, word by word, to the first question of each document.

    Args:
        blind: leave the description out.
    """
    encoder_decoder, texts = bool(model.config.is_encoder_decoder), []
    end = tokenizer.eos_token_id if encoder_decoder else tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    for start in range(0, len(documents), batch_size):
        some = documents[start : start + batch_size]
        pairs = [("" if blind else document.description, document.turns[0][0]) for document in some]
        if encoder_decoder:
            rows = seq2seq_batch([(f"{context} {prompt}".strip(), "") for context, prompt in pairs], tokenizer)
        else:
            contexts = [tokenizer(context, add_special_tokens=False)["input_ids"] for context, _ in pairs]
            ids = [[*context, *tokenizer(pair[1])["input_ids"]] for context, pair in zip(contexts, pairs, strict=True)]
            rows = decoder_batch([(row[::-1], row) for row in ids], tokenizer.pad_token_id)
            rows = {name: rows[name].flip(1) for name in ("input_ids", "attention_mask")}  # padded on the left
        inputs = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask")}
        found = model.generate(**inputs, do_sample=False, max_new_tokens=_LONGEST_ANSWER, eos_token_id=end)
        new = found if encoder_decoder else found[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], options: LoopOptions
) -> dict[str, float]:
    """Perplexity, and the share of single questions answered word for word, with the description and without it."""
    batches = LanguageBatches(
        texts,
        tokenizer,
        encoder_decoder=model.config.is_encoder_decoder,
        steps=1,
        batch_size=1,
        seed=options.seed,
    )
    asked = [document for document in map(Document.parsed, texts) if len(document.turns) == 1]
    shares = []
    for blind in (False, True):
        found = answered_each(model, tokenizer, asked, options.batch_size, blind=blind)
        right = [text == document.turns[0][1] for text, document in zip(found, asked, strict=True)]
        shares.append(round(sum(right) / max(1, len(right)), 4))
    return {
        "perplexity": round(perplexity(model, batches, options), 3),
        "questions": len(asked),
        "answered": shares[0],
        "answered_blind": shares[1],
    }


# -- run -------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="opt-base")
    parser.add_argument("--corpus", required=True, help="documents, one on each line")
    parser.add_argument("--eval-corpus", required=True, help="unseen ones")
    add_options(parser)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir)
    if report := finished(folder):
        print(f"{folder} is complete")
        return report
    options = options_of(arguments, TRAINING[arguments.size])
    texts = read_corpus(arguments.corpus)
    encoder_decoder = arguments.size == "t5"
    make = t5_tokenizer if encoder_decoder else opt_tokenizer
    tokenizer = make(texts[:_TOKENIZER_DOCUMENTS], POSITIONS)
    torch.manual_seed(options.seed)
    model = language_model(arguments.size, tokenizer).to(options.device)
    batches = LanguageBatches(
        texts,
        tokenizer,
        encoder_decoder=encoder_decoder,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    seconds = train(model, lambda batch: {"loss": loss_of_rows(model, batch)}, batches, options, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "size": arguments.size,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "documents": len(texts),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "seconds_of_last_start": round(seconds, 1),
        **evaluate(model, tokenizer, read_corpus(arguments.eval_corpus)[: arguments.eval_samples], options),
    }
    finish(folder, report)
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
