"""The mesh: which rank stands where along the named axes, and the group of ranks along each.

Axes, outermost first: pp (pipeline stages), dp (data), cp (context), tp (tensor); ep (experts) is carved out of
the flattened dp x cp order. The last axis is innermost: tp neighbours are neighbours in the launch, so they share a node.

A group is named by what its members share: the ranks that differ only along tp share pp, dp and cp. Beside the axes
there are `ep` (the place among the experts), `ep_group` (which block of ep consecutive replicas), `ends` (the first and
the last stage count as one place) and (axis, n) (blocks of n neighbours along the axis count as one place).
"""

import functools
import math

import numpy as np

from ..config import UserError, divisors
from .comm import Solo
from .planned import Planned

AXES = ("pp", "dp", "cp", "tp")


def sizes_of(config, num_ranks):
    """Axis sizes of a job's [mesh] on `num_ranks` ranks, "rest" filled in.

    Returns
    -------
    dict
        pp, dp, cp, tp, ep: int.

    Raises
    ------
    UserError
        The product is not the number of ranks; the message names sizes that work.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in given.items() if size == "rest"]
    if len(open_axes) > 1:
        raise UserError(f"mesh: {' and '.join(open_axes)} are both \"rest\"; only one axis may take the rest of the ranks")
    known = math.prod(size for size in given.values() if size != "rest")
    shown = " x ".join(f"{axis}={size}" for axis, size in given.items() if size not in (1, "rest")) or "all axes 1"
    if open_axes:
        if num_ranks % known:
            raise UserError(f"mesh: {shown} = {known} does not divide the {num_ranks} ranks of this job; start a multiple of {known} ranks")
        given[open_axes[0]] = num_ranks // known
    elif known != num_ranks:
        raise UserError(f"mesh: {shown} needs {known} ranks, this job has {num_ranks}; start {known} ranks or set one axis to \"rest\"")
    sizes = given | {"ep": config.ep}
    if uneven_experts(sizes):
        raise UserError(uneven_experts(sizes))
    return sizes


def uneven_experts(sizes):
    """The line about an ep that does not divide dp x cp; None where it does."""
    replicas = sizes["dp"] * sizes["cp"]
    if replicas % sizes["ep"]:
        return f"mesh: ep={sizes['ep']} does not divide dp x cp = {replicas}; use ep of {divisors(replicas)}"


def num_ranks_of(sizes):
    """Ranks of a job whose axes have these sizes."""
    return math.prod(sizes[axis] for axis in AXES)


def coordinates(sizes, rank):
    """Where `rank` stands: {axis: coordinate}, ep included."""
    coords, rest = {}, rank
    for axis in reversed(AXES):
        rest, coords[axis] = divmod(rest, sizes[axis])
    coords["ep"] = (coords["dp"] * sizes["cp"] + coords["cp"]) % sizes.get("ep", 1)
    return coords


@functools.lru_cache(maxsize=256)
def _colors(sizes, shared):
    """For every rank of the job a number that the members of its group share, and no others: (ranks,) int array."""
    sizes = dict(sizes)
    grid = np.indices([sizes[axis] for axis in AXES]).reshape(len(AXES), -1)       # (4, ranks)
    places = dict(zip(AXES, grid))
    replica = places["dp"] * sizes["cp"] + places["cp"]
    places |= {"ep": replica % sizes["ep"], "ep_group": replica // sizes["ep"],
               "ends": np.where(places["pp"] == sizes["pp"] - 1, 0, places["pp"])}
    color = np.zeros(grid.shape[1], np.int64)
    for key in shared:
        axis, block = (key, 1) if isinstance(key, str) else key
        color = color * grid.shape[1] + places[axis] // block
    return np.unique(color, return_inverse=True)[1].reshape(-1)


@functools.lru_cache(maxsize=4096)
def _members(sizes, shared, color):
    """The ranks of one group, ascending."""
    return np.flatnonzero(_colors(sizes, shared) == color).tolist()


class Mesh:
    """A rank's place and its groups.

    Parameters
    ----------
    group : Group or None
        All ranks of the job; None plans a layout without communicators (`Mesh.plan`), as `rank` sees it.
    sizes : dict
        Axis sizes, product = number of ranks; axes left out are 1.
    rank : int
        Of a planned mesh.
    planned : dict
        What planned groups are made with: journal, empty (planned.py).
    """

    def __init__(self, group, sizes, rank=None, planned=None):
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES + ("ep",)}
        self.num_ranks = num_ranks_of(self.sizes)
        self.rank = group.rank if rank is None else rank
        if group is not None and group.size != self.num_ranks:
            factors = " x ".join(f"{axis}={self.sizes[axis]}" for axis in AXES)
            raise ValueError(f"mesh {factors} = {self.num_ranks}, but the group has {group.size} ranks")
        self.coords = coordinates(self.sizes, self.rank)
        self._key, self._planned, self._groups = tuple(self.sizes.items()), planned or {}, {}
        if group is None:
            group = Solo() if self.num_ranks == 1 else Planned(self.rank, self.num_ranks, "world", "world", **self._planned)
            self._communicating = False
        else:
            self._communicating = True
        self.world = group
        # Made now, by all ranks: later only those of a stage, or of the two ends, ask for groups of theirs.
        self._parents = {}
        self._parents = {key: self.group((key,)) for key in ("pp", "ends")}

    @classmethod
    def plan(cls, sizes, rank, **planned):
        """The mesh as `rank` sees it, without communicators: its groups are only planned."""
        return cls(None, sizes, rank, planned)

    def size(self, *axes):
        """Number of ranks along the axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def coord(self, axis):
        return self.coords[axis]

    def position(self, *axes):
        """This rank's number within the group of `axes` (first axis outermost)."""
        index = 0
        for axis in axes:
            index = index * self.sizes[axis] + self.coords[axis]
        return index

    def coords_of(self, rank):
        return coordinates(self.sizes, rank)

    def __getitem__(self, axes):
        """The group along one axis, or several: `mesh["tp"]`, `mesh["dp", "cp"]`. All ranks of a stage must ask alike."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        if axes == ("ep",):
            return self.group(("pp", "ep_group", "tp"))
        return self.group(tuple(axis for axis in AXES if axis not in axes))

    def group(self, shared):
        """The group of the ranks that share what `shared` names with this one; all ranks of its stage (or its ends) must ask alike."""
        shared = self.canonical(shared)
        if shared not in self._groups:
            self._groups[shared] = self._make(shared)
        return self._groups[shared]

    def canonical(self, shared):
        """`shared` without the axes of one rank, so that what names the same groups is equal."""
        kept = []
        for key in shared:
            axis, block = (key, 1) if isinstance(key, str) else key
            if axis in ("pp", "ends"):
                kept.append("pp" if self.sizes["pp"] == 1 else axis)
            elif axis == "ep_group" or self.sizes[axis] > block:
                kept.append(key)
        return tuple(kept)

    def members(self, shared):
        """The ranks of the job that share what `shared` names with this one, ascending."""
        return _members(self._key, shared, int(_colors(self._key, shared)[self.rank]))

    def _name(self, shared):
        """The axes along which the members differ."""
        special = {"ep_group": "ep", "ep": "experts' replicas"}
        named = [special[key] for key in shared if key in special]
        blocks = {key[0]: key[1] for key in shared if not isinstance(key, str)}
        free = [f"{blocks[axis]} of {axis}" if axis in blocks else axis for axis in AXES
                if axis not in shared and self.sizes[axis] > 1]
        return named[0] if named else "x".join(free) or "one rank"

    def _parent(self, shared):
        """The group whose ranks make the groups of `shared` together."""
        return self._parents.get(shared[0], self.world) if len(shared) > 1 else self.world

    def _make(self, shared):
        if not shared and self._name(shared) not in AXES:     # an axis has a group of its own even where all ranks lie along it
            return self.world
        color = int(_colors(self._key, shared)[self.rank])
        if self._communicating:
            return self._parent(shared).split(color, self.rank, self._name(shared))
        members = self.members(shared)
        if len(members) == 1:
            return Solo()
        return Planned(members.index(self.rank), len(members), self._name(shared), (shared, color), **self._planned)
