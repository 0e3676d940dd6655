"""Corpus -> tokens, each rank its pieces; and which documents go to validation.

A rank's tokens wait in a spool (memory, then an unnamed file beside the output), since where they go in the token file
is known only when all ranks have counted theirs.
"""

import tempfile
import time
from array import array
from typing import NamedTuple

import numpy as np

from ..config import UserError
from ..layout.agreement import agreed
from .corpus import Tally

BATCH = 2**22           # bytes of text given to the tokenizer at once
SPOOL_MEMORY = 2**28    # bytes of tokens kept in memory
CHUNK = 2**23           # tokens read from the spool at once
REPORT_EVERY = 10.0     # seconds


def token_type(vocabulary):
    """The NumPy type of ids in files."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


class Part(NamedTuple):
    """This rank's share of a token file."""
    num_tokens: int
    ends: np.ndarray        # int64 (documents that end here,): tokens of this rank up to and with each one
    values: np.ndarray      # uint64, same shape: hashes of their contents
    chunks: object          # callable: yields the tokens in order, arrays of the file's type


class Encoded:
    """The tokens of a rank's pieces, in document order.

    Attributes
    ----------
    counts, ends, values : arrays (num_fragments,)
        Tokens of each fragment (end of document included), whether a document ends with it, and the 64-bit hash of
        the content of its whole document.
    text_bytes, tally : what was read
    """

    def __init__(self, dtype, folder):
        self.dtype = dtype
        self.spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY, dir=folder)
        self._counts, self._ends, self._values = array("q"), array("b"), array("Q")
        self.parts_of_file = {}         # file -> fragments of a document that is cut into several
        self.text_bytes, self.tally = 0, Tally()

    def add(self, file, fragment, tokens):
        if not (fragment.begins and fragment.ends):
            self.parts_of_file.setdefault(file, []).append(len(self._counts))
        self._counts.append(tokens.size)
        self._ends.append(fragment.ends)
        self._values.append(fragment.value)
        self.spool.write(tokens.astype(self.dtype).tobytes())

    def finish(self, group):
        """Gives every fragment the hash of its whole document; collective."""
        self.counts = np.frombuffer(self._counts, np.int64)
        self.ends = np.frombuffer(self._ends, np.int8).astype(bool)
        self.values = np.frombuffer(self._values, np.uint64).copy()
        sums = {}
        for mine in group.collect({str(file): int(self.values[own].sum()) for file, own in self.parts_of_file.items()}):
            for file, value in mine.items():
                sums[int(file)] = (sums.get(int(file), 0) + value) % 2**64
        for file, own in self.parts_of_file.items():
            self.values[own] = sums[file]

    def part(self, chosen):
        """The Part of the fragments where the mask `chosen` (num_fragments,) is true."""
        positions = np.cumsum(self.counts * chosen)
        last = chosen & self.ends
        return Part(int(self.counts[chosen].sum()), positions[last], self.values[last], lambda: self._chunks(chosen))

    def _chunks(self, chosen):
        """The tokens of the chosen fragments: neighbours are read together."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
        for first, behind in edges.reshape(-1, 2):
            for start in range(starts[first], starts[behind], CHUNK):
                self.spool.seek(start * self.dtype.itemsize)
                size = min(CHUNK, starts[behind] - start) * self.dtype.itemsize
                yield np.frombuffer(self.spool.read(size), self.dtype)

    def split(self, share):
        """The Parts of training and validation: a document goes to validation when its hash, as a number in [0, 1), is below `share`."""
        held_out = self.values < np.uint64(min(int(share * 2**64), 2**64 - 1))
        return self.part(~held_out), self.part(held_out)


def encode_corpus(corpus, tokenizer, group, folder, report=None):
    """Tokenises this rank's pieces of `corpus`; collective.

    Parameters
    ----------
    corpus : Corpus
    tokenizer : Tokenizer
    group : Group or Solo
    folder : str
        Where the spool goes when it outgrows the memory given to it.
    report : callable or None
        Called now and then with (bytes read, bytes to read, seconds) of this rank.

    Raises
    ------
    UserError
        A file that cannot be read, on any rank.
    """
    encoded = Encoded(token_type(tokenizer.vocabulary), folder)
    with agreed(group, UserError, f"corpus {corpus.name}: reading it"):
        _encode(corpus, tokenizer, group, encoded, report)
    encoded.finish(group)
    return encoded


def _encode(corpus, tokenizer, group, encoded, report):
    pieces = corpus.pieces_of(group.rank, group.size, whole=not tokenizer.separable)
    total, done, waiting, waiting_bytes = sum(piece.size for piece in pieces), 0, [], 0
    started = reported = time.monotonic()
    for piece in pieces:
        for fragment in corpus.read(piece, encoded.tally):
            waiting.append((piece.file, fragment))
            waiting_bytes += len(fragment.text)
            if waiting_bytes >= BATCH:
                _encode_batch(tokenizer, waiting, encoded)
                waiting, waiting_bytes = [], 0
        done += piece.size
        if report and time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            report(done, total, reported - started)
    _encode_batch(tokenizer, waiting, encoded)


def _encode_batch(tokenizer, batch, encoded):
    end = [] if tokenizer.end is None else [tokenizer.end]
    for (file, fragment), tokens in zip(batch, tokenizer.encode_many([fragment.text for _, fragment in batch])):
        encoded.text_bytes += len(fragment.text) if fragment.text.isascii() else len(fragment.text.encode("utf-8", "replace"))
        encoded.add(file, fragment, np.concatenate([tokens, np.array(end if fragment.ends else [], np.int32)]))
