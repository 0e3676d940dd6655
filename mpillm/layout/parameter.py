"""Parameters: global name and shape, the slab a rank computes with (held) and the slab it is answerable for (owned).

The parameters of one block that are replicated alike lie one after the other in the flat buffers of a `Bucket`, so that
neighbours such as query, key and value multiply as one matrix (`Stack`), and so that one call reduces their gradients.
How long the held gradients and values live is what the ZeRO stage says; nobody else needs to know it.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

from ..backend import wide_of
from .slab import Slab, cut, sizes_of_cut


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
        Global shape; matrices are (out, in), experts (E, out, in).
    init : Normal or Constant
    axes : tuple
        For each dim the mesh axis that splits it, or None.
    unit : int
        Rows that a split of dim 0 keeps together (D rows of a head).
    decay : bool or None
        Whether AdamW decays it; matrices do, vectors do not, when left out.
    copies : int
        Neighbours along tp that hold the same slab of what tp splits (key/value heads fewer than tp).
    partial : bool
        Whether the gradients of tp ranks that hold the same slab are parts of a sum; else they are equal, and one counts.
    tied : bool
        Whether the first and the last stage both hold it.
    """

    def __init__(self, name, shape, init, axes=None, unit=1, decay=None, copies=1, partial=False, tied=False):
        self.name, self.shape, self.init, self.unit, self.copies = name, tuple(shape), init, unit, copies
        self.axes = tuple(axes) if axes else (None,) * len(shape)
        self.decay = len(shape) > 1 if decay is None else decay
        self.partial, self.tied = partial or copies > 1, tied
        self.bucket, self.offset = None, 0      # where the held value lies; set by Bucket.place, as all below
        self.held = self.owned = None           # Slab
        self.master = self.moment1 = self.moment2 = None    # (updated)
        self.fresh = True                       # the next gradient is written, not added

    @property
    def updated(self):
        """The slab whose master and moments this rank keeps: all that is held under ZeRO 0, else what is owned."""
        return self.held if self.bucket.zero == 0 else self.owned

    @property
    def value(self):
        """(held), a view of the bucket's buffer."""
        if self.bucket.values is None:
            raise RuntimeError(f"{self.name} is used before its values were fetched from their owners")
        return self.bucket._part(self.bucket.values, self)

    @property
    def updated_value(self):
        """(updated), a view of the value."""
        return self.value[self.updated.within(self.held)]

    @property
    def grad(self):
        """(held), a view of the bucket's gradients."""
        return self.bucket._part(self.bucket.grads, self)

    @property
    def owned_grad(self):
        """(updated), complete after the reduction."""
        return self.bucket.owned_grad_of(self)

    @property
    def shared(self):
        """What the ranks that hold the same slab share, as `Mesh.group` takes it."""
        keys = ("ends" if self.tied else "pp",)
        if "ep" in self.axes:
            keys += ("ep",)
        if "tp" in self.axes:
            keys += ("tp" if self.copies == 1 else ("tp", self.copies),)
        return keys

    @property
    def owned_dim(self):
        """The dim along which the held slab is cut over the replicas: the rows, of experts too."""
        return max(0, len(self.shape) - 2)

    def held_by(self, mesh):
        """The slab that the rank of `mesh` computes with."""
        slab = Slab.whole(self.shape)
        for dim, axis in enumerate(self.axes):
            if axis:
                copies = self.copies if axis == "tp" else 1
                slab = slab.cut(dim, mesh.size(axis) // copies, mesh.coord(axis) // copies, self.unit if dim == 0 else 1)
        return slab

    def owned_by(self, mesh, replica):
        """The part of the held slab that replica number `replica` of it is answerable for."""
        return self.held_by(mesh).cut(self.owned_dim, len(mesh.members(self.shared)), replica)

    def accumulates(self):
        """Whether a gradient is to be added (True) or written (False: the first since the last step)."""
        self.bucket.make_grads()        # first, because it marks all of them as not yet written
        fresh, self.fresh = self.fresh, False
        return not fresh

    def later(self, work):
        """Calls `work`, which computes gradients of weights, now or when the schedule wants them."""
        self.bucket.later(work)

    def add_product(self, ops, dy, x):
        """grad (O, I) += dy^T (O, N) x (N, I), now or later."""
        self.later(lambda: ops.matmul(dy.T, x, out=self.grad, accumulate=self.accumulates()))

    def initialize(self, ops, seed):
        """Fills what this rank keeps: a pure function of seed, name and global index, so the same on any layout."""
        bucket = self.bucket
        if bucket.zero == 3:
            self._fill(bucket.state, seed, self.owned, self.master)
            return
        if bucket.masters is None:
            self._fill(ops, seed, self.held, self.value)
            return
        array = bucket.state.empty(self.held.shape, bucket.wide)
        self._fill(bucket.state, seed, self.held, array)
        bucket.set_value(self.value, array)
        bucket.state.copy(self.master, array[self.updated.within(self.held)])

    def _fill(self, ops, seed, slab, array):
        """Fills an array with the initial values of a slab."""
        if isinstance(self.init, Constant):
            ops.fill(array, self.init.value)
            return
        key, std = key_of(seed, self.name), self.init.std
        if len(self.shape) < 3:
            row, column = (slab.start + (0,))[:2]
            ops.normal(array.reshape(array.shape[0], -1 if array.size else 0), key, row, column, math.prod(self.shape[1:]), std)
            return
        for index, matrix in enumerate(array):
            row = (slab.start[0] + index) * self.shape[1] + slab.start[1]
            ops.normal(matrix, key, row, slab.start[2], self.shape[2], std)


class Stack:
    """Neighbouring parameters of a bucket seen as one: their rows below each other.

    `value` and `grad` are (sum of rows, C), views of the bucket's buffers.
    """

    def __init__(self, *parameters):
        self.parameters = parameters

    def _view(self, buffer):
        first, last = self.parameters[0], self.parameters[-1]
        flat = buffer[first.offset:last.offset + last.held.size]
        return flat.reshape((sum(parameter.held.shape[0] for parameter in self.parameters),) + first.held.shape[1:])

    @property
    def value(self):
        self.parameters[0].value        # is there
        return self._view(self.parameters[0].bucket.values)

    @property
    def grad(self):
        return self._view(self.parameters[0].bucket.grads)

    def accumulates(self):
        return any([parameter.accumulates() for parameter in self.parameters])

    def later(self, work):
        self.parameters[0].bucket.later(work)

    add_product = Parameter.add_product


def buckets_of(name, parameters, mesh):
    """The parameters in Buckets of those that are replicated alike on `mesh`, in their order."""
    alike = {}
    for parameter in parameters:
        alike.setdefault(mesh.canonical(parameter.shared), []).append(parameter)
    return [Bucket(name, group) for group in alike.values()]


@functools.lru_cache(maxsize=256)
def counts_of_replicas(held, num_replicas):
    """Owned elements of each replica, (replicas,) int array; `held` as below."""
    return sum(sizes_of_cut(shape[dim], num_replicas) * (math.prod(shape) // max(1, shape[dim])) for shape, dim in held)


@functools.lru_cache(maxsize=256)
def ranges_of_replicas(held, num_replicas):
    """Where the owned slabs of each replica lie in a flat buffer of held slabs: (start, stop) of each piece.

    held : for each parameter the shape of its held slab and the dim along which it is cut
    """
    found, offset = [[] for _ in range(num_replicas)], 0
    for shape, dim in held:
        row, end = math.prod(shape[dim + 1:]), offset + math.prod(shape)
        for replica, pieces in enumerate(found):
            first, size = cut(shape[dim], num_replicas, replica)
            if size * row:
                pieces += [(start, start + size * row) for start in range(offset + first * row, end, shape[dim] * row)]
        offset = end
    return tuple(map(tuple, found))


class Bucket:
    """Parameters of one block that are replicated alike, in flat buffers.

    Attributes
    ----------
    values : array (held elements of all parameters,)
        None under ZeRO 3 outside `fetch` ... `release`.
    kept : array
        What of the values stays here: all of them, or the masters of those owned (ZeRO 3).
    masters : array (updated elements,)
        Where values are 16-bit floats; else None, and the values themselves are updated.
    wide : type of masters, moments and gradients
    state : backend
        Of the memory in which masters and moments lie: the host's when they are offloaded (Ren et al. 2021, arXiv:2101.06840).
    grads : array (held elements,)
        Made when first asked for after `free_grads()`, then not yet written.
    owned_grads : array (owned elements,)
        Reduced gradients under ZeRO 1 to 3 on more than one rank; else None and `grads` holds them.
    moments : two arrays (updated elements,)
    counts : (replicas,) int array
        Owned elements of each replica.
    """

    def __init__(self, name, parameters):
        self.name, self.parameters, self.deferred = name, list(parameters), None
        self.zero, self._grads, self.values, self.owned_grads, self._fetching = 0, None, None, None, None

    def place(self, mesh, zero, ops, dtype, offload=False):
        """Decides held and owned slabs on `mesh` and allocates values, masters and moments, the last two perhaps on the host."""
        shared = mesh.canonical(self.parameters[0].shared)
        for parameter in self.parameters:
            if mesh.canonical(parameter.shared) != shared:
                raise ValueError(f"{parameter.name}: parameters of bucket {self.name} are replicated over different axes")
        self.ops, self.dtype, self.wide = ops, np.dtype(dtype), wide_of(dtype)
        self.state = ops.host if offload else ops
        self.mesh, self.group = mesh, mesh.group(shared)
        self.spans_stages = shared[0] == "ends"
        if self.spans_stages:       # stages run at different times: neither can wait for the other's part of the values
            zero = min(zero, 2)
        self.zero = 0 if self.group.size == 1 else zero
        self.size = 0
        for parameter in self.parameters:
            parameter.bucket, parameter.offset = self, self.size
            parameter.held = held = parameter.held_by(mesh)
            parameter.owned = held.cut(parameter.owned_dim, self.group.size, self.group.rank)
            self.size += held.size
        self._cuts = tuple((parameter.held.shape, parameter.owned_dim) for parameter in self.parameters)
        self.counts = counts_of_replicas(self._cuts, self.group.size)
        self.empty = ops.passing if self.zero == 3 else ops.empty       # for what comes and goes in a step
        self.uncounted = [] if mesh.coord("tp") == 0 else [p for p in self.parameters if "tp" not in p.axes and not p.partial]
        self._allocate()

    def _allocate(self):
        ops, state = self.ops, self.state
        own, updated = int(self.counts[self.group.rank]), sum(p.updated.size for p in self.parameters)
        self.kept = state.zeros((own,), self.wide) if self.zero == 3 else ops.zeros((self.size,), self.dtype)
        self.values = None if self.zero == 3 else self.kept
        apart = self.zero < 3 and (self.dtype != self.wide or state is not ops)
        self.masters = state.zeros((updated,), self.wide) if apart else None
        self._grads = self.owned_grads = None
        if self.zero:
            self.owned_grads = ops.zeros((own,), self.wide)
        self.moments = [state.zeros((updated,), self.wide) for _ in range(2)]
        position = 0
        for parameter in self.parameters:
            slab, start = parameter.updated, position
            position += slab.size
            if self.zero == 3 or self.masters is not None:
                masters = self.kept if self.zero == 3 else self.masters
                parameter.master = masters[start:position].reshape(slab.shape)
            else:
                parameter.master = parameter.value[slab.within(parameter.held)]
            parameter.moment1, parameter.moment2 = [moment[start:position].reshape(slab.shape) for moment in self.moments]

    def _part(self, buffer, parameter):
        return buffer[parameter.offset:parameter.offset + parameter.held.size].reshape(parameter.held.shape)

    def whole_state(self):
        """Under ZeRO 0: the arrays that are all of this bucket's state, and that every replica has."""
        return [self.kept, *([] if self.masters is None else [self.masters]), *self.moments]

    # ---- values ---------------------------------------------------------------------------------------------------

    @property
    def ranges(self):
        """Where the owned slabs of a replica lie in the flat buffers: replica -> (start, stop) of each piece."""
        return ranges_of_replicas(self._cuts, self.group.size).__getitem__

    def gather(self, held):
        """Fills the flat buffer `held` on every replica, each of which has only its owned part of it right."""
        if self.group.size > 1:
            self.group.journal.subject = self.name
            self.group.all_gather_start(held, self.ranges).wait()

    def set_value(self, value, master):
        """`value`, a view of the values, becomes the rounded `master`."""
        if self.state is self.ops:
            self.ops.copy(value, master)
        else:
            self.ops.put(value, master)

    def refresh(self):
        """After the owned parts of the masters were set: makes whole what this rank keeps of masters and values."""
        if self.zero == 3:
            return
        if self.masters is not None:
            if self.zero == 0:
                self.gather(self.masters)
            for parameter in self.parameters:
                self.set_value(parameter.updated_value, parameter.master)
        if self.masters is None or self.zero:
            self.gather(self.values)

    def fetch_start(self):
        """Starts to gather the values from their owners, where they are not here (ZeRO 3)."""
        if self.values is not None:
            return
        self.values = self.empty((self.size,), self.dtype)
        for parameter in self.parameters:
            self.set_value(self._part(self.values, parameter)[parameter.owned.within(parameter.held)], parameter.master)
        self.group.journal.subject = self.name
        self._fetching = self.group.all_gather_start(self.values, self.ranges)

    def fetch(self):
        """Returns when the values are here."""
        self.fetch_start()
        if self._fetching is not None:
            self._fetching.wait()
            self._fetching = None

    def release(self):
        """Lets the values go, where their owners keep them (ZeRO 3)."""
        if self.zero == 3:
            self.values = None

    # ---- gradients ------------------------------------------------------------------------------------------------

    @property
    def grads(self):
        self.make_grads()
        return self._grads

    def make_grads(self):
        """Makes the gradients, not yet written, unless they are there."""
        if self._grads is None:
            self._grads = self.empty((self.size,), self.wide)
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

    def ready_to_reduce(self):
        """Before a reduction: gradients that were not written are zero, those equal on all tp ranks count on the first only."""
        self.make_grads()
        for parameter in self.parameters:
            if parameter in self.uncounted or (parameter.fresh and len(parameter.shape) > 1):
                self.ops.fill(parameter.grad, 0)

    def owned_grad_of(self, parameter):
        """The reduced gradient of `parameter.updated`."""
        if self.zero == 0:
            return parameter.grad
        start = sum(other.owned.size for other in self.parameters[:self.parameters.index(parameter)])
        return self.owned_grads[start:start + parameter.owned.size].reshape(parameter.owned.shape)

    def later(self, work):
        """Calls `work` now, or keeps it between `defer` and `deferred_work`."""
        if self.deferred is None:
            work()
        else:
            self.deferred.append(work)

    def defer(self):
        """From now on gradients of weights are put off."""
        self.deferred = []

    def deferred_work(self):
        """What was put off since `defer`: a list of callables."""
        work, self.deferred = self.deferred, None
        return work
