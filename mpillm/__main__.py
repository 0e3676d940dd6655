"""The command line: finds the command, starts it on every rank, and ends all ranks alike whatever happens.

Nothing heavy is imported here. Exit codes are those of run/ending.py.
"""

import argparse
import importlib
import sys

from . import __version__
from .commands import COMMANDS
from .run import launch


class Parser(argparse.ArgumentParser):
    """argparse with our one-line errors."""

    def error(self, message):
        from .config import UserError
        raise UserError(f"{self.prog.removeprefix('mpillm ')}: {message}; see {self.prog} --help")

    def print_help(self, file=None):
        if launch.rank() == 0:
            super().print_help(file)


def overview():
    """The text of `mpillm --help`."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join([
        "usage: mpillm COMMAND ...", "",
        "Trains and runs large language models as an MPI program, on any number of ranks:",
        "  mpirun -n 4 mpillm train JOB.toml [section.key=value ...]", "",
        "commands (mpillm COMMAND --help tells more):", *lines, ""])


def unknown(name):
    """The error for a word that is no command."""
    from .config import UserError, nearest
    return UserError(f"unknown command {name!r}" + (nearest(name, COMMANDS) or f"; commands are {', '.join(COMMANDS)}"))


def parse(argv):
    """(command module, arguments) of a command line; (None, text) when text is all that is asked for."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return None, overview()
    if argv[0] == "--version":
        return None, f"mpillm {__version__}\n"
    if argv[0] not in COMMANDS:
        raise unknown(argv[0])
    module = importlib.import_module(f"mpillm.commands.{argv[0]}")
    parser = Parser(prog=f"mpillm {argv[0]}", description=(module.__doc__ or "").partition("\n\n")[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    return module, parser.parse_intermixed_args(argv[1:])


def all_ranks():
    """The group of all ranks, or None for a process that no launcher started (MPI is then not touched here)."""
    if not launch.launched():
        return None
    prepare_threads()
    from .layout.comm import world
    return world()


def prepare_threads():
    """Sets the threads of this process, before anything imports NumPy."""
    from .backend.threads import prepare_environment
    prepare_environment(launch.num_threads())


def start(argv):
    """Parses the command line and runs the command; returns the exit code."""
    try:
        module, arguments = parse(argv)
    except SystemExit as asked:  # argparse printed the help of a command
        return asked.code or 0
    if module is None:
        if launch.rank() == 0:
            sys.stdout.write(arguments)
        return 0
    if argv[0] == "train":
        from .run.signals import listen_early
        listen_early()
    prepare_threads()
    all_ranks()  # from here on an error on one rank can end the others
    return module.run(arguments) or 0


def main(argv=None):
    """Entry point of the console script; returns the exit code and raises nothing."""
    from .run import ending
    try:
        code = start(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except BaseException as error:  # whatever it is, no rank may be left waiting for this one
        code = ended_by(error)
    return ending.finish(code)


def ended_by(error):
    """Ends the job for an error that reached the top; returns the exit code where it may."""
    from .config import UserError
    from .run import ending
    try:
        group = all_ranks()
    except Exception as trouble:
        ending.say(f"mpillm: MPI does not start: {trouble}\n")
        group = None
    if isinstance(error, SystemExit) and not ending.code_of(error):
        return 0
    if group is not None and group.bears_deaths:
        return ending.end_together(error, group)
    if isinstance(error, UserError):
        return ending.refuse(error, group)
    if isinstance(error, KeyboardInterrupt):
        ending.say("mpillm: interrupted\n" if launch.rank() == 0 else "")
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return ending.end(ending.code_of(error), group)
    if isinstance(error, BrokenPipeError) and (group is None or group.size == 1):
        ending.close_output()
        return ending.CLOSED_PIPE
    return ending.fail(error, group)


if __name__ == "__main__":
    sys.exit(main())
