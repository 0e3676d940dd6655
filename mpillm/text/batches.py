"""Samples of tokens for training and validation, by sample number.

What a sample holds is a function of the cursor, the seed and its number (order.py), so any rank can
read any sample, and a run goes on after a stop on another number of ranks, with another batch, context or mixture, with
neither repeat nor skip within a corpus.
"""

import numpy as np

from ..config import UserError

from .order import PERIOD, Mixture, Order, context_message, keys_of, mix
from .tokenfile import TokenFile

CURSOR_VERSION = 1


class Batches:
    """The training samples of one or several token files.

    Parameters
    ----------
    files : sequence of str or TokenFile
    weights : sequence of float
        Share of the samples that each file gives; their sum is free.
    context : int
        Tokens of a sample (T).
    seed : int
    cursor : dict or None
        Of `cursor_after`, perhaps of a run with other files, weights or context. Files are known again by their content.

    Attributes
    ----------
    first : int
        Samples that were read before the cursor, since the run began. Sample numbers of `samples` count from the
        cursor: sample n of this object is sample `first + n` of the run.
    vocabulary : int
    tokenizer_hash : str
    messages : list of str
        What the user should be told: a changed mixture, files without a place in the cursor, a context that does not fit.

    Raises
    ------
    UserError
        Bad files, too few tokens in one, files of different tokenizers, a weight too small to be kept.
    """

    def __init__(self, files, weights, context, seed, cursor=None):
        self.files = [file if isinstance(file, TokenFile) else TokenFile(file) for file in files]
        self.context, self.messages = context, []
        check_same_tokenizer(self.files)
        self.vocabulary, self.tokenizer_hash = self.files[0].vocabulary, self.files[0].tokenizer_hash
        self._mixture = Mixture(weights, seed)
        for file, weight, quota in zip(self.files, weights, self._mixture.quota, strict=True):
            if not quota:
                raise UserError(f"data: weight {weight} of {file.path} is less than 1/{2 * PERIOD} of the sum {sum(weights)}; "
                                "give it more, or leave the file out")
        self._resume(cursor or {"version": CURSOR_VERSION, "samples": 0, "mixture": 0, "corpora": []}, seed)

    def _resume(self, cursor, seed):
        if cursor.get("version") != CURSOR_VERSION:
            raise UserError(f"data cursor of version {cursor.get('version')}; this mpillm reads {CURSOR_VERSION}; go on with the mpillm that wrote it")
        self.first = cursor["samples"]
        old = list(cursor["corpora"])
        known = [_take(old, file) for file in self.files]
        self._left_out = [{**entry, "quota": 0} for entry in old]       # comes back when the file does
        self._orders = [self._order(file, entry, seed) for file, entry in zip(self.files, known)]
        same = not any(entry["quota"] for entry in old) and [entry and entry["quota"] for entry in known] == self._mixture.quota.tolist()
        self._phase = cursor["mixture"] if same else 0
        if self.first and not same:
            self.messages.append("data: the mixture of the files changed: " + ", ".join(
                f"{file.path} {quota / PERIOD:.1%}" for file, quota in zip(self.files, self._mixture.quota)))
            self.messages += [f"data: {file.path} is new to this run, it is read from its beginning"
                              for file, entry in zip(self.files, known) if entry is None]

    def _order(self, file, entry, seed):
        epoch, consumed, grain = (entry["epoch"], entry["tokens"], entry["grain"]) if entry else (0, 0, self.context)
        needed = max(grain, self.context) + 1
        if file.num_tokens < needed:
            raise UserError(f"{file.path}: {file.num_tokens} tokens; a sample needs {needed} (context {self.context} and one more target); "
                            "use more text or a smaller model.context")
        if not consumed:
            grain = grain if entry is None or context_message("", grain, self.context) is None else self.context
        message = context_message(file.path, grain, self.context)
        if message:
            self.messages.append(message)
        return Order(file.num_tokens, grain, self.context, seed, epoch, consumed)

    def samples(self, first, count):
        """Samples first, ..., first + count - 1, counted from the cursor.

        Returns
        -------
        tokens, targets : int32 (count, T)
        weights : float32 (count, T)
            Of the targets in the loss.
        """
        if len(self.files) == 1:
            tokens, targets = self._read(0, first, count)
        else:
            tokens, targets = (np.empty((count, self.context), np.int32) for _ in range(2))
            corpora = self._mixture.corpora(self._phase + first, count)
            before = self._mixture.before(self._phase + first) - self._mixture.before(self._phase)
            for corpus in np.unique(corpora).tolist():
                rows = np.flatnonzero(corpora == corpus)
                tokens[rows], targets[rows] = self._read(corpus, int(before[corpus]), rows.size)
        return tokens, targets, np.ones((count, self.context), np.float32)

    def _read(self, corpus, first, count):
        """Tokens and targets (count, T) of samples of one corpus."""
        starts, lengths = self._orders[corpus].ranges(first, count)
        flat = self.files[corpus].gather(starts, lengths + 1).astype(np.int32)
        shape = (count, self.context)
        if lengths.size and (lengths == lengths[0]).all():
            rows = flat.reshape(-1, int(lengths[0]) + 1)
            return rows[:, :-1].reshape(shape), rows[:, 1:].reshape(shape)
        behind = np.cumsum(lengths + 1)             # in `flat`, every range is followed by its last target
        return np.delete(flat, behind - 1).reshape(shape), np.delete(flat, behind - lengths - 1).reshape(shape)

    def cursor_after(self, num_samples):
        """The cursor when samples 0, ..., num_samples - 1 are done with: a JSON-able dict."""
        counts = self._mixture.before(self._phase + num_samples) - self._mixture.before(self._phase)
        corpora = []
        for file, order, count, quota in zip(self.files, self._orders, counts.tolist(), self._mixture.quota.tolist()):
            epoch, consumed, grain = order.cursor_after(count)
            corpora.append({"file": file.path, "sources": file.sources_hash, "all_tokens": file.num_tokens, "quota": quota,
                            "epoch": epoch, "tokens": consumed, "grain": grain})
        return {"version": CURSOR_VERSION, "samples": self.first + num_samples, "mixture": (self._phase + num_samples) % PERIOD,
                "corpora": corpora + self._left_out}


