"""The two MLPs: GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415, tanh form) and SwiGLU (Shazeer 2020, arXiv:2002.05202).

Under tp each rank has some of the F hidden channels. With `light` the activation is not kept but computed again from the
product before it (selective recompute; Korthikanti et al. 2022, arXiv:2205.05198, section 5).
"""

from typing import NamedTuple

from .linear import Linear


class GeluMLP:
    """down(gelu(up(x)))"""

    class Saved(NamedTuple):
        up_input: Linear.Saved
        hidden: object          # (N, F/tp), before the GELU, bias added
        down_input: object      # Linear.Saved; None when light

    def __init__(self, ops, up, down, region, light=False):
        self.ops, self.up, self.down, self.region, self.light = ops, up, down, region, light

    def forward(self, x, batch):
        """(n, C) -> (n, C)"""
        x = self.region.enter(x, batch.num_rows)                        # (N, C)
        hidden, activated, up_input = self.up.forward_gelu(x)           # (N, F/tp)
        y, down_input = self.down.forward(activated)                    # (n, C)
        return y, self.Saved(up_input, hidden, None if self.light else down_input)

    def backward(self, dy, saved, batch):
        """(n, C) -> (n, C)"""
        down_input = saved.down_input or Linear.Saved(self.ops.gelu(saved.hidden))
        dhidden = self.ops.gelu_backward(self.down.backward(dy, down_input), saved.hidden)      # (N, F/tp)
        return self.region.enter_backward(self.up.backward(dhidden, saved.up_input))            # (n, C)


class SwiGLU:
    """down(silu(gate(x)) * up(x)); gate and up are one stacked product."""

    class Saved(NamedTuple):
        gate_up_input: Linear.Saved
        gate_up: object         # (N, 2 F/tp)
        down_input: object      # Linear.Saved; None when light

    def __init__(self, ops, gate_up, down, region, light=False):
        self.ops, self.gate_up, self.down, self.region, self.light = ops, gate_up, down, region, light

    def _activation(self, gate_up):
        f = gate_up.shape[1] // 2
        return self.ops.swiglu(gate_up[:, :f], gate_up[:, f:])          # (N, F/tp)

    def forward(self, x, batch):
        """(n, C) -> (n, C)"""
        x = self.region.enter(x, batch.num_rows)                        # (N, C)
        gate_up, gate_up_input = self.gate_up.forward(x)                # (N, 2 F/tp)
        y, down_input = self.down.forward(self._activation(gate_up))    # (n, C)
        return y, self.Saved(gate_up_input, gate_up, None if self.light else down_input)

    def backward(self, dy, saved, batch):
        """(n, C) -> (n, C)"""
        gate_up = saved.gate_up
        dhidden = self.down.backward(dy, saved.down_input or Linear.Saved(self._activation(gate_up)))   # (N, F/tp)
        f = dhidden.shape[1]
        dgate_up = self.ops.empty(gate_up.shape, gate_up.dtype)         # (N, 2 F/tp)
        self.ops.swiglu_backward(dhidden, gate_up[:, :f], gate_up[:, f:], dgate_up[:, :f], dgate_up[:, f:])
        return self.region.enter_backward(self.gate_up.backward(dgate_up, saved.gate_up_input))         # (n, C)
