"""Compares two runs' metrics.jsonl: `compare.py same|near A B`. same: losses and norms equal in every digit; near: the loss of
each step within a bound that grows with the step (rounding drifts apart), and of the first to 1e-3 of itself."""
import json
import sys


def rows(folder):
    with open(folder + "/metrics.jsonl") as file:
        return [json.loads(line) for line in file if '"loss"' in line]


def main():
    mode, a, b = sys.argv[1], rows(sys.argv[2]), rows(sys.argv[3])
    keys = [k for k in ("loss", "grad_norm", "gradient_norm", "validation_loss") if k in a[0] or any(k in r for r in a)]
    if len(a) != len(b) or not a:
        sys.exit(f"{len(a)} and {len(b)} lines")
    worst = 0.0
    for x, y in zip(a, b):
        for k in keys:
            if k not in x:
                continue
            if mode == "same":
                if x[k] != y[k]:
                    sys.exit(f"step {x.get('step')}: {k} {x[k]!r} and {y[k]!r}")
            elif k == "loss":
                error = abs(x[k] - y[k]) / abs(x[k])
                bound = 1e-3 if x is a[0] else 3e-2
                worst = max(worst, error)
                if not error <= bound:
                    sys.exit(f"step {x.get('step')}: loss {x[k]} and {y[k]}, relative difference {error:.2e} over {bound}")
    print(f"{len(a)} lines, " + ("equal in every digit" if mode == "same" else f"largest relative difference of the loss {worst:.1e}, last losses {a[-1]['loss']:.4f} and {b[-1]['loss']:.4f}"))


main()
