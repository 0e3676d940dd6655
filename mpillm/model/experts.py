"""The mixture-of-experts MLP: every token goes through the k SwiGLU experts that its router chooses.

Routing as in Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1): the weights are a softmax over the k largest logits.
Nothing is dropped and no expert has a capacity (Gale et al. 2022, arXiv:2211.15841): each works on as many rows as it gets.
Under ep each rank holds some of the experts and rows travel to them and back (Lepikhin et al. 2020, arXiv:2006.16668,
section 3); under tp each holds some of the F hidden channels of an expert. A shared expert, if there is one, sees every token
(Dai et al. 2024, arXiv:2401.06066, section 3.2).

Letters of this file: A = N k assignments of this rank's tokens, R rows that this rank's experts get from all ep ranks.
"""

from typing import NamedTuple

import numpy as np

from ..backend import wide_of
from ..layout.slab import cut


class Routing(NamedTuple):
    """What `ops.route` returns."""
    experts: object         # (N, k) int64
    weights: object         # (N, k)
    probabilities: object   # (N, E)
    lse: object             # (N,)


class Plan(NamedTuple):
    """Which rows go where; an expert's rows are in the order of ep ranks, then of tokens."""
    order: object       # (A,) int64, the assignments by expert
    tokens: object      # (A,) int64, the token of each of these
    send: list          # rows to each ep rank
    receive: list       # rows from each ep rank
    group: object       # (R,) int64, received rows by expert; None where they arrive so
    ungroup: object     # (R,) int64, the inverse
    ranges: list        # (start, stop) of each expert of this rank in the grouped rows


class AuxiliaryLosses:
    """The two losses that keep a router usable; neither depends on how samples and tokens are spread over ranks.

    Balance loss of a sequence (Fedus et al. 2021, arXiv:2101.03961, section 2.2): E * sum over experts of f P, with f the share
    of the sequence's k T assignments that the expert has and P its mean probability; the mean over the step's sequences. Only P
    has a gradient. z-loss (Zoph et al. 2022, arXiv:2202.08906, section 3): the mean of lse^2 over the step's tokens. Sequences
    are split over cp; all tp ranks have the same tokens, so the losses count on the first of them.
    """

    def __init__(self, ops, mesh, num_experts, per_token, balance, z):
        self.ops, self.num_experts, self.per_token, self.balance, self.z = ops, num_experts, per_token, balance, z
        self.cp, self.counted = mesh["cp"], mesh.coord("tp") == 0

    def forward(self, experts, routing, batch):
        """Adds the losses to `batch.auxiliary`; experts (N, k) on the host.

        Returns
        -------
        (B, E) float64 on the host: the assignments of whole sequences to each expert; None where there is no loss
        """
        if batch.share is None or self.balance == self.z == 0.0:
            return None
        (b, t), e = batch.shape, self.num_experts
        cells = np.repeat(np.arange(b) * e, t)[:, None] + experts                           # (N, k), of (B, E)
        sums = np.zeros((2, b, e))          # assignments, probabilities
        sums[0] = np.bincount(cells.reshape(-1), minlength=b * e).reshape(b, e)
        if batch.auxiliary is not None:
            sums[1] = self.ops.to_host(routing.probabilities).reshape(b, t, e).sum(axis=1, dtype=np.float64)
        counts, probabilities = self.cp.all_reduce(sums)                                    # (B, E)
        if batch.auxiliary is not None and self.counted:
            slopes, factors = self._slopes(counts, batch)
            lse = self.ops.to_host(routing.lse).astype(np.float64)                          # (N,)
            batch.auxiliary[:] += (np.vdot(slopes, probabilities) if self.cp.rank == 0 else 0.0, np.vdot(factors, lse * lse))
        return counts

    def backward(self, counts, routing, batch):
        """dprobabilities (N, E) and dlse (N,); None for none."""
        if counts is None or not self.counted:
            return None, None
        slopes, factors = self._slopes(counts, batch)
        lse = self.ops.to_host(routing.lse)                                                 # (N,)
        dprobabilities = np.repeat(slopes, batch.shape[1], axis=0)                          # (N, E)
        return [self.ops.from_host(array.astype(lse.dtype)) for array in (dprobabilities, 2.0 * factors * lse)]

    def _slopes(self, counts, batch):
        """The balance loss by the probability of an expert for any token of a sequence, (B, E); the z-loss by each lse^2, (N,)."""
        length = max(1, batch.length or batch.shape[1])                                     # T
        shares = batch.share / length       # (B,): what a token counts of a mean over the step's tokens
        balance = self.balance * self.num_experts * shares[:, None] * counts / (self.per_token * length)
        return balance, np.repeat(self.z * shares, batch.shape[1])


