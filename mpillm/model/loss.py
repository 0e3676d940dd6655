"""The output table and the cross entropy, in chunks of tokens: the whole (N, V) logits never exist."""

from typing import NamedTuple

CHUNK_ELEMENTS = 16 * 2**20     # logits of a chunk, at most (at least 64 tokens); with 4 M the products of a 50,257-token table ran at 2/3 the speed


class OutputLoss:
    """Sum over tokens of w x nll, and its gradient.

    The forward computes the gradients too: they need the softmax, which is at hand there and would cost a third
    matrix product to make again. So `saved` is the gradient of the input, and backward only hands it on.

    Parameters
    ----------
    table : Parameter
        (V, C): the output table, or the input table when tied.
    """

    class Saved(NamedTuple):
        dx: object      # (N, C)

    def __init__(self, ops, table):
        self.ops, self.table = ops, table

    def chunk(self, num_tokens):
        """Tokens of a chunk: as equal chunks as there must be."""
        most = max(64, CHUNK_ELEMENTS // self.table.shape[0])
        return -(-num_tokens // -(-num_tokens // most))

    def logits(self, x):
        """(N, C) -> (N, V)"""
        return self.ops.matmul(x, self.table.value.T)

    def forward(self, x, batch, training=True):
        """The weighted loss sum of a micro-batch.

        Parameters
        ----------
        x : array (N, C)
        batch : Batch
            targets (B, T), scale (B, T): w/W of each target.
        training : bool
            Whether gradients are computed, into `table.grad` and `saved`.

        Returns
        -------
        loss : float
            Sum of w/W x nll, in float64.
        saved : Saved or None
        """
        ops, num_tokens = self.ops, x.shape[0]
        targets, scale = batch.targets.reshape(-1), batch.scale.reshape(-1)     # (N,)
        dx = ops.empty(x.shape, x.dtype) if training else None
        size, loss = self.chunk(num_tokens), 0.0
        logits = ops.empty((size, self.table.held.shape[0]), x.dtype)
        for start in range(0, num_tokens, size):
            part = slice(start, min(start + size, num_tokens))
            chunk = ops.matmul(x[part], self.table.value.T, out=logits[:part.stop - start])     # (n, V)
            row_max, row_sum, target_logit = ops.cross_entropy_stats(chunk, targets[part], 0)   # (n,) each
            loss += ops.loss_sum(row_max, row_sum, target_logit, scale[part])
            if training:
                ops.cross_entropy_gradient(chunk, targets[part], 1 / row_sum, scale[part], 0)
                ops.matmul(chunk, self.table.value, out=dx[part])               # (n, C)
                ops.matmul(chunk.T, x[part], out=self.table.grad, accumulate=self.table.accumulates())  # (V, C)
        return loss, self.Saved(dx) if training else None

    def backward(self, saved):
        """-> (N, C)"""
        return saved.dx
