#!/usr/bin/env python3
"""Fifty AdamW steps of three small decoders in PyTorch; writes gpt2.json, llama.json and window.json beside itself.

    python3 -m venv V && V/bin/pip install torch numpy && V/bin/python tests/reference/gpt_reference.py

File format, one JSON object:
  config        what the model and the run are; all that is needed to repeat them:
    form "gpt2": LayerNorm with bias, learned positions, tanh GELU, biases on every linear layer, head tied to tokens.weight.
    form "llama": RMSNorm, RoPE (half-split, theta 10000), grouped-query attention, SwiGLU, no biases, a head of its own.
    window, global_every: a token sees this many keys (its own the last), but in every global_every-th layer; 0: all before it
    layers, heads, kv_heads, hidden, ffn, context, vocabulary, norm_epsilon, seed, init_std, batch, batches, steps, lr,
    beta1, beta2, epsilon, weight_decay, torch (the release that made the numbers)
  losses        [steps] mean cross-entropy of each step before its update, in f32
  losses_f64    the same run in f64
  first_tokens  the first eight tokens of batch 0
  first_values  {parameter: its first four values}, after initialization: to find where two sides part

Initial values are addressed randomness (addressed_random.py; Parameter::initialize): element i (row-major) of parameter
NAME is std * normal of stream NAME at index i; pieces of a fused matrix are streams NAME/q, NAME/k, NAME/v, NAME/gate,
NAME/up of their own, stacked by rows in that order. std is init_std, but init_std / sqrt(2 layers) for attention.out.weight
and mlp.down.weight. Norm weights are 1, biases 0. Rounded to f32 in both runs.

Batch number n is Rng(7, "reference/tokens", n): `batch` sequences of context + 1 tokens, row-major, each below(vocabulary);
inputs are the first `context` of a sequence, targets the last. Step s (from 0) takes batch s % batches: few batches, so that
the model learns them by heart and the losses fall far. AdamW's learning rate is constant; weights of rank 2 decay (tables and
heads too), norm weights and biases do not; no clipping, no dropout.
"""
import json, math, pathlib
import numpy as np, torch, torch.nn.functional as F
from addressed_random import Rng

