// What the attention kernels share: where their arrays lie, which keys a query sees, which probabilities are dropped.
// Query i sees the keys j <= i + S - T, or all without `causal`. Query head h reads kv head h / (H / K).
#pragma once

#include "philox.cuh"

// Strides of batch, token and head, in elements; the last dimension is contiguous.
struct View {
    long long batch, token, head;
};

struct Layout {
    View q, k, v, out, dout, dq, dk, dv;
    long long num_batch, queries, keys, heads, kv_heads, width, causal;
    long long dropout_key, threshold, step, first_head, first_key, blocks_of_head;  // of Philox counters

    __device__ long long group() const { return heads / kv_heads; }
    // Keys that a query sees: 0 .. seen - 1.
    __device__ long long seen(long long query) const {
        if (!causal) return keys;
        const long long last = query + keys - queries + 1;
        return last < 0 ? 0 : last < keys ? last : keys;
    }
};

template <class T>
__device__ inline T* row_of(T* x, const View& view, long long batch, long long token, long long head) {
    return x + batch * view.batch + token * view.token + head * view.head;
}

// 0 for a dropped probability, else `keep`; threshold 0 drops none.
__device__ inline wide dropout_factor(const Layout& layout, const long long* samples, const long long* positions, long long batch,
                                      long long head, long long query, long long key, double keep) {
    if (!layout.threshold) return 1;
    const long long channel = layout.first_key + key;
    const long long block = (layout.first_head + head) * layout.blocks_of_head + channel / 4;
    const Words words = philox(unsigned(layout.step), unsigned(samples[batch]), unsigned(positions[query]), unsigned(block),
                               (unsigned long long)layout.dropout_key);
    return (long long)words.lane(int(channel % 4)) >= layout.threshold ? wide(keep) : wide(0);
}

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
