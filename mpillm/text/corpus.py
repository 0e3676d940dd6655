"""A corpus: its documents, and how the ranks share reading them.

Every file is cut into pieces at places that depend on the file alone, and a rank reads the pieces that start in its
part of the corpus' bytes. So documents keep their order, and what a piece holds does not depend on the number of
ranks. Nothing is filtered or deduplicated here.
"""

import gzip
import hashlib
import json
import re
import zlib
from typing import NamedTuple

from ..config import UserError
from ..layout.agreement import on_root
from ..layout.slab import cut
from .sources import File, list_files

PIECE = 2**20       # bytes of a file that are read at once
SEARCH = 2**16      # bytes behind a nominal cut in which a good place is looked for
HEAD = 2**12        # bytes in which a zero says that a file is not text
# A cut of a text here leaves the tokens of both parts as they are: between two lines, else before a space.
PLACES = (re.compile(rb"[!-~]\n(?=[!-~])"), re.compile(rb"[!-~](?= [!-~])"))
CORRUPT = (EOFError, gzip.BadGzipFile, zlib.error)      # what a damaged or cut .gz file raises


class Piece(NamedTuple):
    """What a rank reads at once."""
    file: int       # index in `Corpus.files`
    number: int     # of `total` pieces of the file
    total: int
    start: int      # nominal first byte, counted over the whole corpus
    size: int       # nominal bytes


class Fragment(NamedTuple):
    """A document, or the part of a large one that a piece holds."""
    text: str
    value: int      # 64-bit hash of the content; the values of a document's fragments add up (mod 2^64) to its hash
    begins: bool
    ends: bool


class Tally:
    """What a rank met while reading."""
    def __init__(self):
        self.replaced = 0   # undecodable places
        self.not_text = 0   # files left out

    def values(self):
        return [self.replaced, self.not_text]


class Corpus:
    """The files of a corpus, the same list on every rank.

    Parameters
    ----------
    name : str
        As the user wrote it.
    files : list of File
    """

    def __init__(self, name, files):
        self.name, self.files = name, [File(*file) for file in files]
        self.num_bytes = sum(file.size for file in self.files)

    def pieces(self, whole=False):
        """All pieces in document order; with `whole` texts are not cut (JSON-lines still are)."""
        start = 0
        for index, file in enumerate(self.files):
            single = file.packed or (whole and not file.lines)
            total = 1 if single else max(1, file.size // PIECE)
            for number in range(total):
                size = PIECE if number < total - 1 else file.size - number * PIECE
                yield Piece(index, number, total, start + number * PIECE, size)
            start += file.size

    def pieces_of(self, rank, num_ranks, whole=False):
        """The pieces that `rank` reads: those that start in its part of the bytes."""
        first, size = cut(self.num_bytes, num_ranks, rank)
        return [piece for piece in self.pieces(whole) if first <= piece.start < first + size]

    def read(self, piece, tally):
        """Yields the Fragments of a piece, in order; documents without text are left out."""
        file = self.files[piece.file]
        if file.lines:
            yield from _read_lines(file, piece, tally)
        else:
            yield from _read_text(file, piece, tally)

    def sample(self, limit):
        """Texts of at most about `limit` bytes, of pieces chosen by the hash of (file name, number): the same anywhere."""
        def order(piece):
            return hashlib.blake2b(f"{self.files[piece.file].name}\0{piece.number}".encode("utf-8", "replace"), digest_size=16).digest()
        pieces = list(self.pieces()) if self.num_bytes <= limit else sorted(self.pieces(), key=order)
        tally = Tally()
        for piece in pieces:
            for fragment in self.read(piece, tally):
                limit -= len(fragment.text)
                if limit < 0:
                    return
                yield fragment.text


def open_corpus(name, group):
    """The Corpus of a path, glob, definition or name; listed by rank 0, the same on every rank.

    Raises
    ------
    UserError
        Nothing there, an unreadable file or definition, or no file with text.
    """
    return Corpus(name, on_root(group, UserError, f"corpus {name}: listing it", lambda: list_files(name)))


def _read_text(file, piece, tally):
    with open(file.path, "rb") as handle:
        if not file.packed:
            if b"\0" in handle.read(HEAD):
                tally.not_text += piece.number == 0
                return
            start, stop = (_boundary(handle, file.size, piece, number) for number in (piece.number, piece.number + 1))
            handle.seek(start)
            data = handle.read(stop - start)
            if len(data) != stop - start:
                raise UserError(f"{file.path}: became shorter while it was read; prepare again when nobody writes to it")
        else:
            data = _unpack(handle, file.path)
            if b"\0" in data[:HEAD]:
                tally.not_text += 1
                return
    if data:
        yield Fragment(_decode(data, tally), _value(data, piece.number), piece.number == 0, piece.number == piece.total - 1)


def _boundary(handle, size, piece, number):
    """First byte of piece `number` of a text: a function of the file alone."""
    if number in (0, piece.total):
        return size if number else 0
    handle.seek(number * PIECE)
    window = handle.read(SEARCH)
    for place in PLACES:
        found = place.search(window)
        if found:
            return number * PIECE + found.end()
    return number * PIECE + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def _read_lines(file, piece, tally):
    """The documents of the lines that start in a piece."""
    first = piece.number * PIECE
    with (gzip.open if file.packed else open)(file.path, "rb") as handle:
        try:
            if first:
                handle.seek(first - 1)
                handle.readline()
            position = handle.tell()
            while file.packed or position < first + piece.size:
                line = handle.readline()
                if not line:
                    break
                text = _field(file, line, position, tally)
                if text:
                    yield Fragment(text, _value(text.encode("utf-8", "replace"), 0), True, True)
                position += len(line)
        except CORRUPT as error:
            raise _not_unpacked(file.path, error) from None


def _field(file, line, position, tally):
    if not line.strip():
        return ""
    where = f"{file.path}: line at byte {position}"
    try:
        record = json.loads(_decode(line, tally))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    text = record.get(file.field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(list(record)[:8])}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{where}: no text under the key {file.field!r}; found {found}")
    return text


def _unpack(handle, path):
    try:
        return gzip.decompress(handle.read())
    except CORRUPT as error:
        raise _not_unpacked(path, error) from None


def _not_unpacked(path, error):
    return UserError(f"{path}: cannot unpack: {error}; make or copy the file again, or leave it out of the corpus")


def _decode(data, tally):
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        tally.replaced += text.count("\N{REPLACEMENT CHARACTER}") - data.count("\N{REPLACEMENT CHARACTER}".encode())
        return text


def _value(data, number):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=number.to_bytes(8, "little")).digest(), "little")
