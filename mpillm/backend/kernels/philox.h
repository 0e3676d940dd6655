// Philox4x32-10 (Salmon et al., SC 2011): random words as a function of a counter and a key.
#pragma once

#include "common.h"

namespace mpillm {

struct Words {
    uint32_t w0, w1, w2, w3;
};

inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
        const uint32_t n0 = uint32_t(product1 >> 32) ^ c1 ^ low, n2 = uint32_t(product0 >> 32) ^ c3 ^ high;
        c1 = uint32_t(product1);
        c3 = uint32_t(product0);
        c0 = n0;
        c2 = n2;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// The dropout of one token: lane c % 4 of the counter (step, sample, position, c / 4) belongs to channel c.
struct DropoutRow {
    uint64_t key;
    uint64_t threshold;  // words below it are dropped
    double scale;        // of the elements kept
    uint32_t step, sample, position;

    static constexpr int64_t most = 512;  // factors a call

    // factors[i] = 0 or scale for the channels 4 first_block + i, i < 4 num_blocks <= most
    template <class T>
    void factors(T* out, uint64_t first_block, int64_t num_blocks) const {
        const T keep = T(scale);
        const uint32_t below = threshold > 0xFFFFFFFFu ? 0xFFFFFFFFu : uint32_t(threshold);
        uint32_t w0[most / 4], w1[most / 4], w2[most / 4], w3[most / 4];
#pragma omp simd
        for (int64_t j = 0; j < num_blocks; ++j) {
            const Words w = philox(step, sample, position, uint32_t(first_block + uint64_t(j)), key);
            w0[j] = w.w0;
            w1[j] = w.w1;
            w2[j] = w.w2;
            w3[j] = w.w3;
        }
#pragma omp simd
        for (int64_t j = 0; j < num_blocks; ++j) {
            out[4 * j] = w0[j] >= below ? keep : T(0);
            out[4 * j + 1] = w1[j] >= below ? keep : T(0);
            out[4 * j + 2] = w2[j] >= below ? keep : T(0);
            out[4 * j + 3] = w3[j] >= below ? keep : T(0);
        }
    }
};

}  // namespace mpillm
