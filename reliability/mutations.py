"""Ways to damage a file: bytes of any, headers of safetensors and pictures, what YAML, JSON and checkpoints hold."""

from __future__ import annotations

import copy
import datetime
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Damage = Callable[[bytes, random.Random], bytes]


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    """Up to 64 bits, mostly few."""
    damaged = bytearray(content)
    for _ in range(2 ** rng.randint(0, 6)):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_early_bits(content: bytes, rng: random.Random) -> bytes:
    """In the first 256 bytes, where headers are."""
    return flip_bits(content[:256], rng) + content[256:]


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Somewhere, or nearly at the end."""
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.7 else content[: -rng.randint(1, 8)]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Some bytes, somewhere."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.randbytes(2 ** rng.randint(0, 12)) + content[place:]


def remove(content: bytes, rng: random.Random) -> bytes:
    """A piece."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + content[place + 2 ** rng.randint(0, 10) :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    """A piece, twice."""
    place, size = rng.randrange(len(content) + 1), 2 ** rng.randint(0, 12)
    return content[: place + size] + content[place:]


def blank(content: bytes, rng: random.Random) -> bytes:
    """Zeros in a piece's place, as a disk leaves them after a power cut."""
    place = rng.randrange(len(content) + 1)
    size = min(2 ** rng.randint(2, 14), len(content) - place)
    return content[:place] + bytes(size) + content[place + size :]


def replace_all(content: bytes, rng: random.Random) -> bytes:
    """Nothing of it left: noise, emptiness, or zeros."""
    return rng.choice([b"", rng.randbytes(len(content)), bytes(len(content)), b"\xff\xfe\x00", b"version https://git"])


def swap_header(content: bytes, rng: random.Random) -> bytes:
    """The head of another kind of file."""
    heads = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"RIFF\x24\x00\x00\x00WEBPVP8 ", b"GIF89a"]
    heads += [
        b"BM",
        b"PK\x03\x04",
        b"%PDF-1.7\n",
        b"\x80\x04}",
        b"<svg xmlns='http://www.w3.org/2000/svg'>",
        b"II*\x00",
    ]
    head = rng.choice(heads)
    return head + content[len(head) :]


BYTES: tuple[Damage, ...] = (
    *(flip_bits, flip_early_bits, truncate, insert, remove, repeat, blank, replace_all, swap_header),
)
"""What may be done to any file."""


# -- pictures ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, rows: int, chunks: bytes = b"", depth: int = 8, color: int = 0) -> bytes:
    """A PNG that says it has so many pixels, and holds so many rows of zeros."""
    line = 1 + (width * depth * {0: 1, 2: 3, 6: 4}[color] + 7) // 8
    data = zlib.compress(bytes(line * rows), 9)
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + chunks + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(rng: random.Random) -> bytes:
    """A picture that is small on the disk and large in memory, or says that it is."""
    kind = rng.randrange(6)
    if kind == 0:
        side = rng.choice([20_000, 100_000, 2**31 - 1])
        return png(side, side, 1)
    if kind == 1:  # just below what Pillow takes
        return png(9_000, 9_000, 9_000, depth=1)
    if kind == 2:
        return png(64, 64, 64, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))))
    if kind == 3:
        return png(64, 64, 64, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27))), color=2)
    if kind == 4:
        return b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(8) + b"\x00\x02\x02L\x01\x00;"
    return (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 50_000, -50_000, 1, 24, *[0] * 6)
    )


# -- safetensors -------------------------------------------------------------------------------------------------------


def safetensors_header(content: bytes, rng: random.Random) -> bytes:
    """A header that lies: its length, or what it says of tensors and metadata."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.25:
        lie = rng.choice([0, 1, size - 1, size + 1, len(content), 2**31, 2**40, 2**63 - 1, 2**64 - 1])
        return struct.pack("<Q", lie) + content[8:]
    header = json.loads(content[8 : 8 + size])
    head = json.dumps(damage_tree(header, rng, HEADER_VALUES)).encode()
    return struct.pack("<Q", len(head)) + head + content[8 + size :]


HEADER_VALUES: tuple[Any, ...] = (
    *("I64", "F16", "BF16", "BOOL", "F8_E4M3", "C64", "../../x", "", "x" * 5000, None, -1, 0, 2**63, 1.5, [], {}),
    *([0, 0], [2**60, 2**60], [-1, 4], [1], [0], "<a b>", "nan", "int9", "fp16", "tiny"),
)


def odd_tensors(tensors: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A whole file whose tensors are of other kinds, shapes, names or values."""
    tensors = {name: value.clone() for name, value in tensors.items()}
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.randrange(9)
    if kind == 0:
        tensors[name] = value.to(rng.choice([torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16, torch.uint8]))
    elif kind == 1:
        value.view(-1)[rng.randrange(value.numel()) :] = rng.choice([float("nan"), float("inf"), 1e38])
    elif kind == 2:
        tensors[name] = value.flatten()[: rng.randrange(value.numel() + 1)].clone()
    elif kind == 3:
        tensors[name] = torch.tensor(rng.random())
    elif kind == 4:
        tensors[name] = torch.zeros(rng.choice([[0, 128], [1, 0], [1, 1, 128], [3, 128], [128, 1], [100_000, 2]]))
    elif kind == 5:
        del tensors[name]
    elif kind == 6:
        tensors[rng.choice(["../../x", "", "a b", "<x>" * 100, "a.b.c", "\u0000", "unet.", "e\u0301"])] = value.clone()
    elif kind == 7:
        tensors[rng.choice(["../../x", "", "a b", "<x>" * 100, "<script>alert(1)</script>", "\n"])] = tensors.pop(name)
    else:
        tensors |= {f"t{number}": torch.zeros(1) for number in range(1000)}
    return tensors


