// The part of CUDA that the kernels use, for the CPU: included by common.cuh with -DEMULATED in the place of CUDA's headers.
// No standard headers, so that a kernel compiles in a fraction of a second. emulator.cpp runs the threads.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static
// Blocks run one after the other. In a section of their own, so that the emulator can fill all of them with NaN.
#define __shared__ static __attribute__((section("emulated_shared")))
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulator_shared

// -- threads ------------------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x, y, z;
};

extern "C" {
void* memcpy(void*, const void*, __SIZE_TYPE__);
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char* emulator_shared;
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));    // by the linker
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
void emulator_block_barrier();
// Every lane gives `size` bytes (at most 128) and goes on when all 32 have: then the bytes of lane i lie at result + 128 i, until
// the lane's next exchange. `kind` tells one operation from another, so that a divergent warp is found out.
const unsigned char* emulator_warp_exchange(int kind, const void* bytes, int size);
}

constexpr int warpSize = 32;

extern "C" inline __attribute__((used)) unsigned char* shared_of_library(long long* bytes) {
    *bytes = __stop_emulated_shared - __start_emulated_shared;
    return __start_emulated_shared;
}

template <class T>
struct Lanes {
    const unsigned char* base;
    const T& operator[](int lane) const { return *reinterpret_cast<const T*>(base + 128 * (lane & 31)); }
};

// What every lane of the warp gave. Valid until the lane's next exchange.
template <class T>
Lanes<T> warp_exchange(const T& mine, int kind = 0) {
    static_assert(sizeof(T) <= 128, "at most 128 bytes a lane");
    return {emulator_warp_exchange(kind, &mine, sizeof(T))};
}

inline void __syncthreads() { emulator_block_barrier(); }
inline int emulated_lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31); }

struct FullMask {  // the only mask that kernels use
    FullMask(unsigned mask) {
        if (mask != 0xFFFFFFFFu) __builtin_trap();
    }
};

inline void __syncwarp(FullMask = 0xFFFFFFFFu) { warp_exchange(0, 1); }

template <class T>
T __shfl_sync(FullMask, T x, int from, int width = 32) {
    const int lane = emulated_lane();
    return warp_exchange(x, 2)[(lane & ~(width - 1)) | (from & (width - 1))];
}

