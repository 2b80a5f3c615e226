"""MATLAB files, which two data sets keep their labels in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cocoop_fast.data.sets import mat_to_json
from cocoop_fast.errors import UserError

T = TypeVar("T")

_MOST = 32 * 2**20  # bytes of JSON; 16,000 annotations of cars take 2 MB


def read_mat(path: Path, variable: str, convert: Callable[[Any], T]) -> T:
    """One variable of a MATLAB file, which a process of its own parses: damage can end that, but not this one.

    Args:
        variable: its name.
        convert: from nested lists, of numbers and text, and dictionaries, for structures, to what is wanted.

    Raises:
        UserError: it cannot be read, or does not hold what ``convert`` expects.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.", exit_status=1) from error
    command = [sys.executable, "-I", mat_to_json.__file__, str(path.resolve()), variable, str(_MOST)]
    one_thread = {"OPENBLAS_NUM_THREADS": "1"}  # each would reserve memory
    parsed = subprocess.run(command, capture_output=True, env={**os.environ, **one_thread}, check=False)
    try:
        if parsed.returncode:
            raise ValueError(f"the parser ended with {parsed.returncode}")
        return convert(json.loads(parsed.stdout))
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} does not hold the variable {variable!r} as the data set's authors wrote it; download it again.",
            exit_status=1,
        ) from error
