"""The sizes of a model with every default filled in, what they cost, and how its blocks are dealt to pipeline stages."""

from typing import NamedTuple

STD = 0.02      # of initial weights (Radford et al. 2018, section 4.1)


class RopeScaling(NamedTuple):
    """How rotary angles are slowed down (rope.py)."""
    kind: str                       # linear | llama3
    factor: float
    low_frequency_factor: float = 0.0
    high_frequency_factor: float = 0.0
    original_context: float = 0.0   # tokens


class Shape(NamedTuple):
    """Sizes of a model."""
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int
    vocabulary: int
    tied: bool
    rope_base: float
    norm_epsilon: float
    experts: int = 0            # E; 0: dense
    experts_per_token: int = 0
    shared_experts: int = 0
    balance_loss: float = 0.0   # coefficient
    router_z_loss: float = 0.0  # coefficient
    qkv_bias: bool = False
    rope_scaling: object = None     # RopeScaling or None

    @property
    def std(self):
        return STD

    @property
    def residual_std(self):
        """Of the products that end in the residual: 1/sqrt(2 L) smaller (Radford et al. 2019, section 2.3)."""
        return STD / (2 * self.layers) ** 0.5

    @classmethod
    def of(cls, model, vocabulary):
        """The Shape of a [model] section; `vocabulary` is used where the section gives none."""
        mlp_width = model.mlp_width
        if mlp_width is None:
            mlp_width = 4 * model.width if model.family == "gpt" else -(-8 * model.width // (3 * 64)) * 64
        return cls(model.family, model.layers, model.width, model.heads, model.kv_heads or model.heads,
                   model.channels, mlp_width, model.context, model.vocabulary or vocabulary,
                   model.tied, model.rope_base, model.norm_epsilon, model.experts, min(model.experts_per_token, model.experts),
                   model.shared_experts, model.balance_loss, model.router_z_loss, model.qkv_bias,
                   RopeScaling(**model.rope_scaling) if model.rope_scaling else None)

    @property
    def block_weights(self):
        """Weights of a block in the matrix products of one token: of experts, those that it is routed to."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.width * self.mlp_width * (2 if self.family == "gpt" else 3)
        if not self.experts:
            return attention + mlp
        return attention + mlp * (self.experts_per_token + self.shared_experts) + self.experts * self.width

    @property
    def table_weights(self):
        """Weights of the output table."""
        return self.vocabulary * self.width

    def flops_per_token(self):
        """Model FLOPs of forward and backward: 6 x weights in matrix products + 12 L H D T (DESIGN.md section 8)."""
        return 6 * (self.layers * self.block_weights + self.table_weights) + 12 * self.layers * self.heads * self.head_width * self.context


class Layout(NamedTuple):
    """How a model is laid out beside its mesh."""
    sequence: bool = True       # tokens split over tp between the tensor-parallel parts
    cp_form: str = "ring"       # ring | ulysses
    chunks: int = 1             # parts of the model on each pipeline stage (interleaved schedule)
    layers: tuple = ()          # blocks of each part, in the order of the model; dealt by cost when empty


def layers_of_parts(shape, num_parts, by_hand=()):
    """Blocks of each of the parts that a pipeline cuts the model into, in the order of the model.

    By cost: the last part has the output table too, so it gets fewer blocks; the largest cost of a part is as small as
    can be.
    """
    if by_hand:
        return tuple(by_hand)
    block = shape.block_weights + shape.heads * shape.head_width * shape.context    # causal attention: half of 12 H D T
    costs, layers = [0.0] * (num_parts - 1) + [shape.table_weights / block], [0] * num_parts
    for _ in range(shape.layers):
        part = min(range(num_parts), key=lambda index: costs[index] + 1)
        costs[part] += 1
        layers[part] += 1
    return tuple(layers)
