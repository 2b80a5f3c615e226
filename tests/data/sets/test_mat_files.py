"""MATLAB files are parsed in a process of its own, which damage may end."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.io import savemat

from cocoop_fast.data.sets import mat_to_json
from cocoop_fast.data.sets.mat_files import read_mat
from cocoop_fast.errors import UserError

# Damaged at random until SciPy's parser ended by SIGSEGV.
ENDS_THE_PARSER = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFdlZCBOb3YgMjUgMjE6MzI6MDQgMjAyNgAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0OAAAAcAAAAAYAAAAIAAAACQAAAAAA"
    "/wAFAAAACAAAAAEAAAAxAAAAAQAAAAYAAABsYWJlbHMOAAAAAAAxAAAAAQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyAh"
    "IiMkJSYnKCkqKywtLi8wMQAAAAAAAAA="
)


def test_a_file_that_ends_the_parser_is_a_sentence(tmp_path):
    path = tmp_path / "imagelabels.mat"
    path.write_bytes(ENDS_THE_PARSER)
    with pytest.raises(UserError, match=r"does not hold the variable 'labels'.*download it again") as error:
        read_mat(path, "labels", lambda value: value)
    assert error.value.exit_status == 1


# What a process had at most counts from its parent's size on: it is started from a small one.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_file_that_takes_gigabytes_is_a_sentence(tmp_path):
    """3.9 GB of zeros, which take no room on the disk."""
    path, count = tmp_path / "imagelabels.mat", 0xF0000000
    array = (14, count, 6, 8, 6, 0, 5, 8, 1, count - 80, 1, 6)
    start = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    numbers = np.array((2, count - 80), dtype="<u4").tobytes()
    path.write_bytes(start + np.array(array, dtype="<u4").tobytes() + b"labels\0\0" + numbers)
    os.truncate(path, count + 1000)
    with pytest.raises(UserError, match="does not hold the variable 'labels'"):
        read_mat(path, "labels", lambda value: value)
    parse = [sys.executable, "-I", mat_to_json.__file__, str(path), "labels", "10000000"]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *parse], capture_output=True, text=True, check=True
    )
    assert 0 < int(measured.stdout) < 2**21  # KiB


def test_damage_is_a_sentence_or_harmless(tmp_path):
    path, chosen = tmp_path / "x.mat", random.Random(1)
    savemat(path, {"labels": np.array([[1, 2]], dtype=np.uint8)})
    whole = path.read_bytes()
    for _ in range(4):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chosen.randrange(128, len(whole))] = chosen.randrange(256)
        path.write_bytes(damaged)
        try:
            read_mat(path, "labels", lambda value: [int(one) for one in value[0]])
        except UserError as error:
            assert str(path) in str(error)


def test_numbers_text_and_structures(tmp_path):
    path, names = tmp_path / "x.mat", np.empty((1, 2), dtype=object)
    names[0, :] = ["AM General", "Citroën"]
    rows = np.zeros((1, 1), dtype=[("fname", object), ("class", object)])
    rows[0, 0] = ("1.jpg", 7)
    savemat(path, {"names": names, "labels": np.array([[1, 2]], dtype=np.uint8), "rows": rows})
    assert read_mat(path, "labels", lambda value: value) == [[1, 2]]
    assert read_mat(path, "names", lambda value: value) == [[["AM General"], ["Citroën"]]]
    assert read_mat(path, "rows", lambda value: value) == [[{"fname": ["1.jpg"], "class": [[7]]}]]
