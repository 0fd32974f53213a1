#!/usr/bin/env python3
"""Write tokenizer-*: what Hugging Face's `tokenizers` makes of texts in many scripts, of code, and of bytes that are
not UTF-8. tests/test_tokenizer.c compares node/tokenizer.c with them. `make test-reference` runs both with 50 MB; to
renew the files that are kept here:

    tests/reference/venv.sh build/reference-venv
    build/reference-venv/bin/python tests/reference/make_tokenizer_vectors.py

    make_tokenizer_vectors.py [DIR] [--bytes N] [--vocabulary V] [--tokenizer FILE]...

Trains one tokenizer of V tokens for each of the patterns of GPT-2, Llama 3 (with ignore_merges) and Qwen2 (with
NFC), in the layout of the published ones; a FILE is one more, a tokenizer.json there is already.

tokenizer-texts.bin    each text: its length u32, then its bytes. Python reads them with errors="replace".
tokenizer-NAME.json    the tokenizer
tokenizer-NAME.bin     for each text, first as `tokenizers` reads it, then with encode_special_tokens: how many
                       ids u32, and the first 8 bytes of BLAKE2b-256 of them as u32, little-endian
tokenizer-NAME.s       where there are many texts: seconds of one core that `tokenizers` took for the first of the two
"""
import argparse
import glob
import hashlib
import json
import os
import pathlib
import random
import shutil
import struct
import sysconfig
import time
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|end", "<|endoftext|>"]

# First and last letter of a script; what Unicode 3.2 had not assigned is left out below.
SCRIPTS = [(0x41, 0x5a), (0x61, 0x7a), (0xc0, 0x17f), (0x180, 0x24f), (0x250, 0x2ad), (0x370, 0x3ff), (0x400, 0x4ff),
           (0x531, 0x587), (0x5b0, 0x5ea), (0x621, 0x6ff), (0x700, 0x74a), (0x780, 0x7b0), (0x901, 0x96f),
           (0x981, 0x9fa), (0xa02, 0xa74), (0xa81, 0xaef), (0xb01, 0xb70), (0xb82, 0xbf2), (0xc01, 0xc6f),
           (0xc82, 0xcef), (0xd02, 0xd6f), (0xd82, 0xdf4), (0xe01, 0xe5b), (0xe81, 0xedd), (0xf00, 0xfcf),
           (0x1000, 0x1059), (0x10a0, 0x10fb), (0x1100, 0x11f9), (0x1200, 0x137c), (0x13a0, 0x13f4), (0x1401, 0x1676),
           (0x1681, 0x169c), (0x16a0, 0x16f0), (0x1780, 0x17e9), (0x1800, 0x18a9), (0x1e00, 0x1eff), (0x1f00, 0x1ffe),
           (0x2000, 0x206f), (0x2070, 0x218f), (0x2190, 0x22ff), (0x2460, 0x27be), (0x2e80, 0x2fd5), (0x3000, 0x30ff),
           (0x3105, 0x318e), (0x3400, 0x4db5), (0x4e00, 0x9fa5), (0xa000, 0xa4c6), (0xac00, 0xd7a3), (0xf900, 0xfa6a),
           (0xfb00, 0xfdfb), (0xfe20, 0xfefc), (0xff01, 0xffee), (0x10300, 0x1034a), (0x10400, 0x1044d),
           (0x1d000, 0x1d1dd), (0x1d400, 0x1d7ff), (0x20000, 0x2a6d6), (0x1f300, 0x1f64f), (0xe000, 0xe0ff)]
MARKS = [c for c in range(0x300, 0x20000) if unicodedata.combining(chr(c))]


