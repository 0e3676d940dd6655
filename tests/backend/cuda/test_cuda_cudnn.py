"""cuDNN's attention against float64 and against our own kernels; only where its frontend, the library and a GPU are."""

import numpy as np
import pytest

from cuda_cases import DTYPES, REFERENCE, TOLERANCES, exact, on, random, same


@pytest.fixture
def sdpa(cuda):
    if cuda.sdpa is None:
        pytest.skip("no cuDNN: it needs a GPU, nvidia-cudnn and nvidia-cudnn-frontend")
    return cuda.sdpa


def parts(x, heads, kv):
    return x[:, :, :heads], x[:, :, heads:heads + kv], x[:, :, heads + kv:]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 64, 4, 4, 64), (1, 130, 4, 2, 64), (1, 128, 2, 2, 128), (2, 65, 6, 2, 128)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_backward(cuda, sdpa, name, shape, causal):
    (b, t, h, kv, d), dtype, tolerance = shape, DTYPES[name], TOLERANCES[name]
    host, dout = random(0, b, t, h + 2 * kv, d, dtype=dtype), random(1, b, t, h, d, dtype=dtype)
    qkv, expected = parts(on(cuda, host)[0], h, kv), exact(*parts(host, h, kv))
    assert sdpa.takes(qkv[0], qkv[1], causal, None)
    results = []
    for _ in range(2):
        out, lse = cuda.empty((b, t, h, d), dtype), cuda.empty((b, h, t), np.float32)
        assert sdpa.forward(*qkv, out, lse, d ** -0.5, causal)
        dqkv = cuda.empty(host.shape, dtype)
        assert sdpa.backward(on(cuda, dout)[0], *qkv, out, lse, *parts(dqkv, h, kv), d ** -0.5, causal)
        results.append([cuda.to_host(x) for x in (out, lse, dqkv)])
    for one, two in zip(*results):
        assert one.tobytes() == two.tobytes()
    out, lse = REFERENCE.attention(*expected, d ** -0.5, causal, None)
    dexpected = [np.empty(x.shape) for x in expected]
    REFERENCE.attention_backward(*exact(dout), *expected, out, lse, *dexpected, d ** -0.5, causal, None)
    for found, wanted in zip(results[0], (out, lse, np.concatenate(dexpected, axis=2))):
        same(cuda, cuda.from_host(found), wanted, 2 * tolerance)


def test_in_a_graph(cuda, sdpa):
    host = random(0, 2, 64, 6, 64, dtype=DTYPES["bfloat16"])
    qkv, out, lse = parts(on(cuda, host)[0], 2, 2), cuda.empty((2, 64, 2, 64), host.dtype), cuda.empty((2, 2, 64), np.float32)
    assert sdpa.forward(*qkv, out, lse, 0.125, True)
    expected = cuda.to_host(out)
    (graph, _), = cuda.capture(lambda cut: sdpa.forward(*qkv, out, lse, 0.125, True))
    cuda.fill(out, 0)
    graph.launch()
    np.testing.assert_array_equal(cuda.to_host(out), expected)
