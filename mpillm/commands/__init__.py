"""What a user starts, one file a command.

Each module has `add_arguments(parser)` and `run(arguments) -> exit code`, and imports heavy things only inside `run`,
so that `--help` answers at once.
"""

COMMANDS = {
    "prepare": "tokenise text into a token file",
    "train": "pretrain or fine-tune; resumes by itself",
    "submit": "the Slurm script of a job, for a site",
    "doctor": "are these nodes, MPI and file system fit to run?",
    "evaluate": "loss and perplexity of a checkpoint on token files",
    "generate": "text from a checkpoint",
    "verify": "this layout against one rank: loss and every gradient",
    "inspect": "what a checkpoint or token file holds, without loading it",
}
