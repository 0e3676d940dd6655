"""`mpillm doctor`: are these nodes, this MPI and this file system fit to run? A table, a verdict, exit code 1 where they are not."""


def add_arguments(parser):
    parser.add_argument("--dir", default="runs", help="where the write test is made (default: runs)")
    parser.add_argument("--device", default="auto", choices=("cpu", "gpu", "auto"), help="where matrix products are timed")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured, in SI units")


def run(arguments):
    import time

    from ..run import launch

    entered, begun = launch.since_start(), time.perf_counter()
    from ..config import UserError
    from ..layout.agreement import agreed
    from ..layout.comm import world
    from ..run.diagnosis import judge, table
    from ..run.doctor import examine

    group, imported = world(), time.perf_counter() - begun
    with agreed(group, UserError, "--json or --dir"):
        if group.rank == 0:
            check(arguments)
    judged = judge(examine(group, arguments.device, arguments.dir, entered, imported))
    with agreed(group, UserError, f"--json {arguments.json}"):
        if group.rank == 0:
            print("\n".join(table(judged)), flush=True)
            if arguments.json:
                write(judged, arguments.json)
    return 1 if judged["problems"] else 0


def check(arguments):
    """Refuses options that can only be mistakes, before anything is measured."""
    from pathlib import Path

    from ..config import UserError

    file, folder = Path(arguments.json or "doctor.json").absolute(), Path(arguments.dir).absolute()
    if not file.parent.is_dir():
        raise UserError(f"--json {arguments.json}: its folder does not exist; make it first")
    if file.is_dir():
        raise UserError(f"--json {arguments.json}: is a folder; name a file")
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not above.is_dir():
        raise UserError(f"--dir {arguments.dir}: {above} is not a folder; name one, or one that can be made")


def write(judged, path):
    import json

    from ..run.directory import write_atomic

    write_atomic(path, json.dumps(judged, indent=1).encode() + b"\n")
