"""The three objectives of representation learning as pure tensor functions (Li et al. 2023, sec. 3.2).

Shapes: n pairs of this process, N pairs of all processes, Q queries, T text tokens, d shared width, V vocabulary.
Each loss is a sum over rows or tokens, which the caller divides by the number it averages over: a sum is what splits
exactly over processes and over accumulation steps.
"""

from __future__ import annotations

import torch
from torch import nn


def image_text_similarity(image_vectors: torch.Tensor, text_vectors: torch.Tensor) -> torch.Tensor:
    """Cosine of an image and a text: that of the query which is nearest to the text (sec. 3.2, ITC).

    s(i, t) = max_q <z_iq, h_t>

    Args:
        image_vectors: [N, Q, d] unit vectors; text_vectors: [M, d] unit vectors.

    Returns:
        [N, M] float32: also under autocast, as a temperature of 0.07 makes much of rounded cosines.
    """
    images, queries, _ = image_vectors.shape
    with torch.autocast(image_vectors.device.type, enabled=False):
        products = image_vectors.float().flatten(0, 1) @ text_vectors.float().t()
    return products.view(images, queries, -1).amax(dim=1)


def floored_temperature(temperature: torch.Tensor, floor: float) -> torch.Tensor:
    """max(temperature, floor), with the gradient of the identity: a temperature below the floor can come back."""
    return temperature.clamp(min=floor).detach() + (temperature - temperature.detach())  # exact, also far below


def positive_pairs(
    rows: torch.Tensor, columns: torch.Tensor, row_ids: torch.Tensor | None, column_ids: torch.Tensor | None
) -> torch.Tensor:
    """Which pairs match: [n, N] bool.

    Args:
        rows, columns: [n], [N] numbers of the pairs in the global batch; the same number is the same pair.
        row_ids, column_ids: [n], [N] image ids; equal ids are captions of one image and match as well. None: only
            the pair itself.
    """
    same = rows[:, None] == columns[None]
    return same if row_ids is None else same | (row_ids[:, None] == column_ids[None])


def contrastive_loss(logits: torch.Tensor, positives: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of each row against its positives, which share the target mass equally; summed over rows.

    L = - sum_i sum_j y_ij log softmax_j(l_ij),  y_ij = (1 - s) [j in P_i] / |P_i| + s / N

    With one positive per row this is `torch.nn.functional.cross_entropy` with label smoothing s. In float32.

    Args:
        logits: [n, N] similarities over the temperature.
        positives: [n, N] bool, at least one in each row.
        label_smoothing: s in [0, 1).
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    target = positives.float() / positives.sum(dim=1, keepdim=True)
    hit = (target * log_probabilities).sum(dim=1)
    return -((1 - label_smoothing) * hit + label_smoothing * log_probabilities.mean(dim=1)).sum()


def hard_negative_probabilities(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Probability of each column to be drawn as a row's hard negative: softmax of the contrastive logits over the
    columns that do not match it (sec. 3.2, ITM).

    Args:
        logits: [n, N]; positives: [n, N] bool.

    Returns:
        [n, N] float32; 0 at positives, and everywhere in a row without any negative.
    """
    return _negatives_only(logits, positives).softmax(dim=1).nan_to_num(nan=0.0)


def sample_hard_negatives(
    logits: torch.Tensor, positives: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws one negative column per row with `hard_negative_probabilities`; -1 for a row that has none.

    By the Gumbel-max trick, argmax_j(l_ij + g_ij), in float32: it cannot draw a column of probability 0 (as sampling
    from rounded probabilities can), and takes any number of columns.

    Args:
        logits: [n, N]; positives: [n, N] bool; generator: of the device of `logits`; None: torch's own.

    Returns:
        [n] int64.
    """
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_(generator=generator)
    scores = _negatives_only(logits, positives) - noise.log()
    return scores.argmax(dim=1).masked_fill(positives.all(dim=1), -1)


def _negatives_only(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    return logits.detach().float().masked_fill(positives, float("-inf"))


def matching_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "matches or not", summed over rows.

    Args:
        logits: [R, 2] of (no match, match); labels: [R], 1 for a true pair.
    """
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def generation_loss(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of the next token with label smoothing s, summed over tokens.

    L = - sum_t [(1 - s) log p(y_t) + s / V sum_v log p(v)]

    Args:
        logits: [M, V] at the positions before the targets; targets: [M].
    """
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
