"""Which layouts a job may have: every rule refuses with its line, and the sizes that it names can be trained with."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.config import UserError, job_from_dict
from mpillm.layout.compose import FEATURES, INSTEAD, RULES, check_layout, table
from mpillm.layout.mesh import sizes_of
from mpillm.run.plan import needs

ROOT = Path(__file__).resolve().parents[2]
MARKERS = re.compile(r"<!-- layouts -->\n(.*?)\n<!-- /layouts -->", re.DOTALL)


def job_of(mesh=None, **model):
    """12 heads, 4 key/value heads, 3 layers, 10 tokens; None leaves a key out."""
    values = {"family": "llama", "layers": 3, "width": 48, "heads": 12, "kv_heads": 4, "mlp_width": 7, "context": 10, "vocabulary": 11}
    values = {name: value for name, value in (values | model).items() if value is not None}
    return job_from_dict({"model": values, "data": {"train": "random"}, "mesh": mesh or {}, "train": {"steps": 1, "batch": 2},
                          "run": {"name": "test"}}, "test")


def ranks_of(job):
    """The fewest ranks that the job's mesh needs."""
    mesh, ranks = job.mesh, 1
    for axis in ("pp", "cp", "tp"):
        ranks *= getattr(mesh, axis)
    while ranks // (mesh.pp * mesh.tp) % mesh.ep:
        ranks += mesh.pp * mesh.cp * mesh.tp
    return ranks


def refusal(job, ranks=None):
    """The line that refuses the job's layout on so many ranks, the fewest it needs when left out; or None."""
    try:
        check_layout(job, sizes_of(job.mesh, ranks or ranks_of(job)))
    except UserError as error:
        return str(error)


def trains(job):
    """Whether every kind of rank of the layout can play a step, planned and without data."""
    sizes = sizes_of(job.mesh, ranks_of(job))
    per_stage = sizes["dp"] * sizes["cp"] * sizes["tp"]
    return all(needs(job, sizes, 11, rank).flops > 0
               for rank in {stage * per_stage + place for stage in range(sizes["pp"]) for place in (0, per_stage - 1)})


ULYSSES = ('mesh: cp={} with cp_form = "ulysses" has to divide the {} query heads of a tp rank, and to divide its {} key/value heads or be '
           'a multiple of them; use cp of {}, or cp_form = "ring"')
INTERLEAVED = 'mesh: schedule = "interleaved" with pp={}, chunks={}: it needs 2 or more of both; use "1f1b" else'
CHUNKS = 'mesh: chunks={} with schedule = "{}": only "interleaved" has several parts on a stage; use chunks = 1'
STAGES = ("mesh: stages = {}: expected {} whole numbers (pp x chunks) whose sum is model.layers=3; "
          "leave stages out to have the blocks dealt by cost")
REFUSED = [     # mesh, model, line, what replaces the axis
    ({"tp": 5}, {}, "mesh: tp=5 does not divide model.heads=12; use tp of 1, 2, 4, 12", ("tp", [1, 2, 4, 12])),
    ({"tp": 24}, {}, "mesh: tp=24 does not divide model.heads=12; use tp of 1, 2, 4, 12", ("tp", [1, 2, 4, 12])),
    ({"tp": 8}, {"kv_heads": None}, "mesh: tp=8 does not divide model.heads=12; use tp of 1, 2, 3, 4, 6, 12", ("tp", [1, 2, 3, 4, 6, 12])),
    ({"tp": 3}, {}, "mesh: tp=3 neither divides model.kv_heads=4 nor is a multiple of it; use tp of 1, 2, 4, 12", ("tp", [1, 2, 4, 12])),
    ({"tp": 4}, {"kv_heads": 6}, "mesh: tp=4 neither divides model.kv_heads=6 nor is a multiple of it; use tp of 1, 2, 3, 6, 12",
     ("tp", [1, 2, 3, 6, 12])),
    ({"cp": 6}, {}, "mesh: cp=6 needs 2 cp = 12 blocks of a sequence of model.context=10 tokens; use cp of 1 to 5",
     ("cp", [1, 2, 3, 4, 5])),
    ({"cp": 2}, {"context": 1}, "mesh: cp=2 needs 2 cp = 4 blocks of a sequence of model.context=1 tokens; use cp of 1 to 1", ("cp", [1])),
    ({"cp": 5, "cp_form": "ulysses"}, {}, ULYSSES.format(5, 12, 4, "1, 2, 4"), ("cp", [1, 2, 4])),
    ({"cp": 3, "cp_form": "ulysses"}, {}, ULYSSES.format(3, 12, 4, "1, 2, 4"), ("cp", [1, 2, 4])),
    ({"cp": 12, "cp_form": "ulysses"}, {}, ULYSSES.format(12, 12, 4, "1, 2, 4"), ("cp", [1, 2, 4])),        # of 10 tokens
    ({"cp": 12, "cp_form": "ulysses", "tp": 2}, {"context": 30}, ULYSSES.format(12, 6, 2, "1, 2, 6"), ("cp", [1, 2, 6])),
    ({"cp": 2, "cp_form": "ulysses", "tp": 12}, {}, ULYSSES.format(2, 1, 1, "1"), ("cp", [1])),
    ({"ep": 2}, {}, "mesh: ep=2 with model.experts=0: there are no experts to split; use ep = 1, or set model.experts", ("ep", [1])),
    ({"ep": 4}, {"experts": 3}, "mesh: ep=4 is more than model.experts=3; use ep of 1, 2", ("ep", [1, 2])),
    ({"schedule": "interleaved"}, {}, INTERLEAVED.format(1, 1), ("schedule", ["1f1b"])),
    ({"schedule": "interleaved", "pp": 2}, {}, INTERLEAVED.format(2, 1), ("chunks", [2, 3])),
    ({"schedule": "interleaved", "chunks": 2}, {}, INTERLEAVED.format(1, 2), ("pp", [2, 3])),
    ({"chunks": 2, "pp": 2}, {}, CHUNKS.format(2, "1f1b"), ("chunks", [1])),
    ({"chunks": 3, "schedule": "gpipe"}, {}, CHUNKS.format(3, "gpipe"), ("chunks", [1])),
    *(({"pp": 2, "stages": stages}, {}, STAGES.format(stages, 2), ("stages", [None, [2, 1], [0, 3]]))
      for stages in ([3], [1, 1], [1, 1, 1], [4, -1], [1.5, 1.5], [True, 2], ["3", 0], [])),
    ({"pp": 2, "chunks": 2, "schedule": "interleaved", "stages": [2, 1]}, {}, STAGES.format([2, 1], 4),
     ("stages", [None, [1, 1, 1, 0], [0, 0, 0, 3]])),
]


