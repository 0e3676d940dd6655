"""The output table and the cross entropy, in chunks of tokens: the whole (N, V) logits never exist.

Under tp each rank has some columns of the logits; the softmax is joined by its maxima and sums (Shoeybi et al. 2019,
arXiv:1909.08053, section 3).
"""

from typing import NamedTuple

import numpy as np

class Table:
    """The output table during a micro-batch: as it is, or a copy with rows of zeros below it where the device wants more rows.

    Logits of such rows are 0, and so is what is written for them; their gradients are left behind.

    Attributes
    ----------
    rows : int
        V/tp, padded.
    value : (rows, C)
    """

    def __init__(self, ops, table, training):
        self.ops, self.table, (held, width) = ops, table, table.held.shape
        self.rows = held + ops.padding(held, table.value.dtype)
        self.value, self.dvalue, self.written = table.value, None, False
        if self.rows > held:
            self.value = ops.zeros((self.rows, width), table.value.dtype)
            ops.copy(self.value[:held], table.value)
            self.dvalue = ops.empty((self.rows, width), table.bucket.wide) if training else None

    def add_product(self, dlogits, x):
        """The gradient (V/tp, C) += dlogits^T (rows, n') x (n', C)"""
        if self.dvalue is None:
            self.ops.matmul(dlogits.T, x, out=self.table.grad, accumulate=self.table.accumulates())
        else:
            self.ops.matmul(dlogits.T, x, out=self.dvalue, accumulate=self.written)
        self.written = True

    def finish(self):
        """After the last product: the gradient is in its place."""
        if self.dvalue is None and self.written:
            return
        accumulate, grad = self.table.accumulates(), self.table.grad
        if self.written:
            (self.ops.add if accumulate else self.ops.copy)(grad, self.dvalue[:len(grad)])
        elif not accumulate:
            self.ops.fill(grad, 0)


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
        table = Table(ops, self.table, training)
        logits = ops.padded((size, table.rows), x.dtype)
        for start in range(0, num_tokens, max(1, size)):
            part = slice(start, min(start + size, num_tokens))
            chunk = ops.matmul(x[part], table.value.T, out=logits[:part.stop - start])      # (n', V/tp), padded
            self._cross_entropy(chunk[:, :self.table.held.shape[0]], targets[part], scale[part], loss, training)
            if training:
                ops.matmul(chunk, table.value, out=dx[part])                    # (n', C)
                table.add_product(chunk, x[part])
        if training:
            table.finish()
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
