"""The output table and the cross entropy, in chunks of tokens: the whole (N, V) logits never exist.

Under tp each rank has some columns of the logits; the softmax is joined by its maxima and sums (Shoeybi et al. 2019,
arXiv:1909.08053, section 3).
"""

from typing import NamedTuple

import numpy as np

class OutputLoss:
    """Sum over tokens of w x nll, and its gradient.

    The forward computes the gradients too: they need the softmax, which is at hand there and would cost a third
    matrix product to make again. So `saved` is the gradient of the input, and backward only hands it on.

    Parameters
    ----------
    table : Parameter
        (V/tp, C): the output table, or the input table when tied.
    region : Region
    """

    class Saved(NamedTuple):
        dx: object      # (n, C)

    def __init__(self, ops, table, region):
        self.ops, self.table, self.region = ops, table, region

    def chunk(self, num_tokens):
        """Tokens of a chunk: as equal chunks as there must be, as many on all tp ranks."""
        columns = -(-self.table.shape[0] // self.region.group.size)
        most = max(64, self.ops.logit_elements // columns)
        return -(-num_tokens // max(1, -(-num_tokens // most)))

    def logits(self, x):
        """(N, C) -> (N, V)"""
        logits = self.ops.matmul(x, self.table.value.T)                 # (N, V/tp)
        return self.region.group.gather(logits, 1, self.table.shape[0])

    def forward(self, x, batch, training=True):
        """The weighted loss sum of a micro-batch.

        Parameters
        ----------
        x : array (n, C)
        batch : Batch
            targets (B, t), scale (B, t): w/W of each target.
        training : bool
            Whether gradients are computed, into `table.grad` and `saved`.

        Returns
        -------
        loss : array (1,) float64
            Sum of w/W x nll; 0 on all tp ranks but the first, so that it can be summed over all ranks.
        saved : Saved or None
        """
        ops, num_tokens = self.ops, batch.num_rows
        x = self.region.enter(x, num_tokens)                                    # (N, C)
        targets, scale = batch.targets.reshape(-1), batch.scale.reshape(-1)     # (N,)
        dx = ops.empty(x.shape, x.dtype) if training else None                  # (N, C), partial over tp
        size, loss = self.chunk(num_tokens), ops.zeros((1,), np.float64)
        logits = ops.padded((size, self.table.held.shape[0]), x.dtype)
        for start in range(0, num_tokens, max(1, size)):
            part = slice(start, min(start + size, num_tokens))
            chunk = ops.matmul(x[part], self.table.value.T, out=logits[:part.stop - start])     # (n', V/tp)
            self._cross_entropy(chunk, targets[part], scale[part], loss, training)
            if training:
                ops.matmul(chunk, self.table.value, out=dx[part])               # (n', C)
                ops.matmul(chunk.T, x[part], out=self.table.grad, accumulate=self.table.accumulates())  # (V/tp, C)
        if training and not num_tokens and not self.table.accumulates():
            ops.fill(self.table.grad, 0)
        if self.region.group.rank:
            ops.fill(loss, 0)
        return loss, self.Saved(self.region.enter_backward(dx)) if training else None

    def _cross_entropy(self, logits, targets, scale, loss, training):
        """Adds to the loss; logits (n', V/tp) become their gradient. Rows that lie on several ranks are joined by their maxima and sums."""
        ops, group, first = self.ops, self.region.group, self.table.held.start[0]
        if group.size == 1:
            ops.cross_entropy(logits, targets, scale, loss, training)
            return
        row_max, row_sum, target_logit = ops.cross_entropy_stats(logits, targets, first)        # (n',)
        largest = ops.empty(row_max.shape, row_max.dtype)
        ops.copy(largest, row_max)
        group.all_reduce(largest, "max")
        sums, shrink = ops.softmax_parts(row_max, largest, row_sum, target_logit)               # (2, n'), (n',)
        group.all_reduce(sums)
        ops.loss_sum(largest, sums[0], sums[1], scale, loss)
        if training:
            ops.cross_entropy_gradient(logits, targets, ops.softmax_factor(shrink, sums[0]), scale, first)

    def backward(self, saved):
        """-> (n, C)"""
        return saved.dx
