"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

from typing import NamedTuple


class RMSNorm:
    """y = weight * x / sqrt(mean(x^2) + epsilon), rows of (N, C)."""

    class Saved(NamedTuple):
        x: object       # (N, C), with the residual
        rstd: object    # (N,)

    def __init__(self, ops, weight, epsilon):
        self.ops, self.weight, self.epsilon = ops, weight, epsilon

    def forward(self, x, residual=None):
        """(N, C) -> (N, C); with `residual` (N, C), x becomes x + residual first."""
        y, rstd = self.ops.rms_norm(x, self.weight.value, self.epsilon, residual)       # (N, C), (N,)
        return y, self.Saved(x, rstd)

    def backward(self, dy, saved, residual=None):
        """(N, C) -> (N, C), plus `residual` (N, C), the gradient that reaches x on another way."""
        return self.ops.rms_norm_backward(dy, saved.x, self.weight.value, saved.rstd, self.weight.grad, residual)     # (N, C)


class LayerNorm:
    """y = weight * (x - mean) / sqrt(variance + epsilon) + bias, rows of (N, C)."""

    class Saved(NamedTuple):
        x: object       # (N, C), with the residual
        mean: object    # (N,)
        rstd: object    # (N,)

    def __init__(self, ops, weight, bias, epsilon):
        self.ops, self.weight, self.bias, self.epsilon = ops, weight, bias, epsilon

    def forward(self, x, residual=None):
        """As of RMSNorm."""
        y, mean, rstd = self.ops.layer_norm(x, self.weight.value, self.bias.value, self.epsilon, residual)
        return y, self.Saved(x, mean, rstd)

    def backward(self, dy, saved, residual=None):
        """As of RMSNorm."""
        return self.ops.layer_norm_backward(dy, saved.x, self.weight.value, saved.mean, saved.rstd,
                                            self.weight.grad, self.bias.grad, residual)     # (N, C)
