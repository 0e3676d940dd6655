"""y = x W^T + b, and back."""

from typing import NamedTuple


class Linear:
    """A matrix product with the weights of one Parameter or of a Stack of them.

    Parameters
    ----------
    weight : Parameter or Stack
        (O, I)
    bias : Parameter, Stack or None
        (O,)
    """

    class Saved(NamedTuple):
        x: object       # (N, I)

    def __init__(self, ops, weight, bias=None):
        self.ops, self.weight, self.bias = ops, weight, bias

    def forward(self, x, add_bias=True):
        """(N, I) -> (N, O). `add_bias=False` leaves the bias to an operation fused with it."""
        y = self.ops.matmul(x, self.weight.value.T)     # (N, O)
        if self.bias is not None and add_bias:
            self.ops.add_bias(y, self.bias.value)
        return y, self.Saved(x)

    def backward(self, dy, saved):
        """(N, O) -> (N, I)"""
        if self.bias is not None:
            self.ops.sum_rows(dy, self.bias.grad)
        self.ops.matmul(dy.T, saved.x, out=self.weight.grad, accumulate=self.weight.accumulates())  # (O, I)
        return self.ops.matmul(dy, self.weight.value)   # (N, I)
