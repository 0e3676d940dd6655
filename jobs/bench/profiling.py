"""Where a step of mpillm's goes: the backend's operations and the communication, timed from outside by wrapping their methods."""

import time

COMMUNICATION = ("all_reduce", "all_reduce_start", "reduce_scatter", "reduce_scatter_start", "all_gather", "all_gather_start", "all_to_all",
                 "shift_start", "send_start", "receive", "broadcast", "gather", "scatter_sum", "exchange", "wait", "test")
MEMORY = ("from_host", "to_host", "empty", "zeros", "synchronize")


class Profile:
    """Seconds, calls and FLOPs by name; a call inside another counts for itself only."""

    def __init__(self):
        self.rows, self.inner = {}, [0.0]

    def wrap(self, owner, name, label=lambda *arguments, **options: None, prefix=""):
        """Replaces owner.name by a timed form; `label` may give a finer name and FLOPs from the call's arguments."""
        call = getattr(owner, name)

        def timed(*arguments, **options):
            self.inner.append(0.0)
            started = time.perf_counter()
            result = call(*arguments, **options)
            seconds = time.perf_counter() - started
            own = seconds - self.inner.pop()
            self.inner[-1] += seconds
            finer, flops = label(*arguments, **options) or ("", 0)
            row = self.rows.setdefault(prefix + name + finer, {"seconds": 0.0, "calls": 0, "flops": 0})
            row["seconds"] += own
            row["calls"] += 1
            row["flops"] += flops
            return result
        setattr(owner, name, timed)


def of_matmul(a, b, out=None, accumulate=False):
    """Shape (M x K x N) and FLOPs of a product; t marks a transposed operand, + adding to what is there."""
    mark = ["t" if x.strides[0] < x.strides[1] else "n" for x in (a, b)]
    return f" {a.shape[0]}x{a.shape[1]}x{b.shape[1]} {''.join(mark)}{'+' if accumulate else ''}", 2 * a.shape[0] * a.shape[1] * b.shape[1]


def of_attention(q, k, v, scale, causal=True, dropout=None):
    """FLOPs of the two products over the pairs that are computed (half of them when causal)."""
    return "", 4 * q.size * k.shape[1] // (2 if causal else 1)


def of_attention_backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal=True, dropout=None):
    """FLOPs of the five products."""
    return "", 10 * q.size * k.shape[1] // (2 if causal else 1)


LABELS = {"matmul": of_matmul, "attention": of_attention, "attention_backward": of_attention_backward}


def operations(ops):
    """Names of the backend's operations."""
    return [name for name in dir(ops) if not name.startswith("_") and callable(getattr(ops, name)) and name != "set_threads"]


def profile_steps(steps, num_steps):
    """The rows of a Profile over some steps, and their seconds. The wrappers stay: this process times nothing else afterwards."""
    from mpillm.layout import comm
    profile = Profile()
    for name in operations(steps.ops):
        profile.wrap(steps.ops, name, LABELS.get(name, lambda *a, **o: None), prefix="memory: " if name in MEMORY else "")
    for kind in (comm.Group, comm.Pending):
        for name in COMMUNICATION:
            if name in vars(kind):
                profile.wrap(kind, name, prefix=f"{kind.__name__}.")
    started = time.perf_counter()
    for _ in range(num_steps):
        steps.step()
    seconds = time.perf_counter() - started
    return {"steps": num_steps, "seconds": seconds, "rows": profile.rows}


def show(found, gemm_rate=None):
    """Prints a profile: sums over operations, then matrix products by shape."""
    total, steps, rows = found["seconds"], found["steps"], found["rows"]
    sums = {}
    for name, row in rows.items():
        whole = sums.setdefault("matmul" if name.startswith("matmul ") else name, {"seconds": 0.0, "calls": 0, "flops": 0})
        for key, value in row.items():
            whole[key] += value
    python = total - sum(row["seconds"] for row in sums.values())
    sums["between the operations (Python)"] = {"seconds": python, "calls": 0, "flops": 0}
    print(f"step {total / steps * 1e3:.1f} ms (with the profile's own cost); a step's parts:")
    print(f"  {'operation':<38} {'ms':>9} {'share':>7} {'calls':>6} {'GF/s':>7}")
    for table in (sums, {name: row for name, row in rows.items() if name.startswith("matmul ")}):
        for name, row in sorted(table.items(), key=lambda item: -item[1]["seconds"]):
            if row["seconds"] > 5e-4 * total:
                rate = f"{row['flops'] / row['seconds'] / 1e9:7.1f}" if row["flops"] else ""
                print(f"  {name:<38} {row['seconds'] / steps * 1e3:9.2f} {row['seconds'] / total:7.1%} {row['calls'] / steps:6.0f} {rate}")
        print()
