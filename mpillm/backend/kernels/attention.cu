// Attention on tensor cores, forward: a block takes 128 queries of a head and goes over the keys that they see.
// types: half
// variants: HEAD_WIDTH=64,128
#define TILES_OF_WARP 2  // with 1 and a head width of 128 it ran at 190 TFLOP/s on an H200, with 2 at 223
#include "attention_tiles.cuh"

constexpr bool KEEP = D == 64;  // whether queries stay in registers; with a head width of 128 there is no room

extern "C" __global__ void __launch_bounds__(THREADS) forward(const real* q, const real* k, const real* v, real* out, float* lse,
                                                              const Layout* where, double scale) {
    DYNAMIC_SHARED(memory);
    real *queries = reinterpret_cast<real*>(memory), *keys = queries + ROWS * D, *values = keys + COLUMNS * D;
    const Layout at = *where;  // in registers: it does not change
    const long long batch = blockIdx.z, head = blockIdx.y, kv_head = head / at.group();
    const long long first = (long long)(gridDim.x - 1 - blockIdx.x) * ROWS;  // the blocks with the most keys first
    const long long last = first + ROWS < at.queries ? first + ROWS : at.queries, end = at.seen(last - 1);
    const real *k_head = row_of(k, at.k, batch, 0, kv_head), *v_head = row_of(v, at.v, batch, 0, kv_head);
    const float scale2 = float(scale) * LOG2_E;

    copy_tile<ROWS>(queries, row_of(q, at.q, batch, 0, head), at.q.token, first, at.queries);
    copy_tile<COLUMNS>(keys, k_head, at.k.token, 0, end);
    commit_copies();
    float sums[TILES][D / 8][4], top[TILES][2], total[TILES][2];
    clear(sums);
    Kept kept;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) top[t][half] = -INFINITY, total[t][half] = 0;

    const Sight sight(at, first);
    const int last_key = int(end);
    for (int base = 0; base < last_key; base += COLUMNS) {
        wait_copies<0>();
        __syncthreads();  // the keys are there, the values of the tile before are free
        copy_tile<COLUMNS>(values, v_head, at.v.token, base, end);
        commit_copies();
        float scores[TILES][COLUMNS / 8][4];
        clear(scores);
        if (KEEP) {
            if (base == 0) kept.load(queries, warp() * TILES * 16);
            multiply_kept(scores, kept, keys, 0);
        } else {
            multiply(scores, queries, warp() * TILES * 16, keys, 0);
        }
        const bool whole = sight.is_whole(base);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = -INFINITY;
                const int seen = whole ? COLUMNS : sight.seen(row_in_block(t, half)) - base;
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[t][j][2 * half + i];
                        if (!whole && 8 * j + lane() % 4 * 2 + i >= seen) score = -INFINITY;
                        highest = fmaxf(highest, score);
                    }
                highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, 2));
                const float new_top = fmaxf(top[t][half], highest), shift = new_top == -INFINITY ? 0.0f : new_top * scale2;
                const float shrink = fast_exp2(top[t][half] * scale2 - shift);
                top[t][half] = new_top;
                float sum = 0;
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[t][j][2 * half + i];
                        score = fast_exp2(score * scale2 - shift);
                        sum += score;
                    }
                total[t][half] = total[t][half] * shrink + sum;
#pragma unroll
                for (int j = 0; j < D / 8; ++j) sums[t][j][2 * half] *= shrink, sums[t][j][2 * half + 1] *= shrink;
            }
        wait_copies<0>();
        __syncthreads();  // the values are there, the keys are free
        if (base + COLUMNS < last_key) copy_tile<COLUMNS>(keys, k_head, at.k.token, base + COLUMNS, end);
        commit_copies();
        multiply_rows(sums, scores, values, 0);
    }

    float factor[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = total[t][half];
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
            factor[t][half] = sum > 0 ? 1 / sum : 0.0f;
            const long long query = first + row_in_block(t, half);
            if (lane() % 4 == 0 && query < at.queries)
                lse[(batch * at.heads + head) * at.queries + query] = sum > 0 ? top[t][half] * float(scale) + logf(sum) : -INFINITY;
        }
    wait_copies<0>();
    __syncthreads();
    store_tile(queries, sums, factor, row_of(out, at.out, batch, 0, head), at.out.token, first, at.queries);
}
