"""mpillm's side of the step benchmark: the Trainer that `mpillm train` runs, on one rank or several. Started by workers.Worker."""

import json
import math
import sys

from shapes import BETAS, CLIP, EPSILON, RATE, SHAPES, WEIGHT_DECAY, RandomTokens
from workers import PRODUCT, serve, timed_turn

from mpillm.backend.threads import prepare_environment


class Steps:
    """Optimizer steps one after another.

    Parameters
    ----------
    spec : dict
        shape: name of a shape; mesh: keys of [mesh]; micro_batch: sequences of a pass, the rank's whole share when left out.
    """

    def __init__(self, spec):
        from mpillm.layout.comm import world
        from mpillm.layout.mesh import Mesh, sizes_of
        from mpillm.run.session import build
        from mpillm.train.gradients import Gradients
        from mpillm.train.optimizer import AdamW
        from mpillm.train.step import Trainer
        self.shape, self.group = SHAPES[spec["shape"]], world()
        self.job = job_of(self.shape, self.group.size, spec.get("mesh", {}), spec.get("micro_batch"))
        mesh = Mesh(self.group, sizes_of(self.job.mesh, self.group.size))
        _, self.ops, _, self.model = build(self.job, mesh, self.shape.vocabulary)
        self.model.initialize()
        buckets = self.model.buckets
        self.trainer = Trainer(self.ops, self.model, Gradients(self.ops, buckets), AdamW(self.ops, buckets, self.job.optimizer), mesh, self.job)
        self.source, self.done = RandomTokens(self.shape), 0

    def step(self):
        """One optimizer step; the loss."""
        self.done += 1
        return self.trainer.train_step(self.done, self.source, (self.done - 1) * self.job.train.batch).loss


def job_of(shape, num_ranks, mesh, micro_batch=None):
    """The Job: `shape.batch` sequences a rank."""
    from mpillm.config import job_from_dict
    return job_from_dict({
        "model": {"family": "gpt", "layers": shape.layers, "width": shape.width, "heads": shape.heads, "context": shape.context,
                  "vocabulary": shape.vocabulary},
        "data": {"train": "random"}, "mesh": mesh, "train": {"steps": 10**6, "batch": shape.batch * num_ranks} | ({"micro_batch": micro_batch} if micro_batch else {}),
        "optimizer": {"rate": RATE, "betas": list(BETAS), "epsilon": EPSILON, "weight_decay": WEIGHT_DECAY, "clip": CLIP},
        "run": {"name": "bench"}}, "bench")


def versions(ops):
    """What computed: names and versions for the record."""
    import platform

    import numpy
    import threadpoolctl

    import mpillm
    libraries = [f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".strip()
                 for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    return {"mpillm": mpillm.__version__, "python": platform.python_version(), "numpy": numpy.__version__, "blas": ", ".join(libraries),
            "kernels": ops.note or "C++"}


def main(spec, path):
    prepare_environment(1)      # before NumPy, as the product does
    import numpy as np
    steps = Steps(spec)
    a, out = np.random.default_rng(0).random((PRODUCT, PRODUCT), np.float32), np.empty((PRODUCT, PRODUCT), np.float32)

    def profile(num_steps):
        from profiling import profile_steps
        return profile_steps(steps, num_steps)
    for _ in range(spec["warmup"]):
        steps.step()
    info = {"rank": steps.group.rank, "flops_per_token": steps.model.flops_per_token(), "versions": versions(steps.ops),
            "parameters": sum(math.prod(p.shape) for p in steps.model.every_parameter())}
    serve(path, info, {"step": lambda: timed_turn(steps.step, lambda: np.matmul(a, a, out=out)), "profile": profile})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
