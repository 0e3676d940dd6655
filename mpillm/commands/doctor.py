"""`mpillm doctor`: are these nodes, this MPI and this file system fit to run? A table, a verdict, exit code 1 where they are not."""


def add_arguments(parser):
    parser.add_argument("--dir", default="runs", help="where the write test is made (default: runs)")
    parser.add_argument("--device", default="auto", choices=("cpu", "gpu", "auto"), help="where matrix products are timed")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured, in SI units")


def run(arguments):
    import json
    from pathlib import Path

    from ..config import UserError
    from ..layout.agreement import agreed
    from ..layout.comm import world
    from ..run.diagnosis import judge, table
    from ..run.directory import write_atomic
    from ..run.doctor import examine

    group = world()
    with agreed(group, UserError, "--json"):
        if group.rank == 0 and arguments.json and not Path(arguments.json).absolute().parent.is_dir():
            raise UserError(f"--json {arguments.json}: its folder does not exist; make it first")
    judged = judge(examine(group, arguments.device, arguments.dir))
    with agreed(group, UserError, f"--json {arguments.json}"):
        if group.rank == 0:
            print("\n".join(table(judged)))
            if arguments.json:
                write_atomic(arguments.json, json.dumps(judged, indent=1).encode() + b"\n")
    return 1 if judged["problems"] else 0
