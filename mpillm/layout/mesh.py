"""The mesh: which rank stands where along the named axes, and the group of ranks along each.

Axes, outermost first: pp (pipeline stages), dp (data), cp (context), tp (tensor); ep (experts) is carved out of
the flattened dp x cp order. The last axis is innermost: tp neighbours are neighbours in the launch, so they share a node.
"""

import math

from ..config import UserError, divisors
from .comm import Planned, Solo

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
    replicas = given["dp"] * given["cp"]
    if replicas % config.ep:
        raise UserError(f"mesh: ep={config.ep} does not divide dp x cp = {replicas}; use ep of {divisors(replicas)}")
    return given | {"ep": config.ep}


def coordinates(sizes, rank):
    """Where `rank` stands: {axis: coordinate}, ep included."""
    coords, rest = {}, rank
    for axis in reversed(AXES):
        rest, coords[axis] = divmod(rest, sizes[axis])
    coords["ep"] = (coords["dp"] * sizes["cp"] + coords["cp"]) % sizes.get("ep", 1)
    return coords


class Mesh:
    """A rank's place and its groups.

    Parameters
    ----------
    group : Group or None
        All ranks of the job; None plans a layout without communicators (`Mesh.plan`), as `rank` sees it.
    sizes : dict
        Axis sizes, product = number of ranks; axes left out are 1.
    """

    def __init__(self, group, sizes, rank=None):
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES + ("ep",)}
        self.num_ranks = math.prod(self.sizes[axis] for axis in AXES)
        self.rank = group.rank if rank is None else rank
        if group is not None and group.size != self.num_ranks:
            factors = " x ".join(f"{axis}={self.sizes[axis]}" for axis in AXES)
            raise ValueError(f"mesh {factors} = {self.num_ranks}, but the group has {group.size} ranks")
        self.coords = coordinates(self.sizes, self.rank)
        self._communicating = group is not None
        self.world, self._groups = group or Planned(self.rank, self.num_ranks), {}

    @classmethod
    def plan(cls, sizes, rank):
        """The mesh as `rank` sees it, without communicators: its groups are only planned."""
        return cls(None, sizes, rank)

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
        """The group along one axis, or several: `mesh["tp"]`, `mesh["dp", "cp"]`. All ranks must ask alike."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        if axes not in self._groups:
            self._groups[axes] = self._make(axes)
        return self._groups[axes]

    def _make(self, axes):
        if self.size(*axes) == 1:
            return Solo()
        if not self._communicating:
            return Planned(self.position(*axes), self.size(*axes))
        if self.size(*axes) == self.num_ranks and axes == tuple(axis for axis in AXES if axis in axes):
            return self.world
        return self.world.split(self._color(axes), self.position(*axes), "x".join(axes))

    def _color(self, axes):
        """A number that the ranks of one group share: their coordinates along the other axes."""
        color = 0
        for axis in AXES:
            if axes == ("ep",) and axis in ("dp", "cp"):
                continue
            color = color * self.sizes[axis] + (0 if axis in axes else self.coords[axis])
        if axes == ("ep",):
            replica = self.coords["dp"] * self.sizes["cp"] + self.coords["cp"]
            color = color * self.num_ranks + replica // self.sizes["ep"]
        return color
