"""Who waits for whom: from where each rank stands to the line that names the missing one. Pure; run/monitor.py collects.

Where every rank stands is a list of dicts, one a rank that was heard of:

rank, host : int, str
stopped, gone : bool
    The process stands still by a signal, or is no more.
quiet : float
    Seconds without progress.
phase, step, site : of the record (layout/record.py)
place : str
    Of the rank's stack: the innermost line of mpillm, "" where it gave none.
call : dict or None
    The call that the rank waits for: operation, group, turn, subject.
"""

from collections import Counter

from ..layout.record import AGREE

WORDS = {"set-up": "setting up", "load": "loading a checkpoint", "data": "reading data", "reduce": "reducing gradients",
         "optimizer": "updating weights", "between": "between two steps", "evaluate": "in validation", "save": "saving a checkpoint",
         "write": "writing a checkpoint", "verify": "reading a checkpoint back", "publish": "publishing a checkpoint",
         "check": "comparing replicas", "meet": "meeting the others after a failure or at the end"}


def ranges_text(ranks):
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts, ranks = [], sorted(ranks)
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def ranks_text(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ranges_text(ranks)


def call_text(call):
    """A call for people: "reduce_scatter 8812 over dp, blocks.7"."""
    turn = f" {call['turn']}" if not call["operation"].startswith(("send", "receive")) else ""
    return f"{call['operation']}{turn} over {call['group']}" + (f", {call['subject']}" if call["subject"] else "")


def culprits(ranks):
    """The ranks that the others wait for, ascending; none where all wait for different calls and no order shows who is behind.

    Ranks that meet after a failure bear one that is no more: they wait for those that live and have not come.
    """
    living = [r for r in ranks if not r["gone"]]
    gone = [r["rank"] for r in ranks if r["gone"]]
    met = [r["rank"] for r in living if r["call"] is not None and r["call"]["operation"] == AGREE]
    if met and len(met) < len(living):
        return sorted(r["rank"] for r in living if r["rank"] not in met)
    still = [r["rank"] for r in living if r["stopped"]] or [r["rank"] for r in living if r["call"] is None]
    if gone or still:
        return sorted(gone + still) if len(gone + still) < len(ranks) or len(ranks) == 1 else sorted(gone)
    turns = {}
    for r in ranks:
        turns.setdefault(r["call"]["group"], []).append((r["call"]["turn"], r["rank"]))
    behind = []
    for waiting in turns.values():
        last = max(turn for turn, _ in waiting)
        behind += [rank for turn, rank in waiting if turn < last]
    return sorted(behind)


def _what(r):
    """What one rank does, in words."""
    where = f"rank {r['rank']} (node {r['host']})"
    doing = WORDS.get(r["phase"], r["phase"])
    place = r["place"] or r["site"]
    state = " is no more: its process ended" if r["gone"] else " is stopped by a signal" if r["stopped"] else " is"
    if r["call"] is not None:
        return f"{where}{state} in step {r['step']}, {doing}, in {call_text(r['call'])}"
    return f"{where}{state} in step {r['step']}, {doing}" + (f", {place}" if place else "")


def _waiting(ranks):
    """What the ranks that are not to blame wait in, the same said once: ["63 ranks wait in ..."]."""
    groups = {}
    for r in ranks:
        groups.setdefault(call_text(r["call"]) if r["call"] else WORDS.get(r["phase"], r["phase"]), []).append(r["rank"])
    texts = []
    for text, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        who = ranks_text(members) if len(members) <= 4 else f"{len(members)} ranks"
        texts.append(f"{who} wait{'s' * (len(members) == 1)} in {text}")
    return texts


def summary(ranks, num_ranks):
    """One line: who is to blame and where, and what the others wait in.

    Parameters
    ----------
    ranks : list of dict
        Those heard of.
    num_ranks : int
        Of the job.
    """
    guilty = culprits(ranks)
    by_rank = {r["rank"]: r for r in ranks}
    parts = [_what(by_rank[rank]) for rank in guilty[:4]]
    if len(guilty) > 4:
        parts.append(f"so are {len(guilty) - 4} more: {ranges_text(guilty[4:])}")
    missing = sorted(set(range(num_ranks)) - set(by_rank))
    if missing:
        parts.insert(0, f"no word from the node of {ranks_text(missing)}")
    gone = [r["rank"] for r in ranks if r["gone"] and r["rank"] not in guilty]
    if gone:
        parts.append(f"{ranks_text(gone)} {'are' if len(gone) > 1 else 'is'} no more")
    parts += _waiting([r for r in ranks if r["rank"] not in guilty + gone])[:4]
    return "; ".join(parts)


def report(ranks, num_ranks, quiet, folder):
    """Lines of the report: the summary, then a line a rank, then where the stacks are."""
    lines = [f"no progress for {quiet:.0f} s: {summary(ranks, num_ranks)}", ""]
    for r in sorted(ranks, key=lambda r: r["rank"]):
        lines.append(f"{_what(r)}; quiet for {r['quiet']:.1f} s")
    phases = Counter(r["phase"] for r in ranks)
    lines += ["", "phases: " + ", ".join(f"{phase} {count}" for phase, count in phases.most_common()),
              f"stacks of all ranks and their last calls: {folder}"]
    return lines
