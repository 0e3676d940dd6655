// out, lse take in attention of the same queries over further keys: the online softmax over blocks of keys
// (Milakov & Gimelshein 2018). Views of (B, T, H, D) and (B, H, T), strides in elements; a warp a row.
#include "attention.cuh"

extern "C" __global__ void __launch_bounds__(128) merge(real* out, wide* lse, const real* part, const wide* part_lse, long long out_batch,
                                                        long long out_token, long long out_head, long long part_batch, long long part_token,
                                                        long long part_head, long long lse_batch, long long lse_head, long long lse_token,
                                                        long long other_batch, long long other_head, long long other_token, long long batch,
                                                        long long tokens, long long heads, long long width) {
    const long long number = (long long)blockIdx.x * 4 + warp();
    if (number >= batch * heads * tokens) return;
    const long long b = number / tokens / heads, head = number / tokens % heads, token = number % tokens;
    wide* own = lse + b * lse_batch + head * lse_head + token * lse_token;
    const wide first = *own, second = part_lse[b * other_batch + head * other_head + token * other_token];
    const wide top = first > second ? first : second;
    const wide total = top == -INFINITY ? top : top + log_of(exp_of(first - top) + exp_of(second - top));
    const wide shift = top == -INFINITY ? wide(0) : total, keep = exp_of(first - shift), take = exp_of(second - shift);
    real* to = out + b * out_batch + token * out_token + head * out_head;
    const real* from = part + b * part_batch + token * part_token + head * part_head;
    for (long long c = lane(); c < width; c += 32) to[c] = to_real(to_wide(to[c]) * keep + to_wide(from[c]) * take);
    __syncwarp();
    if (lane() == 0) *own = total;
}
