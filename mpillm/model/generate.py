"""Text, one token after another: greedy or sampled, with the keys and values of earlier tokens kept."""

from typing import NamedTuple

import numpy as np

from ..layout.parameter import key_of
from .batch import Batch


class Sampling(NamedTuple):
    """How the next token is chosen from its logits."""
    temperature: float = 0.0    # 0, or so small that scores overflow: the most likely token (greedy)
    top_k: int = 0              # keep the k most likely tokens; 0: all
    top_p: float = 1.0          # keep the fewest tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751)
    seed: int = 1


def choose(logits, sampling, number, position):
    """The next token of one sequence.

    Parameters
    ----------
    logits : float array (V,)
    sampling : Sampling
    number, position : int
        Prompt number and token position: the random number is a function of (seed, number, position) only.
    """
    largest = 2.0 * float(np.abs(logits).max())     # no difference of two logits is larger
    if sampling.temperature == 0.0 or np.isinf(largest / sampling.temperature):
        return int(np.argmax(logits))       # ties go to the lower id
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[:sampling.top_k]
    probabilities = np.exp(scores[order] - scores[order[0]])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = before < sampling.top_p          # the first is always kept
    probabilities, order = probabilities[kept] / probabilities[kept].sum(), order[kept]
    uniform = key_of(sampling.seed, f"generate:{number}:{position}") / 2.0**64
    return int(order[min(np.searchsorted(np.cumsum(probabilities), uniform, side="right"), len(order) - 1)])


def generate(model, prompt, num_tokens, sampling=Sampling(), end=None, number=0):
    """Continues one prompt; a generator of token ids.

    When the sequence outgrows the model's context, the older half of it is forgotten and the rest read again.

    Parameters
    ----------
    model : Transformer
    prompt : sequence of int
        At least one token.
    num_tokens : int
        Most tokens to make.
    end : int or None
        Stops before this token.
    number : int
        Number of the prompt, for the random numbers.
    """
    context = model.shape.context
    tokens = list(prompt)[-context:]
    caches, seen = model.caches(1, context), 0
    for position in range(num_tokens):
        if len(tokens) > context:
            tokens = tokens[-max(1, context // 2):]
            caches, seen = model.caches(1, context), 0
        new = np.array([tokens[seen:]], np.int64)       # (1, new tokens)
        batch = Batch(model.ops.from_host(new), None, None, np.arange(seen, len(tokens)), np.zeros(1, np.int64), 0, 0.0)
        seen = len(tokens)
        token = choose(model.ops.to_host(model.next_logits(batch, caches))[0], sampling, number, position)
        if token == end:
            return
        tokens.append(token)
        yield token
