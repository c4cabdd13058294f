"""Stage 1 as the original code computes it, on the weights of our model: the peer of `stage1_step.py`.

Written from a description of the procedure (Li et al. 2023, sec. 3.2, and notes on the released code), with nothing
shared between passes but what the original shares:

- query pass: the queries alone over the image; its self-attention keys and values are kept for the captioning pass;
- text pass: the text alone;
- matching pass: queries and text, 3B rows, the image's features repeated and their keys and values projected again;
- captioning pass: the text, causal, behind the query pass's keys and values.

Text is padded to a constant length, the last layer computes all positions, and the language-modelling head all
positions of the text. Only leaf modules of our model are called (linear layers, norms, embeddings), so nothing that
ours saves can leak in here.

Shapes: B pairs, Q queries, T text tokens, P image tokens, D width, R rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]
NEVER = -10000.0  # the original's additive mask


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1) @ value


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, None if mask is None else mask.to(query.dtype))


KERNELS: dict[str, Callable] = {"eager": eager, "sdpa": sdpa}


class OriginalStage1:
    """The three losses of one process.

    Args:
        model: a `Blip2ForImageTextRetrieval`; its weights are used, none of its methods.
        attention: "eager" (what the original does) or "sdpa".
    """

    def __init__(self, model: nn.Module, attention: str = "sdpa"):
        self.model = model
        self.layers = model.qformer.encoder.layer
        self.heads = model.config.qformer_config.num_attention_heads
        self.attention = KERNELS[attention]

    def losses(
        self,
        image_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        negative_image_indices: torch.Tensor,
        negative_text_indices: torch.Tensor,
        wanted: tuple[str, ...] = ("itc", "itm", "itg"),
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            image_embeds: [B, P, E] after `ln_vision`.
            input_ids, attention_mask: [B, T], padded on the right to a constant length.
            negative_image_indices, negative_text_indices: [B], given instead of drawn, so that two implementations
                can be compared.
            wanted: losses to compute; a pass that none of them reads is left out.

        Returns:
            name -> scalar.
        """
        result = {}
        if "itc" in wanted or "itg" in wanted:
            query_output, past = self.query_pass(image_embeds)
        if "itc" in wanted:
            result["itc"] = self.contrastive(query_output, self.text_pass(input_ids, attention_mask))
        if "itm" in wanted:
            rows = self.matching_rows(input_ids, attention_mask, negative_text_indices)
            images = torch.cat([image_embeds, image_embeds[negative_image_indices], image_embeds])
            result["itm"] = self.matching(self.matching_pass(images, *rows))
        if "itg" in wanted:
            logits = self.captioning_pass(input_ids, attention_mask, past)
            result["itg"] = self.captioning(logits, input_ids, attention_mask)
        return result

    # -- the passes --------------------------------------------------------------------------------------------------

    def query_pass(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, list[Pair]]:
        """[B, Q, D] and the self-attention keys and values of every layer."""
        queries = self.model.query_tokens.expand(image_embeds.shape[0], -1, -1)
        return self.run(queries, queries.shape[1], None, image_embeds)

    def text_pass(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.run(self.embed(input_ids), 0, additive(attention_mask[:, None, None].bool()))[0]

    def matching_pass(
        self, image_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """[3B, Q + T, D]; every row has an image of its own."""
        queries = self.model.query_tokens.expand(input_ids.shape[0], -1, -1)
        seen = torch.cat([attention_mask.new_ones(queries.shape[:2]), attention_mask], dim=1).bool()
        embedded = torch.cat([queries, self.embed(input_ids)], dim=1)
        return self.run(embedded, queries.shape[1], additive(seen[:, None, None]), image_embeds)[0]

    def captioning_pass(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[Pair]) -> torch.Tensor:
        """Logits [B, T, V] of every position, padding included."""
        text = self.model.config.qformer_config
        ids = input_ids.clone()
        ids[:, 0] = text.vocab_size - 1 if text.bos_token_id is None else text.bos_token_id  # [DEC]
        length, queries = ids.shape[1], past[0][0].shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen = causal & attention_mask[:, None].bool()
        seen = torch.cat([seen.new_ones(*seen.shape[:2], queries), seen], dim=2)
        hidden, _ = self.run(self.embed(ids), 0, additive(seen[:, None]), past=past)
        head = self.model.lm_head
        return head.decoder(head.layer_norm(nn.functional.gelu(head.dense(hidden))))

    @staticmethod
    def matching_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, negatives: torch.Tensor) -> Pair:
        """Texts of the 3B rows: own, own (beside another image), another."""
        return tuple(torch.cat([tensor, tensor, tensor[negatives]]) for tensor in (input_ids, attention_mask))

    # -- the losses --------------------------------------------------------------------------------------------------

    def contrastive(self, query_output: torch.Tensor, text_output: torch.Tensor) -> torch.Tensor:
        """Both sides' gradients flow only if `itc_gather_gradients` is set, as in our model; the original stops them
        at the side that was gathered from all processes."""
        images = nn.functional.normalize(self.model.vision_projection(query_output), dim=-1)
        texts = nn.functional.normalize(self.model.text_projection(text_output[:, 0]), dim=-1)
        gathered = (images, texts) if self.model.config.itc_gather_gradients else (images.detach(), texts.detach())
        to_text = torch.einsum("iqd,td->iqt", images, gathered[1]).amax(dim=1) / self.model.temperature
        to_image = torch.einsum("td,iqd->tiq", texts, gathered[0]).amax(dim=2) / self.model.temperature
        own = torch.arange(len(images), device=images.device)
        return sum(nn.functional.cross_entropy(side, own, label_smoothing=0.1) for side in (to_text, to_image)) / 2

    def matching(self, output: torch.Tensor) -> torch.Tensor:
        logits = self.model.itm_head(output[:, : self.model.config.num_query_tokens]).mean(dim=1)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(logits) // 3] = 1
        return nn.functional.cross_entropy(logits, labels)

    @staticmethod
    def captioning(logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        targets = input_ids.masked_fill(attention_mask == 0, -100)[:, 1:]
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, label_smoothing=0.1)

    # -- the network -------------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        embeddings = self.model.embeddings
        return embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(positions)

    def run(
        self,
        hidden: torch.Tensor,
        queries: int,
        mask: torch.Tensor | None,
        image_embeds: torch.Tensor | None = None,
        past: list[Pair] | None = None,
    ) -> tuple[torch.Tensor, list[Pair]]:
        """All layers on all positions [R, S, D], of which the first `queries` are queries."""
        hidden, cache = self.model.qformer.layernorm(hidden), []
        for index, layer in enumerate(self.layers):
            own = self.key_value(layer.attention, hidden)
            cache.append(own)
            if past is not None:
                own = tuple(torch.cat(pair, dim=2) for pair in zip(past[index], own, strict=True))
            hidden = self.attend(layer.attention, hidden, own, mask)
            seeing, text = hidden[:, :queries], hidden[:, queries:]
            if queries:
                if layer.has_cross_attention:
                    image = self.key_value(layer.crossattention, image_embeds)
                    seeing = self.attend(layer.crossattention, seeing, image, None)
                seeing = feed_forward(layer.intermediate_query, layer.output_query, seeing)
            if text.shape[1]:
                text = feed_forward(layer.intermediate, layer.output, text)
            parts = [part for part in (seeing, text) if part.shape[1]]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return hidden, cache

    def split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def key_value(self, block: nn.Module, source: torch.Tensor) -> Pair:
        return self.split(block.attention.key(source)), self.split(block.attention.value(source))

    def attend(self, block: nn.Module, hidden: torch.Tensor, pair: Pair, mask: torch.Tensor | None) -> torch.Tensor:
        mixed = self.attention(self.split(block.attention.query(hidden)), *pair, mask)
        return block.output.LayerNorm(block.output.dense(mixed.transpose(1, 2).flatten(2)) + hidden)


def feed_forward(inner: nn.Module, outer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return outer.LayerNorm(outer.dense(nn.functional.gelu(inner.dense(hidden))) + hidden)


def additive(seen: torch.Tensor) -> torch.Tensor:
    """Boolean, True = may attend -> 0 or `NEVER`, to be added to the scores."""
    return torch.where(seen, 0.0, NEVER)
