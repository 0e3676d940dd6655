"""`mpillm inspect FILE`: what a checkpoint or token file holds, without loading it; with `--diff`, how two checkpoints differ."""


def add_arguments(parser):
    parser.add_argument("file", metavar="FILE", help="a token file, a run directory, or a checkpoint directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of a checkpoint")
    parser.add_argument("--values", action="store_true", help="list every tensor with its norm, lowest and highest value: reads all of the data")
    parser.add_argument("--diff", metavar="OTHER", help="compare with another checkpoint, tensor by tensor; exit code 1 where they differ")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments):
    """Prints what a file holds; returns 0, or 1 where `--diff` found a difference.

    Raises
    ------
    UserError
        Missing, damaged, or neither a token file nor a checkpoint.
    """
    import json
    import os

    from ..config import UserError
    from ..layout.comm import world

    group, path = world(), _directory(arguments.file)
    if arguments.diff is not None:
        holds = _differences(path, _directory(arguments.diff), group)
        lines = _difference_lines
    elif os.path.isdir(path):
        holds = _checkpoint(path, group, arguments.values)
        lines = lambda holds: _checkpoint_lines(holds, arguments.tensors or arguments.values)
    elif arguments.values:
        raise UserError(f"--values: {path} is no checkpoint; give a run directory or a checkpoint directory")
    else:
        holds, lines = _token_file(path, group), _token_lines
    if group.rank == 0:
        print(json.dumps(_plain(holds), indent=1) if arguments.json else "\n".join(lines(holds)))
    return int(arguments.diff is not None and not holds["equal"])


def _plain(value):
    """`value` with text in place of numbers that JSON lacks."""
    import math
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _directory(path):
    """The checkpoint directory of a file in it."""
    import os
    return os.path.dirname(path) or "." if os.path.basename(path) in ("manifest.json", "state.h5") else path


def _token_file(path, group):
    """What a token file holds, as rank 0 reads it, on every rank."""
    import json
    import os

    from ..config import UserError
    from ..layout.agreement import on_root
    from ..text.tokenfile import TokenFile

    def look():
        file = TokenFile(path)
        try:
            return {"kind": "tokens", "path": path, "bytes": os.stat(path).st_size, "tokens": file.num_tokens,
                    "documents": file.num_documents, "dtype": file.dtype.name, "vocabulary": file.vocabulary, "end": file.end,
                    "tokenizer": _tokenizer_kind(json.loads(file.tokenizer_bytes())), "tokenizer_hash": file.tokenizer_hash,
                    "sources_hash": file.sources_hash}
        finally:
            file.close()
    return on_root(group, UserError, f"{path}: looking into the token file", look)


def _tokenizer_kind(values):
    """The kind of tokenizer that the values of a tokenizer.json describe."""
    if not isinstance(values, dict):
        return "unknown"
    model = values.get("model")
    return str(values.get("mpillm_tokenizer") or (model.get("type") if isinstance(model, dict) else None) or "unknown")


def _checkpoint(path, group, with_values=False):
    """What a checkpoint holds: its manifest, with the bytes of each tensor. Its data is read for `with_values` alone."""
    import math

    from ..backend import open_backend
    from ..store.checkpoint import open_checkpoint, resolve
    from ..store.compare import values_of

    checkpoint = open_checkpoint(resolve(path, group), group)
    manifest = checkpoint.manifest
    tensors = {name: {**tensor, "bytes": math.prod(tensor["shape"]) * {"float32": 4, "float64": 8}[tensor["dtype"]]}
               for name, tensor in checkpoint.tensors.items()}
    if with_values:
        backend = open_backend("cpu")
        for name, tensor in tensors.items():
            tensor |= values_of(checkpoint, name, group, backend)._asdict()
    return {**manifest, "path": str(checkpoint.directory), "tensors": tensors}


def _differences(path, other, group):
    """How the checkpoint `other` differs from that of `path`: entries of the manifests, then tensors."""
    from ..backend import open_backend
    from ..store.checkpoint import open_checkpoint, resolve
    from ..store.compare import difference

    a, b = (open_checkpoint(resolve(each, group), group) for each in (path, other))
    backend, tensors = open_backend("cpu"), {}
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        shapes = [checkpoint.tensors[name]["shape"] if name in checkpoint.tensors else None for checkpoint in (a, b)]
        if shapes[0] != shapes[1]:
            tensors[name] = {"shapes": shapes}
        else:
            found = difference(a, b, name, group, backend)
            if found.differing:
                tensors[name] = found._asdict()
    mine, theirs = (dict(_leaves("", {key: value for key, value in checkpoint.manifest.items() if key not in ("tensors", "sha256")})) for checkpoint in (a, b))
    entries = {key: [mine.get(key), theirs.get(key)] for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)}
    return {"kind": "difference", "a": str(a.directory), "b": str(b.directory), "equal": not tensors, "tensors": tensors, "entries": entries,
            "number": len(a.tensors.keys() | b.tensors.keys())}


