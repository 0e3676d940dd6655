"""y = x W^T + b, and back: with W as it is or split by rows, and with W split by columns."""

from typing import NamedTuple


class Linear:
    """A matrix product with the weights of one Parameter or of a Stack of them; under tp, with this rank's rows of them.

    Parameters
    ----------
    weight : Parameter or Stack
        (O/tp, I)
    bias : Parameter, Stack or None
        (O/tp,)
    """

    class Saved(NamedTuple):
        x: object       # (N, I)

    def __init__(self, ops, weight, bias=None):
        self.ops, self.weight, self.bias = ops, weight, bias

    def forward(self, x, out=None):
        """(N, I) -> (N, O/tp), perhaps in `out`"""
        y = self.ops.linear(x, self.weight.value, None if self.bias is None else self.bias.value, out)     # (N, O/tp)
        return y, self.Saved(x)

    def forward_gelu(self, x):
        """(N, I) -> (N, O/tp) before and after a GELU"""
        hidden, y = self.ops.linear_gelu(x, self.weight.value, self.bias.value)
        return hidden, y, self.Saved(x)

    def backward(self, dy, saved):
        """(N, O/tp) -> (N, I), partial over tp"""
        if self.bias is not None:
            self.ops.sum_rows(dy, self.bias.grad)
        return self._products(dy, saved.x)

    def _products(self, dy, x):
        self.weight.add_product(self.ops, dy, x)
        return self.ops.matmul(dy, self.weight.value)               # (N, I)


class RowLinear(Linear):
    """The end of a tensor-parallel part: W is split by columns, the products are summed over tp, the bias is added after.

    Parameters
    ----------
    weight : Parameter
        (O, I/tp)
    bias : Parameter or None
        (O,), the same on all tp ranks
    region : Region
    """

    def __init__(self, ops, weight, bias, region):
        super().__init__(ops, weight, bias)
        self.region = region

    def forward(self, x):
        """(N, I/tp) -> (n, O)"""
        bias = None if self.bias is None else self.bias.value
        if self.region.group.size == 1:
            return self.ops.linear(x, self.weight.value, bias), self.Saved(x)
        y = self.region.leave(self.ops.linear(x, self.weight.value))        # (n, O)
        if bias is not None:
            self.ops.add_bias(y, bias)
        return y, self.Saved(x)

    def backward(self, dy, saved):
        """(n, O) -> (N, I/tp)"""
        if self.bias is not None:
            self.ops.sum_rows(dy, self.bias.grad)
        return self._products(self.region.leave_backward(dy, len(saved.x)), saved.x)
