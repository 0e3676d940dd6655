"""Every CUDA kernel compiles for every type it is made for and for the GPUs of today, without spills. Needs no GPU."""

import itertools
import re

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed; jobs/setup.sh --test installs it", exc_type=ImportError)

from mpillm.backend.cuda import modules
from mpillm.backend.cuda.modules import KERNELS, CompileError, compile_source, cuda_include, nvrtc, sources_of
from mpillm.config import UserError

TYPES = {"half": ["bfloat16", "float16"], "": ["bfloat16", "float16", "float32", "float64"]}
ARCHITECTURES, OTHERS = {"bfloat16": ["80", "90a", "100", "120"]}, ["80", "90a"]
SPILLS = {     # (file, kernel): how many bytes it may store to local memory, and why
    ("attention", "forward"): (4, "255 registers at a head width of 128"),
    ("attention_backward", "backward_keys"): (68, "128 registers at a head width of 64, so that two blocks share a multiprocessor; 255 at 128"),
    ("attention_backward", "backward_queries"): (8, "255 registers at a head width of 128"),
    ("attention_plain", "forward"): (16, "the kernel waits for memory"),
    ("attention_plain", "backward_queries"): (24, "the kernel waits for memory"),
    ("attention_plain", "backward_keys"): (24, "the kernel waits for memory"),
    ("layer_norm", "backward"): (100, "float16 rows of more than 8,192 numbers: 128 sums a thread, rather than a second pass over memory"),
    ("swiglu", "swiglu"): (16, "float32 on sm_80: six 64-bit sizes beside three packs"),
}
SIGNATURE = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')
POINTER = re.compile(r"(const )?\w+( \w+)*( const)? ?\*+ ?((const|__restrict__) )*\w+")
NUMBER = re.compile(r"(const )?(long long|double) \w+")
FUNCTION = re.compile(r"(?:Function properties for|Compiling entry function) '?(\w+)")
USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

files = pytest.mark.parametrize("path", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.stem)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        nvrtc()
        cuda_include()
    except UserError as error:
        pytest.skip(str(error))


def headings(path, word):
    """What the lines `// word: ...` among the first lines say; [""] without one."""
    return [each.strip() for each in re.findall(rf"^// {word}:(.*)$", "\n".join(path.read_text().splitlines()[:12]), re.MULTILINE)] or [""]


def types_of(path):
    words = headings(path, "types")[0]
    return TYPES[words] if words in TYPES else words.split()


def variants_of(path):
    """All combinations of the macros that a file needs, line by line, as dicts."""
    found = []
    for line in headings(path, "variants"):
        choices = [(name, values.split(",")) for name, values in (word.split("=") for word in line.split())]
        found += [dict(zip([name for name, _ in choices], values)) for values in itertools.product(*[values for _, values in choices])]
    return found


def cases_of(path, whole):
    """(type, architecture, macros) to compile: all variants for the first type on `whole` architectures, else the first and the last one.

    Without `whole` types other than bfloat16 on one architecture, by turns, and the last variant only.
    """
    types, variants = types_of(path), variants_of(path)
    few = variants[:1] + variants[1:][-1:]
    others = {dtype: OTHERS if whole else [OTHERS[turn % 2]] for turn, dtype in enumerate(types)}
    return [(dtype, arch, defines) for dtype in types for arch in ARCHITECTURES.get(dtype, others[dtype])
            for defines in (variants if dtype == types[0] and arch in whole else few if whole or dtype in ARCHITECTURES else few[-1:])]


def local_memory(log):
    """Kernels that have a stack frame or spills, of what ptxas says: (name, line, bytes stored)."""
    name, found = "", []
    for line in log.splitlines():
        if FUNCTION.search(line):
            name = FUNCTION.search(line)[1]
        elif USE.search(line) and any(map(int, USE.search(line).groups())):
            found.append((name, USE.search(line)[0], int(USE.search(line)[2])))
    return found


@files
@pytest.mark.parametrize("whole", [[], pytest.param(["80", "90a"], marks=pytest.mark.long)], ids=["some", "all"])
def test_compiles_without_spills(path, whole):
    faults = []
    for dtype, arch, defines in cases_of(path, whole):
        try:
            cubin, log = compile_source(path, dtype, arch, defines, ["--ptxas-options=-v"])
        except CompileError as error:
            pytest.fail(str(error)[:3000])
        assert cubin[:4] == b"\x7fELF" and "spill stores" in log
        faults += [f"{dtype} sm_{arch} {defines} {kernel}: {use}" for kernel, use, stored in local_memory(log)
                   if stored > SPILLS.get((path.stem, kernel), (-1,))[0]]
    assert not faults, "\n".join(faults)


@files
def test_parameters_are_what_is_passed(path):
    """CuPy passes long long, double and pointers; anything else would be read wrong, without an error."""
    text = "\n".join(re.sub(r"//.*", "", source.read_text()) for source in sources_of(path))
    kernels = SIGNATURE.findall(text)
    assert len(kernels) == text.count("__global__") > 0
    for name, parameters in kernels:
        parameters = [" ".join(parameter.split()) for parameter in parameters.split(",")]
        wrong = [parameter for parameter in parameters if not POINTER.fullmatch(parameter) and not NUMBER.fullmatch(parameter)]
        assert not wrong, f"{name}: {wrong}"
        floats = sum(bool(re.fullmatch(r"(const )?double \w+", parameter)) for parameter in parameters)
        assert floats <= 8 and len(parameters) - floats <= 24, f"{name}: too many parameters"


def test_a_compiled_kernel_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "cache"))
    first = modules.compile_file("square_sum", "float32", "80", {})
    assert first.parent == tmp_path / "cache" and [first] == list(first.parent.iterdir())
    monkeypatch.setattr(modules, "compile_source", None)
    assert modules.compile_file("square_sum", "float32", "80", {}) == first
    with pytest.raises(TypeError):      # another macro is another kernel
        modules.compile_file("square_sum", "float32", "80", {"MORE": 1})


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "file" / "cache"))
    assert modules.compile_file("square_sum", "float32", "80", {}).read_bytes()[:4] == b"\x7fELF"


def test_missing_headers_are_a_users_error(monkeypatch):
    monkeypatch.setattr(modules, "HEADER", "no_such_header.h")
    with pytest.raises(UserError, match="no_such_header.h.*CUDA_PATH"):
        modules.cuda_include.__wrapped__()
