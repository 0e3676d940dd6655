"""`mpillm generate CHECKPOINT --prompt ...`: text from a trained model."""


def add_arguments(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run directory or a step directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    source.add_argument("--prompts", metavar="FILE", help="text file with a prompt a line")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens to write for a prompt (default 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "gpu", "auto"), default="cpu", help="where numbers are computed (default cpu)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16", "float64"), help="default: as it was trained")
    parser.add_argument("--output", metavar="FILE", help="JSON-lines instead of text on the screen")


def run(arguments):
    from ..config import UserError
    from ..layout.comm import world
    from ..layout.slab import cut
    from ..run.session import open_model
    from ..layout.agreement import on_root
    from ..text.tokenizer import Tokenizer

    _check(arguments)
    group = world()
    on_root(group, UserError, f"--output {arguments.output}: looking at it", lambda: _check_output(arguments.output))
    prompts = on_root(group, UserError, f"{arguments.prompts}: reading", lambda: _prompts(arguments))
    session, checkpoint, tokenizer_bytes = open_model(arguments.checkpoint, group, arguments.precision, device=arguments.device)
    tokenizer = Tokenizer.from_bytes(tokenizer_bytes, str(checkpoint.directory))
    start, size = cut(len(prompts), group.size, group.rank)     # prompts are split over all ranks
    mine = [_continue(session.model, tokenizer, prompts[number], number, arguments) for number in range(start, start + size)]
    texts = [text for part in group.collect(mine) for text in part]
    if arguments.output:
        on_root(group, UserError, f"--output {arguments.output}: writing", lambda: _write(prompts, texts, arguments.output))
    elif group.rank == 0:
        _show(prompts, texts)
    return 0


def _check(arguments):
    from ..config import UserError
    for name, good, wanted in (("tokens", arguments.tokens >= 0, "0 or more"), ("temperature", 0 <= arguments.temperature < 1e6, "0 or more"),
                               ("top-k", arguments.top_k >= 0, "0 or more"), ("top-p", 0 < arguments.top_p <= 1, "more than 0, at most 1")):
        if not good:
            raise UserError(f"--{name} {getattr(arguments, name.replace('-', '_'))}: expected {wanted}")


def _check_output(output):
    """Refuses, before the work, an output that could not be written after it."""
    import os
    from ..config import UserError
    if not output:
        return
    if os.path.lexists(output):
        raise UserError(f"--output {output}: exists already; give another name")
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: {folder} is not a folder that may be written to; make it, or give another name")


def _prompts(arguments):
    from ..config import UserError
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        with open(arguments.prompts, encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise UserError(f"--prompts {arguments.prompts}: cannot read it: {error.strerror}; expected a text file with a prompt a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {arguments.prompts}: is not UTF-8 text ({error.reason} at byte {error.start}); expected a prompt a line") from None
    if not prompts:
        raise UserError(f"--prompts {arguments.prompts}: is empty; expected a prompt a line")
    return prompts


def _continue(model, tokenizer, prompt, number, arguments):
    """The continuation of one prompt; an empty prompt begins after an end of document."""
    from ..model.generate import Sampling, generate
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    ids = [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.end or 0]
    return tokenizer.decode(list(generate(model, ids, arguments.tokens, sampling, tokenizer.end, number)))


def _show(prompts, texts):
    import sys
    sys.stdout.reconfigure(errors="replace")    # a terminal may not have all of Unicode
    for prompt, text in zip(prompts, texts):
        print(prompt + text, end="\n\n" if len(prompts) > 1 else "\n")


def _write(prompts, texts, output):
    import json
    with open(output, "x", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts):
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
