"""What libraries say of damaged images does not reach the terminal: neither C's own lines, nor logging's, nor warnings."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def damaged_tiff(path: Path, compression: str) -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "TIFF", compression=compression)
    content = bytearray(file.getvalue())
    for i in range(60, len(content) - 200, 37):
        content[i] ^= 0xFF
    path.write_bytes(content)


def tiff_of_many_samples(path: Path) -> None:
    """Which Pillow's logger names."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "TIFF")
    entry = struct.pack("<HHII", 277, 3, 1, 3)  # samples a pixel: one short number, 3
    assert file.getvalue().count(entry) == 1
    path.write_bytes(file.getvalue().replace(entry, struct.pack("<HHII", 277, 3, 1, 7)))


def test_nothing_but_our_own_lines(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for compression in ("tiff_lzw", "jpeg", "tiff_deflate"):
        damaged_tiff(images / f"{compression}.tiff", compression)
    tiff_of_many_samples(images / "many.tiff")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack(
        "<HHHII", 1, 0x010F, 2, 100, 4000
    )  # points beyond its end
    Image.fromarray(PIXELS).save(images / "exif.jpg", exif=exif)
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(images / "palette.png", transparency=bytes(range(0, 256, 16)))
    done = subprocess.run(
        [sys.executable, "-m", "cocoop_fast", "predict", str(images), "--top-k", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "COCOOP_FAST_DEBUG": ""},
        check=False,
    )
    model, fault = done.stderr.splitlines()
    assert model.startswith("Model: demo") and fault.startswith("error: 4 of 6 images cannot be read: ")
    assert fault.count("(damaged)") + fault.count("(not an image)") == 4
    assert done.returncode == 1 and "exif.jpg" in done.stdout and "palette.png" in done.stdout