def letters(r):
    first, last = r.choice(SCRIPTS)
    known = [c for c in range(first, last + 1) if first > 0x1f000 or unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]
    return known[:: max(1, len(known) // 300)]


def scripts_text(r, size):
    """Words of one script, sometimes two, with spaces, digits, signs and marks between."""
    alphabet = letters(r) + (letters(r) if r.random() < 0.2 else [])
    words = ["".join(chr(r.choice(alphabet)) for _ in range(r.randint(1, 12))) for _ in range(60)]
    glue = [" "] * 20 + [", ", ". ", "\n", "\n\n", "  ", "\t", "-", "'s ", "'LL ", " (", ") ", "\r\n", " 12", " 3456 ",
                         "\u00a0", "\u3000", "\u2028", "\u0085", "\u180e", "\u200b", "!!!\n", "'\u017f", SPECIAL[0],
                         chr(r.choice(MARKS)), chr(r.choice(MARKS)) + chr(r.choice(MARKS)), "    \n  "]
    out, n = [], 0
    while n < size:
        word = r.choice(words) + r.choice(glue)
        out.append(word)
        n += len(word.encode())
    return "".join(out).encode()


def odd_text(r, size):
    """What is rare: long runs, one character again and again, special tokens, any code point."""
    any_code = lambda: chr(r.choice([r.randrange(0x20, 0x300), r.randrange(0xd800), r.randrange(0xe000, 0x110000)]))
    parts = [r.choice(" \n\t\r\u00a0\u3000") * r.randint(1, 3000), r.choice("aZ0-=\u4e00\u0301\u0f71") * r.randint(1, 5000),
             "".join(r.choice(" \n\r\t") for _ in range(200)), "".join(any_code() for _ in range(300)),
             "".join(r.choice(SPECIAL + ["<", "|", "<|", "end", " "]) for _ in range(100)),
             "".join(r.choice("abcdefgh") for _ in range(r.randint(1, 20000))),
             "a" + "".join(chr(r.choice(MARKS)) for _ in range(r.randint(1, 500)))]
    r.shuffle(parts)
    return "".join(parts).encode()[:size]


def marks_text(step):
    """Each mark where it would change places with another."""
    return "".join(f"a\u0345{chr(c)}b{chr(c)}\u0334 " for c in MARKS[::step]).encode()


def broken(r, text):
    """A byte changed, dropped or put in, in one of some hundred; may cut characters anywhere."""
    out = bytearray(text)
    for _ in range(len(out) // r.choice([20, 200, 2000]) + 1):
        at = r.randrange(len(out) + 1)
        kind = r.randrange(4)
        if kind == 0:
            out[at:at + 1] = bytes([r.randrange(256)])
        elif kind == 1:
            del out[at:at + 1]
        elif kind == 2:
            out[at:at] = bytes(r.choice([0x80, 0xbf, 0xc0, 0xc2, 0xe0, 0xed, 0xa0, 0xf0, 0x90, 0xf4, 0xf5, 0xff])
                               for _ in range(r.randint(1, 4)))
        else:
            out[at:at] = r.choice([b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xf0\x9f\x98"])
    return bytes(out)


def code_files(small):
    if small:
        return sorted(glob.glob(str(HERE / "*.py")) + glob.glob(str(HERE / "../*.sh")))
    roots = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/doc", "/usr/share/perl"]
    return sorted(f for root in roots for kind in ("py", "h", "txt", "pod", "pm", "md", "pyi")
                  for f in glob.glob(f"{root}/**/*.{kind}", recursive=True))


def make_texts(size, small):
    r = random.Random(7)
    files = code_files(small)
    r.shuffle(files)
    texts, total, longest = [b"", marks_text(11 if small else 1)], 0, 900 if small else 200000
    while total < size:
        kind = r.random()
        want = r.randint(1, longest)
        if kind < 0.4 and files:
            text = pathlib.Path(files[len(texts) % len(files)]).read_bytes()[:want]
        elif kind < (0.75 if small else 0.95):
            text = scripts_text(r, want)
        else:
            text = odd_text(r, want)
        if r.random() < 0.25:
            text = broken(r, text)
        texts.append(text)
        total += len(text)
    return texts


def train(name, texts, vocabulary):
    t = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "gpt2":
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(PATTERN % ("{1,3}" if name == "llama3" else ""))
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "qwen2":
        t.normalizer = normalizers.NFC()
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator((x.decode(errors="replace")[:20000] for x in texts), trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([AddedToken(s, normalized=name == "gpt2", special=True) for s in SPECIAL[:3]])
    t.add_tokens([AddedToken("\u00e9t\u00e9", normalized=True), AddedToken("def", normalized=False)])
    return t


def digest(ids):
    return struct.pack("<I", len(ids)) + hashlib.blake2b(struct.pack(f"<{len(ids)}I", *ids), digest_size=32).digest()[:8]


def write_ids(folder, name, texts):
    t = Tokenizer.from_file(str(folder / f"tokenizer-{name}.json"))
    t.no_truncation()
    t.no_padding()
    strings = [x.decode(errors="replace") for x in texts]
    start = time.process_time()
    read = [t.encode(s, add_special_tokens=False).ids for s in strings]
    seconds = time.process_time() - start
    t.encode_special_tokens = True
    plain = [t.encode(s, add_special_tokens=False).ids for s in strings]
    (folder / f"tokenizer-{name}.bin").write_bytes(b"".join(digest(a) + digest(b) for a, b in zip(read, plain)))
    if sum(map(len, texts)) > 1000000:
        (folder / f"tokenizer-{name}.s").write_text(f"{seconds:.3f}\n")
    print(f"tokenizers {tokenizers.__version__}, {name}: {t.get_vocab_size()} tokens, {sum(map(len, texts))} bytes, "
          f"{sum(map(len, read))} ids, {seconds:.1f} s")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("dir", nargs="?", default=HERE, type=pathlib.Path)
    p.add_argument("--bytes", type=int, default=12000)
    p.add_argument("--vocabulary", type=int, default=420)
    p.add_argument("--tokenizer", action="append", default=[], type=pathlib.Path)
    o = p.parse_args()
    texts = make_texts(o.bytes, o.bytes < 1000000)
    (o.dir / "tokenizer-texts.bin").write_bytes(b"".join(struct.pack("<I", len(x)) + x for x in texts))
    for name in ("gpt2", "llama3", "qwen2"):
        part = texts if o.bytes < 1000000 else random.Random(1).sample(texts, len(texts) // 5)
        t = json.loads(train(name, part, o.vocabulary).to_str())
        (o.dir / f"tokenizer-{name}.json").write_text(json.dumps(t, separators=(",", ":")) + "\n")
        write_ids(o.dir, name, texts)
    for i, path in enumerate(o.tokenizer):
        shutil.copy(path, o.dir / f"tokenizer-given{i}.json")
        write_ids(o.dir, f"given{i}", texts)


if __name__ == "__main__":
    main()
