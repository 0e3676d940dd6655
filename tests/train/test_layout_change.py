"""Checkpoints between layouts: a run that changes its layout at every resume follows one that never did; every bit arrives."""

import functools

import numpy as np
import pytest

from layouts import free
from mpillm.layout.comm import Solo
from mpillm.run.session import entries, gather_loaded
from mpillm.store.checkpoint import load_newest, open_checkpoint, save
from small_jobs import OPS, Source, job_of, trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

STEPS = 10              # of each layout
SEED = 5                # with which no token stands between two experts by less than 6e-5: in float32 it might go either way
RUNS = {                # ranks -> model, the layout of each ten steps; None: one rank
    1: ({}, [{}] * 3 + [None]),
    2: ({"heads": 4, "width": 16, "kv_heads": 2, "layers": 3},
        [{"dp": 2}, {"dp": 1, "tp": 2}, {"pp": 2, "zero": 1}, {"cp": 2}, {"dp": 2, "zero": 3}, None]),
    3: ({"heads": 6, "width": 24, "layers": 4},
        [{"dp": 3, "zero": 2}, {"tp": 3}, {"pp": 3, "schedule": "zero_bubble"}, {"cp": 3, "zero": 1}, {"dp": 3, "zero": 3}, None]),
    4: ({"heads": 4, "width": 16, "kv_heads": 2, "layers": 3, "experts": 3, "shared_experts": 1},
        [{"dp": 4, "ep": 2}, {"dp": 2, "tp": 2, "zero": 1}, {"pp": 2, "cp": 2, "schedule": "interleaved", "chunks": 2},
         {"cp": 4, "ep": 2, "zero": 2, "cp_form": "ulysses"}, {"pp": 2, "dp": 2, "zero": 3}, None]),
}


def job_on(model, layout, compute="float32", family="llama"):
    mesh = {"dp": "rest", "zero": 0, **(layout or {})}
    return job_of(family, model=model, mesh=mesh, precision={"compute": compute}, train={"steps": 60, "micro_batch": 2, "seed": SEED})


def load(directory, trainer, group):
    """Fills the model of a trainer from the newest checkpoint; its step."""
    found = entries(trainer.model, moments=True)
    checkpoint = load_newest(directory, lambda _: found, group, OPS)
    gather_loaded(trainer.model, found, moments=True)
    return checkpoint.step


@functools.cache
def losses_of_one_rank(num_ranks, compute):
    """Of a run that never changed."""
    model, layouts = RUNS[num_ranks]
    trainer = trainer_of(job_on(model, {}, compute))
    return [trainer.train_step(step, Source(), (step - 1) * 7).loss for step in range(1, len(layouts) * STEPS + 1)]


@pytest.mark.parametrize("compute, tolerance", [pytest.param("float32", 1e-5, marks=pytest.mark.long), ("float64", 1e-10)])
def test_a_run_that_changes_layout_at_every_resume_follows_one_that_never_did(group, shared_tmp, compute, tolerance):
    model, layouts = RUNS[group.size]
    losses, step = [], 0
    for layout in layouts:
        ranks = group if layout is not None else Solo()         # one rank: each for itself
        trainer = trainer_of(job_on(model, layout, compute), None if layout is None else group)
        if step:
            assert load(shared_tmp, trainer, ranks) == step
        for step in range(step + 1, step + STEPS + 1):
            losses.append(trainer.train_step(step, Source(), (step - 1) * 7).loss)
        if layout is not None:
            save(shared_tmp, step, entries(trainer.model, moments=True), {"kind": "state"}, {}, group, OPS)
        free(trainer.mesh)
    differences = np.abs(np.array(losses) / losses_of_one_rank(group.size, compute) - 1)
    worst = int(differences.argmax())
    assert differences[worst] < tolerance, f"step {worst + 1}, in {layouts[worst // STEPS]}: {differences[worst]:.1e}"


# ---- save on one layout, load on another ----------------------------------------------------------------------------

def model_on(num_ranks, kind):
    """Family and sizes."""
    heads, kv_heads = {3: (6, 3)}.get(num_ranks, (4, 2))
    sizes = {"heads": heads, "width": 4 * heads, "layers": 2}
    if kind == "gpt":
        return "gpt", sizes | {"tied": False}
    return "llama", sizes | {"kv_heads": kv_heads, "experts": 5, "shared_experts": 1}


def layouts_on(n, kind):
    """Eight layouts of all n ranks."""
    found = [{"dp": n}, {"tp": n}, {"dp": n, "zero": 3}, {"cp": n, "zero": 1}, {"pp": n, "zero": 1},
             {"tp": n, "sequence": False, "zero": 3}, {"pp": 2, "tp": 2, "zero": 2} if n == 4 else {"dp": n, "zero": 2}]
    if n > 1:
        found.append({"dp": n, "ep": n, "zero": 3} if kind == "moe" else {"pp": n, "schedule": "interleaved", "chunks": 2})
    return found


@functools.cache
def whole(name, shape):
    """What a tensor of a checkpoint holds: any bits of floats that are numbers, among them denormal ones and minus zero."""
    bits = np.random.default_rng(list(name.encode())).integers(0, 2**32, shape, dtype=np.uint32)
    values = bits.view(np.float32)
    values[~np.isfinite(values)] = -0.0
    return values


def tensors_of(trainer):
    """(name in the checkpoint, global shape, slab, array) of all that a rank keeps: masters, moments, values but under ZeRO 3."""
    for parameter in trainer.model.parameters():
        for table, array in (("masters", parameter.master), ("moment1", parameter.moment1), ("moment2", parameter.moment2)):
            yield f"{table}/{parameter.name}", parameter.shape, parameter.updated, array
        if parameter.bucket.zero < 3:
            yield f"masters/{parameter.name}", parameter.shape, parameter.held, parameter.value


@pytest.mark.parametrize("kind", ["gpt", "moe"])
def test_every_bit_of_a_checkpoint_arrives_on_every_other_layout(group, shared_tmp, kind):
    """Every pair of eight layouts with experts, each and the next one for gpt."""
    family, model = model_on(group.size, kind)
    layouts = layouts_on(group.size, kind)
    trainers = [trainer_of(job_on(model, layout, family=family), group) for layout in layouts]
    for saved, trainer in enumerate(trainers):
        for name, shape, slab, array in tensors_of(trainer):
            array[...] = whole(name, shape)[slab.slices()]
        save(shared_tmp / str(saved), 1, entries(trainer.model, moments=True), {"kind": "state"}, {}, group, OPS)
    for saved in range(len(layouts)):
        checkpoint = open_checkpoint(shared_tmp / str(saved) / "step-00000001", group)
        for loaded in range(len(layouts)) if kind == "moe" else [(saved + 1) % len(layouts)]:
            trainer = trainers[loaded]
            for _, _, _, array in tensors_of(trainer):
                array[...] = np.nan
            found = entries(trainer.model, moments=True)
            checkpoint.load(found, group, OPS)
            gather_loaded(trainer.model, found, moments=True)
            wrong = group.collect([name for name, shape, slab, array in tensors_of(trainer)
                                   if array.tobytes() != whole(name, shape)[slab.slices()].tobytes()])
            assert not any(wrong), f"saved in {layouts[saved]}, loaded in {layouts[loaded]}: {wrong}"
    for trainer in trainers:
        free(trainer.mesh)
