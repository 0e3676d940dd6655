// Attention on tensor cores, backward, in two kernels that make the probabilities again from lse: the gradients of 128 keys
// and values, over the queries that see them; and those of 128 queries, over their keys. Two more products than in one
// kernel, and no sums whose order would depend on timing.
// types: half
// variants: HEAD_WIDTH=64 QUERIES=64
// variants: HEAD_WIDTH=128 QUERIES=64,128
#include "attention_tiles.cuh"

// Registers of one row: lse in powers of two, +inf (probabilities 0) where there is no row or it sees nothing; and delta.
__device__ inline float shift_of(const float* lse, long long row, bool there) {
    const float x = there ? lse[row] * LOG2_E : INFINITY;
    return x == -INFINITY ? INFINITY : x;
}

// delta (B, H, T): row sums of dout out; the lanes of a row take a chunk each, rows in the order of memory.
extern "C" __global__ void __launch_bounds__(256) row_sums(float* delta, const real* dout, const real* out, const Layout* where) {
    const Layout& at = *where;
    const long long number = ((long long)blockIdx.x * 256 + thread()) / CHUNKS;
    const long long head = number % at.heads, query = number / at.heads % at.queries, batch = number / at.heads / at.queries;
    float sum = 0;
    if (batch < at.num_batch) {
        const Pack a = load_pack(row_of(dout, at.dout, batch, query, head) + thread() % CHUNKS * 8);
        const Pack b = load_pack(row_of(out, at.out, batch, query, head) + thread() % CHUNKS * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += to_wide(a.at[i]) * to_wide(b.at[i]);
    }
#pragma unroll
    for (int step = CHUNKS / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (batch < at.num_batch && thread() % CHUNKS == 0) delta[(batch * at.heads + head) * at.queries + query] = sum;
}

// ---- gradients of keys and values ---------------------------------------------------------------------------------------

constexpr int KEY_THREADS = 64 * ROW_WARPS;  // of a block, which takes tiles of QUERIES queries
constexpr int KEY_PARTS = D == 64 ? 4 : 8, KEY_PART = 8 * KEY_PARTS;  // columns at a time
constexpr int EXCHANGE = 2 * TILES * KEY_PARTS / 2 * 32 * 8;   // numbers between the warps of a pair, of two turns

// What the two warps of a pair do: one makes the probabilities and dv, the other ds (its factor) and dk. The probabilities go
// from one to the other through shared memory, a lane to a lane.
struct Pair {
    real* exchange;
    bool is_second;
    int turn;

    __device__ void give(const float (&p)[TILES][KEY_PARTS][4]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int j = 0; j < KEY_PARTS; j += 2) {
                const float(&a)[4] = p[t][j], (&b)[4] = p[t][j + 1];
                const int4 bits = {int(pair_of(a[0], a[1])), int(pair_of(a[2], a[3])), int(pair_of(b[0], b[1])), int(pair_of(b[2], b[3]))};
                store_pack(place_of(t, j), pack_of<Pack>(bits));
            }
    }

    // ds = probability (dp - delta)
    __device__ void take(float (&ds)[TILES][KEY_PARTS][4], const float* deltas) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int j = 0; j < KEY_PARTS; j += 2) {
                const Pack p = load_pack(place_of(t, j));
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = ds[t][j + i / 4][i % 4];
                    x = to_wide(p.at[i]) * (x - deltas[8 * (j + i / 4) + lane() % 4 * 2 + i % 2]);
                }
            }
    }

    __device__ real* place_of(int t, int j) { return exchange + ((turn * TILES * KEY_PARTS + t * KEY_PARTS + j) / 2 * 32 + lane()) * 8; }
};

// Scores (keys, queries) become probabilities; `whole`: every query sees every key. Row r is seen by the columns from
// r - diagonal on.
template <bool whole>
__device__ inline void to_probabilities(float (&scores)[TILES][KEY_PARTS][4], const float* shifts, int diagonal, float scale2) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < KEY_PARTS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * j + lane() % 4 * 2 + i % 2;
                const bool seen = whole || row_in_block(t, i / 2) <= column + diagonal;
                scores[t][j][i] = seen ? fast_exp2(scores[t][j][i] * scale2 - shifts[column]) : 0.0f;
            }
}

