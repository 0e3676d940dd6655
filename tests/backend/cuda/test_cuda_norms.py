"""LayerNorm and RMSNorm on the GPU against float64, in every form a width takes."""

import numpy as np
import pytest

from cuda_cases import DTYPES, REFERENCE, TOLERANCES, exact, on, random, same, wide

# rows, width: odd widths, one warp a row, several, and rows that need all of a block
SIZES = [(0, 8), (1, 1), (3, 33), (5, 64), (37, 768), (9, 1600), (3, 2048), (2, 5000), (2, 8200)]


@pytest.fixture(params=TOLERANCES)
def name(request):
    return request.param


@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_and_backward(cuda, name, rows, width, kind, with_residual):
    dtype, tolerance = DTYPES[name], TOLERANCES[name]
    x, weight, bias, dy = (random(seed, *shape, dtype=dtype) for seed, shape in enumerate([(rows, width), (width,), (width,), (rows, width)]))
    x = (x.astype(np.float64) + 0.5).astype(dtype)
    residual = random(4, rows, width, dtype=dtype) if with_residual else None
    parameters = (weight, bias)[:2 if kind == "layer_norm" else 1]
    summed = x if residual is None else (x.astype(wide(x).dtype) + residual.astype(wide(x).dtype)).astype(dtype)
    expected = getattr(REFERENCE, kind)(exact(summed)[0], *exact(*parameters), 1e-5)
    on_gpu = on(cuda, x)[0]
    found = getattr(cuda, kind)(on_gpu, *on(cuda, *parameters), 1e-5, *([] if residual is None else on(cuda, residual)))
    same(cuda, on_gpu, exact(summed)[0], 0 if residual is None else tolerance)
    for each, other in zip(found, expected):
        same(cuda, each, other, tolerance)

    starts = [wide(random(5 + i, width, dtype=dtype)) for i in range(len(parameters))]
    dexact = exact(*starts)
    dx = getattr(REFERENCE, kind + "_backward")(*exact(dy, summed, weight), *expected[1:], *dexact, *([] if residual is None else exact(residual)))
    dfound = on(cuda, *starts)
    dx_found = getattr(cuda, kind + "_backward")(
        *on(cuda, dy, summed, weight), *on(cuda, *(each.astype(starts[0].dtype) for each in expected[1:])), *dfound,
        *([] if residual is None else on(cuda, residual)))
    same(cuda, dx_found, dx, tolerance, least=0.1)      # that of rows of one element is 0
    for each, other in zip(dfound, dexact):
        same(cuda, each, other, tolerance)


def test_equal_bits_from_run_to_run(cuda, name):
    dtype = DTYPES[name]
    arrays = on(cuda, *(random(seed, *shape, dtype=dtype) for seed, shape in enumerate([(77, 64), (77, 64), (64,)])))
    statistics = on(cuda, *(np.abs(wide(random(seed, 77, dtype=dtype))) for seed in (3, 4)))
    results = []
    for _ in range(2):
        sums = [cuda.zeros((64,), statistics[0].dtype) for _ in range(2)]
        cuda.layer_norm_backward(*arrays, *statistics, *sums)
        results.append([cuda.to_host(each).tobytes() for each in sums])
    assert results[0] == results[1]
