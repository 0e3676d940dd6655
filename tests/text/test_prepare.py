"""`mpillm prepare`, called as the command line calls it."""

import argparse
import os

import pytest
from text_files import opened, raised, shared_folder

from mpillm.commands import prepare
from mpillm.layout.comm import world
from mpillm.text import encode

pytestmark = pytest.mark.ranks


def run(*words):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    code = prepare.run(parser.parse_args([str(word) for word in words]))
    world().barrier()
    return code


def write_texts(folder, number=60):
    if world().rank == 0:
        os.mkdir(f"{folder}/texts")
        for i in range(number):
            with open(f"{folder}/texts/{i:02}.txt", "w") as file:
                file.write(f"Text number {i} tells of {i * i} things.\n" * (1 + i))
    world().barrier()
    return f"{folder}/texts"


def test_train_and_validation(capsys):
    with shared_folder() as folder:
        texts, train, held_out = write_texts(folder), f"{folder}/new/train.h5", f"{folder}/new/val.h5"
        assert run(texts, train, "--tokenizer", "bpe:300", "--validation", held_out, "--share", 0.2) == 0
        files = [opened(path) for path in (train, held_out)]
        assert sum(file.num_documents for file in files) == 60 and 3 <= files[1].num_documents <= 25
        assert files[0].vocabulary == 300 and files[0].tokenizer_hash == files[1].tokenizer_hash
        printed = capsys.readouterr().out
        assert ("60 files" in printed and "bytes per token" in printed) if world().rank == 0 else not printed
        assert run(texts, f"{folder}/again.h5", "--tokenizer", train) == 0
        again = opened(f"{folder}/again.h5")
        assert again.tokenizer_hash == files[0].tokenizer_hash and again.num_documents == 60
        assert sorted(os.listdir(f"{folder}/new")) == ["train.h5", "val.h5"]


def test_what_was_left_out_is_said(capsys):
    with shared_folder() as folder:
        texts = write_texts(folder, 7)
        if world().rank == 0:
            for name, data in (("x.bin", b"\0\1"), ("y.txt", b"caf\xe9")):
                with open(f"{texts}/{name}", "wb") as file:
                    file.write(data)
        world().barrier()
        assert run(texts, f"{folder}/a.h5") == 0 and opened(f"{folder}/a.h5").num_documents == 8
        printed = capsys.readouterr().out
        assert world().rank or ("left out 1 files" in printed and "1 places that are not UTF-8" in printed)


def test_the_spool_goes_to_a_folder_that_is_made_for_it(monkeypatch):
    monkeypatch.setattr(encode, "SPOOL_MEMORY", 100)
    with shared_folder() as folder:
        texts, out = write_texts(folder), f"{folder}/new/er/a.h5"
        assert "no such file" in raised(lambda: run(f"{folder}/none", out))
        assert "bpe:N or a tokenizer.json" in raised(lambda: run(texts, out, "--tokenizer", "bites"))
        world().barrier()
        assert not os.path.exists(f"{folder}/new")      # a refused corpus or tokenizer leaves none
        world().barrier()
        assert run(texts, out) == 0 and opened(out).num_documents == 60 and os.listdir(f"{folder}/new/er") == ["a.h5"]


def test_mistakes():
    with shared_folder() as folder:
        texts, out = write_texts(folder, 3), f"{folder}/a.h5"
        if world().rank == 0:
            os.mkdir(f"{folder}/binary")
            with open(f"{folder}/binary/a", "wb") as file:
                file.write(b"\0")
        world().barrier()
        assert "without --validation" in raised(lambda: run(texts, out, "--share", 0.1))
        assert "the same file" in raised(lambda: run(texts, out, "--validation", f"{folder}/../{os.path.basename(folder)}/a.h5"))
        assert "no such file" in raised(lambda: run(f"{folder}/none", out))
        assert "no document with text" in raised(lambda: run(f"{folder}/binary", out))
        assert "bpe:N or a tokenizer.json" in raised(lambda: run(texts, out, "--tokenizer", "bites"))
        assert "--share 0.0001" in raised(lambda: run(texts, out, "--validation", f"{folder}/v.h5", "--share", 0.0001))
        assert "use bpe:" in raised(lambda: run(texts, out, "--tokenizer", "bpe:9999"))
        world().barrier()
        assert not os.path.exists(out)
        assert run(texts, out) == 0 and "--overwrite" in raised(lambda: run(texts, out))
        assert run(texts, out, "--overwrite") == 0
