#!/usr/bin/env python3
"""The training steps of `make bench-train` in PyTorch, in turn with ours: tokens per second of a whole step
(forward, backward, clipping, AdamW) and the peak of memory, each in a process of its own, and the ratios.

    make build/bench-train; tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/bench_torch.py [--only 150m] [--steps 3]

PyTorch has the network of transformers' LlamaForCausalLM written for speed (one product for q, k and v, one
for gate and up, fused RMSNorm, scaled_dot_product_attention, AdamW(fused=True)), weights in fp32 and bf16
through autocast, with and without torch.compile, on the same threads. Ratios are to the better of the two."""
import argparse
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEQUENCE = 1024
SHAPES = {  # layers, width, heads, kv_heads, ffn, vocabulary, theta, samples: as tests/bench_train/main.c
    "10m": (12, 256, 8, 4, 832, 256, 1e4, 4),
    "150m": (13, 1024, 16, 4, 2816, 256, 1e5, 4),
    "1b4": (4, 2048, 32, 8, 8192, 128256, 5e5, 1),
}


def build(name):
    import torch
    from torch import nn
    from torch.nn import functional as F
    layers, C, H, KV, ffn, V, theta, samples = SHAPES[name]
    D = C // H
    angles = torch.outer(torch.arange(SEQUENCE), theta ** (-torch.arange(0, D, 2) / D))
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def rotate(x):
        half = torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1)
        return (x * cos + half * sin).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
            self.qkv, self.o = nn.Linear(C, (H + 2 * KV) * D, bias=False), nn.Linear(C, C, bias=False)
            self.gate_up, self.down = nn.Linear(C, 2 * ffn, bias=False), nn.Linear(ffn, C, bias=False)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(B, T, H + 2 * KV, D).transpose(1, 2).split([H, KV, KV], 1)
            a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
            x = x + self.o(a.transpose(1, 2).reshape(B, T, C))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(V, C)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.norm, self.head = nn.RMSNorm(C, eps=1e-5), nn.Linear(C, V, bias=False)
            self.head.weight = self.embedding.weight
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens, targets):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = layer(x)
            return F.cross_entropy(self.head(self.norm(x)).float().view(-1, V), targets.reshape(-1))

    return Network(), samples, V


def worker(name, precision, compiled, core, steps):
    """One warm step and `steps` that count; a line of JSON."""
    import torch
    now = time.process_time if core else time.monotonic
    torch.set_num_threads(1 if core else len(os.sched_getaffinity(0)))
    torch.manual_seed(1)
    network, samples, vocabulary = build(name)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(network) if compiled else network
    tokens = torch.randint(0, vocabulary, (samples, SEQUENCE + 1))
    seconds = []
    for i in range(steps + (2 if compiled else 1)):
        begin = now()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())
        seconds.append(now() - begin)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(dict(torch=torch.__version__, tokens_per_s=samples * SEQUENCE / min(seconds[-steps:]),
                          peak_bytes=peak, seconds=seconds)))


def output(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT)
    return json.loads(done.stdout) if done.returncode == 0 else None


def run_case(name, precision, args):
    """The best of each side's turns."""
    core, steps = ["--core"] if args.core else [], str(args.steps)
    here = [sys.executable, __file__, "--worker", name, precision]
    sides = {
        "ours": [args.bench, "--only", f"{name}.{precision}", "--steps", steps, "--json", "-"] + core,
        "eager": here + ["eager", str(len(core)), steps],
        "compile": here + ["compile", str(len(core)), steps],
    }
    found = {}
    for _ in range(args.turns):
        for side in sides:
            if side in ("eager", "compile") and side in args.without:
                continue
            result = output(sides[side])
            if result is None:
                print(f"{name}.{precision}: {side} failed", file=sys.stderr)
                continue
            result = result[0] if isinstance(result, list) else result
            if side not in found or result["tokens_per_s"] > found[side]["tokens_per_s"]:
                found[side] = result
    return found


def main():
    if len(sys.argv) == 7 and sys.argv[1] == "--worker":
        name, precision, how, core, steps = sys.argv[2:]
        return worker(name, precision, how == "compile", core == "1", int(steps))
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases that begin so, as 150m or 150m.bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--without", default="", help="eager or compile: leave that out")
    parser.add_argument("--core", action="store_true",
                        help="on one core, by the seconds that it worked: for a busy machine")
    parser.add_argument("--bench", default="build/bench-train")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    print(f"{'case':10} {'ours':>8} {'eager':>8} {'compile':>8} tokens/s  {'ratio':>6}   "
          f"{'ours':>6} {'eager':>6} {'compile':>7} GB peak")
    for name in SHAPES:
        for precision in ("fp32", "bf16"):
            if not f"{name}.{precision}".startswith(args.only):
                continue
            found = run_case(name, precision, args)
            rate = {side: found.get(side, {}).get("tokens_per_s", math.nan)
                    for side in ("ours", "eager", "compile")}
            peak = {side: found.get(side, {}).get("peak_bytes", math.nan) / 1e9 for side in rate}
            best = max((r for side, r in rate.items() if side != "ours" and r == r), default=math.nan)
            print(f"{name + '.' + precision:10} {rate['ours']:8.0f} {rate['eager']:8.0f} "
                  f"{rate['compile']:8.0f}           {rate['ours'] / best:6.2f}   {peak['ours']:6.2f} "
                  f"{peak['eager']:6.2f} {peak['compile']:7.2f}", flush=True)
            rows.append(dict(case=f"{name}.{precision}", ratio=rate["ours"] / best, **found))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
