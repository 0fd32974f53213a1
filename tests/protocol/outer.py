"""Numbers: the parameter vector, the codecs and the outer step of docs/protocol.md, in numpy. Every numpy
operation here rounds once, as IEEE has it, so bits can be compared."""
import numpy as np

from wire import Refused

F, D, U = np.float32, np.float64, np.uint64
FP32, INT8, FP4 = 0, 1, 2
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12])
BLOCK = 256
ONE_NAN = np.array([0x7fc00000], np.uint32).view(F)[0]


def one_nan(x):
    return np.where(np.isnan(x), ONE_NAN, x)


# ---- the parameter vector ------------------------------------------------------------------------

def tensors(m):
    """(name, elements, is random), in canonical order."""
    head = m.width // m.heads
    square, kv, ffn = m.width * m.width, m.kv_heads * head * m.width, m.ffn * m.width
    out = [("model.embed_tokens.weight", m.vocabulary * m.width, True)]
    for n in range(m.layers):
        out += [(f"model.layers.{n}.{name}.weight", count, is_random) for name, count, is_random in (
            ("input_layernorm", m.width, False), ("self_attn.q_proj", square, True), ("self_attn.k_proj", kv, True),
            ("self_attn.v_proj", kv, True), ("self_attn.o_proj", square, True),
            ("post_attention_layernorm", m.width, False), ("mlp.gate_proj", ffn, True), ("mlp.up_proj", ffn, True),
            ("mlp.down_proj", ffn, True))]
    out.append(("model.norm.weight", m.width, False))
    if not m.tied:
        out.append(("lm_head.weight", m.vocabulary * m.width, True))
    return out


