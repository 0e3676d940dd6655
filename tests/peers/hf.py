"""Models of Hugging Face transformers beside mpillm's: same shape, same weights, gradients under mpillm's names.

The peer computes its loss, RMSNorm, rotary angles, softmax and router in float32 whatever the type of its weights; `use_float64_forms`
replaces those by forms that keep the type, without changing the mathematics.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2 import modeling_qwen2
from transformers.pytorch_utils import Conv1D

from mpillm.backend import open_backend
from mpillm.config import job_from_dict
from mpillm.model.shape import Shape
from mpillm.model.transformer import Transformer

torch.set_num_threads(1)


class Place(NamedTuple):
    """Where a layer of mpillm is in the peer."""
    module: str             # {} = number of the block
    array: str = ""         # name of the array where it is not that of mpillm's parameter
    parts: int = 1          # matrices that are one in the peer, below each other
    part: int = 0           # which of them it is


GPT = {
    "embedding.tokens": Place("transformer.wte"),
    "embedding.positions": Place("transformer.wpe"),
    "blocks.{}.attention_norm": Place("transformer.h.{}.ln_1"),
    "blocks.{}.attention.query": Place("transformer.h.{}.attn.c_attn", parts=3, part=0),
    "blocks.{}.attention.key": Place("transformer.h.{}.attn.c_attn", parts=3, part=1),
    "blocks.{}.attention.value": Place("transformer.h.{}.attn.c_attn", parts=3, part=2),
    "blocks.{}.attention.output": Place("transformer.h.{}.attn.c_proj"),
    "blocks.{}.mlp_norm": Place("transformer.h.{}.ln_2"),
    "blocks.{}.mlp.up": Place("transformer.h.{}.mlp.c_fc"),
    "blocks.{}.mlp.down": Place("transformer.h.{}.mlp.c_proj"),
    "norm": Place("transformer.ln_f"),
    "head": Place("lm_head"),
}
LLAMA = {
    "embedding.tokens": Place("model.embed_tokens"),
    "blocks.{}.attention_norm": Place("model.layers.{}.input_layernorm"),
    "blocks.{}.attention.query": Place("model.layers.{}.self_attn.q_proj"),
    "blocks.{}.attention.key": Place("model.layers.{}.self_attn.k_proj"),
    "blocks.{}.attention.value": Place("model.layers.{}.self_attn.v_proj"),
    "blocks.{}.attention.output": Place("model.layers.{}.self_attn.o_proj"),
    "blocks.{}.mlp_norm": Place("model.layers.{}.post_attention_layernorm"),
    "blocks.{}.mlp.gate": Place("model.layers.{}.mlp.gate_proj"),
    "blocks.{}.mlp.up": Place("model.layers.{}.mlp.up_proj"),
    "blocks.{}.mlp.down": Place("model.layers.{}.mlp.down_proj"),
    "norm": Place("model.norm"),
    "head": Place("lm_head"),
}
MIXTRAL = LLAMA | {
    "blocks.{}.mlp.router": Place("model.layers.{}.mlp.gate"),
    "blocks.{}.mlp.gate": Place("model.layers.{}.mlp.experts", "gate_up_proj", 2, 0),
    "blocks.{}.mlp.up": Place("model.layers.{}.mlp.experts", "gate_up_proj", 2, 1),
    "blocks.{}.mlp.down": Place("model.layers.{}.mlp.experts", "down_proj"),
}
MAPS = {"gpt": GPT, "llama": LLAMA, "mixtral": MIXTRAL, "qwen2": LLAMA}


def kind_of(shape):
    """The key of `MAPS`: a llama with experts is a Mixtral, one with biases a Qwen 2."""
    return "mixtral" if shape.experts else "qwen2" if shape.qkv_bias else shape.family


def make_job(model, compute, train=None, optimizer=None):
    """The Job of a [model] section, without data."""
    return job_from_dict({"model": model, "data": {"train": "random"}, "train": {"steps": 1, "batch": 1} | (train or {}),
                          "optimizer": optimizer or {}, "precision": {"compute": compute}, "run": {"name": "peer"}}, "peer job")


def make_model(job, ops=None):
    """mpillm's model of a job on this process alone, weights not yet set."""
    shape = Shape.of(job.model, None)
    model = Transformer(ops or open_backend("cpu"), shape, np.dtype(job.precision.compute), job.train.seed)
    model.place()
    return model


def make_peer(shape, dtype, std=0.2, seed=0):
    """The peer of a Shape with random weights: N(0, std^2), around 1 for the weights of norms."""
    peer = {"gpt": gpt_peer, "llama": llama_peer, "mixtral": mixtral_peer, "qwen2": qwen2_peer}[kind_of(shape)](shape).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * std
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(noise + is_norm)
    return peer


def gpt_peer(shape):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        n_inner=shape.mlp_width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=shape.norm_epsilon,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=shape.tied, attn_implementation="eager"))


def llama_sizes(shape):
    """What the configurations of Llama and Mixtral have in common."""
    return dict(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp_width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_width,
        max_position_embeddings=shape.context, rms_norm_eps=shape.norm_epsilon, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=shape.tied, rope_parameters=rope_parameters(shape), attn_implementation="eager")


def rope_parameters(shape):
    scaling, parameters = shape.rope_scaling, {"rope_type": "default", "rope_theta": shape.rope_base}
    if scaling is None:
        return parameters
    parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor,
                       "original_max_position_embeddings": scaling.original_context}
    return parameters


