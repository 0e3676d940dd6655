"""`verify` against itself: layouts that are right are verified, and each of 20 planted errors is caught and named.

A planted error switches off one collective, one scale or one slab, on all ranks alike, and does nothing on one rank: so
the one-rank job that verify compares with stays right.
"""

import re
from typing import NamedTuple

import numpy as np
import pytest

from mpillm.config import job_from_dict
from mpillm.layout.comm import Group, Solo
from mpillm.layout.mesh import sizes_of
from mpillm.layout.parameter import Bucket, Parameter
from mpillm.layout.slab import Slab
from mpillm.model import context
from mpillm.model.batch import Batch
from mpillm.model.embedding import Embedding
from mpillm.model.experts import AuxiliaryLosses, Experts
from mpillm.model.region import Region
from mpillm.model.rope import Rope
from mpillm.run.verify import TOLERANCE, compare, in_float64, small_job
from mpillm.train.gradients import Gradients
from mpillm.train.optimizer import AdamW
from mpillm.train.pipeline import Pipeline

pytestmark = pytest.mark.ranks


def job_of(family="llama", **sections):
    """A job as users have them, its [model], [mesh] and so on updated by the sections."""
    values = {"model": {"family": family, "layers": 12, "width": 768, "heads": 4, "context": 512}, "data": {"train": "missing.h5"},
              "mesh": {}, "train": {"steps": 100, "batch": 64}, "run": {"name": "test"}}
    for section, entries in sections.items():
        values[section] = values.get(section, {}) | entries
    return job_from_dict(values, "test")


def report_of(job, group):
    return compare(in_float64(small_job(job, sizes_of(job.mesh, group.size))), group)


# ---- the errors: each patches one method --------------------------------------------------------------------------------

def no_sum_on_leaving(patch):
    patch.setattr(Region, "leave", lambda self, y: y)


def no_sum_backward_of_entering(patch):
    patch.setattr(Region, "enter_backward", lambda self, dx: dx)


def copies_of_kv_heads_not_summed(patch):
    shared = Parameter.shared.fget
    patch.setattr(Parameter, "shared", property(lambda self: tuple(key if isinstance(key, str) else key[0] for key in shared(self))))


def gradients_of_keys_stay_away(patch):
    """Ring: what other ranks found for a block of keys is not added."""
    add = context.Total.add
    patch.setattr(context.Total, "add", lambda self, part: None if self.begun and self.view.ndim == 5 else add(self, part))


def heads_in_reverse_order(patch):
    """Ulysses: rank r gets the heads of rank cp - 1 - r, but sends its results to the place of its own."""
    copies = context.copies
    patch.setattr(context, "copies", lambda x, piece: [(part, target[:, :, ::-1]) for part, target in copies(x, piece)])


def a_bucket_is_not_reduced(patch):
    start = Gradients.start
    patch.setattr(Gradients, "start", lambda self, bucket, last: None if bucket.name == "blocks.1" else start(self, bucket, last))


def new_values_are_not_gathered(patch):
    gather = Bucket.gather
    patch.setattr(Bucket, "gather", lambda self, held: None if self.name == "blocks.0" else gather(self, held))


def old_values_are_kept(patch):
    """ZeRO 3: the values of a block are not let go, so they are not fetched again after the update."""
    release = Bucket.release
    patch.setattr(Bucket, "release", lambda self: None if self.name == "blocks.0" else release(self))


def a_tied_table_is_not_summed(patch):
    shared = Parameter.shared.fget
    patch.setattr(Parameter, "shared", property(lambda self: ("pp",) + shared(self)[1:]))


def rows_come_back_in_the_order_of_experts(patch):
    back = Experts._from_experts
    patch.setattr(Experts, "_from_experts", lambda self, rows, plan: back(self, rows, plan._replace(ungroup=None)))


def counts_of_part_of_a_sequence(patch):
    make = AuxiliaryLosses.__init__

    def made(self, ops, mesh, *rest):
        make(self, ops, mesh, *rest)
        self.cp = Solo()
    patch.setattr(AuxiliaryLosses, "__init__", made)


