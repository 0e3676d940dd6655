// Rows of a table by token id, and sums into them. table (V_local, C) holds the ids first..; other ids give zeros.
//
// The sums go over places in the order of their ids (row_order.cu), cut into chunks of equal length, so a frequent id is no
// longer work for anyone than a rare one. What an id has in the chunk where it begins is added to the table at once; its share
// of each further chunk goes to a buffer, and these are added in order. The result is the same in every run.
//
// PACKED = 1: all rows begin at a multiple of 16 bytes and are a whole number of packs; a thread takes a pack, else a column.
// variants: PACKED=0,1
#include "common.cuh"

constexpr int chunk = 16, flight = 8;  // places of a chunk, rows in flight
constexpr int share = PACKED ? PACK : 1;  // columns of a thread

struct Part {
    real at[share];
};

struct WidePart {
    wide at[share];
};

__device__ inline Part load_part(const real* from) {
    Part part;
#if PACKED
    const Pack pack = load_pack(from);
#pragma unroll
    for (int j = 0; j < share; ++j) part.at[j] = pack.at[j];
#else
    part.at[0] = *from;
#endif
    return part;
}

__device__ inline void store_part(real* to, const Part& part) {
#if PACKED
    Pack pack;
#pragma unroll
    for (int j = 0; j < share; ++j) pack.at[j] = part.at[j];
    store_pack(to, pack);
#else
    *to = part.at[0];
#endif
}

__device__ inline WidePart load_wide_part(const wide* from) {
    WidePart part;
#if PACKED
#pragma unroll
    for (int j = 0; j < share; j += WIDE_PACK) {
        const WidePack pack = load_wide_pack(from + j);
#pragma unroll
        for (int k = 0; k < WIDE_PACK; ++k) part.at[j + k] = pack.at[k];
    }
#else
    part.at[0] = *from;
#endif
    return part;
}

__device__ inline void store_wide_part(wide* to, const WidePart& part) {
#if PACKED
#pragma unroll
    for (int j = 0; j < share; j += WIDE_PACK) {
        WidePack pack;
#pragma unroll
        for (int k = 0; k < WIDE_PACK; ++k) pack.at[k] = part.at[j + k];
        store_wide_pack(to + j, pack);
    }
#else
    *to = part.at[0];
#endif
}

__device__ inline void add_wide_part(wide* to, const WidePart& part) {
    WidePart sum = load_wide_part(to);
#pragma unroll
    for (int j = 0; j < share; ++j) sum.at[j] += part.at[j];
    store_wide_part(to, sum);
}

__device__ inline long long column_of_thread() { return (blockIdx.y * (long long)blockDim.x + threadIdx.x) * share; }

// y (n, C) = rows of the table; a warp a row
extern "C" __global__ void embedding(real* y, const long long* ids, const real* table, long long stride, long long first,
                                     long long n, long long table_rows, long long width) {
    const long long place = blockIdx.x * (long long)num_warps() + warp();
    if (place >= n) return;
    const long long row = ids[place] - first;
    real* to = y + place * width;
    const int columns = int(width);
    if (row >= 0 && row < table_rows) {
        const real* from = table + row * stride;
#pragma unroll 4
        for (int column = lane() * share; column < columns; column += 32 * share) store_part(to + column, load_part(from + column));
    } else {
        Part zero;
        for (int j = 0; j < share; ++j) zero.at[j] = to_real(0);
        for (int column = lane() * share; column < columns; column += 32 * share) store_part(to + column, zero);
    }
}

// table[key] += dy[place] for the places of a chunk, order (2, n) = keys and places; partial (chunks, C) gets what belongs to
// the last key of the chunk before.
extern "C" __global__ void add_chunks(wide* table, long long table_stride, wide* partial, const int* order, const real* dy,
                                      long long dy_stride, long long n, long long table_rows, long long width) {
    const long long column = column_of_thread(), begin = blockIdx.x * (long long)chunk;
    if (column >= width) return;
    const int *keys = order + begin, *places = order + n + begin, outside = int(table_rows);
    const int count = n - begin < chunk ? int(n - begin) : chunk;
    wide* const carried = partial + blockIdx.x * width + column;
    int current = keys[0];
    bool continues = begin > 0 && keys[-1] == current;
    WidePart sum = {};
    for (int base = 0; base < chunk; base += flight) {
        int key[flight];
        Part x[flight];
#pragma unroll
        for (int i = 0; i < flight; ++i) {
            const int at = base + i < count ? base + i : count - 1;  // something to load, with no branch
            const int found = keys[at];
            key[i] = base + i < count ? found : outside;
            x[i] = load_part(dy + places[at] * dy_stride + column);
        }
#pragma unroll
        for (int i = 0; i < flight; ++i) {
            if (key[i] != current) {
                if (continues) store_wide_part(carried, sum);
                else add_wide_part(table + current * table_stride + column, sum);
                continues = false;
                current = key[i];
                sum = {};
            }
            if (key[i] == outside) return;  // the last key there is
#pragma unroll
            for (int j = 0; j < share; ++j) sum.at[j] += to_wide(x[i].at[j]);
        }
    }
    if (continues) store_wide_part(carried, sum);
    else add_wide_part(table + current * table_stride + column, sum);
}

// table[key] += the partial sums of a key, by the block of the first chunk into which the key continues
extern "C" __global__ void add_partials(wide* table, long long table_stride, const wide* partial, const int* keys, long long n,
                                        long long table_rows, long long width) {
    const long long column = column_of_thread(), chunks = (n + chunk - 1) / chunk;
    if (column >= width || blockIdx.x == 0) return;
    const int* key_at = keys + blockIdx.x * (long long)chunk;
    const int key = *key_at;
    const bool continues = key_at[-1] == key, is_first = blockIdx.x == 1 || key_at[-chunk - 1] != key;
    if (key >= table_rows || !continues || !is_first) return;
    long long end = blockIdx.x + 1;  // the first chunk that does not begin with the key, which lies in end..beyond
    for (long long beyond = chunks; end < beyond;) {
        const long long middle = (end + beyond) / 2;
        if (keys[middle * chunk] == key) end = middle + 1;
        else beyond = middle;
    }
    WidePart sum = {};
#pragma unroll 8
    for (long long i = blockIdx.x; i < end; ++i) {
        const WidePart part = load_wide_part(partial + i * width + column);
#pragma unroll
        for (int j = 0; j < share; ++j) sum.at[j] += part.at[j];
    }
    add_wide_part(table + key * table_stride + column, sum);
}