template <class T>
T __shfl_xor_sync(FullMask, T x, int bits, int width = 32) {
    const int lane = emulated_lane(), from = lane ^ bits;
    return warp_exchange(x, 3)[(from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from];
}

template <class T>
T __shfl_down_sync(FullMask, T x, unsigned step, int width = 32) {
    const int lane = emulated_lane();
    return warp_exchange(x, 4)[(lane & (width - 1)) + int(step) < width ? lane + int(step) : lane];
}

template <class T>
T __shfl_up_sync(FullMask, T x, unsigned step, int width = 32) {
    const int lane = emulated_lane();
    return warp_exchange(x, 5)[(lane & (width - 1)) >= int(step) ? lane - int(step) : lane];
}

inline unsigned __ballot_sync(FullMask, int predicate) {
    const Lanes<int> lanes = warp_exchange(predicate, 6);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(lanes[lane] != 0) << lane;
    return bits;
}

inline int __any_sync(FullMask mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(FullMask mask, int predicate) { return __ballot_sync(mask, predicate) == 0xFFFFFFFFu; }
inline void __threadfence() {}

// A fiber runs until a barrier, so every operation is atomic. Whole numbers only: sums of floats would depend on the order.
#define EMULATED_ATOMIC(name, type, result) \
    inline type name(type* at, type x) {    \
        const type old = *at;               \
        *at = result;                       \
        return old;                         \
    }
#define EMULATED_ATOMICS(type)                            \
    EMULATED_ATOMIC(atomicAdd, type, old + x)             \
    EMULATED_ATOMIC(atomicMax, type, old > x ? old : x)   \
    EMULATED_ATOMIC(atomicMin, type, old < x ? old : x)   \
    EMULATED_ATOMIC(atomicExch, type, x)                  \
    EMULATED_ATOMIC(atomicOr, type, old | x)
EMULATED_ATOMICS(int)
EMULATED_ATOMICS(unsigned)
EMULATED_ATOMICS(unsigned long long)

// -- short vectors ------------------------------------------------------------------------------------------------------

#define EMULATED_VECTORS(type, name)                                                       \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
    struct name##3 { type x, y, z; };                                                      \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(unsigned char, uchar)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(long long, longlong)
EMULATED_VECTORS(unsigned long long, ulonglong)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T x) { *to = x; }
template <class T> void __stcg(T* to, T x) { *to = x; }
inline int4 load_streaming(const int4* from) { return *from; }
inline void store_streaming(int4* to, int4 bits) { *to = bits; }

// -- arithmetic ---------------------------------------------------------------------------------------------------------

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define EMULATED_FUNCTION(name)                                          \
    extern "C" double name(double);                                      \
    inline float name##f(float x) { return __builtin_##name##f(x); }     \
    inline float name(float x) { return __builtin_##name##f(x); }
EMULATED_FUNCTION(exp)
EMULATED_FUNCTION(exp2)
EMULATED_FUNCTION(expm1)
EMULATED_FUNCTION(log)
EMULATED_FUNCTION(log2)
EMULATED_FUNCTION(log1p)
EMULATED_FUNCTION(sqrt)
EMULATED_FUNCTION(sin)
EMULATED_FUNCTION(cos)
EMULATED_FUNCTION(tanh)
EMULATED_FUNCTION(erf)
EMULATED_FUNCTION(fabs)
EMULATED_FUNCTION(floor)
EMULATED_FUNCTION(ceil)
EMULATED_FUNCTION(trunc)
EMULATED_FUNCTION(rint)
#define EMULATED_FUNCTION_2(name)                                                     \
    extern "C" double name(double, double);                                           \
    inline float name##f(float x, float y) { return __builtin_##name##f(x, y); }      \
    inline float name(float x, float y) { return __builtin_##name##f(x, y); }
EMULATED_FUNCTION_2(pow)
EMULATED_FUNCTION_2(fmax)
EMULATED_FUNCTION_2(fmin)
EMULATED_FUNCTION_2(fmod)

inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float ldexpf(float x, int n) { return __builtin_ldexpf(x, n); }
inline float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
inline double ldexp(double x, int n) { return __builtin_ldexp(x, n); }
inline void sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x), *c = __builtin_cosf(x); }
inline void sincos(float x, float* s, float* c) { sincosf(x, s, c); }
inline void sincos(double x, double* s, double* c) { *s = __builtin_sin(x), *c = __builtin_cos(x); }
inline float __expf(float x) { return __builtin_expf(x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class T> bool isnan(T x) { return __builtin_isnan(x); }
template <class T> bool isinf(T x) { return __builtin_isinf(x); }
template <class T> bool isfinite(T x) { return __builtin_isfinite(x); }

#define EMULATED_ORDER(type)                                           \
    inline type max(type x, type y) { return x > y ? x : y; }          \
    inline type min(type x, type y) { return x < y ? x : y; }
EMULATED_ORDER(int)
EMULATED_ORDER(unsigned)
EMULATED_ORDER(long long)
EMULATED_ORDER(unsigned long long)
inline float max(float x, float y) { return fmaxf(x, y); }
inline float min(float x, float y) { return fminf(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}

template <class To, class From>
inline To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }

// -- 16-bit floats ------------------------------------------------------------------------------------------------------

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

inline float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

inline float widen(float16 x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    if (rest >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);     // infinity, NaN
    const float size = __uint_as_float(rest << 13) * 5192296858534827628530496329220096.0f;      // 2^112: the bias
    return __uint_as_float(sign | __float_as_uint(size));
}

inline void round_to(bfloat16& y, float x) {
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7FFF : (unsigned short)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline void round_to(float16& y, double x) {
    const unsigned short sign = (unsigned short)((unsigned long long)__double_as_longlong(x) >> 48 & 0x8000u);
    const double size = __builtin_fabs(x);
    if (!(size < 65520.0)) {  // half way from the largest to the next power of two
        y.bits = sign | (x != x ? 0x7FFF : 0x7C00);
        return;
    }
    // Adding 1.5 * 2^52 units of the last place rounds to whole units, ties to even.
    const int exponent = int((unsigned long long)__double_as_longlong(size) >> 52) - 1023;
    const int last = exponent < -14 ? -24 : exponent - 10;
    const double big = __builtin_ldexp(6755399441055744.0, last);
    const unsigned units = unsigned(__builtin_ldexp((size + big) - big, -last));
    y.bits = (unsigned short)(sign | (last == -24 ? units : (unsigned(exponent + 14) << 10) + units));
}

inline void round_to(float16& y, float x) { round_to(y, double(x)); }
inline void round_to(bfloat16& y, double x) { round_to(y, float(x)); }
