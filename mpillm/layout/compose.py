"""Which layouts a job may have: the rules that refuse, each with the sizes that work, and the table of what composes.

`python -m mpillm.layout.compose` prints the table of README.md; a test keeps the two the same.
"""

from typing import NamedTuple

from ..config import UserError
from .mesh import uneven_experts


class Rule(NamedTuple):
    """A condition of one or two features.

    features : names from `FEATURES`, the pair whose cell shows `text` (one feature: its own cell)
    text : the condition, for the table
    broken : (model section, mesh section, sizes) -> line that refuses, or None
    """
    features: tuple
    text: str
    broken: object


FEATURES = ("dp", "tp", "sequence", "pp", "interleaved", "zero_bubble", "cp ring", "cp ulysses", "ep", "ZeRO 1-3", "recompute")


def _numbers(found):
    return ", ".join(map(str, found)) or "none"


def _heads(model, mesh, sizes):
    tp = sizes["tp"]
    if model.heads % tp:
        return f"mesh: tp={tp} does not divide model.heads={model.heads}; use tp of {_numbers(_dividing(model.heads, _kv_of(model)))}"


def _kv_of(model):
    return model.kv_heads or model.heads


def _fits(kv_heads, ranks):
    """Whether each rank can have whole key/value heads, or whole groups of ranks one of them."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def _dividing(heads, kv_heads):
    """The numbers of ranks that the heads can be dealt to."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and _fits(kv_heads, n)]


def _kv_heads(model, mesh, sizes):
    tp, kv = sizes["tp"], _kv_of(model)
    if not _fits(kv, tp):
        return f"mesh: tp={tp} neither divides model.kv_heads={kv} nor is a multiple of it; use tp of {_numbers(_dividing(model.heads, _kv_of(model)))}"


def _ring(model, mesh, sizes):
    if mesh.cp_form == "ring" and 1 < sizes["cp"] and 2 * sizes["cp"] > model.context:
        return f"mesh: cp={sizes['cp']} needs 2 cp = {2 * sizes['cp']} blocks of a sequence of model.context={model.context} tokens; use cp of 1 to {max(1, model.context // 2)}"


def _ulysses(model, mesh, sizes):
    cp, heads, kv = sizes["cp"], model.heads // sizes["tp"], max(1, _kv_of(model) // sizes["tp"])
    if mesh.cp_form != "ulysses" or cp == 1:
        return None
    good = [n for n in _dividing(heads, kv) if n <= model.context]
    if cp not in good:
        return (f"mesh: cp={cp} with cp_form = \"ulysses\" has to divide the {heads} query heads of a tp rank, and to divide its {kv} key/value "
                f"heads or be a multiple of them; use cp of {_numbers(good)}, or cp_form = \"ring\"")


def _experts(model, mesh, sizes):
    if uneven_experts(sizes):
        return uneven_experts(sizes)
    if sizes["ep"] > 1 and not model.experts:
        return f"mesh: ep={sizes['ep']} with model.experts=0: there are no experts to split; use ep = 1, or set model.experts"
    if sizes["ep"] > max(1, model.experts):
        good = [n for n in range(1, model.experts + 1) if sizes["dp"] * sizes["cp"] % n == 0]
        return f"mesh: ep={sizes['ep']} is more than model.experts={model.experts}; use ep of {_numbers(good)}"


def _chunks(model, mesh, sizes):
    if mesh.schedule == "interleaved" and (sizes["pp"] == 1 or mesh.chunks == 1):
        return f"mesh: schedule = \"interleaved\" with pp={sizes['pp']}, chunks={mesh.chunks}: it needs 2 or more of both; use \"1f1b\" else"
    if mesh.schedule != "interleaved" and mesh.chunks > 1:
        return f"mesh: chunks={mesh.chunks} with schedule = \"{mesh.schedule}\": only \"interleaved\" has several parts on a stage; use chunks = 1"


def _stages(model, mesh, sizes):
    if mesh.stages is None:
        return None
    parts = sizes["pp"] * mesh.chunks
    good = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in mesh.stages)
    if not good or len(mesh.stages) != parts or sum(mesh.stages) != model.layers:
        return (f"mesh: stages = {mesh.stages}: expected {parts} whole numbers (pp x chunks) whose sum is model.layers={model.layers}; "
                "leave stages out to have the blocks dealt by cost")


RULES = (
    Rule(("tp",), "tp divides heads", _heads),
    Rule(("tp",), "tp divides kv_heads, or is a multiple of them", _kv_heads),
    Rule(("cp ring",), "2 cp <= context", _ring),
    Rule(("cp ulysses",), "cp <= context; cp divides heads, and divides kv_heads or is a multiple of them", _ulysses),
    Rule(("tp", "cp ulysses"), "tp x cp divides heads", _ulysses),
    Rule(("ep",), "ep divides dp x cp; ep <= experts", _experts),
    Rule(("interleaved",), "pp >= 2, chunks >= 2", _chunks),
    Rule(("pp",), "stages, if given, sum up to layers", _stages),
)
INSTEAD = ({"cp ring", "cp ulysses"}, {"interleaved", "zero_bubble"})     # of these a job has one at most


def check_layout(job, sizes):
    """Refuses a layout that the job's model cannot have.

    Parameters
    ----------
    job : Job
    sizes : dict
        Axis sizes, as of `mesh.sizes_of`.

    Raises
    ------
    UserError
        One line with what was found and the sizes that work.
    """
    for line in [*(rule.broken(job.model, job.mesh, sizes) for rule in RULES), *_of_gpus(job, sizes)]:
        if line:
            raise UserError(line)


def _of_gpus(job, sizes):
    """What GPUs cannot do."""
    model = job.model
    if job.run.device == "cpu":
        return
    from ..backend.cuda.attention import WIDEST
    from ..backend.cuda.routing import MOST_CHOSEN
    if model.channels > WIDEST:
        remedy = f"set model.head_width to {WIDEST} or less" if model.head_width else f"raise model.heads to {-(-model.width // WIDEST)} or more"
        yield f'run.device = "{job.run.device}": heads are {model.channels} wide, at most {WIDEST} on a GPU; {remedy}'
    if model.experts and model.experts_per_token > MOST_CHOSEN:
        yield f'run.device = "{job.run.device}": model.experts_per_token={model.experts_per_token}, at most {MOST_CHOSEN} on a GPU'
    if job.communication.transport == "nccl" and sizes["pp"] > 1:
        yield (f'communication.transport = "nccl": with pp={sizes["pp"]} stages that send to each other at once would wait for ever, as NCCL takes '
               'messages in order; use "auto", or pp = 1')


def table():
    """The table of what composes, in Markdown: every pair of features, and each by itself on the diagonal."""
    notes, rows = [], []
    for row in FEATURES:
        cells = []
        for column in FEATURES:
            texts = [rule.text for rule in RULES if set(rule.features) == {row, column}]
            for text in texts:
                if text not in notes:
                    notes.append(text)
            marks = ", ".join(str(notes.index(text) + 1) for text in texts)
            cells.append("-" if {row, column} in INSTEAD else "yes" + (f" ({marks})" if marks else ""))
        rows.append(f"| {row} | " + " | ".join(cells) + " |")
    head = ["| | " + " | ".join(FEATURES) + " |", "|" + "---|" * (len(FEATURES) + 1)]
    return "\n".join(head + rows + [""] + [f"{number}. {text}" for number, text in enumerate(notes, 1)])


if __name__ == "__main__":
    print(table())
