// Attention of few queries over many keys, as in generation with a cache: the keys of a query are divided among blocks, whose
// results are joined by a second kernel (as in Flash-Decoding, Dao et al. 2023). Head widths that 1 to 32 packs hold, a power
// of two; `lanes` packs a row, so that a warp reads 32 / lanes keys at a time.
#include "attention.cuh"

constexpr int WARPS = 4, AT_ONCE = 4;  // keys of a lane whose packs are on their way together

// A part of a softmax over keys: sums of values weighted by exp(score - top), and of these weights.
struct Part {
    wide top, total, sums[PACK];

    __device__ void scale_to(wide new_top) {
        const wide shrink = top == -INFINITY ? wide(0) : exp_of(top - new_top);
        top = new_top;
        total *= shrink;
#pragma unroll
        for (int j = 0; j < PACK; ++j) sums[j] *= shrink;
    }

    __device__ void add(const Part& other) {
        if (other.top == -INFINITY) return;
        Part joined = other;
        const wide highest = other.top > top ? other.top : top;
        scale_to(highest);
        joined.scale_to(highest);
        total += joined.total;
#pragma unroll
        for (int j = 0; j < PACK; ++j) sums[j] += joined.sums[j];
    }
};

// parts (rows, blocks, width) and stats (rows, blocks, 2) of the keys blockIdx.y * chunk .. + chunk - 1; a row (blockIdx.x) is a
// query of a head of a sequence.
extern "C" __global__ void __launch_bounds__(128) part(const real* q, const real* k, const real* v, wide* parts, wide* stats,
                                                       const Layout* where, double scale, long long chunk, long long lanes) {
    __shared__ __align__(16) unsigned char memory[WARPS * 32 * sizeof(Part)];
    Part* of_warps = reinterpret_cast<Part*>(memory);
    const Layout& at = *where;
    const int row = blockIdx.x, query = row % int(at.queries), head = row / int(at.queries) % int(at.heads);
    const int batch = row / int(at.queries * at.heads), kv_head = head / int(at.group());
    const int keys_of_warp = 32 / int(lanes), column = lane() % int(lanes) * PACK, step = WARPS * keys_of_warp;
    const long long begin = blockIdx.y * chunk, seen = at.seen(query), end = begin + chunk < seen ? begin + chunk : seen;
    const real *keys = row_of(k, at.k, batch, 0, kv_head) + column, *values = row_of(v, at.v, batch, 0, kv_head) + column;
    const Pack mine = load_pack(row_of(q, at.q, batch, query, head) + column);
    Part own = {-INFINITY, 0, {}};
    for (long long base = begin; base < end; base += step * AT_ONCE) {  // as often in all lanes of a warp
        const long long first = base + warp() * keys_of_warp + lane() / int(lanes);
        Pack key_packs[AT_ONCE], value_packs[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i * step < end) {
                key_packs[i] = load_pack(keys + (first + i * step) * at.k.token);
                value_packs[i] = load_pack(values + (first + i * step) * at.v.token);
            }
        wide scores[AT_ONCE], top = own.top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const bool there = first + i * step < end;
            wide score = 0;
#pragma unroll
            for (int j = 0; j < PACK; ++j) score += there ? to_wide(mine.at[j]) * to_wide(key_packs[i].at[j]) : wide(0);
            for (int other = 1; other < lanes; other *= 2) score += __shfl_xor_sync(0xFFFFFFFFu, score, other);
            scores[i] = there ? score * wide(scale) : wide(-INFINITY);
            top = scores[i] > top ? scores[i] : top;
        }
        if (top == -INFINITY) continue;
        own.scale_to(top);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (scores[i] == -INFINITY) continue;
            const wide weight = exp_of(scores[i] - top);
            own.total += weight;
#pragma unroll
            for (int j = 0; j < PACK; ++j) own.sums[j] += weight * to_wide(value_packs[i].at[j]);
        }
    }
    of_warps[thread()] = own;
    __syncthreads();
    if (thread() >= lanes) return;
    for (int i = thread() + int(lanes); i < 32 * WARPS; i += int(lanes)) own.add(of_warps[i]);
    const long long place = (long long)row * gridDim.y + blockIdx.y;
#pragma unroll
    for (int j = 0; j < PACK; ++j) parts[place * at.width + column + j] = own.sums[j];
    if (thread() == 0) stats[2 * place] = own.top, stats[2 * place + 1] = own.total;
}

// out and lse of the rows, a warp each, from their parts.
extern "C" __global__ void __launch_bounds__(128) join(const wide* parts, const wide* stats, real* out, wide* lse, const Layout* where,
                                                       long long count) {
    const Layout& at = *where;
    const long long row = (long long)blockIdx.x * WARPS + warp();
    if (row >= at.num_batch * at.heads * at.queries) return;
    const long long query = row % at.queries, head = row / at.queries % at.heads, batch = row / at.queries / at.heads;
    const wide* own = stats + 2 * row * count;
    wide top = -INFINITY, total = 0;
    for (long long i = 0; i < count; ++i) top = own[2 * i] > top ? own[2 * i] : top;
    for (long long i = 0; i < count; ++i) total += own[2 * i + 1] > 0 ? own[2 * i + 1] * exp_of(own[2 * i] - top) : wide(0);
    real* to = row_of(out, at.out, batch, query, head);
    for (long long c = lane(); c < at.width; c += 32) {
        wide sum = 0;
        for (long long i = 0; i < count; ++i)
            if (own[2 * i + 1] > 0) sum += parts[(row * count + i) * at.width + c] * exp_of(own[2 * i] - top);
        to[c] = to_real(total > 0 ? sum / total : wide(0));
    }
    if (lane() == 0) lse[row] = total > 0 ? top + log_of(total) : wide(-INFINITY);
}
