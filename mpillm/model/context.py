"""Causal self-attention when the tokens of a sequence are split over the cp ranks: three cores that attention chooses from.

| core | tokens of a rank | what travels | bound |
|---|---|---|---|
| Local | all | nothing | - |
| Ring | two blocks, zig-zag | keys and values go round; backward: their gradients too | none |
| Ulysses | one block | all-to-all from tokens to heads, and back | cp divides H, and divides K or is a multiple of it |

All three have the same two calls (t = tokens of this rank, T = tokens of the sequence, S = keys):

forward(q, k, v, batch, mask) -> (out, lse)
    q (B, t, H, D), k and v (B, t, K, D): strided views with contiguous last dim; mask: Dropout of the probabilities
    or None. out (B, t, H, D) contiguous; lse: what backward wants to have back, its form is the core's own.
backward(dout, q, k, v, out, lse, dq, dk, dv, batch, mask)
    Writes dq, dk, dv, strided views of the shapes of q, k, v.
"""

import itertools
from typing import NamedTuple

import numpy as np

from ..layout.slab import token_ranges


def core_of(form, ops, group, scale):
    """The core for the cp ranks `group`; form: "ring" or "ulysses"."""
    if group.size == 1:
        return Local(ops, scale)
    return {"ring": Ring, "ulysses": Ulysses}[form](ops, group, scale)


class Local:
    """Attention of one rank. With a cache there are S >= t keys; the last query sees all of them."""

    def __init__(self, ops, scale):
        self.ops, self.scale = ops, scale

    def forward(self, q, k, v, batch, mask):
        return self.ops.attention(q, k, v, self.scale, True, mask)      # (B, t, H, D), (B, H, t)

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, batch, mask):
        self.ops.attention_backward(dout, q, k, v, out, lse, dq, dk, dv, self.scale, True, mask)


class Range(NamedTuple):
    """Neighbouring tokens of a sequence that a rank holds."""
    start: int      # position of the first one in the sequence
    offset: int     # number of the first one among the tokens of the rank
    size: int       # > 0

    @property
    def here(self):
        """Their place among the tokens of the rank."""
        return slice(self.offset, self.offset + self.size)


class Total:
    """The sum of parts in a view: the first part is written, the others are added."""

    def __init__(self, ops, view):
        self.ops, self.view, self.begun = ops, view, False

    def next_part(self):
        """Where the next part is to be computed: the view itself, or a new array when it is taken."""
        return self.ops.empty(self.view.shape, self.view.dtype) if self.begun else self.view

    def add(self, part):
        if self.begun:
            self.ops.add(self.view, part)
        elif part is not self.view:
            self.ops.copy(self.view, part)
        self.begun = True


class Ring:
    """Ring attention (Liu et al. 2023, arXiv:2310.01889) on zig-zag blocks (see `token_ranges`).

    Each rank's keys and values pass all ranks, and a rank merges what its queries see of each by their log-sum-exp.
    A range of queries and a range of keys are one call of attention: causal where they are the same tokens, whole where
    the keys come before, none where they come after. In backward every part is computed with the final out and lse of
    its queries (Dao et al. 2022, arXiv:2205.14135, appendix B.4), and the gradients of keys and values travel one
    step behind these, so that they are at home after the last step.

    lse: {Range of queries: (B, H, size)}
    """

    def __init__(self, ops, group, scale):
        self.ops, self.group, self.scale = ops, group, scale

    def forward(self, q, k, v, batch, mask):
        queries = self._ranges(batch, 0)
        out, lse = self.ops.empty(q.shape, q.dtype), {}                 # (B, t, H, D)
        for keys, block, coming in self._round(k, v, batch):
            for query, key in pairs(queries, keys, coming):
                part, part_lse = self.ops.attention(
                    q[:, query.here], block[0, :, key.here], block[1, :, key.here], self.scale, query == key,
                    mask_of_pair(mask, query, key, batch))              # (B, size, H, D), (B, H, size)
                if query in lse:
                    self.ops.attention_merge(out[:, query.here], lse[query], part, part_lse)
                else:
                    self.ops.copy(out[:, query.here], part)
                    lse[query] = part_lse
        return out, lse

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, batch, mask):
        queries = self._ranges(batch, 0)
        of_queries = {query: Total(self.ops, dq[:, query.here]) for query in queries}
        arriving, arrived = [], None                                    # gradients of the present block, from the ranks before
        for step, (keys, block, coming) in enumerate(self._round(k, v, batch)):
            dblock = self.ops.empty(block.shape, block.dtype)           # (2, B, t of their rank, K, D)
            of_keys = {key: Total(self.ops, dblock[:, :, key.here]) for key in keys}
            for query, key in pairs(queries, keys, coming + arriving):
                dquery, dkey = of_queries[query].next_part(), of_keys[key].next_part()
                self.ops.attention_backward(
                    dout[:, query.here], q[:, query.here], block[0, :, key.here], block[1, :, key.here],
                    out[:, query.here], lse[query], dquery, dkey[0], dkey[1], self.scale, query == key,
                    mask_of_pair(mask, query, key, batch))
                of_queries[query].add(dquery)
                of_keys[key].add(dkey)
            for call in arriving:
                call.wait()
                for key, total in of_keys.items():
                    total.add(arrived[:, :, key.here])
            arrived = self._block(k, batch, step + 1)
            arriving = [self.group.shift_start(dblock, arrived)]
        arriving[0].wait()
        self.ops.copy(dk, arrived[0])
        self.ops.copy(dv, arrived[1])

    def _round(self, k, v, batch):
        """Of each rank, the own first: ranges and block (2, B, t of that rank, K, D) of its keys and values, calls that bring the next."""
        block = self._block(k, batch, 0)
        self.ops.copy(block[0], k)
        self.ops.copy(block[1], v)
        for step in range(1, self.group.size):
            following = self._block(k, batch, step)
            coming = self.group.shift_start(block, following)
            yield self._ranges(batch, step - 1), block, [coming]
            coming.wait()
            block = following
        yield self._ranges(batch, self.group.size - 1), block, []

    def _block(self, k, batch, step):
        """A new array for what is here at `step` (0: the own)."""
        tokens = sum(keys.size for keys in self._ranges(batch, step))
        return self.ops.empty((2, k.shape[0], tokens) + k.shape[2:], k.dtype)

    def _ranges(self, batch, step):
        """The ranges of the rank whose keys and values are here at `step`; empty ones are left out."""
        ranges, offset = [], 0
        for start, size in token_ranges(batch.length, self.group.size, (self.group.rank - step) % self.group.size, "ring"):
            if size:
                ranges.append(Range(start, offset, size))
            offset += size
        return ranges


