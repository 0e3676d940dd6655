"""What a run tells of its steps: the lines of metrics.jsonl, slow ranks, how its start divides, what it communicated."""

import math
import socket
import statistics
import time

from ..layout.journal import JOURNAL, Traffic, ledger_table
from . import launch
from .stragglers import ComputeTime


def gemm_rate(ops, dtype, size=1024, times=10):
    """FLOP/s of a square matrix product on this rank: what the FLOP share of a step is measured against."""
    a, out = ops.zeros((size, size), dtype), ops.empty((size, size), dtype)
    best = math.inf
    for _ in range(times):
        started = time.perf_counter()
        ops.matmul(a, a, out=out)
        ops.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class Account:
    """
    Parameters
    ----------
    session : Session
    metrics, progress
        Of the run.
    """

    def __init__(self, session, metrics, progress):
        self.job, self.ops, self.mesh, self.model = session
        self.group, self.metrics, self.progress = self.mesh.world, metrics, progress
        self.traffic, self.steps = {}, 0        # communication of the steps of this process
        self.compute_time = ComputeTime(self.mesh, JOURNAL)
        self.hosts = self.group.collect(socket.gethostname())
        self.gemm_rate = gemm_rate(self.ops, self.model.dtype)

    def begin(self):
        """A step begins."""
        self.started, self.before = time.monotonic(), JOURNAL.snapshot()
        self.compute_time.begin()

    def end(self, step, total_tokens, result):
        """A step has ended: tells of it. Collective now and then.

        Parameters
        ----------
        step : int
        total_tokens : int
            Of the run so far.
        result : StepResult
        """
        seconds, tokens = time.monotonic() - self.started, self.job.train.batch * self.job.model.context
        self.count_traffic(JOURNAL.since(self.before))
        line = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "rate": result.rate,
                "tokens": total_tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
                "flop_share": self.model.flops_per_token() * tokens / seconds / (self.gemm_rate * self.group.size),
                "skipped": result.skipped}
        if self.ops.host is not self.ops:
            line["memory_bytes"] = self.ops.device.peak_bytes()
        if self.job.model.experts:
            line |= {"balance_loss": result.balance_loss, "router_z_loss": result.router_z_loss}
        try:
            ranks = self.compute_time.end(step, seconds)
            if ranks:
                line |= self.tell_ranks(step, *ranks)
        finally:        # a run that goes on when a rank dies in here has done the step
            self.metrics.step(line, write=step % self.job.run.log_every == 0 or step == self.job.train.steps)
        self.progress.step(line)
        if self.steps == 1 and launch.moments:
            self.tell_start(step)

    def tell_start(self, step):
        """How long it took from the start of the process to the end of the first step, and with what."""
        launch.moment("first step")
        before, parts = 0.0, {}
        for name, seconds in launch.moments:
            parts[name], before = seconds - before, seconds
        self.progress.note(f"first step {before:.1f} s after the start: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()))
        self.metrics.event("started", step=step, seconds=before, parts=parts, time=time.time())

    def tell_ranks(self, step, seconds, ratios, named):
        """Names slow ranks; what the metrics show of all ranks' time."""
        for rank in named:
            self.progress.note(f"step {step}: rank {rank} (node {self.hosts[rank]}) is slow: it computes {seconds[rank]:.3f} s a step, "
                               f"{ratios[rank]:.1f} times what the others do for the same work")
            self.metrics.event("slow rank", step=step, rank=rank, node=self.hosts[rank], seconds=seconds[rank], ratio=ratios[rank])
        return {"compute_seconds": {"median": statistics.median(seconds), "most": max(seconds), "rank": seconds.index(max(seconds))}}

    def count_traffic(self, step):
        """Adds the communication of a step to the run's ledger."""
        for key, entry in step.items():
            old = self.traffic.get(key, Traffic(0, 0))
            self.traffic[key] = Traffic(old.calls + entry.calls, old.bytes + entry.bytes)
        self.steps += 1

    def tell_traffic(self):
        """What a step of this run communicated, as rank 0 counted it."""
        if self.group.size == 1 or not self.steps:
            return
        self.progress.note(f"communication of rank 0, mean of {self.steps} steps:")
        for text in ledger_table(self.traffic, self.steps):
            self.progress.note(f"  {text}")
        self.metrics.event("communication", steps=self.steps, traffic=[
            {"axis": axis, "operation": operation, "calls": entry.calls, "bytes": entry.bytes} for (axis, operation), entry in sorted(self.traffic.items())])
