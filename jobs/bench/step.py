#!/usr/bin/env python
"""Times mpillm's optimizer step: beside PyTorch, by turns; as a share of the machine's matrix product; on two ranks against one.

  python jobs/bench/step.py --shape 14M                 mpillm and PyTorch by turns, one rank and one thread each
  python jobs/bench/step.py --shape 124M --no-peer      mpillm alone
  python jobs/bench/step.py --shape 124M --profile      where mpillm's step goes (--ranks 2 --zero 1: under mpirun)
  python jobs/bench/step.py --shape 14M --scaling       two data-parallel ranks against one, same batch a rank, ZeRO 0 and 1
  python jobs/bench/step.py --shape 124M --layouts      two ranks in other layouts against two data-parallel ones, same job
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time

import profiling
import record as records
from shapes import SHAPES
from workers import Worker, WorkerFailed, forced


LAYOUTS = {     # name -> (keys of [mesh], sequences of a pass); 124M-long is for cp, the other shapes for the others
    "tp": ({"tp": 2}, None), "tp without sequence": ({"tp": 2, "sequence": False}, None),
    "pp": ({"pp": 2}, 1), "pp zero-bubble": ({"pp": 2, "schedule": "zero_bubble"}, 1),
    "cp": ({"cp": 2}, None), "cp ulysses": ({"cp": 2, "cp_form": "ulysses"}, None),
    "zero 3": ({"zero": 3}, None),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="14M")
    parser.add_argument("--pairs", type=int, default=9, help="turns of each side; steps of --profile")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each side before the first turn")
    parser.add_argument("--seconds-limit", type=float, default=float("inf"), help="no new pair after this many seconds of turns")
    parser.add_argument("--no-peer", action="store_true", help="mpillm alone")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch and transformers (default: this one)")
    parser.add_argument("--profile", action="store_true", help="print where mpillm's step goes")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of --profile")
    parser.add_argument("--scaling", action="store_true", help="two ranks against one")
    parser.add_argument("--layouts", nargs="*", metavar="NAME", help="two ranks, other layouts: " + ", ".join(LAYOUTS) + " (default: those of the shape)")
    parser.add_argument("--zero", type=int, nargs="+", choices=(0, 1, 2, 3), default=[0, 1], help="ZeRO stages of --scaling; the first one of --profile")
    parser.add_argument("--control", action="store_true",
                        help="with --scaling: also two jobs of one rank at the same time, the most the machine gives to two ranks")
    parser.add_argument("--forced-blas", action="store_true", help="keep OPENBLAS_*, MKL_* and such variables, which take the choice of "
                        "kernels from the libraries; they are left out otherwise")
    parser.add_argument("--mpirun", default="mpirun", help="what starts ranks; -n N is added")
    parser.add_argument("--out", metavar="FILE.json", help="keep the raw numbers; a plain name lies in jobs/bench/results")
    found = parser.parse_args()
    if found.pairs < 1 or found.warmup < 1 or found.ranks < 1:
        parser.error("--pairs, --warmup and --ranks are at least 1")
    return found


# ---- starting the sides -------------------------------------------------------------------------------------------------------


def start_ours(options, num_ranks=1, zero=0, launched=False, mesh=None, micro_batch=None):
    """mpillm's side; under mpirun when `launched`."""
    launcher = [*shlex.split(options.mpirun), "-n", str(num_ranks)] if launched or num_ranks > 1 else []
    spec = {"shape": options.shape, "mesh": {"zero": zero} | (mesh or {}), "micro_batch": micro_batch, "warmup": options.warmup}
    return Worker("ours.py", spec, launcher=launcher, num_ranks=num_ranks,
                  keep_forced=options.forced_blas)


def start_peer(options):
    """PyTorch's side."""
    return Worker("peer.py", {"shape": options.shape, "warmup": options.warmup}, python=options.peer_python, keep_forced=options.forced_blas)


def check_peer(python):
    """Ends the program when PyTorch is not there."""
    code = "import importlib.util as u, sys; sys.exit(' and '.join(n for n in ('torch', 'transformers', 'numpy') if not u.find_spec(n)))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
        missing = found.stderr.strip()
    except OSError as error:
        missing = f"a Python that runs ({error.strerror})"
    if missing:
        sys.stderr.write(f"step.py: error: {python} has no {missing.splitlines()[-1]}; pip install torch transformers, or name a Python "
                         "that has them by --peer-python, or leave PyTorch out by --no-peer\n")
        sys.exit(2)


# ---- turns --------------------------------------------------------------------------------------------------------------------


