"""The Q-Former's language-modelling head (Li et al. 2023, sec. 3.2: image-grounded text generation)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration import Blip2QFormerConfig


class Blip2QFormerLMHead(nn.Module):
    """BERT's head: dense, activation, LayerNorm, then scores of the vocabulary.

    `decoder.weight` is tied to the word embeddings by the model; its bias is the head's own.
    """

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V] logits."""
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))
