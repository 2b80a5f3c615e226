"""Pickles of the reference: read for what they are, and never run."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict

import pytest
from reference_pickles import write_reference_cache

from cocoop_fast import UserError
from cocoop_fast.data import Sample
from cocoop_fast.data.reference_cache import CachedImage, read_reference_cache

SAMPLES = (Sample("a/0.jpg", 0, "a"), Sample("b/1.jpg", 1, "b"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_cache_is_read_without_its_class(tmp_path, protocol):
    path = tmp_path / "shot_1-seed_1.pkl"
    write_reference_cache(path, "/data", SAMPLES, SAMPLES[:1], protocol=protocol)
    # There objects are made by copyreg's function, and highest protocols are what is written.
    if protocol < 2:
        with pytest.raises(UserError, match=r"asks for copy_?reg\._reconstructor"):
            read_reference_cache(path)
    else:
        before = set(sys.modules)
        cached = read_reference_cache(path)
        assert not any(name.startswith("dassl") for name in set(sys.modules) - before)
        assert cached.train == [CachedImage("/data/a/0.jpg", 0), CachedImage("/data/b/1.jpg", 1)]
        assert cached.val == [CachedImage("/data/a/0.jpg", 0)]


class Calls:
    """Pickled as a call, as malicious files are."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "asks_for"),
    [
        (lambda marker: Calls(os.mkdir, str(marker)), r"posix\.mkdir|nt\.mkdir"),
        (lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"), r"builtins\.eval"),
        (lambda marker: {"train": [Calls(os.mkdir, str(marker))]}, r"mkdir"),
        (lambda marker: Calls(getattr, os, "mkdir"), r"builtins\.getattr"),
        (lambda marker: OrderedDict(train=[]), r"collections\.OrderedDict"),
    ],
)
def test_nothing_is_called(tmp_path, value, asks_for):
    path = tmp_path / "shot_1-seed_1.pkl"
    marker = tmp_path / "marker"
    try:
        path.write_bytes(pickle.dumps(value(marker)))
    except TypeError:  # a module cannot be pickled by value; write the call by hand
        path.write_bytes(b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.")
    with pytest.raises(UserError, match=asks_for) as caught:
        read_reference_cache(path)
    assert "was not read; delete it, and the images are drawn again." in str(caught.value)
    assert not marker.exists()


def test_a_class_called_datum_is_never_imported(tmp_path):
    """``Datum`` of any module is our own record, even if a module of that name could be imported."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    content = (
        b"\x80\x02}X\x05\x00\x00\x00train](cevil_module\nDatum\n)\x81}("
        b"X\x07\x00\x00\x00_impathX\x08\x00\x00\x00/d/x.jpgX\x06\x00\x00\x00_labelK\x00ubes."
    )
    (tmp_path / "c.pkl").write_bytes(content)
    try:
        assert read_reference_cache(tmp_path / "c.pkl").train == [CachedImage("/d/x.jpg", 0)]
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a readable few-shot cache"),
        (b"not a pickle", "is not a readable few-shot cache"),
        (pickle.dumps({"train": []})[:-3], "is not a readable few-shot cache"),
        (b"Pid\n.", "is not a readable few-shot cache"),  # a persistent id
        (b"\x82\x01.", "is not a readable few-shot cache"),  # an extension code
        (pickle.dumps([1, 2]), "holds no few-shot sample"),
        (pickle.dumps({"test": []}), "holds no few-shot sample"),
        (pickle.dumps({"train": [("x.jpg", 0)]}), "holds something that is not an image"),
        (pickle.dumps({"train": [], "val": 3}), "holds something that is not an image"),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    path = tmp_path / "shot_1-seed_1.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_reference_cache(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "shot_1-seed_1.pkl"
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(UserError, match="too many for a few-shot cache"):
        read_reference_cache(path)
