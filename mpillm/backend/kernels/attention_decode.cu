// Attention of few queries over many keys, as in generation with a cache: the keys are divided among blocks, whose results are
// joined by a second kernel (as in Flash-Decoding, Dao et al. 2023). A row of a head is LANES packs, so that a warp reads
// 32 / LANES keys at a time, for HEADS query heads that share them.
// variants: LANES=4,8,16,32 HEADS=1,4
#include "attention.cuh"

constexpr int WARPS = 4, AT_ONCE = 4;                         // keys of a lane whose packs are on their way together
constexpr int KEYS = 32 / LANES, STEP = WARPS * KEYS;  // of a warp, of a block
constexpr double LOG2_E = 1.4426950408889634;

__device__ inline float power_of_2(float x) { return fast_exp2(x); }
__device__ inline double power_of_2(double x) { return exp2(x); }

// A part of a softmax over keys: sums of values weighted by 2^(score - top), and of these weights.
struct Part {
    wide top, total, sums[PACK];

    __device__ void scale_to(wide new_top) {
        const wide shrink = top == -INFINITY ? wide(0) : power_of_2(top - new_top);
        top = new_top;
        total *= shrink;
#pragma unroll
        for (int j = 0; j < PACK; ++j) sums[j] *= shrink;
    }

    __device__ void add(Part other) {
        if (other.top == -INFINITY) return;
        const wide highest = other.top > top ? other.top : top;
        scale_to(highest);
        other.scale_to(highest);
        total += other.total;
#pragma unroll
        for (int j = 0; j < PACK; ++j) sums[j] += other.sums[j];
    }
};

// parts (rows, blocks, width) and stats (rows, blocks, 2) of the keys blockIdx.y * chunk .. + chunk - 1; a row is a query of a
// head of a sequence. blockIdx.x: query, the fastest, then HEADS heads, then sequence.
extern "C" __global__ void __launch_bounds__(128) part(const real* q, const real* k, const real* v, wide* parts, wide* stats,
                                                       const Layout* where, double scale, long long chunk) {
    __shared__ __align__(16) unsigned char memory[32 * WARPS * sizeof(Part)];
    Part* of_threads = reinterpret_cast<Part*>(memory);
    const Layout& at = *where;
    const int queries = int(at.queries), heads = int(at.heads), query = int(blockIdx.x) % queries;
    const int head = int(blockIdx.x) / queries * HEADS % heads, batch = int(blockIdx.x) / queries * HEADS / heads, kv_head = head / int(at.group());
    const int column = lane() % LANES * PACK;
    const long long begin = blockIdx.y * chunk, seen = at.seen(query), end = begin + chunk < seen ? begin + chunk : seen;
    const real *keys = row_of(k, at.k, batch, 0, kv_head) + column, *values = row_of(v, at.v, batch, 0, kv_head) + column;
    const wide factor = wide(scale * LOG2_E);
    wide mine[HEADS][PACK];
    Part own[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        widen_pack(mine[h], load_pack(row_of(q, at.q, batch, query, head + h) + column));
        own[h].top = -INFINITY, own[h].total = 0;
#pragma unroll
        for (int j = 0; j < PACK; ++j) own[h].sums[j] = 0, mine[h][j] *= factor;
    }
    for (long long base = begin; base < end; base += STEP * AT_ONCE) {  // as often in all lanes of a warp
        const long long first = base + warp() * KEYS + lane() / LANES;
        Pack key_packs[AT_ONCE], value_packs[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {  // beyond the last key that one again, without weight
            const long long key = first + i * STEP < end ? first + i * STEP : end - 1;
            key_packs[i] = load_pack(keys + key * at.k.token);
            value_packs[i] = load_pack(values + key * at.v.token);
        }
        wide scores[HEADS][AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            wide key[PACK];
            widen_pack(key, key_packs[i]);
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                scores[h][i] = 0;
#pragma unroll
                for (int j = 0; j < PACK; ++j) scores[h][i] += mine[h][j] * key[j];
#pragma unroll
                for (int other = 1; other < LANES; other *= 2) scores[h][i] += __shfl_xor_sync(0xFFFFFFFFu, scores[h][i], other);
                if (first + i * STEP >= end) scores[h][i] = -INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            wide top = own[h].top;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) top = scores[h][i] > top ? scores[h][i] : top;
            if (top != -INFINITY && top != own[h].top) own[h].scale_to(top);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                scores[h][i] = top == -INFINITY ? wide(0) : power_of_2(scores[h][i] - top);
                own[h].total += scores[h][i];
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            wide value[PACK];
            widen_pack(value, value_packs[i]);
#pragma unroll
            for (int h = 0; h < HEADS; ++h)
#pragma unroll
                for (int j = 0; j < PACK; ++j) own[h].sums[j] += scores[h][i] * value[j];
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        __syncthreads();
        of_threads[thread()] = own[h];
        __syncthreads();
        if (thread() >= LANES) continue;
        for (int i = thread() + LANES; i < 32 * WARPS; i += LANES) own[h].add(of_threads[i]);
        const long long row = ((long long)batch * heads + head + h) * queries + query, place = row * gridDim.y + blockIdx.y;
#pragma unroll
        for (int j = 0; j < PACK; ++j) parts[place * at.width + column + j] = own[h].sums[j];
        if (thread() == 0) stats[2 * place] = own[h].top, stats[2 * place + 1] = own[h].total;
    }
}

// out and lse of the rows, a block each, from their parts.
extern "C" __global__ void __launch_bounds__(128) join(const wide* parts, const wide* stats, real* out, wide* lse, const Layout* where,
                                                       long long count) {
    __shared__ wide scratch[32];
    const Layout& at = *where;
    const long long row = blockIdx.x, query = row % at.queries, head = row / at.queries % at.heads, batch = row / at.queries / at.heads;
    const wide* own = stats + 2 * row * count;
    wide top = -INFINITY, total = 0;
    for (long long i = thread(); i < count; i += blockDim.x) top = own[2 * i] > top ? own[2 * i] : top;
    top = block_max(top, scratch);
    auto weight = [&](long long i) { return own[2 * i] == -INFINITY ? wide(0) : power_of_2(own[2 * i] - top); };
    for (long long i = thread(); i < count; i += blockDim.x) total += own[2 * i + 1] * weight(i);
    total = block_sum(total, scratch);
    real* to = row_of(out, at.out, batch, query, head);
    for (long long c = thread(); c < at.width; c += blockDim.x) {
        wide sum = 0;
#pragma unroll 8
        for (long long i = 0; i < count; ++i) sum += parts[(row * count + i) * at.width + c] * weight(i);
        to[c] = to_real(total > 0 ? sum / total : wide(0));
    }
    if (thread() == 0) lse[row] = total > 0 ? top / wide(LOG2_E) + log_of(total) : wide(-INFINITY);
}