extern "C" __global__ void __launch_bounds__(KEY_THREADS, D == 64 ? 2 : 1)
    backward_keys(const real* dout, const real* q, const real* k, const real* v, const float* lse, const float* delta, real* dk, real* dv,
                  const Layout* where, double scale) {
    DYNAMIC_SHARED(memory);
    real *keys = reinterpret_cast<real*>(memory), *values = keys + ROWS * D, *streams = values + ROWS * D;
    real* exchange = streams + 4 * QUERIES * D;
    float* numbers = reinterpret_cast<float*>(exchange + ROW_WARPS * EXCHANGE);  // (2, 2, QUERIES): shifts and deltas
    const Layout at = *where;  // in registers: it does not change
    const int batch = blockIdx.z, kv_head = blockIdx.y, first = int(blockIdx.x) * ROWS, num_queries = int(at.queries);
    const int group = int(at.group()), offset = int(at.keys - at.queries);
    const int begin = at.causal ? max(0, first - offset) / QUERIES * QUERIES : 0;  // the tile of the first query that sees a key
    const float scale2 = float(scale) * LOG2_E;
    Pair pair = {exchange + warp() % ROW_WARPS * EXCHANGE, warp() >= ROW_WARPS, 0};

    auto start = [&](int number, int base, int buffer) {
        const int head = kv_head * group + number;
        copy_tile<QUERIES, KEY_THREADS>(streams + buffer * 2 * QUERIES * D, row_of(q, at.q, batch, 0, head), at.q.token, base, num_queries);
        copy_tile<QUERIES, KEY_THREADS>(streams + (buffer * 2 + 1) * QUERIES * D, row_of(dout, at.dout, batch, 0, head), at.dout.token, base,
                                        num_queries);
        if (thread() < 2 * QUERIES) {
            const int query = base + thread() % QUERIES;
            const long long row = (batch * at.heads + head) * at.queries + query;
            const bool there = query < num_queries;
            numbers[buffer * 2 * QUERIES + thread()] = thread() < QUERIES ? shift_of(lse, row, there) : there ? delta[row] : 0.0f;
        }
    };
    copy_tile<ROWS, KEY_THREADS>(keys, row_of(k, at.k, batch, 0, kv_head), at.k.token, first, int(at.keys));
    copy_tile<ROWS, KEY_THREADS>(values, row_of(v, at.v, batch, 0, kv_head), at.v.token, first, int(at.keys));
    float sums[TILES][D / 8][4];
    clear(sums);
    int number = 0, base = begin, buffer = 0;  // the head of the group and the queries that are done next
    bool more = begin < num_queries;
    if (more) start(0, begin, 0);
    commit_copies();
    while (more) {
        wait_copies<0>();
        __syncthreads();  // this tile is there, the other buffer is free
        const int diagonal = base + offset - first;
        base += QUERIES;
        if (base >= num_queries) base = begin, ++number;
        more = number < group;
        if (more) start(number, base, buffer ^ 1);
        commit_copies();
        real *queries = streams + buffer * 2 * QUERIES * D, *slopes = queries + QUERIES * D;
        const float* mine = numbers + (buffer * 2 + pair.is_second) * QUERIES;
        buffer ^= 1;
#pragma unroll
        for (int part = 0; part < QUERIES; part += KEY_PART) {
            float x[TILES][KEY_PARTS][4];
            clear(x);
            multiply(x, pair.is_second ? values : keys, row_of_warp(), pair.is_second ? slopes : queries, part);
            if (!pair.is_second) {
                if (!at.causal || diagonal + part >= ROWS - 1) to_probabilities<true>(x, mine + part, diagonal + part, scale2);
                else to_probabilities<false>(x, mine + part, diagonal + part, scale2);
                pair.give(x);
            }
            pair_barrier(warp() % ROW_WARPS);
            if (pair.is_second) pair.take(x, mine + part);
            pair.turn ^= 1;
            multiply_rows(sums, x, pair.is_second ? queries : slopes, part);
        }
    }
    wait_copies<0>();
    __syncthreads();
    float scales[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) scales[t][half] = pair.is_second ? float(scale) : 1.0f;
    real* target = pair.is_second ? row_of(dk, at.dk, batch, 0, kv_head) : row_of(dv, at.dv, batch, 0, kv_head);
    store_tile(pair.is_second ? keys : values, sums, scales, target, pair.is_second ? at.dk.token : at.dv.token, first, int(at.keys));
}

// ---- gradients of queries -----------------------------------------------------------------------------------------------

