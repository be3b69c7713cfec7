"""A table of token embeddings with new rows behind it, which may train while the table stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# The id of the first new row. No vocabulary is so large, so the table may grow in between.
FIRST_NEW = 1_000_000


class ExtendedEmbedding(nn.Embedding):
    """Look ids up in a table, and those from `FIRST_NEW` on in rows of somebody else.

    The rows are no part of this layer. So the table keeps its name in checkpoints, and an optimizer
    of the rows sees nothing of it (Textual Inversion, Gal et al., 2208.01618).

    Args:
        table: the layer whose place this one takes, with its weight.
        rows: returns the new rows as they are now.
    """

    def __init__(self, table: nn.Embedding, rows: Callable[[], Float[Tensor, "n d"]]):
        super().__init__(
            table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight
        )
        # A new parameter would train although the table does not.
        self.weight = table.weight
        self.rows = rows

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return the embeddings of ids."""
        is_new = ids >= FIRST_NEW
        known = super().forward(ids.masked_fill(is_new, 0))
        # The rows are part of every result, so that no process of a group waits for their gradient.
        # A copy of the table alone may be on another device than they are.
        rows = self.rows().to(known)
        found = nn.functional.embedding((ids - FIRST_NEW).clamp(min=0), rows)
        return torch.where(is_new[..., None], found, known)
