"""`mpillm inspect FILE`: what a checkpoint or token file holds, without loading it."""


def add_arguments(parser):
    parser.add_argument("file", metavar="FILE", help="a token file, a run directory, or a checkpoint directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments):
    """Prints what rank 0 reads; returns 0.

    Raises
    ------
    UserError
        Missing, damaged, or neither a token file nor a checkpoint.
    """
    import json
    import os

    from ..layout.comm import world

    group, path = world(), arguments.file
    if os.path.basename(path) in ("manifest.json", "state.h5"):
        path = os.path.dirname(path) or "."
    holds = _checkpoint(path, group) if os.path.isdir(path) else _token_file(path, group)
    if group.rank == 0:
        if arguments.json:
            print(json.dumps(holds, indent=1))
        else:
            print("\n".join(_token_lines(holds) if holds["kind"] == "tokens" else _checkpoint_lines(holds, arguments.tensors)))
    return 0


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


def _checkpoint(path, group):
    """What a checkpoint holds: its manifest, with the bytes of each tensor. Its data is not read."""
    import math

    from ..store.checkpoint import open_checkpoint, resolve

    checkpoint = open_checkpoint(resolve(path, group), group)
    manifest = checkpoint.manifest
    tensors = {name: {**tensor, "bytes": math.prod(tensor["shape"]) * {"float32": 4, "float64": 8}[tensor["dtype"]]}
               for name, tensor in checkpoint.tensors.items()}
    return {**manifest, "path": str(checkpoint.directory), "tensors": tensors}


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
        rows = [("tensor", "shape", "type", "bytes", "hash")]
        rows += [(name, " x ".join(map(str, tensor["shape"])), tensor["dtype"], f"{tensor['bytes']:,}", tensor["hash"])
                 for name, tensor in holds["tensors"].items()]
        lines += ["", *_table(rows)]
    return lines
