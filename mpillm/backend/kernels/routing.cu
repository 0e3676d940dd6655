// Top-k routing of a mixture of experts (Jiang et al. 2024, arXiv:2401.04088, section 2.1): a warp takes a token, its lanes
// the experts lane, lane + 32, ... LANE_EXPERTS each.
// types: float32 float64
// variants: LANE_EXPERTS=1,2,8
#include "common.cuh"

constexpr unsigned full = 0xFFFFFFFFu;

__device__ inline long long token_of_warp() { return blockIdx.x * (long long)num_warps() + warp(); }

struct Choice {
    int expert;
    wide logit;
};

// The largest logit of the warp that is not taken; ties go to the lower expert.
__device__ Choice largest(const wide* x, unsigned taken, int experts) {
    int best = -1;  // none yet
    wide top = 0;
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j)
        if (lane() + 32 * j < experts && !(taken >> j & 1) && (best < 0 || x[j] > top)) {
            best = lane() + 32 * j;
            top = x[j];
        }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const wide other_top = __shfl_xor_sync(full, top, step);
        const int other = __shfl_xor_sync(full, best, step);
        if (other >= 0 && (best < 0 || other_top > top || (other_top == top && other < best))) {
            best = other;
            top = other_top;
        }
    }
    return {__shfl_sync(full, best, 0), __shfl_sync(full, top, 0)};
}

// chosen (N, k), weights (N, k), probabilities (N, E), lse (N,) of logits (N, E), k at most 32
extern "C" __global__ void route(long long* chosen, wide* weights, wide* probabilities, wide* lse, const wide* logits,
                                 long long tokens, long long num_experts, long long k) {
    const long long token = token_of_warp();
    if (token >= tokens) return;
    const int experts = int(num_experts), count = int(k);
    wide x[LANE_EXPERTS], total = 0, chosen_total = 0, weight = 0;
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) x[j] = lane() + 32 * j < experts ? logits[token * experts + lane() + 32 * j] : -INFINITY;
    wide top = 0;
    unsigned taken = 0;
    int mine = 0;  // lane i keeps the i-th choice
    for (int i = 0; i < count; ++i) {
        const Choice choice = largest(x, taken, experts);
        if (i == 0) top = choice.logit;
        if (choice.expert % 32 == lane()) taken |= 1u << choice.expert / 32;
        const wide e = exp(choice.logit - top);
        chosen_total += e;
        if (i == lane()) {
            mine = choice.expert;
            weight = e;
        }
    }
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
        x[j] = exp(x[j] - top);
        total += x[j];
    }
    total = warp_sum(total);
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j)
        if (lane() + 32 * j < experts) probabilities[token * experts + lane() + 32 * j] = x[j] / total;
    if (lane() < count) {
        chosen[token * count + lane()] = mine;
        weights[token * count + lane()] = weight / chosen_total;
    }
    if (lane() == 0) lse[token] = top + log(total);
}

// dlogits (N, E) from dweights (N, k), dprobabilities (N, E) or null, dlse (N,) or null
extern "C" __global__ void route_backward(wide* dlogits, const wide* dweights, const wide* dprobabilities, const wide* dlse,
                                          const long long* chosen, const wide* weights, const wide* probabilities,
                                          long long tokens, long long num_experts, long long k) {
    const long long token = token_of_warp();
    if (token >= tokens) return;
    const int experts = int(num_experts), count = int(k);
    wide p[LANE_EXPERTS], dp[LANE_EXPERTS], inner = 0;
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
        const int expert = lane() + 32 * j;
        const long long at = token * experts + expert;
        p[j] = expert < experts ? probabilities[at] : wide(0);
        dp[j] = dprobabilities && expert < experts ? dprobabilities[at] : wide(0);
        inner += p[j] * dp[j];
    }
    const wide shift = (dlse ? dlse[token] : wide(0)) - warp_sum(inner);
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) dp[j] = p[j] * (dp[j] + shift);
    const bool has_choice = lane() < count;
    const wide weight = has_choice ? weights[token * count + lane()] : wide(0);
    const wide dweight = has_choice ? dweights[token * count + lane()] : wide(0);
    const int mine = has_choice ? int(chosen[token * count + lane()]) : -1;
    const wide dchosen = weight * (dweight - warp_sum(weight * dweight));
    for (int i = 0; i < count; ++i) {
        const int expert = __shfl_sync(full, mine, i);
        const wide share = __shfl_sync(full, dchosen, i);
#pragma unroll
        for (int j = 0; j < LANE_EXPERTS; ++j)
            if (lane() + 32 * j == expert) dp[j] += share;
    }
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j)
        if (lane() + 32 * j < experts) dlogits[token * experts + lane() + 32 * j] = dp[j];
}
