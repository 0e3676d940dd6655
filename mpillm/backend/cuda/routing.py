"""Routing of a mixture of experts on the GPU; `reference.Reference` defines the operations."""

import numpy as np

WARPS = 8           # of a block, a token each
MOST_CHOSEN = 32    # experts of a token: a lane of the warp keeps each


class RoutingOps:
    def route(self, logits, k):
        tokens, experts = logits.shape
        if k > MOST_CHOSEN:
            raise ValueError(f"{k} experts of a token; the kernels of the GPU take at most {MOST_CHOSEN}")
        chosen, weights = self.device.empty((tokens, k), np.int64), self.device.empty((tokens, k), logits.dtype)
        probabilities, lse = self.device.empty((tokens, experts), logits.dtype), self.device.empty((tokens,), logits.dtype)
        self._route("route", tokens, experts, logits.dtype, (chosen, weights, probabilities, lse, logits), k)
        return chosen, weights, probabilities, lse

    def route_backward(self, dweights, dprobabilities, dlse, experts, weights, probabilities):
        dlogits = self.device.empty(probabilities.shape, probabilities.dtype)
        arrays = dlogits, dweights, dprobabilities, dlse, experts, weights, probabilities
        self._route("route_backward", *probabilities.shape, probabilities.dtype, arrays, experts.shape[1])
        return dlogits

    def _route(self, kernel, tokens, experts, dtype, arrays, k):
        if tokens:
            args = *arrays, tokens, experts, k
            self.device.launch("routing", kernel, dtype, -(-tokens // WARPS), 32 * WARPS, args, LANE_EXPERTS=-(-experts // 32))
