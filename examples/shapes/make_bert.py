"""A random BERT of the Q-Former's size with a WordPiece tokenizer of the world: what `--text` of run_stage1.py takes.

    python examples/shapes/make_bert.py --corpus world/corpus_train.txt --output-dir bert

It stands where bert-base-uncased stands in the paper, but has learned nothing: the world has few words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from language_tokenizers import bert_tokenizer
from train_language import read_corpus
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM

POSITIONS = 64
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
_TOKENIZER_DOCUMENTS = 20_000
# Standard deviation of the weights, of those that the Q-Former adds as well. BERT's own, 0.02, is for wide models: with
# it stage 1 took 450 steps to the losses that it has after 250 so.
_START = 0.06


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="documents, one on each line")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output_dir)
    tokenizer = bert_tokenizer(read_corpus(arguments.corpus)[:_TOKENIZER_DOCUMENTS], POSITIONS)
    torch.manual_seed(arguments.seed)
    config = BertConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=_START,
        hidden_dropout_prob=0.0,  # a few passes over what is generated: there is nothing to learn by heart
        attention_probs_dropout_prob=0.0,
    )
    tokenizer.save_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
