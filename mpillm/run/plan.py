"""What a job will need, from running one step of it on arrays without data: `mpillm train --dry-run`."""

from ..backend.shapes import Shapes
from ..layout.mesh import Mesh
from ..text.batches import RandomBatches
from ..train.gradients import Gradients
from ..train.optimizer import AdamW
from ..train.step import Trainer
from .progress import bytes_text, scaled
from .session import build


def needs(job, sizes, vocabulary):
    """Size of the model and what rank 0 of the layout holds and computes.

    Parameters
    ----------
    job : Job
    sizes : dict
        Axis sizes of the mesh.
    vocabulary : int

    Returns
    -------
    dict
        parameters; values, moments, gradients, peak: bytes of a rank (the peak is that of arrays in a step);
        flops: of a step, all ranks; micro_batches: of a rank and step; tokens: of a step, all ranks.
    """
    ops = Shapes()
    session = build(job, Mesh.plan(sizes, 0), vocabulary, ops)
    model = session.model
    trainer = Trainer(ops, model, Gradients(ops, model.buckets), AdamW(ops, model.buckets, job.optimizer), session.mesh, job)
    trainer.train_step(1, RandomBatches(vocabulary, job.model.context, job.train.seed), 0)
    tokens = job.train.batch * job.model.context
    share = -(-job.train.batch // sizes["dp"])
    return {"parameters": sum(_elements(parameter.shape) for parameter in model.parameters()),
            "values": sum(bucket.values.nbytes for bucket in model.buckets),
            "moments": sum(moment.nbytes for bucket in model.buckets for moment in bucket.moments),
            "gradients": sum((bucket.owned_grads if bucket.zero == 2 else bucket.grads).nbytes for bucket in model.buckets),
            "peak": ops.peak, "flops": model.flops_per_token() * tokens, "tokens": tokens,
            "micro_batches": -(-share // trainer.micro_batch())}


def _elements(shape):
    count = 1
    for extent in shape:
        count *= extent
    return count


def table(job, sizes, vocabulary):
    """The lines that `--dry-run` prints."""
    found = needs(job, sizes, vocabulary)
    ranks = sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]
    rows = [
        ("model", f"{job.model.family}, {job.model.layers} layers, width {job.model.width}, vocabulary {job.model.vocabulary or vocabulary}: "
                  f"{found['parameters']:,} parameters"),
        ("layout", f"{ranks} rank{'s' * (ranks > 1)}: " + " x ".join(f"{axis}={sizes[axis]}" for axis in ("pp", "dp", "cp", "tp")) + f", zero={job.mesh.zero}"),
        ("a rank holds", f"values {bytes_text(found['values'])}, moments {bytes_text(found['moments'])}, gradients {bytes_text(found['gradients'])}"),
        ("a rank needs", f"{bytes_text(found['peak'])} for arrays at the peak of a step ({job.precision.compute}, recompute {job.train.recompute})"),
        ("a step", f"{found['tokens']:,} tokens in {found['micro_batches']} micro-batch{'es' * (found['micro_batches'] > 1)} a rank, {scaled(found['flops'])}FLOP on all ranks"),
        ("the run", f"{job.train.steps:,} steps, {job.train.steps * found['tokens']:,} tokens, {scaled(job.train.steps * found['flops'])}FLOP"),
    ]
    return [f"{name:<14}{text}" for name, text in rows]
