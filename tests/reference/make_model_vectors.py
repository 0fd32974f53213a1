#!/usr/bin/env python3
"""Write llama-*.bin: what Hugging Face's LlamaForCausalLM computes in fp32 for small random networks.
tests/test_model.c compares the network in node/model.c with them. `make test-reference` runs both on
the newest torch and transformers; to renew the files that are kept here:

    tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/make_model_vectors.py

    make_model_vectors.py [DIR] [--random N] [--seed S]

DIR (default: this folder) gets the networks of CASES, N more of random shapes, and llama-hf/, a folder
as save_pretrained() leaves it with the loss of a text, for the command `eval` (tests/test_tools.c).

File: one line of JSON (the network in the words of proto/model.h, the tokens, what is trained on, mean
loss and penalty; `error`: how far PyTorch's own fp32 is off what it computes in fp64, the most of any
tensor relative to its largest element), then little-endian fp32: all parameters, and all gradients of loss + penalty, in the
canonical order of proto/model.h, and the logits [batch, sequence, vocabulary].

Documents within a sequence are told to transformers as its own collator for packed sequences does
(DataCollatorWithFlattening): position_ids that restart, from which it makes the mask, and -100 as label
of a document's first token. Here each document is also run alone, which must give the same logits."""
import argparse
import copy
import json
import math
import pathlib
import random

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
SMALL = dict(layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocabulary=29, sequence=7, rope_theta=500.0,
             norm_eps=1e-5, tied=0, rope_type=0, rope_factor=0.0, rope_low_factor=0.0, rope_high_factor=0.0,
             rope_original=0, batch=2, document_end=-1, z=0.0, max_z=0.0)
LLAMA3 = dict(rope_type=2, rope_factor=8.0, rope_low_factor=1.0, rope_high_factor=4.0, rope_original=40)
CASES = {  # llama-NAME.bin
    "untied": dict(seed=17),
    "tied": dict(seed=18, tied=1),
    "llama3": dict(seed=19, width=32, heads=4, kv_heads=1, sequence=12, batch=1, z=1e-2, **LLAMA3),
    "linear": dict(seed=20, kv_heads=4, layers=1, rope_type=1, rope_factor=2.5, max_z=2e-2),
    "documents": dict(seed=21, tied=1, sequence=16, vocabulary=11, document_end=3, z=1e-2, max_z=1e-2, **LLAMA3),
}


def random_case(seed):
    r = random.Random(seed)
    heads, kv_heads = r.choice([(1, 1), (2, 1), (2, 2), (4, 2), (3, 1), (6, 3), (8, 2)])
    case = dict(seed=seed, layers=r.randint(1, 3), width=heads * 2 * r.randint(1, 8), heads=heads, kv_heads=kv_heads,
                ffn=r.randint(4, 40), vocabulary=r.randint(8, 60), sequence=r.randint(2, 90), batch=r.randint(1, 3),
                rope_theta=r.choice([100.0, 1e4, 5e5]), norm_eps=r.choice([1e-5, 1e-6]), tied=r.randint(0, 1))
    case.update(r.choice([{}, dict(rope_type=1, rope_factor=r.uniform(1, 8)),
                          dict(LLAMA3, rope_factor=r.uniform(1, 16), rope_original=r.randint(8, 300))]))
    if r.random() < 0.5:
        case["document_end"] = r.randrange(case["vocabulary"])
    case[r.choice(["z", "max_z"])] = r.choice([0.0, 1e-4, 1e-2])
    return case


def config_of(c):
    rope = dict(rope_theta=c["rope_theta"], rope_type=("default", "linear", "llama3")[c["rope_type"]])
    if c["rope_type"]:
        rope["factor"] = c["rope_factor"]
    if c["rope_type"] == 2:
        rope.update(low_freq_factor=c["rope_low_factor"], high_freq_factor=c["rope_high_factor"],
                    original_max_position_embeddings=c["rope_original"])
    return LlamaConfig(
        hidden_size=c["width"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"], intermediate_size=c["ffn"], vocab_size=c["vocabulary"],
        max_position_embeddings=c["sequence"], rms_norm_eps=c["norm_eps"], rope_parameters=rope,
        tie_word_embeddings=bool(c["tied"]), attention_bias=False, mlp_bias=False, attn_implementation="eager")


def network(config):
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():  # far from the usual small start, so that every term counts
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() == 2 else 1 + 0.2 * torch.randn_like(p))
    return model


