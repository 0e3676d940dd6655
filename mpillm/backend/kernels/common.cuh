// What every CUDA kernel starts with: the compute type, 16-byte accesses, sums and maxima of warps and blocks.
//
// A source is compiled once for each type, -DREAL=1 float32, 2 float64, 3 bfloat16, 4 float16, and -Dname=value for whatever
// else it fixes. Among its first lines it may tell the tests for what it is made (no such line: all four types, no macros):
//   // types: half                               bfloat16 and float16 only; else names, as in: float32 float64
//   // variants: HEAD_WIDTH=64,128 CAUSAL=0,1    the macros it needs, with values to compile; every combination;
//                                               several such lines: those of each
// Aligned shared memory is written __shared__ __align__(16) T name[N]; no alignas, which C++ allows only before __shared__.
// With -DEMULATED it is compiled for the CPU emulator of the tests, which has the part of CUDA that the kernels use.
#pragma once

#ifdef EMULATED
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// unsigned char* name: dynamic shared memory, as large as the launch says
#define DYNAMIC_SHARED(name)                                          \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];   \
    unsigned char* name = dynamic_shared

__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float16 x) { return __half2float(x); }
__device__ inline void round_to(bfloat16& y, float x) { y = __float2bfloat16_rn(x); }
__device__ inline void round_to(float16& y, float x) { y = __float2half_rn(x); }
__device__ inline void round_to(bfloat16& y, double x) { y = __float2bfloat16_rn(float(x)); }
__device__ inline void round_to(float16& y, double x) { y = __double2half(x); }

// Accesses to what is not used again soon: they leave the caches to other data.
__device__ inline int4 load_streaming(const int4* from) { return __ldcs(from); }
__device__ inline void store_streaming(int4* to, int4 bits) { __stcs(to, bits); }
#endif

// -- types --------------------------------------------------------------------------------------------------------------

template <int code> struct TypeOf;
template <> struct TypeOf<1> { using type = float; using wide = float; };
template <> struct TypeOf<2> { using type = double; using wide = double; };
template <> struct TypeOf<3> { using type = bfloat16; using wide = float; };
template <> struct TypeOf<4> { using type = float16; using wide = float; };

using real = TypeOf<REAL>::type;  // of activations and weights
using wide = TypeOf<REAL>::wide;  // of all arithmetic, sums and statistics

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(float& y, double x) { y = float(x); }
__device__ inline void round_to(double& y, double x) { y = x; }
__device__ inline void round_to(double& y, float x) { y = x; }

__device__ inline wide to_wide(real x) { return widen(x); }

__device__ inline real to_real(wide x) {
    real y;
    round_to(y, x);
    return y;
}

// Any of the four types from any other; to the nearest, ties to even.
template <class To, class From>
__device__ inline To convert(From x) {
    To y;
    round_to(y, widen(x));
    return y;
}

// -- 16 bytes at a time -------------------------------------------------------------------------------------------------

constexpr int PACK = 16 / sizeof(real), WIDE_PACK = 16 / sizeof(wide);

struct alignas(16) Pack {
    real at[PACK];
};

struct alignas(16) WidePack {
    wide at[WIDE_PACK];
};

static_assert(sizeof(Pack) == 16 && sizeof(WidePack) == 16, "a pack is what one access moves");

__device__ inline bool is_aligned(const void* pointer) { return (reinterpret_cast<unsigned long long>(pointer) & 15) == 0; }

// Through int4, so that the access stays one of 16 bytes whatever the compiler thinks of the struct.
template <class P>
__device__ inline P pack_of(int4 bits) {
    P pack;
    memcpy(&pack, &bits, 16);
    return pack;
}

template <class P>
__device__ inline int4 bits_of(const P& pack) {
    int4 bits;
    memcpy(&bits, &pack, 16);
    return bits;
}