def _leaves(name, value):
    """(dotted name, value) of everything in nested dicts."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{name}.{key}".lstrip("."), inner)


def _difference_lines(holds):
    lines = [*_fields({"a": holds["a"], "b": holds["b"]}), ""]
    if holds["entries"]:
        lines += [*_table([("entry", "a", "b"), *((name, str(a)[:40], str(b)[:40]) for name, (a, b) in holds["entries"].items())]), ""]
    rows = [("tensor", "differing elements", "largest difference", "relative")]
    for name, found in holds["tensors"].items():
        if "shapes" in found:
            a, b = ("none" if shape is None else " x ".join(map(str, shape)) for shape in found["shapes"])
            rows.append((name, f"a: {a}", f"b: {b}", ""))
        else:
            rows.append((name, f"{found['differing']:,}", f"{found['largest']:.3g}", f"{found['relative']:.3g}"))
    return lines + (_table(rows) if holds["tensors"] else []) + [f"{len(holds['tensors'])} of {holds['number']} tensors differ"]


def _pairs(values):
    """`a=1 b=2` of a flat dict."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def _table(rows):
    """Lines of text with aligned columns; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]) for row in rows]


def _token_lines(holds):
    mean = holds["tokens"] / holds["documents"]
    return _fields({
        "token file": holds["path"],
        "tokens": f"{holds['tokens']:,} ({holds['dtype']})",
        "documents": f"{holds['documents']:,}, {mean:,.0f} tokens each on average",
        "vocabulary": f"{holds['vocabulary']:,}",
        "tokenizer": f"{holds['tokenizer']}, end of a document {'none' if holds['end'] is None else holds['end']}",
        "tokenizer hash": holds["tokenizer_hash"],
        "sources hash": holds["sources_hash"],
        "bytes": f"{holds['bytes']:,}"})


def _fields(values):
    """`name  value` lines."""
    width = max(map(len, values))
    return [f"{name:<{width}}  {value}" for name, value in values.items()]


def _checkpoint_lines(holds, all_tensors):
    import math

    job, cursor = holds.get("job", {}), holds.get("cursor", {})
    lines = _fields({
        "checkpoint": holds["path"], "step": holds["step"], "kind": holds["kind"],
        "model": _pairs(job.get("model", {})), "precision": _pairs(job.get("precision", {})),
        "mesh": _pairs(holds.get("mesh", {})), "samples": holds.get("samples", "not recorded"),
        "cursor": "; ".join(map(_pairs, cursor.get("corpora") or [cursor])) or "not recorded", "tokenizer hash": holds.get("tokenizer", "not recorded"),
        "files": ", ".join(f"{name} ({file['bytes']:,} bytes)" for name, file in holds["files"].items()) or "none"})
    lines += [f"changed   {change}" for change in holds.get("changes", [])]
    groups = {}
    for name, tensor in holds["tensors"].items():
        groups.setdefault(name.rpartition("/")[0], []).append(tensor)
    rows = [("tensors", "number", "elements", "bytes")]
    for name, tensors in groups.items():
        elements = sum(math.prod(tensor["shape"]) for tensor in tensors)
        rows.append((name, f"{len(tensors):,}", f"{elements:,}", f"{sum(tensor['bytes'] for tensor in tensors):,}"))
    lines += ["", *_table(rows)]
    if all_tensors:
        more = ["norm", "low", "high", "not_finite"] if "norm" in next(iter(holds["tensors"].values()), {}) else []
        rows = [("tensor", "shape", "type", "bytes", "hash", *(name.replace("_", " ") for name in more))]
        rows += [(name, " x ".join(map(str, tensor["shape"])), tensor["dtype"], f"{tensor['bytes']:,}", tensor["hash"], *(f"{tensor[key]:.6g}" for key in more))
                 for name, tensor in holds["tensors"].items()]
        lines += ["", *_table(rows)]
    return lines
