// The places 0..n in the order of their ids, equal ids in the order of their places: a stable radix sort with digits of eight
// bits, lowest first. Only integers are counted and everything has a fixed order, so the result is one, without the host.
//
// order (4, n) int: keys and places as passes 0, 2, ... find them, then as passes 1, 3, ... do. A warp works on a run of places.
// types: float32
#include "common.cuh"

constexpr int digits = 256, run = 256, warps = 4;  // values of a digit, places of a warp, warps of a block
constexpr int steps = run / 32;  // places of a lane
constexpr unsigned full = 0xFFFFFFFFu;

// The sorted arrays as one pass sees them.
struct Sides {
    int *from_keys, *from_places, *to_keys, *to_places;

    __device__ Sides(int* order, long long n, int pass) {
        int *a = order, *b = order + 2 * n;
        if (pass % 2) {
            int* other = a;
            a = b;
            b = other;
        }
        from_keys = a, from_places = a + n, to_keys = b, to_places = b + n;
    }
};

// What a lane has of a run, all of it in flight at a time; 0 behind the end.
__device__ inline void load_run(int* held, const int* from, long long begin, long long n) {
#pragma unroll
    for (int step = 0; step < steps; ++step) held[step] = begin + 32 * step < n ? from[begin + 32 * step] : 0;
}

// Lanes of the warp with the digit of this lane, of those that have one.
__device__ unsigned lanes_alike(int digit, bool valid) {
    unsigned alike = __ballot_sync(full, valid);
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned with = __ballot_sync(full, set);
        alike &= set ? with : ~with;
    }
    return alike;
}

__device__ int rank_of_lane(unsigned alike) { return __popc(alike & ((1u << lane()) - 1)); }

// order = id - first as key, or table_rows for ids outside of the table, with its place
extern "C" __global__ void place_keys(int* order, const long long* ids, long long first, long long table_rows, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= n) return;
    const long long row = ids[i] - first;
    order[i] = row >= 0 && row < table_rows ? int(row) : int(table_rows);
    order[n + i] = int(i);
}

// counts (digits, runs): how often a run has a digit
extern "C" __global__ void count_digits(int* counts, int* order, long long n, long long runs, long long pass) {
    __shared__ int held[warps][digits];
    const int number = blockIdx.x * warps + warp(), shift = 8 * int(pass);
    int* mine = held[warp()];
    for (int digit = lane(); digit < digits; digit += 32) mine[digit] = 0;
    __syncwarp();
    const long long begin = (long long)number * run + lane();
    int key[steps];
    load_run(key, Sides(order, n, int(pass)).from_keys, begin, n);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        const bool valid = begin + 32 * step < n;
        const int digit = key[step] >> shift & (digits - 1);
        const unsigned alike = lanes_alike(digit, valid);
        if (valid && rank_of_lane(alike) == 0) mine[digit] += __popc(alike);
        __syncwarp();
    }
    if (number < runs)
        for (int digit = lane(); digit < digits; digit += 32) counts[digit * runs + number] = mine[digit];
}

// counts (n,) become the sums of those before each; one block, every thread a part
extern "C" __global__ void sum_before(int* counts, long long n) {
    __shared__ int sums[32];
    const long long part = (n + blockDim.x - 1) / blockDim.x, begin = thread() * part, end = begin + part < n ? begin + part : n;
    int own = 0;
#pragma unroll 8
    for (long long i = begin; i < end; ++i) own += counts[i];
    int upto = own;  // of this warp's threads up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(full, upto, step);
        if (lane() >= step) upto += below;
    }
    if (lane() == 31) sums[warp()] = upto;
    __syncthreads();
    int before = upto - own;
    for (int i = 0; i < warp(); ++i) before += sums[i];
#pragma unroll 8
    for (long long i = begin; i < end; ++i) {
        const int count = counts[i];
        counts[i] = before;
        before += count;
    }
}

// Keys and places to where the counts say; counts (digits, runs) as `sum_before` leaves them
extern "C" __global__ void move_keys(int* order, const int* counts, long long n, long long runs, long long pass) {
    __shared__ int held[warps][digits];
    const int number = blockIdx.x * warps + warp(), shift = 8 * int(pass);
    int* next = held[warp()];
    if (number < runs)
        for (int digit = lane(); digit < digits; digit += 32) next[digit] = counts[digit * runs + number];
    __syncwarp();
    const Sides sides(order, n, int(pass));
    const long long begin = (long long)number * run + lane();
    int key[steps], place[steps];
    load_run(key, sides.from_keys, begin, n);
    load_run(place, sides.from_places, begin, n);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        const bool valid = begin + 32 * step < n;
        const int digit = key[step] >> shift & (digits - 1);
        const unsigned alike = lanes_alike(digit, valid);
        const int rank = rank_of_lane(alike), start = valid ? next[digit] : 0;
        __syncwarp();
        if (valid) {
            if (rank == 0) next[digit] = start + __popc(alike);
            sides.to_keys[start + rank] = key[step];
            sides.to_places[start + rank] = place[step];
        }
        __syncwarp();
    }
}