def by_turns(contestants, options):
    """A B A B ...: one step of each, `options.pairs` times.

    Parameters
    ----------
    contestants : dict
        name -> function that does one turn and returns the answers of its ranks.

    Returns
    -------
    dict, name -> list of turns (workers.timed_turn), each that of the slowest rank
    """
    turns, started = {name: [] for name in contestants}, time.monotonic()
    for pair in range(options.pairs):
        if pair and time.monotonic() - started > options.seconds_limit:
            print(f"stopped after {pair} pairs: --seconds-limit {options.seconds_limit:g}")
            break
        for name, turn in contestants.items():
            answers = turn()
            if pair == 0:
                print(f"{name}: {max(answer['seconds'] for answer in answers):.2f} s", flush=True)
            slowest = max(answers, key=lambda answer: answer["seconds"])
            turns[name].append(slowest | {key: min(answer[key] for answer in answers) for key in ("gemm_before", "gemm_after")})
    return turns


def spread(values):
    """{"median", "min", "max"} of some numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text_of(values, form="{:.3f}"):
    found = spread(values)
    return f"median {form.format(found['median'])}, min {form.format(found['min'])}, max {form.format(found['max'])}"


def show_pairs(rates, first, second):
    """Prints tokens/s of each pair and the ratio first / second; returns the ratios."""
    ratios = [a / b for a, b in zip(rates[first], rates[second], strict=True)]
    print(f"\n{'pair':>4} {first + ' tokens/s':>24} {second + ' tokens/s':>24} {'ratio':>8}")
    for number, (a, b, ratio) in enumerate(zip(rates[first], rates[second], ratios, strict=True), 1):
        print(f"{number:>4} {a:>24.0f} {b:>24.0f} {ratio:>8.3f}")
    print(f"ratio {first} / {second}: {text_of(ratios)}")
    return ratios


def shares(turns, flops):
    """Model FLOP/s of each turn over the mean of the products measured right before and after it."""
    return [flops / turn["seconds"] / (0.5 * (turn["gemm_before"] + turn["gemm_after"])) for turn in turns]


# ---- the benchmarks -----------------------------------------------------------------------------------------------------------


def beside_peer(options, record):
    """mpillm and PyTorch, or mpillm alone."""
    shape = SHAPES[options.shape]
    ours = start_ours(options)
    workers = {"mpillm": ours}
    try:
        if not options.no_peer:
            workers["pytorch"] = start_peer(options)
        for name, worker in workers.items():
            record["versions"][name] = worker.info["versions"]
            print(f"{name}: {worker.info['parameters'] / 1e6:.1f} M weights; " + ", ".join(f"{k} {v}" for k, v in worker.info["versions"].items()))
        turns = by_turns({name: lambda worker=worker: worker.turn(do="step") for name, worker in workers.items()}, options)
    finally:
        for worker in workers.values():
            worker.stop()
    rates = {name: [shape.tokens / turn["seconds"] for turn in found] for name, found in turns.items()}
    record |= {"flops_per_token": ours.info["flops_per_token"], "turns": turns, "tokens_per_second": {name: spread(found) for name, found in rates.items()}}
    if not options.no_peer:
        peer = workers["pytorch"].info
        cpu = {name: [turn["cpu_seconds"] for turn in found] for name, found in turns.items()}
        record |= {"peer": {key: peer[key] for key in ("attention", "trial_seconds", "optimizer")}, "ratio": spread(show_pairs(rates, "mpillm", "pytorch"))}
        trial = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in peer["trial_seconds"].items())
        print(f"the same by CPU time: {text_of([b / a for a, b in zip(cpu['mpillm'], cpu['pytorch'], strict=True)])}")
        print(f"pytorch: {peer['attention']} attention (trial: {trial}), {peer['optimizer']}")
    show_shares(turns, shape.tokens * ours.info["flops_per_token"], record)


def show_shares(turns, flops, record):
    """Prints rates, and model FLOPs as a share of the matrix product in the same process."""
    record["gemm_share"] = {}
    for name, found in turns.items():
        share, gemm = shares(found, flops), [turn[key] for turn in found for key in ("gemm_before", "gemm_after")]
        record["gemm_share"][name] = spread(share)
        tokens = text_of([flops / record["flops_per_token"] / turn["seconds"] for turn in found], "{:.0f}")
        print(f"{name}: tokens/s {tokens}; loss {found[0]['loss']:.3f} -> {found[-1]['loss']:.3f}")
        print(f"{name}: model FLOPs {text_of([flops / turn['seconds'] / 1e9 for turn in found], '{:.1f}')} GF/s; sgemm 2048^3 "
              f"{text_of([rate / 1e9 for rate in gemm], '{:.1f}')} GF/s; share {text_of(share, '{:.1%}')}")
        on_core, by_cpu = min(turn["cpu_seconds"] / turn["seconds"] for turn in found), [flops / turn["cpu_seconds"] / turn["gemm_by_cpu"] for turn in found]
        print(f"{name}: on a core {on_core:.0%} of the time or more; the share by CPU time: {text_of(by_cpu, '{:.1%}')}")


def profile(options, record):
    """Where the time of a step goes."""
    worker = start_ours(options, options.ranks, options.zero[0], launched=options.ranks > 1)
    try:
        rate = worker.turn(do="step")[0]
        print(f"kernels: {worker.info['versions']['kernels']}; step without the profile {rate['seconds'] * 1e3:.1f} ms, "
              f"sgemm {rate['gemm_before'] / 1e9:.1f} GF/s")
        found = worker.turn(do="profile", num_steps=options.pairs)[0]
    finally:
        worker.stop()
    record |= {"versions": {"mpillm": worker.info["versions"]}, "profile": found}
    profiling.show(found)


def scaling(options, record):
    """Two data-parallel ranks against one."""
    tokens, record["scaling"] = SHAPES[options.shape].tokens, {}
    single = start_ours(options, launched=True)
    record["versions"]["mpillm"] = single.info["versions"]
    print(f"kernels: {single.info['versions']['kernels']}")
    try:
        for zero in options.zero:
            record["scaling"][f"zero {zero}"] = against_one(options, single, tokens, f"2 ranks, ZeRO {zero}", start_ours(options, 2, zero))
        if options.control:
            record["scaling"]["control"] = against_one(options, single, tokens, "2 single jobs", start_ours(options), start_ours(options))
    finally:
        single.stop()


def layouts(options, record):
    """Two ranks in other layouts and two data-parallel ones (ZeRO 1) by turns: the same job, so the same tokens a step."""
    tokens, workers = 2 * SHAPES[options.shape].tokens, {}
    names = options.layouts or [name for name in LAYOUTS if name.startswith("cp") == options.shape.endswith("long")]
    try:
        workers["dp"] = start_ours(options, 2, 1)
        record["versions"]["mpillm"] = workers["dp"].info["versions"]
        for name in names:
            workers[name] = start_ours(options, 2, 1, mesh=LAYOUTS[name][0], micro_batch=LAYOUTS[name][1])
        turns = by_turns({who: lambda worker=worker: worker.turn(do="step") for who, worker in workers.items()}, options)
    finally:
        for worker in workers.values():
            worker.stop()
    rates = {who: [tokens / turn["seconds"] for turn in found] for who, found in turns.items()}
    record |= {"turns": turns, "tokens_per_second": {who: spread(found) for who, found in rates.items()}, "layouts": {}}
    for name in names:
        difference = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(turns[name], turns["dp"], strict=True))
        mesh, micro_batch = LAYOUTS[name]
        record["layouts"][name] = {"mesh": mesh, "micro_batch": micro_batch, "largest_difference_of_losses": difference,
                                   "ratio": spread(show_pairs(rates, name, "dp"))}
        print(f"losses differ by {difference:.1e} at most")


def against_one(options, single, tokens, name, *workers):
    """Two ranks (of one worker, or of two that work at the same time) and one rank by turns; the numbers."""
    def together():
        for worker in workers:
            worker.send(do="step")
        return [answer for worker in workers for answer in worker.receive()]
    try:
        turns = by_turns({name: together, "1 rank": lambda: single.turn(do="step")}, options)
    finally:
        for worker in workers:
            worker.stop()
    print(f"\n{name}: CPUs each may use: " + ", ".join(str(cpus) for worker in workers for cpus in worker.cpus))
    rates = {who: [tokens * (1 if who == "1 rank" else 2) / turn["seconds"] for turn in found] for who, found in turns.items()}
    return {"turns": turns, "ratio": spread(show_pairs(rates, name, "1 rank"))}


def main():
    options = arguments()
    if options.layouts is not None and any(name not in LAYOUTS for name in options.layouts):
        sys.stderr.write(f"step.py: error: --layouts {' '.join(options.layouts)}: layouts are {', '.join(LAYOUTS)}\n")
        return 2
    if not (options.no_peer or options.profile or options.scaling or options.layouts is not None):
        check_peer(options.peer_python)
    shape = SHAPES[options.shape]
    record = records.begin({key: value for key, value in vars(options).items() if key not in ("out", "peer_python", "mpirun") and value != float("inf")})
    record["shape"] = shape._asdict()
    what = record["machine"]
    print(f"{options.shape}: " + ", ".join(f"{key} {value}" for key, value in record["shape"].items()) + "; float32, one thread a rank")
    print(f"machine: {what['cpu']}, {what['cores']} cores, {' '.join(what['vectors'])}; load before {what['load_before']:.2f}")
    if forced():
        print(f"{'kept' if options.forced_blas else 'left out'}: " + ", ".join(f"{name}={value}" for name, value in forced().items()))
    record["forced"] = forced()
    try:
        (profile if options.profile else scaling if options.scaling else layouts if options.layouts is not None else beside_peer)(options, record)
    except WorkerFailed as error:
        sys.stderr.write(f"step.py: error: {error}\n")
        return 1
    record["machine"]["load_after"] = os.getloadavg()[0]
    if options.out:
        print(f"kept in {records.write(record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
