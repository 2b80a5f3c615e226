"""Few-shot caches as the reference pickles them: objects of a class that lives in Dassl, with absolute paths."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cocoop_fast.data import Sample

_MODULE = "dassl.data.datasets.base_dataset"


def write_reference_cache(
    path: Path,
    images: str,
    train: Iterable[Sample],
    val: Iterable[Sample] | None,
    *,
    separator: str = "/",
    protocol: int = pickle.HIGHEST_PROTOCOL,
) -> None:
    """Pickle ``{"train": [Datum, ...], "val": [Datum, ...]}``; ``val`` is left out if it is ``None``."""
    datum = type("Datum", (), {"__module__": _MODULE})

    def objects(samples: Iterable[Sample]) -> list[Any]:
        made = []
        for sample in samples:
            one = datum()
            source = str(sample.source).replace("/", separator)
            one.__dict__.update(
                _impath=f"{images}{separator}{source}",
                _label=sample.label,
                _domain=0,
                _classname=sample.classname,
            )
            made.append(one)
        return made

    values = {"train": objects(train)} | ({} if val is None else {"val": objects(val)})
    parents = [".".join(_MODULE.split(".")[:i]) for i in range(1, 5)]
    modules = {name: types.ModuleType(name) for name in parents}
    modules[_MODULE].Datum = datum  # type: ignore[attr-defined]
    sys.modules.update(modules)  # pickle looks the class up
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(values, protocol=protocol))
    finally:
        for name in parents:
            del sys.modules[name]
