#!/usr/bin/env python3
"""PyTorch's side of `capstan bench gpu`: the training step of a recipe's model, compiled, on a GPU. Prints one JSON line.

  --recipe JSON   the resolved recipe, as `capstan bench RECIPE --json` prints it under recipe_options
As Capstan keeps them: bf16 weights, activations and residual stream, f32 master weights and optimizer state. Attention runs in
PyTorch's fused kernels, AdamW fused.
"""
import argparse, json, statistics, time
import torch, torch.nn as nn, torch.nn.functional as F


class RotaryTable(nn.Module):
    def __init__(self, length, size, theta):
        super().__init__()
        angle = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, size, 2).float() / size))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x):  # [batch, heads, length, size]
        a, b = x.float().chunk(2, -1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def norm(m):
    if m["norm"] == "layer":
        return nn.LayerNorm(m["width"], m["norm_epsilon"], bias=m["bias"])
    return nn.RMSNorm(m["width"], m["norm_epsilon"])


class Block(nn.Module):
    def __init__(self, m, index):
        super().__init__()
        width, self.heads = m["width"], m["heads"]
        self.kv_heads = m["kv_heads"] or self.heads
        self.size = m["head_size"] or width // self.heads
        every = m.get("global_every") or 0
        self.window = 0 if every and (index + 1) % every == 0 else m.get("window") or 0
        ffn = m["ffn"] or (4 * width if m["activation"] == "gelu" else (8 * width // 3 + 63) // 64 * 64)
        self.gated = m["activation"] == "swiglu"
        self.norm1, self.norm2 = norm(m), norm(m)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=m["bias"])
        self.out = nn.Linear(self.heads * self.size, width, bias=m["bias"])
        self.up = nn.Linear(width, ffn * (2 if self.gated else 1), bias=m["bias"])
        self.down = nn.Linear(ffn, width, bias=m["bias"])
        self.q_norm = nn.RMSNorm(self.size, m["norm_epsilon"]) if m["qk_norm"] else None
        self.k_norm = nn.RMSNorm(self.size, m["norm_epsilon"]) if m["qk_norm"] else None

    def forward(self, x, rope, band):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).split([n * self.size for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
        q, k, v = (t.view(batch, length, -1, self.size).transpose(1, 2) for t in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        if self.window:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=self.kv_heads != self.heads)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        y = self.up(self.norm2(x))
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh")
        return x + self.down(y)


class Decoder(nn.Module):
    def __init__(self, m, length):
        super().__init__()
        self.tokens = nn.Embedding(m["vocabulary"], m["width"])
        self.positions = nn.Embedding(m["context"], m["width"]) if m["positions"] == "learned" else None
        self.rope = None if self.positions is not None else RotaryTable(length, m["head_size"] or m["width"] // m["heads"], m["rope_theta"])
        self.blocks = nn.ModuleList(Block(m, i) for i in range(m["layers"]))
        self.norm = norm(m)
        self.head = nn.Linear(m["width"], m["vocabulary"], bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=m["init_std"])
        if m["tied"]:
            self.head.weight = self.tokens.weight
        self.window = m.get("window") or 0

    def forward(self, tokens, targets):
        length = tokens.shape[1]
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(length, device=tokens.device))
        band = None
        if self.window:
            row = torch.arange(length, device=tokens.device)
            apart = row[:, None] - row[None, :]
            band = (apart >= 0) & (apart < self.window)
        for block in self.blocks:
            x = block(x, self.rope, band)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--recipe", required=True)
    ap.add_argument("--steps", type=int, default=10)
    ap.add_argument("--warmup", type=int, default=3)
    ap.add_argument("--device", default="cuda")
    a = ap.parse_args()
    recipe = json.loads(a.recipe)
    m, data = recipe["model"], recipe["data"]
    length, samples = data["sequence_length"], data["batch_size"]
    micro = data["micro_batch"] or samples
    bf16, clip = recipe["precision"]["compute"] == "bf16", recipe["train"]["clip"]
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("highest")
    with torch.device(a.device):
        model = Decoder(m, length)
    weights = list(model.parameters())
    masters = [p.detach().clone() for p in weights] if bf16 else weights
    if bf16:
        for p in weights:
            p.data = p.data.bfloat16()
    groups = [{"params": [p for p in masters if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    forward = torch.compile(model)
    text = torch.randint(0, m["vocabulary"], (samples, length + 1), device=a.device)
    wait = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    times = []
    for step in range(a.warmup + a.steps):
        wait()
        begin = time.perf_counter()
        for first in range(0, samples, micro):
            part = text[first:first + micro]
            loss = forward(part[:, :-1], part[:, 1:]) * (part.shape[0] / samples)
            loss.backward()
        if bf16:
            for master, p in zip(masters, weights):
                master.grad = p.grad.float()
                p.grad = None
        if clip:
            torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if bf16:
            torch._foreach_copy_([p.data for p in weights], masters)
        wait()
        if step >= a.warmup:
            times.append(time.perf_counter() - begin)
    print(json.dumps({"engine": "PyTorch " + torch.__version__, "tokens_per_s": samples * length / statistics.median(times),
                      "step_ms": 1e3 * statistics.median(times), "loss": loss.item(),
                      "peak_mib": (torch.cuda.max_memory_reserved() >> 20) if a.device == "cuda" else 0}))


if __name__ == "__main__":
    main()
