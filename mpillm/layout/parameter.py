"""Parameters: global name and shape, the slab a rank computes with (held) and the slab it is answerable for (owned).

The parameters of one block lie one after the other in the flat buffers of a `Bucket`, so that neighbours such as
query, key and value multiply as one matrix (`Stack`), and so that one call reduces a whole block's gradients.
How long the held gradients live is what the ZeRO stage says; nobody else needs to know it.
"""

import hashlib
import math
from typing import NamedTuple

from .slab import Slab


class Normal(NamedTuple):
    """Initial values from N(0, std^2)."""
    std: float


class Constant(NamedTuple):
    """All initial values equal."""
    value: float


def key_of(seed, name):
    """The 64-bit random key of a named tensor or dropout site: blake2b(seed, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


class Parameter:
    """One tensor of the model.

    Parameters
    ----------
    name : str
        Global name, such as "blocks.3.mlp.up.weight".
    shape : tuple
        Global shape; matrices are (out, in).
    init : Normal or Constant
    axes : tuple
        For each dim the mesh axis that splits it, or None.
    unit : int
        Rows that a split of dim 0 keeps together (D rows of a head).
    decay : bool or None
        Whether AdamW decays it; matrices do, vectors do not, when left out.
    """

    def __init__(self, name, shape, init, axes=None, unit=1, decay=None):
        self.name, self.shape, self.init, self.unit = name, tuple(shape), init, unit
        self.axes = tuple(axes) if axes else (None,) * len(shape)
        self.decay = len(shape) > 1 if decay is None else decay
        self.bucket, self.offset = None, 0      # where the held value lies; set by Bucket.place, as all below
        self.held = self.owned = None           # Slab
        self.value = None                       # (held), a view of the bucket's buffer
        self.master = self.moment1 = self.moment2 = None    # (updated)
        self.fresh = True                       # the next gradient is written, not added

    @property
    def updated(self):
        """The slab whose master and moments this rank keeps: all that is held under ZeRO 0, else what is owned."""
        return self.held if self.bucket.zero == 0 else self.owned

    @property
    def grad(self):
        """(held), a view of the bucket's gradients."""
        return self.bucket._part(self.bucket.grads, self)

    @property
    def owned_grad(self):
        """(updated), complete after the reduction."""
        return self.bucket.owned_grad_of(self)

    def held_by(self, mesh):
        """The slab that the rank of `mesh` computes with."""
        slab = Slab.whole(self.shape)
        for dim, axis in enumerate(self.axes):
            if axis:
                slab = slab.cut(dim, mesh.size(axis), mesh.coord(axis), self.unit if dim == 0 else 1)
        return slab

    def owned_by(self, mesh, replica):
        """The part of the held slab that replica number `replica` of it is answerable for."""
        return self.held_by(mesh).cut(0, mesh.size(*self.replica_axes()), replica)

    def replica_axes(self):
        """The axes along which ranks hold the same slab, those that split the tokens first."""
        return tuple(axis for axis in ("dp", "cp", "tp") if axis not in self.axes)

    def accumulates(self):
        """Whether a gradient is to be added (True) or written (False: the first since the last step)."""
        self.bucket.make_grads()        # first, because it marks all of them as not yet written
        fresh, self.fresh = self.fresh, False
        return not fresh

    def initialize(self, ops, seed):
        """Fills the held value: a pure function of seed, name and global index, so the same on any layout."""
        if isinstance(self.init, Constant):
            ops.fill(self.value, self.init.value)
            return
        row, column = (self.held.start + (0,))[:2]
        rows = self.value.reshape(self.value.shape[0], math.prod(self.value.shape[1:]))    # either may be 0
        ops.normal(rows, key_of(seed, self.name), row, column,
                   math.prod(self.shape[1:]), self.init.std)


class Stack:
    """Neighbouring parameters of a bucket seen as one: their rows below each other.

    `value` and `grad` are (sum of rows, C), views of the bucket's buffers.
    """

    def __init__(self, *parameters):
        self.parameters = parameters

    def _view(self, buffer):
        first, last = self.parameters[0], self.parameters[-1]
        flat = buffer[first.offset:last.offset + last.held.size]
        return flat.reshape((-1,) + first.held.shape[1:])

    @property
    def value(self):
        return self._view(self.parameters[0].bucket.values)

    @property
    def grad(self):
        return self._view(self.parameters[0].bucket.grads)

    def accumulates(self):
        return any([parameter.accumulates() for parameter in self.parameters])


