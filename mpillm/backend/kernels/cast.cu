// Copies between any two types and any strides of up to four dimensions; and filling.
// types: float32
// variants: FROM=1,2,3,4,5 TO=1,2,3,4,5
#include "common.cuh"

template <int code> struct Element { using type = typename TypeOf<code>::type; };
template <> struct Element<5> { using type = long long; };
using From = Element<FROM>::type;
using To = Element<TO>::type;

template <class A, class B>
struct Conversion {
    static __device__ A of(B x) { return convert<A>(x); }
};
template <class A>
struct Conversion<A, A> {
    static __device__ A of(A x) { return x; }
};
template <class B>
struct Conversion<long long, B> {
    static __device__ long long of(B x) { return (long long)widen(x); }
};
template <class A>
struct Conversion<A, long long> {
    static __device__ A of(long long x) { return convert<A>(double(x)); }
};
template <>
struct Conversion<long long, long long> {
    static __device__ long long of(long long x) { return x; }
};

// dst (n) = src (n), both contiguous; eight elements a thread, which is 16 bytes or more of the narrower type.
extern "C" __global__ void __launch_bounds__(256) copy_flat(To* dst, const From* src, long long n) {
    constexpr int many = 8;
    struct alignas(16) Sources { From at[many]; };
    struct alignas(16) Targets { To at[many]; };
    const long long packs = is_aligned(dst) && is_aligned(src) ? n / many : 0;
    const long long step = (long long)gridDim.x * blockDim.x, first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; i < packs; i += step) {
        Sources from = reinterpret_cast<const Sources*>(src)[i];
        Targets to;
#pragma unroll
        for (int j = 0; j < many; ++j) to.at[j] = Conversion<To, From>::of(from.at[j]);
        reinterpret_cast<Targets*>(dst)[i] = to;
    }
    for (long long i = packs * many + first; i < n; i += step) dst[i] = Conversion<To, From>::of(src[i]);
}

// The same for sizes (a, b, c, d), with strides in elements.
extern "C" __global__ void __launch_bounds__(256) copy_strided(To* dst, const From* src, long long a, long long b, long long c, long long d,
                                                               long long to_a, long long to_b, long long to_c, long long to_d,
                                                               long long from_a, long long from_b, long long from_c, long long from_d) {
    const long long n = a * b * c * d, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const long long l = i % d, k = i / d % c, j = i / d / c % b, h = i / d / c / b;
        dst[h * to_a + j * to_b + k * to_c + l * to_d] = Conversion<To, From>::of(src[h * from_a + j * from_b + k * from_c + l * from_d]);
    }
}

extern "C" __global__ void __launch_bounds__(256) fill_flat(To* x, double value, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) x[i] = Conversion<To, double>::of(value);
}

extern "C" __global__ void __launch_bounds__(256) fill_strided(To* x, double value, long long a, long long b, long long c, long long d,
                                                               long long to_a, long long to_b, long long to_c, long long to_d) {
    const long long n = a * b * c * d, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const long long l = i % d, k = i / d % c, j = i / d / c % b, h = i / d / c / b;
        x[h * to_a + j * to_b + k * to_c + l * to_d] = Conversion<To, double>::of(value);
    }
}
