"""Generating: with a cache and without, past the context, and how a token is chosen."""

import itertools

import numpy as np
import pytest

from gradient_check import small_model
from mpillm.model.batch import Batch
from mpillm.model.generate import Sampling, choose, generate


def batch(tokens, first=0):
    tokens = np.array(tokens)
    return Batch(tokens, None, None, np.arange(first, first + tokens.shape[1]), np.arange(len(tokens)), 0, 0.0)


def without_cache(model, prompt, num_tokens, context):
    """Greedy, all tokens read again for every new one; the older half forgotten past the context."""
    tokens, made = list(prompt)[-context:], []
    for _ in range(num_tokens):
        if len(tokens) > context:
            tokens = tokens[-(context // 2):]
        made.append(int(model.next_logits(batch([tokens]))[0].argmax()))
        tokens.append(made[-1])
    return made


@pytest.mark.parametrize("family, kv_heads", [("gpt", 5), ("llama", 5), ("llama", 1)])
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 3, 1], [9]], ids=str)
def test_logits_with_a_cache_equal_those_without(family, kv_heads, pieces):
    model = small_model(family=family, kv_heads=kv_heads)
    tokens = np.random.default_rng(1).integers(0, 31, (3, 9))
    caches, seen = model.caches(3, 9), 0
    for size in pieces:
        new = batch(tokens[:, seen:seen + size], first=seen)
        seen += size
        np.testing.assert_allclose(model.next_logits(new, caches), model.next_logits(batch(tokens[:, :seen])), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("prompt_length", [1, 4, 9, 14])
def test_text_with_a_cache_equals_text_without(family, prompt_length):
    model = small_model(family=family, tied=False)
    prompt = list(np.random.default_rng(prompt_length).integers(0, 31, prompt_length))
    made = list(generate(model, prompt, 25))        # several times past the context of 9
    assert len(made) == 25 and made == without_cache(model, prompt, 25, 9)
    assert len(set(made)) > 1


def test_generating_stops_before_the_end_token_and_leaves_the_prompt_alone():
    model = small_model()
    prompt = [1, 2, 3]
    made = list(generate(model, prompt, 12))
    end = made[5]
    assert list(generate(model, prompt, 12, end=end)) == made[:made.index(end)] and prompt == [1, 2, 3]
    assert list(generate(model, prompt, 0)) == []


def test_a_context_of_one_token():
    model = small_model(context=1)
    assert list(generate(model, [3, 4], 5)) == without_cache_of_one(model, 4, 5)


def without_cache_of_one(model, token, num_tokens):
    made = []
    for _ in range(num_tokens):
        token = int(model.next_logits(batch([[token]]))[0].argmax())
        made.append(token)
    return made


def test_sampling_depends_on_seed_number_and_position_only():
    model, sampling = small_model(), Sampling(1.0, seed=5)
    made = list(generate(model, [1, 2], 20, sampling))
    assert made == list(generate(model, [1, 2], 20, sampling))
    assert made[:8] == list(itertools.islice(generate(model, [1, 2], 20, sampling), 8))
    assert made != list(generate(model, [1, 2], 20, Sampling(1.0, seed=6)))
    assert made != list(generate(model, [1, 2], 20, sampling, number=1))
    logits = np.zeros(1000)
    assert len({choose(logits, sampling, 0, position) for position in range(20)}) > 15


LOGITS = np.log(np.array([0.1, 0.5, 0.2, 0.15, 0.05]))


def shares(sampling, count=20000):
    return np.bincount([choose(LOGITS, sampling, 0, position) for position in range(count)], minlength=5) / count


@pytest.mark.parametrize("sampling, expected", [
    (Sampling(1.0), [0.1, 0.5, 0.2, 0.15, 0.05]),
    (Sampling(0.5), np.array([0.01, 0.25, 0.04, 0.0225, 0.0025]) / 0.325),
    (Sampling(1.0, top_k=2), [0, 5 / 7, 2 / 7, 0, 0]),
    (Sampling(1.0, top_p=0.6), [0, 5 / 7, 2 / 7, 0, 0]),
    (Sampling(1.0, top_p=0.86), [0.1 / 0.95, 0.5 / 0.95, 0.2 / 0.95, 0.15 / 0.95, 0]),
    (Sampling(1.0, top_k=3, top_p=0.5), [0, 1, 0, 0, 0]),
    (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
    (Sampling(1.0, top_k=100), [0.1, 0.5, 0.2, 0.15, 0.05]),
])
def test_tokens_come_with_their_probabilities(sampling, expected):
    count = 6000
    found = shares(sampling, count)
    expected = np.array(expected)
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_greedy_takes_the_lower_id_of_equals():
    assert choose(np.array([0.0, 3.0, 3.0, 1.0]), Sampling(), 0, 0) == 1
    assert choose(np.array([0.0, 3.0, 3.0], np.float32), Sampling(1e-3, top_k=1), 0, 0) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 2e-308, 1e-300])
@pytest.mark.parametrize("logits", [[-2.0, 3.0, 1.0], [-4.0, -1.5, -3.0], [-1.7, 1.7, -1.7]], ids=str)
def test_tiny_temperatures_are_greedy(temperature, logits):
    for kind in (np.float32, np.float64):
        assert choose(np.array(logits, kind), Sampling(temperature, top_p=0.9), 0, 0) == 1
