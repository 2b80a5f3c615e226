"""How one's own images are read: as they are meant, with each correction counted; published sets as they are stored."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import Sample, load_dataset
from cocoop_fast.data.check import check_images
from cocoop_fast.data.images import FileReader, ImageError, open_rgb

UPRIGHT = np.array([[0, 60, 120], [180, 210, 240]], np.uint8).repeat(16, 0).repeat(16, 1)  # nothing symmetric
TURNED_TO = {  # how the pixels lie in a file of each orientation
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}


def grey(image):
    values = np.asarray(image)
    assert values.shape[2] == 3 and (values == values[:, :, :1]).all()
    return values[:, :, 0]


@pytest.mark.parametrize("orientation", TURNED_TO)
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_every_orientation_is_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    stored = np.ascontiguousarray(TURNED_TO[orientation])
    Image.fromarray(stored).convert("RGB").save(
        path, exif=exif, **({"lossless": True} if suffix == ".webp" else {})
    )
    assert (grey(open_rgb(path)) == UPRIGHT).all()
    as_stored = FileReader(tmp_path, as_stored=True)(Sample(path.name, 0, "a"))
    assert (grey(as_stored) == (UPRIGHT if suffix == ".tiff" else stored)).all()  # Pillow itself turns a TIFF


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_tags_leave_an_image_as_it_is(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(UPRIGHT).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    assert open_rgb(path).size == (48, 32)


def test_a_published_set_is_read_as_the_reference_reads_it(tmp_path):
    from miniature_sets import WRITERS

    WRITERS["dtd"](tmp_path)
    data = load_dataset(DataConfig(name="dtd", root=tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "dtd/images" / str(data.train[0].source)
    Image.fromarray(UPRIGHT).save(path, exif=exif)
    heard = []
    check_images(data, on_message=heard.append)
    assert heard == []
    assert data.read(data.train[0]).tobytes() == Image.open(path).convert("RGB").tobytes()


SIXTEEN = np.array([[0, 257, 1000], [32768, 65278, 65535]], np.uint16)
EIGHT = np.array([[0, 1, 4], [128, 254, 255]])


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("a.png", SIXTEEN, EIGHT),
        ("a.tiff", SIXTEEN, EIGHT),
        ("a.tiff", SIXTEEN.astype(">u2"), EIGHT),
        ("a.tiff", SIXTEEN.astype(np.int32), EIGHT),
        ("a.tiff", EIGHT.astype(np.int32), EIGHT),  # small numbers that were saved as large ones
        ("a.tiff", (EIGHT / 255).astype(np.float32), EIGHT),
        ("a.tiff", EIGHT.astype(np.float32), EIGHT),
        ("a.pgm", SIXTEEN.astype(np.int32), EIGHT),
    ],
)
def test_greys_of_more_bits_are_scaled(tmp_path, name, stored, expected):
    path = tmp_path / name
    Image.fromarray(stored).save(path)
    assert (grey(open_rgb(path)) == expected).all()


@pytest.mark.parametrize(
    "stored",
    [
        np.array([[-5, 200]], np.int32),
        np.array([[0, 70_000]], np.int32),
        np.array([[0, 4000]], np.float32),
        np.array([[-0.5, 0.5]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, np.inf]], np.float32),
    ],
)
def test_greys_whose_black_and_white_are_unknown_are_refused(tmp_path, stored):
    Image.fromarray(stored).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=r"grey values from .* to .*; scale them to 8 or 16 bits"):
        open_rgb(tmp_path / "a.tiff")


def with_alpha(mode):
    alpha = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    image = Image.new(mode.rstrip("Aa"), (3, 1), 0)
    image.putalpha(alpha)
    return image.convert(mode)


def palette(key):
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 10, 10, 20, 20, 20])
    image.putdata([0, 1, 2])
    return image, {"transparency": key}


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (with_alpha("LA"), {}, [255, 204, 0]),
        (with_alpha("RGBA"), {}, [255, 204, 0]),
        (*palette(1), [0, 255, 20]),
        (*palette(bytes([255, 255, 0])), [0, 10, 255]),
        (Image.fromarray(np.array([[7, 8, 9]], np.uint8)), {"transparency": 8}, [7, 255, 9]),
        (Image.fromarray(np.array([[7, 8, 9]], np.uint8)).convert("RGB"), {"transparency": (9, 9, 9)}, [7, 8, 255]),
    ],
)  # fmt: skip
def test_transparency_is_laid_over_white(tmp_path, image, options, expected):
    image.save(tmp_path / "a.png", **options)
    assert grey(open_rgb(tmp_path / "a.png")).tolist() == [expected]
    as_stored = FileReader(tmp_path, as_stored=True)(Sample("a.png", 0, "a"))
    assert as_stored.tobytes() == Image.open(tmp_path / "a.png").convert("RGB").tobytes()


def test_each_correction_is_counted_in_a_line(tmp_path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            noise = rng.integers(0, 255, (8, 9, 4), dtype=np.uint8)
            Image.fromarray(noise[:, :, :3]).save(tmp_path / name / f"plain{i}.png")
        Image.fromarray(noise).save(tmp_path / name / "alpha.png", exif=exif)
        Image.fromarray(noise[:, :, 0].astype(np.uint16)).save(tmp_path / name / "dark.png")
        noise[:, :, 3] = 255
        Image.fromarray(noise).save(tmp_path / name / "opaque.png")
    heard = []
    check_images(load_dataset(DataConfig(name="folder", root=tmp_path)), on_message=heard.append)
    assert heard == [
        "2 of 16 images turned as their EXIF orientation says.",
        "2 of 16 images of more than 8 bits a grey value scaled to 8.",
        "2 of 16 images with transparency laid over white.",
        "2 of 16 images of 16 bits hold no value above 4,095 and come out nearly black; if they hold 8 or 12 bits, "
        "scale them to 16.",
    ]


def test_greys_that_cannot_be_scaled_are_bad_images(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((8, 8), 1e5 + 1000 * i + ord(name), np.float32)).save(
                tmp_path / name / f"{i}.tiff"
            )
    with pytest.raises(UserError, match=r"6 images .* cannot be read: .*grey values from 100097 to 100097"):
        check_images(load_dataset(DataConfig(name="folder", root=tmp_path)))


def test_no_file_is_handed_to_another_program(tmp_path):
    """An EPS file is a program for Ghostscript, whatever its name ends in."""
    gs = tmp_path / "bin/gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    gs.chmod(0o755)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.jpg")
    code = "import sys; from cocoop_fast.data.images import open_rgb; open_rgb(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "photo.jpg")]
    ended = subprocess.run(command, env={"PATH": str(gs.parent)}, capture_output=True, text=True, check=False)
    assert "ImageError: not an image" in ended.stderr
    assert not (tmp_path / "called").exists()


# What Pillow leaves to its callers.

GREYS = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (9, 1))


def tiff(path, values, *, photometric=1, sample_format=1):
    """One strip of greys, without Pillow, which does not write these."""
    tags = [
        (256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, values.itemsize * 8), (259, 3, 1),
        (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, values.nbytes),
        (339, 3, sample_format),
    ]  # fmt: skip
    data = values.tobytes() + b"\0" * (values.nbytes % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (65535 - GREYS.astype("<u2") * 257, {"photometric": 0}),  # white is 0
        (1 - GREYS.astype("<f4") / 255, {"photometric": 0, "sample_format": 3}),
        (255 - GREYS, {"photometric": 0}),
        ((GREYS / 255 * 32767).round().astype("<i2"), {"sample_format": 2}),  # signed: white is 32,767
        (GREYS.astype("<u4"), {}),
    ],
)
def test_greys_of_tiff_whichever_way_round(tmp_path, values, tags):
    tiff(tmp_path / "image.tiff", values, **tags)
    assert (grey(open_rgb(tmp_path / "image.tiff")) == GREYS).all()


def test_greys_of_8_bits_with_a_sign_are_refused(tmp_path):
    tiff(tmp_path / "image.tiff", (GREYS // 2).astype("i1"), sample_format=2)
    with pytest.raises(ImageError, match="with a sign"):
        open_rgb(tmp_path / "image.tiff")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_that_is_transparent(tmp_path, bits):
    values = GREYS if bits == 8 else GREYS.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "image.png", transparency=int(values[0, 3]))
    assert (grey(open_rgb(tmp_path / "image.png")) == np.where(GREYS == GREYS[0, 3], 255, GREYS)).all()


def test_turned_scaled_and_transparent_at_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = GREYS.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "image.png", transparency=int(values[0, 3]), exif=exif)
    image, done = FileReader(tmp_path).corrected(Sample("image.png", 0, "a"))
    assert (grey(image) == np.rot90(np.where(GREYS == GREYS[0, 3], 255, GREYS), -1)).all()
    assert done == ("scaled", "white", "turned")


@pytest.mark.parametrize("suffix", [".tiff", ".gif", ".webp", ".png"])
def test_of_several_frames_the_first_is_read_and_it_is_told(tmp_path, suffix):
    frames = [Image.fromarray(GREYS).convert("RGB"), Image.fromarray(255 - GREYS).convert("RGB")]
    more = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"image{suffix}", save_all=True, append_images=frames[1:], **more)
    image, done = FileReader(tmp_path).corrected(Sample(f"image{suffix}", 0, "a"))
    assert (grey(image) == GREYS).all() and done == ("first",)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    written = 0
    image = Image.fromarray(UPRIGHT).convert("RGB").convert(mode)
    for suffix in (".png", ".tiff", ".bmp", ".tga", ".jp2"):
        try:
            image.save(tmp_path / f"image{suffix}", **({"irreversible": False} if suffix == ".jp2" else {}))
            Image.open(tmp_path / f"image{suffix}").load()
        except (
            OSError,
            KeyError,
            ValueError,
        ):  # the format has no such mode, or Pillow cannot read what it wrote
            continue
        written += 1
        difference = np.asarray(open_rgb(tmp_path / f"image{suffix}")).astype(int) - np.asarray(
            image.convert("RGB")
        )
        assert abs(difference).max() <= 1, suffix
    assert written


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError(), AssertionError(), KeyError(3), OverflowError("x")]
)
def test_whatever_a_decoder_raises_makes_a_bad_image(tmp_path, monkeypatch, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def broken(self):
        raise error

    monkeypatch.setattr(PngImageFile, "load", broken)
    with pytest.raises(ImageError, match="damaged"):
        open_rgb(tmp_path / "x.png")