class Bucket:
    """The parameters of one block, in flat buffers.

    Attributes
    ----------
    values : array (held elements of all parameters,)
    grads : array, as values
        Made when first asked for after `free_grads()`, then not yet written.
    owned_grads : array (owned elements,)
        Reduced gradients under ZeRO 1 and 2 on more than one rank; else None and `grads` holds them.
    moments : two arrays (updated elements,)
    counts : list of int
        Owned elements of each replica, the order of messages.
    """

    def __init__(self, name, parameters):
        self.name, self.parameters = name, list(parameters)

    def place(self, mesh, zero, ops, dtype):
        """Decides held and owned slabs on `mesh` and allocates values, masters and moments."""
        self.ops, self.dtype = ops, dtype
        self.group = mesh[self.parameters[0].replica_axes()]
        self.zero = 0 if self.group.size == 1 else zero
        offset = 0
        for parameter in self.parameters:
            if parameter.replica_axes() != self.parameters[0].replica_axes():
                raise ValueError(f"{parameter.name}: parameters of bucket {self.name} are replicated over different axes")
            parameter.bucket, parameter.offset = self, offset
            parameter.held = parameter.held_by(mesh)
            parameter.owned = parameter.owned_by(mesh, self.group.rank)
            offset += parameter.held.size
        self.owned_of = [[parameter.owned_by(mesh, replica) for parameter in self.parameters]
                         for replica in range(self.group.size)]
        self.counts = [sum(slab.size for slab in slabs) for slabs in self.owned_of]
        self.values = ops.zeros((offset,), dtype)
        self._grads = self.owned_grads = None
        if self.zero:
            self.owned_grads = ops.zeros((self.counts[self.group.rank],), dtype)
        self.moments = [ops.zeros((sum(p.updated.size for p in self.parameters),), dtype) for _ in range(2)]
        position = 0
        for parameter in self.parameters:
            slab, start = parameter.updated, position
            position += slab.size
            parameter.value = self._part(self.values, parameter)
            # Compute type and master type are the same so far, so the master is the value itself.
            parameter.master = parameter.value[slab.within(parameter.held)]
            parameter.moment1, parameter.moment2 = [moment[start:position].reshape(slab.shape) for moment in self.moments]

    def _part(self, buffer, parameter):
        return buffer[parameter.offset:parameter.offset + parameter.held.size].reshape(parameter.held.shape)

    @property
    def grads(self):
        self.make_grads()
        return self._grads

    def make_grads(self):
        """Makes the gradients, not yet written, unless they are there."""
        if self._grads is None:
            self._grads = self.ops.empty(self.values.shape, self.dtype)
            self.clear()

    def free_grads(self):
        self._grads = None

    def clear(self):
        """Makes the next gradients be written over the old ones; those of vectors, always added to, become zero."""
        if self._grads is None:
            return
        for parameter in self.parameters:
            parameter.fresh = True
            if len(parameter.shape) == 1:
                self.ops.fill(parameter.grad, 0)

    def owned_grad_of(self, parameter):
        """The reduced gradient of `parameter.updated`."""
        if self.zero == 0:
            return parameter.grad
        start = sum(other.owned.size for other in self.parameters[:self.parameters.index(parameter)])
        return self.owned_grads[start:start + parameter.owned.size].reshape(parameter.owned.shape)

    def pack(self, held):
        """The flat buffer `held` rearranged in order of owner: owned slabs of replica 0, of replica 1, ..."""
        out = self.ops.empty(held.shape, held.dtype)
        for place, packed in self._pieces(held, out):
            self.ops.copy(packed, place)
        return out

    def gather(self, held):
        """Fills the flat buffer `held` on every replica, each of which has only its owned part of it right."""
        if self.group.size > 1:
            packed = self.pack(held)
            self.group.all_gather(packed, self.counts)
            self.unpack(packed, held)

    def unpack(self, packed, held):
        """The reverse of `pack`."""
        for place, piece in self._pieces(held, packed):
            self.ops.copy(place, piece)

    def _pieces(self, held, packed):
        position = 0
        for slabs in self.owned_of:
            for parameter, slab in zip(self.parameters, slabs):
                whole = self._part(held, parameter)
                piece = packed[position:position + slab.size].reshape(slab.shape)
                position += slab.size
                if slab.size:
                    yield whole[slab.within(parameter.held)], piece
