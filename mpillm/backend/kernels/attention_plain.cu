// Attention of any type and head width up to 256, with dropout: a warp a query (or a key, for its gradients), a lane a key.
// Probabilities never lie in memory; the backward makes them again from lse (Dao et al. 2022).
#include "attention.cuh"

constexpr int WARPS = 4, MOST = 256, ACROSS = MOST / 32;

// The row of this warp as wide numbers in shared memory.
__device__ inline void keep_row(wide* row, const real* from, int width) {
    for (int c = lane(); c < width; c += 32) row[c] = to_wide(from[c]);
    __syncwarp();
}

__device__ inline wide dot(const wide* row, const real* other, int width) {
    wide sum = 0;
    const int packs = is_aligned(other) ? width / PACK : 0;
    for (int i = 0; i < packs; ++i) {
        const Pack pack = load_pack(other + i * PACK);
#pragma unroll
        for (int j = 0; j < PACK; ++j) sum += row[i * PACK + j] * to_wide(pack.at[j]);
    }
    for (int c = packs * PACK; c < width; ++c) sum += row[c] * to_wide(other[c]);
    return sum;
}

// sums[d] += value of each lane x its row of x, rows first .. first + 31, below `end`
__device__ inline void add_rows(wide (&sums)[ACROSS], wide value, const real* x, long long stride, long long first, long long end, int width) {
    for (int i = 0; i < 32; ++i) {
        const wide factor = __shfl_sync(0xFFFFFFFFu, value, i);
        if (first + i >= end) continue;
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
            const int c = lane() + 32 * j;
            if (c < width) sums[j] += factor * to_wide(x[(first + i) * stride + c]);
        }
    }
}

struct Place {
    long long batch, head, token;

    __device__ Place(long long number, long long heads, long long tokens)
        : batch(number / tokens / heads), head(number / tokens % heads), token(number % tokens) {}
};

extern "C" __global__ void __launch_bounds__(128) forward(const real* q, const real* k, const real* v, real* out, wide* lse,
                                                          const Layout* where, const long long* samples, const long long* positions,
                                                          double scale, double keep) {
    __shared__ wide rows[WARPS][MOST];
    const Layout& at = *where;
    const long long number = (long long)blockIdx.x * WARPS + warp();
    if (number >= at.num_batch * at.heads * at.queries) return;
    const Place me(number, at.heads, at.queries);
    const int width = int(at.width);
    const long long kv_head = me.head / at.group(), seen = at.seen(me.token);
    const real *keys = row_of(k, at.k, me.batch, 0, kv_head), *values = row_of(v, at.v, me.batch, 0, kv_head);
    keep_row(rows[warp()], row_of(q, at.q, me.batch, me.token, me.head), width);
    wide sums[ACROSS], top = -INFINITY, total = 0;
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) sums[j] = 0;
    for (long long first = 0; first < seen; first += 32) {
        const long long key = first + lane();
        wide score = -INFINITY;
        if (key < seen) score = dot(rows[warp()], keys + key * at.k.token, width) * wide(scale);
        const wide highest = warp_max(score), new_top = highest > top ? highest : top;
        const wide shrink = exp_of(top - new_top), p = exp_of(score - new_top);
        total = total * shrink + warp_sum(p);
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) sums[j] *= shrink;
        top = new_top;
        const wide kept = key < seen ? p * dropout_factor(at, samples, positions, me.batch, me.head, me.token, key, keep) : wide(0);
        add_rows(sums, kept, values, at.v.token, first, seen, width);
    }
    real* to = row_of(out, at.out, me.batch, me.token, me.head);
    for (int j = 0; j < ACROSS; ++j) {
        const int c = lane() + 32 * j;
        if (c < width) to[c] = to_real(total > 0 ? sums[j] / total : wide(0));
    }
    if (lane() == 0) lse[number] = total > 0 ? top + log_of(total) : wide(-INFINITY);
}

// delta (B, H, T): row sums of dout out
extern "C" __global__ void __launch_bounds__(128) row_sums(wide* delta, const real* dout, const real* out, const Layout* where) {
    const Layout& at = *where;
    const long long number = (long long)blockIdx.x * WARPS + warp();
    if (number >= at.num_batch * at.heads * at.queries) return;
    const Place me(number, at.heads, at.queries);
    const real *a = row_of(dout, at.dout, me.batch, me.token, me.head), *b = row_of(out, at.out, me.batch, me.token, me.head);
    wide sum = 0;
    for (int c = lane(); c < at.width; c += 32) sum += to_wide(a[c]) * to_wide(b[c]);
    sum = warp_sum(sum);
    if (lane() == 0) delta[number] = sum;
}

