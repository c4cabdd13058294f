"""The Q-Former's three self-attention masks (Li et al. 2023, sec. 3.2 and fig. 2), one per objective.

All are boolean, True = may attend, of shape [B, 1, Q + T, Q + T] with the queries first; row = who looks, column =
who is looked at. In the example rows q is a query, t a text token, p a padded text token; Q = 2, T = 3, the last
token padded. Rows of padding see what a text token in their place would see; nothing reads them.
"""

from __future__ import annotations

import torch


def contrastive_mask(num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """Uni-modal mask of image-text contrastive learning: queries and text see only their own kind.

    ```
          q q | t t p
      q   1 1 | 0 0 0
      q   1 1 | 0 0 0
      t   0 0 | 1 1 0
      t   0 0 | 1 1 0
    ```

    Args:
        num_queries: Q.
        text_mask: [B, T], 1 or True for real tokens.

    Returns:
        [B, 1, Q + T, Q + T] bool.
    """
    queries, text = _kinds(num_queries, text_mask)
    keys = _real_keys(num_queries, text_mask)
    return keys & ((queries[:, None] & queries[None]) | (text[:, None] & text[None]))


def matching_mask(num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """Bi-directional mask of image-text matching: queries and text see each other.

    ```
          q q | t t p
      q   1 1 | 1 1 0
      q   1 1 | 1 1 0
      t   1 1 | 1 1 0
      t   1 1 | 1 1 0
    ```

    Args and result as in `contrastive_mask`.
    """
    keys = _real_keys(num_queries, text_mask)
    return keys.expand(-1, -1, keys.shape[-1], -1)


def generation_mask(num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """Multi-modal causal mask of image-grounded text generation: text sees all queries and the text before it,
    queries see only queries.

    ```
          q q | t t p
      q   1 1 | 0 0 0
      q   1 1 | 0 0 0
      t   1 1 | 1 0 0
      t   1 1 | 1 1 0
    ```

    Args and result as in `contrastive_mask`. To decode text against cached queries, take the rows of the text:
    `generation_mask(...)[:, :, num_queries:]`.
    """
    queries, _ = _kinds(num_queries, text_mask)
    causal = torch.ones(queries.numel(), queries.numel(), dtype=torch.bool, device=text_mask.device).tril()
    # A query row must not be cut off by the causal order: all queries see all queries.
    return _real_keys(num_queries, text_mask) & (causal | (queries[:, None] & queries[None]))


def _kinds(num_queries: int, text_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if text_mask.ndim != 2:
        raise ValueError(f"`text_mask` must have shape [batch, tokens], got {tuple(text_mask.shape)}")
    queries = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device) < num_queries
    return queries, ~queries


def _real_keys(num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, Q + T]: every query, and the text tokens that are not padding."""
    if text_mask.ndim != 2:
        raise ValueError(f"`text_mask` must have shape [batch, tokens], got {tuple(text_mask.shape)}")
    always = text_mask.new_ones(text_mask.shape[0], num_queries, dtype=torch.bool)
    return torch.cat([always, text_mask.bool()], dim=1)[:, None, None, :]
