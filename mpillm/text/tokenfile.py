"""The token file: an HDF5 file that all ranks write together and each reads alone.

    /tokens      uint16 or uint32 (num_tokens,)      all documents, one after the other
    /documents   int64 (num_documents + 1,)          where each begins; the last entry is num_tokens
    /tokenizer   uint8                               the bytes of its tokenizer
    attributes   format, vocabulary, end (-1: none), tokenizer_hash, sources_hash, documents

All datasets are contiguous, so once it is known where they lie (structure.py) they are read with plain `pread`, on any
number of ranks and without HDF5. No memory map: a file cut short under one ends the process without a word.
"""

import hashlib
import os
import stat

import numpy as np

from ..config import UserError
from ..layout.agreement import agreed, on_root
from .encode import token_type
from .structure import PREPARE, read_structure_apart
from .tokenizer import Tokenizer

FORMAT = 1
MAX_TOKENIZER = 2**28   # bytes


class TokenFile:
    """A token file, open for reading by one rank.

    Parameters
    ----------
    path : str
    group : Group, Solo or None
        With a group the call is collective: rank 0 reads the structure for all, and all raise the same error.
    structure : dict or None
        Of `read_structure`, where it is known already.

    Attributes
    ----------
    path : str
    num_tokens, num_documents, vocabulary : int
    end : int or None
    dtype : numpy.dtype
        Of the ids as they are returned.
    tokenizer_hash, sources_hash : str

    Raises
    ------
    UserError
        Missing, not HDF5, cut short, or not the structure of a token file.
    """

    def __init__(self, path, group=None, structure=None):
        self.path, self._descriptor = str(path), None
        if structure is None:
            structure = on_root(group, UserError, f"{path}: opening", self._structure) if group else self._structure()
        if group:
            with agreed(group, UserError, f"{path}: opening"):
                self._open(structure)
        else:
            self._open(structure)

    def _refuse(self, line):
        raise UserError(f"{self.path}: {line}")

    def _structure(self):
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                self._refuse(f"not a file; expected a token file: {PREPARE}")
            with open(self.path, "rb"):
                return read_structure_apart(self.path)
        except OSError as error:
            self._refuse(f"cannot read the token file: {error.strerror}; {PREPARE}")

    def _open(self, structure):
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._refuse(f"cannot read the token file: {error.strerror}; {PREPARE}")
        (self._tokens, self._documents, self._tokenizer) = (
            (offset, size, np.dtype(kind)) for offset, size, kind in (structure[name] for name in ("tokens", "documents", "tokenizer")))
        attributes = structure["attributes"]
        _, self.num_tokens, self.dtype = self._tokens
        self.num_documents, self.vocabulary = self._documents[1] - 1, attributes["vocabulary"]
        self.end = attributes["end"] if attributes["end"] >= 0 else None
        self.tokenizer_hash, self.sources_hash = attributes["tokenizer_hash"], attributes["sources_hash"]
        if attributes["format"] != FORMAT:
            self._refuse(f"token file of format {attributes['format']}; this mpillm reads {FORMAT}; {PREPARE} again")
        self._check()

    def _check(self):
        if not self.num_tokens or self.num_documents < 1:
            self._refuse("holds no tokens; prepare it from a corpus with text")
        first, last = (self._pread(self._documents, index, 1)[0] for index in (0, self.num_documents))
        if first != 0 or last != self.num_tokens:
            self._refuse(f"/documents runs from {first} to {last}, expected 0 to {self.num_tokens} as in /tokens; {PREPARE} again")
        if not 0 < self.vocabulary < 2**31 or token_type(self.vocabulary) != self.dtype or (self.end or 0) >= self.vocabulary:
            self._refuse(f"vocabulary {self.vocabulary} and end {self.end} do not fit tokens of type {self.dtype}; {PREPARE} again")
        if self._tokenizer[1] > MAX_TOKENIZER:
            self._refuse(f"/tokenizer has {self._tokenizer[1]} bytes, expected at most {MAX_TOKENIZER}")

    def _pread(self, dataset, start, size):
        offset, _, dtype = dataset
        out = np.empty(size, dtype)
        self._fill(out, offset + start * dtype.itemsize)
        return out

    def _fill(self, out, offset):
        if os.preadv(self._descriptor, [out], offset) == out.nbytes:
            return
        data, done = memoryview(out).cast("B"), 0       # a read may be partial: at most 2 GiB at once
        while done < out.nbytes:
            count = os.preadv(self._descriptor, [data[done:]], offset + done)
            if not count:
                self._refuse(f"became shorter while it was read (at byte {offset + done}); {PREPARE} again")
            done += count

    def read(self, start, stop):
        """The ids of tokens start, ..., stop - 1, in an array of `dtype`."""
        return self.gather([start], [stop - start])

    def gather(self, starts, lengths):
        """The ids of several ranges, one after the other, in an array of `dtype` (sum of lengths,).

        Raises
        ------
        UserError
            An id that is not in the vocabulary; names where.
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        if starts.size and not (0 <= starts.min() and lengths.min() >= 0 and (starts + lengths).max() <= self.num_tokens):
            raise ValueError(f"{self.path}: tokens outside 0..{self.num_tokens} asked for")
        out = np.empty(int(lengths.sum()), self.dtype)
        done = 0
        for start, length in zip(starts.tolist(), lengths.tolist()):
            self._fill(out[done:done + length], self._tokens[0] + start * self.dtype.itemsize)
            done += length
        if out.size and out.max() >= self.vocabulary:
            bad = int(np.argmax(out >= self.vocabulary))
            which = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            offset = int(starts[which]) + bad - int(lengths[:which].sum())
            self._refuse(f"token {offset} has id {out[bad]}, its vocabulary ends at {self.vocabulary - 1}: the file is damaged; {PREPARE} again")
        return out

    def documents(self):
        """Where documents begin, and the end of the last: int64 (num_documents + 1,)."""
        documents = self._pread(self._documents, 0, self.num_documents + 1)
        if (np.diff(documents) < 0).any():
            self._refuse(f"/documents is not in ascending order; {PREPARE} again")
        return documents

    def tokenizer_bytes(self):
        """The bytes of its tokenizer, checked against their hash."""
        data = self._pread(self._tokenizer, 0, self._tokenizer[1]).tobytes()
        if hashlib.sha256(data).hexdigest() != self.tokenizer_hash:
            self._refuse(f"/tokenizer does not have the hash that the file names; {PREPARE} again")
        return data

    def tokenizer(self):
        """Its Tokenizer."""
        return Tokenizer(self.tokenizer_bytes(), self.path)

    def close(self):
        """Gives the file back; it is not read afterwards."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = close
