"""What a job will need, from running one step of it on arrays without data: `mpillm train --dry-run`."""

import math
from typing import NamedTuple

from ..backend.shapes import GpuShapes, Shapes
from ..config import UserError
from ..layout.journal import Journal, ledger_table
from ..layout.mesh import AXES, Mesh, num_ranks_of
from ..model.shape import Shape, layers_of_parts
from ..text.batches import RandomBatches
from ..train.gradients import Gradients
from ..train.optimizer import AdamW
from ..train.schedule import make_schedule
from ..train.schedule import table as schedule_table
from ..train.step import Trainer
from .progress import bytes_text, scaled
from .session import build


SLACK = 96 << 20     # bytes of a GPU beside the plan: scratch of single operations, and batches that are on their way
SHOWN = 16      # micro-batches of the schedule that is drawn, at most


class Needs(NamedTuple):
    """What one rank of a layout holds, computes and sends."""
    parameters: int     # elements, of the whole model
    values: int         # bytes that are there between two steps, as all below
    masters: int        # where they are not the values themselves
    moments: int
    gradients: int
    kept: int           # bytes of a GPU to reserve for arrays that stay; 0 on a CPU
    activations: int    # and for those that die within a pass
    peak: int           # bytes of arrays at the peak of a step
    flops: int          # of a step, all ranks
    micro_batches: int  # of a rank and step
    traffic: dict       # of a step, as of Journal.since
    offloaded: bool = False     # whether masters and moments are in host memory
    scratch: int = 0    # bytes of libraries on a GPU, which only it can tell

    def held(self):
        """What is there between two steps, in words."""
        state = (f"masters {bytes_text(self.masters)}, " if self.masters else "") + f"moments {bytes_text(self.moments)}"
        held, gradients = f"values {bytes_text(self.values)}", f"gradients {bytes_text(self.gradients)}"
        return f"{held}, {gradients}; in host memory {state}" if self.offloaded else f"{held}, {state}, {gradients}"

    def remedy(self, job, sizes):
        """The setting that would free the most, in words."""
        state = 0 if self.offloaded else self.masters + self.moments
        if self.activations > self.values + state + self.gradients:
            if _micro_batch(job, sizes) > 1:
                return f"lower train.micro_batch ({_micro_batch(job, sizes)} here)"
            return 'set train.recompute = "block"' if job.train.recompute != "block" else "raise mesh.tp, mesh.cp or mesh.pp"
        if sizes["dp"] * sizes["cp"] > 1 and job.mesh.zero < 3:
            return f"raise mesh.zero ({job.mesh.zero} here)"
        if not self.offloaded:
            return 'set train.offload = "optimizer", or raise mesh.tp or mesh.pp'
        return "raise mesh.tp or mesh.pp, or mesh.dp with mesh.zero = 3"

    @property
    def sent(self):
        """Bytes of a step."""
        return sum(entry.bytes for entry in self.traffic.values())