# -- trees of settings and state ---------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e-9, 1e308, float("nan"), float("inf"), "", "auto", "nan"),
    *(
        "../../x",
        "/etc/passwd",
        "/dev/zero",
        "x" * 5000,
        "<script>alert(1)</script>",
        "{0.__class__}",
        "\u202e",
        "\x1b[31m",
    ),
    *([], {}, [1], [[]], {"a": 1}, [None], {"class_path": "os.system"}, {"class_path": "Backprop"}, {"class_path": 3}),
    *({"class_path": "LoRA", "init_args": []}, {"class_path": "a.b.C"}, datetime.date(2020, 1, 1), b"\x00\xff"),
)
"""What stands in the place of a setting, or of a part of a checkpoint."""


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of dictionaries and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def damage_tree(tree: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy with something else in a place or two, something missing, or something more."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(tree))
        if not found:
            return rng.choice(values)
        *parents, last = rng.choice(found)
        node = tree
        for key in parents:
            node = node[key]
        action = rng.random()
        if action < 0.65:
            node[last] = copy.deepcopy(rng.choice(values))
        elif action < 0.85:
            del node[last]
        elif isinstance(node, dict):
            node[rng.choice(["x", "", "../../x", "class_path", "init_args", "n", 3, None])] = rng.choice(values)
        else:
            node.extend(node[:])
    return tree


def damage_tensors(tree: Any, rng: random.Random) -> Any:
    """A checkpoint one of whose tensors has other values, another shape or kind."""
    tree = copy.deepcopy(tree)
    found = [path for path in places(tree) if isinstance(_at(tree, path), torch.Tensor)]
    *parents, last = rng.choice(found)
    node, value = _at(tree, parents), _at(tree, (*parents, last))
    node[last] = rng.choice(
        [
            *(value * float("nan"), value * float("inf"), value.to(torch.int8), torch.zeros(3), torch.tensor(0.0)),
            *(value.double(), value[..., :0] if value.dim() else value, value.flatten(), torch.zeros(2, 2, 2), "x"),
        ]
    )
    return tree


def _at(tree: Any, path: Any) -> Any:
    for key in path:
        tree = tree[key]
    return tree


LETTERS = range(ord("a"), ord("k"))
YAMLS: tuple[bytes, ...] = (
    b"[" * 100_000,
    b"{a: " * 5_000 + b"1" + b"}" * 5_000,
    b"- " * 20_000 + b"1",
    b"a: &a [*a]\n",
    b"model: &a {x: *a}\n",
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in LETTERS),
    b"a: &a {x: 1}\n"
    + b"".join(
        b"%c: &%c {<<: [%s]}\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(ord("a"), ord("k"))
    ),
    b"!!python/object/apply:os.system ['touch escaped']\n",
    b"model: !!python/name:os.system\n",
    b"a: 2020-99-99\n",
    b"a: !!int x\n",
    b"a: !!timestamp x\n",
    b"a: !!binary x\n",
    b"a: !!set [1]\n",
    b"a: !!omap 3\n",
    b"a: !!float ''\n",
    b"a: !!bool x\n",
    b"a: " + b"9" * 10_000 + b"\n",
    b"a: 0x" + b"f" * 100_000 + b"\n",
    b"a: 190:20:30:59:59:59:59\n",
    b"? [1, 2]\n: 3\n",
    b"? {a: 1}\n: 3\n",
    b"model: {lr: 1}\nmodel: {lr: 2}\n",
    b"\x00\x01",
    b"\xef\xbb\xbfmodel: {lr: 1}\n",
    "model: {lr: 1}\n".encode("utf-16"),
    b"model: {lr: .nan}\n",
    b"--- 1\n--- 2\n",
    b"%TAG ! tag:x,2000:\n--- !a b\n",
    b"model:\n\tlr: 1\n",
    b"3: {4: 5}\nnull: 1\n",
    b"a: " + b"x" * 3_000_000 + b"\n",
)
"""Settings that are hard on a reader: deep, cyclic, or growing when they are written out."""
JSONS: tuple[bytes, ...] = (
    *(b"[" * 200_000, b'{"a":' * 100_000, b"null", b"3", b"[]", b"NaN", b'"' + b"x" * 1_000_000 + b'"', b"\xff\xfe"),
    b'{"file_name": "../../x", "text": "a"}',
    b'{"file_name": "/etc/passwd", "text": "a"}',
    b'{"file_name": "0.png", "text": "\\ud800 \\u0000 {0.__class__} {} {9} <sks>"}',
    b'{"file_name": "0.png", "text": 3}',
    b'{"file_name": ["0.png"], "text": "a"}',
    b'{"file_name": "0.png", "text": "' + b"word " * 100_000 + b'"}',
    b'{"file_name": "0.png", "text": "a"}\n' * 5_000,
    b'{"phases": {"step": 3}, "peak_phase": [], "peak_bytes": "x"}',
    b'{"phases": {"step": {"allocated_peak": 1e400, "reserved_peak": -1, "process_peak": null, "breakdown": []}}}',
    b'{"scores": 3, "clip_t": NaN, "dino": 1e999, "settings": ["<script>"]}',
    b'{"method": "lora", "subject": "a", "seed": 1e400}',
    b'{"method": ["lora"], "subject": {"a": 1}, "seed": 0}',
    b'{"method": "lora", "subject": "a", "seed": 0, "clip_t": 1e308, "steps": 1e400, "storage": -1}',
    b'{"key": 3, "done": "x"}',
    b'{"key": "x", "done": 99999999999999999999999}',
    b"1" + b"0" * 10_000,
)
"""Likewise, in JSON."""