class Experts:
    """
    Parameters
    ----------
    router : Parameter
        (E, C), the same on all ranks; its gradients are parts of a sum over tp.
    gate, up, down : Parameter
        (E/ep, F/tp, C) twice and (E/ep, C, F/tp)
    shared : SwiGLU or None
        In a region of one rank: its results are partial over tp, as those of the experts.
    mesh : Mesh
    region : Region
    per_token : int
        k
    balance, z : float
        Coefficients of the auxiliary losses.
    light : bool
        Compute the SwiGLU's product again in backward instead of keeping it.
    """

    class Saved(NamedTuple):
        x: object           # (N, C)
        routing: Routing
        plan: Plan
        counts: object      # (B, E) on the host, or None: AuxiliaryLosses
        weights: object     # (A,), by expert
        out: object         # (A, C), partial over tp, by expert
        products: object    # Experts.Products
        shared: object      # SwiGLU.Saved or None

    class Products(NamedTuple):
        rows: object        # (R, C)
        gate: object        # (R, F/tp)
        up: object          # (R, F/tp)
        hidden: object      # (R, F/tp); None when light

    def __init__(self, ops, router, gate, up, down, shared, mesh, region, per_token, balance, z, light=False):
        self.ops, self.router, self.gate, self.up, self.down, self.shared = ops, router, gate, up, down, shared
        self.region, self.per_token, self.light, self.ep = region, per_token, light, mesh["ep"]
        self.num_experts = router.shape[0]
        self.cuts = [cut(self.num_experts, self.ep.size, rank) for rank in range(self.ep.size)]     # experts of each ep rank
        self.losses = AuxiliaryLosses(ops, mesh, self.num_experts, per_token, balance, z)

    def forward(self, x, batch):
        """(n, C) -> (n, C)"""
        ops, x = self.ops, self.region.enter(x, batch.num_rows)                         # (N, C)
        logits = ops.matmul(x, self.router.value.T, out=ops.empty((len(x), self.num_experts), wide_of(x.dtype)))    # (N, E)
        routing = Routing(*ops.route(logits, self.per_token))
        experts = ops.to_host(routing.experts)                                          # (N, k)
        counts, plan = self.losses.forward(experts, routing, batch), self._plan(experts)
        y, shared = self.shared.forward(x, batch) if self.shared else (ops.zeros(x.shape, x.dtype), None)   # (N, C) partial
        out, products = self._mlp(self._to_experts(ops.embedding(plan.tokens, x), plan), plan)      # (R, C) partial
        out = self._from_experts(out, plan)                                             # (A, C) partial
        weights = ops.embedding(plan.order, routing.weights.reshape(-1, 1)).reshape(-1)     # (A,)
        ops.add_rows(y, plan.tokens, out, weights)
        return self.region.leave(y), self.Saved(x, routing, plan, counts, weights, out, products, shared)

    def backward(self, dy, saved, batch):
        """(n, C) -> (n, C)"""
        ops, plan, routing = self.ops, saved.plan, saved.routing
        dy = self.region.leave_backward(dy, batch.num_rows)                             # (N, C)
        dout = ops.embedding(plan.tokens, dy)                                           # (A, C)
        dweights = ops.zeros((routing.weights.size, 1), routing.weights.dtype)          # (A, 1) partial, by token
        ops.add_rows(dweights, plan.order, ops.row_dot(dout, saved.out).reshape(-1, 1))
        ops.scale_rows(dout, saved.weights)
        drows = self._mlp_backward(self._to_experts(dout, plan), saved.products, plan)  # (R, C) partial
        drows = self._from_experts(drows, plan)                                         # (A, C) partial
        dlogits = ops.route_backward(dweights.reshape(routing.weights.shape), *self.losses.backward(saved.counts, routing, batch),
                                     routing.experts, routing.weights, routing.probabilities)       # (N, E) partial
        if dlogits.dtype != dy.dtype:
            wide, dlogits = dlogits, ops.empty(dlogits.shape, dy.dtype)
            ops.copy(dlogits, wide)
        self.router.add_product(ops, dlogits, saved.x)
        dx = self.shared.backward(dy, saved.shared, batch) if self.shared else ops.zeros(dy.shape, dy.dtype)    # (N, C) partial
        ops.matmul(dlogits, self.router.value, out=dx, accumulate=True)
        ops.add_rows(dx, plan.tokens, drows)
        return self.region.enter_backward(dx)                                           # (n, C)

    # ---- where rows go ----------------------------------------------------------------------------------------------

    def _plan(self, experts):
        """The Plan of the chosen experts (N, k), which are on the host."""
        chosen = experts.reshape(-1)                                                    # (A,)
        # Small integers are sorted by radix: 0.1 ms for 16,384 of them, 0.7 ms as int64.
        order = np.argsort(chosen.astype(np.min_scalar_type(self.num_experts)), kind="stable")
        sent = np.bincount(chosen, minlength=self.num_experts)                          # (E,)
        received = self._exchange_counts(sent)                                          # (ep, E/ep)
        ends = np.cumsum(received.sum(axis=0)).tolist()
        group = ungroup = None
        if min(received.shape) > 1:
            arriving = np.repeat(np.tile(np.arange(received.shape[1]), self.ep.size), received.reshape(-1))     # (R,)
            grouped = np.argsort(arriving, kind="stable")
            group, ungroup = self.ops.from_host(grouped), self.ops.from_host(np.argsort(grouped, kind="stable"))
        send = [int(sent[start:start + size].sum()) for start, size in self.cuts]
        return Plan(self.ops.from_host(order), self.ops.from_host(order // self.per_token), send, received.sum(axis=1).tolist(),
                    group, ungroup, list(zip([0] + ends, ends)))

    def _exchange_counts(self, sent):
        """Rows that this rank's experts get from each ep rank, (ep, E/ep); `sent` (E,): rows that each expert gets from this rank."""
        start, size = self.cuts[self.ep.rank]
        # Where the ranks are only planned nothing is received: the others are taken to send as this rank does.
        received = np.tile(sent[start:start + size], (self.ep.size, 1))                 # (ep, E/ep)
        self.ep.all_to_all(sent, [size for _, size in self.cuts], [size] * self.ep.size, received.reshape(-1))
        return received

    def _to_experts(self, rows, plan):
        """(A, C) by expert -> (R, C) by expert; adjoint and inverse: `_from_experts`."""
        rows = self._exchange(rows, plan.send, plan.receive)
        return rows if plan.group is None else self.ops.embedding(plan.group, rows)

    def _from_experts(self, rows, plan):
        """(R, C) by expert -> (A, C) by expert"""
        rows = rows if plan.ungroup is None else self.ops.embedding(plan.ungroup, rows)
        return self._exchange(rows, plan.receive, plan.send)

    def _exchange(self, rows, send, receive):
        if self.ep.size == 1:
            return rows
        width = rows.shape[1]
        out = self.ops.empty((sum(receive), width), rows.dtype)
        self.ep.all_to_all(rows.reshape(-1), [count * width for count in send], [count * width for count in receive], out.reshape(-1))
        return out

    # ---- the experts of this rank -----------------------------------------------------------------------------------

    def _products(self, x, matrices, plan, out=None):
        """x W for the rows and the W of each expert, or added to `out`: (R, I), (E/ep, I, O) -> (R, O)"""
        y = self.ops.empty((len(x), matrices.shape[2]), x.dtype) if out is None else out
        for matrix, (start, stop) in zip(matrices, plan.ranges):
            if stop > start:
                self.ops.matmul(x[start:stop], matrix, out=y[start:stop], accumulate=out is not None)
        return y

    def _mlp(self, rows, plan):
        """(R, C) -> (R, C) partial over tp"""
        gate, up, down = [parameter.value.swapaxes(1, 2) for parameter in (self.gate, self.up, self.down)]
        gated = self._products(rows, gate, plan)                                            # (R, F/tp)
        upped = self._products(rows, up, plan)                                              # (R, F/tp)
        hidden = self.ops.swiglu(gated, upped)                                              # (R, F/tp)
        return self._products(hidden, down, plan), self.Products(rows, gated, upped, None if self.light else hidden)

    def _mlp_backward(self, dout, saved, plan):
        """(R, C) -> (R, C) partial over tp"""
        ops, (rows, gate, up, hidden) = self.ops, saved
        hidden = ops.swiglu(gate, up) if hidden is None else hidden                         # (R, F/tp)
        dhidden = self._products(dout, self.down.value, plan)                               # (R, F/tp)
        dgate, dup = [ops.empty(gate.shape, gate.dtype) for _ in range(2)]                  # (R, F/tp)
        ops.swiglu_backward(dhidden, gate, up, dgate, dup)
        drows = self._products(dgate, self.gate.value, plan)                                # (R, C)
        self._products(dup, self.up.value, plan, out=drows)
        self.gate.later(lambda: self._weight_gradients(
            plan.ranges, (self.gate, dgate, rows), (self.up, dup, rows), (self.down, dout, hidden)))
        return drows

    def _weight_gradients(self, ranges, *products):
        """For each (parameter, dy (R, O), x (R, I)): grad (E/ep, O, I) = or += dy^T x over the rows of each expert."""
        for parameter, dy, x in products:
            accumulate = parameter.accumulates()
            for grad, (start, stop) in zip(parameter.grad, ranges):
                if stop > start:
                    self.ops.matmul(dy[start:stop].T, x[start:stop], out=grad, accumulate=accumulate)
                elif not accumulate:
                    self.ops.fill(grad, 0)
