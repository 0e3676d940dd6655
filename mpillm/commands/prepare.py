"""`mpillm prepare CORPUS OUT.h5`: text to a token file, in parallel over ranks."""

import argparse

SAMPLE = 10**8      # bytes of text from which a BPE is learnt


def add_arguments(parser):
    parser.add_argument("corpus", metavar="CORPUS",
                        help="text file, folder, glob, JSON-lines (.jsonl, .jsonl.gz), corpus definition (.toml), or a name such as stdlib")
    parser.add_argument("out", metavar="OUT.h5", help="token file to write")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE|bpe:N",
                        help="bytes (vocabulary 257, the default); a tokenizer.json, a folder with one, or a token file whose tokenizer is taken; "
                             "bpe:N learns a byte-level BPE with a vocabulary of N")
    parser.add_argument("--validation", metavar="VAL.h5", help="second token file, for documents held out")
    parser.add_argument("--share", type=_share, metavar="0.05",
                        help="share of the documents held out, chosen by the hash of their content (0.05 when left out)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _share(text):
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1")
    return share


def run(arguments):
    """Prepares the token files; returns 0.

    Raises
    ------
    UserError
        Corpus, tokenizer or output cannot be used.
    """
    import os
    import time
    from ..config import UserError
    from ..layout.agreement import on_root
    from ..layout.comm import world
    from ..run.progress import bytes_text
    from ..text.corpus import open_corpus
    from ..text.encode import encode_corpus
    from ..text.tokenwriter import check_output, write_token_file

    started, group = time.monotonic(), world()
    if arguments.share is not None and not arguments.validation:
        raise UserError(f"prepare: --share {arguments.share} without --validation; name the file for the documents held out")
    outputs = [path for path in (arguments.out, arguments.validation) if path]
    if len(outputs) == 2 and os.path.realpath(outputs[0]) == os.path.realpath(outputs[1]):
        raise UserError(f"prepare: OUT and --validation are the same file {arguments.out}; give two names")
    for path in outputs:
        check_output(path, group, arguments.overwrite)
    corpus = open_corpus(arguments.corpus, group)
    say = print if group.rank == 0 else lambda *text, **how: None
    say(f"prepare: {corpus.name}: {len(corpus.files)} file{'s' * (len(corpus.files) != 1)}, {bytes_text(corpus.num_bytes)}", flush=True)
    tokenizer = _tokenizer(arguments.tokenizer, corpus, group, say)
    folder = os.path.dirname(arguments.out) or "."
    on_root(group, UserError, f"{folder}: making the folder", lambda: os.makedirs(folder, exist_ok=True))     # the spool goes there
    encoded = encode_corpus(corpus, tokenizer, group, folder, _progress if group.rank == 0 else None)
    documents = _counts(encoded, corpus, group, say)
    share = (arguments.share or 0.05) if arguments.validation else 0.0
    parts = dict(zip(outputs, encoded.split(share)))
    _check_sides(parts, documents, share, group)
    written = {path: write_token_file(path, part, tokenizer, group, arguments.overwrite) for path, part in parts.items()}
    _summary(written, encoded, tokenizer, group, say, time.monotonic() - started)
    return 0


def _tokenizer(name, corpus, group, say):
    """The tokenizer that the user named: read or learnt on rank 0, the same on every rank."""
    import time
    from ..config import UserError
    from ..layout.agreement import on_root
    from ..text.tokenfile import TokenFile
    from ..text.tokenizer import Tokenizer, bpe_size, read_tokenizer, train_bpe

    if name == "bytes":
        return Tokenizer.of_bytes()
    size = bpe_size(name)

    def make():
        if size is not None:
            return train_bpe(corpus.sample(SAMPLE), size).to_bytes().decode()
        if name.endswith((".h5", ".hdf5")):
            return TokenFile(name).tokenizer_bytes().decode()
        return read_tokenizer(name).to_bytes().decode()
    started = time.monotonic()
    if size is not None:
        say(f"prepare: learning {name} from {min(corpus.num_bytes, SAMPLE) / 1e6:.0f} MB on rank 0", flush=True)
    tokenizer = Tokenizer.from_bytes(on_root(group, UserError, f"tokenizer {name}", make).encode(), name)
    if size is not None:
        say(f"prepare: learnt {name} in {time.monotonic() - started:.1f} s", flush=True)
    return tokenizer


def _progress(done, total, seconds):
    print(f"prepare: {done / total:.0%} of the text of rank 0, {done / 1e6 / seconds:.1f} MB/s a rank, "
          f"{(total - done) * seconds / max(done, 1):.0f} s left", flush=True)


def _counts(encoded, corpus, group, say):
    """Documents of all ranks; says what was left out or replaced."""
    import numpy as np
    from ..config import UserError
    documents, replaced, not_text = group.all_reduce(np.array([encoded.ends.sum(), *encoded.tally.values()], np.int64)).tolist()
    if not_text:
        say(f"prepare: left out {not_text} files that are not text (a zero byte in the first 4096)")
    if replaced:
        say(f"prepare: {replaced} places that are not UTF-8 were replaced by U+FFFD")
    if not documents:
        raise UserError(f"corpus {corpus.name}: no document with text in its {len(corpus.files)} files; expected UTF-8 text")
    return documents


def _check_sides(parts, documents, share, group):
    """Both files need a document."""
    import numpy as np
    from ..config import UserError
    for path, part in parts.items():
        if not group.all_reduce(np.array([len(part.ends)], np.int64))[0]:
            raise UserError(f"{path}: none of the {documents} documents fell to it with --share {share}; use another share or more documents")


def _summary(written, encoded, tokenizer, group, say, seconds):
    import numpy as np
    text_bytes = int(group.all_reduce(np.array([encoded.text_bytes], np.int64))[0])
    tokens = sum(num_tokens for num_tokens, _ in written.values())
    for path, (num_tokens, num_documents) in written.items():
        say(f"prepare: {path}: {num_documents} documents, {num_tokens} tokens")
    say(f"prepare: vocabulary {tokenizer.vocabulary}, {text_bytes / tokens:.2f} bytes per token, {seconds:.1f} s, {group.size} rank{'s' * (group.size > 1)}")
