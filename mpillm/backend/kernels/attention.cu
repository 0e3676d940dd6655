// Attention on tensor cores, forward: a block takes 128 queries of a head and goes over the keys that they see.
// types: half
// variants: HEAD_WIDTH=64,128
#include "attention_tiles.cuh"

constexpr int THREADS = 32 * ROW_WARPS, COLUMNS = 64;
constexpr bool KEEP = D == 64;   // whether queries stay in registers; with a head width of 128 there is no room
constexpr float GROWTH = 8;      // of scores in powers of two beyond their former maximum, before sums are scaled anew

// Of a row: the score that probabilities are relative to, and their sum.
struct Softmax {
    float top[TILES][2], total[TILES][2];
};

// Scores of the keys from `base` on become probabilities relative to a former maximum, until one exceeds it by 2^GROWTH: then
// the sums so far are scaled to the new one (as in FlashAttention 4). `whole`: all keys are seen.
template <bool whole>
__device__ inline void to_probabilities(float (&scores)[TILES][COLUMNS / 8][4], float (&sums)[TILES][D / 8][4], Softmax& softmax,
                                        const Sight& sight, int base, float scale2) {
    float highest[TILES][2];
    bool grows = false;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float found = softmax.top[t][half];
            const int seen = whole ? COLUMNS : sight.seen(row_in_block(t, half)) - base;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[t][j][2 * half + i];
                    if (!whole && 8 * j + lane() % 4 * 2 + i >= seen) score = -INFINITY;
                    found = fmaxf(found, score);
                }
            found = fmaxf(found, __shfl_xor_sync(0xFFFFFFFFu, found, 1));
            found = fmaxf(found, __shfl_xor_sync(0xFFFFFFFFu, found, 2));
            highest[t][half] = found;
            grows |= (found - softmax.top[t][half]) * scale2 > GROWTH;  // no number, and false, where nothing has been seen
        }
    if (__any_sync(0xFFFFFFFFu, grows)) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float found = highest[t][half], shrink = found == -INFINITY ? 1.0f : fast_exp2((softmax.top[t][half] - found) * scale2);
                softmax.top[t][half] = found;
                softmax.total[t][half] *= shrink;
#pragma unroll
                for (int j = 0; j < D / 8; ++j) sums[t][j][2 * half] *= shrink, sums[t][j][2 * half + 1] *= shrink;
            }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = softmax.top[t][half] == -INFINITY ? 0.0f : softmax.top[t][half] * scale2;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[t][j][2 * half + i];
                    score = fast_exp2(score * scale2 - shift);
                    softmax.total[t][half] += score;
                }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(const real* q, const real* k, const real* v, real* out, float* lse,
                                                              const Layout* where, double scale) {
    DYNAMIC_SHARED(memory);
    real *queries = reinterpret_cast<real*>(memory), *keys = queries + ROWS * D, *values = keys + COLUMNS * D;
    const Layout at = *where;  // in registers: it does not change
    const int batch = blockIdx.z, head = blockIdx.y, kv_head = head / int(at.group());
    const int first = int(gridDim.x - 1 - blockIdx.x) * ROWS;  // the blocks with the most keys first
    const int num_queries = int(at.queries), end = int(at.seen(min(first + ROWS, num_queries) - 1));
    const real *k_head = row_of(k, at.k, batch, 0, kv_head), *v_head = row_of(v, at.v, batch, 0, kv_head);
    const float scale2 = float(scale) * LOG2_E;

    copy_tile<ROWS, THREADS>(queries, row_of(q, at.q, batch, 0, head), at.q.token, first, num_queries);
    copy_tile<COLUMNS, THREADS>(keys, k_head, at.k.token, 0, end);
    commit_copies();
    float sums[TILES][D / 8][4];
    clear(sums);
    Kept kept;
    Softmax softmax;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) softmax.top[t][half] = -INFINITY, softmax.total[t][half] = 0;

    const Sight sight(at, first);
    for (int base = 0; base < end; base += COLUMNS) {
        wait_copies<0>();
        __syncthreads();  // the keys are there, the values of the tile before are free
        copy_tile<COLUMNS, THREADS>(values, v_head, at.v.token, base, end);
        commit_copies();
        float scores[TILES][COLUMNS / 8][4];
        clear(scores);
        if (KEEP) {
            if (base == 0) kept.load(queries, row_of_warp());
            multiply_kept(scores, kept, keys, 0);
        } else {
            multiply(scores, queries, row_of_warp(), keys, 0);
        }
        if (sight.is_whole(base + COLUMNS)) to_probabilities<true>(scores, sums, softmax, sight, base, scale2);
        else to_probabilities<false>(scores, sums, softmax, sight, base, scale2);
        wait_copies<0>();
        __syncthreads();  // the values are there, the keys are free
        if (base + COLUMNS < end) copy_tile<COLUMNS, THREADS>(keys, k_head, at.k.token, base + COLUMNS, end);
        commit_copies();
        multiply_rows(sums, scores, values, 0);
    }

    float factor[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = softmax.total[t][half];
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
            factor[t][half] = sum > 0 ? 1 / sum : 0.0f;
            const int query = first + row_in_block(t, half);
            if (lane() % 4 == 0 && query < num_queries)
                lse[(batch * at.heads + head) * at.queries + query] = sum > 0 ? softmax.top[t][half] * float(scale) + logf(sum) : -INFINITY;
        }
    wait_copies<0>();
    __syncthreads();
    store_tile(queries, sums, factor, row_of(out, at.out, batch, 0, head), at.out.token, first, num_queries);
}
