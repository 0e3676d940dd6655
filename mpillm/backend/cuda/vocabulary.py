"""Token embedding and cross entropy on the GPU."""

import numpy as np

from mpillm.backend.types import wide_of

BLOCK = 512             # threads of a row of logits
CHUNK, RUN = 16, 256    # embedding.cu: places of a chunk; row_order.cu: places of a warp
# Bytes of a row of logits that stay in shared memory between its two passes, so that two blocks share a multiprocessor.
HELD_BYTES = {"80": 80 << 10, "90a": 111 << 10, "100": 111 << 10}
FEW_HELD_BYTES = 47 << 10


def stride(x):
    """Elements from row to row."""
    return x.strides[0] // x.itemsize


def held_packs(device, logits):
    """How many 16-byte packs of a row of logits stay in shared memory."""
    most = HELD_BYTES.get(device.arch, FEW_HELD_BYTES) // 16
    return min(most, -(-logits.shape[1] * logits.itemsize // 16))


def is_packed(x):
    """Whether each row of x is a whole number of 16-byte packs and begins at one."""
    return not (x.data.ptr % 16 or x.strides[0] % 16 or x.shape[1] * x.itemsize % 16)


class VocabularyOps:
    """What has one row for every token of the vocabulary; `reference.Reference` defines the operations."""

    # -- cross entropy ------------------------------------------------------------------------------------------

    def cross_entropy(self, logits, targets, scale, loss, gradient=True):
        rows, columns = logits.shape
        if not rows:
            return
        nll = self.device.empty((rows,), np.float64)
        held = held_packs(self.device, logits) if gradient else 0
        self.device.launch(
            "cross_entropy", "cross_entropy", logits.dtype, rows, BLOCK,
            (logits, stride(logits), targets, scale, nll, columns, held, int(gradient)), shared=16 * held,
        )  # fmt: skip
        self.device.launch("cross_entropy", "add_losses", logits.dtype, 1, 1024, (loss, nll, rows))

    def cross_entropy_stats(self, logits, targets, first):
        rows, columns = logits.shape
        row_max, row_sum, target_logit = (self.device.empty((rows,), wide_of(logits.dtype)) for _ in range(3))
        if rows:
            held = held_packs(self.device, logits)
            self.device.launch(
                "cross_entropy", "cross_entropy_stats", logits.dtype, rows, BLOCK,
                (logits, stride(logits), targets, row_max, row_sum, target_logit, first, columns, held), shared=16 * held,
            )  # fmt: skip
        return row_max, row_sum, target_logit

    def cross_entropy_gradient(self, exps, targets, factor, coefficient, first):
        if exps.size:
            args = exps, stride(exps), targets, factor, coefficient, first, exps.shape[1]
            self.device.launch("cross_entropy", "cross_entropy_gradient", exps.dtype, len(exps), BLOCK, args)

    def loss_sum(self, row_max, row_sum, target_logit, scale, loss):
        if scale.size:
            args = loss, row_max, row_sum, target_logit, scale, scale.size
            self.device.launch("cross_entropy", "loss_sum", scale.dtype, 1, 1024, args)

    def softmax_parts(self, row_max, largest, row_sum, target_logit):
        rows, dtype = row_max.size, row_max.dtype
        sums, shrink = self.device.empty((2, rows), dtype), self.device.empty((rows,), dtype)
        if rows:
            args = sums, shrink, row_max, largest, row_sum, target_logit, rows
            self.device.launch("cross_entropy", "softmax_parts", dtype, -(-rows // 256), 256, args)
        return sums, shrink

    def softmax_factor(self, shrink, row_sum):
        rows, dtype = shrink.size, shrink.dtype
        factor = self.device.empty((rows,), dtype)
        if rows:
            self.device.launch("cross_entropy", "softmax_factor", dtype, -(-rows // 256), 256, (factor, shrink, row_sum, rows))
        return factor

    # -- embedding ----------------------------------------------------------------------------------------------

    def embedding(self, ids, table, first=0):
        rows, width = ids.size, table.shape[1]
        y = self.device.empty((rows, width), table.dtype)
        if y.size:
            args = y, ids, table, stride(table), first, rows, len(table), width
            self.device.launch("embedding", "embedding", table.dtype, -(-rows // 4), 128, args, PACKED=int(is_packed(table)))
        return y

    def embedding_backward(self, ids, dy, dtable, first=0):
        rows, (table_rows, width) = ids.size, dtable.shape
        if not rows or not dtable.size:
            return
        order = self.row_order(ids, first, table_rows)
        packed, chunks = int(is_packed(dy) and is_packed(dtable)), -(-rows // CHUNK)
        threads = width * dy.itemsize // 16 if packed else width
        block = min(128, -(-threads // 32) * 32)
        grid = chunks, -(-threads // block)
        partial = self.device.empty((chunks, width), dtable.dtype)
        args = dtable, stride(dtable), partial, order, dy, stride(dy), rows, table_rows, width
        self.device.launch("embedding", "add_chunks", dy.dtype, grid, block, args, PACKED=packed)
        args = dtable, stride(dtable), partial, order, rows, table_rows, width
        self.device.launch("embedding", "add_partials", dy.dtype, grid, block, args, PACKED=packed)

    def row_order(self, ids, first, table_rows):
        """The places of ids (n,) in the order of ids, then of places: (2, n) int32, the rows id - first and the places.

        Ids outside of first..first + table_rows come last and have the row `table_rows`.
        """
        n, launch, dtype = ids.size, self.device.launch, np.dtype(np.float32)
        order, runs = self.device.empty((2, 2, n), np.int32), -(-n // RUN)
        counts = self.device.empty((256, runs), np.int32)
        launch("row_order", "place_keys", dtype, -(-n // 256), 256, (order, ids, first, table_rows, n))
        num_passes = -(-table_rows.bit_length() // 8)
        for number in range(num_passes):
            launch("row_order", "count_digits", dtype, -(-runs // 4), 128, (counts, order, n, runs, number))
            launch("row_order", "sum_before", dtype, 1, 1024, (counts, counts.size))
            launch("row_order", "move_keys", dtype, -(-runs // 4), 128, (order, counts, n, runs, number))
        return order[num_passes % 2]
