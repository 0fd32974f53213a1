#!/usr/bin/env python3
"""Open a checkpoint or export as anybody would: transformers, nothing of ours. By hand, not in CI.

    tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/check_hf_folder.py FOLDER [--text FILE] [--anchor FILE.f32]
        [--text FILE --logits FILE.f32]

FOLDER is a step-* folder of a store, or what `intellect-node export` wrote. Checks that no weight is
missing, unexpected or initialised anew; that the tokenizer gives each byte its own value and comes
back; that a forward pass and generate() work. --text prints the mean loss over windows of the model's
length, to compare with `intellect-node eval`. --anchor compares every weight, bit by bit, with
little-endian fp32 in the canonical order of proto/model.h. --logits compares the text's first window with what
`intellect-node eval FOLDER --text FILE --logits FILE.f32` wrote: at most 1e-4 apart. Weights of a bf16 folder are
widened here as there: the arithmetic is fp32."""
import argparse
import json
import pathlib
import sys

import numpy
import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--text", type=pathlib.Path)
parser.add_argument("--anchor", type=pathlib.Path)
parser.add_argument("--logits", type=pathlib.Path)
args = parser.parse_args()


def canonical(model):
    """Our order: embedding, per layer norm, q, k, v, o, norm, gate, up, down; final norm; head."""
    w = dict(model.named_parameters())
    yield w.pop("model.embed_tokens.weight")
    for i in range(model.config.num_hidden_layers):
        for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
                     "mlp.down_proj"):
            yield w.pop(f"model.layers.{i}.{part}.weight")
    yield w.pop("model.norm.weight")
    yield from w.values()  # lm_head.weight, unless tied


# As anybody would, without a word about precision: what config.json says is what there is.
as_it_is = transformers.AutoModelForCausalLM.from_pretrained(args.folder)
stored = json.loads((pathlib.Path(args.folder) / "config.json").read_text())["torch_dtype"]
assert {str(p.dtype) for p in as_it_is.parameters()} == {f"torch.{stored}"}, stored
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    args.folder, dtype=torch.float32, output_loading_info=True)
assert type(model).__name__ == "LlamaForCausalLM", type(model)
for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
    assert not info.get(problem), (problem, info[problem])
print(f"transformers {transformers.__version__}: {type(model).__name__}, "
      f"{sum(p.numel() for p in model.parameters())} parameters, nothing missing or unexpected")

if args.anchor:
    want = numpy.fromfile(args.anchor, dtype="<u4")
    have = numpy.concatenate([p.detach().numpy().ravel() for p in canonical(model)]).view("<u4")
    assert want.shape == have.shape and (want == have).all()
    print(f"all {want.size} weights bit-identical")

tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
sample = "Ein Ätherwind, 漢字, \t\n \"quotes\"  and  two spaces\x00\x7f🙂"
ids = tokenizer(sample)["input_ids"]
assert ids == list(sample.encode()), ids
assert tokenizer.decode(ids) == sample
print(f"tokenizer: {type(tokenizer).__name__}, ids are the bytes, {len(ids)} of them come back")

length = model.config.max_position_embeddings
out = model.generate(torch.tensor([ids[:16]]), max_new_tokens=8, do_sample=False)
assert out.shape[1] == 24
print("generate: 8 tokens,", out[0, 16:].tolist())

if args.text:
    data = torch.tensor(list(args.text.read_bytes()))
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(data) - length, length):
            window = data[at:at + length + 1]
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += length
    print(f"loss {total / count:.6f} nats per token over {count} tokens")

if args.logits:
    window = torch.tensor(list(args.text.read_bytes()[:length]))
    with torch.no_grad():
        theirs = model(window[None]).logits[0].numpy()
    ours = numpy.fromfile(args.logits, dtype="<f4").reshape(theirs.shape)
    apart = numpy.abs(ours - theirs).max()
    print(f"logits: {theirs.shape[0]} x {theirs.shape[1]}, weights {stored}, at most {apart:.2e} "
          f"apart, largest {numpy.abs(theirs).max():.2f}")
    assert apart <= 1e-4, apart
sys.exit(0)
