#!/usr/bin/python3
"""What needs no run: that this reader computes the document's vectors, and that its decoder is as strict as the
document. Exit status 0, or 1 with what is wrong."""
import os
import sys

import numpy as np

import outer
from document import Document
from outer import FP4, INT8
from wire import Codec, Record, Refused, digest, leaf, node, path_leads, tree_root

PAGE = os.path.join(os.path.dirname(__file__), "../../docs/protocol.md")


def vectors():
    """Name in the document: bytes."""
    x, y = (outer.random_elements(seed, 0, 600, 0.02) for seed in (7, 8))
    ex, ey = outer.encode(INT8, x), outer.encode(INT8, y)
    dx, dy = outer.decode(INT8, ex, 600), outer.decode(INT8, ey, 600)
    total = np.zeros(600, np.int64)
    outer.add(total, dx, 3, 1.0, 40)
    outer.add(total, dy, 5, 0.5, 40)
    emean = outer.encode(INT8, outer.mean(total, 8, 40))
    anchor, momentum = outer.apply(y, x, outer.decode(INT8, emean, 600), 0.7, 0.9)
    model = Record(layers=12, width=256, heads=8, kv_heads=4, ffn=832, vocabulary=256, tied=1)
    layout = outer.Layout(Record(model=[model], outer=[Record(chunk_elements=65536, fragments=5)]))
    owner = bytearray(layout.chunks)
    for f, chunks in enumerate(layout.fragments):
        for c in chunks:
            owner[c] = f
    return {
        "x": x.tobytes(), "INT8(x)": ex, "residual of x": (x - dx).tobytes(),
        "FP4(x)": outer.encode(FP4, x), "decoded FP4(x)": outer.decode(FP4, outer.encode(FP4, x), 600).tobytes(),
        "sum of squares": outer.sum_of_squares([dx[:300], dx[300:]]).tobytes(), "sum": total.tobytes(),
        "INT8(mean)": emean, "applied": anchor.tobytes() + momentum.tobytes(),
        "permutation": b"".join(outer.permute(3, 1000, i).to_bytes(8, "little") for i in range(1000)),
        "fragments": bytes(owner),
    }


def check_vectors(document):
    ours = {name: digest(data).hex() for name, data in vectors().items()}
    assert ours == document.vectors, f"vectors differ: {ours.items() ^ document.vectors.items()}"


def refused(codec, name, data):
    try:
        codec.decode(name, data)
    except Refused:
        return
    raise AssertionError(f"{name} was accepted from {data.hex()}")


def check_decoder(document):
    codec = Codec(document)
    range_ = codec.encode("range", {"start": 200, "count": 3})
    assert range_ == bytes.fromhex("92ccc803")
    assert codec.decode("range", range_) == {"start": 200, "count": 3}
    for wrong in ("92ccc8", "92ccc80300", "92cd00c803", "92ccc8cc03", "92ccc8d003", "93ccc80303", "dc0002ccc803",
                  "92ccc8ff", "92ccc8c0", "92ccc8c3", "92ccc8ca40400000", "82ccc803", "92ccc8a103", ""):
        refused(codec, "range", bytes.fromhex(wrong))
    bye = {"code": 6, "final": 1, "reason": "no"}
    assert codec.decode("BYE", codec.encode("BYE", bye)) == bye
    for wrong in ("930601a26e0a", "930602a26e6f", "930601c4026e6f", "930601a2c328", "930601a3eda080",
                  "930601d9026e6f", "93cd010001a0", "930601d9f1" + "61" * 241):
        refused(codec, "BYE", bytes.fromhex(wrong))
    plan = Record(fragment=0, round=0, base_index=0, resum=0, grid_exponent=-33, codec=1, contributors=[], shards=[],
                  addresses=[])
    good = codec.encode("PLAN", plan)
    assert codec.decode("PLAN", good).grid_exponent == -33
    refused(codec, "PLAN", good.replace(b"\xd0\xdf", b"\xd1\xff\xdf"))
    contributor = {"member": 1, "weight": 1, "clip": 0.5, "tokens": 1, "root": bytes(32), "norm": 1.0}
    good = codec.encode("contributor", contributor)
    assert codec.decode("contributor", good) == contributor
    refused(codec, "contributor", good.replace(b"\xca\x3f\x00\x00\x00", b"\xcb\x3f\xe0" + bytes(6)))  # a double
    refused(codec, "contributor", good.replace(b"\xca\x3f\x00\x00\x00", b"\xca\x7f\x80\x00\x00"))     # infinite
    refused(codec, "contributor", good.replace(b"\xc4\x20", b"\xc4\x1f"))


def check_tree():
    leaves = [leaf(i, bytes([i])) for i in range(5)]
    root = node(node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3])), leaves[4])
    assert tree_root(leaves) == root and tree_root([]) == bytes(32) and tree_root(leaves[:1]) == leaves[0]
    assert path_leads(root, leaves[4], 4, 5, [node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3]))])
    path = [leaves[3], node(leaves[0], leaves[1]), leaves[4]]
    assert path_leads(root, leaves[2], 2, 5, path)
    assert not path_leads(root, leaves[3], 2, 5, path) and not path_leads(root, leaves[2], 2, 5, path[:2])


def main():
    document = Document(sys.argv[1] if len(sys.argv) > 1 else PAGE)
    check_vectors(document)
    check_decoder(document)
    check_tree()
    print(f"{len(document.records)} records, {len(document.types)} messages, {len(document.vectors)} vectors: "
          "as the page says")


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, ValueError) as why:
        sys.exit(f"FAILED: {why}")