def weight_of_the_targets_of_one_rank(patch):
    reduce = Group.all_reduce
    patch.setattr(Group, "all_reduce", lambda self, x, op="sum": x if (self.name, x.shape) == ("dp", (1,)) else reduce(self, x, op))


def equal_gradients_counted_on_each_rank(patch):
    place = Bucket.place

    def placed(self, *arguments):
        place(self, *arguments)
        self.uncounted = []
    patch.setattr(Bucket, "place", placed)


def partial_gradients_counted_on_one_rank(patch):
    """Sequence parallelism: the gradients of norms and biases are taken as equal on all ranks, as they are without it."""
    place = Bucket.place

    def placed(self, *arguments):
        for parameter in self.parameters:
            parameter.partial = False
        place(self, *arguments)
    patch.setattr(Bucket, "place", placed)


def owned_a_row_too_early(patch):
    place = Bucket.place

    def placed(self, *arguments):
        place(self, *arguments)
        for parameter in self.parameters:
            if parameter.name == "blocks.0.attention.output.weight" and self.group.rank > 0:
                start, shape = parameter.owned
                parameter.owned = Slab((start[0] - 1, start[1]), shape)
    patch.setattr(Bucket, "place", placed)


def positions_of_other_tokens(patch):
    """The gradients of positions go to the rows of the first tokens of a sequence, whichever the rank has."""
    backward = Embedding.backward

    def moved(self, dy, saved, batch):
        b, t = batch.shape
        return backward(self, dy, saved._replace(positions=np.tile(np.arange(t), b)), batch)
    patch.setattr(Embedding, "backward", moved)


def dropout_of_the_first_heads(patch):
    mask = Batch.probability_mask
    patch.setattr(Batch, "probability_mask", lambda self, key, first_head: mask(self, key, 0))


def gradient_of_another_micro_batch(patch):
    send, kept = Pipeline._send, {}

    def sent(self, x, action):
        if action.kind == "B" and x is not None:
            kept[action.microbatch] = x
            x = kept[0] if action.microbatch == 1 else x
        send(self, x, action)
    patch.setattr(Pipeline, "_send", sent)


def weights_of_a_micro_batch_left_out(patch):
    work = Pipeline._backward_weight

    def left_out(self, action):
        if action.microbatch == 1:
            self.deferred[action.microbatch, action.chunk] = [(bucket, []) for bucket, _ in self.deferred[action.microbatch, action.chunk]]
        work(self, action)
    patch.setattr(Pipeline, "_backward_weight", left_out)


def angles_of_the_first_tokens(patch):
    """Rope takes the tokens of a rank for the first ones of the sequence."""
    at = Rope.at
    patch.setattr(Rope, "at", lambda self, positions: at(self, np.arange(len(positions))))


class Fault(NamedTuple):
    plant: object           # (monkeypatch)
    sections: dict          # of a job in which it matters
    affected: str           # pattern of the tensors that differ, and of no others
    first: str              # pattern of the one that comes last in the forward: nearest to the error, where that is in the backward
    what: str = "gradient of step 1"
    family: str = "llama"


