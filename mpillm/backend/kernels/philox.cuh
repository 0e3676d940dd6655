// Philox4x32-10 (Salmon et al., SC 2011): random words as a function of a counter and a key; the same bits as philox.h.
#pragma once

#include "common.cuh"

struct Words {
    unsigned w0, w1, w2, w3;

    __device__ unsigned lane(int i) const { return i == 0 ? w0 : i == 1 ? w1 : i == 2 ? w2 : w3; }
};

__device__ inline Words philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned long long key) {
    unsigned low = unsigned(key), high = unsigned(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ low;
        c1 = low1;
        c2 = high0 ^ c3 ^ high;
        c3 = low0;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}
