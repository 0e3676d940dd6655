// Kernels for the test of the emulator itself.
#include "common.cuh"

extern "C" __global__ void shuffles(float* sums, int* ballots, long long n, double factor) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    sums[i] = warp_sum(i < n ? float(i * factor) : 0.0f) + __shfl_down_sync(0xFFFFFFFFu, lane(), 1);
    const unsigned odd = __ballot_sync(0xFFFFFFFFu, i & 1);
    if (lane() == 0) ballots[i / 32] = int(odd);
}

// y[b] = sum of x in reverse order over the blocks; returns early where it can
extern "C" __global__ void reverse(real* y, const real* x, long long n) {
    DYNAMIC_SHARED(bytes);
    real* tile = reinterpret_cast<real*>(bytes);
    const long long i = blockIdx.x * (long long)blockDim.x + thread();
    if (i < n) tile[thread()] = x[i];
    if (i >= n) return;
    __syncthreads();
    const int count = int(n - blockIdx.x * (long long)blockDim.x < blockDim.x ? n - blockIdx.x * (long long)blockDim.x : blockDim.x);
    y[i] = tile[count - 1 - thread()];
}

extern "C" __global__ void block_sums(wide* y, wide* largest, const real* x) {
    __shared__ __align__(16) wide scratch[32];
    const wide mine = to_wide(x[blockIdx.x * blockDim.x + thread()]);
    const wide sum = block_sum(mine, scratch), top = block_max(mine, scratch);
    y[blockIdx.x * blockDim.x + thread()] = sum;
    largest[blockIdx.x * blockDim.x + thread()] = top;
}

// Shared memory read without a barrier: the value of thread 0
extern "C" __global__ void race(float* y) {
    __shared__ float first;
    first = -1;
    __syncthreads();
    if (thread() == 0) first = 7;
    y[thread()] = first;
}

extern "C" __global__ void divergent(float* y) {
    if (lane() < 16) y[lane()] = warp_sum(1.0f);
}

extern "C" __global__ void half_barrier(float* y) {
    if (warp() == 0) __syncthreads();
    else if (lane() == 0) __syncwarp();
    y[thread()] = 1;
}

extern "C" __global__ void write(float* y, long long index, long long shared_index) {
    DYNAMIC_SHARED(bytes);
    if (thread() == 0) {
        bytes[shared_index] = 1;
        y[index] = 3;
    }
}

// to[i] = real(from[i]), by packs
extern "C" __global__ void rounded(real* to, const double* from, long long n) {
    Pack pack;
    for (int j = 0; j < PACK; ++j) pack.at[j] = convert<real>(from[thread() * PACK + j]);
    if (thread() * PACK < n) store_pack(to + thread() * PACK, pack);
}

extern "C" __global__ void steps(float* y, long long count) {
    float x = float(thread());
    for (int i = 0; i < count; ++i) x = __shfl_xor_sync(0xFFFFFFFFu, x, 1 << i % 5);
    y[blockIdx.x * blockDim.x + thread()] = x;
}

// Shared memory that nobody has written
extern "C" __global__ void unwritten(float* y) {
    __shared__ float never[32], after[32];
    DYNAMIC_SHARED(bytes);
    y[3 * thread()] = never[lane()];
    y[3 * thread() + 1] = after[lane()];
    y[3 * thread() + 2] = reinterpret_cast<float*>(bytes)[lane()];
    __syncthreads();
    after[lane()] = 1;
}
