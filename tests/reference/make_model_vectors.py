#!/usr/bin/env python3
"""Write llama-tied.bin and llama-untied.bin: what Hugging Face's LlamaForCausalLM computes in fp32
for two tiny random networks. tests/test_model.c compares the network in node/model.c with them.
Also write llama-hf/, a folder as save_pretrained() leaves it with the loss of a text, for the
command `eval` (tests/test_tools.c).

Needs torch 2.x and transformers 4.40 or newer from PyPI; not needed to build or test the project:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch transformers
    /tmp/venv/bin/python tests/reference/make_model_vectors.py

File: one line of JSON (shape of the network, batch, tokens, mean loss), then little-endian fp32:
all parameters and all gradients of the mean loss in the canonical order of proto/model.h, and the
logits [batch, time, vocabulary]."""
import json
import pathlib

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, TIME = 2, 7
HERE = pathlib.Path(__file__).parent


def network(tied):
    torch.manual_seed(17 + tied)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=29, max_position_embeddings=TIME, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=500.0,
        tie_word_embeddings=bool(tied), attention_bias=False, mlp_bias=False,
        attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():  # far from the usual small start, so that every term counts
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() == 2 else 1 + 0.2 * torch.randn_like(p))
    return model, config


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


def text():
    return bytes(97 + (i * i + 3 * i) % 26 for i in range(1000))


def folder():
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, vocab_size=256, max_position_embeddings=32, rms_norm_eps=1e-6,
        tie_word_embeddings=True, attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() == 2 else 1 + 0.2 * torch.randn_like(p))
    model.save_pretrained(HERE / "llama-hf")
    tokens, window = torch.tensor(list(text())), 32
    windows = (len(tokens) - 1) // window
    with torch.no_grad():
        loss = sum(torch.nn.functional.cross_entropy(
            model(tokens[None, i * window:i * window + window]).logits[0],
            tokens[i * window + 1:i * window + window + 1], reduction="sum").item()
            for i in range(windows)) / (windows * window)
    (HERE / "llama-hf" / "expected.json").write_text(
        json.dumps(dict(loss=loss, tokens=windows * window)) + "\n")


def main():
    folder()
    for tied in (0, 1):
        model, config = network(tied)
        tokens = torch.randint(0, config.vocab_size, (BATCH, TIME + 1))
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1))
        loss.backward()
        parameters = canonical(model, config, tied)
        header = dict(
            layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocabulary=29, sequence=TIME,
            rope_theta=500.0, norm_eps=1e-5, tied=tied, batch=BATCH, tokens=tokens.reshape(-1).tolist(),
            loss=loss.item())
        arrays = [p.detach() for p in parameters] + [p.grad for p in parameters] + [logits.detach()]
        path = HERE / ("llama-tied.bin" if tied else "llama-untied.bin")
        with open(path, "wb") as f:
            f.write(json.dumps(header).encode() + b"\n")
            for a in arrays:
                f.write(a.numpy().astype("<f4").tobytes())
        print(path, path.stat().st_size, "bytes, loss", loss.item())


if __name__ == "__main__":
    main()
