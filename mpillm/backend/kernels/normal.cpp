// Normal numbers by Philox and Box-Muller: a pure function of (key, row, column), bit for bit the NumPy form of philox.py.
// Only + - * / sqrt and bit operations, no fused multiply-add (this file is compiled with -ffp-contract=off).
#include "philox.h"

namespace mpillm {

constexpr double log_terms[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23};
constexpr double sin_terms[] = {1.0,           -1.0 / 6,         1.0 / 120,        -1.0 / 5040,           1.0 / 362880,
                                -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000, 1.0 / 355687428096000};
constexpr double cos_terms[] = {1.0,          -1.0 / 2,        1.0 / 24,           -1.0 / 720,           1.0 / 40320,
                                -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};

// ln((word + 0.5) / 2^32)
inline double log_of_word(uint32_t word) {
    const double u = (double(word) + 0.5) * 0x1p-32;
    uint64_t bits;
    std::memcpy(&bits, &u, sizeof bits);
    int32_t exponent = int32_t(bits >> 52) - 1022;
    bits = (bits & 0x000FFFFFFFFFFFFFu) | 0x3FE0000000000000u;  // mantissa in [0.5, 1)
    double mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    const bool small = mantissa < 0.7071067811865476;
    mantissa = small ? mantissa + mantissa : mantissa;
    exponent = small ? exponent - 1 : exponent;
    const double s = (mantissa - 1.0) / (mantissa + 1.0), s2 = s * s;
    double total = log_terms[11];
    for (int k = 10; k >= 0; --k) total = total * s2 + log_terms[k];
    return double(exponent) * 0.6931471805599453 + (s + s) * total;
}

// sine and cosine of 2 pi word / 2^32
inline void turn_of_word(uint32_t word, double& sine, double& cosine) {
    const uint32_t quarter = (word + (1u << 29)) >> 30;  // nearest quarter turn, mod 4
    const double angle = double(int32_t(word - (quarter << 30))) * (6.283185307179586 * 0x1p-32);
    const double a2 = angle * angle;
    double s = sin_terms[8], c = cos_terms[8];
    for (int k = 7; k >= 0; --k) {
        s = s * a2 + sin_terms[k];
        c = c * a2 + cos_terms[k];
    }
    s = s * angle;
    const bool odd = quarter & 1, turned = quarter & 2;
    const double s1 = odd ? c : s, c1 = odd ? -s : c;
    sine = turned ? -s1 : s1;
    cosine = turned ? -c1 : c1;
}

inline void box_muller(uint32_t a, uint32_t b, double& first, double& second) {
    const double radius = std::sqrt(-2.0 * log_of_word(a));
    double sine, cosine;
    turn_of_word(b, sine, cosine);
    first = radius * cosine;
    second = radius * sine;
}

template <class T>
void normal(T* out, int64_t stride, uint64_t key, uint64_t row, uint64_t column, double std, int64_t rows, int64_t width) {
    const int64_t lead = int64_t(column % 4), blocks = (lead + width + 3) / 4;
    constexpr int64_t most = 64;  // blocks at a time
    parallel_for(rows, rows * width * 8, [&](int64_t r) {
        const uint64_t number = row + uint64_t(r);
        T* at = out + r * stride - lead;
        double n0[most], n1[most], n2[most], n3[most];
        for (int64_t begin = 0; begin < blocks; begin += most) {
            const int64_t count = begin + most < blocks ? most : blocks - begin;
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
                const Words w = philox(uint32_t(column / 4 + uint64_t(begin + j)), uint32_t(number), uint32_t(number >> 32), 0, key);
                box_muller(w.w0, w.w1, n0[j], n1[j]);
                box_muller(w.w2, w.w3, n2[j], n3[j]);
            }
            const double* lanes[4] = {n0, n1, n2, n3};
            for (int64_t j = 4 * begin < lead ? lead : 4 * begin; j < 4 * (begin + count) && j < lead + width; ++j)
                at[j] = T(std * lanes[j % 4][j / 4 - begin]);
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                               \
    extern "C" void mpillm_normal_##S(T* out, int64_t stride, uint64_t key, uint64_t row, uint64_t column, double std, \
                                      int64_t rows, int64_t width) {                                               \
        mpillm::normal(out, stride, key, row, column, std, rows, width);                                           \
    }
EXPORT(float, f32)
EXPORT(double, f64)
