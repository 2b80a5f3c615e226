"""What storage, transfers and ill will do to files: damage of every kind to good ones, and files made to harm a reader."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

BEGIN = b"\x80\x02"
PICKLES = {
    "a key of nested tuples": BEGIN + b"})" + b"\x85" * 3_000_000 + b"K\x01s.",
    "a key of tuples nested by the memo": BEGIN + b"})" + b"q\x00\x86h\x00" * 200 + b"K\x01s.",
    "nested lists": BEGIN + b"(" * 20_000 + b"l" * 20_000 + b".",
    "a memo of 2**31 places": BEGIN + b"Nr\xff\xff\xff\x7f.",
    "two gigabytes of bytes": BEGIN + b"B\xff\xff\xff\x7f" + b".",
    "2**62 bytes": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",
    "a long integer": BEGIN + b"\x8b" + (2**20).to_bytes(4, "little") + b"\x01" * 2**20 + b".",
    "a list copied again and again": BEGIN
    + b"ccollections\nOrderedDict\nq\x00](" + b"(NNl" * 5_000 + b"e\x85q\x010" + b"h\x00h\x01R" * 1000 + b".",
    "many sets": b"\x80\x04" + b"\x8f" * 100_000 + b".",
    "a call of a number": BEGIN + b"K\x01)R.",
    "an unknown extension": BEGIN + b"\x82\x01.",
    "nothing": b"",
}  # fmt: skip


def archive(pickled: bytes, script: bool = False, more: dict[str, bytes] | None = None) -> bytes:
    """Of PyTorch, around a pickle; `script`: of TorchScript."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("a/data.pkl", pickled)
        if script:
            parts.writestr("a/constants.pkl", BEGIN + b").")
        for name, content in (more or {}).items():
            parts.writestr(name, content)
    return file.getvalue()


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """A copy with damage of one to three kinds."""
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not content:
            break
        # Half of it near the beginning, where most formats say what follows.
        at = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 64))
        length = rng.choice([1, 2, 4, 16, 512])
        match rng.randrange(9):
            case 0:
                del content[at:]
            case 1:
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                content[at] = rng.randrange(256)
            case 3:
                content[at : at + length] = rng.randbytes(len(content[at : at + length]))
            case 4:
                content[at : at + length] = bytes([rng.choice([0, 255, 127, 128])]) * len(
                    content[at : at + length]
                )
            case 5:
                del content[at : at + length]
            case 6:
                content[at:at] = rng.randbytes(length)
            case 7:
                other = rng.randrange(len(content))
                content[at : at + length] = content[other : other + length]
            case 8:
                content += content[at:]
    return bytes(content)


