"""Write kernel_vectors.bin: inputs and outputs of every kernel as PyTorch computes them, in float64.

    tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/make_kernel_vectors.py tests/reference/kernel_vectors.bin

tests/test_kernels.c reads the file; neither the product nor the tests need Python. Inputs are rounded
to float32 first, so both sides start from the same numbers; outputs are rounded once at the end.

The file is a sequence of records: name (32 bytes, padded with zeroes), element count (uint32), then
that many float32, all little-endian. Shapes are constants in both programs.
"""
import struct
import sys

import torch
import torch.nn.functional as F

B, T, H, KV, D, C, FF, V = 2, 7, 4, 2, 6, 24, 10, 13
EPS, THETA = 1e-5, 500000.0
out_file = open(sys.argv[1], "wb")
torch.manual_seed(1)


def save(name, tensor):
    values = tensor.detach().reshape(-1).to(torch.float32).tolist()
    out_file.write(struct.pack("<32sI", name.encode(), len(values)))
    out_file.write(struct.pack(f"<{len(values)}f", *values))


def draw(name, *shape, std=1.0):
    x = (torch.randn(*shape) * std).to(torch.float32).to(torch.float64).requires_grad_()
    save(name, x)
    return x


def matmul():
    x, w = draw("matmul.x", B * T, C), draw("matmul.w", FF, C)
    out, dout = F.linear(x, w), draw("matmul.dout", B * T, FF)
    out.backward(dout)
    save("matmul.out", out)
    save("matmul.dx", x.grad)
    save("matmul.dw", w.grad)


def embedding():
    tokens = torch.randint(0, V, (B * T,))
    save("embedding.tokens", tokens)
    w, dout = draw("embedding.w", V, C), draw("embedding.dout", B * T, C)
    out = F.embedding(tokens, w)
    out.backward(dout)
    save("embedding.out", out)
    save("embedding.dw", w.grad)


def rmsnorm():
    x, w = draw("rmsnorm.x", B * T, C), draw("rmsnorm.w", C)
    out, dout = F.rms_norm(x, (C,), w, EPS), draw("rmsnorm.dout", B * T, C)
    out.backward(dout)
    save("rmsnorm.out", out)
    save("rmsnorm.dx", x.grad)
    save("rmsnorm.dw", w.grad)


def rotate_half(x):
    """As in transformers' modeling_llama.py."""
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((-b, a), dim=-1)


def attention():
    """Rotary embedding, then causal grouped-query attention, from one packed qkv."""
    angle = torch.outer(torch.arange(T).double(),
                        THETA ** (-torch.arange(0, D, 2).double() / D))
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    qkv, dout = draw("attention.qkv", B, T, H + 2 * KV, D), draw("attention.dout", B, T, H, D)
    heads = qkv.transpose(1, 2)
    qk = heads[:, : H + KV]
    qk = qk * cos + rotate_half(qk) * sin
    q, k, v = qk[:, :H], qk[:, H:], heads[:, H + KV :]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2)
    out.backward(dout)
    scores = q @ k.repeat_interleave(H // KV, 1).transpose(2, 3) / D**0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    save("attention.rotated", torch.cat((qk, v), 1).transpose(1, 2))
    save("attention.out", out)
    save("attention.lse", scores.logsumexp(-1))
    save("attention.dqkv", qkv.grad)


def swiglu():
    gate_up, dout = draw("swiglu.gate_up", B * T, 2 * FF, std=3), draw("swiglu.dout", B * T, FF)
    out = F.silu(gate_up[:, :FF]) * gate_up[:, FF:]
    out.backward(dout)
    save("swiglu.out", out)
    save("swiglu.dgate_up", gate_up.grad)


def cross_entropy():
    logits, targets = draw("cross_entropy.logits", B * T, V, std=4), torch.randint(0, V, (B * T,))
    targets[3] = targets[9] = -1
    save("cross_entropy.targets", targets)
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    (loss.sum() / (targets >= 0).sum()).backward()
    save("cross_entropy.loss", loss)
    save("cross_entropy.dlogits", logits.grad)


def adamw():
    """Three steps, so the bias corrections matter."""
    param = draw("adamw.param", 40)
    optimizer = torch.optim.AdamW([param], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        param.grad = draw(f"adamw.grad{step}", 40).detach()
        optimizer.step()
    save("adamw.after", param)
    save("adamw.m", optimizer.state[param]["exp_avg"])
    save("adamw.v", optimizer.state[param]["exp_avg_sq"])


def nesterov():
    anchor = draw("nesterov.anchor", 40)
    optimizer = torch.optim.SGD([anchor], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(3):
        anchor.grad = draw(f"nesterov.mean{step}", 40).detach()
        optimizer.step()
    save("nesterov.after", anchor)
    save("nesterov.momentum", optimizer.state[anchor]["momentum_buffer"])


for kernel in (matmul, embedding, rmsnorm, attention, swiglu, cross_entropy, adamw, nesterov):
    kernel()
