"""`mpillm verify JOB.toml [section.key=value ...]`: this layout against one rank: loss, every gradient and two steps in float64."""


def add_arguments(parser):
    parser.add_argument("job", metavar="JOB.toml", help="job file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="fields that replace those of the file")
    parser.add_argument("--full", action="store_true",
                        help="the job's own model and batch, not a small version of them; rank 0 has to hold the whole model in float64")
    parser.add_argument("--all", action="store_true", help="a row for every tensor; one for the worst block of each kind when left out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--order", action="store_true", help="compute nothing, prove that the calls of all ranks match and cannot deadlock")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --order: the number of ranks to check for")


def run(arguments):
    """Prints the comparison; returns 0, or 1 where the layout differs from one rank.

    Raises
    ------
    UserError
        A layout that the job cannot have; with --full a vocabulary that nothing tells.
    """
    from ..config import UserError
    from ..layout.comm import world
    from ..layout.compose import check_layout
    from ..layout.mesh import sizes_of
    from ..run.session import shared_job

    if arguments.ranks is not None and (not arguments.order or arguments.ranks < 1):
        raise UserError(f"--ranks {arguments.ranks}: expected 1 or more, together with --order; else verify has those it was started with")
    group = world()
    job = shared_job(arguments.job, arguments.overrides, group)
    sizes = sizes_of(job.mesh, arguments.ranks or group.size)
    check_layout(job, sizes)
    if arguments.order:
        from ..layout.agreement import on_root
        from ..run.order import order_report
        return on_root(group, UserError, "verify --order", lambda: order_report(job, sizes))
    return _compare(job, sizes, group, arguments)


def _compare(job, sizes, group, arguments):
    from ..run.verify import compare, in_float64, small_job

    job = in_float64(_with_vocabulary(job, group) if arguments.full else small_job(job, sizes))
    heading = [] if group.rank or arguments.json else _heading(job, sizes, arguments.full)
    report = compare(job, group, lambda: print(*heading, sep="\n", end="\n" * bool(heading), flush=True))
    if group.rank == 0:
        print(_json(report, job, sizes) if arguments.json else "\n".join([*_table(report, arguments.all), _verdict(report, job, sizes)]))
    return 1 if report.wrong else 0


def _with_vocabulary(job, group):
    """The job with the vocabulary of its token file, where it gives none."""
    from dataclasses import replace

    from ..config import UserError
    from ..run.data import TrainingData

    if job.model.vocabulary is not None:
        return job
    try:
        vocabulary = TrainingData(job, group).vocabulary
    except UserError as error:
        raise UserError(f"verify --full needs a vocabulary: {error}; or set model.vocabulary, or leave --full out") from None
    return replace(job, model=replace(job.model, vocabulary=vocabulary))


def _heading(job, sizes, full):
    from ..run.plan import needs
    from ..run.progress import bytes_text
    from ..run.verify import on_one_rank

    model, train = job.model, job.train
    kind = f"{model.family}, {model.layers} layer{'s' * (model.layers > 1)}, width {model.width}, {model.heads} heads" \
           + (f", {model.kv_heads} of keys" if model.kv_heads else "") + (f", {model.experts} experts" if model.experts else "") \
           + f", context {model.context}, vocabulary {model.vocabulary}"
    yield f"{'the whole model' if full else 'a small version'}: {kind}; 2 steps of {train.batch} random samples in float64"
    yield f"{_layout(job, sizes)} against one rank"
    if full:
        alone = needs(on_one_rank(job, sizes), dict.fromkeys(sizes, 1), model.vocabulary)
        yield f"rank 0 also runs the job alone: about {bytes_text(alone.peak)} more on its node"


def _layout(job, sizes):
    from ..layout.mesh import AXES, num_ranks_of

    ranks = num_ranks_of(sizes)
    axes = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1)
    more = [f"ep={sizes['ep']}"] * (sizes["ep"] > 1) + [f"zero={job.mesh.zero}"]
    more += [job.mesh.schedule] * (sizes["pp"] > 1) + [job.mesh.cp_form] * (sizes["cp"] > 1) + [f"recompute {job.train.recompute}"]
    return f"{ranks} rank{'s' * (ranks > 1)} ({', '.join([axes] * bool(axes) + more)})"


