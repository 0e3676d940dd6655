"""The whole model, as the parts of it that a rank has: embedding, blocks, last norm and output loss; forward and backward.

Families: gpt (GPT-2: Radford et al. 2019) and llama (Touvron et al. 2023, arXiv:2302.13971), with a mixture of experts
as an option (Jiang et al. 2024, arXiv:2401.04088).
"""

from typing import NamedTuple

from ..backend import wide_of
from ..layout.mesh import Mesh
from ..layout.parameter import Normal, Parameter, buckets_of, key_of
from .block import Block, Maker, Recompute, Setting
from .cache import Cache
from .embedding import Embedding
from .loss import OutputLoss
from .rope import Rope
from .shape import STD, Layout, layers_of_parts


class First:
    """The beginning of the model: tokens (and positions) to vectors."""

    def __init__(self, setting, table):
        shape, positions = setting.shape, None
        if shape.family == "gpt":
            positions = Parameter("embedding.positions.weight", (shape.context, shape.width), Normal(STD), partial=setting.region.sequence)
        self.embedding = Embedding(setting.ops, table, positions, setting.region, key_of(setting.seed, "embedding"))
        self.parameters = [table] + ([positions] if positions else [])
        self.buckets = self.needs = buckets_of("embedding", self.parameters, setting.mesh)
        self.needs_backward = []

    def forward(self, x, batch):
        return self.embedding.forward(batch)

    def backward(self, dy, saved, batch):
        return self.embedding.backward(dy, saved, batch)


class Last:
    """The end of the model: last norm, output table, loss.

    `table_bucket`: where the table's gradients are complete only later, because the first part of the model, on the same
    rank, has it too.
    """

    class Saved(NamedTuple):
        norm: NamedTuple
        loss: NamedTuple

    def __init__(self, setting, table, table_bucket=None):
        make = Maker("", setting, setting.region)
        self.norm = make.norm("norm")
        self.loss = OutputLoss(setting.ops, table, setting.region)
        self.parameters = make.parameters + ([] if table_bucket else [table])
        self.buckets = self.needs_backward = buckets_of("head", self.parameters, setting.mesh)
        self.needs = self.buckets + ([table_bucket] if table_bucket else [])

    def forward(self, x, batch, training=True):
        """(n, C) -> weighted loss sum"""
        x, norm = self.norm.forward(x)
        loss, saved = self.loss.forward(x, batch, training)
        return loss, self.Saved(norm, saved)

    def backward(self, dy, saved, batch):
        return self.norm.backward(self.loss.backward(saved.loss), saved.norm)


class Part:
    """Neighbouring units of the model on one rank; the values of the next unit are fetched while one computes (ZeRO 3).

    Attributes
    ----------
    units : list of First, Block, Recompute, Last
    first, last : bool
        Whether it begins with tokens; whether it ends with the loss.
    """

    def __init__(self, units):
        self.units = units
        self.first = bool(units) and isinstance(units[0], First)
        self.last = bool(units) and isinstance(units[-1], Last)
        self.buckets = [bucket for unit in units for bucket in unit.buckets]

    def _fetched(self, needs, following):
        for bucket in needs:
            bucket.fetch()
        for bucket in following:
            bucket.fetch_start()

    def _release(self, needs, following):
        for bucket in needs:
            if bucket not in following:
                bucket.release()

    def forward(self, x, batch, training=True):
        """What the part makes of `x` (n, C), None where it begins with tokens: (n, C) or the weighted loss sum; and what backward needs."""
        kept = []
        for index, unit in enumerate(self.units):
            following = self.units[index + 1].needs if index + 1 < len(self.units) else []
            self._fetched(unit.needs, following)
            x, saved = unit.forward(x, batch, training) if isinstance(unit, Last) else unit.forward(x, batch)
            self._release(unit.needs, following)
            if training:
                kept.append(saved)
            del saved
        return x, kept

    def backward(self, dy, saved, batch, done=lambda bucket: None):
        """(n, C), None where it ends with the loss -> (n, C), None where it begins with tokens. Empties `saved`.

        `done` is called with each bucket as soon as its gradients of this micro-batch are complete.
        """
        for index in reversed(range(len(self.units))):
            unit, following = self.units[index], self.units[index - 1].needs_backward if index else []
            self._fetched(unit.needs_backward, following)
            dy = unit.backward(dy, saved.pop(), batch)
            self._release(unit.needs_backward, following)
            for bucket in unit.buckets:
                done(bucket)
        return dy


