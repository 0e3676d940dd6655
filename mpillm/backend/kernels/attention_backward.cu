// Attention on tensor cores, backward, in two kernels that make the probabilities again from lse: the gradients of 128 keys
// and values, over the queries that see them; and those of 128 queries, over their keys. Two more products than in one
// kernel, and no sums whose order would depend on timing.
// types: half
// variants: HEAD_WIDTH=64,128
#define TILES_OF_WARP (HEAD_WIDTH == 64 ? 2 : 1)  // the sums of two tiles of width 128 do not fit into registers
#include "attention_tiles.cuh"

constexpr int PART = 32, PARTS = PART / 8;  // columns at a time, which bounds the registers

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

extern "C" __global__ void __launch_bounds__(THREADS) backward_keys(const real* dout, const real* q, const real* k, const real* v,
                                                                    const float* lse, const float* delta, real* dk, real* dv,
                                                                    const Layout* where, double scale) {
    DYNAMIC_SHARED(memory);
    real *keys = reinterpret_cast<real*>(memory), *values = keys + ROWS * D, *streams = values + ROWS * D;
    float* numbers = reinterpret_cast<float*>(streams + 4 * COLUMNS * D);  // (2, 2, COLUMNS): shifts and deltas of both buffers
    const Layout at = *where;  // in registers: it does not change
    const long long batch = blockIdx.z, kv_head = blockIdx.y, first = (long long)blockIdx.x * ROWS;
    const long long offset = at.keys - at.queries;
    long long begin = at.causal ? first - offset : 0;  // the first query that sees a key of this block
    begin = begin < 0 ? 0 : begin / COLUMNS * COLUMNS;
    const long long tiles = begin < at.queries ? (at.queries - begin + COLUMNS - 1) / COLUMNS : 0, steps = tiles * at.group();
    const float scale2 = float(scale) * LOG2_E;

    auto start = [&](long long step) {
        const long long head = kv_head * at.group() + step / tiles, base = begin + step % tiles * COLUMNS;
        const int buffer = int(step & 1);
        copy_tile<COLUMNS>(streams + buffer * 2 * COLUMNS * D, row_of(q, at.q, batch, 0, head), at.q.token, base, at.queries);
        copy_tile<COLUMNS>(streams + (buffer * 2 + 1) * COLUMNS * D, row_of(dout, at.dout, batch, 0, head), at.dout.token, base, at.queries);
        const long long row = (batch * at.heads + head) * at.queries + base;
        if (thread() < COLUMNS) {
            const bool there = base + thread() < at.queries;
            numbers[(buffer * 2) * COLUMNS + thread()] = shift_of(lse, row + thread(), there);
            numbers[(buffer * 2 + 1) * COLUMNS + thread()] = there ? delta[row + thread()] : 0.0f;
        }
    };
    copy_tile<ROWS>(keys, row_of(k, at.k, batch, 0, kv_head), at.k.token, first, at.keys);
    copy_tile<ROWS>(values, row_of(v, at.v, batch, 0, kv_head), at.v.token, first, at.keys);
    if (steps) start(0);
    commit_copies();
    float key_sums[TILES][D / 8][4], value_sums[TILES][D / 8][4];
    clear(key_sums);
    clear(value_sums);
    for (long long step = 0; step < steps; ++step) {
        wait_copies<0>();
        __syncthreads();  // this tile is there, the other buffer is free
        if (step + 1 < steps) start(step + 1);
        commit_copies();
        const int buffer = int(step & 1);
        real *queries = streams + buffer * 2 * COLUMNS * D, *slopes = queries + COLUMNS * D;
        const float *shifts = numbers + buffer * 2 * COLUMNS, *deltas = shifts + COLUMNS;
        const long long base = begin + step % tiles * COLUMNS;
        const bool whole = !at.causal || base + offset >= first + ROWS - 1;
        const int diagonal = int(base + offset - first);  // row r is seen by the columns from r - diagonal on
#pragma unroll 1
        for (int part = 0; part < COLUMNS; part += PART) {
            float p[TILES][PARTS][4], ds[TILES][PARTS][4];
            clear(p);
            clear(ds);
            multiply(p, keys, warp() * TILES * 16, queries, part);
            multiply(ds, values, warp() * TILES * 16, slopes, part);
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int j = 0; j < PARTS; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = part + 8 * j + lane() % 4 * 2 + i % 2;
                        const bool seen = whole || row_in_block(t, i / 2) <= column + diagonal;
                        const float probability = seen ? fast_exp2(p[t][j][i] * scale2 - shifts[column]) : 0.0f;
                        p[t][j][i] = probability;
                        ds[t][j][i] = probability * (ds[t][j][i] - deltas[column]);
                    }
            multiply_rows(value_sums, p, slopes, part);
            multiply_rows(key_sums, ds, queries, part);
        }
    }
    wait_copies<0>();
    __syncthreads();
    float ones[TILES][2], scales[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) ones[t][half] = 1, scales[t][half] = float(scale);
    store_tile(keys, key_sums, scales, row_of(dk, at.dk, batch, 0, kv_head), at.dk.token, first, at.keys);
    store_tile(values, value_sums, ones, row_of(dv, at.dv, batch, 0, kv_head), at.dv.token, first, at.keys);
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_queries(const real* dout, const real* q, const real* k, const real* v,
                                                                       const float* lse, const float* delta, real* dq, const Layout* where,
                                                                       double scale) {
    DYNAMIC_SHARED(memory);
    real *queries = reinterpret_cast<real*>(memory), *slopes = queries + ROWS * D, *streams = slopes + ROWS * D;
    const Layout at = *where;  // in registers: it does not change
    const long long batch = blockIdx.z, head = blockIdx.y, kv_head = head / at.group();
    const long long first = (long long)(gridDim.x - 1 - blockIdx.x) * ROWS;
    const long long last = first + ROWS < at.queries ? first + ROWS : at.queries, end = at.seen(last - 1);
    const float scale2 = float(scale) * LOG2_E;
    const real *k_head = row_of(k, at.k, batch, 0, kv_head), *v_head = row_of(v, at.v, batch, 0, kv_head);

    auto start = [&](long long base) {
        real* buffer = streams + (base / COLUMNS & 1) * 2 * COLUMNS * D;
        copy_tile<COLUMNS>(buffer, k_head, at.k.token, base, end);
        copy_tile<COLUMNS>(buffer + COLUMNS * D, v_head, at.v.token, base, end);
    };
    copy_tile<ROWS>(queries, row_of(q, at.q, batch, 0, head), at.q.token, first, at.queries);
    copy_tile<ROWS>(slopes, row_of(dout, at.dout, batch, 0, head), at.dout.token, first, at.queries);
    if (end > 0) start(0);
    commit_copies();
    float sums[TILES][D / 8][4], shift[TILES][2], mean[TILES][2];
    clear(sums);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const long long query = first + row_in_block(t, half), row = (batch * at.heads + head) * at.queries + query;
            shift[t][half] = shift_of(lse, row, query < at.queries);
            mean[t][half] = query < at.queries ? delta[row] : 0.0f;
        }
    const Sight sight(at, first);
    const int last_key = int(end);
    for (int base = 0; base < last_key; base += COLUMNS) {
        wait_copies<0>();
        __syncthreads();
        if (base + COLUMNS < last_key) start(base + COLUMNS);
        commit_copies();
        real *keys = streams + (base / COLUMNS & 1) * 2 * COLUMNS * D, *values = keys + COLUMNS * D;
        const bool whole = sight.is_whole(base);
#pragma unroll 1
        for (int part = 0; part < COLUMNS; part += PART) {
            float p[TILES][PARTS][4], ds[TILES][PARTS][4];
            clear(p);
            clear(ds);
            multiply(p, queries, warp() * TILES * 16, keys, part);
            multiply(ds, slopes, warp() * TILES * 16, values, part);
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int seen = whole ? COLUMNS : sight.seen(row_in_block(t, half)) - base;
#pragma unroll
                    for (int j = 0; j < PARTS; ++j)
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; ++i) {
                            const bool there = whole || part + 8 * j + lane() % 4 * 2 + i % 2 < seen;
                            const float probability = there ? fast_exp2(p[t][j][i] * scale2 - shift[t][half]) : 0.0f;
                            ds[t][j][i] = probability * (ds[t][j][i] - mean[t][half]);
                        }
                }
            multiply_rows(sums, ds, keys, part);
        }
    }
    wait_copies<0>();
    __syncthreads();
    float scales[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        for (int half = 0; half < 2; ++half) scales[t][half] = float(scale);
    store_tile(queries, sums, scales, row_of(dq, at.dq, batch, 0, head), at.dq.token, first, at.queries);
}