def _table(report, every):
    """Lines: tensor, split, its largest relative differences, and where the largest of them is."""
    from ..run.verify import LOOKS

    kinds = {}
    for row in report.rows:
        kinds.setdefault(row.tensor if every else _kind(row.tensor), []).append(row)
    lines = [("tensor", "split", "gradient 1", "weights 1", "gradient 2", "weights 2", "largest on")]
    for kind, rows in kinds.items():
        columns = [max(row.differences[look] for row in rows) for look in range(len(LOOKS) - 1)]
        worst = max(rows, key=lambda row: max(row.differences[:-1]))
        rank = worst.ranks[worst.differences.index(max(worst.differences[:-1]))]
        where = f"rank {rank}" + (f", block {worst.tensor.split('.')[1]}" if kind != worst.tensor else "")
        lines.append((kind, worst.split, *map(_number, columns), where))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
    return ["", *lines, "", ", ".join(f"{name} {_number(size)}" for name, size in report.numbers.items())]


def _kind(tensor):
    """blocks.3.mlp.up.weight -> blocks.*.mlp.up.weight"""
    parts = tensor.split(".")
    return ".".join(["blocks", "*", *parts[2:]]) if parts[0] == "blocks" else tensor


def _number(difference):
    return "-" if difference < 0 else "0" if difference == 0 else f"{difference:.1e}"


def _verdict(report, job, sizes):
    """The last line; where tensors differ, what else is known stands in a line before it."""
    from ..run.verify import TOLERANCE

    layout = _layout(job, sizes)
    if not report.wrong:
        worst = report.worst
        where = f"{worst.what} of {worst.tensor} on rank {worst.rank}" if worst.tensor else worst.what
        return f"verified: {layout} equal{'s' * layout.startswith('1 ')} one rank: worst {worst.size:.1e} ({where})"
    worst, last = max(report.wrong, key=lambda found: found.size), report.wrong[-1]
    if worst.tensor is None:
        return f"differs: {worst.what} by {worst.size:.1e}; every tensor is equal"
    lines = [f"{worst.what}: {len(report.wrong)} of {len(report.rows)} tensors differ"]
    if worst.what.startswith("gradient"):
        loss = report.numbers[f"loss of {worst.what[-6:]}"]
        lines[0] += (f"; its loss differs by {loss:.1e}: look in the forward" if loss > TOLERANCE else
                     f"; its loss is equal: look in the backward of {last.tensor}, the first to differ there, on rank {last.rank}")
    lines.append(f"differs: {worst.tensor} on rank {worst.rank} ({_place(worst.rank, sizes)}): {worst.what} by {worst.size:.1e}")
    return "\n".join(lines)


def _place(rank, sizes):
    """Where a rank stands on the axes of several ranks."""
    from ..layout.mesh import coordinates

    return ", ".join(f"{axis}={place}" for axis, place in coordinates(sizes, rank).items() if sizes[axis] > 1) or "alone"


def _json(report, job, sizes):
    import json
    import math

    from ..run.verify import LOOKS, TOLERANCE

    def plain(size):
        """JSON has no infinity: null."""
        return size if math.isfinite(size) else None

    def found(each):
        return {"tensor": each.tensor, "rank": each.rank, "what": each.what, "difference": plain(each.size)}
    def looks(row):
        return {look: {"difference": plain(size), "rank": rank} for look, size, rank in zip(LOOKS, row.differences, row.ranks) if size >= 0}
    tensors = [{"tensor": row.tensor, "split": row.split, "looks": looks(row)} for row in report.rows]
    return json.dumps({
        "verified": not report.wrong, "tolerance": TOLERANCE, "mesh": sizes | {"zero": job.mesh.zero},
        "numbers": {name: plain(size) for name, size in report.numbers.items()}, "tensors": tensors,
        "worst": found(report.worst), "wrong": [found(each) for each in sorted(report.wrong, key=lambda each: -each.size)]}, indent=1)
