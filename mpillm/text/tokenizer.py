"""Text to token ids and back: bytes, a byte-level BPE learnt here, or any Hugging Face `tokenizer.json`.

A tokenizer is known by the bytes of its file (`to_bytes`), and two are the same when their `hash` is. No models of
words are written here: the `tokenizers` library does the work, and is imported only where it is needed.
"""

import hashlib
import json
import os

import numpy as np

from ..config import UserError

NUM_BYTES = 256
END = "<|endoftext|>"
END_NAMES = (END, "</s>", "<|end_of_text|>", "<eos>")   # end of a document in foreign tokenizers, first found wins
BYTES_FILE = json.dumps({"mpillm_tokenizer": "bytes", "version": 1, "end": NUM_BYTES}).encode()


def _library():
    """The `tokenizers` module, with no more threads than this rank has cores."""
    threads = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]
    os.environ.setdefault("RAYON_NUM_THREADS", threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if os.environ["RAYON_NUM_THREADS"] == "1" else "true")
    import tokenizers
    return tokenizers


class Tokenizer:
    """Text <-> token ids.

    Parameters
    ----------
    data : bytes
        A `tokenizer.json`, or the small form of the bytes tokenizer (`Tokenizer.of_bytes()`).
    source : str
        Named in errors.

    Attributes
    ----------
    vocabulary : int
        Number of ids; every id is below it.
    end : int or None
        Id that ends a document; None in a foreign tokenizer without one: documents then follow each other directly.
    hash : str
        SHA-256 of `data`, hexadecimal.
    separable : bool
        Whether text cut between two lines, or before a space, has the same tokens as the whole.

    Raises
    ------
    UserError
        `data` is no tokenizer.
    """

    def __init__(self, data, source="tokenizer"):
        self._data = bytes(data)
        self.hash = hashlib.sha256(self._data).hexdigest()
        self._inner = None if self._data == BYTES_FILE else _parse(self._data, source)
        if self._inner is None:
            self.vocabulary, self.end, self.separable = NUM_BYTES + 1, NUM_BYTES, True
            return
        self.vocabulary = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocabulary < 1:
            raise UserError(f"{source}: a tokenizer without tokens; expected a tokenizer.json with a vocabulary")
        ends = [self._inner.token_to_id(name) for name in END_NAMES]
        self.end = next((number for number in ends if number is not None), None)
        pieces = [self.encode(text) for text in ("a\nb c", "a\n", "b", " c")]
        self.separable = np.array_equal(pieces[0], np.concatenate(pieces[1:]))

    @classmethod
    def of_bytes(cls):
        """Vocabulary 257: the 256 bytes of UTF-8 and one end of document."""
        return cls(BYTES_FILE)

    @classmethod
    def from_bytes(cls, data, source="tokenizer"):
        """The tokenizer that `to_bytes` gave."""
        return cls(data, source)

    def to_bytes(self):
        """The bytes of its file."""
        return self._data

    def encode(self, text, special=False):
        """The ids of `text`, int32 (num_tokens,).

        Names of special tokens in the text are plain text unless `special`: a document that quotes
        "<|endoftext|>" does not end there.
        """
        return self.encode_many([text], special)[0]

    def encode_many(self, texts, special=False):
        """`encode` of each text, on the threads of this rank."""
        if self._inner is None:
            return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32) for text in texts]
        self._inner.encode_special_tokens = not special
        encodings = self._inner.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids):
        """The text of `ids`; bytes that are not UTF-8 are replaced, special tokens and unknown ids left out."""
        ids = np.asarray(ids).reshape(-1)
        if self._inner is None:
            return ids[(ids >= 0) & (ids < NUM_BYTES)].astype(np.uint8).tobytes().decode("utf-8", "replace")
        return self._inner.decode(ids[(ids >= 0) & (ids < self.vocabulary)].tolist(), skip_special_tokens=True)


def _clean(text):
    """`text` without lone surrogates, which JSON may hold and UTF-8 has no form for."""
    return text.encode("utf-8", "replace").decode()


def _parse(data, source):
    """The `tokenizers.Tokenizer` of a tokenizer.json, set to give all tokens of a text and no others."""
    try:
        inner = _library().Tokenizer.from_str(data.decode())
    except ImportError as error:
        raise UserError(f"{source}: needs the tokenizers library, which is missing here ({error}); pip install tokenizers, "
                        "or use the bytes tokenizer") from None
    except Exception as error:          # the library raises plain Exception
        line = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{source}: not a tokenizer.json ({line}); expected a Hugging Face tokenizer file") from None
    inner.no_truncation()               # files of classifiers cut and pad texts
    inner.no_padding()
    return inner


def read_tokenizer(path):
    """The Tokenizer of a `tokenizer.json`, or of a folder that holds one."""
    path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}; expected bytes, bpe:N or a tokenizer.json") from None
    return Tokenizer(data, path)


def bpe_size(text):
    """N of "bpe:N", checked; None for any other text."""
    kind, colon, number = text.partition(":")
    if kind != "bpe" or not colon:
        return None
    if not number.isdecimal() or not NUM_BYTES + 1 <= int(number) < 2**31:
        raise UserError(f"tokenizer {text!r}: expected bpe:N with N of at least {NUM_BYTES + 1} "
                        "(256 bytes and one end of document), such as bpe:4096")
    return int(number)


def train_bpe(texts, vocabulary):
    """Learns a byte-level BPE (Sennrich et al. 2016; the byte alphabet of GPT-2).

    Parameters
    ----------
    texts : iterable of str
    vocabulary : int
        Ids it will have: 256 bytes, `<|endoftext|>` (id 0) and merges.

    Raises
    ------
    UserError
        The texts have too few different words for so many merges.
    """
    library = _library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False,
                                          initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator((_clean(text) for text in texts), trainer)
    found = inner.get_vocab_size()
    if found != vocabulary:
        raise UserError(f"tokenizer bpe:{vocabulary}: the corpus has words for {found} tokens only; use bpe:{found} or fewer, or more text")
    return Tokenizer(inner.to_str().encode())