def pictures() -> dict[str, bytes]:
    """A small one of each format and kind that is read, by a name with the format's ending."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    clear = Image.fromarray(rng.integers(0, 255, (24, 32, 4), np.uint8))
    grey = Image.fromarray(rng.integers(0, 65535, (24, 32), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [colours.rotate(90)]}
    kinds: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "baseline.jpg": (colours, {"exif": exif}),
        "progressive.jpg": (colours, {"progressive": True, "subsampling": 2}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "colours.png": (colours, {"exif": exif}),
        "clear.png": (clear, {}),
        "palette.png": (colours.quantize(16), {"transparency": 3}),
        "grey16.png": (grey, {}),
        "bits.png": (colours.convert("1"), {}),
        "plain.tiff": (colours, {"exif": exif}),
        "deflate.tiff": (colours, {"compression": "tiff_deflate"}),
        "lzw.tiff": (grey, {"compression": "tiff_lzw"}),
        "pages.tiff": (colours, frames),
        "lossy.webp": (colours, {"exif": exif}),
        "lossless.webp": (clear, {"lossless": True}),
        "frames.webp": (colours, frames),
        "frames.gif": (colours, frames),
        "plain.bmp": (colours, {}),
        "palette.bmp": (colours.quantize(16), {}),
        "plain.dib": (colours, {}),
        "plain.ppm": (colours, {}),
        "plain.jp2": (colours, {}),
        "plain.avif": (colours, {}),
        "plain.mpo": (colours, frames),
        "run-length.tga": (clear, {"compression": "tga_rle"}),
        "plain.qoi": (clear, {}),
    }
    Image.init()
    found = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        kind = Image.registered_extensions().get("." + name.rpartition(".")[2])
        if kind in Image.SAVE:
            image.save(file, kind, **options)
            found[name] = file.getvalue()
    return found


def _safetensors(header: object, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _saved(value: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _self_holding() -> object:
    value: list[object] = []
    value.append(value)
    return value


def hostile_files() -> dict[str, Callable[[], bytes]]:
    """By what is in them: nested, shared and huge objects in the languages of all files that are read."""
    overlapping = {
        f"t{i}": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]} for i in range(500)
    }
    base = torch.zeros(300, 300)
    files: dict[str, Callable[[], bytes]] = {
        "nothing": lambda: b"",
        "zeros": lambda: bytes(10**5),
        "ones": lambda: b"\xff" * 10**5,
        "noise": lambda: random.Random(0).randbytes(10**5),
        "JSON: lists in lists": lambda: b"[" * 100_000 + b"]" * 100_000,
        "JSON: objects in objects": lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "JSON: a list of many": lambda: b"[" + b",".join([b"0"] * 60_000) + b"]",
        "JSON: many keys": lambda: json.dumps({str(i): i for i in range(20_000)}).encode(),
        "JSON: a key again and again": lambda: b"{" + b",".join([b'"train":[]'] * 20_000) + b"}",
        "JSON: digits": lambda: b"9" * 100_000,
        "JSON: digits in a list": lambda: b'[{"path":"a.png","classname":"a","label":' + b"9" * 5_000 + b"}]",
        "JSON: an exponent": lambda: b"[1e999, -1e999, NaN, Infinity]",
        "JSON: a long text": lambda: b'{"weight_map": "' + b"x" * 1_000_000 + b'"}',
        "JSON: numbers for names": lambda: b'{"weight_map": {"a": 1, "b": [2], "c": null}}',
        "JSON: paths elsewhere": lambda: b'{"weight_map": {"a": "../../../etc/passwd", "b": "/etc/passwd"}}',
        "JSON: no name": lambda: rb'{"weight_map": {"a": "\u0000"}}',
        "JSON: integers for names": lambda: b'{"weight_map": {"a": 1}}',
        "JSON: half a character": lambda: rb'{"\ud800": "\ud800", "train": [["\ud800", 0, "\udfff"]]}',
        "JSON: lists for objects": lambda: b'{"train": [[[], {}, []]], "model_cfg": [], "model_type": [], "text_config": 1}',
        "YAML: aliases of aliases": lambda: "\n".join(
            ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
        ).encode(),
        "YAML: merges of merges": lambda: "\n".join(
            ["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
        ).encode(),
        "YAML: itself": lambda: b"a: &a [*a]\nseed: &b {<<: *b}",
        "YAML: lists in lists": lambda: b"[" * 20_000,
        "YAML: lines below lines": lambda: "\n".join(" " * i + "a:" for i in range(500)).encode(),
        "YAML: tags": lambda: b"seed: !!python/object/apply:os.system [true]\na: !!int x",
        "YAML: many documents": lambda: b"--- a\n" * 2_000,
        "a table without end": lambda: b"path,classname\n" + b'"' + b"a,b\n" * 100_000,
        "a table of one row": lambda: b"path,classname" + b",x" * 50_000 + b"\n" + b"a," * 50_000,
        "a field of a megabyte": lambda: b"path,classname\n" + b"x" * 1_000_000 + b",cat\n",
        "lines of a character": lambda: b"a\n" * 50_000,
        "UTF-16": lambda: "path,classname\na.png,ä\n".encode("utf-16"),
        "controls": lambda: b"\x1b]0;x\x07\x1b[2J\x00\x08,\xc2\x9b31m\n" * 100,
        "MATLAB: lengths": lambda: b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"\x0e\0\0\0\xff\xff\xff\x7f" * 1000,
        "MATLAB: cells in cells": lambda: b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + (b"\x0e\0\0\0\0\x10\0\0" + b"\x06\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0" + b"\x05\0\0\0\x08\0\0\0\x01\0\0\0\x01\0\0\0" + b"\x01\0\0\0\0\0\0\0") * 5000,
        "safetensors: a header of 2**60": lambda: struct.pack("<Q", 2**60) + b"{" + bytes(100),
        "safetensors: a nested header": lambda: _safetensors(b'{"a":' * 20_000 + b"}" * 20_000),
        "safetensors: sizes beyond": lambda: _safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)),
        "safetensors: shared bytes": lambda: _safetensors(overlapping, bytes(4_000_000)),
        "safetensors: of a type unknown": lambda: _safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(8)),
        "a bomb of a zip": lambda: archive(bytes(300_000_000)),
        "a bomb for a storage": lambda: archive(BEGIN + b"N.", more={"a/data/0": bytes(300_000_000)}),
        "a zip of many": lambda: archive(BEGIN + b"N.", more={f"a/data/{i}": b"" for i in range(5_000)}),
        "a zip of paths elsewhere": lambda: archive(BEGIN + b"N.", more={"../../x": b"", "/x": b""}),
        "tensors: one storage often": lambda: _saved([base.t()[:, i % 7 :] for i in range(3_000)]),
        "tensors: as before 1.6": lambda: _saved({"a": [base.t()[:, 1:]] * 3_000}, legacy=True),
        "tensors: themselves": lambda: _saved({"state_dict": _self_holding()}),
        "tensors: dictionaries in dictionaries": lambda: archive(BEGIN + b"}X\x01\0\0\0a" * 5_000 + b"N" + b"s" * 5_000 + b"."),
    }  # fmt: skip
    for name, pickled in PICKLES.items():
        files[f"a pickle: {name}"] = lambda pickled=pickled: pickled  # type: ignore[misc]
        files[f"an archive: {name}"] = lambda pickled=pickled: archive(pickled)  # type: ignore[misc]
        files[f"a script: {name}"] = lambda pickled=pickled: archive(pickled, script=True)  # type: ignore[misc]
    return files
