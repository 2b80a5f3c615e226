#!/usr/bin/env bash
# The tests of the C++ operations under AddressSanitizer and UndefinedBehaviorSanitizer.
# Builds the extension into a temporary folder; the one that is installed stays as it is.
# Usage: tools/sanitize_ops.sh [pytest arguments]. PYTHON and CXX choose the interpreter and the compiler (GCC).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}") || { echo "sanitize: no ${PYTHON:-.venv/bin/python}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
cxx=${CXX:-g++}
asan=$("$cxx" -print-file-name=libasan.so)
ubsan=$("$cxx" -print-file-name=libubsan.so)
[[ $asan == /* && $ubsan == /* ]] || { echo "sanitize: $cxx has no shared libasan and libubsan" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The working tree but for its extension.
cp -r cocoop_fast kernels csrc tests setup.py pyproject.toml "$work/"
for name in LICENSE README.md; do [[ ! -f $name ]] || cp "$name" "$work/"; done
rm -f "$work"/cocoop_fast/_C.*

# A compiler whose last flags are ours, since setup.py's -O3 and -g0 come after CXXFLAGS. -O1: a report's stack is that
# of the source.
cat >"$work/cxx" <<END
#!/bin/sh
exec $cxx "\$@" -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
END
chmod +x "$work/cxx"
cd "$work"
CXX=$work/cxx COCOOP_FAST_CUDA=0 COCOOP_FAST_REQUIRE_EXT=1 "$python" setup.py -q build_ext --inplace >log 2>&1 || { cat log; exit 1; }

# Python and torch never free all that they allocate, so leaks are not looked for. An allocation that is too large fails, as
# it does elsewhere.
LD_PRELOAD="$asan $ubsan" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    "$python" - "${@:-tests/ops}" <<'END'
import pathlib, sys

import pytest

from cocoop_fast.ops.extensions import CPP

built = pathlib.Path(CPP.load().__file__)
assert "__asan_init" in built.read_bytes().decode("latin-1"), f"{built} is not the instrumented build"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
END