EVERY = r".*"
MATRICES = r"blocks\..\.(attention\.(query|key|value|output)|mlp\.(gate|up|down))\.weight"
EQUAL = r".*norm\.(weight|bias)|.*\.(output|down)\.bias|embedding\.positions\.weight"      # on all tp ranks
EXPERTS = {"experts": 5, "experts_per_token": 2}
FAULTS = [      # 20; axes that are left out have one rank, dp has the rest
    Fault(no_sum_on_leaving, {"mesh": {"tp": 2, "sequence": False}}, EVERY, r"norm\.weight"),
    Fault(no_sum_backward_of_entering, {"mesh": {"tp": 2, "sequence": False}}, EVERY, r"norm\.weight"),
    Fault(equal_gradients_counted_on_each_rank, {"mesh": {"tp": 2, "sequence": False}}, EQUAL, r"norm\.bias", family="gpt"),
    Fault(partial_gradients_counted_on_one_rank, {"mesh": {"tp": 2}}, EQUAL, r"norm\.bias", family="gpt"),
    Fault(copies_of_kv_heads_not_summed, {"model": {"kv_heads": 1}, "mesh": {"tp": 2, "zero": 0}},
          r"blocks\..\.attention\.(key|value)\.weight", r"blocks\.1\.attention\.value\.weight"),
    Fault(dropout_of_the_first_heads, {"model": {"dropout": 0.2}, "mesh": {"tp": 2}}, EVERY, r"norm\.weight"),
    Fault(gradients_of_keys_stay_away, {"mesh": {"cp": 2}},
          r"(embedding|blocks\.0)\..*|blocks\.1\.(attention_norm|attention\.(key|value))\.weight", r"blocks\.1\.attention\.value\.weight"),
    Fault(heads_in_reverse_order, {"mesh": {"cp": 2, "cp_form": "ulysses"}}, EVERY, r"norm\.weight"),
    Fault(angles_of_the_first_tokens, {"mesh": {"cp": 2}}, EVERY, r"norm\.weight"),
    Fault(positions_of_other_tokens, {"mesh": {"cp": 2}}, r"embedding\.positions\.weight", r"embedding\.positions\.weight", family="gpt"),
    Fault(weight_of_the_targets_of_one_rank, {}, EVERY, r"norm\.weight"),
    Fault(a_bucket_is_not_reduced, {"mesh": {"zero": 0}}, r"blocks\.1\..*", r"blocks\.1\.mlp\.down\.weight"),
    Fault(owned_a_row_too_early, {"mesh": {"zero": 1}}, r"blocks\.0\.attention\.output\.weight", r"blocks\.0\.attention\.output\.weight"),
    Fault(new_values_are_not_gathered, {"mesh": {"zero": 2}}, r"blocks\.0\..*", r"blocks\.0\.mlp\.down\.weight", "weights after step 1"),
    Fault(old_values_are_kept, {"mesh": {"zero": 3}}, EVERY, r"norm\.weight", "gradient of step 2"),
    Fault(a_tied_table_is_not_summed, {"mesh": {"pp": 2}}, r"embedding\.tokens\.weight", r"embedding\.tokens\.weight"),
    Fault(gradient_of_another_micro_batch, {"mesh": {"pp": 2}}, r"(embedding|blocks\.[01])\..*", r"blocks\.1\.mlp\.down\.weight"),
    Fault(weights_of_a_micro_batch_left_out, {"mesh": {"pp": 2, "schedule": "zero_bubble"}}, MATRICES, r"blocks\.2\.mlp\.down\.weight"),
    Fault(rows_come_back_in_the_order_of_experts, {"model": EXPERTS, "mesh": {"ep": 2}}, EVERY, r"norm\.weight"),
    Fault(counts_of_part_of_a_sequence, {"model": EXPERTS, "mesh": {"cp": 2}},
          r"(embedding|blocks\.0)\..*|blocks\.1\.(attention.*|mlp_norm|mlp\.router)\.weight", r"blocks\.1\.mlp\.router\.weight"),
]


verified = set()    # jobs that were, as text


@pytest.fixture
def even(group):
    """The layouts of this file need pairs of ranks."""
    if group.size not in (2, 4):
        pytest.skip("runs on 2 and 4 ranks")
    return group


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_error_is_caught_and_named(even, monkeypatch, fault):
    job = job_of(fault.family, **fault.sections)
    if repr(job) not in verified:
        assert not report_of(job, even).wrong
        verified.add(repr(job))
    fault.plant(monkeypatch)
    report = report_of(job, even)
    assert report.wrong and {found.what for found in report.wrong} == {fault.what}
    differing = [found.tensor for found in report.wrong]
    assert differing == [row.tensor for row in report.rows if re.fullmatch(fault.affected, row.tensor)]
    assert re.fullmatch(fault.first, differing[-1])
    assert all(found.size > 1e4 * TOLERANCE and 0 <= found.rank < even.size for found in report.wrong)


def test_there_are_20_planted_errors():
    assert len({fault.plant for fault in FAULTS}) == len(FAULTS) == 20


