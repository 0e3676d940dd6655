// Normal numbers by Philox and Box-Muller, a function of (key, row, column) alone: the numbers of normal.cpp, in double.
#include "common.cuh"
#include "philox.cuh"

// ln((word + 0.5) / 2^32), from the series of atanh
__device__ inline double log_of_word(unsigned word) {
    const double terms[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                            1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23};
    const unsigned long long odd = 2ull * word + 1;  // the number times 2^33, of `width` bits
    const int width = word >> 31 ? 33 : 32 - __clz(int(unsigned(odd)));
    double mantissa = double(odd) / double(1ull << width);  // in [0.5, 1)
    const bool small = mantissa < 0.7071067811865476;
    mantissa = small ? mantissa + mantissa : mantissa;
    const int exponent = width - 33 - int(small);
    const double s = (mantissa - 1.0) / (mantissa + 1.0), s2 = s * s;
    double total = terms[11];
#pragma unroll
    for (int k = 10; k >= 0; --k) total = total * s2 + terms[k];
    return double(exponent) * 0.6931471805599453 + (s + s) * total;
}

// sine and cosine of 2 pi word / 2^32: of the angle to the nearest quarter turn, then turned
__device__ inline void turn_of_word(unsigned word, double& sine, double& cosine) {
    const double sin_terms[] = {1.0,           -1.0 / 6,         1.0 / 120,        -1.0 / 5040,           1.0 / 362880,
                                -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000, 1.0 / 355687428096000};
    const double cos_terms[] = {1.0,          -1.0 / 2,        1.0 / 24,           -1.0 / 720,           1.0 / 40320,
                                -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
    const unsigned quarter = (word + (1u << 29)) >> 30;
    const double angle = double(int(word - (quarter << 30))) * (6.283185307179586 / 4294967296.0), a2 = angle * angle;
    double s = sin_terms[8], c = cos_terms[8];
#pragma unroll
    for (int k = 7; k >= 0; --k) {
        s = s * a2 + sin_terms[k];
        c = c * a2 + cos_terms[k];
    }
    s *= angle;
    const bool odd = quarter & 1, turned = quarter & 2;
    sine = (odd ? c : s) * (turned ? -1 : 1);
    cosine = (odd ? -s : c) * (turned ? -1 : 1);
}

__device__ inline void box_muller(unsigned a, unsigned b, double& first, double& second) {
    const double radius = sqrt(-2.0 * log_of_word(a));
    double sine, cosine;
    turn_of_word(b, sine, cosine);
    first = radius * cosine;
    second = radius * sine;
}

// out (rows, width), row stride in elements, = the slab at (row, column) of a tensor of std * N(0, 1); a thread takes a
// counter, which has four columns.
extern "C" __global__ void normal(real* out, long long stride, long long key, long long row, long long column, double std,
                                  long long rows, long long width) {
    const long long lead = column % 4, counters = (lead + width + 3) / 4;
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= rows * counters) return;
    const long long line = i / counters, counter = i % counters, number = row + line;
    const Words w = philox(unsigned(column / 4 + counter), unsigned(number), unsigned(number >> 32), 0, key);
    double numbers[4];
    box_muller(w.w0, w.w1, numbers[0], numbers[1]);
    box_muller(w.w2, w.w3, numbers[2], numbers[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const long long at = 4 * counter + j - lead;
        if (at >= 0 && at < width) out[line * stride + at] = to_real(wide(std * numbers[j]));
    }
}
