"""The tree with an objective that reads where its branches end: `tree_endpoint`.

Left out: the objective itself (`objective.endpoint_losses`), the tree's plan (`trees.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from treegrpo.methods.edges import EdgeMethod
from treegrpo.methods.method import Update
from treegrpo.methods.trees import TreeMethod

if TYPE_CHECKING:
    from treegrpo.objective import Loss
    from treegrpo.rollout import Predict


class TreeEndpoint(TreeMethod, EdgeMethod):
    """TreeGRPO's forest and credit; each node moves towards its better children's samples."""

    paper = (
        "[TreeGRPO](https://arxiv.org/abs/2512.08153) with an endpoint objective after "
        "[arXiv 2603.12893](https://arxiv.org/abs/2603.12893)"
    )

    def losses(self, predict: Predict, update: Update) -> Iterator[Loss]:
        """The endpoint objective (`treegrpo.objective.endpoint_losses`)."""
        from treegrpo.objective import endpoint_losses

        settings = self.objective
        return endpoint_losses(
            predict,
            update.forest,
            update.credit.edges,
            kl_weight=settings.kl_weight,
            max_divergence=settings.max_divergence,
            reference=update.reference,
            prompts=update.prompts,
            micro_batch=update.micro_batch,
        )
