// y = GELU(x + bias), tanh form (Hendrycks & Gimpel 2016), x becomes x + bias; and its gradient, written over dy.
#include "common.cuh"

__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }

__device__ inline wide gelu_of(wide x) {
    const wide t = tanh_of(wide(0.7978845608028654) * x * (1 + wide(0.044715) * x * x));
    return wide(0.5) * x * (1 + t);
}

__device__ inline wide slope_of(wide x) {
    const wide t = tanh_of(wide(0.7978845608028654) * x * (1 + wide(0.044715) * x * x));
    return wide(0.5) * (1 + t) + wide(0.5 * 0.7978845608028654) * x * (1 - t * t) * (1 + wide(3 * 0.044715) * x * x);
}

// x, y (rows, width); bias (width) or null
extern "C" __global__ void __launch_bounds__(256) gelu(real* y, real* x, const real* bias, long long rows, long long width) {
    const bool packed = is_aligned(y) && is_aligned(x) && is_aligned(bias) && width % PACK == 0;
    const int unit = packed ? PACK : 1;
    const long long across = width / unit, total = rows * across, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const long long column = bias ? i % across * unit : 0;
        if (packed) {
            wide a[PACK], b[PACK];
            widen_pack(a, load_pack(x + i * PACK));
            if (bias) {
                widen_pack(b, load_pack(bias + column));
#pragma unroll
                for (int j = 0; j < PACK; ++j) a[j] += b[j];
                const Pack sum = round_pack(a);
                store_pack(x + i * PACK, sum);
                widen_pack(a, sum);
            }
#pragma unroll
            for (int j = 0; j < PACK; ++j) a[j] = gelu_of(a[j]);
            store_pack(y + i * PACK, round_pack(a));
        } else {
            if (bias) x[i] = to_real(to_wide(x[i]) + to_wide(bias[column]));
            y[i] = to_real(gelu_of(to_wide(x[i])));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) gelu_backward(real* dy, const real* x, long long n) {
    const long long packs = is_aligned(dy) && is_aligned(x) ? n / PACK : 0;
    const long long step = (long long)gridDim.x * blockDim.x, first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; i < packs; i += step) {
        wide d[PACK], a[PACK];
        widen_pack(d, load_pack(dy + i * PACK));
        widen_pack(a, load_pack(x + i * PACK));
#pragma unroll
        for (int j = 0; j < PACK; ++j) d[j] *= slope_of(a[j]);
        store_pack(dy + i * PACK, round_pack(d));
    }
    for (long long i = packs * PACK + first; i < n; i += step) dy[i] = to_real(to_wide(dy[i]) * slope_of(to_wide(x[i])));
}