def canonical(model, config, tied):
    names = ["model.embed_tokens"]
    for i in range(config.num_hidden_layers):
        names += [f"model.layers.{i}.{part}" for part in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj")]
    names += ["model.norm"] + ([] if tied else ["lm_head"])
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(names)
    return [parameters[name + ".weight"] for name in names]


def documents(row, end):
    """[first, last) of each document of a sequence."""
    cuts = [0] + [i + 1 for i, t in enumerate(row) if t == end and i + 1 < len(row)] + [len(row)]
    return list(zip(cuts, cuts[1:]))


def flattened(inputs, targets, end):
    """As transformers' DataCollatorWithFlattening: position_ids, and targets with -100 where they do not count."""
    positions, labels = torch.arange(inputs.shape[1]).repeat(len(inputs), 1), targets.clone()
    for b, row in enumerate(inputs.tolist()):
        for first, last in documents(row, end):
            positions[b, first:last] -= first
            if row[last - 1] == end:
                labels[b, last - 1] = -100
    return positions, labels


def check_alone(model, inputs, logits, end):
    with torch.no_grad():
        for b, row in enumerate(inputs.tolist()):
            for first, last in documents(row, end):
                alone = model(inputs[b:b + 1, first:last]).logits[0]
                torch.testing.assert_close(logits[b, first:last], alone, rtol=1e-4, atol=1e-4)


def run(model, c, tokens):
    """Loss, penalty and logits; the gradients are then in the model."""
    inputs = tokens[:, :-1]
    positions, labels = flattened(inputs, tokens[:, 1:], c["document_end"])
    logits = model(inputs, position_ids=positions, use_cache=False).logits  # packed only without a cache
    check_alone(model, inputs, logits, c["document_end"])
    flat, kept = logits.reshape(-1, c["vocabulary"]), (labels != -100).reshape(-1)
    count = max(int(kept.sum()), 1)
    loss = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum") / count
    z, largest = flat.logsumexp(-1)[kept], flat.max(-1)[0][kept]
    penalty = (c["z"] * z**2 + c["max_z"] * largest**2).sum() / count
    (loss + penalty).backward()
    return loss, penalty, logits.detach()


def write(path, case):
    c = {**SMALL, **case}
    torch.manual_seed(c.pop("seed"))
    config = config_of(c)
    model = network(config)
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, c["vocabulary"], (c["batch"], c["sequence"] + 1))
    loss, penalty, logits = run(model, c, tokens)
    exact_logits = run(exact, c, tokens)[2]
    parameters = canonical(model, config, c["tied"])
    found = [p.grad for p in parameters] + [logits]
    true = [p.grad for p in canonical(exact, config, c["tied"])] + [exact_logits]
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, true) if b.any())
    header = dict(c, tokens=tokens.reshape(-1).tolist(), loss=loss.item(), penalty=penalty.item(), error=error)
    assert math.isfinite(header["loss"])
    arrays = [p.detach() for p in parameters] + found
    with open(path, "wb") as f:
        f.write(json.dumps(header).encode() + b"\n")
        for a in arrays:
            f.write(a.numpy().astype("<f4").tobytes())
    print(f"{path}: {path.stat().st_size} bytes, loss {loss.item():.6f}, penalty {penalty.item():.6f}, "
          f"fp32 off by {error:.1e}")


def text():
    return bytes(97 + (i * i + 3 * i) % 26 for i in range(1000))


def folder(path):
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, vocab_size=256, max_position_embeddings=32, rms_norm_eps=1e-6,
        tie_word_embeddings=True, attn_implementation="eager")
    model = network(config)
    model.save_pretrained(path)
    tokens, window = torch.tensor(list(text())), 32
    windows = (len(tokens) - 1) // window
    with torch.no_grad():
        loss = sum(torch.nn.functional.cross_entropy(
            model(tokens[None, i * window:i * window + window]).logits[0],
            tokens[i * window + 1:i * window + window + 1], reduction="sum").item()
            for i in range(windows)) / (windows * window)
    (path / "expected.json").write_text(json.dumps(dict(loss=loss, tokens=windows * window)) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=pathlib.Path, default=HERE)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    folder(args.dir / "llama-hf")
    for name, case in CASES.items():
        write(args.dir / f"llama-{name}.bin", case)
    for seed in range(args.seed, args.seed + args.random):
        write(args.dir / f"llama-seed-{seed}.bin", random_case(seed))


if __name__ == "__main__":
    main()
