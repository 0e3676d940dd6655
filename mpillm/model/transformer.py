"""The whole model: embedding, blocks, last norm, output loss; forward and backward.

Families: gpt (GPT-2: Radford et al. 2019) and llama (Touvron et al. 2023, arXiv:2302.13971).
"""

from typing import NamedTuple

from ..layout.parameter import Bucket, Constant, Normal, Parameter, key_of
from .block import Block, Recompute
from .cache import Cache
from .embedding import Embedding
from .loss import OutputLoss
from .norm import LayerNorm, RMSNorm
from .rope import Rope

STD = 0.02      # of initial weights (Radford et al. 2018, section 4.1)


class Shape(NamedTuple):
    """Sizes of a model with every default filled in."""
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
                   model.width // model.heads, mlp_width, model.context, model.vocabulary or vocabulary,
                   model.tied, model.rope_base, model.norm_epsilon)


class Transformer:
    """A causal language model.

    Parameters
    ----------
    ops : backend
    shape : Shape
    dtype : type of weights and activations
    seed : int
        Seed of dropout (and of `initialize`).
    recompute : str
        "none" or "block".
    """

    class Saved(NamedTuple):
        embedding: NamedTuple
        blocks: list
        norm: NamedTuple
        loss: NamedTuple

    def __init__(self, ops, shape, dtype, seed=1, recompute="none"):
        self.ops, self.shape, self.dtype, self.seed = ops, shape, dtype, seed
        table = Parameter("embedding.tokens.weight", (shape.vocabulary, shape.width), Normal(STD))
        positions = None
        rope = None
        if shape.family == "gpt":
            positions = Parameter("embedding.positions.weight", (shape.context, shape.width), Normal(STD))
        else:
            rope = Rope(ops, shape.head_width, shape.rope_base, dtype)
        self.embedding = Embedding(ops, table, positions if shape.family == "gpt" else None, key_of(seed, "embedding"))
        self.blocks = [Block(ops, index, shape, rope, seed) for index in range(shape.layers)]
        if recompute == "block":
            self.blocks = [Recompute(block) for block in self.blocks]
        last = self._last_norm()
        output = table if shape.tied else Parameter("head.weight", (shape.vocabulary, shape.width), Normal(STD))
        self.loss = OutputLoss(ops, output)
        self.embedding_bucket = Bucket("embedding", [table] + ([positions] if positions else []))
        self.head_bucket = Bucket("head", last + ([] if shape.tied else [output]))
        self.buckets = [self.embedding_bucket] + [block.bucket for block in self.blocks] + [self.head_bucket]

    def _last_norm(self):
        shape = self.shape
        weight = Parameter("norm.weight", (shape.width,), Constant(1.0))
        if shape.family == "gpt":
            bias = Parameter("norm.bias", (shape.width,), Constant(0.0))
            self.norm = LayerNorm(self.ops, weight, bias, shape.norm_epsilon)
            return [weight, bias]
        self.norm = RMSNorm(self.ops, weight, shape.norm_epsilon)
        return [weight]

    def parameters(self):
        """All parameters, in the order of the forward."""
        return [parameter for bucket in self.buckets for parameter in bucket.parameters]

    def place(self, mesh, zero):
        """Gives every parameter its slabs and arrays on this rank."""
        for bucket in self.buckets:
            bucket.place(mesh, zero, self.ops, self.dtype)

    def initialize(self):
        for parameter in self.parameters():
            parameter.initialize(self.ops, self.seed)

    def forward(self, batch, training=True):
        """The weighted loss sum of a micro-batch, and what backward needs (nothing when not training)."""
        x, embedding = self.embedding.forward(batch)        # (B T, C)
        blocks = []
        for block in self.blocks:
            x, saved = block.forward(x, batch)
            if training:
                blocks.append(saved)
            del saved
        x, norm = self.norm.forward(x)
        loss, output = self.loss.forward(x, batch, training)
        return loss, self.Saved(embedding, blocks, norm, output) if training else None

    def backward(self, saved, batch):
        """Adds the gradients of a micro-batch; yields each bucket as soon as its gradients are complete."""
        dx = self.norm.backward(self.loss.backward(saved.loss), saved.norm)     # (B T, C)
        yield self.head_bucket
        for block in reversed(self.blocks):
            dx = block.backward(dx, saved.blocks.pop(), batch)
            yield block.bucket
        self.embedding.backward(dx, saved.embedding, batch)
        yield self.embedding_bucket

    def caches(self, batch_size, longest):
        """One empty Cache a block."""
        shape = self.shape
        return [Cache(self.ops, batch_size, longest, shape.kv_heads, shape.head_width, self.dtype) for _ in self.blocks]

    def next_logits(self, batch, caches=None):
        """Logits (B, V) of the token after each sequence of `batch`; with caches, `batch` holds only the new tokens."""
        x, _ = self.embedding.forward(batch)
        for index, block in enumerate(self.blocks):
            x, _ = block.forward(x, batch, caches[index] if caches else None)
        b, t = batch.shape
        x, _ = self.norm.forward(x.reshape(b, t, -1)[:, -1])                    # (B, C)
        return self.loss.logits(x)

    def logits(self, batch):
        """Logits (B, T, V) of every position."""
        x, _ = self.embedding.forward(batch)
        for block in self.blocks:
            x, _ = block.forward(x, batch)
        return self.loss.logits(self.norm.forward(x)[0]).reshape(batch.shape + (-1,))

    def flops_per_token(self):
        """Model FLOPs of forward and backward: 6 x weights in matrix products + 12 L H D T (DESIGN.md section 8)."""
        shape = self.shape
        matrices = sum(parameter.shape[0] * parameter.shape[1] for block in self.blocks for parameter in block.bucket.parameters
                       if len(parameter.shape) == 2)
        matrices += shape.vocabulary * shape.width
        return 6 * matrices + 12 * shape.layers * shape.heads * shape.head_width * shape.context