def _micro_batch(job, sizes):
    """Sequences of a pass."""
    share = -(-job.train.batch // sizes["dp"])
    return min(job.train.micro_batch or share, share)


def reserve(job, sizes, vocabulary, ops, group):
    """Takes the memory of a GPU that the plan of this rank says, before the first array is made.

    Raises
    ------
    UserError
        on all ranks alike, where one has not that much: what takes it, and what would help.
    """
    plan, problem = needs(job, sizes, vocabulary, group.rank), None
    if ops.host is not ops:
        plan = plan._replace(scratch=_scratch(job, sizes, ops))
        free = ops.device.free_bytes()
        wanted = plan.peak + plan.scratch + SLACK
        if wanted > free:
            problem = (f"a rank needs {bytes_text(wanted)} of GPU memory, {bytes_text(free)} are free on rank {group.rank}: "
                       f"{plan.held()}, activations {bytes_text(plan.activations)}; {plan.remedy(job, sizes)}")
    problems = [text for text in group.collect(problem) if text]
    if problems:
        raise UserError(problems[0])
    if ops.host is not ops:
        ops.device.reserve(plan.kept + SLACK // 2, plan.activations + SLACK // 2)
    return plan


def _scratch(job, sizes, ops):
    """Bytes that libraries take beside the plan: cuBLASLt's workspace, and that of cuDNN's attention where it is used."""
    model, found = job.model, ops.library.workspace_size
    heads, kv_heads = model.heads // sizes["tp"], max(1, (model.kv_heads or model.heads) // sizes["tp"])
    if ops.sdpa is None or sizes["cp"] > 1 or model.dropout or job.precision.compute not in ("bfloat16", "float16") or model.context < 2:
        return found
    return found + ops.sdpa.scratch(_micro_batch(job, sizes), model.context, heads, kv_heads, model.channels,
                                    job.precision.compute)


def needs(job, sizes, vocabulary, rank=0):
    """What a rank of the layout needs, from playing one step of it.

    Parameters
    ----------
    job : Job
    sizes : dict
        Axis sizes of the mesh.
    vocabulary : int
    rank : int
    """
    on_gpu = job.run.device != "cpu"
    ops, journal = GpuShapes() if on_gpu else Shapes(), Journal()
    session = build(job, Mesh.plan(sizes, rank, journal=journal, empty=ops.empty), vocabulary, ops)
    model = session.model
    trainer = Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), session.mesh, job)
    before = journal.snapshot()
    trainer.train_step(1, RandomBatches(vocabulary, job.model.context, job.train.seed), 0)
    share = -(-job.train.batch // sizes["dp"])
    return Needs(parameters=sum(math.prod(parameter.shape) for parameter in model.every_parameter()),
                 values=sum(bucket.kept.nbytes for bucket in model.buckets),
                 masters=sum(bucket.masters.nbytes for bucket in model.buckets if bucket.masters is not None),
                 moments=sum(moment.nbytes for bucket in model.buckets for moment in bucket.moments),
                 gradients=sum((bucket.owned_grads if bucket.zero >= 2 else bucket.grads).nbytes for bucket in model.buckets),
                 kept=ops.kept.peak if on_gpu else 0, activations=ops.passing_by.peak if on_gpu else 0,
                 peak=ops.kept.peak + ops.passing_by.peak if on_gpu else ops.peak,
                 flops=model.flops_per_token() * job.train.batch * job.model.context,
                 micro_batches=-(-share // trainer.micro_batch()), traffic=journal.since(before),
                 offloaded=on_gpu and job.train.offload == "optimizer")


def table(job, sizes, vocabulary):
    """The lines that `--dry-run` prints: of the rank that needs the most memory, and of the one that sends the most."""
    ranks = num_ranks_of(sizes)
    per_stage = ranks // sizes["pp"]
    stages = [needs(job, sizes, vocabulary, stage * per_stage) for stage in range(sizes["pp"])]
    largest, busiest = max(stages, key=lambda found: found.peak), max(stages, key=lambda found: found.sent)
    tokens = job.train.batch * job.model.context
    of_stage = f" (stage {stages.index(largest)} of {len(stages)})" if len(stages) > 1 else ""
    rows = [
        ("model", f"{job.model.family}, {job.model.layers} layers, width {job.model.width}, vocabulary {job.model.vocabulary or vocabulary}: "
                  f"{largest.parameters:,} parameters"),
        ("layout", f"{ranks} rank{'s' * (ranks > 1)}: " + " x ".join(f"{axis}={sizes[axis]}" for axis in AXES) + f", ep={sizes['ep']}, zero={job.mesh.zero}"),
        ("a rank holds", f"{largest.held()}{of_stage}"),
        ("a rank needs", f"{bytes_text(largest.peak)} for arrays at the peak of a step ({job.precision.compute}, recompute {job.train.recompute}){of_stage}"
                         + (f"; on a GPU {bytes_text(SLACK)} and the scratch memory of its libraries more" if job.run.device != "cpu" else "")),
        ("a rank sends", f"{bytes_text(busiest.sent)} a step" + (f" (stage {stages.index(busiest)})" if len(stages) > 1 else "") + (":" if ranks > 1 else "")),
        ("a step", f"{tokens:,} tokens in {largest.micro_batches} micro-batch{'es' * (largest.micro_batches > 1)} a rank, {scaled(largest.flops)}FLOP on all ranks"),
        ("the run", f"{job.train.steps:,} steps, {job.train.steps * tokens:,} tokens, {scaled(job.train.steps * largest.flops)}FLOP"),
    ]
    lines = [f"{name:<14}{text}" for name, text in rows]
    if ranks > 1:
        lines[5:5] = [f"{'':<14}{line}" for line in ledger_table(busiest.traffic)]
    if len(stages) > 1:
        blocks = ", ".join(map(str, layers_of_parts(Shape.of(job.model, vocabulary), len(stages) * job.mesh.chunks, job.mesh.stages or ())))
        shown = make_schedule(job.mesh.schedule, len(stages), min(largest.micro_batches, SHOWN), job.mesh.chunks)
        note = f", the first {SHOWN} micro-batches if there were no more" if largest.micro_batches > SHOWN else ""
        lines += [f"{'schedule':<14}{job.mesh.schedule}{note}; blocks of the parts: {blocks}", *schedule_table(shown).splitlines()]
    return lines