def llama_peer(shape):
    return LlamaForCausalLM(LlamaConfig(**llama_sizes(shape)))


def qwen2_peer(shape):
    return Qwen2ForCausalLM(Qwen2Config(**llama_sizes(shape)))


def mixtral_peer(shape):
    return MixtralForCausalLM(MixtralConfig(
        **llama_sizes(shape), num_local_experts=shape.experts, num_experts_per_tok=shape.experts_per_token, experts_implementation="eager"))


def peer_array(peer, kind, name, grad=False):
    """The peer's value or gradient of mpillm's parameter `name`, in mpillm's layout (out, in).

    A view, except that a gradient PyTorch never made is zeros.
    """
    layer, own_name = name.rsplit(".", 1)
    parts = layer.split(".")
    number = parts[1] if parts[0] == "blocks" else ""
    if number:
        parts[1] = "{}"
    place = MAPS[kind][".".join(parts)]
    module = peer.get_submodule(place.module.format(number))
    tensor = getattr(module, place.array or own_name)
    if grad:
        tensor = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    if isinstance(module, Conv1D) and own_name == "weight":
        tensor = tensor.T
    return tensor.chunk(place.parts, dim=max(0, tensor.ndim - 2))[place.part].detach().numpy()


def copy_weights(peer, model):
    """Gives mpillm's model the weights of its peer; every element of the peer must find a place."""
    for parameter in model.parameters():
        parameter.value[...] = peer_array(peer, kind_of(model.shape), parameter.name)
    assert sum(parameter.value.size for parameter in model.parameters()) == sum(p.numel() for p in peer.parameters())


def peer_forward(peer, tokens, targets, weights, num_items=None):
    """The peer's logits (B, T, V) and loss: the mean over targets of weight 1, or their sum / num_items."""
    labels = torch.from_numpy(np.where(weights > 0, targets, -100).astype(np.int64))
    out = peer(torch.from_numpy(tokens.astype(np.int64)), labels=labels, shift_labels=labels, num_items_in_batch=num_items, use_cache=False)
    return out.logits, out.loss


# ---- the peer's float32 pieces, in the type of their input --------------------------------------------------------------


def use_float64_forms(monkeypatch, peer):
    """Until the test ends."""
    for module, name in ((modeling_llama, "Llama"), (modeling_mixtral, "Mixtral"), (modeling_qwen2, "Qwen2")):
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", rms_norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", rotary)
        monkeypatch.setattr(module, "eager_attention_forward", eager_attention)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", router)
    peer.loss_function = causal_loss


def rms_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@torch.no_grad()
def rotary(self, x, position_ids):
    width, parameters = self.config.head_dim, self.config.rope_parameters
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=x.dtype) / width)
    if parameters["rope_type"] != "default":        # the peer's own factors, which it rounds to float32
        frequencies = frequencies * scaling_of(self, frequencies)
    angles = position_ids[..., None].to(x.dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def scaling_of(rotary, frequencies):
    """How much slower than the plain ones the peer's frequencies are: exact where that is 1 or 1/factor, else as it has them."""
    share, exact = rotary.inv_freq.to(frequencies.dtype) / frequencies, torch.ones_like(frequencies)
    slow = 1 / rotary.config.rope_parameters["factor"]
    return torch.where((share - 1).abs() < 1e-6, exact, torch.where((share / slow - 1).abs() < 1e-6, exact * slow, share))


def router(self, x):
    logits = F.linear(x, self.weight)
    weights, chosen = torch.topk(F.softmax(logits, dim=-1), self.top_k, dim=-1)
    return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


def eager_attention(module, query, key, value, attention_mask, scaling, **_):
    key, value = [modeling_llama.repeat_kv(x, module.num_key_value_groups) for x in (key, value)]
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def causal_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    loss = F.cross_entropy(logits.view(-1, vocab_size), shift_labels.view(-1), ignore_index=-100, reduction="sum")
    return loss / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


# ---- differences -----------------------------------------------------------------------------------------------------------


def difference(a, b, floor=0.0):
    """max|a - b| / max(max|b|, floor)"""
    a, b = np.asarray(a), np.asarray(b)
    worst, scale = np.abs(a - b).max(), max(np.abs(b).max(), floor)
    assert np.isfinite(worst)
    return float(worst / scale) if scale else float(worst)


def gradient_differences(model, peer, num_tokens):
    """Relative difference (DESIGN.md section 8) of every gradient, by name, after sequences of `num_tokens` tokens.

    The true gradient of a gpt key bias is 0, and of all queries and keys where a sequence is one token: what is there is the
    rounding of sums that cancel. In float32 that is more than 1e-6 of the largest gradient, so it is measured against the value's.
    """
    kind = kind_of(model.shape)
    theirs = {parameter.name: peer_array(peer, kind, parameter.name, grad=True) for parameter in model.parameters()}
    floor = 1e-6 * max(np.abs(grad).max() for grad in theirs.values())
    found = {}
    for parameter in model.parameters():
        name, least = parameter.name, floor
        is_zero = (kind == "gpt" and name.endswith("key.bias")) or (num_tokens == 1 and (".query." in name or ".key." in name))
        if is_zero and model.dtype == np.float32:
            least = np.abs(theirs[name.replace("key", "value").replace("query", "value")]).max()
        found[name] = difference(parameter.grad, theirs[name], least)
    return found
