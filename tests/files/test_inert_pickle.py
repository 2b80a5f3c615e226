"""Whatever a pickle says, reading it ends in a value or an exception: no crash, no gigabytes, nothing run."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from damage import PICKLES, archive

from cocoop_fast.clip.checkpoints import WeightsError, read_state
from cocoop_fast.data.reference_cache import read_reference_cache
from cocoop_fast.errors import UserError
from cocoop_fast.files import inert_pickle
from cocoop_fast.files.inert_pickle import InertObject, InertUnpickler
from cocoop_fast.files.torch_archive import read_archive
from cocoop_fast.runs import checkpoint, reference_checkpoint


@pytest.mark.parametrize("name", PICKLES)
def test_every_reader_ends_in_a_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        inert_pickle, "MAX_OPERATIONS", 50_000
    )  # for a test of seconds; 2,000,000 take 500 MB at most
    cache, plain, script = tmp_path / "shot_1-seed_1.pkl", tmp_path / "step.pt", tmp_path / "script.pt"
    cache.write_bytes(PICKLES[name])
    plain.write_bytes(archive(PICKLES[name]))
    script.write_bytes(archive(PICKLES[name], script=True))
    tracemalloc.start()
    for read, path in (
        (read_reference_cache, cache),
        (reference_checkpoint.load, plain),
        (checkpoint.load, plain),
        (read_state, plain),
        (read_state, script),
        (read_state, cache),
    ):
        with pytest.raises((UserError, WeightsError)):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


def test_what_python_pickles_is_read_as_python_reads_it():
    shared = ["twice", 2**63]
    value = {
        "numbers": [0, 255, 70_000, -5, 1.5, True, False, None, 2**40],
        "text": ["", "ü" * 300, "\ud800"],
        "bytes": [b"bytes", bytearray(b"more")],  # of which older protocols make calls
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,))),
        ("a", 1): OrderedDict(b=[{}, set(), {1, 2}]),
        "shared": [shared, shared],
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        without = value if protocol > 4 else {k: v for k, v in value.items() if k not in ("bytes", ("a", 1))}
        file = io.BytesIO(pickle.dumps(without, protocol) + b"rest")
        read = InertUnpickler(file).load()
        assert read == without and file.read() == b"rest"
        assert read["shared"][0] is read["shared"][1]


def test_objects_are_placeholders_with_their_state():
    read = InertUnpickler(io.BytesIO(pickle.dumps([random.Random(1), ValueError("x"), print]))).load()
    assert isinstance(read[0], InertObject) and not isinstance(read[0], random.Random)
    assert all(isinstance(one, InertObject | inert_pickle.InertClass) for one in read)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_both_formats_are_those_of_torch(tmp_path, legacy):
    base = torch.arange(12.0).view(3, 4)
    value = OrderedDict(a=base, t=base.t(), part=base[1:, 2:], half=base.half(), none=torch.empty(0, 3))
    value["module"] = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = read_archive(tmp_path / "x.pt")
    assert list(read) == list(value)
    for name, tensor in value.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_storages_and_copies_are_bounded_by_the_file(tmp_path):
    """Views of one storage: thousands of copies of it were gigabytes from a file of megabytes."""
    path, base = tmp_path / "x.pt", torch.zeros(1000, 1000)
    torch.save([base.t()[:, i:] for i in range(3)], path)
    assert len(read_archive(path)) == 3
    torch.save([base.t()[:, i % 7 :] for i in range(500)], path)
    with pytest.raises(pickle.UnpicklingError, match="share their storages too often"):
        read_archive(path)


def test_every_damaged_byte_of_the_old_format_is_an_exception_or_harmless(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(5.0), "b": [1, "x"]}, path, _use_new_zipfile_serialization=False)
    whole, chosen = path.read_bytes(), random.Random(3)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] = chosen.randrange(256)
        path.write_bytes(damaged)
        try:
            read_archive(path)
        except Exception as error:  # whatever it is, its callers make a sentence of it
            assert not isinstance(error, MemoryError | RecursionError)


def test_the_opcodes_are_all_known_or_refused():
    """A new opcode of Python's would be refused, not ignored."""
    text = Path(inert_pickle.__file__).read_text("utf-8")
    refused = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert {code.name for code in pickletools.opcodes if code.name not in text} == refused