constexpr int QUERY_THREADS = 32 * ROW_WARPS, KEYS = D == 64 ? 64 : 32;  // of a block; of a tile: two blocks find room
constexpr int PART = 32, PARTS = PART / 8;                                // columns at a time, which bounds the registers

// ds (queries, keys from `column` of a tile on) from scores and dp; `whole`: all keys are seen, else those below `seen`.
template <bool whole>
__device__ inline void to_slopes(float (&scores)[TILES][PARTS][4], float (&ds)[TILES][PARTS][4], const float (&shift)[TILES][2],
                                 const float (&mean)[TILES][2], const Sight& sight, int base, float scale2) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int seen = whole ? KEYS : sight.seen(row_in_block(t, half)) - base;
#pragma unroll
            for (int j = 0; j < PARTS; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    const bool there = whole || 8 * j + lane() % 4 * 2 + i % 2 < seen;
                    const float probability = there ? fast_exp2(scores[t][j][i] * scale2 - shift[t][half]) : 0.0f;
                    ds[t][j][i] = probability * (ds[t][j][i] - mean[t][half]);
                }
        }
}

extern "C" __global__ void __launch_bounds__(QUERY_THREADS, 2)
    backward_queries(const real* dout, const real* q, const real* k, const real* v, const float* lse, const float* delta, real* dq,
                     const Layout* where, double scale) {
    DYNAMIC_SHARED(memory);
    real *queries = reinterpret_cast<real*>(memory), *slopes = queries + ROWS * D, *streams = slopes + ROWS * D;
    const Layout at = *where;  // in registers: it does not change
    const int batch = blockIdx.z, head = blockIdx.y, kv_head = head / int(at.group());
    const int first = int(gridDim.x - 1 - blockIdx.x) * ROWS, num_queries = int(at.queries);
    const int end = int(at.seen(min(first + ROWS, num_queries) - 1));
    const float scale2 = float(scale) * LOG2_E;
    const real *k_head = row_of(k, at.k, batch, 0, kv_head), *v_head = row_of(v, at.v, batch, 0, kv_head);

    auto start = [&](int base, int buffer) {
        copy_tile<KEYS, QUERY_THREADS>(streams + buffer * 2 * KEYS * D, k_head, at.k.token, base, end);
        copy_tile<KEYS, QUERY_THREADS>(streams + (buffer * 2 + 1) * KEYS * D, v_head, at.v.token, base, end);
    };
    copy_tile<ROWS, QUERY_THREADS>(queries, row_of(q, at.q, batch, 0, head), at.q.token, first, num_queries);
    copy_tile<ROWS, QUERY_THREADS>(slopes, row_of(dout, at.dout, batch, 0, head), at.dout.token, first, num_queries);
    if (end > 0) start(0, 0);
    commit_copies();
    float sums[TILES][D / 8][4], shift[TILES][2], mean[TILES][2];
    clear(sums);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + row_in_block(t, half);
            const long long row = (batch * at.heads + head) * at.queries + query;
            shift[t][half] = shift_of(lse, row, query < num_queries);
            mean[t][half] = query < num_queries ? delta[row] : 0.0f;
        }
    const Sight sight(at, first);
    for (int base = 0, buffer = 0; base < end; base += KEYS, buffer ^= 1) {
        wait_copies<0>();
        __syncthreads();
        if (base + KEYS < end) start(base + KEYS, buffer ^ 1);
        commit_copies();
        real *keys = streams + buffer * 2 * KEYS * D, *values = keys + KEYS * D;
        const bool whole = sight.is_whole(base + KEYS);
#pragma unroll
        for (int part = 0; part < KEYS; part += PART) {
            float p[TILES][PARTS][4], ds[TILES][PARTS][4];
            clear(p);
            clear(ds);
            multiply(p, queries, row_of_warp(), keys, part);
            multiply(ds, slopes, row_of_warp(), values, part);
            if (whole) to_slopes<true>(p, ds, shift, mean, sight, base + part, scale2);
            else to_slopes<false>(p, ds, shift, mean, sight, base + part, scale2);
            multiply_rows(sums, ds, keys, part);
        }
    }
    wait_copies<0>();
    __syncthreads();
    float scales[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) scales[t][half] = float(scale);
    store_tile(queries, sums, scales, row_of(dq, at.dq, batch, 0, head), at.dq.token, first, num_queries);
}
