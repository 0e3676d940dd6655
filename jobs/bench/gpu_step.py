"""Whole optimizer steps on a GPU: tokens/s, share of the measured product rate, memory against plan, what the host costs.

    python jobs/bench/gpu_step.py [--shapes NAME ...] [--steps N] [--out FILE.json] [--device gpu] [--rate TFLOPS]

Steps are those of `mpillm train` on random tokens: the Trainer with clipping and AdamW, float32 masters. `host` is the
share of a step's time in which nothing had been given to the device: from the end of a step's work to the first launch of
the next, as measured by events around the device's work.
"""

import argparse
import statistics
import time
from typing import NamedTuple

from gpu_record import about, save, table


class Case(NamedTuple):
    model: dict
    micro_batch: int    # sequences of a pass
    passes: int         # of a step


GPT2 = {"family": "gpt", "layers": 12, "width": 768, "heads": 12, "mlp_width": 3072, "context": 1024, "vocabulary": 50257, "tied": True}
LLAMA = {"family": "llama", "layers": 16, "width": 2048, "mlp_width": 8192, "context": 2048, "vocabulary": 128256, "tied": True}
CASES = {
    "tiny": Case({"family": "gpt", "layers": 2, "width": 64, "heads": 2, "context": 32, "vocabulary": 101}, 2, 3),
    "gpt2-124m": Case(GPT2, 32, 1),
    "gpt2-124m-b64": Case(GPT2, 64, 1),
    "gpt2-124m-b32x4": Case(GPT2, 32, 4),
    "llama-1.2b": Case(LLAMA | {"heads": 32, "kv_heads": 8}, 8, 2),
    "llama-1.2b-d128": Case(LLAMA | {"heads": 16, "kv_heads": 8}, 8, 2),
}


def job_of(case, device, compute, **train):
    from mpillm.config import job_from_dict

    return job_from_dict({
        "model": case.model, "data": {"train": "random"}, "mesh": {"zero": 0},
        "train": {"steps": 10**6, "batch": case.micro_batch * case.passes, "micro_batch": case.micro_batch} | train,
        "optimizer": {"rate": 3e-4, "warmup": 10, "betas": [0.9, 0.95], "clip": 1.0},
        "precision": {"compute": compute}, "run": {"name": "bench", "device": device}}, "bench")


class Steps:
    """A model and its optimizer, one step after another.

    Attributes
    ----------
    plan : Needs
    """

    def __init__(self, case, device="gpu", compute="bfloat16", **train):
        from mpillm.layout.comm import Solo
        from mpillm.layout.mesh import Mesh, sizes_of
        from mpillm.run.plan import reserve
        from mpillm.run.session import build, open_device
        from mpillm.text.batches import RandomBatches
        from mpillm.train.gradients import Gradients
        from mpillm.train.optimizer import AdamW
        from mpillm.train.step import Trainer

        self.job = job = job_of(case, device, compute, **train)
        sizes, vocabulary = sizes_of(job.mesh, 1), job.model.vocabulary
        self.ops = ops = open_device(device, compute, Solo())
        self.plan = reserve(job, sizes, vocabulary, ops, Solo())
        mesh = Mesh(Solo(), sizes)
        self.model = model = build(job, mesh, vocabulary, ops).model
        model.initialize()
        self.trainer = Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), mesh, job)
        self.source, self.done = RandomBatches(vocabulary, job.model.context, 1), 0
        self.tokens = job.train.batch * job.model.context

    def step(self):
        self.done += 1
        return self.trainer.train_step(self.done, self.source, (self.done - 1) * self.job.train.batch)


def run(name, arguments):
    case = CASES[name]
    steps = Steps(case, arguments.device, arguments.compute)
    losses = [steps.step().loss for _ in range(4)]      # warm-up: the second pass of a kind is recorded
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        losses.append(steps.step().loss)
        seconds.append(time.perf_counter() - started)
    middle = statistics.median(seconds)
    row = {"case": name, "tokens_per_second": steps.tokens / middle, "step_ms": middle * 1e3, "least_ms": min(seconds) * 1e3, "most_ms": max(seconds) * 1e3}
    flops = steps.model.flops_per_token() * steps.tokens / middle
    row["model_TFLOP_per_second"] = flops / 1e12
    if arguments.rate:
        row["share_of_product"] = flops / (arguments.rate * 1e12)
    if steps.ops.host is not steps.ops:
        device = steps.ops.device
        row |= {"planned_GB": (steps.plan.peak + steps.plan.scratch) / 1e9, "measured_GB": device.peak_bytes() / 1e9, "graphs": len(steps.trainer.pipeline.recorded.passes)}
        row["host_share"] = host_share(steps, arguments.steps)
    return row, {"losses": losses, "seconds": seconds}


def host_share(steps, count):
    """Share of the time of `count` steps in which the device had nothing to do between the recorded work of two steps."""
    device, cuda = steps.ops.device, steps.ops.device.cupy.cuda
    marks, run = [], steps.trainer.pipeline.run

    def marked(*args):
        begin = cuda.Event()
        begin.record(device.stream)
        marks.append(begin)
        return run(*args)
    steps.trainer.pipeline.run = marked
    idle = []
    for _ in range(count):
        steps.step()
        end = cuda.Event()
        end.record(device.stream)
        idle.append(end)
    device.synchronize()
    gaps = [cuda.get_elapsed_time(end, begin) for end, begin in zip(idle, marks[1:])]
    whole = cuda.get_elapsed_time(marks[0], marks[-1]) / (len(marks) - 1)
    steps.trainer.pipeline.run = run
    return statistics.median(gaps) / whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gpt2-124m", "gpt2-124m-b32x4", "llama-1.2b"], choices=CASES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compute", default="bfloat16")
    parser.add_argument("--device", default="gpu")
    parser.add_argument("--rate", type=float, help="measured product rate in TFLOP/s, for the share")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows, raw, head = [], {}, None
    for name in arguments.shapes:
        row, raw[name] = run(name, arguments)
        rows.append(row)
        print(table([row]), flush=True)
        import gc
        gc.collect()
    from mpillm.backend import open_backend
    head = about(open_backend("gpu")) if arguments.device == "gpu" else {}
    save(arguments.out, head | {"steps": rows, "raw": raw})


if __name__ == "__main__":
    main()
