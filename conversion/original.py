"""What the original computes after its towers, straight from its parameter names (see `conversion.original_tower`).

Sources: https://github.com/salesforce/LAVIS, `lavis/models/blip2_models/Qformer.py`, `blip2_qformer.py`, `blip2_opt.py`
and `blip2_t5.py`, in evaluation mode. Shapes: B pairs, Q queries, T text tokens, P image tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from conversion.original_tower import Read, Watch, attention, image_features, layer_norm, linear

BERT_EPS = 1e-12
HIDDEN = -10000.0  # added to the scores of what is not to be seen
SMOOTHING = 0.1


@dataclass(frozen=True)
class OriginalShape:
    """What the forward needs to know beside the parameters.

    Attributes:
        tower: "eva" or "clip".
        tower_layers, tower_heads, qformer_heads: numbers of them.
        qformer_layers: the number of layers of the Q-Former.
        crossing: those of the Q-Former's layers that attend to the image.
    """

    tower: str
    tower_layers: int
    tower_heads: int
    qformer_heads: int
    qformer_layers: int
    crossing: frozenset[int]


class OriginalForward:
    """The passes of the original; every intermediate result goes through `watch`."""

    def __init__(self, read: Read, shape: OriginalShape, watch: Watch) -> None:
        self.read, self.shape, self.watch = read, shape, watch

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, P, D]."""
        shape = self.shape
        return image_features(self.read, shape.tower, shape.tower_layers, shape.tower_heads, pixels, self.watch)

    def queries(self, image: torch.Tensor) -> torch.Tensor:
        """The query pass: [B, Q, D]."""
        queries = self.read("query_tokens").expand(len(image), -1, -1)
        return self._layers("queries", queries, queries.shape[1], None, image)

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D], without an image."""
        return self._layers("text", self._words(ids), 0, _added(mask[:, None, None]), None)

    def matching(self, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pairs of image and text -> [B, Q + T, D]; everything sees everything."""
        queries = self.read("query_tokens").expand(len(image), -1, -1)
        whole = torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], dim=1)
        states = torch.cat([queries, self._words(ids)], dim=1)
        return self._layers("matching", states, queries.shape[1], _added(whole[:, None, None]), image)

    def captioning(self, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The text, word by word, after the queries, which do not see it: [B, Q + T, D].

        The original computes the queries' part in the query pass and reads its keys and values again: the same.
        """
        queries = self.read("query_tokens").expand(len(image), -1, -1)
        count, length = queries.shape[1], ids.shape[1]
        seen = torch.ones(count + length, count + length, dtype=mask.dtype, device=mask.device).tril()
        seen[:count, :count] = 1
        whole = torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], dim=1)
        states = torch.cat([queries, self._words(ids)], dim=1)
        return self._layers("captioning", states, count, _added(seen[None, None] * whole[:, None, None]), image)

    def words_after(self, states: torch.Tensor) -> torch.Tensor:
        """The captioning head: [B, T, D] -> [B, T, vocabulary]; its matrix is that of the word embeddings."""
        name = "Qformer.cls.predictions"
        hidden = nn.functional.gelu(linear(self.read, f"{name}.transform.dense", states))
        hidden = layer_norm(self.read, f"{name}.transform.LayerNorm", hidden, BERT_EPS)
        words = self.read("Qformer.bert.embeddings.word_embeddings.weight")
        return nn.functional.linear(hidden, words, self.read(f"{name}.bias"))

    def vectors(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Unit vectors by the projection `name`, "vision_proj" or "text_proj"."""
        return nn.functional.normalize(linear(self.read, name, states), dim=-1)

    def match_logits(self, states: torch.Tensor) -> torch.Tensor:
        """[B, Q + T, D] of the matching pass -> [B, 2]."""
        queries = self.read("query_tokens").shape[1]
        return linear(self.read, "itm_head", states[:, :queries]).mean(dim=1)

    # -- the Q-Former ------------------------------------------------------------------------------------------------

    def _words(self, ids: torch.Tensor) -> torch.Tensor:
        positions = self.read("Qformer.bert.embeddings.position_embeddings.weight")[: ids.shape[1]]
        return self.read("Qformer.bert.embeddings.word_embeddings.weight")[ids] + positions

    def _layers(
        self,
        name: str,
        states: torch.Tensor,
        query_length: int,
        mask: torch.Tensor | None,
        image: torch.Tensor | None,
    ) -> torch.Tensor:
        """All layers of the pass `name`; the first `query_length` positions are queries."""
        states = layer_norm(self.read, "Qformer.bert.embeddings.LayerNorm", states, BERT_EPS)
        states = self.watch(f"Q-Former, {name}, embeddings", states)
        for index in range(self.shape.qformer_layers):
            layer = f"Qformer.bert.encoder.layer.{index}"
            states = self._attended(f"{layer}.attention", states, states, mask)
            queries, text = states[:, :query_length], states[:, query_length:]
            if query_length and index in self.shape.crossing:
                queries = self._attended(f"{layer}.crossattention", queries, image, None)
            parts = []
            if query_length:
                parts.append(self._fed_forward(layer, "_query", queries))
            if text.shape[1]:
                parts.append(self._fed_forward(layer, "", text))
            states = self.watch(f"Q-Former, {name}, layer {index}", torch.cat(parts, dim=1))
        return states

    def _attended(
        self, name: str, states: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = (
            linear(self.read, f"{name}.self.{part}", given)
            for part, given in (("query", states), ("key", source), ("value", source))
        )
        seen = linear(self.read, f"{name}.output.dense", attention(query, key, value, self.shape.qformer_heads, mask))
        return layer_norm(self.read, f"{name}.output.LayerNorm", seen + states, BERT_EPS)

    def _fed_forward(self, layer: str, kind: str, states: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(linear(self.read, f"{layer}.intermediate{kind}.dense", states))
        name = f"{layer}.output{kind}"
        return layer_norm(self.read, f"{name}.LayerNorm", linear(self.read, f"{name}.dense", hidden) + states, BERT_EPS)


def _added(seen: torch.Tensor) -> torch.Tensor:
    return (1.0 - seen.float()) * HIDDEN


def contrastive_loss(similarity: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Image i and text i are pairs; `similarity` [B, B] are the largest cosines."""
    targets = torch.arange(len(similarity), device=similarity.device)
    both = (similarity / temperature, similarity.t() / temperature)
    return sum(nn.functional.cross_entropy(logits, targets, label_smoothing=SMOOTHING) for logits in both) / 2


def captioning_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Position t predicts token t + 1 of the ids with [DEC] in front; padding is not learned."""
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING)
