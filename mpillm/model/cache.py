"""Keys and values of the tokens already seen, so that generating a token costs one token."""


class Cache:
    """Keys and values of one block for a batch of sequences of equal length.

    Parameters
    ----------
    ops : backend
    batch_size, longest, kv_heads, head_width : int
    """

    def __init__(self, ops, batch_size, longest, kv_heads, head_width, dtype):
        shape = (batch_size, longest, kv_heads, head_width)
        self.ops, self.length = ops, 0
        self.keys, self.values = ops.empty(shape, dtype), ops.empty(shape, dtype)

    def extend(self, k, v):
        """Adds (B, T, K, D) keys and values; returns all of them so far, (B, S, K, D)."""
        end = self.length + k.shape[1]
        self.ops.copy(self.keys[:, self.length:end], k)
        self.ops.copy(self.values[:, self.length:end], v)
        self.length = end
        return self.keys[:, :end], self.values[:, :end]
