"""PyTorch's side of the step benchmark: GPT-2 of Hugging Face transformers, the same step. Started by workers.Worker.

PyTorch at its best on one CPU thread: the faster of its two attentions, fused AdamW where there is one, gradients set to None.
"""

import json
import os
import sys
import time

from shapes import BETAS, CLIP, EPSILON, RATE, SHAPES, WEIGHT_DECAY, RandomTokens
from workers import PRODUCT, serve, timed_turn

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # nothing is fetched: weights are random
ATTENTIONS = ("eager", "sdpa")


class Steps:
    """Optimizer steps one after another."""

    def __init__(self, spec):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        torch.manual_seed(1)
        self.shape = shape = SHAPES[spec["shape"]]
        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
            attn_implementation=ATTENTIONS[0]))
        self.model.train()
        self.optimizer, self.kind = self._optimizer(torch)
        self.source, self.done = RandomTokens(shape), 0

    def _optimizer(self, torch):
        parameters = list(self.model.parameters())
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                  {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
        for kind in ("fused", "foreach"):
            try:
                return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, **{kind: True}), kind
            except RuntimeError:
                if kind == "foreach":
                    raise

    def step(self):
        """One optimizer step; the loss."""
        import torch
        import torch.nn.functional as F
        tokens, targets, _ = self.source.samples(self.done * self.shape.batch, self.shape.batch)
        self.done += 1
        logits = self.model(torch.from_numpy(tokens.astype("int64")), use_cache=False).logits           # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, self.shape.vocabulary), torch.from_numpy(targets.astype("int64")).reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def trial(self, warmup, times=2):
        """CPU seconds of the fastest step with each attention, after a warm-up; the faster attention stays."""
        found = {name: float("inf") for name in ATTENTIONS}
        for turn in range(warmup + times):
            for name in ATTENTIONS:
                self.model.set_attn_implementation(name)
                started = time.process_time()
                self.step()
                if turn >= warmup:
                    found[name] = min(found[name], time.process_time() - started)
        self.model.set_attn_implementation(min(found, key=found.get))
        return found


def main(spec, path):
    import platform

    import torch
    import transformers
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    steps = Steps(spec)
    a, out = torch.rand(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
    seconds = steps.trial(spec["warmup"])
    info = {"rank": 0, "attention": min(seconds, key=seconds.get), "trial_seconds": seconds, "optimizer": f"AdamW {steps.kind}",
            "parameters": sum(p.numel() for p in steps.model.parameters()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                         "cpu_capability": torch.backends.cpu.get_cpu_capability()}}
    serve(path, info, {"step": lambda: timed_turn(steps.step, lambda: torch.mm(a, a, out=out))})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
