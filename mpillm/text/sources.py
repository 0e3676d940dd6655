"""What the name of a corpus means: a list of files, made on one rank.

A corpus is a text file (one document), JSON-lines (a document a line), a folder, a glob, a definition (`*.toml`)
or the name of one in `data/`. Nothing is read here but definitions.
"""

import fnmatch
import glob
import os
import re
import sys
import sysconfig
import tomllib
from typing import NamedTuple

from ..config import UserError, nearest

SOURCE_KEYS = {"path": str, "include": list, "exclude": list, "field": str, "optional": bool}


class File(NamedTuple):
    """One file of a corpus."""
    name: str       # relative to its source: the same wherever the corpus lies
    path: str
    size: int       # bytes, more than 0
    lines: bool     # JSON-lines: a document a line
    field: str      # JSON-lines: the key that holds the text

    @property
    def packed(self):
        return self.path.endswith(".gz")


def list_files(name):
    """The File entries of a corpus, in document order."""
    definition = name if name.endswith(".toml") and os.path.isfile(name) else _find_definition(name)
    files = _list_definition(definition) if definition else list_source(name)
    if not files:
        raise UserError(f"corpus {name}: no file with text in it; expected a text file, a folder, a glob, JSON-lines or a corpus definition")
    return files


def list_source(path, include=(), exclude=(), field="text", shown=None):
    """The File entries of one file, folder or glob, sorted by name."""
    shown = shown or path
    if os.path.isdir(path):
        names = _walk(path, include, exclude)
        root = path
    elif os.path.exists(path):
        names, root = [os.path.basename(path)], os.path.dirname(path)
    elif glob.has_magic(path):
        found = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        root = os.path.dirname(re.split(r"[*?\[]", path)[0])
        names = [os.path.relpath(name, root or ".") for name in found]
    else:
        raise UserError(f"corpus {shown}: no such file, folder, glob or definition{nearest(shown, _definitions())}; "
                        f"known definitions: {', '.join(_definitions()) or 'none'}")
    files = []
    for name in sorted(names):
        whole = os.path.join(root, name)
        size = os.stat(whole).st_size if os.path.isfile(whole) else 0     # a pipe or dangling link has none
        if size:
            plain = name.removesuffix(".gz")
            files.append(File(name, whole, size, plain.endswith((".jsonl", ".ndjson")), field))
    return files


def _walk(root, include, exclude):
    """Names below `root`, relative to it; hidden files and folders are left out."""
    def wanted(name):
        return not name.startswith(".") and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

    def refuse(error):
        raise UserError(f"{error.filename}: cannot list the folder: {error.strerror}")
    names = []
    for folder, below, found in os.walk(root, onerror=refuse):
        below[:] = filter(wanted, below)
        for name in filter(wanted, found):
            if not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
                names.append(os.path.relpath(os.path.join(folder, name), root))
    return names


def _definition_folders():
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return ["data", os.path.join(os.path.dirname(package), "data"), os.path.join(sys.prefix, "share", "mpillm", "data")]


def _definitions():
    """Names of the corpora that `data/` defines."""
    return sorted({name[:-5] for folder in _definition_folders() if os.path.isdir(folder)
                   for name in os.listdir(folder) if name.endswith(".toml")})


def _find_definition(name):
    """The file of a corpus name without folder or suffix, or None; a folder of that name is written ./NAME."""
    if not re.fullmatch(r"[\w-]+", name):
        return None
    paths = (os.path.join(folder, f"{name}.toml") for folder in _definition_folders())
    return next((path for path in paths if os.path.isfile(path)), None)


def _list_definition(path):
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {str(error).splitlines()[0]}") from None
    sources = values.get("source")
    if set(values) != {"source"} or not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{path}: expected [[source]] tables and nothing else, found {', '.join(values) or 'nothing'}")
    return [file for source in sources for file in _list_defined(path, source)]


def _list_defined(path, source):
    for key in source:
        if key not in SOURCE_KEYS:
            raise UserError(f"{path}: unknown key {key}{nearest(key, SOURCE_KEYS)}; keys of a source are {', '.join(SOURCE_KEYS)}")
    for key, kind in SOURCE_KEYS.items():
        if key in source and not isinstance(source[key], kind):
            raise UserError(f"{path}: {key} = {source[key]!r}: expected a {kind.__name__}")
        if kind is list and not all(isinstance(item, str) for item in source.get(key, ())):
            raise UserError(f"{path}: {key} = {source[key]!r}: expected a list of texts, such as [\"*.py\"]")
    if "path" not in source:
        raise UserError(f"{path}: a source without path; expected path = \"file, folder or glob\"")
    where = source["path"]
    for name, value in (("stdlib", sysconfig.get_path("stdlib")), ("prefix", sys.base_prefix),
                        ("version", f"{sys.version_info[0]}.{sys.version_info[1]}")):
        where = where.replace("{" + name + "}", value)
    where = os.path.join(os.path.dirname(path), where)
    if source.get("optional") and not os.path.exists(where) and not glob.has_magic(where):
        return []
    return list_source(where, source.get("include", ()), source.get("exclude", ()), source.get("field", "text"), where)
