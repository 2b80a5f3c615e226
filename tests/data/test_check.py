"""Bad images: found before training, listed together, skipped on request, bounded in size."""

from __future__ import annotations

import contextlib
import struct
import zlib

import pytest
from tiny_runs import write_images

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.check import check_images
from cocoop_fast.data.images import ImageError, open_rgb


@pytest.fixture
def root(tmp_path):
    for name in "abcd":
        write_images(tmp_path / name, 8, suffix=".jpg", size=64)
    return tmp_path


def load(root):
    return load_dataset(DataConfig(name="folder", root=root))


def claim_size(path, width, height):
    """A PNG of a few bytes that says it is width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_good_images_pass(root):
    data = load(root)
    assert check_images(data) is data


def test_bad_images_are_listed_together(root):
    data = load(root)
    files = sorted(root.glob("*/*.jpg"))
    files[0].write_bytes(files[0].read_bytes()[:700])
    files[1].write_text("this is not an image")
    files[2].unlink()
    files[3].write_bytes(b"")
    with pytest.raises(UserError) as caught:
        check_images(data)
    message = str(caught.value)
    assert message.startswith(f"4 images in {root} cannot be read")
    for expected in ("a/000.jpg (truncated)", "a/001.jpg (not an image)", "a/002.jpg (missing)", "a/003.jpg"):
        assert expected in message
    assert "--skip-bad-images" in message and caught.value.exit_status == 1


def test_a_long_list_is_cut(root):
    data = load(root)
    for path in root.glob("*/*.jpg"):
        path.write_text("bad")
    with pytest.raises(UserError, match=r"^32 images .* and 12 more\. ") as caught:
        check_images(data)
    assert str(caught.value).count("(not an image)") == 20


def test_skipping(root):
    data = load(root)
    bad = root / str(data.train[0].source)
    bad.write_text("bad")
    heard = []
    kept = check_images(data, skip_bad=True, on_message=heard.append)
    assert kept.train == data.train[1:] and kept.test == data.test and kept.classnames == data.classnames
    assert heard == [f"Left out 1 of 32 images that cannot be read: {data.train[0].source} (not an image)."]


def test_a_class_must_not_be_skipped_away(root):
    data = load(root)
    for sample in data.train:
        if sample.classname == "b":
            (root / str(sample.source)).write_text("bad")
    with pytest.raises(UserError, match=r"'b'.*no readable training image"):
        check_images(data, skip_bad=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_decoding(root, width, height):
    claim_size(root / "a" / "000.jpg", width, height)
    with pytest.raises(ImageError, match=r"more than 89,478,485"):
        open_rgb(root / "a" / "000.jpg")
    with pytest.raises(UserError, match=r"1 image in .*more than 89,478,485"):
        check_images(load(root))


def test_every_truncation_is_an_image_error_or_an_image(root):
    path = root / "a" / "000.jpg"
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError):
            open_rgb(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow about damaged tags
def test_every_damage_is_an_image_error_or_an_image(tmp_path):
    for suffix in (".png", ".gif", ".bmp", ".tiff", ".webp"):
        [path] = write_images(tmp_path / suffix[1:], 1, suffix=suffix, size=16)
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
            with contextlib.suppress(ImageError):
                assert open_rgb(path).mode == "RGB"
