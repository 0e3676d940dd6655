"""Layouts for the proof that each equals one rank: what a case is, all cases of a number of ranks, and few with every pair of features.

A case is one value of each feature below; None where the layout leaves no choice (a schedule with one stage, say). What is
valid is asked of `sizes_of` and `check_layout`. `selection()` are the cases of the daily tests: every two values that are
possible together at all are together in one of them (pairwise covering, by the greedy algorithm of Cohen et al. 1997, "The
AETG system", over candidates drawn at random), and every factorisation of every number of ranks is among them.
`every_case(n)` are all products of axes, ZeRO stage, recompute, schedule and family, the other features drawn at random.
"""

import functools
import heapq
import itertools
import json
import random
from typing import NamedTuple

from small_jobs import job_of
from mpillm.config import UserError, divisors
from mpillm.layout.comm import Group, world
from mpillm.layout.compose import check_layout
from mpillm.layout.mesh import sizes_of
from mpillm.layout.slab import cut

NUM_RANKS = (1, 2, 3, 4, 6, 8)
AXES = ("dp", "pp", "cp", "tp", "ep")
COST = {1: 1, 2: 2, 3: 3, 4: 4, 6: 10, 8: 16}      # of a case of that many ranks on 2 cores, roughly
DRAWN = 3               # candidates of each structure


class Case(NamedTuple):
    """A layout, a model and a batch. The first eight features are the structure; the choices of the others follow from it alone."""
    family: str         # gpt, llama; moe: llama with experts
    dp: int
    pp: int
    cp: int
    tp: int
    ep: int
    schedule: str
    cp_form: str
    zero: int
    recompute: str
    sequence: bool
    tied: bool
    kv_heads: str       # equal to heads; grouped; fewer than tp
    dropout: float
    batch: str          # even over dp; uneven; starved: fewer samples than dp ranks
    micro_batch: str    # whole share; one sample; ragged: does not divide the share
    context: str        # even: 2 cp divides it; odd
    vocabulary: int     # 48: all tp divide it
    mlp_width: int      # 24: all tp divide it
    layers: str         # over the parts of the pipeline: even; uneven; few: parts without blocks
    stages: str         # blocks dealt by cost; by hand
    experts: str        # even over ep; uneven
    shared_experts: int

    @property
    def num_ranks(self):
        return self.dp * self.pp * self.cp * self.tp

    @property
    def num_parts(self):
        """Parts of the pipeline, all stages."""
        return self.pp * (2 if self.schedule == "interleaved" else 1)

    def __str__(self):
        """The layout in short, for the name of a test."""
        axes = "-".join(f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1)
        return "-".join(filter(None, (self.family, axes, f"zero{self.zero}", self.schedule, self.cp_form, self.recompute)))


CHOICES = {         # of the features that are no part of the structure, given the structure
    "zero": lambda case: (0, 1, 2, 3),
    "recompute": lambda case: ("none", "selective", "block"),
    "sequence": lambda case: (True, False) if case.tp > 1 else (None,),
    "tied": lambda case: (True, False),
    "kv_heads": lambda case: ("equal",) if case.family == "gpt" else ("equal", "grouped") + (("fewer",) if case.tp > 1 else ()),
    "dropout": lambda case: (0.0, 0.2),
    "batch": lambda case: ("even", "uneven", "starved") if case.dp > 1 else (None,),
    "micro_batch": lambda case: ("whole", "one", "ragged"),
    "context": lambda case: ("even", "odd"),
    "vocabulary": lambda case: (48, 31),
    "mlp_width": lambda case: (24, 13),
    "layers": lambda case: (None,) if case.pp == 1 else ("even", "uneven", "few") if case.num_parts <= 4 else ("few",),
    "stages": lambda case: ("cost", "hand") if case.pp > 1 else (None,),
    "experts": lambda case: ("even", "uneven") if case.family == "moe" and case.ep > 1 else (None,),
    "shared_experts": lambda case: (0, 1) if case.family == "moe" else (None,),
}


# ---- from a case to a job -------------------------------------------------------------------------------------------

