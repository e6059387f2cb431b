# SPDX-License-Identifier: Apache-2.0
"""Cross-batch memory that does not list the pairs of the batch with the memory."""

from typing import Any

from pytorch_metric_learning import losses as peer
from torch import Tensor

from flashmetric.pml.batch import EveryPairButOwn
from flashmetric.pml.fused_loss import FusedLoss

__all__ = ["CrossBatchMemory"]


class CrossBatchMemory(peer.CrossBatchMemory):
    """See pytorch-metric-learning.

    Without a miner, a fused loss of this package itself is told which rows of the memory are the
    batch itself, in place of a list of all other pairs.
    """

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """Pairs or triplets of the batch with the memory; None for all pairs."""
        # Of a batch of one row the parent does not remove the comparison with itself.
        listed = self.miner or input_indices_tuple is not None or len(embeddings) == 1
        # A user's subclass may look at the list, as it may in the parent.
        own = isinstance(self.loss, FusedLoss) and _defined_here(type(self.loss))
        if listed or not own:
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return EveryPairButOwn(self.curr_batch_idx) if do_remove_self_comparisons else None


def _defined_here(kind: type) -> bool:
    return kind.__module__.startswith("flashmetric.pml.")
