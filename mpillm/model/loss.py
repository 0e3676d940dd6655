"""The output table and the cross entropy, in chunks of tokens: the whole (N, V) logits never exist.

Under tp each rank has some columns of the logits; the softmax is joined by its maxima and sums (Shoeybi et al. 2019,
arXiv:1909.08053, section 3).
"""

from typing import NamedTuple

import numpy as np

CHUNK_ELEMENTS = 16 * 2**20     # logits of a chunk, at most (at least 64 tokens); with 4 M the products of a 50,257-token table ran at 2/3 the speed


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
        most = max(64, CHUNK_ELEMENTS // columns)
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
        loss : float
            Sum of w/W x nll, in float64; 0 on all tp ranks but the first, so that it can be summed over all ranks.
        saved : Saved or None
        """
        ops, num_tokens, first = self.ops, batch.num_rows, self.table.held.start[0]
        x = self.region.enter(x, num_tokens)                                    # (N, C)
        targets, scale = batch.targets.reshape(-1), batch.scale.reshape(-1)     # (N,)
        dx = ops.empty(x.shape, x.dtype) if training else None                  # (N, C), partial over tp
        size, loss = self.chunk(num_tokens), 0.0
        logits = ops.empty((size, self.table.held.shape[0]), x.dtype)
        for start in range(0, num_tokens, max(1, size)):
            part = slice(start, min(start + size, num_tokens))
            chunk = ops.matmul(x[part], self.table.value.T, out=logits[:part.stop - start])     # (n', V/tp)
            row_max, row_sum, target_logit, factor = self._softmax(*ops.cross_entropy_stats(chunk, targets[part], first))
            loss += ops.loss_sum(row_max, row_sum, target_logit, scale[part])
            if training:
                ops.cross_entropy_gradient(chunk, targets[part], factor, scale[part], first)
                ops.matmul(chunk, self.table.value, out=dx[part])               # (n', C)
                ops.matmul(chunk.T, x[part], out=self.table.grad, accumulate=self.table.accumulates())  # (V/tp, C)
        if training and not num_tokens and not self.table.accumulates():
            ops.fill(self.table.grad, 0)
        loss = loss if self.region.group.rank == 0 else 0.0
        return loss, self.Saved(self.region.enter_backward(dx)) if training else None

    def _softmax(self, row_max, row_sum, target_logit):
        """Statistics of whole rows from those of this rank's columns, and what its exponentials are to be multiplied with."""
        group = self.region.group
        if group.size == 1:
            return row_max, row_sum, target_logit, 1 / row_sum
        largest = group.all_reduce(+row_max, "max")                             # (n',)
        shrink = np.exp(row_max - largest)
        sums = group.all_reduce(np.stack([row_sum * shrink, target_logit]))     # (2, n')
        return largest, sums[0], sums[1], shrink / sums[0]

    def backward(self, saved):
        """-> (n, C)"""
        return saved.dx
