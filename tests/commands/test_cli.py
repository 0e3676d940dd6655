"""The command line of one rank: help, mistakes, and `mpillm inspect`."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpillm import __main__ as cli
from mpillm.commands import COMMANDS
from mpillm.layout.comm import Solo
from mpillm.layout.slab import Slab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As if no launcher had started this process, and with its threads as they are."""
    monkeypatch.setattr(cli.launch, "launched", lambda: False)
    monkeypatch.setattr(cli, "prepare_threads", lambda: None)


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def timed(*arguments):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "mpillm", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=20)
    return done, time.monotonic() - started


@pytest.mark.parametrize("arguments", [["--help"], ["trian"]])
def test_help_and_mistakes_are_answered_at_once(arguments):
    runs = [timed(*arguments) for _ in range(3)]
    assert min(seconds for _, seconds in runs) < 1.0     # 0.03 to 0.06 s on an idle machine
    assert runs[0][0].returncode == (0 if arguments == ["--help"] else 2)


def test_help_names_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and err == "" and all(f"\n  {name} " in out for name in COMMANDS)
    assert run(capsys, "--version")[1].startswith("mpillm ")


@pytest.mark.parametrize("command", [name for name in COMMANDS if (ROOT / "mpillm" / "commands" / f"{name}.py").exists()])
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and out.startswith(f"usage: mpillm {command}")


@pytest.mark.parametrize("arguments, line", [
    (["inspct"], "unknown command 'inspct'; did you mean 'inspect'?"),
    (["xyz"], "unknown command 'xyz'; commands are prepare, train, submit, doctor, evaluate, generate, verify, inspect"),
    (["inspect"], "inspect: the following arguments are required: FILE; see mpillm inspect --help"),
    (["inspect", "x", "--jsno"], "inspect: unrecognized arguments: --jsno; see mpillm inspect --help"),
    (["inspect", "missing.h5"], "missing.h5: cannot read the token file: No such file or directory; make it with `mpillm prepare`"),
])
def test_mistakes_give_one_line(capsys, monkeypatch, tmp_path, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments) == (2, "", f"mpillm: error: {line}\n")


def test_a_failure_shows_rank_and_traceback(capsys, monkeypatch):
    from mpillm.commands import inspect

    def broken(arguments):
        raise ValueError("broken")
    monkeypatch.setattr(inspect, "run", broken)
    code, out, err = run(capsys, "inspect", "x")
    assert code == 1 and err.startswith("mpillm: rank 0 failed: ValueError: broken\nTraceback") and out == ""


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit(), 0), (SystemExit("no"), 1)])
def test_other_ways_to_end(capsys, monkeypatch, error, code):
    from mpillm.commands import inspect

    def end(arguments):
        raise error
    monkeypatch.setattr(inspect, "run", end)
    assert run(capsys, "inspect", "x")[0] == code


def test_a_reader_that_goes_away_is_no_failure():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    closed = subprocess.run([sys.executable, "-m", "mpillm", "--help"], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=20)
    assert closed.returncode == 141 and closed.stderr == ""
    try:
        reader.stdin.close()
    except BrokenPipeError:
        pass


# ---- inspect --------------------------------------------------------------------------------------------------------

@pytest.fixture
def token_file(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number}\n" * 5)
    assert cli.main(["prepare", str(tmp_path / "texts"), str(tmp_path / "tokens.h5")]) == 0
    capsys.readouterr()
    return tmp_path / "tokens.h5"


@pytest.fixture
def make_checkpoint():
    """Saves a checkpoint of a run directory; its tensors are 0, 1, 2, 3, 4 unless given."""
    from mpillm.backend import open_backend
    from mpillm.store.checkpoint import save
    from mpillm.store.hyperslab import Entry

    def make(run_directory, step=7, tensors=None):
        tensors = tensors or {f"{table}/norm.weight": np.arange(5, dtype=np.float32) for table in ("masters", "moment1", "moment2")}
        entries = [Entry(name, array.shape, Slab.whole(array.shape), array) for name, array in tensors.items()]
        manifest = {"kind": "state", "job": {"model": {"family": "llama", "layers": 2}}, "mesh": {"dp": 2, "tp": 1}, "samples": 64,
                    "tokenizer": "ab" * 32, "cursor": {"epoch": 0, "tokens": 4096}, "changes": []}
        return save(run_directory / "checkpoints", step, entries, manifest, {"tokenizer.json": b"{}"}, Solo(), open_backend("cpu"))
    return make


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    return make_checkpoint(tmp_path / "run")


