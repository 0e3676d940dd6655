"""Every layout equals one rank: losses, gradient norms, every gradient of two steps, the weights after them and the validation loss.

A case runs in the launch of as many ranks as it needs: 1, 2, 3, 4, 6 and 8. `selection()` of layouts.py are the daily cases;
the full matrix is `long` (8,208 layouts; -k 'full_matrix and [7]' runs a slice of it).
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from layouts import (NUM_RANKS, every_case, factorisations, features_of, free, job_of_case, line_of, possible, sections_of, selection,
                     selection_here)
from mpillm.config import UserError
from mpillm.layout.compose import check_layout
from mpillm.layout.mesh import sizes_of
from mpillm.train.step import validation_loss
from small_jobs import OPS, Source, job_of, trainer_of, worst_gradient, worst_weight

TOLERANCE = 1e-10       # relative, float64
WINDOWS = 5             # of the validation loss
PARTS = 24              # of the full matrix


class Outcome(NamedTuple):
    """What two steps of a job left on a rank."""
    numbers: dict       # name -> float, the same on all ranks
    gradients: list     # of each step: {name: (slab, array)}
    weights: dict       # {name: (slab, array)}


def outcome_of(job, group=None):
    """Two steps and a validation loss, on the ranks of `group` in the layout of the job or on this rank alone."""
    trainer, source = trainer_of(job, group), Source(job.model.context)
    parameters, numbers, gradients = trainer.model.parameters(), {}, []
    for step in (1, 2):
        result = trainer.train_step(step, source, (step - 1) * job.train.batch)
        for name in ("loss", "grad_norm", "balance_loss", "router_z_loss"):
            numbers[f"{name} of step {step}"] = getattr(result, name)
        gradients.append({p.name: (p.updated, p.owned_grad.copy()) for p in parameters})
    weights = {p.name: (p.updated, p.master.copy()) if p.bucket.zero == 3 else (p.held, p.value.copy()) for p in parameters}
    numbers["validation loss"] = validation_loss(OPS, trainer.model, WINDOWS, source.samples, 2)[0]
    free(trainer.mesh)
    return Outcome(numbers, gradients, weights)


def worst_number(found, expected):
    """The largest relative difference of the numbers, and its name; infinite where one is not a number."""
    differences = [(abs(found[name] - value) / max(abs(value), 1e-9), name) for name, value in expected.items()]
    return max((difference if difference == difference else float("inf"), name) for difference, name in differences)


def worst_difference(group, found, expected):
    """(difference, what): the largest of all ranks, on all ranks."""
    worst = [worst_number(found.numbers, expected.numbers)]
    for step in range(2):
        difference, name = worst_gradient(found.gradients[step], expected.gradients[step])
        worst.append((difference, f"gradient of {name} in step {step + 1}"))
    difference, name = worst_weight(found.weights, expected.weights, rate=3e-3)
    worst.append((difference, f"{name} after step 2"))
    return max(tuple(pair) for pairs in group.collect(worst) for pair in pairs)


@functools.lru_cache(maxsize=64)
def on_one_rank(model, batch, family):
    return outcome_of(job_of(family, model=dict(model), train={"batch": batch}))


def failure_of(group, case):
    """None where the case equals one rank, else what differs and how to have this layout."""
    sections = sections_of(case)
    expected = on_one_rank(tuple(sections["model"].items()), sections["train"]["batch"], "gpt" if case.family == "gpt" else "llama")
    difference, what = worst_difference(group, outcome_of(job_of_case(case), group), expected)
    return None if difference < TOLERANCE else f"{what} differs by {difference:.1e} in the layout\n  {line_of(case)}"


@pytest.mark.ranks
@pytest.mark.parametrize("case", selection_here(), ids=str)
def test_a_layout_equals_one_rank(group, case):
    print(line_of(case))        # shown when anything fails
    failure = failure_of(group, case)
    assert failure is None, failure


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_full_matrix_equals_one_rank(group, part):
    failures = []
    for case in every_case(group.size)[part::PARTS]:
        print(line_of(case))    # the last line is the one that was running
        failures.append(failure_of(group, case))
    failures = list(filter(None, failures))
    assert not failures, f"{len(failures)} layouts differ:\n" + "\n".join(failures)


# ---- what the daily cases cover -------------------------------------------------------------------------------------

def test_every_possible_pair_of_features_is_in_a_daily_case():
    covered = set().union(*map(features_of, selection()))
    missing = [f"{item}, as in {line_of(case)}" for item, case in possible().items() if item not in covered]
    assert not missing, f"{len(missing)} of {len(possible())} are in no case:\n" + "\n".join(missing)
    assert covered == set(possible())


def test_every_factorisation_is_in_a_daily_case():
    meshes = {(case.dp, case.pp, case.cp, case.tp, case.ep) for case in selection()}
    assert meshes == {(dp, pp, cp, tp, ep) for num_ranks in NUM_RANKS for dp, pp, cp, tp in factorisations(num_ranks, 4)
                      for ep in range(1, dp * cp + 1) if dp * cp % ep == 0}


def test_the_selection_is_the_same_each_time():
    first = selection()
    selection.cache_clear()
    assert selection() == first and len(set(first)) == len(first)


# ---- odd sizes ------------------------------------------------------------------------------------------------------

def test_heads_that_tp_does_not_divide_are_refused_with_what_works():
    job = job_of("llama", model={"heads": 5, "kv_heads": 5}, mesh={"tp": 2})
    with pytest.raises(UserError, match="^mesh: tp=2 does not divide model.heads=5; use tp of 1, 5$"):
        check_layout(job, sizes_of(job.mesh, 2))


ODD = {     # ranks, model, mesh, train
    "7 layers on 3 stages": (3, {"layers": 7}, {"pp": 3}, {"micro_batch": 2}),
    "7 layers on 3 stages, interleaved": (3, {"layers": 7}, {"pp": 3, "schedule": "interleaved", "chunks": 2}, {"micro_batch": 2}),
    "vocabulary 4,099 on 4 ranks": (4, {"heads": 4, "kv_heads": 4, "width": 16, "vocabulary": 4099}, {"tp": 4}, {}),
    "vocabulary 4,099 on 4 ranks, no sequence parallelism": (
        4, {"heads": 4, "kv_heads": 4, "width": 16, "vocabulary": 4099, "tied": False}, {"tp": 4, "sequence": False}, {}),
    "sequence 65 on cp 2": (2, {"context": 65}, {"cp": 2}, {}),
    "sequence 65 on cp 2, ulysses": (2, {"context": 65, "heads": 4, "width": 16}, {"cp": 2, "cp_form": "ulysses"}, {}),
    "3 experts on 2 ranks": (2, {"experts": 3}, {"ep": 2, "zero": 2}, {"micro_batch": 2}),
    "3 experts on 2 ranks of cp": (2, {"experts": 3}, {"dp": 1, "cp": 2, "ep": 2, "zero": 3}, {"micro_batch": 2}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_work(group, name):
    num_ranks, model, mesh, train = ODD[name]
    if group.size != num_ranks:
        pytest.skip(f"on {num_ranks} ranks")
    expected = outcome_of(job_of("llama", model=model))
    difference, what = worst_difference(group, outcome_of(job_of("llama", model=model, mesh=mesh, train=train), group), expected)
    assert difference < TOLERANCE, f"{what} differs by {difference:.1e}"
