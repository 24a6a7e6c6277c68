#!/usr/bin/env python3
"""Eight steps of torch.optim's AdamW, SGD and Muon in f64; writes optimizers.json beside itself.

    python3 -m venv V && V/bin/pip install torch numpy && V/bin/python tests/reference/optimizers.py

File format: {"torch": release, "steps": 8, "seed": 11, "cases": [{"name", "plugin", "options", "parameters": [...]}]}, each
parameter {"name", "parts": [rows of each piece], "columns", "decays", "values": [final values, pieces stacked by rows]}.
columns 0 is a vector of parts[0] elements. Element i (row-major over the stacked whole) starts as normal i of stream NAME at
step 0; its gradient at step t (from 1) is normal i of stream NAME/grad at step t. The learning rate of step t is the option
lr times 1 - t / 16. Pieces of a fused matrix are parameters of their own here: Muon orthogonalizes each apart.
"""
import json, pathlib
import numpy as np, torch
from addressed_random import Rng

SEED, STEPS = 11, 8
PLAIN = [("weight", [6], 5, True), ("gain", [7], 0, False)]
MATRICES = [("tall", [9], 5, True), ("wide", [4], 11, True), ("fused", [8, 4, 4], 6, True)]
CASES = [
    ("adamw", "adamw", dict(lr=0.01, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1), PLAIN),
    ("adamw, large epsilon", "adamw", dict(lr=0.03, beta1=0.8, beta2=0.999, epsilon=0.1, weight_decay=0.5), PLAIN),
    ("sgd, plain", "sgd", dict(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0), PLAIN),
    ("sgd, momentum and decay", "sgd", dict(lr=0.05, momentum=0.9, nesterov=False, weight_decay=0.2), PLAIN),
    ("sgd, nesterov", "sgd", dict(lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1), PLAIN),
    ("muon, shape scale", "muon", dict(lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, steps=5, scale="shape"), MATRICES),
    ("muon, rms scale", "muon", dict(lr=0.01, momentum=0.9, nesterov=False, weight_decay=0.0, steps=3, scale="rms"), MATRICES),
]


def make(plugin, o, tensors, decay):
    if plugin == "adamw":
        return torch.optim.AdamW(tensors, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["epsilon"], weight_decay=decay)
    if plugin == "sgd":
        return torch.optim.SGD(tensors, lr=o["lr"], momentum=o["momentum"], nesterov=o["nesterov"], weight_decay=decay)
    scale = {"shape": "original", "rms": "match_rms_adamw"}[o["scale"]]
    return torch.optim.Muon(tensors, lr=o["lr"], momentum=o["momentum"], nesterov=o["nesterov"], weight_decay=decay,
                            ns_steps=o["steps"], adjust_lr_fn=scale)


def run(plugin, options, name, parts, columns, decays):
    rows = sum(parts)
    shape = (rows, columns) if columns else (rows,)
    whole = Rng(SEED, name).normal(rows * max(columns, 1)).reshape(shape)
    pieces = [torch.tensor(piece, requires_grad=True) for piece in np.split(whole, np.cumsum(parts)[:-1])]
    optimizer = make(plugin, options, pieces, options["weight_decay"] if decays else 0.0)
    for step in range(1, STEPS + 1):
        grad = Rng(SEED, name + "/grad", step).normal(whole.size).reshape(shape)
        for piece, g in zip(pieces, np.split(grad, np.cumsum(parts)[:-1])):
            piece.grad = torch.tensor(g)
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * (1 - step / 16)
        optimizer.step()
    return dict(name=name, parts=parts, columns=columns, decays=decays,
                values=torch.cat([p.detach() for p in pieces]).reshape(-1).tolist())


def main():
    # Muon there rounds to bf16 on its way; with that type replaced its arithmetic stays f64 and can be compared closely.
    torch.bfloat16 = torch.float64
    cases = [dict(name=name, plugin=plugin, options=options, parameters=[run(plugin, options, *p) for p in parameters])
             for name, plugin, options, parameters in CASES]
    record = dict(torch=torch.__version__, steps=STEPS, seed=SEED, cases=cases)
    (pathlib.Path(__file__).parent / "optimizers.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
