"""The first hour on a GPU: run every GPU test, measure everything, and write it down as it comes.

    python tools/run_gpu_report.py                              # gpu_report.md and gpu_report.jsonl, about an hour
    python tools/run_gpu_report.py --output h200.md --only tower --only plan
    python tools/run_gpu_report.py --interpret                  # without a GPU: each section in a tiny size

Each section (tools/gpu_report_sections.py has them) is a process of its own with a time limit. What it finds is appended
to the .jsonl file at once, a line a record, and to the report when it ends: a crash or a limit costs the rest of that section
and nothing else. Results are compared with torch's own before they are timed.

With --interpret Triton's kernels run in its interpreter on the CPU: it shows that every section runs, and its times mean
nothing. Exit status 1 if a section failed or a test did (the report is written all the same), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]


def run_section(name: str, command: Sequence[str], limit: float, records: Path, environment: Record) -> str:
    """Run a section's process; how it ended, "" if well.

    Args:
        name: of the section.
        command: writes records to the path in GPU_REPORT_RECORDS.
        limit: seconds, after which it and all that it started are killed.
        records: what is appended to.
        environment: of the process.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**environment, "GPU_REPORT_RECORDS": str(records)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ending = f"stopped at its limit of {limit:g} seconds; what it found until then stands"
    else:
        last = [line for line in output.splitlines() if line.strip()][-3:]
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        ending = f"ended with {ended}: {' / '.join(last)}" if process.returncode else ""
    append(records, {"section": name, "seconds": round(time.perf_counter() - began, 1), "ending": ending})
    return ending


def append(records: Path, record: Record) -> None:
    """A line of the file, whole or not at all: a process may be killed at any time."""
    with records.open("ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def read_section(records: Path, name: str) -> list[Record]:
    """The records of a section."""
    found = []
    for line in records.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the end of a process that was killed
            continue
        if record.get("section") == name:
            found.append(record)
    return found


def markdown(title: str, found: Sequence[Record]) -> str:
    """A section of the report: consecutive rows of the same columns are a table, notes are lines."""
    parts, table = [f"## {title}"], []  # type: ignore[var-annotated]

    def close() -> None:
        if table:
            head = list(table[0])
            lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in table)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            table.clear()

    for record in found:
        row = record.get("row")
        if row is None or (table and list(row) != list(table[0])):
            close()
        if row is not None:
            table.append(row)
        elif "note" in record:
            parts.append(record["note"])
        elif "seconds" in record:
            said = f"**This section {record['ending']}**" if record["ending"] else "Whole"
            parts.append(f"{said}, {record['seconds']} seconds.")
    close()
    return "\n\n".join(parts) + "\n\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main() -> int:
    import gpu_report_sections as report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_report.md"), help="where the report goes")
    parser.add_argument("--only", action="append", choices=report.SECTIONS, help="sections; repeatable")
    parser.add_argument("--skip", action="append", choices=report.SECTIONS, default=[], help="likewise")
    parser.add_argument("--interpret", action="store_true", help="without a GPU, in tiny sizes")
    options = parser.parse_args()
    environment = dict(os.environ)
    folders = (str(ROOT), str(ROOT / "tools"), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    if options.interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "GPU_REPORT_INTERPRET": "1"}
    elif not report.has_gpu():
        print(
            "run_gpu_report: torch finds no GPU with a working driver here (--interpret goes without)",
            file=sys.stderr,
        )
        return 2
    records = options.output.with_suffix(".jsonl").absolute()
    records.write_text("")
    title = "# GPU report" + (", interpreted: no time in it means anything" if options.interpret else "")
    options.output.write_text(title + "\n\n", encoding="utf-8")
    failed = False
    for name, section in report.SECTIONS.items():
        if name in options.skip or (options.only and name not in options.only):
            continue
        print(f"{name} ...", file=sys.stderr)
        command = [sys.executable, str(ROOT / "tools" / "gpu_report_sections.py"), name]
        ending = run_section(name, command, section.limit, records, environment)
        failed |= bool(ending)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(markdown(section.title, read_section(records, name)))
    print(f"{options.output} and {records} are written", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
