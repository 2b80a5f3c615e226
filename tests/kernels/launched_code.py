"""Prints, as JSON, what the machine code of a step's launches on an H100 has. Run by test_machine_code.py."""

from __future__ import annotations

import json
import os
import tempfile

import kernel_bounds

CLASSES, BATCH = 20, 2


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = [
            {
                "kernel": one.kernel,
                "loads": one.code.widths("LDG"),
                "stores": one.code.widths("STG"),
                "tensor cores": one.code.count("HMMA"),
                "local": one.code.count("LDL") + one.code.count("STL"),
                "instructions": one.code.issued(),
                "warps": one.warps,
                "bytes": one.nbytes,
                "issue": kernel_bounds.bound(one, "H100").issue,
                "bandwidth": kernel_bounds.bound(one, "H100").bandwidth,
            }
            for one in kernel_bounds.launches_of_step(CLASSES, BATCH, "sm_90")
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
