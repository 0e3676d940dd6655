// Turns the pairs (i, i + D/2) of x (B, T, H, D) in place by angles whose cosines and sines are (T, D/2)  (Su et al. 2021).
// Strides are in elements; the last dimension is contiguous.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) rope(real* x, long long batch_stride, long long token_stride, long long head_stride,
                                                       const wide* cosines, const wide* sines, long long inverse, long long batch,
                                                       long long tokens, long long heads, long long half) {
    const bool packed = is_aligned(x) && half % PACK == 0 && (batch_stride | token_stride | head_stride) % PACK == 0 &&
                        is_aligned(cosines) && is_aligned(sines);
    const int unit = packed ? PACK : 1;
    const long long across = half / unit, total = batch * tokens * heads * across, step = (long long)gridDim.x * blockDim.x;
    const wide sign = inverse ? -1 : 1;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const long long channel = i % across * unit, head = i / across % heads, token = i / across / heads % tokens;
        real* at = x + i / across / heads / tokens * batch_stride + token * token_stride + head * head_stride + channel;
        const wide *c = cosines + token * half + channel, *s = sines + token * half + channel;
        if (packed) {
            wide a[PACK], b[PACK];
            widen_pack(a, load_pack(at));
            widen_pack(b, load_pack(at + half));
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const wide first = a[j], second = b[j], cosine = c[j], sine = sign * s[j];
                a[j] = first * cosine - second * sine;
                b[j] = second * cosine + first * sine;
            }
            store_pack(at, round_pack(a));
            store_pack(at + half, round_pack(b));
        } else {
            const wide first = to_wide(at[0]), second = to_wide(at[half]), cosine = *c, sine = sign * *s;
            at[0] = to_real(first * cosine - second * sine);
            at[half] = to_real(second * cosine + first * sine);
        }
    }
}
