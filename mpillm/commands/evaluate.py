"""`mpillm evaluate CHECKPOINT --data FILE ...`: loss and perplexity on token files."""


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run directory or a step directory")
    parser.add_argument("overrides", metavar="mesh.key=value", nargs="*", default=[], help="another layout than data parallel, such as mesh.tp=2")
    parser.add_argument("--data", metavar="FILE", action="append", required=True, help="token file; may be given several times")
    parser.add_argument("--samples", type=int, default=0, help="windows of the model's context to read; 0: the whole file (default)")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows of one pass on a rank (default 8)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16", "float64"), help="as trained when left out")
    parser.add_argument("--device", choices=("cpu", "gpu", "auto"), default="cpu", help="where numbers are computed (default cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments):
    from ..config import UserError, mesh_of
    from ..layout.comm import world
    from ..run.session import open_model

    for name, value, least in (("micro-batch", arguments.micro_batch, 1), ("samples", arguments.samples, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected at least {least}")
    group = world()
    session, checkpoint, _ = open_model(arguments.checkpoint, group, arguments.precision, mesh_of(arguments.overrides), arguments.device)
    results = [_evaluate(session, path, checkpoint, arguments) for path in arguments.data]
    if group.rank == 0:
        _show(results, checkpoint, arguments.json)
    return 0


def _evaluate(session, path, checkpoint, arguments):
    """Loss, perplexity and the unigram cross entropy of one token file."""
    import math
    import time

    from ..config import UserError
    from ..text.batches import validation_windows
    from ..text.tokenfile import TokenFile
    from ..train.step import validation_loss

    file = TokenFile(path, session.mesh.world)
    if file.tokenizer_hash != checkpoint.manifest["tokenizer"]:
        raise UserError(f"{path}: its tokenizer ({str(file.tokenizer_hash)[:12]}) is not the model's ({str(checkpoint.manifest['tokenizer'])[:12]}); "
                        f"prepare the file with --tokenizer {checkpoint.directory}/tokenizer.json")
    context = session.model.shape.context
    count, windows = validation_windows(file, context, arguments.samples or file.num_tokens)
    started = time.monotonic()
    loss, tokens = validation_loss(session.ops, session.model, count, windows, arguments.micro_batch)
    return {"file": path, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens,
            "unigram": _unigram(windows, count, session.mesh["dp"]), "seconds": time.monotonic() - started}


def _unigram(windows, count, group):
    """Cross entropy, in nats, of the targets under their own frequencies: what a model that ignores context could reach."""
    import numpy as np

    from ..layout.slab import cut
    start, size = cut(count, group.size, group.rank)
    counts = np.zeros(1, np.int64)
    for first in range(start, start + size, 64):
        targets = windows(first, min(64, start + size - first))[1]
        part = np.bincount(targets.reshape(-1), minlength=len(counts))
        part[:len(counts)] += counts
        counts = part
    length = int(group.all_reduce(np.array([len(counts)]), "max")[0])
    counts = group.all_reduce(np.pad(counts, (0, length - len(counts))))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _show(results, checkpoint, as_json):
    import json
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint.directory), "step": checkpoint.step, "results": results}))
        return
    print(f"{checkpoint.directory}, step {checkpoint.step}")
    for result in results:
        print(f"{result['file']}: loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}, {result['tokens']:,} tokens "
              f"(unigram cross entropy {result['unigram']:.4f}) in {result['seconds']:.1f} s")
