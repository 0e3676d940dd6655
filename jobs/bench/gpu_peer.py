"""GPT-2 124M and a Llama of 1.2B, ours and PyTorch's, by turns on one GPU: tokens/s of whole steps with optimizer.

    python jobs/bench/gpu_peer.py [--model gpt2 | llama] [--rounds N] [--batch B] [--out FILE.json]

Peers: a model written here in plain PyTorch, compiled (torch.compile), with scaled_dot_product_attention; and Hugging Face's
model. Both train as one would: bfloat16 autocast over float32 weights, fused AdamW, gradient clipping. Ours: bfloat16 with float32
masters. All read batches of random tokens of the same shape; every side takes STEPS steps in its turn of a round.
"""

import argparse
import gc
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from gpu_record import about, save, table

STEPS = 4       # of a turn
BATCH = {"gpt2": 32, "llama": 4}


class Block(nn.Module):
    """A pre-norm block of GPT-2, or of Llama with rotary positions, RMSNorm, SwiGLU and grouped heads."""

    def __init__(self, width, heads, kv_heads, mlp_width, llama):
        super().__init__()
        self.heads, self.kv_heads, self.d, self.llama = heads, kv_heads, width // heads, llama
        norm = (lambda: nn.RMSNorm(width, eps=1e-5)) if llama else (lambda: nn.LayerNorm(width))
        self.norm1, self.norm2, bias = norm(), norm(), not llama
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.d, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, (2 if llama else 1) * mlp_width, bias=bias)
        self.down = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x, turn):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, -1, self.d).transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.llama:
            q, k = turn(q), turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        hidden = self.up(self.norm2(x))
        if self.llama:
            gate, up = hidden.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(hidden, approximate="tanh"))


class Model(nn.Module):
    def __init__(self, layers, width, heads, kv_heads, mlp_width, context, vocabulary, llama):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = None if llama else nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, mlp_width, llama) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5) if llama else nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, x):
        first, second = x.float().chunk(2, -1)
        cos, sin = self.cos[:x.shape[2]], self.sin[:x.shape[2]]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)

    def forward(self, ids, targets):
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, self.turn)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class HuggingFace(nn.Module):
    def __init__(self, kind):
        super().__init__()
        import transformers
        if kind == "gpt2":
            config = transformers.GPT2Config(attn_implementation="sdpa", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
            self.model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                              num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True, use_cache=False,
                                              attn_implementation="sdpa")
            self.model = transformers.LlamaForCausalLM(config)

    def forward(self, ids, targets):
        logits = self.model(input_ids=ids).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Peer:
    """A model in training."""

    def __init__(self, model, batch, context, vocabulary, compiled):
        self.model, self.tokens = model.cuda(), batch * context
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.ids = torch.randint(vocabulary, (batch, context + 1), device="cuda")

    def step(self):
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.forward(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def turn(self, steps):
        started = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        loss.item()
        torch.cuda.synchronize()
        return self.tokens * steps / (time.perf_counter() - started)


class Ours:
    def __init__(self, kind, batch):
        from gpu_step import GPT2, LLAMA, Case, Steps
        model = GPT2 if kind == "gpt2" else LLAMA | {"heads": 32, "kv_heads": 8}
        self.steps = Steps(Case(model, batch, 1))

    def turn(self, steps):
        started = time.perf_counter()
        for _ in range(steps):
            self.steps.step()
        self.steps.ops.synchronize()
        return self.steps.tokens * steps / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="sequences a step; fewer where the GPU has no room for all sides")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    kind, batch = arguments.model, arguments.batch or BATCH[arguments.model]
    sizes = (12, 768, 12, 12, 3072, 1024, 50257, False) if kind == "gpt2" else (16, 2048, 32, 8, 8192, 2048, 128256, True)
    sides, no_room = {"mpillm": Ours(kind, batch)}, []
    sides["mpillm"].turn(4)     # takes its memory before the others do
    for name, make, compiled in (("PyTorch, compiled", lambda: Model(*sizes), True), ("Hugging Face", lambda: HuggingFace(kind), False)):
        torch.manual_seed(1)
        peer = None
        try:
            peer = Peer(make(), batch, sizes[5], sizes[6], compiled)
            peer.turn(3)        # compiles
            sides[name] = peer
        except torch.OutOfMemoryError:      # all sides are on the GPU at a time
            no_room.append(name)
            del peer
            gc.collect()
            torch.cuda.empty_cache()
    found = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            found[name].append(side.turn(STEPS))
    ours = found["mpillm"]
    rows = [{"side": name, "tokens/s": statistics.median(rates), "least": min(rates), "most": max(rates),
             "ours to this": statistics.median(a / b for a, b in zip(ours, rates))} for name, rates in found.items()]
    print(table(rows))
    if no_room:
        print(f"no room beside the others: {', '.join(no_room)}")
    save(arguments.out, about(sides["mpillm"].steps.ops) | {"torch": torch.__version__, "model": kind, "batch": batch, "rows": rows, "no_room": no_room, "tokens_per_second": found})


if __name__ == "__main__":
    main()