def _take(entries, file):
    """Takes the cursor entry of a file out of `entries`: the one of the same name and content, else of the same content; None."""
    same = [entry for entry in entries if (entry["sources"], entry["all_tokens"]) == (file.sources_hash, file.num_tokens)]
    same.sort(key=lambda entry: entry["file"] != file.path)
    if not same:
        return None
    entries.remove(same[0])
    return same[0]


class RandomBatches:
    """Random tokens with the interface of `Batches`, for benches: a function of seed, sample number and position.

    Parameters
    ----------
    vocabulary, context, seed : int
    cursor : dict or None
    """

    def __init__(self, vocabulary, context, seed, cursor=None):
        self.vocabulary, self.context, self.tokenizer_hash, self.messages = vocabulary, context, None, []
        self._key, self.first = keys_of("random data", seed)[:1], (cursor or {"samples": 0})["samples"]

    def samples(self, first, count):
        """As `Batches.samples`."""
        numbers = np.arange(self.first + first, self.first + first + count, dtype=np.uint64)
        words = mix(mix(numbers ^ self._key)[:, None] ^ np.arange(self.context + 1, dtype=np.uint64))      # (count, T + 1)
        ids = (words % np.uint64(self.vocabulary)).astype(np.int32)
        return ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((count, self.context), np.float32)

    def cursor_after(self, num_samples):
        """As `Batches.cursor_after`."""
        return {"version": CURSOR_VERSION, "samples": self.first + num_samples, "mixture": 0, "corpora": []}


def open_batches(train, context, seed, cursor=None, vocabulary=None, files=None):
    """The samples that `data.train` of a job names.

    Parameters
    ----------
    train : str or dict
        A token file, {token file: weight}, or "random" (which needs `vocabulary`).
    files : sequence of TokenFile or None
        The files of `train` in its order, where they are open already.
    """
    if train == "random":
        if not vocabulary:
            raise UserError("data.train = \"random\": random tokens need model.vocabulary; set it")
        return RandomBatches(vocabulary, context, seed, cursor)
    weights = train if isinstance(train, dict) else {train: 1.0}
    return Batches(files or list(weights), list(weights.values()), context, seed, cursor)


def check_same_tokenizer(files):
    """Refuses TokenFiles of different tokenizers."""
    for file in files[1:]:
        if file.tokenizer_hash != files[0].tokenizer_hash:
            raise UserError(f"{file.path}: made with another tokenizer ({file.tokenizer_hash[:12]}, vocabulary {file.vocabulary}) than {files[0].path} "
                            f"({files[0].tokenizer_hash[:12]}, vocabulary {files[0].vocabulary}); prepare both with the same --tokenizer")


def validation_windows(file, context, num_samples):
    """The first windows of a file, for the validation loss.

    Parameters
    ----------
    file : TokenFile
    context : int
        Tokens of a window. Window i is tokens i T, ..., i T + T - 1; all are whole.
    num_samples : int
        Windows wanted.

    Returns
    -------
    count : int
        Windows there are of them.
    samples : callable
        `samples(first, count)` as in `Batches`.
    """
    count = min(num_samples, (file.num_tokens - 1) // context)
    if count < 1:
        raise UserError(f"{file.path}: {file.num_tokens} tokens; a validation window needs {context + 1} (context {context} and one more target); "
                        "use more text or a smaller model.context")

    def samples(first, number):
        if not 0 <= first <= first + number <= count:
            raise ValueError(f"windows {first}..{first + number} of {count}")
        if not number:
            return np.empty((0, context), np.int32), np.empty((0, context), np.int32), np.empty((0, context), np.float32)
        ids = file.read(first * context, (first + number) * context + 1).astype(np.int32)
        return ids[:-1].reshape(number, context), ids[1:].copy().reshape(number, context), np.ones((number, context), np.float32)
    return count, samples
