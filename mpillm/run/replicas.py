"""Whether ranks that hold the same weights hold the same bits: a memory or a wire that flips one is found, with its tensor and rank.

Data-parallel replicas (and tensor-parallel ranks, of norms) compute with copies of the same numbers, updated alike; nothing else
notices when one drifts apart. Only 1 % of silent errors of hardware show as NaN or infinity (arXiv:2605.04213), so bits are compared:
a hash of each bucket over its replicas. Where hashes differ, those of each tensor tell which. 16-bit values are right where they are
what the master rounds to. Else most replicas are right; of two that differ both are suspects. Under ZeRO 1 and 2 a copy lives for one
step only, until its owner's values are gathered again.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A tensor of which replicas hold different numbers."""
    tensor: str
    ranks: list         # of the job: those that are wrong, or all that may be
    sure: bool


def array_hash(ops, array):
    """A number below 2^64 that changes with any bit of a contiguous array."""
    flat, rest = array.reshape(-1), 0
    if flat.itemsize == 2:      # the kernel reads words of 32 bits
        if flat.size % 2:
            rest = int(ops.to_host(flat[-1:]).view(np.uint16)[0]) + 1
        flat = flat[:flat.size // 2 * 2].view(np.float32)
    return (ops.tensor_hash(flat.reshape(1, -1), 0, 0, max(1, flat.size)) + rest) % 2**64 if flat.size else rest


def replicated(bucket):
    """(name of the table, its backend, flat array) of what a bucket keeps of which every replica has a copy."""
    if bucket.values is None:
        return []
    found = [("", bucket.ops, bucket.values)]
    if bucket.zero == 0:
        found += [("master of ", bucket.state, bucket.masters)] if bucket.masters is not None else []
        found += [(f"moment{number} of ", bucket.state, moment) for number, moment in enumerate(bucket.moments, 1)]
    return found


class Replicas:
    """
    Parameters
    ----------
    mesh : Mesh
    model : Transformer
    """

    def __init__(self, mesh, model):
        self.mesh, by_group = mesh, {}
        for bucket in model.buckets:
            if bucket.group.size > 1:
                by_group.setdefault(mesh.canonical(bucket.parameters[0].shared), []).append(bucket)
        # In the same order on all ranks: a group may span stages that have other buckets too.
        self.groups = [by_group[key] for key in sorted(by_group, key=repr)]

    def check(self):
        """The Differences, the same on all ranks; [] where there are none. Collective."""
        different = [self._different(buckets) for buckets in self.groups]
        total = np.array([float(any(map(any, different)))])
        if self.mesh.world.all_reduce(total)[0] == 0:
            return []
        own = [found for buckets, flags in zip(self.groups, different) for bucket, flag in zip(buckets, flags) if flag
               for found in self._diagnose(bucket)]
        found = {}
        for difference in (Difference(*each) for ranks in self.mesh.world.collect(own) for each in ranks):
            found.setdefault(difference.tensor, []).append(difference)
        return [Difference(name, sorted({rank for each in same for rank in each.ranks}), all(each.sure for each in same)) for name, same in found.items()]

    @staticmethod
    def _different(buckets):
        """Of each bucket, whether its replicas differ: the same answer on all of them."""
        own = np.array([sum(array_hash(ops, array) for _, ops, array in replicated(bucket)) % 2**64 for bucket in buckets], np.uint64)
        both = buckets[0].group.all_reduce(np.concatenate([own, ~own]), "max")
        return (both[:len(own)] != ~both[len(own):]).tolist()

    def _diagnose(self, bucket):
        """The tensors of a bucket whose replicas differ. Collective over its group."""
        group, members = bucket.group, self.mesh.members(self.mesh.canonical(bucket.parameters[0].shared))
        found = []
        for table, ops, array in replicated(bucket):
            for parameter in bucket.parameters:
                hashes = group.collect(array_hash(ops, array[parameter.offset:parameter.offset + parameter.held.size].copy()))     # aligned
                if len(set(hashes)) > 1:
                    by_masters = not table and bucket.masters is not None
                    wrong, sure = judge_parts(group.collect(hashes_of_parts(parameter))) if by_masters else judge(hashes)
                    found.append(Difference(table + parameter.name, [members[place] for place in wrong], sure))
        return found


def hashes_of_parts(parameter):
    """For the part of each owner: the hash of this rank's copy, and of what its master rounds to; None for masters that are not here."""
    bucket, found = parameter.bucket, []
    for replica in range(bucket.group.size):
        owned, rounded = parameter.owned_by(bucket.mesh, replica), None
        if bucket.zero == 0 or replica == bucket.group.rank:
            array = bucket.ops.empty(owned.shape, bucket.dtype)
            bucket.set_value(array, parameter.master[owned.within(parameter.updated)])
            rounded = array_hash(bucket.ops, array)
        found.append((array_hash(bucket.ops, parameter.value[owned.within(parameter.held)].copy()), rounded))
    return found


def judge_parts(replicas):
    """Which replicas are wrong, by `hashes_of_parts` of each: (places, whether that is sure)."""
    verdicts = []
    for part in zip(*replicas):
        hashes, masters = [copy for copy, _ in part], {rounded for _, rounded in part} - {None}
        if len(masters) == 1 and masters <= set(hashes):
            verdicts.append(([place for place, copy in enumerate(hashes) if copy not in masters], True))
        else:
            verdicts.append(judge(hashes))
    return sorted({place for wrong, _ in verdicts for place in wrong}), all(sure for _, sure in verdicts)


def judge(hashes):
    """Which replicas are wrong, by their hashes: (places, whether that is sure)."""
    (right, count), *others = Counter(hashes).most_common()
    sure = 2 * count > len(hashes)
    return [place for place, value in enumerate(hashes) if others and (value != right or not sure)], sure or not others


def flip_bit(model):
    """For tests: flips a bit of the first weight that has replicas."""
    bucket = next(bucket for bucket in model.buckets if bucket.group.size > 1 and bucket.values is not None)
    host = bucket.ops.to_host(bucket.values).copy()
    host[bucket.parameters[-1].offset:].view(np.uint8)[1] ^= 0x10
    bucket.ops.put(bucket.values, host)
