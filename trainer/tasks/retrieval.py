"""Recall of retrieval over a whole set, as a metric object: the same on any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

TOP = (1, 10)
"""Numbers of candidates among which the right one has to be."""
ROWS = 1024
"""Queries that are compared at a time, to bound the memory."""


class RetrievalRecall(Metric):
    """Share of queries whose own name is among the best candidates: all distinct names of the set.

    The value has `recall_at_K` for each K of `TOP`, and `baseline_recall_at_K`, that of a guess.
    """

    full_state_update = False
    queries: list[Tensor]
    candidates: list[Tensor]
    names: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("queries", "candidates", "names"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, queries: Tensor, candidates: Tensor, names: Tensor) -> None:
        """Add pairs: vectors [n, dim] of both sides, and names int64 [n], equal for equal candidates."""
        self.queries.append(queries.detach())
        self.candidates.append(candidates.detach())
        self.names.append(names.detach())

    def compute(self) -> dict[str, Tensor]:
        """Return the recalls; a candidate as good as the right one counts as better."""
        queries, candidates, names = (torch.cat(state) for state in (self.queries, self.candidates, self.names))
        distinct, owners = torch.unique(names, return_inverse=True)
        first = torch.full((len(distinct),), len(names)).scatter_reduce(
            0, owners.cpu(), torch.arange(len(names)), "amin"
        )
        gallery = candidates[first.to(candidates.device)]
        starts = range(0, len(queries), ROWS)
        ranks = torch.cat([_ranks(queries[n : n + ROWS] @ gallery.T, owners[n : n + ROWS]) for n in starts])
        found = {f"recall_at_{top}": (ranks <= top).double().mean() for top in TOP}
        return found | {
            f"baseline_recall_at_{top}": torch.tensor(min(1.0, top / len(distinct)), dtype=torch.float64) for top in TOP
        }


def _ranks(scores: Tensor, own: Tensor) -> Tensor:
    """Return the rank, from 1, of each query's own candidate; scores [n, candidates], own int64 [n]."""
    return (scores >= scores.gather(1, own[:, None])).sum(dim=1)
