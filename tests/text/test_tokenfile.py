"""Token files: the same on any number of ranks and by either way of writing; damaged and hostile ones are refused."""

import json
import os
import resource
import shutil

import h5py
import numpy as np
import pytest
from text_files import make_file, opened, part_of, raised, shared_folder

from mpillm.config import UserError
from mpillm.layout import hdf5
from mpillm.layout.comm import Solo, world
from mpillm.text import corpus as corpora
from mpillm.text.corpus import open_corpus
from mpillm.text.encode import encode_corpus
from mpillm.text.tokenfile import TokenFile
from mpillm.text.tokenizer import Tokenizer, train_bpe
from mpillm.text.tokenwriter import write_token_file

WAYS = [False] + ([True] if h5py.get_config().mpi and world().size > 1 else [])


def write_corpus(folder, kind):
    """Documents of very different sizes; the largest is cut into pieces."""
    texts = [f"document {i}\n" * (1 + i * i * 40 % 700) for i in range(7)]
    if world().rank == 0 and kind == "lines":
        with open(f"{folder}/corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    elif world().rank == 0:
        os.mkdir(f"{folder}/corpus")
        for i, text in enumerate(texts):
            with open(f"{folder}/corpus/{i}.txt", "w") as file:
                file.write(text)
    world().barrier()
    return (f"{folder}/corpus.jsonl" if kind == "lines" else f"{folder}/corpus"), texts


def prepare(corpus, out, tokenizer, group, parallel=None, share=0.0):
    """Token files OUT and OUT.val; returns what is in OUT."""
    encoded = encode_corpus(open_corpus(corpus, group), tokenizer, group, os.path.dirname(out))
    for path, part in zip((out, out + ".val"), encoded.split(share)[:1 + (share > 0)]):
        write_token_file(path, part, tokenizer, group, overwrite=True, parallel=parallel)
    group.barrier()
    return contents(out)


def contents(path):
    file = opened(path)
    return file.read(0, file.num_tokens).tolist(), file.documents().tolist(), file.sources_hash, file.tokenizer_hash, file.end


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("kind", ["lines", "texts"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_same_file_on_any_number_of_ranks(tokenizer, kind, parallel, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 1024)
    monkeypatch.setattr(corpora, "SEARCH", 256)
    with shared_folder() as folder:
        corpus, texts = write_corpus(folder, kind)
        tokenizer = Tokenizer.of_bytes() if tokenizer == "bytes" else train_bpe(texts, 268)
        ours = prepare(corpus, f"{folder}/all.h5", tokenizer, world(), parallel, share=0.4)
        alone = prepare(corpus, f"{folder}/rank{world().rank}.h5", tokenizer, Solo(), share=0.4)
        assert ours == alone and contents(f"{folder}/all.h5.val") == contents(f"{folder}/rank{world().rank}.h5.val")
        held_out = [opened(f"{folder}/{name}") for name in ("all.h5", "all.h5.val")]
        assert sum(file.num_documents for file in held_out) == 7 and all(file.num_documents for file in held_out)
        decoded = [tokenizer.decode(file.read(start, stop)) for file in held_out for start, stop in zip(file.documents(), file.documents()[1:])]
        assert sorted(decoded) == sorted(texts)
        assert sorted(os.listdir(folder)) == sorted(["corpus.jsonl" if kind == "lines" else "corpus", "all.h5", "all.h5.val",
                                                     *(f"rank{rank}.h5{end}" for rank in range(world().size) for end in ("", ".val"))]) or world().size > 1


@pytest.mark.ranks
def test_without_an_end_of_document_they_follow_each_other():
    with shared_folder() as folder:
        corpus, texts = write_corpus(folder, "texts")
        tokenizer = Tokenizer.of_bytes()
        tokenizer.end = None
        tokens, documents, *_ = prepare(corpus, f"{folder}/all.h5", tokenizer, world())
        assert bytes(tokens).decode() == "".join(texts)
        assert documents == np.cumsum([0] + [len(text) for text in texts]).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("bad", range(2))
def test_a_bad_line_is_told_by_all_ranks(bad):
    with shared_folder() as folder:
        if world().rank == 0:
            with open(f"{folder}/corpus.jsonl", "w") as file:
                file.writelines(('{"text": 1}' if i == bad * 99 else '{"text": "a"}') + "\n" for i in range(100))
        world().barrier()
        line = raised(lambda: prepare(f"{folder}/corpus.jsonl", f"{folder}/all.h5", Tokenizer.of_bytes(), world()))
        assert line in world().collect(line) and len(set(world().collect(line))) == 1
        assert not os.path.exists(f"{folder}/all.h5")


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", WAYS)
def test_a_file_that_exists_is_kept(parallel):
    with shared_folder() as folder:
        path, group = f"{folder}/a.h5", world()
        part = part_of(np.arange(10 * (1 + group.rank), dtype=np.uint16) % 256)
        assert write_token_file(path, part, Tokenizer.of_bytes(), group, parallel=parallel) == (5 * group.size * (group.size + 1), group.size)
        before = contents(path)
        group.barrier()
        assert "--overwrite" in raised(lambda: write_token_file(path, part, Tokenizer.of_bytes(), group, parallel=parallel))
        assert contents(path) == before
        group.barrier()
        write_token_file(path, part, Tokenizer.of_bytes(), group, overwrite=True, parallel=parallel)
        assert os.listdir(folder) == ["a.h5"]


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("when", ["created", "written"])
def test_a_full_disk_leaves_nothing(when, parallel):
    """Played by a limit on the size of files, on the first rank or, once the file is there, on the last."""
    group, (soft, hard) = world(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(rank):
        if group.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    def chunks():
        if when == "written":
            limit(group.size - 1)
        yield np.zeros(50_000, np.uint16)
    with shared_folder() as folder:
        if when == "created":
            limit(0)
        try:
            part = part_of(np.zeros(50_000, np.uint16))._replace(chunks=chunks)
            line = raised(lambda: write_token_file(f"{folder}/a.h5", part, Tokenizer.of_bytes(), group, parallel=parallel))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "a.h5" in line
        group.barrier()
        assert os.listdir(folder) == []


def test_large_vocabularies(tmp_path):
    tokenizer = Tokenizer.of_bytes()
    tokenizer.vocabulary = 2**20
    ids = np.array([0, 70_000, 2**20 - 1], np.uint32)
    write_token_file(str(tmp_path / "a.h5"), part_of(ids), tokenizer, Solo())
    file = opened(tmp_path / "a.h5")
    assert file.dtype == np.uint32 and np.array_equal(file.read(0, 3), ids)
    with h5py.File(tmp_path / "a.h5") as file:      # any reader of HDF5 reads it
        assert file["tokens"][:].tolist() == ids.tolist() and file["documents"][:].tolist() == [0, 3]
        assert file["tokenizer"][:].tobytes() == tokenizer.to_bytes() and file.attrs["vocabulary"] == 2**20


def test_reading(tmp_path):
    file, ids = make_file(tmp_path / "a.h5", 5000)
    assert file.num_tokens == 5000 and file.vocabulary == 257 and file.end == 256 and file.dtype == np.uint16
    assert np.array_equal(file.read(0, 5000), ids) and file.read(4999, 5000).tolist() == [ids[-1]] and file.read(7, 7).size == 0
    assert np.array_equal(file.gather([10, 4000], [5, 1000]), np.concatenate([ids[10:15], ids[4000:]]))
    assert file.tokenizer().hash == file.tokenizer_hash == Tokenizer.of_bytes().hash
    with pytest.raises(ValueError):
        file.read(4999, 5001)


def test_an_id_outside_the_vocabulary_is_named(tmp_path):
    make_file(tmp_path / "a.h5", 500)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["tokens"][321] = 300
    file = opened(tmp_path / "a.h5")
    assert file.read(0, 321).size == 321
    assert "token 321 has id 300" in raised(lambda: file.gather([0, 300], [10, 50]))


def test_files_that_are_cut_short(tmp_path):
    make_file(tmp_path / "a.h5", 5000)
    size = os.path.getsize(tmp_path / "a.h5")
    for keep in (0, 10, 100, 900, size // 2, size - 1):
        shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
        os.truncate(tmp_path / "b.h5", keep)
        assert "prepare" in raised(lambda: opened(tmp_path / "b.h5"))
    file = opened(tmp_path / "a.h5")
    os.truncate(tmp_path / "a.h5", size // 2)
    assert "became shorter" in raised(lambda: file.read(0, 5000))


def test_flipped_bits_never_end_in_another_error(tmp_path):
    """In a child each: some of such files crash HDF5 1.10.8."""
    make_file(tmp_path / "a.h5", 600)
    good, random = (tmp_path / "a.h5").read_bytes(), np.random.default_rng(0)
    for _ in range(5):
        data = bytearray(good)
        for position in random.integers(0, len(data), 4):
            data[position] ^= 1 << int(random.integers(8))
        (tmp_path / "b.h5").write_bytes(data)
        try:
            file = TokenFile(tmp_path / "b.h5")
            file.read(0, file.num_tokens), file.documents(), file.tokenizer()
        except UserError as error:
            assert str(tmp_path / "b.h5") in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("end", "words"), [("kill -SEGV $$", "crashed"), ("echo no h5py here >&2; exit 3", "no h5py here")])
def test_a_child_that_dies_is_a_damaged_file(tmp_path, monkeypatch, end, words):
    make_file(tmp_path / "a.h5", 600)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{end}\n")
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr(hdf5.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError if "SEGV" in end else RuntimeError, match=words):      # only a crash tells of the file
        TokenFile(tmp_path / "a.h5")
    monkeypatch.setattr(hdf5.sys, "executable", str(tmp_path / "none"))
    assert TokenFile(tmp_path / "a.h5").num_tokens == 600


@pytest.mark.ranks
def test_a_group_opens_a_file_together():
    group = world()
    with shared_folder() as folder:
        if group.rank == 0:
            make_file(f"{folder}/a.h5", 500)
        group.barrier()
        assert TokenFile(f"{folder}/a.h5", group).num_tokens == 500
        assert "mpillm prepare" in raised(lambda: TokenFile(f"{folder}/none.h5", group))


def change(file, name, **options):
    del file[name]
    return file.create_dataset(name, **options)


HOSTILE = {
    "link": (lambda file: (file.pop("tokens"), file.__setitem__("tokens", h5py.ExternalLink("/etc/hostname", "/x"))), "link"),
    "soft link": (lambda file: (file.pop("tokens"), file.__setitem__("tokens", h5py.SoftLink("/tokens"))), "link"),
    "external": (lambda file: change(file, "tokens", shape=(9,), dtype="u2", external=[("/etc/passwd", 0, 18)]), "external"),
    "virtual": (lambda file: (file.pop("tokens"), file.create_virtual_dataset("tokens", h5py.VirtualLayout((9,), "u2"))), "virtual"),
    "chunks": (lambda file: change(file, "tokens", data=np.zeros(9, "u2"), chunks=(3,)), "chunked"),
    "huge": (lambda file: change(file, "tokens", shape=(2**42,), dtype="u2"), "not in the file"),
    "no tokens": (lambda file: file.pop("tokens"), "no dataset /tokens"),
    "group": (lambda file: (file.pop("tokens"), file.create_group("tokens")), "not a one-dimensional"),
    "matrix": (lambda file: change(file, "tokens", data=np.zeros((3, 3), "u2")), "not a one-dimensional"),
    "floats": (lambda file: change(file, "tokens", data=np.zeros(9, "f4")), "type float32; expected uint16 or uint32"),
    "empty": (lambda file: change(file, "tokens", data=np.zeros(0, "u2")), "holds no tokens"),
    "documents": (lambda file: change(file, "documents", data=np.array([0, 7])), "runs from 0 to 7"),
    "no documents": (lambda file: file.pop("documents"), "no dataset /documents"),
    "format": (lambda file: file.attrs.__setitem__("format", 99), "format 99"),
    "no vocabulary": (lambda file: file.attrs.pop("vocabulary"), "attribute 'vocabulary'"),
    "text": (lambda file: file.attrs.__setitem__("end", "none"), "attribute 'end'"),
    "vocabulary": (lambda file: file.attrs.__setitem__("vocabulary", 10**6), "do not fit"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    make_file(tmp_path / "a.h5", 500)
    alter, words = HOSTILE[case]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        alter(file)
    assert words in raised(lambda: opened(tmp_path / "a.h5"))


def test_a_changed_tokenizer_is_refused(tmp_path):
    make_file(tmp_path / "a.h5", 500)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["tokenizer"][3] += 1
    assert "does not have the hash" in raised(opened(tmp_path / "a.h5").tokenizer)


def test_no_token_file(tmp_path):
    (tmp_path / "text.h5").write_text("hello" * 1000)
    assert "not an HDF5 file" in raised(lambda: TokenFile(tmp_path / "text.h5"))
    assert "mpillm prepare" in raised(lambda: TokenFile(tmp_path / "none.h5"))
    assert "not a file" in raised(lambda: TokenFile(tmp_path))