def test_inspect_of_a_token_file(capsys, token_file):
    code, out, err = run(capsys, "inspect", str(token_file))
    assert code == 0 and err == ""
    assert "documents       3," in out and "vocabulary      257" in out and "tokenizer       bytes, end of a document 256" in out
    holds = json.loads(run(capsys, "inspect", str(token_file), "--json")[1])
    assert holds["kind"] == "tokens" and holds["documents"] == 3 and holds["bytes"] == token_file.stat().st_size
    assert holds["tokens"] == 3 * (5 * len("text number 0\n") + 1)


def test_inspect_of_a_checkpoint(capsys, checkpoint):
    run_directory = checkpoint.parent.parent
    code, out, err = run(capsys, "inspect", str(checkpoint / "state.h5"))
    assert code == 0 and err == "" and "family=llama layers=2" in out and "dp=2 tp=1" in out and "4096" in out and "norm.weight" not in out
    out = run(capsys, "inspect", str(checkpoint), "--tensors")[1]
    assert out.count("norm.weight") == 3 and "float32" in out
    holds = json.loads(run(capsys, "inspect", str(run_directory), "--json")[1])
    assert holds["step"] == 7 and holds["tensors"]["moment1/norm.weight"]["bytes"] == 20


def test_inspect_tells_values_on_demand(capsys, checkpoint, token_file):
    out = run(capsys, "inspect", str(checkpoint), "--values")[1]
    assert out.count("5.47723") == 3 and "norm" in out      # the root of 30
    tensor = json.loads(run(capsys, "inspect", str(checkpoint), "--values", "--json")[1])["tensors"]["masters/norm.weight"]
    assert (tensor["low"], tensor["high"], tensor["not_finite"]) == (0.0, 4.0, 0)
    code, out, err = run(capsys, "inspect", str(token_file), "--values")
    assert code == 2 and out == "" and "is no checkpoint" in err and err.count("\n") == 1


def test_inspect_compares_two_checkpoints(capsys, checkpoint, make_checkpoint, tmp_path):
    same = make_checkpoint(tmp_path / "same", step=9)
    code, out, err = run(capsys, "inspect", str(checkpoint), "--diff", str(tmp_path / "same"))
    assert code == 0 and err == "" and "0 of 3 tensors differ" in out and re.search("step +7 +9\n", out)
    holds = json.loads(run(capsys, "inspect", str(checkpoint), "--diff", str(same), "--json")[1])
    assert holds["equal"] and holds["entries"] == {"step": [7, 9]} and holds["tensors"] == {}
    other = make_checkpoint(tmp_path / "other", 7, {"masters/norm.weight": np.array([0, 1, 2, 3.5, 4], np.float32), "moment1/norm.weight": np.ones(6, np.float32),
                                                     "moment2/more.weight": np.full(1, np.nan, np.float32)})
    code, out, err = run(capsys, "inspect", str(checkpoint), "--diff", str(other))
    assert code == 1 and err == "" and "4 of 4 tensors differ" in out
    assert re.search(r"masters/norm.weight +1 +0.5 +0.125\n", out) and re.search(r"moment1/norm.weight +a: 5 +b: 6 *\n", out)
    assert re.search(r"moment2/norm.weight +a: 5 +b: none *\n", out) and re.search(r"moment2/more.weight +a: none +b: 1 *\n", out)


def test_inspect_compares_nothing_but_checkpoints(capsys, checkpoint, token_file):
    for pair in ((checkpoint, token_file), (token_file, checkpoint), (checkpoint, "nowhere")):
        code, out, err = run(capsys, "inspect", str(pair[0]), "--diff", str(pair[1]))
        assert code == 2 and out == "" and "checkpoint" in err and err.count("\n") == 1


def test_inspect_of_something_else(capsys, tmp_path, checkpoint):
    (tmp_path / "notes.txt").write_text("no token file")
    code, out, err = run(capsys, "inspect", str(tmp_path / "notes.txt"))
    assert code == 2 and out == "" and err.startswith("mpillm: error: ") and "not an HDF5 file" in err and err.count("\n") == 1
    (checkpoint / "manifest.json").write_text("{}")
    code, out, err = run(capsys, "inspect", str(checkpoint))
    assert code == 2 and out == "" and err.count("\n") == 1 and "manifest" in err