def sections_of(case):
    """The sections of the case's job, as `small_jobs.job_of` takes them."""
    model = _model(case)
    share = 3 if case.pp == 1 else 5        # samples of a dp rank
    batch = {"starved": case.dp - 1, "uneven": case.dp * share - 1}.get(case.batch, case.dp * share)
    mesh = {axis: getattr(case, axis) for axis in ("dp", "pp", "cp", "tp", "ep", "zero")}
    mesh |= {name: getattr(case, name) for name in ("schedule", "cp_form", "sequence") if getattr(case, name) is not None}
    mesh["chunks"] = case.num_parts // case.pp
    if case.stages == "hand":               # the later parts get more
        mesh["stages"] = [cut(model["layers"], case.num_parts, case.num_parts - 1 - part)[1] for part in range(case.num_parts)]
    train = {"batch": batch, "recompute": case.recompute}
    if case.micro_batch != "whole":
        train["micro_batch"] = {"one": 1, "ragged": 2}[case.micro_batch]
    return {"model": model, "mesh": mesh, "train": train}


def _model(case):
    heads, kv_heads = _heads(case)
    parts = case.num_parts
    model = {"layers": {"even": parts, "uneven": parts + 1, "few": max(1, parts // 2)}.get(case.layers, 2),
             "heads": heads, "width": heads * (4 if heads <= 6 else 2), "context": _context(case), "mlp_width": case.mlp_width,
             "vocabulary": case.vocabulary, "tied": case.tied, "dropout": case.dropout}
    if case.family != "gpt":
        model |= {"kv_heads": kv_heads, "qkv_bias": case.kv_heads != "equal"}
        if case.vocabulary == 31:       # heads that together are wider than the model
            model["head_width"] = 6
    if case.family == "moe":
        experts = {1: 3, 2: 4, 3: 6}.get(case.ep, case.ep)
        model |= {"experts": experts + (case.experts == "uneven"), "shared_experts": case.shared_experts}
    return model


def _heads(case):
    """As few heads and key/value heads as the layout can have, at least 4 heads."""
    least = case.tp * (case.cp if case.cp_form == "ulysses" else 1)
    heads = least * -(-4 // least)
    if case.kv_heads == "fewer":
        return heads, case.tp // 2 if case.tp % 2 == 0 else 1
    if case.kv_heads == "grouped":
        heads *= 2 if heads == case.tp else 1
        return heads, heads // next(n for n in (2, 3) if heads // case.tp % n == 0)
    return heads, heads


def _context(case):
    even = 16 if case.cp in (4, 8) else 12
    return even if case.context == "even" else even + 1


def job_of_case(case):
    return job_of("gpt" if case.family == "gpt" else "llama", **sections_of(case))


def line_of(case):
    """The case as overrides of a job file: what a command line takes to have this layout."""
    sections = sections_of(case)
    sections["model"] = {"family": "gpt" if case.family == "gpt" else "llama"} | sections["model"]
    return " ".join(f"{section}.{name}={json.dumps(value, separators=(',', ':'))}"
                    for section, values in sections.items() for name, value in values.items())


def is_valid(case):
    """Whether the package takes the job."""
    try:
        job = job_of_case(case)
        check_layout(job, sizes_of(job.mesh, case.num_ranks))
    except UserError:
        return False
    return True


# ---- all cases ------------------------------------------------------------------------------------------------------

def factorisations(number, count):
    """All ways to write `number` as a product of `count` factors."""
    if count == 1:
        return [(number,)]
    return [(n,) + rest for n in range(1, number + 1) if number % n == 0 for rest in factorisations(number // n, count - 1)]


@functools.cache
def structures(num_ranks):
    """Every valid structure on so many ranks, as Cases whose choices are not made."""
    found = []
    for (dp, pp, cp, tp), family in itertools.product(factorisations(num_ranks, 4), ("gpt", "llama", "moe")):
        schedules = ("gpipe", "1f1b", "interleaved", "zero_bubble") if pp > 1 else (None,)
        forms = ("ring", "ulysses") if cp > 1 else (None,)
        for ep, schedule, form in itertools.product(map(int, divisors(dp * cp).split(",")), schedules, forms):
            structure = Case(family, dp, pp, cp, tp, ep, schedule, form, **dict.fromkeys(CHOICES))
            if is_valid(completed(structure, first_of)):
                found.append(structure)
    return found


def completed(structure, choose, **given):
    """The Case of a structure with the given choices, the others as `choose` takes them from their values."""
    return structure._replace(**{name: given[name] if name in given else choose(values(structure)) for name, values in CHOICES.items()})


def every_case(num_ranks):
    """The full matrix of so many ranks: axes x ZeRO x recompute x schedule x family, each with other choices of the rest."""
    chance, found = random.Random(num_ranks), []
    for structure in structures(num_ranks):
        for zero, recompute in itertools.product(CHOICES["zero"](structure), CHOICES["recompute"](structure)):
            case = completed(structure, chance.choice, zero=zero, recompute=recompute)
            if is_valid(case):
                found.append(case)
    return found


# ---- few cases with all pairs ---------------------------------------------------------------------------------------

def values_of(case):
    """(feature, value) of a case, always in this order; an axis of several ranks has two values, its size and "> 1"."""
    found = []
    for name, value in zip(case._fields, case):
        if value is not None:
            found.append((name, value))
        if name in AXES and value > 1:
            found.append((name, "> 1"))
    return found


def pairs_of(values):
    """The pairs of values of two features."""
    return [(one, other) for one, other in itertools.combinations(values, 2) if one[0] != other[0]]


def features_of(case):
    """What there is to cover and is in this case: pairs of values, and the mesh as a whole."""
    return set(pairs_of(values_of(case))) | {mesh_of(case)}


def mesh_of(case):
    return "mesh", case.dp, case.pp, case.cp, case.tp, case.ep


@functools.cache
def possible():
    """{what is possible to cover: a valid case that has it}"""
    found = {}
    for structure in itertools.chain.from_iterable(map(structures, NUM_RANKS)):
        found.setdefault(mesh_of(structure), completed(structure, first_of))
        choices = [(name, value) for name, values in CHOICES.items() for value in values(structure) if value is not None]
        for pair in pairs_of(values_of(structure) + choices):
            if pair not in found:
                case = completed(structure, first_of, **{name: value for name, value in pair if name in CHOICES})
                if is_valid(case):
                    found[pair] = case
    return found


@functools.cache
def selection():
    """The cases of the daily tests: the candidate that covers most for its cost, until all is covered that is possible."""
    chance, candidates = random.Random(0), list(possible().values())
    for structure in itertools.chain.from_iterable(map(structures, NUM_RANKS)):
        candidates += filter(is_valid, (completed(structure, chance.choice) for _ in range(DRAWN)))
    number = {item: index for index, item in enumerate(possible())}
    masks = [sum(1 << number[item] for item in features_of(case)) for case in candidates]
    missing, chosen = (1 << len(number)) - 1, []
    queue = [(-mask.bit_count() / COST[case.num_ranks], index) for index, (mask, case) in enumerate(zip(masks, candidates))]
    heapq.heapify(queue)
    while missing:      # what a candidate adds only becomes less, so the first whose number is up to date is the best
        _, index = heapq.heappop(queue)
        case, gain = candidates[index], (masks[index] & missing).bit_count()
        if gain and queue and (-gain / COST[case.num_ranks], index) > queue[0]:
            heapq.heappush(queue, (-gain / COST[case.num_ranks], index))
        elif gain:
            missing &= ~masks[index]
            chosen.append(case)
    return chosen


def selection_here():
    """The cases of the daily tests that need as many ranks as this launch has; rank 0 works out which they are. Collective."""
    group = world()
    cases = [Case(*values) for values in group.share(selection() if group.rank == 0 else None)]
    return [case for case in cases if case.num_ranks == group.size]


def first_of(values):
    return values[0]


def free(mesh):
    """Gives the communicators of a mesh back; collective. An MPI library has some thousands of them at most."""
    for group in dict.fromkeys(mesh._groups.values()):
        if isinstance(group, Group) and group is not mesh.world:
            group.handle.Free()