class Layout:
    """Chunks and fragments of a run."""

    def __init__(self, genesis):
        model, outer = genesis.model[0], genesis.outer[0]
        self.tensors = tensors(model)
        self.elements = sum(count for _, count, _ in self.tensors)
        self.chunk_elements = outer.chunk_elements
        self.chunks = -(-self.elements // self.chunk_elements)
        self.fragments = [[] for _ in range(outer.fragments)]
        for chunk, fragment in enumerate(self._deal(model.layers, outer.fragments)):
            self.fragments[fragment].append(chunk)
        if self.chunks > 65536 or not all(self.fragments):
            raise Refused("genesis: too many chunks, or a fragment without one")

    def first(self, chunk):
        return chunk * self.chunk_elements

    def count(self, chunk):
        return min(self.chunk_elements, self.elements - self.first(chunk))

    def _layer_at(self, element):
        for name, count, _ in self.tensors:
            if element < count:
                return int(name.split(".")[2]) if name.startswith("model.layers.") else None
            element -= count
        return None

    def _deal(self, layers, fragments):
        if fragments > layers:
            return [c % fragments for c in range(self.chunks)]
        owner = [self._layer_at(self.first(c)) for c in range(self.chunks)]
        owner = [None if layer is None else layer % fragments for layer in owner]
        elements = [sum(self.count(c) for c in range(self.chunks) if owner[c] == f) for f in range(fragments)]
        for c in range(self.chunks):
            if owner[c] is None:
                owner[c] = elements.index(min(elements))
                elements[owner[c]] += self.count(c)
        return owner


def _finish(x):
    x = (x ^ (x >> U(30))) * U(0xbf58476d1ce4e5b9)
    x = (x ^ (x >> U(27))) * U(0x94d049bb133111eb)
    return x ^ (x >> U(31))


def _splitmix(x):
    return _finish(x * U(0x9e3779b97f4a7c15))


def random_elements(seed, first, count, std):
    with np.errstate(over="ignore"):
        base = _splitmix(np.array([seed ^ 0x6f75746572], U))
        counter = base + U(3) * np.arange(first, first + count, dtype=U)
        total = np.zeros(count, np.int64)
        for k in range(3):
            z = _splitmix(counter + U(k))
            for part in range(4):
                total += ((z >> U(16 * part)) & U(0xffff)).astype(np.int64)
    return (total - 393210).astype(F) * F(2.0**-16) * F(std)


def initial_anchor(genesis):
    anchor, at = [], 0
    for _, count, is_random in tensors(genesis.model[0]):
        anchor.append(random_elements(genesis.init_seed, at, count, genesis.init_std) if is_random
                      else np.ones(count, F))
        at += count
    return np.concatenate(anchor)


# ---- codecs -----------------------------------------------------------------------------------------

def encoded_bytes(codec, n):
    if codec == FP32:
        return 4 * n
    return (n if codec == INT8 else -(-n // 2)) + 4 * -(-n // BLOCK)


def unpack_fp4(data, n):
    """The integers of a block."""
    codes = np.frombuffer(data, np.uint8)
    halves = np.concatenate([codes & 15, codes >> 4])
    if (halves == 8).any() or halves[n:].any():
        raise Refused("a half byte that stands for nothing")
    return np.where(halves & 8, -1, 1)[:n] * FP4_VALUES[halves[:n] & 7]


def pack_fp4(x, scale):
    a = np.abs(x) / scale if scale else np.zeros(len(x), F)
    codes = sum((a > F(t)).astype(np.uint8) for t in (0.5, 1.5, 2.5, 3.5, 5, 7, 10))
    codes += np.where((codes > 0) & np.signbit(x), 8, 0).astype(np.uint8)
    half = -(-len(x) // 2)
    high = np.concatenate([codes[half:], np.zeros(2 * half - len(x), np.uint8)])
    return (codes[:half] | high << 4).astype(np.uint8).tobytes()


def decode(codec, data, n):
    if codec not in (FP32, INT8, FP4) or len(data) != encoded_bytes(codec, n):
        raise Refused(f"{len(data)} bytes for {n} values of codec {codec}")
    if codec == FP32:
        x = np.frombuffer(data, "<f4").astype(F)
        if not np.isfinite(x).all():
            raise Refused("a value is not finite")
        return x
    out = np.empty(n, F)
    for at in range(0, n, BLOCK):
        size = encoded_bytes(codec, BLOCK)
        block = data[at // BLOCK * size:][:size]
        scale = np.frombuffer(block[:4], "<f4")[0]
        q = np.frombuffer(block[4:], np.int8) if codec == INT8 else unpack_fp4(block[4:], min(BLOCK, n - at))
        with np.errstate(over="ignore", invalid="ignore"):
            if np.signbit(scale) or not np.isfinite(scale * F(127 if codec == INT8 else 12)) or (q == -128).any():
                raise Refused("a block with an impossible scale or a -128")
        out[at:at + BLOCK] = scale * q.astype(F)
    return out


def encode(codec, x):
    if codec == FP32:
        return x.astype("<f4").tobytes()
    out = []
    for at in range(0, len(x), BLOCK):
        block = x[at:at + BLOCK]
        scale = np.abs(block).max() / F(127 if codec == INT8 else 12)
        if codec == FP4:
            out.append(scale.astype("<f4").tobytes() + pack_fp4(block, scale))
            continue
        q = np.clip(np.rint(block / scale), -127, 127) if scale else np.zeros(len(block))
        out.append(scale.astype("<f4").tobytes() + q.astype(np.int8).tobytes())
    return b"".join(out)


# ---- the outer step ------------------------------------------------------------------------------------

def sum_of_squares(chunks):
    """Of the decoded values of a contribution, chunk by chunk."""
    squares = D(0)
    for x in chunks:
        lanes = np.zeros(16, D)
        square = x.astype(D) * x.astype(D)
        for at in range(0, len(x), 16):
            part = square[at:at + 16]
            lanes[:len(part)] += part
        while len(lanes) > 1:
            lanes = lanes[:len(lanes) // 2] + lanes[len(lanes) // 2:]
        squares += lanes[0]
    return squares


def add(total, x, weight, clip, exponent):
    """total: int64, changed."""
    factor = D(F(clip)) * D(2.0)**exponent
    if not D(np.abs(x).max()) * factor < D(2**38 - 0.5):
        raise Refused("a value does not fit the grid")
    total += np.rint(x.astype(D) * factor).astype(np.int64) * np.int64(weight)


def mean(total, weight, exponent):
    return (total.astype(D) / (D(weight) * D(2.0)**exponent)).astype(F)


def apply(anchor, momentum, d, lr, mu):
    """The new anchor and momentum."""
    lr, mu = F(lr), F(mu)
    with np.errstate(over="ignore", invalid="ignore"):
        momentum = one_nan(mu * momentum + d)
        return one_nan(anchor - lr * (d + mu * momentum)), momentum


# ---- samples -----------------------------------------------------------------------------------------------

def permute(seed, n, i):
    def f(x):
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9 % 2**64
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb % 2**64
        return x ^ (x >> 31)
    h = next(h for h in range(1, 33) if h == 32 or 4**h >= n)
    while True:
        left, right = i >> h, i % 2**h
        for r in range(1, 9):
            key = f((seed + r * 0x9e3779b97f4a7c15) % 2**64)
            left, right = right, left ^ (f(key ^ right) % 2**h)
        i = left << h | right
        if i < n:
            return i
