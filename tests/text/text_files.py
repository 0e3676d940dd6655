"""Small corpora and token files, and a folder that all ranks share."""

import contextlib
import shutil
import tempfile

import numpy as np

from mpillm.config import UserError
from mpillm.layout.comm import Solo, world
from mpillm.text.encode import Part, token_type
from mpillm.text.structure import read_structure
from mpillm.text.tokenfile import TokenFile
from mpillm.text.tokenizer import Tokenizer
from mpillm.text.tokenwriter import write_token_file


@contextlib.contextmanager
def shared_folder():
    """A temporary folder of rank 0, the same on every rank, gone afterwards."""
    group = world()
    path = group.share(tempfile.mkdtemp() if group.rank == 0 else None)
    try:
        yield path
        group.barrier()
    finally:
        if group.rank == 0:
            shutil.rmtree(path)


def part_of(tokens, documents=None):
    """The whole of a token file as the Part of one rank; documents: ends, one document when left out."""
    ends = np.array([len(tokens)] if documents is None else documents, np.int64)
    return Part(len(tokens), ends, np.arange(len(ends), dtype=np.uint64), lambda: iter([np.asarray(tokens)]))


def opened(path):
    """The TokenFile of a path, its structure read in this process: a child for each would take longer than the tests."""
    return TokenFile(path, structure=read_structure(path))


def make_file(path, num_tokens, seed=0, tokenizer=None):
    """A token file of random bytes, made and opened by this rank alone."""
    tokenizer = tokenizer or Tokenizer.of_bytes()
    ids = np.random.default_rng([seed, num_tokens]).integers(0, 256, num_tokens).astype(token_type(tokenizer.vocabulary))
    write_token_file(str(path), part_of(ids), tokenizer, Solo(), overwrite=True)
    return opened(path), ids


def raised(work):
    """The line of the UserError that `work()` raises."""
    try:
        work()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("no UserError")
