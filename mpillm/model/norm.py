"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

from typing import NamedTuple


class RMSNorm:
    """y = weight * x / sqrt(mean(x^2) + epsilon), rows of (N, C)."""

    class Saved(NamedTuple):
        x: object       # (N, C)
        rstd: object    # (N,)

    def __init__(self, ops, weight, epsilon):
        self.ops, self.weight, self.epsilon = ops, weight, epsilon

    def forward(self, x):
        y, rstd = self.ops.rms_norm(x, self.weight.value, self.epsilon)     # (N, C), (N,)
        return y, self.Saved(x, rstd)

    def backward(self, dy, saved):
        return self.ops.rms_norm_backward(dy, saved.x, self.weight.value, saved.rstd, self.weight.grad)     # (N, C)


class LayerNorm:
    """y = weight * (x - mean) / sqrt(variance + epsilon) + bias, rows of (N, C)."""

    class Saved(NamedTuple):
        x: object       # (N, C)
        mean: object    # (N,)
        rstd: object    # (N,)

    def __init__(self, ops, weight, bias, epsilon):
        self.ops, self.weight, self.bias, self.epsilon = ops, weight, bias, epsilon

    def forward(self, x):
        y, mean, rstd = self.ops.layer_norm(x, self.weight.value, self.bias.value, self.epsilon)
        return y, self.Saved(x, mean, rstd)

    def backward(self, dy, saved):
        return self.ops.layer_norm_backward(dy, saved.x, self.weight.value, saved.mean, saved.rstd,
                                            self.weight.grad, self.bias.grad)   # (N, C)
