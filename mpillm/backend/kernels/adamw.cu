// One AdamW step on all tensors of a list in one launch and one pass: decoupled decay, bias-corrected moments, eps outside the
// square root; the rounded weight is written too where a tensor has a value of another type. A block takes a chunk of a tensor.
#include "common.cuh"

// A row of the table of tensors, (tensors, 8) 64-bit words.
struct Tensor {
    wide* weight;
    const wide* grad;
    wide *moment1, *moment2;
    real* value;            // or null
    long long count;        // elements
    long long first_chunk;  // number of its first chunk
    double decay;
};

struct Step {
    wide rest1, beta2, rest2, eps, shrink, pace, correction, scale;

    __device__ void apply(wide& weight, wide grad, wide& moment1, wide& moment2) const {
        const wide g = grad * scale;
        moment1 += rest1 * (g - moment1);
        moment2 = beta2 * moment2 + rest2 * g * g;
        weight = weight * shrink - pace * moment1 / (sqrt(moment2) * correction + eps);
    }
};

struct alignas(WIDE_PACK * sizeof(real)) Narrow {  // the values of a WidePack
    real at[WIDE_PACK];
};

__device__ inline bool fits(const void* pointer, int bytes) { return reinterpret_cast<unsigned long long>(pointer) % bytes == 0; }

// Elements begin..end, all arrays aligned, in packs; returns where it stopped.
__device__ long long update_packs(const Tensor& t, const Step& step, long long begin, long long end) {
    const long long stop = begin + (end - begin) / WIDE_PACK * WIDE_PACK;
#pragma unroll 2
    for (long long i = begin + thread() * WIDE_PACK; i < stop; i += blockDim.x * WIDE_PACK) {
        WidePack weight = load_wide_pack_streaming(t.weight + i), moment1 = load_wide_pack_streaming(t.moment1 + i),
                 moment2 = load_wide_pack_streaming(t.moment2 + i);
        const WidePack grad = load_wide_pack_streaming(t.grad + i);
        Narrow value;
#pragma unroll
        for (int j = 0; j < WIDE_PACK; ++j) {
            step.apply(weight.at[j], grad.at[j], moment1.at[j], moment2.at[j]);
            value.at[j] = to_real(weight.at[j]);
        }
        store_wide_pack_streaming(t.weight + i, weight);
        store_wide_pack_streaming(t.moment1 + i, moment1);
        store_wide_pack_streaming(t.moment2 + i, moment2);
        if (t.value) *reinterpret_cast<Narrow*>(t.value + i) = value;
    }
    return stop;
}

// owners (chunks,): the tensor of each chunk of `length` elements; pace = rate / (1 - beta1^step), correction =
// 1 / sqrt(1 - beta2^step); the gradient is grad * scale.
extern "C" __global__ void __launch_bounds__(256)
    adamw(const Tensor* tensors, const int* owners, long long length, double rate, double beta1, double beta2, double eps,
          double pace, double correction, double scale) {
    const Tensor t = tensors[owners[blockIdx.x]];
    const long long begin = (blockIdx.x - t.first_chunk) * length, end = begin + length < t.count ? begin + length : t.count;
    const Step step = {wide(1 - beta1), wide(beta2), wide(1 - beta2),  wide(eps), wide(1 - rate * t.decay),
                       wide(pace),      wide(correction), wide(scale)};
    const bool aligned = is_aligned(t.weight) && is_aligned(t.grad) && is_aligned(t.moment1) && is_aligned(t.moment2) &&
                         fits(t.value, sizeof(Narrow));
    const long long done = aligned ? update_packs(t, step, begin, end) : begin;
    for (long long i = done + thread(); i < end; i += blockDim.x) {
        wide weight = t.weight[i], moment1 = t.moment1[i], moment2 = t.moment2[i];
        step.apply(weight, t.grad[i], moment1, moment2);
        t.weight[i] = weight;
        t.moment1[i] = moment1;
        t.moment2[i] = moment2;
        if (t.value) t.value[i] = to_real(weight);
    }
}