class Transformer:
    """A causal language model, the parts of it that a rank has.

    Parameters
    ----------
    ops : backend
    shape : Shape
    dtype : type of weights and activations
    seed : int
        Seed of dropout (and of `initialize`).
    recompute : str
        "none", "selective" or "block".
    mesh : Mesh
        One rank when left out.
    layout : Layout

    Attributes
    ----------
    parts : list of Part
        In the order of the model: part c of stage s is number c S + s of all.
    """

    def __init__(self, ops, shape, dtype, seed=1, recompute="none", mesh=None, layout=Layout()):
        self.ops, self.shape, self.dtype, self.seed, self.recompute = ops, shape, dtype, seed, recompute
        self.mesh = mesh = mesh or Mesh.plan({}, 0)
        rope = None if shape.family == "gpt" else Rope(ops, shape.head_width, shape.rope_base, wide_of(dtype), shape.rope_scaling)
        self.setting = Setting(ops, shape, mesh, layout, rope, seed, recompute == "selective")
        num_parts, stages = mesh.size("pp") * layout.chunks, mesh.size("pp")
        self.layers = layers_of_parts(shape, num_parts, layout.layers)
        here = [chunk * stages + mesh.coord("pp") for chunk in range(layout.chunks)]
        first, last = 0 in here, num_parts - 1 in here
        table = self._table("embedding.tokens.weight", shape.tied and stages > 1)
        output = table if shape.tied else self._table("head.weight")
        self.first = First(self.setting, table) if first else None
        shared = next(bucket for bucket in self.first.buckets if table in bucket.parameters) if shape.tied and first and last else None
        self.last = Last(self.setting, output, shared) if last else None
        self.blocks, self.parts = {}, []
        for number in here:
            self.parts.append(self._part(number, number == 0, number == num_parts - 1))
        self.buckets = [bucket for part in self.parts for bucket in part.buckets]

    def _table(self, name, tied=False):
        return Parameter(name, (self.shape.vocabulary, self.shape.width), Normal(STD), ("tp", None), tied=tied)

    def _part(self, number, first, last):
        start = sum(self.layers[:number])
        for index in range(start, start + self.layers[number]):
            block = Block(index, self.setting)
            self.blocks[index] = Recompute(block) if self.recompute == "block" else block
        blocks = [self.blocks[index] for index in range(start, start + self.layers[number])]
        return Part(([self.first] if first else []) + blocks + ([self.last] if last else []))

    def parameters(self):
        """The parameters of this rank, in the order of the forward."""
        return [parameter for part in self.parts for unit in part.units for parameter in unit.parameters]

    def every_parameter(self):
        """All parameters of the whole model in the order of the forward, those of other stages as their names and shapes only."""
        mine = {parameter.name: parameter for parameter in self.parameters()}
        table = self._table("embedding.tokens.weight")
        found = list(First(self.setting, table).parameters)
        for index in range(self.shape.layers):
            found += (self.blocks[index] if index in self.blocks else Block(index, self.setting)).parameters
        output = table if self.shape.tied else self._table("head.weight")
        found += [parameter for parameter in Last(self.setting, output).parameters if parameter is not table]
        return [mine.get(parameter.name, parameter) for parameter in found]

    def place(self, zero=0, offload=False):
        """Gives every parameter its slabs and arrays on this rank; masters and moments in host memory if they are offloaded."""
        for bucket in self.buckets:
            bucket.place(self.mesh, zero, self.ops, self.dtype, offload)

    def initialize(self):
        for parameter in self.parameters():
            parameter.initialize(self.ops, self.seed)

    # ---- the whole model on one rank of a pipeline ----------------------------------------------------------------

    def forward(self, batch, training=True):
        """The weighted loss sum of a micro-batch, and what backward needs; where there is one stage."""
        return self.parts[0].forward(None, batch, training)

    def backward(self, saved, batch, done=lambda bucket: None):
        """Adds the gradients of a micro-batch; `done` as in `Part.backward`."""
        self.parts[0].backward(None, saved, batch, done)

    def caches(self, batch_size, longest):
        """One empty Cache a block."""
        heads = [block.attention.heads for block in self._plain_blocks()]
        return [Cache(self.ops, batch_size, longest, each.kv, each.width, self.dtype) for each in heads]

    def _plain_blocks(self):
        return [getattr(block, "block", block) for block in self.blocks.values()]

    def next_logits(self, batch, caches=None):
        """Logits (B, V) of the token after each sequence of `batch`; with caches, `batch` holds only the new tokens.

        Where tokens are not split (sequence, cp) and there is one stage.
        """
        x, _ = self.first.forward(None, batch)
        for index, block in enumerate(self._plain_blocks()):
            x, _ = block.forward(x, batch, caches[index] if caches else None)
        b, t = batch.shape
        x, _ = self.last.norm.forward(x.reshape(b, t, -1)[:, -1])               # (B, C)
        return self.last.loss.logits(x)

    def logits(self, batch):
        """Logits (B, T, V) of every position; where `next_logits` can be asked for."""
        x, _ = self.first.forward(None, batch)
        for block in self._plain_blocks():
            x, _ = block.forward(x, batch)
        return self.last.loss.logits(self.last.norm.forward(x)[0]).reshape(batch.shape + (-1,))

    def flops_per_token(self):
        return self.shape.flops_per_token()
