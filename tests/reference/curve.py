#!/usr/bin/env python3
"""The loss curve of `intellect-node train` beside PyTorch's: the same initial weights, order of samples, learning
rates, AdamW and clipping. Asked: means of 20 steps within 1 % of each other at every step after the warm-up.

    tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/curve.py --corpus CORPUS --out DIR [--steps 160] [--preset 150m]

transformers makes the network and its weights, which `train --from` begins with. PyTorch takes the batches out of the
corpus' files by what docs/protocol.md says of their order, and the learning rates out of our loss.csv. bf16 is
`--precision bf16` here and autocast over fp32 weights there. The two run side by side, on --threads threads each;
what is there already of an earlier call is not done again."""
import argparse
import csv
import json
import pathlib
import subprocess
import sys
import time

import numpy
import torch
import transformers

MASK = (1 << 64) - 1
SHAPES = {  # layers, width, heads, kv_heads, ffn, theta: the presets of proto/model.c, of bytes
    "debug": (2, 192, 6, 2, 704, 1e4),
    "10m": (12, 256, 8, 4, 832, 1e4),
    "150m": (13, 1024, 16, 4, 2816, 1e5),
}


# ---- the order of samples, docs/protocol.md ----------------------------------------------------------------

def mix(x):
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9 & MASK
    x = (x ^ x >> 27) * 0x94d049bb133111eb & MASK
    return x ^ x >> 31


def permute(seed, n, i):
    half = next(h for h in range(1, 33) if 1 << 2 * h >= n)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(1, 9):
            key = mix(seed + r * 0x9e3779b97f4a7c15 & MASK)
            left, right = right, left ^ (mix(key ^ right) & mask)
        i = left << half | right
        if i < n:
            return i


class Corpus:
    def __init__(self, folder, seed):
        self.manifest = json.loads((folder / "corpus.json").read_text())
        assert self.manifest["tokenizer"] == "bytes" and "document_end" not in self.manifest
        self.sequence, self.samples, self.seed = self.manifest["sequence"], self.manifest["samples"], seed
        self.files = [(f["samples"], numpy.memmap(folder / f["name"], "<u2", "r")) for f in self.manifest["files"]]

    def sample(self, position):
        at = permute(self.seed, self.samples, position)
        for samples, tokens in self.files:
            if at < samples:
                return tokens[at * self.sequence:(at + 1) * self.sequence + 1].astype(numpy.int64)
            at -= samples

    def batch(self, step, size):
        return torch.from_numpy(numpy.stack([self.sample(step * size + i) for i in range(size)]))


# ---- the two sides -----------------------------------------------------------------------------------------

def make_model(args, sequence):
    layers, width, heads, kv_heads, ffn, theta = SHAPES[args.preset]
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=256, max_position_embeddings=sequence, rope_theta=theta,
        rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.02, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config).float()


def rows_of(path):
    return list(csv.DictReader(open(path))) if path.exists() else []


def start_ours(args, sequence):
    settings = {"inner.batch": args.batch, "inner.lr": args.lr, "inner.schedule": "cosine", "inner.beta1": 0.9,
                "inner.beta2": 0.95, "inner.eps": 1e-8, "inner.weight_decay": 0.1, "inner.clip": 1,
                "inner.warmup_tokens": args.warmup * args.batch * sequence, "corpus.shuffle_seed": 1,
                "inner.total_tokens": args.steps * args.batch * sequence, "inner.z_loss": 0, "inner.max_z_loss": 0}
    (args.out / "run.yaml").write_text(f"corpus: {{manifest: {args.corpus.resolve()}}}\n")
    command = [args.node, "train", args.out / "run.yaml", "--from", args.out / "first", "--out", args.out / "ours",
               "--precision", args.precision, "--threads", str(args.threads), "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen([str(c) for c in command])


def train_torch(args, model, corpus):
    """Waits for each step's learning rate."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}],
                                  betas=(0.9, 0.95), eps=1e-8, fused=True)
    with open(args.out / "torch.csv", "w") as out:
        print("step,loss", file=out, flush=True)
        for step in range(args.steps):
            while len(ours := rows_of(args.out / "ours/loss.csv")) <= step:
                yield
            for group in optimizer.param_groups:
                group["lr"] = float(ours[step]["lr"])
            tokens = corpus.batch(step, args.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision != "fp32"):
                logits = model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            print(f"{step + 1},{loss.item():.9g}", file=out, flush=True)


# ---- the comparison ----------------------------------------------------------------------------------------

def compare(args):
    ours, theirs = ([float(r["loss"]) for r in rows_of(args.out / name)] for name in ("ours/loss.csv", "torch.csv"))
    assert len(ours) == len(theirs) == args.steps, (len(ours), len(theirs))
    worst = (0, 0)
    print(f"{'step':>6} {'ours':>8} {'torch':>8}   ratio   means of 20 steps")
    for step in range(20, args.steps + 1):
        a, b = (sum(x[step - 20:step]) / 20 for x in (ours, theirs))
        if step - 20 >= args.warmup:
            worst = max(worst, (abs(a / b - 1), step))
        if step % 20 == 0:
            print(f"{step:6} {a:8.4f} {b:8.4f} {a / b:7.4f}")
    print(f"{args.preset} {args.precision}, {args.steps} steps of {args.batch} samples: after the warm-up at most "
          f"{100 * worst[0]:.3f} % apart (step {worst[1]}); torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    return worst[0] > 0.01


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True, help="of bytes, each text a file of its own")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--preset", choices=SHAPES, default="150m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--node", default="build/intellect-node")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.corpus, 1)
    model = make_model(args, corpus.sequence)
    if not (args.out / "first").exists():
        model.save_pretrained(args.out / "first")
    if len(rows_of(args.out / "torch.csv")) < args.steps:
        ours = start_ours(args, corpus.sequence)
        for _ in train_torch(args, model, corpus):
            if ours.poll():
                sys.exit(f"train ended with {ours.returncode}")
            time.sleep(0.2)
        if ours.wait():
            sys.exit(f"train ended with {ours.returncode}")
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
