// y = silu(gate) up (Shazeer 2020) and its gradients; gate, up, dgate, dup are row-strided views (rows, width).
#include "common.cuh"

__device__ inline float exp_of(float x) { return __expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline wide sigmoid(wide x) { return 1 / (1 + exp_of(-x)); }

extern "C" __global__ void __launch_bounds__(256) swiglu(real* y, const real* gate, long long gate_stride, const real* up, long long up_stride,
                                                         long long rows, long long width) {
    const bool packed = is_aligned(y) && is_aligned(gate) && is_aligned(up) && width % PACK == 0 && gate_stride % PACK == 0 && up_stride % PACK == 0;
    const int unit = packed ? PACK : 1;
    const long long across = width / unit, total = rows * across, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const long long row = i / across, column = (i - row * across) * unit;
        const real *g = gate + row * gate_stride + column, *u = up + row * up_stride + column;
        if (packed) {
            wide a[PACK], b[PACK];
            widen_pack(a, load_pack(g));
            widen_pack(b, load_pack(u));
#pragma unroll
            for (int j = 0; j < PACK; ++j) b[j] *= a[j] * sigmoid(a[j]);
            store_pack(y + i * PACK, round_pack(b));
        } else {
            const wide x = to_wide(*g);
            y[i] = to_real(x * sigmoid(x) * to_wide(*u));
        }
    }
}

// dy (rows, width) is contiguous; dgate = dy up silu'(gate), dup = dy silu(gate)
extern "C" __global__ void __launch_bounds__(256) swiglu_backward(const real* dy, const real* gate, long long gate_stride, const real* up,
                                                                  long long up_stride, real* dgate, long long dgate_stride, real* dup,
                                                                  long long dup_stride, long long rows, long long width) {
    const bool packed = is_aligned(dy) && is_aligned(gate) && is_aligned(up) && is_aligned(dgate) && is_aligned(dup) && width % PACK == 0 &&
                        (gate_stride | up_stride | dgate_stride | dup_stride) % PACK == 0;
    const int unit = packed ? PACK : 1;
    const long long across = width / unit, total = rows * across, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const long long row = i / across, column = (i - row * across) * unit;
        const real *g = gate + row * gate_stride + column, *u = up + row * up_stride + column;
        real *dg = dgate + row * dgate_stride + column, *du = dup + row * dup_stride + column;
        if (packed) {
            wide a[PACK], b[PACK], d[PACK];
            widen_pack(a, load_pack(g));
            widen_pack(b, load_pack(u));
            widen_pack(d, load_pack(dy + i * PACK));
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const wide x = a[j], s = sigmoid(x);
                a[j] = d[j] * b[j] * s * (1 + x * (1 - s));
                d[j] *= x * s;
            }
            store_pack(dg, round_pack(a));
            store_pack(du, round_pack(d));
        } else {
            const wide x = to_wide(*g), s = sigmoid(x), slope = to_wide(dy[i]), other = to_wide(*u);
            *dg = to_real(slope * other * s * (1 + x * (1 - s)));
            *du = to_real(slope * x * s);
        }
    }
}
