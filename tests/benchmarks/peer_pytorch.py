#!/usr/bin/env python3
"""The peer of tests/benchmarks/run.sh: the same GPT-2 training step in PyTorch on the CPU.

Prints one JSON line: tokens/s (median), peak resident memory, milliseconds per phase.
  --form eager   attention written out as nanoGPT does without flash, no compile, AdamW as installed
  --form best    fused attention (scaled_dot_product_attention), torch.compile, fused AdamW;
                 run it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
"""
import argparse, json, math, resource, statistics, sys, time
import torch, torch.nn as nn, torch.nn.functional as F

SHAPES = {  # layers, heads, width, vocabulary, context, batch
    "gpt2": (12, 12, 768, 50257, 256, 4),
    "small": (6, 6, 384, 256, 256, 16),
}

class Block(nn.Module):
    def __init__(self, width, heads, fused):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.fused = heads, fused

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            s = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            y = F.softmax(s.masked_fill(~mask, float("-inf")), dim=-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))

class GPT(nn.Module):
    def __init__(self, layers, heads, width, vocab, context, fused):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, fused) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tok.weight
        nn.init.normal_(self.tok.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--shape", choices=SHAPES, default="gpt2")
    ap.add_argument("--form", choices=["eager", "best"], default="eager")
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    L, H, C, V, T, B = SHAPES[a.shape]
    best = a.form == "best"
    model = GPT(L, H, C, V, T, best)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True if best else None)
    forward = torch.compile(model) if best else model
    tokens = torch.randint(0, V, (B, T + 1))
    times, phases = [], []
    for step in range(a.steps + 2):
        t0 = time.perf_counter()
        loss = forward(tokens[:, :-1], tokens[:, 1:].contiguous())
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        opt.step(); opt.zero_grad(set_to_none=True)
        t3 = time.perf_counter()
        if step >= 2:
            times.append(t3 - t0); phases.append((t1 - t0, t2 - t1, t3 - t2))
    print(json.dumps({
        "engine": f"pytorch {torch.__version__} {a.form}", "shape": a.shape, "threads": a.threads,
        "tokens_per_s": round(B * T / statistics.median(times), 1),
        "best_tokens_per_s": round(B * T / min(times), 1),
        "forward_ms": round(1e3 * statistics.median(p[0] for p in phases), 1),
        "backward_ms": round(1e3 * statistics.median(p[1] for p in phases), 1),
        "optimizer_ms": round(1e3 * statistics.median(p[2] for p in phases), 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "loss": round(loss.item(), 4)}))

if __name__ == "__main__":
    sys.exit(main())
