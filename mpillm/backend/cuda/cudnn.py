"""Attention by cuDNN, where its Python frontend and the library are there: NVIDIA's own kernels for each generation.

One graph (plan) for each form of the arrays, built when it is first met. Its statistics are the natural logarithm of the
sum of exponentials of scaled scores: our lse.
"""

import os

Q, K, V, OUT, LSE, DOUT, DQ, DK, DV = range(1, 10)      # names of the arrays in a graph
WIDEST = 128            # of a head, whose backward every generation can do
DETERMINISTIC = True    # equal bits from run to run


def sdpa_of(device):
    """The Sdpa of a device; None where something of it is missing, or the environment says MPILLM_ATTENTION=own."""
    if os.environ.get("MPILLM_ATTENTION") == "own":
        return None
    try:
        import cudnn

        return Sdpa(device, cudnn)
    except Exception:   # no package, no library, none that fits to the other: the own kernels are always there
        return None


class Plan:
    """A graph that is ready to run.

    Parameters
    ----------
    sdpa : Sdpa
    make : callable
        Adds the operation to a graph, given a function that makes its input tensors.
    """

    def __init__(self, sdpa, make):
        cudnn = sdpa.cudnn
        self.sdpa, self.graph = sdpa, cudnn.pygraph(
            intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT, handle=sdpa.handle)
        make(self.graph)
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.size = max(1, self.graph.get_workspace_size())

    def run(self, **arrays):
        """`arrays`: device arrays by the names above, in lower case."""
        pointers = {NUMBERS[name]: array.data.ptr for name, array in arrays.items()}
        self.graph.execute(pointers, self.sdpa.device.workspace(self.size), self.sdpa.handle)


NUMBERS = {"q": Q, "k": K, "v": V, "out": OUT, "lse": LSE, "dout": DOUT, "dq": DQ, "dk": DK, "dv": DV}


def form_of(x):
    """Dims and strides (batch, head, token, channel) of a (B, T, H, D) view, in elements."""
    b, t, h, d = x.shape
    down, token, head, _ = (stride // x.itemsize for stride in x.strides)
    return (b, h, t, d), (down, head, token, 1)


class Sdpa:
    """Scaled dot product attention of 16-bit floats without dropout.

    Parameters
    ----------
    device : Device
    cudnn : module
    """

    def __init__(self, device, cudnn):
        self.device, self.cudnn, self.plans = device, cudnn, {}
        self.handle = cudnn.create_handle()
        cudnn.set_stream(handle=self.handle, stream=device.stream_pointer)
        self.types = {"float16": cudnn.data_type.HALF, "bfloat16": cudnn.data_type.BFLOAT16}

    def takes(self, q, k, causal, dropout):
        """Whether arrays of this form can go this way, forward and backward."""
        return (dropout is None and q.itemsize == 2 and q.shape[3] % 8 == 0 and q.shape[3] <= WIDEST and q.shape[1] > 1 and k.shape[1] > 1
                and (not causal or q.shape[1] == k.shape[1]))

    def forward(self, q, k, v, out, lse, scale, causal):
        """Writes out (B, T, H, D) and lse (B, H, T); False where cuDNN has no kernel, and nothing is written."""
        plan = self._plan(("forward", scale, causal, q.dtype.name, *map(form_of, (q, k, v, out))), self._forward)
        if plan is not None:
            plan.run(q=q, k=k, v=v, out=out, lse=lse)
        return plan is not None

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, scale, causal):
        """Writes dq, dk, dv; False as above."""
        views = q, k, v, out, dout, dq, dk, dv
        plan = self._plan(("backward", scale, causal, q.dtype.name, *map(form_of, views)), self._backward)
        if plan is not None:
            plan.run(q=q, k=k, v=v, out=out, dout=dout, lse=lse, dq=dq, dk=dk, dv=dv)
        return plan is not None

    def scratch(self, b, t, h, kv, d, dtype):
        """Bytes of scratch memory that causal self-attention of this form takes, where this is asked: 0 where it is not taken."""
        strides = t * (h + 2 * kv) * d, d, (h + 2 * kv) * d, 1
        views = [((b, heads, t, d), strides) for heads in (h, kv, kv)]
        whole = (b, h, t, d), (t * h * d, d, h * d, 1)
        scale = float(d ** -0.5)
        plans = (self._plan(("forward", scale, True, dtype, *views, whole), self._forward),
                 self._plan(("backward", scale, True, dtype, *views, whole, whole, *views), self._backward))
        return sum({plan.size for plan in plans if plan is not None})      # one buffer for each size

    def _plan(self, key, make):
        if key not in self.plans:
            _, scale, causal, dtype, *forms = key
            try:
                self.plans[key] = Plan(self, lambda graph: make(graph, scale, causal, self.types[dtype], forms))
            except self.cudnn.cudnnGraphNotSupportedError:
                self.plans[key] = None
        return self.plans[key]

    def _tensor(self, graph, number, form, dtype):
        dims, strides = form
        tensor = graph.tensor(dim=list(dims), stride=list(strides), data_type=dtype, name=f"tensor{number}")
        tensor.set_uid(number)
        return tensor

    def _output(self, tensor, number, form, dtype):
        dims, strides = form
        tensor.set_output(True).set_dim(list(dims)).set_stride(list(strides)).set_data_type(dtype)
        tensor.set_uid(number)

    def _lse_form(self, form):
        b, h, t, _ = form[0]
        return (b, h, t, 1), (h * t, t, 1, 1)

    def _forward(self, graph, scale, causal, dtype, forms):
        q, k, v = (self._tensor(graph, number, form, dtype) for number, form in zip((Q, K, V), forms))
        out, lse = graph.sdpa(q=q, k=k, v=v, generate_stats=True, attn_scale=scale, use_causal_mask=causal, name="attention")
        self._output(out, OUT, forms[3], dtype)
        self._output(lse, LSE, self._lse_form(forms[0]), self.cudnn.data_type.FLOAT)

    def _backward(self, graph, scale, causal, dtype, forms):
        q, k, v, out, dout = (self._tensor(graph, number, form, dtype) for number, form in zip((Q, K, V, OUT, DOUT), forms))
        lse = self._tensor(graph, LSE, self._lse_form(forms[0]), self.cudnn.data_type.FLOAT)
        found = graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=dout, stats=lse, attn_scale=scale, use_causal_mask=causal,
                                    use_deterministic_algorithm=DETERMINISTIC, name="attention backward")
        for tensor, number, form in zip(found, (DQ, DK, DV), forms[5:]):
            self._output(tensor, number, form, dtype)
