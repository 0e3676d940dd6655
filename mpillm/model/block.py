"""One Transformer block: norm, attention, residual; norm, MLP, residual (pre-norm)."""

from typing import NamedTuple

from ..layout.comm import Solo
from ..layout.parameter import Constant, Normal, Parameter, Stack, buckets_of, key_of
from .attention import Attention, Heads
from .context import core_of
from .experts import Experts
from .linear import Linear, RowLinear
from .mlp import GeluMLP, SwiGLU
from .norm import LayerNorm, RMSNorm
from .region import Region


class Setting(NamedTuple):
    """What all blocks of a model share."""
    ops: object
    shape: object       # Shape
    mesh: object        # Mesh
    layout: object      # Layout
    rope: object        # Rope or None
    seed: int           # of dropout
    light: bool         # selective recompute

    @property
    def region(self):
        return Region(self.mesh["tp"], self.layout.sequence)


class Block:
    """x -> h = x + attention(norm(x)) -> h + mlp(norm(h)).

    Parameters
    ----------
    index : int
        Global number of the block.
    setting : Setting

    Attributes
    ----------
    buckets : list of Bucket
        Complete after the block's backward.
    needs, needs_backward : lists of Bucket
        Whose values forward and backward use.
    """

    class Saved(NamedTuple):
        attention_norm: NamedTuple
        attention: Attention.Saved
        attention_mask: object      # Dropout or None
        mlp_norm: NamedTuple
        mlp: NamedTuple
        mlp_mask: object            # Dropout or None

    def __init__(self, index, setting):
        self.ops, self.name, self.region = setting.ops, f"blocks.{index}", setting.region
        make = Maker(self.name, setting, self.region)
        self.attention_norm = make.norm("attention_norm")
        self.attention = make.attention(key_of(setting.seed, f"{self.name}.attention.probabilities"))
        self.mlp_norm = make.norm("mlp_norm")
        self.mlp = make.experts() if setting.shape.experts else make.mlp("mlp", setting.shape.mlp_width, self.region)
        self.parameters = make.parameters
        self.buckets = self.needs = self.needs_backward = buckets_of(self.name, make.parameters, setting.mesh)
        self.keys = [key_of(setting.seed, f"{self.name}.{part}") for part in ("attention", "mlp")]

    def _dropout(self, y, batch, key):
        """dropout(y), in place; the mask."""
        mask = batch.row_mask(key, *self.region.rows(batch.num_rows))
        if mask is not None:
            self.ops.dropout(y, mask)
        return mask

    def forward(self, x, batch, cache=None):
        """(n, C) -> (n, C)"""
        normed, attention_norm = self.attention_norm.forward(x)
        h, attention = self.attention.forward(normed, batch, cache)
        attention_mask = self._dropout(h, batch, self.keys[0])
        normed, mlp_norm = self.mlp_norm.forward(h, residual=x)         # h becomes the sum with x
        out, mlp = self.mlp.forward(normed, batch)
        mlp_mask = self._dropout(out, batch, self.keys[1])
        self.ops.add(out, h)
        return out, self.Saved(attention_norm, attention, attention_mask, mlp_norm, mlp, mlp_mask)

    def _through_dropout(self, dy, mask):
        """The gradient of `_dropout`: `dy` itself, or a dropped copy of it."""
        if mask is None:
            return dy
        dropped = self.ops.empty(dy.shape, dy.dtype)
        self.ops.copy(dropped, dy)
        self.ops.dropout(dropped, mask)
        return dropped

    def backward(self, dout, saved, batch):
        """(n, C) -> (n, C)"""
        dy = self._through_dropout(dout, saved.mlp_mask)
        dh = self.mlp_norm.backward(self.mlp.backward(dy, saved.mlp, batch), saved.mlp_norm, residual=dout)
        dy = self._through_dropout(dh, saved.attention_mask)
        return self.attention_norm.backward(self.attention.backward(dy, saved.attention, batch), saved.attention_norm, residual=dh)


class Recompute:
    """A block of which only the input is kept; its forward runs again before its backward (Chen et al. 2016, arXiv:1604.06174)."""

    def __init__(self, block):
        self.block, self.parameters = block, block.parameters
        self.buckets = self.needs = self.needs_backward = block.buckets

    def forward(self, x, batch, cache=None):
        return self.block.forward(x, batch, cache)[0], x

    def backward(self, dout, saved, batch):
        again = batch._replace(auxiliary=None)      # the router losses have been counted
        return self.block.backward(dout, self.block.forward(saved, again)[1], batch)