COMMON = dict(layers=3, heads=4, hidden=64, context=32, vocabulary=101, norm_epsilon=1e-5, seed=20, init_std=0.02, batch=4,
              batches=4, steps=50, lr=2e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
FORMS = {"gpt2": dict(form="gpt2", kv_heads=4, ffn=256, **COMMON), "llama": dict(form="llama", kv_heads=2, ffn=168, **COMMON),
         "window": dict(form="llama", kv_heads=2, ffn=168, window=5, global_every=3, **COMMON)}


def initial_values(c):
    """{name: f32 array} in order of declaration."""
    D, C = c["hidden"] // c["heads"], c["hidden"]
    gpt2 = c["form"] == "gpt2"
    values = {}

    def matrix(name, rows, columns, std=c["init_std"], parts=None):
        pieces = [(name + "/" + part, n) for part, n in parts] if parts else [(name, rows)]
        drawn = [std * Rng(c["seed"], stream).normal(n * columns).reshape(n, columns) for stream, n in pieces]
        values[name] = np.concatenate(drawn).astype(np.float32)
        assert values[name].shape == (rows, columns)

    def linear(name, rows, columns, **more):
        matrix(name + ".weight", rows, columns, **more)
        if gpt2:
            values[name + ".bias"] = np.zeros(rows, np.float32)

    def norm(name):
        values[name + ".weight"] = np.ones(C, np.float32)
        if gpt2:
            values[name + ".bias"] = np.zeros(C, np.float32)

    residual = c["init_std"] / math.sqrt(2 * c["layers"])
    matrix("tokens.weight", c["vocabulary"], C)
    if gpt2:
        matrix("positions.weight", c["context"], C)
    for n in range(c["layers"]):
        at = f"layers.{n}."
        q, kv = c["heads"] * D, c["kv_heads"] * D
        norm(at + "attention.norm")
        linear(at + "attention.qkv", q + 2 * kv, C, parts=[("q", q), ("k", kv), ("v", kv)])
        linear(at + "attention.out", C, q, std=residual)
        norm(at + "mlp.norm")
        if gpt2:
            linear(at + "mlp.up", c["ffn"], C)
        else:
            linear(at + "mlp.gate_up", 2 * c["ffn"], C, parts=[("gate", c["ffn"]), ("up", c["ffn"])])
        linear(at + "mlp.down", C, c["ffn"], std=residual)
    norm("norm")
    if not gpt2:
        matrix("head.weight", c["vocabulary"], C)
    return values


def loss_of(c, p, tokens, targets):
    B, T = tokens.shape
    heads, kv_heads, D = c["heads"], c["kv_heads"], c["hidden"] // c["heads"]
    gpt2 = c["form"] == "gpt2"

    def linear(name, x):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def norm(name, x):
        if gpt2:
            return F.layer_norm(x, (c["hidden"],), p[name + ".weight"], p[name + ".bias"], c["norm_epsilon"])
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c["norm_epsilon"]) * p[name + ".weight"]

    def rope(x):
        frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., : D // 2], x[..., D // 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    h = p["tokens.weight"][tokens]
    if gpt2:
        h = h + p["positions.weight"][:T]
    late = torch.full((T, T), -math.inf, dtype=h.dtype).triu(1)
    early = torch.full((T, T), -math.inf, dtype=h.dtype).tril(-c.get("window", T))
    for n in range(c["layers"]):
        at = f"layers.{n}."
        q, k, v = linear(at + "attention.qkv", norm(at + "attention.norm", h)).split([heads * D, kv_heads * D, kv_heads * D], -1)
        q, k, v = (x.view(B, T, -1, D).transpose(1, 2) for x in (q, k, v))
        if not gpt2:
            q, k = rope(q), rope(k)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        local = "window" in c and (n + 1) % c["global_every"] != 0
        y = ((q @ k.transpose(-1, -2)) / math.sqrt(D) + (late + early if local else late)).softmax(-1) @ v
        h = h + linear(at + "attention.out", y.transpose(1, 2).reshape(B, T, -1))
        x = norm(at + "mlp.norm", h)
        if gpt2:
            x = F.gelu(linear(at + "mlp.up", x), approximate="tanh")
        else:
            gate, up = linear(at + "mlp.gate_up", x).chunk(2, -1)
            x = F.silu(gate) * up
        h = h + linear(at + "mlp.down", x)
    logits = F.linear(norm("norm", h), p["tokens.weight" if gpt2 else "head.weight"])
    return F.cross_entropy(logits.view(B * T, -1), targets.reshape(-1))


def tokens_of(c, n):
    shape = (c["batch"], c["context"] + 1)
    return torch.from_numpy(Rng(7, "reference/tokens", n).below(shape[0] * shape[1], c["vocabulary"]).reshape(shape))


def train(c, dtype):
    p = {name: torch.tensor(v).to(dtype).requires_grad_() for name, v in initial_values(c).items()}
    groups = [dict(params=[v for v in p.values() if v.dim() >= 2], weight_decay=c["weight_decay"]),
              dict(params=[v for v in p.values() if v.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=c["lr"], betas=(c["beta1"], c["beta2"]), eps=c["epsilon"])
    batches = [tokens_of(c, n) for n in range(c["batches"])]
    losses = []
    for step in range(c["steps"]):
        batch = batches[step % c["batches"]]
        loss = loss_of(c, p, batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    folder = pathlib.Path(__file__).parent
    for name, config in FORMS.items():
        config = dict(config, torch=torch.__version__)
        f32, f64 = train(config, torch.float32), train(config, torch.float64)
        values = initial_values(config)
        record = dict(config=config, losses=f32, losses_f64=f64, first_tokens=tokens_of(config, 0).reshape(-1)[:8].tolist(),
                      first_values={k: [float(x) for x in v.reshape(-1)[:4]] for k, v in values.items()})
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        apart = max(abs(a - b) / b for a, b in zip(f32, f64))
        print(f"{name}: loss {f32[0]:.6f} -> {f32[-1]:.6f}; f32 and f64 differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
