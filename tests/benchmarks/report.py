#!/usr/bin/env python3
"""Prints the table of tests/benchmarks/run.sh from its JSON lines: medians over rounds, ratios, the limit."""
import json, statistics, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
for r in rows:
    if "recipe" in r:
        r["shape"] = "small" if "small" in r["recipe"] else "gpt2"
# FLOPs of a token over the measured matrix rate: what no engine can pass without doing less.
names = {"gpt2": "GPT-2 124M, 4 x 256", "small": "6 layers of 384, 16 x 256"}
bars = {("gpt2", "eager"): 1.2, ("gpt2", "best"): 1.1, ("small", "eager"): 1.35, ("small", "best"): 1.25}
for shape in ("gpt2", "small"):
    mine = [r for r in rows if r["shape"] == shape and r["engine"].startswith("capstan")]
    if not mine:
        continue
    speed = statistics.median(r["tokens_per_s"] for r in mine)
    limit = statistics.median(r["gemm_flops"] / (r["flops"] / r["tokens_per_s"]) for r in mine)
    print(f"\n{names[shape]}: limit (all FLOPs at the measured matrix rate) {limit:.0f} tokens/s")
    print(f"  {'engine':<34}{'tokens/s':>10}{'spread':>18}{'peak MiB':>10}{'ratio':>8}{'bar':>6}")
    def line(name, rs, ratio="", bar=""):
        v = [r["tokens_per_s"] for r in rs]
        print(f"  {name:<34}{statistics.median(v):>10.0f}{min(v):>9.0f}-{max(v):<8.0f}{max(r['peak_rss_mib'] for r in rs):>10}{ratio:>8}{bar:>6}")
    line(mine[0]["engine"] + f" ({100 * speed / limit:.0f}% of the limit)", mine)
    for form in ("eager", "best"):
        peer = [r for r in rows if r["shape"] == shape and r["engine"].startswith("pytorch") and r["engine"].endswith(form)]
        ratio = speed / statistics.median(r["tokens_per_s"] for r in peer)
        line(peer[0]["engine"], peer, f"{ratio:.2f}x", f"{bars[(shape, form)]:.2f}")
