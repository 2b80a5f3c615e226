"""Print a variable of a MATLAB file as JSON. A program of its own: it imports nothing of cocoop_fast.

    python mat_to_json.py FILE VARIABLE MAX_BYTES

SciPy's parser believes the sizes in a file: 248 damaged bytes end the process that reads them, or take gigabytes. They
may have this process, whose memory and time are limited.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from typing import Any

_MEMORY, _SECONDS = 2 * 2**30, 60


def plain(value: Any) -> Any:
    """Nested lists of numbers and text; a structure is a dictionary."""
    names = getattr(getattr(value, "dtype", None), "names", None)
    if names and getattr(value, "ndim", 0) == 0:
        return {name: plain(value[name]) for name in names}
    if getattr(value, "ndim", 0):
        return [plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def main() -> None:
    """Print it, or end with a status that is not 0."""
    for limit, value in (("AS", _MEMORY), ("CPU", _SECONDS), ("CORE", 0)):
        with suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    from scipy.io import loadmat

    path, variable, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
    text = json.dumps(plain(loadmat(path, variable_names=[variable])[variable]))
    if len(text) > most:
        sys.exit("too much")
    print(text)


if __name__ == "__main__":
    main()
