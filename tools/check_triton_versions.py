"""Compile the Triton kernels with each Triton of several years for each GPU, without one, and write docs/triton_versions.md.

    python tools/check_triton_versions.py                        # all variants; hours of a small machine
    python tools/check_triton_versions.py --version 3.0.0 --version 3.9.0
    python tools/check_triton_versions.py -- --widest            # arguments of compile_kernels.py; an hour of a processor

Each version is installed into a folder of its own (--folder, half a gigabyte each) and put before the installed one; torch
stays as it is, as the compiler does not use it. What is found is kept in that folder, a file a version and vendor: with
--resume what is there is not compiled again, and versions that are not asked for keep their lines.
Exit status 1 if a kernel does not compile with a version that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel_resources import UNSERVED, Resources

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "triton_versions.md"
VERSIONS = ("3.0.0", "3.1.0", "3.2.0", "3.3.1", "3.8.0", "3.9.0")
# By vendor: until Triton 3.2 a kernel keeps the first vendor's way to mark its arguments, so a process has one vendor.
TARGETS = {
    "NVIDIA": ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
    "AMD": ("gfx90a", "gfx942", "gfx1100"),
}
# Until 3.3 Triton runs ROCm's linker; it makes a file that can be loaded of machine code that is whole before.
STAND_IN_LINKER = """#!/bin/sh
[ "$1" = --version ] && echo "copies" && exit
cp "$4" "$6"
"""
INTRODUCTION = """# Versions of Triton

Every cell says how many forms of the Triton kernels were compiled with that version for that GPU, without the GPU, to
machine code as a launch compiles them, and behind a colon what was wrong with how many of them: *fail* (the compiler refuses
or breaks), *no bf16* (likewise, of that type on sm_75, whose hardware has none), *shared* (more shared memory than the GPU
has), *spill* (registers in local memory: right and slow). "none" is a GPU that this Triton compiles nothing for, be it an
addition. Where a machine has no ROCm linker, AMD's machine code of the Tritons before 3.4 is assembled and
not linked. `--widest` stands for the widest rows of each kernel and type, the likeliest to spill.

This page is generated: `COMMAND`.
"""
Found = dict[tuple[str, str], list[dict[str, Any]]]  # version, target -> what compile_kernels.py found


def install(version: str, folder: Path) -> Path:
    """The folder of this Triton, installed if it is not there."""
    target = folder / f"triton-{version}"
    if not (target / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return target


def linker(folder: Path) -> str:
    """An ld.lld for the Tritons that run one."""
    found = shutil.which("ld.lld") or next(Path("/opt").glob("rocm*/llvm/bin/ld.lld"), None)
    if found is None:
        found = folder / "ld.lld"
        found.write_text(STAND_IN_LINKER)
        found.chmod(0o755)
    return str(found)


def compile_with(version: str, vendor: str, folder: Path, arguments: Sequence[str]) -> Path:
    """Compile for all GPUs of a vendor, with these arguments of compile_kernels.py; the file with what was found.

    Raises:
        RuntimeError: compile_kernels.py itself failed, such as in importing the kernels.
    """
    path = folder / f"triton-{version}-{vendor}.json"
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), "--json", str(path), *arguments]
    command += [argument for target in TARGETS[vendor] for argument in ("--target", target)]
    folders = (install(version, folder), ROOT, ROOT / "tools")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment["TRITON_HIP_LLD_PATH"] = linker(folder)
    path.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not path.exists() or f"with Triton {version}" not in result.stdout:
        path.unlink(missing_ok=True)
        raise RuntimeError(f"Triton {version}, {vendor}: {result.stderr.strip()[-1000:]}")
    return path


def read(folder: Path) -> Found:
    """All that lies in the folder."""
    found: Found = {}
    for version in VERSIONS:
        for vendor in TARGETS:
            path = folder / f"triton-{version}-{vendor}.json"
            for one in json.loads(path.read_text()) if path.exists() else ():
                found.setdefault((version, one["target"]), []).append(one)
    return found


def judge(one: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel, in a word, or ""."""
    problem = Resources(**one).problem()
    if problem is None:
        return ""
    if one["failure"]:
        if one["failure"] == UNSERVED:
            return "none"
        return "no bf16" if (one["target"], one["dtype"]) == ("sm_75", "bf16") else "fail"
    return "spill" if problem.startswith("spills") else "shared"


def cell(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    said = [judge(one) for one in found]
    if "none" in said:
        return "none"
    wrong = [f"{said.count(word)} {word}" for word in ("fail", "no bf16", "shared", "spill") if word in said]
    return f"{len(found)}: {', '.join(wrong)}" if wrong else str(len(found))


def page(found: Found, arguments: Sequence[str] = ()) -> str:
    command = " ".join(["python tools/check_triton_versions.py", *["--"] * bool(arguments), *arguments])
    introduction = INTRODUCTION.replace("COMMAND", command)
    targets = [target for own in TARGETS.values() for target in own]
    lines = [["Triton", *targets], ["---", *["---:"] * len(targets)]]
    lines += [
        [version, *(cell(found.get((version, target), [])) for target in targets)] for version in VERSIONS
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reasons: dict[str, list[str]] = {}
    for (version, target), own in found.items():
        for one in own:
            if judge(one) == "fail":
                reason = one["failure"][:200].replace("|", "\\|")
                form = f"{one['kernel']} {one['dtype']} {one['name']}".strip()
                reasons.setdefault(f"{version} for {target}", []).append(f"{form}: {reason}")
    notes = [f"- Triton {what}: {len(own)} fail, such as {own[0]}" for what, own in reasons.items()]
    return (
        "\n".join(filter(None, (introduction, table, "\n" * bool(notes) + "\n".join(notes)))).rstrip() + "\n"
    )


def allowed(version: str) -> bool:
    """Whether pyproject.toml lets pip install this Triton."""
    bound = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return bound is None or _numbers(version) >= _numbers(bound[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="append", choices=VERSIONS, help="only this one; repeatable")
    parser.add_argument("--vendor", action="append", choices=TARGETS, help="only its GPUs; repeatable")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "triton", help="of Tritons and findings"
    )
    parser.add_argument("--resume", action="store_true", help="do not compile again what was")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="of tools/compile_kernels.py")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for version in options.version or VERSIONS:
        for vendor in options.vendor or TARGETS:
            if options.resume and (folder / f"triton-{version}-{vendor}.json").exists():
                continue
            print(f"Triton {version}, {vendor} ...", file=sys.stderr, flush=True)
            try:
                compile_with(version, vendor, folder, options.arguments)
            except RuntimeError as error:
                print(f"check_triton_versions: {error}", file=sys.stderr)
                failed = True
    PAGE.write_text(page(found := read(folder), options.arguments), encoding="utf-8")
    for (version, target), own in found.items():
        if allowed(version) and any(judge(one) == "fail" for one in own):
            print(f"Triton {version} for {target}: {cell(own)}", file=sys.stderr)
            failed = True
    print(f"{PAGE.relative_to(ROOT)} is written", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
