"""The two MLPs: GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415, tanh form) and SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from typing import NamedTuple

from .linear import Linear


class GeluMLP:
    """down(gelu(up(x)))"""

    class Saved(NamedTuple):
        up_input: Linear.Saved
        hidden: object          # (N, F), before the GELU, bias added
        down_input: Linear.Saved

    def __init__(self, ops, up, down):
        self.ops, self.up, self.down = ops, up, down

    def forward(self, x):
        hidden, up_input = self.up.forward(x, add_bias=False)           # (N, F)
        y, down_input = self.down.forward(self.ops.gelu(hidden, self.up.bias.value))    # (N, C)
        return y, self.Saved(up_input, hidden, down_input)

    def backward(self, dy, saved):
        dhidden = self.ops.gelu_backward(self.down.backward(dy, saved.down_input), saved.hidden)    # (N, F)
        return self.up.backward(dhidden, saved.up_input)                # (N, C)


class SwiGLU:
    """down(silu(gate(x)) * up(x)); gate and up are one stacked product."""

    class Saved(NamedTuple):
        gate_up_input: Linear.Saved
        gate_up: object         # (N, 2F)
        down_input: Linear.Saved

    def __init__(self, ops, gate_up, down):
        self.ops, self.gate_up, self.down = ops, gate_up, down

    def forward(self, x):
        gate_up, gate_up_input = self.gate_up.forward(x)                # (N, 2F)
        f = gate_up.shape[1] // 2
        y, down_input = self.down.forward(self.ops.swiglu(gate_up[:, :f], gate_up[:, f:]))  # (N, C)
        return y, self.Saved(gate_up_input, gate_up, down_input)

    def backward(self, dy, saved):
        dhidden = self.down.backward(dy, saved.down_input)              # (N, F)
        f = dhidden.shape[1]
        dgate_up = self.ops.empty(saved.gate_up.shape, saved.gate_up.dtype)
        self.ops.swiglu_backward(dhidden, saved.gate_up[:, :f], saved.gate_up[:, f:], dgate_up[:, :f], dgate_up[:, f:])
        return self.gate_up.backward(dgate_up, saved.gate_up_input)     # (N, C)
