"""MATLAB files, which two data sets keep their labels in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cocoop_fast.errors import UserError

T = TypeVar("T")


def read_mat(path: Path, variable: str, convert: Callable[[Any], T]) -> T:
    """One variable of a MATLAB file.

    Args:
        variable: its name.
        convert: from SciPy's nested arrays to plain values.

    Raises:
        UserError: it cannot be read, or does not hold what ``convert`` expects.
    """
    from scipy.io import loadmat  # half a second to import, and only two data sets need it

    try:
        return convert(loadmat(path)[variable])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.", exit_status=1) from error
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"{path} does not hold the variable {variable!r} as the data set's authors wrote it; download it again.",
            exit_status=1,
        ) from error