def logit_of_the_target_not_summed(patch):
    """Of the sums of a split softmax (exponentials, target logits) the second stays as it was on each rank."""
    reduce = Group.all_reduce

    def not_summed(self, x, op="sum"):
        own = +x[1] if (self.name, op, x.ndim, len(x)) == ("tp", "sum", 2, 2) else None
        result = reduce(self, x, op)
        if own is not None:
            result[1] = own
        return result
    patch.setattr(Group, "all_reduce", not_summed)


def norm_counts_every_copy(patch):
    square_sum = Gradients.square_sum
    patch.setattr(Gradients, "square_sum", lambda self: square_sum(self) * (2 if self.buckets[0].group.size > 1 else 1))


@pytest.mark.parametrize("plant, mesh, what", [
    (logit_of_the_target_not_summed, {"tp": 2}, "loss of step 1"), (norm_counts_every_copy, {}, "gradient norm of step 1")])
def test_a_number_that_differs_alone_is_named(even, monkeypatch, plant, mesh, what):
    plant(monkeypatch)
    wrong = report_of(job_of(mesh=mesh, optimizer={"clip": 0.0}), even).wrong
    assert (wrong[0].what, wrong[0].tensor, wrong[0].rank) == (what, None, None) and len(wrong) == 2


def spoil(monkeypatch, group, name, change):
    """On the last rank, `change` is added to a tensor with each update."""
    step = AdamW.step

    def spoilt(self, *numbers):
        step(self, *numbers)
        for parameter in (parameter for bucket in self.buckets for parameter in bucket.parameters):
            if parameter.name == name and group.size > 1 and group.rank == group.size - 1:
                parameter.master += change * parameter.master
    monkeypatch.setattr(AdamW, "step", spoilt)


@pytest.mark.parametrize("change, what", [
    (1e-14, "copies on several ranks"), (np.nan, "weights after step 1"), (np.inf, "weights after step 1")])
def test_copies_that_drift_apart_and_what_is_no_number(even, monkeypatch, change, what):
    spoil(monkeypatch, even, "blocks.1.mlp.up.weight", change)
    report = report_of(job_of(mesh={"zero": 0}), even)
    assert [(found.tensor, found.rank, found.what) for found in report.wrong] == [("blocks.1.mlp.up.weight", even.size - 1, what)]


LAYOUTS = {     # sections of a job, by the axis that takes all ranks
    "tp": {"mesh": {"dp": 1}},
    "pp": {"mesh": {"dp": 1, "schedule": "gpipe"}},
    "cp": {"mesh": {"dp": 1, "zero": 3}, "train": {"recompute": "block"}},
    "dp": {"model": {"tied": False}, "train": {"recompute": "selective"}},
}


@pytest.mark.parametrize("axis", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_right_layout_is_verified_on_any_number_of_ranks(group, family, axis):
    sections = LAYOUTS[axis]
    report = report_of(job_of(family, **sections | {"model": {"heads": 12} | sections.get("model", {}),
                                                    "mesh": sections.get("mesh", {}) | {axis: group.size}}), group)
    assert not report.wrong and report.worst.size < 1e-12


def test_the_small_job_keeps_what_the_layout_works_on():
    job = job_of(model={"kv_heads": 2, "dropout": 0.1, "layers": 40}, train={"recompute": "selective"},
                 mesh={"pp": 2, "schedule": "interleaved", "chunks": 2, "stages": [0, 25, 14, 1], "tp": 4})
    sizes = {"pp": 2, "dp": 3, "cp": 1, "tp": 4, "ep": 1}
    small = small_job(job, sizes)
    assert small.mesh.stages == [0, 2, 2, 1] and small.model.layers == 5
    assert (small.model.heads, small.model.kv_heads, small.model.dropout, small.train.recompute) == (4, 2, 0.1, "selective")
    assert small.model.mlp_width % 4 and small.model.vocabulary % 4 and small.train.batch % 3
    assert small_job(job_of(), sizes).model.layers == 3 and small_job(job_of(model={"layers": 1}), sizes).model.layers == 1
    assert small_job(job_of(mesh={"cp": 16}), sizes | {"cp": 16}).model.context == 35
