"""Attention on the GPU: which kernel runs, and where its arrays lie."""

import functools

import numpy as np

from mpillm.backend import philox
from mpillm.backend.cuda.cudnn import sdpa_of
from mpillm.backend.types import wide_of

WIDEST = 256            # of a head
PLAIN_WARPS = 4         # rows of a block of the plain kernels
TILED = 64, 128         # head widths that tensor cores do
ROWS = 128              # of a block of attention_tiles.cuh; queries, or keys for their gradients
THREADS, KEY_THREADS = 128, 256
FEWEST = 16             # queries for which a tile is worth while; fewer divide their keys, FEWEST_KEYS or more a block, among blocks
FEWEST_KEYS, DECODE_WAVES = 128, 4
INT64, UINT64 = 1 << 63, 1 << 64
NONE = 0, 0, 0


def strides_of(x):
    """Elements from one to the next along batch, token and head of a (B, T, H, D) view."""
    if x.shape[3] > 1 and x.strides[3] != x.itemsize:
        raise ValueError(f"attention of a view of shape {x.shape} and strides {x.strides}: its last dimension is not contiguous")
    return tuple(stride // x.itemsize for stride in x.strides[:3])


def shared_bytes(kernel, width, queries=64):
    """Of shared memory that a block of a kernel takes; `queries` of a tile of backward_keys."""
    rows = {"forward": ROWS + 2 * 64, "backward_queries": 2 * ROWS + 4 * (64 if width == 64 else 32), "backward_keys": 2 * ROWS + 4 * queries}
    return 2 * width * rows[kernel] + (256 * width + 16 * queries if kernel == "backward_keys" else 0)


def queries_of_tile(device, width):
    """Queries of a tile of backward_keys: as many as have room, or None."""
    return next((queries for queries in ((128, 64) if width == 128 else (64,))
                 if shared_bytes("backward_keys", width, queries) <= device.shared_memory), None)


def is_packed(views):
    """Whether every row of a head begins at 16 bytes."""
    return all(x.data.ptr % 16 == 0 and all(stride % 16 == 0 for stride in x.strides[:3]) for x in views)


def is_tiled(views, dropout):
    """Whether tensor cores can do attention of these (B, T, H, D) views: 16-bit floats that begin at 16 bytes, no dropout."""
    q = views[0]
    return dropout is None and q.itemsize == 2 and q.shape[3] in TILED and q.shape[1] >= FEWEST and is_packed(views)


def packs_of_row(views):
    """Packs of a head's row, where attention_decode.cu can do these views: 4, 8, 16 or 32; else 0."""
    q = views[0]
    packs, rest = divmod(q.shape[3] * q.itemsize, 16)
    return packs if not rest and packs in (4, 8, 16, 32) and is_packed(views) else 0


class AttentionOps:
    """`reference.Reference` defines the operations."""

    def attention(self, q, k, v, scale, causal=True, dropout=None):
        (b, t, h, d), wide = q.shape, wide_of(q.dtype)
        self._check_width(d)
        out, lse = self.device.empty((b, t, h, d), q.dtype), self.device.empty((b, h, t), wide)
        if not q.size:
            return out, lse
        if self._by_cudnn(q, k, causal, dropout) and self.sdpa.forward(q, k, v, out, lse, float(scale), bool(causal)):
            return out, lse
        where, *mask = self._layout((q, k, v, out), causal, dropout)
        if is_tiled((q, k, v), dropout):
            self.device.launch("attention", "forward", q.dtype, (-(-t // ROWS), h, b), THREADS, (q, k, v, out, lse, where, float(scale)),
                               shared=shared_bytes("forward", d), HEAD_WIDTH=d)
        elif t < FEWEST and k.size and dropout is None and packs_of_row((q, k, v)):
            self._decode(q, k, v, out, lse, where, float(scale))
        else:
            self.device.launch("attention_plain", "forward", q.dtype, -(-b * h * t // PLAIN_WARPS), 32 * PLAIN_WARPS,
                               (q, k, v, out, lse, where, *mask[:2], float(scale), mask[2]))
        return out, lse

    def _decode(self, q, k, v, out, lse, where, scale):
        (b, t, h, d), (_, keys, kv, _) = q.shape, k.shape
        heads = 1 if h // kv % 4 else 4     # that share their keys
        blocks = max(1, min(DECODE_WAVES * self.device.multiprocessors * heads // (b * h * t), keys // FEWEST_KEYS))
        parts, stats = self.device.empty((b * h * t, blocks, d), lse.dtype), self.device.empty((b * h * t, blocks, 2), lse.dtype)
        form = {"LANES": packs_of_row((q, k, v)), "HEADS": heads}
        self.device.launch("attention_decode", "part", q.dtype, (b * h * t // heads, blocks), 32 * PLAIN_WARPS,
                           (q, k, v, parts, stats, where, scale, -(-keys // blocks)), **form)
        self.device.launch("attention_decode", "join", q.dtype, b * h * t, 32 * PLAIN_WARPS, (parts, stats, out, lse, where, blocks), **form)

    def attention_backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
        (b, t, h, d), (_, s, kv, _) = q.shape, k.shape
        self._check_width(d)
        if not q.size:
            self.fill(dk, 0)
            self.fill(dv, 0)
            return
        if not lse.flags.c_contiguous:
            strided, lse = lse, self.device.empty(lse.shape, lse.dtype)
            self.copy(lse, strided)
        if self._by_cudnn(q, k, causal, dropout) and self.sdpa.backward(dout, q, k, v, out, lse, dq, dk, dv, float(scale), bool(causal)):
            return
        where, *mask = self._layout((q, k, v, out, dout, dq, dk, dv), causal, dropout)
        delta, block = self.device.empty((b, h, t), lse.dtype), 32 * PLAIN_WARPS
        numbers = where, *mask[:2], float(scale), mask[2]
        launch, rows = self.device.launch, -(-b * h * t // PLAIN_WARPS)
        tile = queries_of_tile(self.device, d) if is_tiled((q, k, v, out, dout, dq, dk, dv), dropout) and k.size else None
        if tile:
            form = {"HEAD_WIDTH": d, "QUERIES": tile}
            launch("attention_backward", "row_sums", q.dtype, -(-b * h * t * d // 2048), 256, (delta, dout, out, where), **form)
            for kernel, grid, threads, found in (("backward_keys", (-(-s // ROWS), kv, b), KEY_THREADS, (dk, dv)),
                                                 ("backward_queries", (-(-t // ROWS), h, b), THREADS, (dq,))):
                launch("attention_backward", kernel, q.dtype, grid, threads, (dout, q, k, v, lse, delta, *found, where, float(scale)),
                       shared=shared_bytes(kernel, d, tile), **form)
            return
        launch("attention_plain", "row_sums", q.dtype, rows, block, (delta, dout, out, where))
        launch("attention_plain", "backward_queries", q.dtype, rows, block, (dout, q, k, v, lse, delta, dq, *numbers))
        if k.size:
            launch("attention_plain", "backward_keys", q.dtype, -(-b * kv * s // PLAIN_WARPS), block,
                   (dout, q, k, v, lse, delta, dk, dv, *numbers))

    def attention_merge(self, out, lse, part_out, part_lse):
        b, t, h, d = out.shape
        if out.size:
            by_row = [tuple(stride // x.itemsize for stride in x.strides) for x in (lse, part_lse)]
            args = out, lse, part_out, part_lse, *strides_of(out), *strides_of(part_out), *by_row[0], *by_row[1], b, t, h, d
            self.device.launch("attention_merge", "merge", out.dtype, -(-b * h * t // 4), 128, args)

    @functools.cached_property
    def sdpa(self):
        """cuDNN's attention, or None."""
        return sdpa_of(self.device)

    def _by_cudnn(self, q, k, causal, dropout):
        return self.sdpa is not None and self.sdpa.takes(q, k, causal, dropout)

    def _check_width(self, width):
        if width > WIDEST:
            raise ValueError(f"attention with heads of {width}: at most {WIDEST}; use more heads")

    def _layout(self, views, causal, dropout):
        """The struct Layout of attention.cuh on the device; sample numbers, positions and the factor of what dropout keeps."""
        (b, t, h, d), (_, s, kv, _) = views[0].shape, views[1].shape
        strides = [strides_of(x) for x in views] + [NONE] * (8 - len(views))
        numbers = [number for each in strides for number in each] + [b, t, s, h, kv, d, int(causal)]
        samples = positions = None
        keep, masked = 1.0, [0] * 6
        if dropout is not None:
            of_head = ((s if dropout.keys is None else dropout.keys) + 3) // 4
            masked = [(dropout.key + INT64) % UINT64 - INT64, int(philox.keep_threshold(dropout.rate)), dropout.step, dropout.first,
                      dropout.first_key, of_head]
            samples, positions = [self.device.constant(np.asarray(x, np.int64)) for x in (dropout.samples, dropout.positions)]
            keep = 1.0 / (1.0 - dropout.rate)
        return self.device.constant(np.array(numbers + masked, np.int64)), samples, positions, keep
