"""Attention on a GPU, ours and PyTorch's, by turns: TFLOP/s forward and backward, causal, bfloat16.

    python jobs/bench/gpu_attention.py [--out FILE.json]

FLOPs are 2 B H T^2 D forward (causal: half of the square) and 2.5 times that backward. PyTorch runs scaled_dot_product_attention
with its cuDNN and its flash form. `own` are our kernels; `chosen` is what `mpillm train` takes, where that is another.
"""

import argparse
import statistics

import ml_dtypes
import numpy as np

from gpu_record import about, save, table
from mpillm.backend import open_backend

ROUNDS, REPEATS = 5, 10
CASES = {"gpt2 (D 64, T 1024)": (32, 12, 12, 1024, 64), "D 128, T 4096": (4, 16, 16, 4096, 128), "D 128, T 4096, 4 query heads a kv head": (4, 32, 8, 4096, 128),
         "D 64, T 2048, 4 query heads a kv head": (8, 32, 8, 2048, 64)}


def ours(ops, shape, chosen):
    """(forward, backward) as callables; by cuDNN where `chosen` is its Sdpa, by our kernels where it is None."""
    b, h, kv, t, d = shape
    bf16 = np.dtype(ml_dtypes.bfloat16)
    some = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32)
    qkv = ops.from_host(np.resize(some, (b, t, h + 2 * kv, d)).astype(bf16))
    dout = ops.from_host(np.resize(some[::-1], (b, t, h, d)).astype(bf16))
    dqkv = ops.empty(qkv.shape, bf16)
    parts, dparts = [[x[:, :, :h], x[:, :, h:h + kv], x[:, :, h + kv:]] for x in (qkv, dqkv)]
    ops.sdpa = chosen
    out, lse = ops.attention(*parts, d ** -0.5)

    def within(work):
        def call():
            ops.sdpa = chosen
            work()
        return call
    return within(lambda: ops.attention(*parts, d ** -0.5)), within(lambda: ops.attention_backward(dout, *parts, out, lse, *dparts, d ** -0.5))


def theirs(shape, form):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    b, h, kv, t, d = shape
    q, k, v, dout = (torch.randn(b, heads, t, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (h, kv, kv, h))
    kind = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[form]

    def forward():
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != kv)
    out = forward()

    def backward():
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    return forward, backward


def seconds(ops, work, torch_stream):
    """Of one call."""
    cuda = ops.device.cupy.cuda
    stream = torch_stream or ops.device.stream
    begin, end = cuda.Event(), cuda.Event()
    begin.record(stream)
    for _ in range(REPEATS):
        work()
    end.record(stream)
    end.synchronize()
    return cuda.get_elapsed_time(begin, end) / 1e3 / REPEATS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    ops, rows, raw = open_backend("gpu"), [], {}
    import torch
    stream, sdpa = ops.device.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream), ops.sdpa
    for name, shape in CASES.items():
        b, h, kv, t, d = shape
        flops, contenders = 2 * b * h * t * t * d, {"own": (ours(ops, shape, None), None)}
        if sdpa is not None:
            contenders["chosen"] = ours(ops, shape, sdpa), None
        for form in ("cudnn", "flash"):
            try:
                contenders[form] = theirs(shape, form), stream
            except RuntimeError as error:
                print(f"PyTorch {form}: {str(error).splitlines()[0]}")
        found = {(who, index): [] for who in contenders for index in (0, 1)}
        for who, (works, on) in contenders.items():
            for work in works:
                work()
        torch.cuda.synchronize()
        ops.synchronize()
        for _ in range(ROUNDS):
            for who, (works, on) in contenders.items():
                for index, work in enumerate(works):
                    found[who, index].append(seconds(ops, work, on))
        raw[name] = {f"{who} {('forward', 'backward')[index]}": times for (who, index), times in found.items()}
        for index, direction in enumerate(("forward", "backward")):
            row = {"case": name, "direction": direction}
            for who in ("own", "chosen", "cudnn", "flash"):
                if (who, index) in found:
                    row[f"{who} TFLOP/s"] = flops * (1, 2.5)[index] / statistics.median(found[who, index]) / 1e12
            rows.append(row)
    print(table(rows))
    save(arguments.out, about(ops) | {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "rows": rows, "seconds": raw})


if __name__ == "__main__":
    main()
