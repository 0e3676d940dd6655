"""`mpillm train JOB.toml [section.key=value ...]`: trains a model; goes on by itself where the run directory has a checkpoint."""


def add_arguments(parser):
    parser.add_argument("job", metavar="JOB.toml", help="job file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="fields that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="print model size, layout, bytes of a rank and steps; train nothing")
    parser.add_argument("--ranks", type=int, help="with --dry-run: the number of ranks to plan for")


def run(arguments):
    from dataclasses import replace

    from ..config import UserError
    from ..layout.comm import world
    from ..layout.compose import check_layout
    from ..layout.mesh import sizes_of
    from ..run import launch
    from ..run.connect import connect
    from ..run.data import TrainingData
    from ..run.progress import bytes_text
    from ..run.session import open_device, shared_job

    if arguments.ranks is not None and (not arguments.dry_run or arguments.ranks < 1):
        raise UserError(f"--ranks {arguments.ranks}: expected 1 or more, together with --dry-run; a real run has the ranks it was started with")
    group = world()
    launch.moment("program")
    job = shared_job(arguments.job, arguments.overrides, group)
    data = TrainingData(job, group)
    if job.model.vocabulary is None:
        job = replace(job, model=replace(job.model, vocabulary=data.vocabulary))
    launch.moment("data")
    sizes = sizes_of(job.mesh, arguments.ranks or group.size)
    check_layout(job, sizes)
    if arguments.dry_run:
        if group.rank == 0:
            from ..run.plan import table
            print("\n".join(table(job, sizes, data.vocabulary)))
        return 0
    ops = open_device(job.run.device, job.precision.compute, group)
    ops.tf32 = job.precision.tf32
    group, line = connect(group, ops, job.communication.transport)
    if job.run.device != "cpu":
        from ..run.plan import reserve
        plan = reserve(job, sizes, data.vocabulary, ops, group)
        try:
            return _train(job, sizes, data, group, ops, line)
        except MemoryError as error:
            raise MemoryError(f"{error}; planned: {plan.held()}, activations {bytes_text(plan.activations)}; {plan.remedy(job, sizes)}") from error
    return _train(job, sizes, data, group, ops, line)


def _train(job, sizes, data, group, ops, line):
    """Builds what a run needs around the Training, and ends it in order."""
    import os

    from ..layout.journal import JOURNAL
    from ..run import faults, recovery
    from ..run.directory import RunDirectory
    from ..run.life import Life
    from ..run.session import check_vocabulary
    from ..run.signals import StopFlag
    from ..run.walltime import WallTime

    check_vocabulary(job, data.vocabulary)
    recovery.check(job, group)
    with RunDirectory(os.path.join("runs", job.run.name), group) as directory, StopFlag(group, WallTime(job.run.time_limit), directory.wish) as stop:
        life = Life(job, data, ops, line, directory, stop)
        faults.install(JOURNAL, group.rank, life.faults())
        return recovery.run(life, sizes, group)
