"""One Transformer block: norm, attention, residual; norm, MLP, residual (pre-norm)."""

from typing import NamedTuple

from ..layout.parameter import Bucket, Constant, Normal, Parameter, Stack, key_of
from .attention import Attention
from .linear import Linear
from .mlp import GeluMLP, SwiGLU
from .norm import LayerNorm, RMSNorm


class Block:
    """x -> h = x + attention(norm(x)) -> h + mlp(norm(h)).

    Parameters
    ----------
    index : int
        Global number of the block.
    shape : Shape of the model (`transformer.Shape`).
    rope : Rope or None
    seed : int
        Seed of dropout.
    """

    class Saved(NamedTuple):
        attention_norm: NamedTuple
        attention: Attention.Saved
        attention_mask: object      # Dropout or None
        mlp_norm: NamedTuple
        mlp: NamedTuple
        mlp_mask: object            # Dropout or None

    def __init__(self, ops, index, shape, rope, seed):
        self.ops, self.name = ops, f"blocks.{index}"
        self.make = _Maker(ops, self.name, shape)
        self.attention_norm = self.make.norm("attention_norm")
        self.attention = self.make.attention(rope, key_of(seed, f"{self.name}.attention.probabilities"))
        self.mlp_norm = self.make.norm("mlp_norm")
        self.mlp = self.make.mlp()
        self.bucket = Bucket(self.name, self.make.parameters)
        self.keys = [key_of(seed, f"{self.name}.{part}") for part in ("attention", "mlp")]

    def _residual(self, y, x, batch, key):
        """dropout(y) + x, in place of `y`."""
        mask = batch.mask(key)
        if mask is not None:
            self.ops.dropout(y.reshape(batch.shape + (-1,)), mask)
        self.ops.add(y, x)
        return y, mask

    def forward(self, x, batch, cache=None):
        """(B T, C) -> (B T, C)"""
        normed, attention_norm = self.attention_norm.forward(x)
        y, attention = self.attention.forward(normed, batch, cache)
        h, attention_mask = self._residual(y, x, batch, self.keys[0])
        normed, mlp_norm = self.mlp_norm.forward(h)
        y, mlp = self.mlp.forward(normed)
        out, mlp_mask = self._residual(y, h, batch, self.keys[1])
        return out, self.Saved(attention_norm, attention, attention_mask, mlp_norm, mlp, mlp_mask)

    def _through_dropout(self, dy, mask, batch):
        """The gradient of `_residual` towards y: `dy` itself, or a dropped copy of it."""
        if mask is None:
            return dy
        dropped = self.ops.empty(dy.shape, dy.dtype)
        self.ops.copy(dropped, dy)
        self.ops.dropout(dropped.reshape(batch.shape + (-1,)), mask)
        return dropped

    def backward(self, dout, saved, batch):
        """(B T, C) -> (B T, C)"""
        dy = self._through_dropout(dout, saved.mlp_mask, batch)
        dh = self.mlp_norm.backward(self.mlp.backward(dy, saved.mlp), saved.mlp_norm)
        self.ops.add(dh, dout)
        dy = self._through_dropout(dh, saved.attention_mask, batch)
        dx = self.attention_norm.backward(self.attention.backward(dy, saved.attention, batch), saved.attention_norm)
        self.ops.add(dx, dh)
        return dx


class Recompute:
    """A block of which only the input is kept; its forward runs again before its backward (Chen et al. 2016, arXiv:1604.06174)."""

    def __init__(self, block):
        self.block, self.bucket = block, block.bucket

    def forward(self, x, batch, cache=None):
        return self.block.forward(x, batch, cache)[0], x

    def backward(self, dout, saved, batch):
        return self.block.backward(dout, self.block.forward(saved, batch)[1], batch)


class _Maker:
    """Makes the layers of a block and collects their parameters in the order of the bucket."""

    def __init__(self, ops, name, shape):
        self.ops, self.name, self.shape, self.parameters = ops, name, shape, []

    def parameter(self, name, shape, init, axes=None, unit=1):
        parameter = Parameter(f"{self.name}.{name}", shape, init, axes, unit)
        self.parameters.append(parameter)
        return parameter

    def norm(self, name):
        width = (self.shape.width,)
        weight = self.parameter(f"{name}.weight", width, Constant(1.0))
        if self.shape.family == "gpt":
            return LayerNorm(self.ops, weight, self.parameter(f"{name}.bias", width, Constant(0.0)), self.shape.norm_epsilon)
        return RMSNorm(self.ops, weight, self.shape.norm_epsilon)

    def linear(self, names, rows, columns, std, unit=1):
        """A Linear whose weights are the named parameters of `rows` rows each, stacked."""
        weights = [self.parameter(f"{name}.weight", (r, columns), Normal(std), unit=unit) for name, r in zip(names, rows)]
        biases = []
        if self.shape.family == "gpt":
            biases = [self.parameter(f"{name}.bias", (r,), Constant(0.0), unit=unit) for name, r in zip(names, rows)]
        return Linear(self.ops, Stack(*weights), Stack(*biases) if biases else None)

    def attention(self, rope, dropout_key):
        shape = self.shape
        d, q_rows, kv_rows = shape.head_width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        qkv = self.linear(["attention.query", "attention.key", "attention.value"], [q_rows, kv_rows, kv_rows],
                          shape.width, shape.std, unit=d)
        output = self.linear(["attention.output"], [shape.width], q_rows, shape.residual_std)
        return Attention(self.ops, qkv, output, shape.heads, shape.kv_heads, d, rope, dropout_key)

    def mlp(self):
        shape, width, f = self.shape, self.shape.width, self.shape.mlp_width
        if shape.family == "gpt":
            up = self.linear(["mlp.up"], [f], width, shape.std)
            return GeluMLP(self.ops, up, self.linear(["mlp.down"], [width], f, shape.residual_std))
        gate_up = self.linear(["mlp.gate", "mlp.up"], [f, f], width, shape.std)
        return SwiGLU(self.ops, gate_up, self.linear(["mlp.down"], [width], f, shape.residual_std))