__device__ inline Pack load_pack(const real* from) { return pack_of<Pack>(*reinterpret_cast<const int4*>(from)); }
__device__ inline void store_pack(real* to, const Pack& pack) { *reinterpret_cast<int4*>(to) = bits_of(pack); }
__device__ inline WidePack load_wide_pack(const wide* from) { return pack_of<WidePack>(*reinterpret_cast<const int4*>(from)); }
__device__ inline void store_wide_pack(wide* to, const WidePack& pack) { *reinterpret_cast<int4*>(to) = bits_of(pack); }
__device__ inline WidePack load_wide_pack_streaming(const wide* from) {
    return pack_of<WidePack>(load_streaming(reinterpret_cast<const int4*>(from)));
}
__device__ inline void store_wide_pack_streaming(wide* to, const WidePack& pack) {
    store_streaming(reinterpret_cast<int4*>(to), bits_of(pack));
}

// 2^x, 0 for -inf; results below 2^-126 are 0
__device__ inline float fast_exp2(float x) {
#ifdef EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// -- copies to shared memory that run by themselves (cp.async, sm_80 on) -------------------------------------------------

#ifndef EMULATED
__device__ inline unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }

// 16 bytes, zeros where the source is not `there`.
__device__ inline void copy_async(void* to, const void* from, bool there) {
    const int size = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all but the last `n` groups of this thread's copies are done.
template <int n>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
#else
inline void copy_async(void* to, const void* from, bool there) {
    const int4 zeros = {0, 0, 0, 0};
    memcpy(to, there ? from : &zeros, 16);
}
inline void commit_copies() {}
template <int n>
inline void wait_copies() {}
#endif

// The numbers of a pack, wide. Of bfloat16, one operation each, where the compiler takes each number out of its word first.
__device__ inline void widen_pack(wide (&x)[PACK], const Pack& pack) {
#if REAL == 3 && !defined(EMULATED)
    const int4 bits = bits_of(pack);
    const int words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = __int_as_float(words[i] << 16), x[2 * i + 1] = __int_as_float(words[i] & 0xFFFF0000);
#else
#pragma unroll
    for (int j = 0; j < PACK; ++j) x[j] = to_wide(pack.at[j]);
#endif
}

// The pack of these numbers, rounded: two in one operation.
__device__ inline Pack round_pack(const wide (&x)[PACK]) {
    Pack pack;
#if REAL == 3 && !defined(EMULATED)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        memcpy(&pack.at[2 * i], &two, 4);
    }
#else
#pragma unroll
    for (int j = 0; j < PACK; ++j) pack.at[j] = to_real(x[j]);
#endif
    return pack;
}

// -- warps and blocks (of one dimension; block sizes are multiples of 32) -----------------------------------------------

__device__ inline int thread() { return int(threadIdx.x); }
__device__ inline int lane() { return int(threadIdx.x & 31); }
__device__ inline int warp() { return int(threadIdx.x >> 5); }
__device__ inline int num_warps() { return int(blockDim.x >> 5); }

// The sum over the lanes of a warp, the same bits in all of them.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

template <class T>
__device__ inline T warp_max(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        x = x > other ? x : other;
    }
    return x;
}

// The sum over a block, in all its threads; scratch: 32 elements of shared memory, free again at the return.
template <class T>
__device__ inline T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    x = warp_sum(lane() < num_warps() ? scratch[lane()] : T(0));
    __syncthreads();
    return x;
}

// target (width) += the sums over parts, `stride` elements from one to the next, in their order: 32 parts of them by the 32
// warps of a block, which does 32 columns. found: shared memory.
__device__ inline void add_column_parts(wide* target, const wide* parts, long long count, long long stride, long long width,
                                        wide (&found)[32][32]) {
    const long long column = (long long)blockIdx.x * 32 + lane();
    wide sum = 0;
    if (column < width)
        for (long long part = warp(); part < count; part += num_warps()) sum += parts[part * stride + column];
    found[warp()][lane()] = sum;
    __syncthreads();
    if (warp() == 0 && column < width) {
        sum = target[column];
        for (int i = 0; i < num_warps(); ++i) sum += found[i][lane()];
        target[column] = sum;
    }
}

template <class T>
__device__ inline T block_max(T x, T* scratch) {
    x = warp_max(x);
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    x = warp_max(scratch[lane() < num_warps() ? lane() : 0]);
    __syncthreads();
    return x;
}
