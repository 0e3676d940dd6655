"""Trains, fine-tunes, evaluates and runs large language models as an ordinary MPI program.

Importing the package starts nothing: no MPI, no GPU, no configuration.
"""

__version__ = "0.4.0"