@pytest.mark.parametrize("mesh, model, line, instead", REFUSED, ids=[f"{mesh} {model}" for mesh, model, *_ in REFUSED])
def test_a_layout_that_cannot_be_is_refused_with_what_can(mesh, model, line, instead):
    assert refusal(job_of(mesh, **model)) == line
    key, values = instead
    for value in values:
        job = job_of({name: given for name, given in (mesh | {key: value}).items() if given is not None}, **model)
        assert refusal(job) is None and trains(job), value
    if isinstance(values[0], int) and key in ("tp", "cp", "ep"):
        others = [value for value in range(1, 25) if value not in values]
        ranks = ranks_of(job_of(mesh, **model)) if key == "ep" else None        # ep is carved out of the ranks that there are
        assert all(refusal(job_of(mesh | {key: value}, **model), ranks) for value in others)     # no size that works is left out


def test_every_rule_is_tried():
    tried = set()
    for mesh, model, line, _ in REFUSED:
        job = job_of(mesh, **model)
        tried |= {rule.broken for rule in RULES if rule.broken(job.model, job.mesh, sizes_of(job.mesh, ranks_of(job))) == line}
    assert tried == {rule.broken for rule in RULES}


def test_ring_needs_nothing_of_the_heads_and_ulysses_nothing_of_the_blocks():
    assert refusal(job_of({"cp": 5, "tp": 4})) is None
    assert refusal(job_of({"cp": 4, "cp_form": "ulysses"}, context=4)) is None and refusal(job_of({"cp": 4}, context=4)) is not None


@pytest.mark.parametrize("family, experts", [("gpt", 0), ("llama", 0), ("llama", 3)])
@pytest.mark.parametrize("zero", [0, 3])
def test_whatever_is_not_refused_can_be_trained_with(family, experts, zero):
    """Some sizes up to 3 of a model with fewer layers than parts and uneven everything else; each is refused or plays a step."""
    accepted, schedules, kv_heads = 0, (("zero_bubble", 1), ("interleaved", 2)), 3 if family == "llama" else None
    for pp, cp, tp, ep, (schedule, chunks), form in itertools.product((1, 3), (1, 2), (1, 3), (1, 2), schedules, ("ring", "ulysses")):
        mesh = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "schedule": schedule, "chunks": chunks, "cp_form": form, "zero": zero}
        job = job_of(mesh, family=family, heads=6, width=24, layers=2, kv_heads=kv_heads, experts=experts, context=7)
        if refusal(job) is None:
            accepted += 1
            assert trains(job), mesh
    assert accepted >= 12


# -- the table ----------------------------------------------------------------------------------------------------

def rows_of(text):
    """{(row, column): cell} and the notes {number: text}."""
    lines = text.splitlines()
    cut = lines.index("")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:cut]]
    notes = dict(line.split(". ", 1) for line in lines[cut + 1:])
    return {(row[0], column): cell for row in cells[2:] for column, cell in zip(cells[0][1:], row[1:])}, notes


def test_the_table_shows_every_pair_and_every_rule():
    cells, notes = rows_of(table())
    assert set(cells) == set(itertools.product(FEATURES, FEATURES))
    assert set(notes.values()) == {rule.text for rule in RULES}
    for (row, column), cell in cells.items():
        assert cell == cells[column, row]
        assert (cell == "-") == ({row, column} in INSTEAD)
        marks = re.findall(r"\d+", re.fullmatch(r"-|yes(?: \((\d+(?:, \d+)*)\))?", cell).group(1) or "")
        assert {notes[mark] for mark in marks} == {rule.text for rule in RULES if set(rule.features) == {row, column}}


def test_the_table_is_printed():
    done = subprocess.run([sys.executable, "-m", "mpillm.layout.compose"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (table() + "\n", "", 0)


def test_the_table_of_the_readme_is_this_one():
    found = MARKERS.findall((ROOT / "README.md").read_text())
    assert len(found) == 1, "README.md has the table between <!-- layouts --> and <!-- /layouts -->, once"
    assert found[0].strip() == table(), "README.md is behind: python -m mpillm.layout.compose prints the table"
