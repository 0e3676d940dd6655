"""The order of the folders, the weight of the imports and the size of what is written, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mpillm"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 500, 80    # lines

BASE = {"config", "backend", "layout"}
ALLOWED = {  # folder -> folders it may import beside itself (DESIGN.md section 2)
    "config": set(),
    "backend": {"config"},
    "layout": {"config", "backend"},
    "text": BASE,
    "model": BASE,
    "train": BASE | {"model"},
    "store": BASE,
    "run": BASE | {"text", "model", "train", "store"},
    "plan": {"config", "layout", "model", "train"},
    "commands": BASE | {"text", "model", "train", "store", "run", "plan"},
    "__init__": set(),
    "__main__": {"__init__", "config", "backend", "layout", "run", "commands"},
}
ONLY_IN = {"mpi4py": {"layout"}, "cupy": {"backend"}}
NOWHERE = {"torch", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path):
    """mpillm/run/lock.py -> ("mpillm", "run", "lock"); a package is its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def folder_of(module):
    return module[1] if len(module) > 1 else "__init__"


def imports(path):
    """(line, module) of every import in a file, those inside functions included; module as a tuple of names."""
    here = name_of(path) if path.name == "__init__.py" else name_of(path)[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[:len(here) - node.level + 1] if node.level else ()
            module = start + tuple(node.module.split(".") if node.module else ())
            found += [(node.lineno, module + (alias.name,)) for alias in node.names]
    return found


@pytest.fixture(scope="module")
def modules():
    return {name_of(path) for path in FILES}


def inner(module, modules):
    """The module of the package that an imported name lies in; None for other packages."""
    while module and module not in modules:
        module = module[:-1]
    return module or None


def test_every_folder_has_a_place_in_the_order():
    assert {folder_of(name_of(path)) for path in FILES} <= set(ALLOWED)


def test_a_folder_imports_only_what_stands_above_it(modules):
    wrong = []
    for path in FILES:
        folder = folder_of(name_of(path))
        for line, module in imports(path):
            found = inner(module, modules)
            if found and folder_of(found) != folder and folder_of(found) not in ALLOWED[folder]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {folder} imports {'.'.join(found)}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other(modules):
    graph = {name_of(path): {inner(module, modules) for _, module in imports(path)} - {None, name_of(path)} for path in FILES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join(".".join(name) for name in [*open_[open_.index(module):], module])
        if module not in done:
            open_.append(module)
            for other in sorted(graph.get(module, ())):
                visit(other)
            done.add(open_.pop())
    for module in sorted(graph):
        visit(module)


def test_packages_that_only_one_folder_or_none_imports():
    wrong = []
    for path in FILES:
        for line, module in imports(path):
            if module[0] in NOWHERE or folder_of(name_of(path)) not in ONLY_IN.get(module[0], {folder_of(name_of(path))}):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: imports {module[0]}")
    assert not wrong, "\n".join(wrong)


def names(tree):
    """(line, name) of every name and attribute used in code; comments and docstrings do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def test_the_world_is_named_only_in_layout_and_pickles_nowhere():
    wrong = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        if folder_of(name_of(path)) != "layout":
            wrong += [f"{path.relative_to(PACKAGE)}:{line}: COMM_WORLD" for line, name in names(tree) if name == "COMM_WORLD"]
        wrong += [f"{path.relative_to(PACKAGE)}:{node.lineno}: allow_pickle" for node in ast.walk(tree)
                  if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True)]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_short():
    wrong = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > LONGEST_FILE:
            wrong.append(f"{path.relative_to(PACKAGE)}: {text.count(chr(10))} lines, at most {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name} has {length} lines, at most {LONGEST_FUNCTION}")
    assert not wrong, "\n".join(wrong)


def test_every_file_says_what_it_is_for():
    silent = [str(path.relative_to(PACKAGE)) for path in FILES if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, silent


def test_the_command_line_imports_nothing_heavy():
    light = ["mpillm", "mpillm.__main__", "mpillm.config", "mpillm.run.launch", "mpillm.run.ending", "mpillm.backend.threads"]
    light += [f"mpillm.commands.{path.stem}" for path in sorted((PACKAGE / "commands").glob("*.py")) if path.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {light!r}:\n    importlib.import_module(name)\n" \
           "print(sorted({'numpy', 'mpi4py', 'h5py', 'cupy', 'tokenizers', 'safetensors', 'threadpoolctl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_parallel_h5py_does_not_start_mpi():
    """On a login node that would end the process with some MPIs."""
    text = ("import sys; from mpillm.layout.hdf5 import load_h5py; load_h5py(); mpi = sys.modules.get('mpi4py.MPI'); "
            "print(mpi is not None and mpi.Is_initialized())")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
