"""`mpillm submit JOB.toml --site NAME`: the Slurm script of a job; prints it, `--now` hands it to sbatch."""


def add_arguments(parser):
    parser.add_argument("job", metavar="JOB.toml", help="job file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="fields that replace those of the file")
    parser.add_argument("--site", required=True, help="a name of slurm/sites, or the path of a profile of your own")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, help="one a GPU, or as the profile says, when left out")
    parser.add_argument("--time", default="01:00:00", help="wall time of the job, or of a link, as sbatch takes it")
    parser.add_argument("--account", help="the project that pays")
    parser.add_argument("--partition")
    parser.add_argument("--qos")
    parser.add_argument("--links", type=int, default=1, help="a chain of so many jobs, one after the other, that train one model")
    parser.add_argument("--venv", default=".venv", help="made by jobs/setup.sh; a path as it is: variables in it are for your shell")
    parser.add_argument("--now", action="store_true", help="submit it")


def run(arguments):
    import subprocess

    from ..config import UserError, read_job
    from ..run.submit import Request, read_site, render

    for option in ("nodes", "ranks_per_node", "links"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: expected 1 or more")
    job = read_job(arguments.job, arguments.overrides)
    request = Request(arguments.job, arguments.overrides, arguments.nodes, arguments.ranks_per_node, arguments.time, arguments.account,
                      arguments.partition, arguments.qos, arguments.links, arguments.venv)
    script = render(job, read_site(arguments.site, job.run.device == "gpu"), request)
    if not arguments.now:
        print(script, end="")
        return 0
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--now: sbatch cannot be started here ({error.strerror}); run this on a login node, or print the script without --now") from None
    if done.returncode:
        raise UserError(f"--now: sbatch refused the script: {' '.join(done.stderr.split())}")
    print(f"submitted job {done.stdout.strip()}")
    return 0
