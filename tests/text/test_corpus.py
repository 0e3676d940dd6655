"""Corpora: what is listed, what is read, and that pieces do not depend on the number of ranks."""

import gzip
import json
import os

import numpy as np
import pytest
from text_files import raised

from mpillm.layout.comm import Solo
from mpillm.text import corpus as corpora
from mpillm.text.corpus import Tally, open_corpus
from mpillm.text.sources import list_files
from mpillm.text.tokenizer import train_bpe


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 512)
    monkeypatch.setattr(corpora, "SEARCH", 128)


def documents(path, ranks=1, whole=False):
    """The texts of all documents, read by so many ranks; and the tally of the last."""
    corpus, texts, tally = open_corpus(str(path), Solo()), [], Tally()
    for rank in range(ranks):
        for piece in corpus.pieces_of(rank, ranks, whole):
            for fragment in corpus.read(piece, tally):
                texts = [*texts, fragment.text] if fragment.begins else [*texts[:-1], texts[-1] + fragment.text]
    return texts, tally


def test_a_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert documents(tmp_path / "a.txt")[0] == ["one\r\ntwo\n"]


def test_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden", "empty.txt", ".git/config"):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
    texts, tally = documents(tmp_path)
    assert texts == ["a.md", "b.txt", "sub/c.txt"] and tally.not_text == 1
    assert documents(tmp_path / "*.txt")[0] == ["b.txt"]
    assert documents(tmp_path / "**" / "*.txt")[0] == ["b.txt", "sub/c.txt"]


def test_json_lines(tmp_path, small_pieces):
    texts = [f"document {i} é " + "x" * (i * 37 % 400) for i in range(40)]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)) + '{"text": ""}'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for ranks in (1, 2, 3, 7, 50):
        assert documents(tmp_path / "a.jsonl", ranks)[0] == texts
        assert documents(tmp_path / "b.jsonl.gz", ranks)[0] == texts


@pytest.mark.parametrize("text", ["line of text\n" * 500, "word " * 1000, "x" * 5000, "é" * 3000, "\n" * 4000], ids=len)
def test_large_texts_are_cut(tmp_path, small_pieces, text):
    (tmp_path / "a.txt").write_text(text)
    corpus = open_corpus(str(tmp_path / "a.txt"), Solo())
    assert len(list(corpus.pieces())) > 4 and len(list(corpus.pieces(whole=True))) == 1
    for ranks in (1, 3, 8):
        found, tally = documents(tmp_path / "a.txt", ranks)
        assert found == [text] and not tally.replaced


def test_cuts_do_not_change_the_tokens(tmp_path, small_pieces):
    text = "".join(f"    value_{i} = [{i * 7}, 'text {i}']  # note\n\n\n\n"[i % 5:] for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    tokenizer, corpus = train_bpe([text], 400), open_corpus(str(tmp_path / "a.txt"), Solo())
    pieces = [tokenizer.encode(fragment.text) for piece in corpus.pieces() for fragment in corpus.read(piece, Tally())]
    assert len(pieces) > 4 and np.array_equal(np.concatenate(pieces), tokenizer.encode(text))


def test_undecodable_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd ok\xff")
    texts, tally = documents(tmp_path / "a.txt")
    assert texts == ["caf\ufffd \ufffd ok\ufffd"] and tally.replaced == 2


def test_every_piece_has_one_rank(tmp_path, small_pieces):
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text("some words\n" * (1 + 60 * (i % 3)))
    corpus = open_corpus(str(tmp_path), Solo())
    for ranks in (1, 2, 3, 4, 30):
        assert [piece for rank in range(ranks) for piece in corpus.pieces_of(rank, ranks)] == list(corpus.pieces())


def test_definitions(tmp_path):
    (tmp_path / "text" / "tests").mkdir(parents=True)
    for name in ("a.py", "b.txt", "c.c", "tests/d.py"):
        (tmp_path / "text" / name).write_text(name)
    definition = tmp_path / "mine.toml"
    definition.write_text('[[source]]\npath = "text"\ninclude = ["*.py", "*.txt"]\nexclude = ["tests"]\n'
                          '[[source]]\npath = "nowhere"\noptional = true\n')
    assert documents(definition)[0] == ["a.py", "b.txt"]
    for text, words in (("[[source]]\npaht = 'x'", "did you mean 'path'"), ("[[source]]\nfield = 'x'", "without path"), ("path = 'x'", "[[source]]"),
                        ("[[source]]\npath = 1", "expected a str"), ("[[source", "not a TOML file"),
                        ("[[source]]\npath = 'text'\ninclude = [1]", "include = [1]: expected a list of texts"),
                        ("[[source]]\npath = 'text'\nexclude = ['a', {}]", "exclude = ['a', {}]: expected a list of texts")):
        definition.write_text(text)
        assert words in raised(lambda: list_files(str(definition)))


def test_the_standard_library_is_there():
    files = list_files("stdlib")
    names = [file.name for file in files]
    assert "json/decoder.py" in names and sum(file.size for file in files) > 5e6
    assert not any({"test", "tests", "site-packages", "__pycache__", "idle_test"} & set(name.split("/")) for name in names)


def test_the_sample_of_a_large_corpus(tmp_path, small_pieces):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02} " * 100)
    corpus = open_corpus(str(tmp_path), Solo())
    sample = list(corpus.sample(3000))
    assert len(sample) == 10 and sample == list(corpus.sample(3000)) and sample != sorted(sample)
    assert len(list(corpus.sample(10**6))) == 40


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no file with text" in raised(lambda: documents(tmp_path / "empty"))
    assert "no such file" in raised(lambda: documents(tmp_path / "nothing"))
    assert "did you mean 'stdlib'" in raised(lambda: documents("stdlb"))
    path = tmp_path / "a.jsonl"
    for line, words in (("{", "not JSON"), ("[1]", "a list"), ('{"txt": "a"}', "keys txt"), ('{"text": 1}', "no text under")):
        path.write_text(f'{{"text": "a"}}\n{line}\n')
        assert words in raised(lambda: documents(path)) and "byte 14" in raised(lambda: documents(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_damaged_gzip_files(tmp_path, name):
    path, packed = tmp_path / name, gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999)))
    for data in (packed[:-9], b"not gzip", packed[:-8] + bytes(8), packed[:10] + b"\xff" * 40 + packed[50:]):     # cut, no gzip, wrong sum, wrong data
        path.write_bytes(data)
        line = raised(lambda: documents(path))
        assert line.startswith(f"{path}: cannot unpack: ") and "leave it out of the corpus" in line