extern "C" __global__ void __launch_bounds__(128) backward_queries(const real* dout, const real* q, const real* k, const real* v,
                                                                   const wide* lse, const wide* delta, real* dq, const Layout* where,
                                                                   const long long* samples, const long long* positions, double scale,
                                                                   double keep) {
    __shared__ wide rows[WARPS][2][MOST];
    const Layout& at = *where;
    const long long number = (long long)blockIdx.x * WARPS + warp();
    if (number >= at.num_batch * at.heads * at.queries) return;
    const Place me(number, at.heads, at.queries);
    const int width = int(at.width);
    const long long kv_head = me.head / at.group(), seen = at.seen(me.token);
    const real *keys = row_of(k, at.k, me.batch, 0, kv_head), *values = row_of(v, at.v, me.batch, 0, kv_head);
    keep_row(rows[warp()][0], row_of(q, at.q, me.batch, me.token, me.head), width);
    keep_row(rows[warp()][1], row_of(dout, at.dout, me.batch, me.token, me.head), width);
    const wide shift = lse[number], offset = delta[number];
    wide sums[ACROSS];
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) sums[j] = 0;
    for (long long first = 0; first < seen; first += 32) {
        const long long key = first + lane();
        wide slope = 0;
        if (key < seen) {
            const wide p = exp_of(dot(rows[warp()][0], keys + key * at.k.token, width) * wide(scale) - shift);
            const wide dp = dot(rows[warp()][1], values + key * at.v.token, width);
            slope = p * (dp * dropout_factor(at, samples, positions, me.batch, me.head, me.token, key, keep) - offset) * wide(scale);
        }
        add_rows(sums, slope, keys, at.k.token, first, seen, width);
    }
    real* to = row_of(dq, at.dq, me.batch, me.token, me.head);
    for (int j = 0; j < ACROSS; ++j) {
        const int c = lane() + 32 * j;
        if (c < width) to[c] = to_real(sums[j]);
    }
}

extern "C" __global__ void __launch_bounds__(128) backward_keys(const real* dout, const real* q, const real* k, const real* v,
                                                                const wide* lse, const wide* delta, real* dk, real* dv,
                                                                const Layout* where, const long long* samples, const long long* positions,
                                                                double scale, double keep) {
    __shared__ wide rows[WARPS][2][MOST];
    const Layout& at = *where;
    const long long number = (long long)blockIdx.x * WARPS + warp();
    if (number >= at.num_batch * at.kv_heads * at.keys) return;
    const Place me(number, at.kv_heads, at.keys);
    const int width = int(at.width);
    keep_row(rows[warp()][0], row_of(k, at.k, me.batch, me.token, me.head), width);
    keep_row(rows[warp()][1], row_of(v, at.v, me.batch, me.token, me.head), width);
    long long begin = at.causal ? me.token - (at.keys - at.queries) : 0;  // the first query that sees this key
    if (begin < 0) begin = 0;
    wide key_sums[ACROSS], value_sums[ACROSS];
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) key_sums[j] = value_sums[j] = 0;
    for (long long head = me.head * at.group(); head < (me.head + 1) * at.group(); ++head) {
        const real *queries = row_of(q, at.q, me.batch, 0, head), *slopes = row_of(dout, at.dout, me.batch, 0, head);
        const long long base = (me.batch * at.heads + head) * at.queries;
        for (long long first = begin; first < at.queries; first += 32) {
            const long long query = first + lane();
            wide slope = 0, kept = 0;
            if (query < at.queries) {
                const wide p = exp_of(dot(rows[warp()][0], queries + query * at.q.token, width) * wide(scale) - lse[base + query]);
                const wide dp = dot(rows[warp()][1], slopes + query * at.dout.token, width);
                const wide factor = dropout_factor(at, samples, positions, me.batch, head, query, me.token, keep);
                kept = p * factor;
                slope = p * (dp * factor - delta[base + query]) * wide(scale);
            }
            add_rows(key_sums, slope, queries, at.q.token, first, at.queries, width);
            add_rows(value_sums, kept, slopes, at.dout.token, first, at.queries, width);
        }
    }
    real *to_key = row_of(dk, at.dk, me.batch, me.token, me.head), *to_value = row_of(dv, at.dv, me.batch, me.token, me.head);
    for (int j = 0; j < ACROSS; ++j) {
        const int c = lane() + 32 * j;
        if (c < width) {
            to_key[c] = to_real(key_sums[j]);
            to_value[c] = to_real(value_sums[j]);
        }
    }
}