class Maker:
    """Makes the layers of a block and collects their parameters in the order of their buckets."""

    def __init__(self, name, setting, region):
        self.ops, self.name, self.setting, self.shape, self.region = setting.ops, name, setting, setting.shape, region
        self.tp, self.parameters = setting.mesh.size("tp"), []

    def parameter(self, name, shape, init, axes=None, unit=1, copies=1, partial=False):
        name = f"{self.name}.{name}" if self.name else name
        parameter = Parameter(name, shape, init, axes, unit, copies=copies, partial=partial or self.region.sequence)
        self.parameters.append(parameter)
        return parameter

    def norm(self, name):
        width = (self.shape.width,)
        weight = self.parameter(f"{name}.weight", width, Constant(1.0))
        if self.shape.family == "gpt":
            return LayerNorm(self.ops, weight, self.parameter(f"{name}.bias", width, Constant(0.0)), self.shape.norm_epsilon)
        return RMSNorm(self.ops, weight, self.shape.norm_epsilon)

    def linear(self, names, rows):
        """A Linear whose weights are the named parameters of `rows` rows each, stacked; tp splits the rows."""
        return self.linears([(names, rows, 1)], self.shape.family == "gpt")[0]

    def linears(self, stacks, biased, unit=1):
        """A Linear of each stack (names, rows, copies): first all weights are made, then all biases, so that their order is that of one stack."""
        weights = [Stack(*[self.parameter(f"{name}.weight", (r, self.shape.width), Normal(self.shape.std), ("tp", None), unit, copies) for name, r in zip(names, rows)])
                   for names, rows, copies in stacks]
        biases = [Stack(*[self.parameter(f"{name}.bias", (r,), Constant(0.0), ("tp",), unit, copies) for name, r in zip(names, rows)]) if biased else None
                  for names, rows, copies in stacks]
        return [Linear(self.ops, weight, bias) for weight, bias in zip(weights, biases)]

    def row_linear(self, name, columns, region):
        """A RowLinear; tp splits the columns."""
        shape = self.shape
        weight = self.parameter(f"{name}.weight", (shape.width, columns), Normal(shape.residual_std), (None, "tp"))
        bias = self.parameter(f"{name}.bias", (shape.width,), Constant(0.0)) if shape.family == "gpt" else None
        return RowLinear(self.ops, weight, bias, region)

    def attention(self, dropout_key):
        shape, setting = self.shape, self.setting
        d, q_rows, kv_rows = shape.head_width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        names, rows = ["attention.query", "attention.key", "attention.value"], [q_rows, kv_rows, kv_rows]
        stacks = [(names, rows, 1)]
        if self.tp > shape.kv_heads:
            stacks = [(names[:1], rows[:1], 1), (names[1:], rows[1:], self.tp // shape.kv_heads)]
        projections = self.linears(stacks, shape.family == "gpt" or shape.qkv_bias, d)
        output = self.row_linear("attention.output", q_rows, self.region)
        query = shape.heads // self.tp
        heads = Heads(query, max(1, shape.kv_heads // self.tp), d, setting.mesh.coord("tp") * query)
        core = core_of(setting.layout.cp_form, self.ops, setting.mesh["cp"], d ** -0.5)
        return Attention(self.ops, projections, output, heads, setting.rope, core, self.region, dropout_key, setting.light)

    def mlp(self, name, width, region):
        if self.shape.family == "gpt":
            up = self.linear([f"{name}.up"], [width])
            return GeluMLP(self.ops, up, self.row_linear(f"{name}.down", width, region), region, self.setting.light)
        gate_up = self.linear([f"{name}.gate", f"{name}.up"], [width, width])
        return SwiGLU(self.ops, gate_up, self.row_linear(f"{name}.down", width, region), region, self.setting.light)

    def experts(self):
        """Routed experts, and shared ones as one dense MLP of their width together."""
        shape, mesh = self.shape, self.setting.mesh
        e, f, c = shape.experts, shape.mlp_width, shape.width
        router = self.parameter("mlp.router.weight", (e, c), Normal(shape.std), partial=True)
        gate, up = [self.parameter(f"mlp.{name}.weight", (e, f, c), Normal(shape.std), ("ep", "tp", None)) for name in ("gate", "up")]
        down = self.parameter("mlp.down.weight", (e, c, f), Normal(shape.residual_std), ("ep", None, "tp"))
        shared = None
        if shape.shared_experts:
            shared = self.mlp("mlp.shared", f * shape.shared_experts, Region(Solo(), False))
        return Experts(self.ops, router, gate, up, down, shared, mesh, self.region, shape.experts_per_token,
                       shape.balance_loss, shape.router_z_loss, self.setting.light)
