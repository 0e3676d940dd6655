"""Every mistake that a user can make: one line over all ranks, exit code 2, and every byte on the disk as it was."""

import gzip
import json
import os
import shlex
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import h5py
import pytest
from command_runs import Running, changed, flip, launcher, run, tree, write_job, write_texts


class Case(NamedTuple):
    """A command in the workplace, what is done to the workplace before, and words of the line that it has to give."""
    command: str
    words: tuple
    before: object


CASES = {}


def bad(name, command, *words, before=lambda place: None):
    assert name not in CASES
    CASES[name] = Case(command, words, before)


# ---- what is done to the workplace ----------------------------------------------------------------------------------

def text(name, content):
    return lambda place: (place / name).write_text(content)


def data(name, content):
    return lambda place: (place / name).write_bytes(content)


def job(**sections):
    return lambda place: write_job(place / "job.toml", **sections)


def cut_short(name, share):
    return lambda place: os.truncate(place / name, int((place / name).stat().st_size * share))


def set_token(name, value):
    """Writes an id over a token in the middle of a token file."""
    def change(place):
        with h5py.File(place / name, "r+") as file:
            file["tokens"][len(file["tokens"]) // 2] = value
    return change


def link(name, target):
    return lambda place: (place / name).symlink_to(target)


def step(place, number):
    return place / "runs" / "done" / "checkpoints" / f"step-{number:08d}"


def damaged(place, number, name="state.h5"):
    """Flips a bit in the data of a checkpoint, or of a file of it."""
    path = step(place, number) / name
    if name == "state.h5":
        with h5py.File(path, "r") as file:
            offset = file["masters/blocks.0.mlp.up.weight"].id.get_offset() + 41
    elif name == "manifest.json":
        offset = path.read_bytes().index(b'"samples"') + 1     # a letter: the JSON stays readable
    else:
        offset = path.stat().st_size // 2
    flip(path, offset)


def all_damaged(place):
    for number in (2, 4):
        damaged(place, number, "manifest.json")


def hugging_face(place):
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (place / "hf" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")


def lines(name, *records):
    return text(name, "".join(json.dumps(record) + "\n" for record in records))


def in_turn(*works):
    def work(place):
        for one in works:
            one(place)
    return work


# ---- the command line -----------------------------------------------------------------------------------------------

bad("unknown-command", "trian job.toml", "unknown command 'trian'", "did you mean 'train'")
bad("unknown-option", "train job.toml --dry-rnu", "train: unrecognized arguments: --dry-rnu", "mpillm train --help")
bad("no-job", "train", "train: the following arguments are required: JOB.toml;", "mpillm train --help")
bad("override-without-value", "train job.toml train.steps", "'train.steps'", "expected section.key=value")
bad("override-without-section", "train job.toml steps=5", "'steps=5'", "expected section.key=value")
bad("override-of-unknown-key", "train job.toml train.stesp=5", "unknown key train.stesp", "did you mean 'steps'")
bad("ranks-of-a-real-run", "train job.toml --ranks 4", "--ranks 4", "--dry-run")
bad("ranks-no-number", "train job.toml --dry-run --ranks four", "--ranks", "'four'", "mpillm train --help")
bad("dry-run-of-no-ranks", "train job.toml --dry-run --ranks 0", "--ranks 0", "expected 1 or more")

# ---- the job file ---------------------------------------------------------------------------------------------------

bad("job-missing", "train jbo.toml", "jbo.toml: cannot read the job file", "No such file")
bad("job-is-a-folder", "train texts", "texts: cannot read the job file", "Is a directory")
bad("job-not-toml", "train job.toml", "job.toml: not a TOML file", "line 3", before=text("job.toml", "[model]\nlayers = 1\nwidth 8\n"))
bad("job-not-text", "train job.toml", "job.toml: not a TOML file", before=data("job.toml", bytes(range(128, 256))))
bad("section-typo", "train job.toml", "job.toml: unknown section [optimiser]", "did you mean 'optimizer'", before=job(optimiser="rate = 1e-3"))
bad("key-typo", "train job.toml", "job.toml: unknown key optimizer.lr", "keys of [optimizer] are name, rate,", before=job(optimizer="lr = 1e-3"))
bad("section-as-key", "train job.toml", "mesh is a section, found 4", "write [mesh]",
    before=lambda place: (place / "job.toml").write_text("mesh = 4\n" + (place / "job.toml").read_text()))
bad("key-missing", "train job.toml", "job.toml: run.name is missing", before=job(run="device = 'cpu'"))
bad("wrong-type", "train job.toml train.steps=many", "train.steps = 'many'", "expected a whole number")
bad("wrong-value", "train job.toml model.family=lama", "model.family = 'lama'", "expected one of gpt, llama", "did you mean 'llama'")
bad("out-of-range", "train job.toml train.batch=0", "train.batch = 0", "expected at least 1")
bad("not-finite", "train job.toml optimizer.rate=nan", "optimizer.rate = nan", "expected a finite number")
bad("heads-and-width", "train job.toml model.heads=3", "model.heads=3", "model.width=8", "use heads of 1, 2, 4, 8")
bad("kv-heads", "train job.toml model.heads=4 model.kv_heads=3", "model.kv_heads=3", "model.heads=4", "use kv_heads of 1, 2, 4")
bad("kv-heads-of-gpt", "train job.toml model.family=gpt model.kv_heads=1", "model.kv_heads=1", "leave kv_heads out")
bad("odd-head-width", "train job.toml model.heads=8", "even head width", "change heads or width")
bad("no-gpu", "train job.toml run.device=gpu", "device = \"gpu\"", "use device \"cpu\"")
bad("head-width-of-gpt", "train job.toml model.family=gpt model.head_width=8", "model.head_width = 8", 'use family = "llama"')
bad("wide-heads-by-hand-on-a-gpu", "train job.toml run.device=gpu model.head_width=300", "heads are 300 wide, at most 256", "set model.head_width to 256 or less")
bad("wide-heads-on-a-gpu", "train job.toml run.device=gpu model.width=600 model.heads=2", "heads are 300 wide, at most 256", "raise model.heads to 3")
bad("stages-by-nccl", "train job.toml --dry-run --ranks 2 run.device=gpu communication.transport=nccl mesh.pp=2", "nccl", "pp=2", "pp = 1")
bad("betas", "train job.toml optimizer.betas=[0.9]", "optimizer.betas = [0.9]", "expected two numbers")
bad("name-with-a-slash", "train job.toml run.name=../elsewhere", "run.name = '../elsewhere'", "plain folder name")
bad("tensor-parallel-on-one-rank", "train job.toml mesh.tp=2", "mesh: tp=2", "does not divide the 1 ranks", "start a multiple of 2 ranks")
bad("tp-of-heads", "train job.toml --dry-run --ranks 4 mesh.tp=4", "mesh: tp=4 does not divide model.heads=2", "use tp of 1, 2")
bad("tp-of-kv-heads", "train job.toml --dry-run --ranks 4 model.width=24 model.heads=12 model.kv_heads=3 mesh.tp=4", "mesh: tp=4", "model.kv_heads=3",
    "use tp of 1, 3, 6, 12")
bad("cp-of-few-tokens", "train job.toml --dry-run --ranks 5 mesh.cp=5", "mesh: cp=5 needs 2 cp = 10 blocks", "model.context=8", "use cp of 1 to 4")
bad("cp-of-heads", "train job.toml --dry-run --ranks 4 mesh.cp=4 mesh.cp_form=ulysses", "mesh: cp=4", "2 query heads", "use cp of 1, 2", 'cp_form = "ring"')
bad("ep-without-experts", "train job.toml --dry-run --ranks 2 mesh.ep=2", "mesh: ep=2 with model.experts=0", "use ep = 1")
bad("ep-of-experts", "train job.toml --dry-run --ranks 4 mesh.ep=4 model.experts=2", "mesh: ep=4 is more than model.experts=2", "use ep of 1, 2")
bad("ep-of-ranks", "train job.toml --dry-run --ranks 4 mesh.ep=3 model.experts=4", "mesh: ep=3 does not divide dp x cp = 4", "use ep of 1, 2, 4")
bad("chunks-of-1f1b", "train job.toml --dry-run --ranks 2 mesh.pp=2 mesh.chunks=2", "mesh: chunks=2", 'only "interleaved"', "use chunks = 1")
bad("one-chunk-interleaved", "train job.toml --dry-run --ranks 2 mesh.pp=2 mesh.schedule=interleaved", "chunks=1", "it needs 2 or more of both", '"1f1b"')
bad("stages-of-another-model", "train job.toml --dry-run --ranks 2 mesh.pp=2 mesh.stages=[1,1]", "mesh: stages = [1, 1]", "model.layers=1", "leave stages out")
bad("two-rests", "train job.toml mesh.dp=rest mesh.tp=rest", "mesh")
bad("wrong-world-size", "train job.toml mesh.dp=2", "mesh: dp=2 needs 2 ranks", "this job has", "start 2 ranks")

# ---- token files ----------------------------------------------------------------------------------------------------

bad("tokens-missing", "train job.toml data.train=missing.h5", "missing.h5", "No such file", "mpillm prepare")
bad("tokens-a-folder", "train job.toml data.train=texts", "texts: not a file", "mpillm prepare")
bad("tokens-not-hdf5", "train job.toml data.train=job.toml", "job.toml: not an HDF5 file", "mpillm prepare")
bad("tokens-of-another-kind", "train job.toml data.train=runs/done/checkpoints/step-00000004/state.h5", "state.h5: no dataset /tokens", "mpillm prepare")
bad("tokens-cut-short", "train job.toml", "train.h5", "cut short", "mpillm prepare", before=cut_short("train.h5", 0.7))
bad("tokens-cut-to-nothing", "train job.toml", "train.h5: not an HDF5 file", "mpillm prepare", before=cut_short("train.h5", 0))
bad("tokens-beyond-the-vocabulary", "train job.toml train.batch=120", "train.h5: token", "id 999", "vocabulary ends at 256", "mpillm prepare",
    before=set_token("train.h5", 999))
bad("validation-beyond-the-vocabulary", "train job.toml data.validation=val.h5", "val.h5: token", "id 999", "vocabulary ends at 256", "mpillm prepare",
    before=set_token("val.h5", 999))
bad("vocabulary-too-small", "train job.toml model.vocabulary=200", "model.vocabulary=200", "257", "leave it out")
bad("validation-of-another-tokenizer", "train job.toml data.validation=other.h5", "other.h5: made with another tokenizer", "vocabulary 270", "--tokenizer")
bad("mixture-of-tokenizers", 'train job.toml "data.train={ \'train.h5\' = 1, \'other.h5\' = 2 }"', "other.h5: made with another tokenizer", "--tokenizer")
bad("mixture-weight", 'train job.toml "data.train={ \'train.h5\' = 0 }"', "weight 0 of train.h5", "more than 0")
bad("too-few-tokens", "train job.toml model.context=5000", "train.h5", "tokens", "5001", "smaller model.context")
bad("too-few-validation-tokens", "train job.toml data.validation=tiny.h5 model.context=16", "tiny.h5", "tokens", "17", "smaller model.context")
bad("random-without-vocabulary", "train job.toml data.train=random", "model.vocabulary", "set it")

# ---- the run directory ----------------------------------------------------------------------------------------------

bad("runs-is-a-file", "train job.toml", "runs", "is a file, not a directory", "another",
    before=in_turn(lambda place: shutil.rmtree(place / "runs"), text("runs", "notes")))
bad("run-is-a-file", "train job.toml", "runs/new: is a file, not a directory", "run.name", before=text("runs/new", "notes"))
bad("run-is-a-link", "train job.toml run.name=linked", "runs/linked: is a symbolic link", before=link("runs/linked", "done"))
bad("log-is-a-link", "train job.toml run.name=done train.steps=6", "log.txt: is not a plain file", "run.name",
    before=in_turn(lambda place: (place / "runs/done/log.txt").unlink(), link("runs/done/log.txt", "../../job.toml")))
bad("checkpoints-is-a-file", "train job.toml", "checkpoints: is not a directory", "run.name",
    before=in_turn(lambda place: (place / "runs/new").mkdir(), text("runs/new/checkpoints", "notes")))
bad("told-to-stop", "train job.toml run.name=done train.steps=6", "runs/done/STOP", "delete that file", before=text("runs/done/STOP", ""))
bad("another-width", "train job.toml run.name=done model.width=16", "model.width = 16", "8 in the checkpoint", "run.name")
bad("another-seed", "train job.toml run.name=done train.seed=7", "train.seed = 7", "1 in the checkpoint", "run.name")
bad("another-tokenizer", "train job.toml run.name=done data.train=other.h5", "data.train", "the tokenizer", "step-00000004")
bad("all-checkpoints-damaged", "train job.toml run.name=done train.steps=6", "none of its 2 checkpoints is valid", "move them away", before=all_damaged)

# ---- weights to start from, checkpoints on the command line ---------------------------------------------------------

bad("start-missing", "train job.toml train.start=runs/missing", "runs/missing: does not exist", "step directory")
bad("start-of-another-model", "train job.toml train.start=runs/done model.width=16", "model.width = 16", "8 in the checkpoint", "step-00000004")
bad("start-of-fewer-layers", "train job.toml train.start=runs/done model.layers=3", "model.layers = 3", "in the checkpoint", "start from another")
bad("start-damaged", "train job.toml train.start=runs/done/checkpoints/step-00000002", "step-00000002", "mlp.up.weight", "damaged",
    before=lambda place: damaged(place, 2))
bad("start-from-hugging-face", "train job.toml train.start=hf", "hf: is a Hugging Face directory", "not read yet", before=hugging_face)
bad("evaluate-missing", "evaluate runs/missing --data val.h5", "runs/missing: does not exist", "run directory")
bad("evaluate-a-file", "evaluate train.h5 --data val.h5", "train.h5: is a file", "run directory")
bad("evaluate-nothing", "evaluate texts --data val.h5", "texts: holds no checkpoint", "run directory")
bad("evaluate-hugging-face", "evaluate hf --data val.h5", "hf: is a Hugging Face directory", "not read yet", before=hugging_face)
bad("evaluate-damaged", "evaluate runs/done/checkpoints/step-00000004 --data val.h5", "step-00000004", "mlp.up.weight", "damaged",
    before=lambda place: damaged(place, 4))
bad("evaluate-damaged-manifest", "evaluate runs/done/checkpoints/step-00000004 --data val.h5", "manifest.json", "altered",
    before=lambda place: damaged(place, 4, "manifest.json"))
bad("evaluate-incomplete", "evaluate runs/done/checkpoints/step-00000004 --data val.h5", "step-00000004: has no manifest.json", "not a complete checkpoint",
    before=lambda place: (step(place, 4) / "manifest.json").unlink())
bad("evaluate-cut-short", "evaluate runs/done/checkpoints/step-00000004 --data val.h5", "state.h5",
    before=cut_short("runs/done/checkpoints/step-00000004/state.h5", 0.5))
bad("evaluate-tokenizer-altered", "evaluate runs/done/checkpoints/step-00000004 --data val.h5", "tokenizer.json", "SHA-256 differs",
    before=lambda place: damaged(place, 4, "tokenizer.json"))
bad("evaluate-all-damaged", "evaluate runs/done --data val.h5", "none of its 2 checkpoints is valid", before=all_damaged)
bad("evaluate-no-data", "evaluate runs/done", "--data", "mpillm evaluate --help")
bad("evaluate-data-missing", "evaluate runs/done --data vla.h5", "vla.h5", "No such file", "mpillm prepare")
bad("evaluate-data-of-another-tokenizer", "evaluate runs/done --data other.h5", "other.h5: its tokenizer", "is not the model's", "--tokenizer")
bad("evaluate-too-few-tokens", "evaluate runs/done --data tiny.h5", "tiny.h5", "tokens", "a validation window needs 9")
bad("evaluate-beyond-the-vocabulary", "evaluate runs/done --data val.h5", "val.h5: token", "id 999", "mpillm prepare", before=set_token("val.h5", 999))
bad("evaluate-options", "evaluate runs/done --data val.h5 --micro-batch 0", "--micro-batch 0: expected at least 1")

# ---- generate and inspect -------------------------------------------------------------------------------------------

bad("generate-no-prompt", "generate runs/done", "--prompt", "mpillm generate --help")
bad("generate-both-prompts", "generate runs/done --prompt a --prompts job.toml", "--prompts", "not allowed with", "mpillm generate --help")
bad("generate-temperature", "generate runs/done --prompt a --temperature -1", "--temperature -1", "expected 0 or more")
bad("generate-tokens", "generate runs/done --prompt a --tokens=-5", "--tokens -5", "expected 0 or more")
bad("generate-top-p", "generate runs/done --prompt a --top-p 1.5", "--top-p 1.5", "at most 1")
bad("generate-prompts-missing", "generate runs/done --prompts prompts.txt", "--prompts prompts.txt: cannot read it: No such file", "a prompt a line")
bad("generate-prompts-empty", "generate runs/done --prompts prompts.txt", "--prompts prompts.txt: is empty", "a prompt a line", before=text("prompts.txt", ""))
bad("generate-prompts-binary", "generate runs/done --prompts train.h5", "--prompts train.h5: is not UTF-8 text", "a prompt a line")
bad("generate-output-exists", "generate runs/done --prompt a --output job.toml", "--output job.toml: exists already", "another name")
bad("generate-output-in-no-folder", "generate runs/done --prompt a --output nowhere/out.jsonl", "--output nowhere/out.jsonl: nowhere is not a folder", "another name")
bad("generate-tokenizer-altered", "generate runs/done --prompt a", "tokenizer.json", "SHA-256 differs",
    before=lambda place: [damaged(place, number, "tokenizer.json") for number in (2, 4)])
bad("inspect-missing", "inspect missing.h5", "missing.h5", "No such file")
bad("inspect-something-else", "inspect job.toml", "job.toml: not an HDF5 file")
bad("inspect-a-folder", "inspect texts", "texts: holds no checkpoint", "run directory")

# ---- prepare --------------------------------------------------------------------------------------------------------

bad("corpus-missing", "prepare txets new.h5", "corpus txets: no such file, folder, glob or definition")
bad("corpus-name-typo", "prepare stdlbi new.h5", "corpus stdlbi", "did you mean 'stdlib'")
bad("corpus-empty-folder", "prepare empty new.h5", "corpus empty: no file with text", "expected a text file, a folder",
    before=lambda place: (place / "empty").mkdir())
bad("corpus-of-empty-files", "prepare empty new.h5", "corpus empty: no file with text",
    before=in_turn(lambda place: (place / "empty").mkdir(), text("empty/a.txt", ""), text("empty/b.txt", "")))
bad("corpus-of-binary-files", "prepare binary new.h5", "corpus binary: no document with text in its 2 files", "UTF-8",
    before=in_turn(lambda place: (place / "binary").mkdir(), data("binary/a", bytes(64)), data("binary/b", b"\x7fELF" + bytes(64))))
bad("corpus-glob-of-nothing", "prepare 'texts/*.md' new.h5", "corpus texts/*.md: no file with text")
bad("corpus-definition-typo", "prepare corpus.toml new.h5", "corpus.toml: unknown key exclud", "did you mean 'exclude'",
    before=text("corpus.toml", '[[source]]\npath = "texts"\nexclud = ["a"]\n'))
bad("corpus-definition-not-toml", "prepare corpus.toml new.h5", "corpus.toml: not a TOML file", before=text("corpus.toml", "path: texts\n"))
bad("lines-without-the-field", "prepare corpus.jsonl new.h5", "corpus.jsonl: line at byte", "'text'", "found keys content, id",
    before=lines("corpus.jsonl", {"text": "good"}, {"content": "good", "id": 1}))
bad("lines-not-json", "prepare corpus.jsonl new.h5", "corpus.jsonl: line at byte 13: not JSON", "one JSON object a line",
    before=text("corpus.jsonl", '{"text":"a"}\n{"text": "b"\n'))
bad("corpus-not-gzip", "prepare corpus.txt.gz new.h5", "corpus.txt.gz: cannot unpack", before=text("corpus.txt.gz", "plain text"))
bad("corpus-gzip-cut-short", "prepare corpus.jsonl.gz new.h5", "corpus.jsonl.gz: cannot unpack",
    before=data("corpus.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 50)[:-20]))
bad("output-exists", "prepare texts train.h5", "train.h5: exists already", "--overwrite")
bad("output-is-a-folder", "prepare texts runs", "runs: is a folder", "runs/tokens.h5")
bad("output-below-a-file", "prepare texts job.toml/new.h5", "job.toml/new.h5", "is a file, not a folder")
bad("validation-exists", "prepare texts new.h5 --validation val.h5", "val.h5: exists already", "--overwrite")
bad("validation-is-output", "prepare texts new.h5 --validation ./new.h5", "same file", "two names")
bad("share-without-validation", "prepare texts new.h5 --share 0.1", "--share 0.1 without --validation", "name the file")
bad("share-no-number", "prepare texts new.h5 --validation new-val.h5 --share some", "--share", "'some'", "between 0 and 1")
bad("share-of-nothing", "prepare texts new.h5 --validation new-val.h5 --share 0.0000001", "new-val.h5: none of the 12 documents", "another share")
bad("tokenizer-missing", "prepare texts new.h5 --tokenizer tokenizer.json", "tokenizer.json: cannot read the tokenizer", "bpe:N")
bad("tokenizer-not-json", "prepare texts new.h5 --tokenizer tokenizer.json", "tokenizer.json: not a tokenizer.json", "Hugging Face",
    before=text("tokenizer.json", "{"))
bad("tokenizer-empty", "prepare texts new.h5 --tokenizer tokenizer.json", "tokenizer.json", "tokenizer file", before=text("tokenizer.json", "{}"))
bad("tokenizer-too-small", "prepare texts new.h5 --tokenizer bpe:100", "bpe:100", "at least 257")
bad("tokenizer-no-number", "prepare texts new.h5 --tokenizer bpe:4k", "bpe:4k", "bpe:4096")
bad("tokenizer-too-large", "prepare texts new.h5 --tokenizer bpe:9000", "bpe:9000", "or fewer, or more text")


# ---- the tests ------------------------------------------------------------------------------------------------------

ON_RANKS = ["unknown-command", "key-typo", "wrong-world-size", "tp-of-heads", "tokens-missing", "tokens-cut-short", "tokens-beyond-the-vocabulary",
            "runs-is-a-file", "another-seed", "start-damaged", "evaluate-beyond-the-vocabulary",
            "generate-output-exists", "corpus-empty-folder", "lines-without-the-field", "output-exists"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workplace with a corpus, token files and a finished run."""
    place = tmp_path_factory.mktemp("bad") / "place"
    write_texts(place / "texts")
    (place / "note.txt").write_text("hi")
    write_job(place / "job.toml", checkpoint="every = 2", run='name = "new"')
    for command in ("prepare texts train.h5 --validation val.h5 --share 0.2", "prepare texts other.h5 --tokenizer bpe:270",
                    "prepare note.txt tiny.h5", "train job.toml run.name=done"):
        done = run(*command.split(), cwd=place)
        assert done.code == 0, done.text
    return place


@pytest.fixture
def place(finished, tmp_path):
    """A copy of the workplace to spoil."""
    return shutil.copytree(finished, tmp_path / "place", symlinks=True)


@pytest.fixture(scope="module")
def outcomes(request, finished, tmp_path_factory):
    """Case -> a future of `refused` in a copy of the workplace: the commands of one process run two at a time."""
    def work(name):
        return refused(CASES[name], shutil.copytree(finished, tmp_path_factory.mktemp(name) / "place", symlinks=True))
    wanted = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_a_mistake[")]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(work, name) for name in wanted}
        pool.shutdown(cancel_futures=True)


def refused(case, place, ranks=None):
    """Runs the command of a case; asserts that it is refused as it should be."""
    case.before(place)
    before = tree(place.parent)
    done = run(*shlex.split(case.command), cwd=place, ranks=ranks)
    assert len(done.ours) == 1 and done.ours[0].startswith("mpillm: error: "), done.text
    for word in case.words:
        assert word in done.ours[0], (word, done.ours[0])
    assert done.code == 2, done
    assert "Traceback" not in done.text
    assert changed(before, tree(place.parent)) == []
    return done


@pytest.mark.parametrize("name", CASES)
def test_a_mistake(name, outcomes):
    done = outcomes[name].result()
    assert done.err.endswith(done.ours[0] + "\n"), done.text


@pytest.mark.skipif(launcher() is None, reason="no mpirun")
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_mistake_on_three_ranks(name, place):
    refused(CASES[name], place, ranks=3)


def test_a_second_run_while_the_first_runs(place):
    """The first one goes on and finishes."""
    arguments = ["train", "job.toml", "train.steps=100000", "checkpoint.every=0"]
    with Running(*arguments, cwd=place) as first:
        first.until((place / "runs/new/metrics.jsonl").exists)
        first.process.send_signal(signal.SIGSTOP)       # so that the disk stands still
        refused(Case("train job.toml run.name=new", ("runs/new: in use by process", str(first.process.pid), "run.name"), lambda place: None), place)
        first.process.send_signal(signal.SIGCONT)
        first.process.send_signal(signal.SIGUSR1)
        assert first.wait().code == 75