def pairs(queries, keys, started):
    """The (range of queries, range of keys) of which the queries see something; drives the started calls on between them."""
    for key in keys:
        for query in queries:
            if key.start <= query.start:
                yield query, key
                for call in started:
                    call.test()


def mask_of_pair(mask, query, key, batch):
    """The part of the dropout mask of a rank for a range of its queries and a range of keys."""
    if mask is None:
        return None
    return mask._replace(positions=mask.positions[query.here], first_key=key.start, keys=batch.length)


class Ulysses:
    """Each rank attends with H/cp heads over the whole sequence (Jacobs et al. 2023, arXiv:2309.14509, section 3).

    One all-to-all turns tokens split into heads split, one turns the result back. Where there are fewer kv heads than
    ranks, each goes to cp/K ranks, and backward sums its gradients over them. Backward brings q, k, v and out to the
    ranks of the heads once more: half as much traffic again as keeping them there, which would double the memory of attention.

    lse: (B, H/cp, T)
    """

    def __init__(self, ops, group, scale):
        self.ops, self.group, self.scale = ops, group, scale

    def forward(self, q, k, v, batch, mask):
        length, heads = batch.length, q.shape[2]
        part, lse = self.ops.attention(*self._to_heads((q, k, v), length), self.scale, True, self._mask(mask, heads, length))
        return self.group.exchange(part, 1, 2, length, heads), lse      # (B, t, H, D), (B, H/cp, T)

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, batch, mask):
        length, heads = batch.length, q.shape[2]
        *qkv, part, dpart = self._to_heads((q, k, v, out, dout), length)        # (B, T, each one's heads per rank, D)
        counts = [x.shape[2] for x in qkv]
        dqkv = self.ops.empty((q.shape[0], length, sum(counts), q.shape[3]), q.dtype)
        self.ops.attention_backward(dpart, *qkv, part, lse, *pieces(dqkv, counts), self.scale, True, self._mask(mask, heads, length))
        self._from_heads(dqkv, (dq, dk, dv), length)

    def _mask(self, mask, heads, length):
        """The dropout mask of a rank for its heads and all tokens."""
        if mask is None:
            return None
        first = mask.first + self.group.rank * (heads // self.group.size)
        return mask._replace(first=first, positions=np.arange(length), keys=length)

    def _to_heads(self, arrays, length):
        """Arrays (B, t, heads, D) of this rank's tokens -> views (B, T, heads/cp or 1, D) of its heads."""
        cp, (b, t, _, d) = self.group.size, arrays[0].shape
        counts = [max(1, x.shape[2] // cp) for x in arrays]
        packed = self.ops.empty((b, t, cp, sum(counts), d), arrays[0].dtype)
        for x, piece in zip(arrays, pieces(packed, counts)):
            for part, target in copies(x, piece):
                self.ops.copy(target, part)
        whole = self.group.exchange(packed.reshape(b, t, cp * sum(counts), d), 2, 1, cp * sum(counts), length)
        return pieces(whole, counts)

    def _from_heads(self, whole, arrays, length):
        """The adjoint of `_to_heads`: `whole` (B, T, n, D), the heads of all arrays; writes the arrays."""
        cp, (b, t, _, d) = self.group.size, arrays[0].shape
        counts = [max(1, x.shape[2] // cp) for x in arrays]
        packed = self.group.exchange(whole, 1, 2, length, cp * sum(counts)).reshape(b, t, cp, sum(counts), d)
        for x, piece in zip(arrays, pieces(packed, counts)):
            for number, (part, source) in enumerate(copies(x, piece)):
                (self.ops.add if number else self.ops.copy)(part, source)


def pieces(x, counts):
    """Views of x (..., sum(counts), D) along the last dim but one."""
    return [x[..., end - count:end, :] for end, count in zip(itertools.accumulate(counts), counts)]


def copies(x, piece):
    """Views of the heads x (B, t, heads, D) and of each of their copies in `piece` (B, t, cp, n, D), by ranks: one where heads >= cp."""
    b, t, heads, d = x.shape
    cp, n = piece.shape[2:4]
    number = cp * n // heads
    return [(x.reshape(b, t, cp // number, n, d), piece[:, :, copy::number]) for copy in range(number)]
