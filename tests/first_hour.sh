#!/usr/bin/env bash
# What a newcomer does in the first hour, in an environment where `pip install -e .` was run: tests/first_hour.sh [PYTHON [STEP...]].
# Stops at the first thing that fails. What needs a file or program that is not here is left out, and said.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-$repository/.venv/bin/python}
bin=$(dirname "$python")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # where nothing is called cocoop_fast

at_most() { # at_most LIMIT VALUE WHAT
    "$python" -c 'import sys; sys.exit(float(sys.argv[2]) > float(sys.argv[1]))' "$1" "$2" ||
        { echo "$3: $2, at most $1 is allowed"; return 1; }
    echo "$3: $2 (at most $1)"
}

cpu() { # cpu COMMAND...: seconds of processor time, the least of three runs
    "$python" - "$@" <<'PY'
import resource, subprocess, sys

def seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

found = []
for _ in range(3):
    before = seconds()
    subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
    found.append(seconds() - before)
print(f"{min(found):.2f}")
PY
}

three_lines() { # the install is what this runs in
    "$bin/cocoop-fast" train --epochs 1 --shots 2 --compare zeroshot --output-dir run -q
    (cd "$repository" && "$python" -m pytest benchmarks/ --benchmark-only --collect-only -q | tail -1)
    sed -n '/^```python$/,/^```$/p' "$repository/README.md" | sed '1d;/^```$/,$d' >snippet.py
    "$python" snippet.py
}

save_and_load() {
    { cat snippet.py; cat <<'PY'; } >saved.py
torch.save(model.prompt_learner.state_dict(), "learned.pt")
again = CustomCLIP(cfg, ["digit six", "digit nine"], load_demo_clip())
again.prompt_learner.load_state_dict(torch.load("learned.pt"))
again.prompt_learner.eval()
image = torch.rand(2, 3, 32, 32)
model.prompt_learner.eval()
assert torch.equal(model(image), again(image))
PY
    "$python" saved.py
}

types() { # types [PYTHON [LINE...]]: nothing is wrong in snippet.py, each mistake is found: the checker sees the types, not `Any`
    local interpreter=${1:-$python} mistakes=$(($# > 1 ? $# : 1)) found=reportAssignmentType
    local checker=("$python" -m pyright --pythonpath "$interpreter")
    timeout 60 "${checker[@]}" --version >/dev/null 2>&1 || { checker=("$python" -m mypy --python-executable "$interpreter") found='\[assignment\]'; }
    printf '%s\n' '' 'import cocoop_fast.kernels.variants' 'mistake: int = model.set_classnames(["digit six"])' "${@:2}" |
        cat snippet.py - >typed.py
    "${checker[@]}" snippet.py
    "${checker[@]}" typed.py >told || true
    (($(grep -c "$found" told) == mistakes)) && ! grep -qi 'import.*not.*found\|could not be resolved' told || { cat told; return 1; }
}

wheel_types() { # the same of a wheel, in an environment that has all else from this one. A name added to it tells it from the editable one
    mkdir source
    tar -C "$repository" -c --exclude=*.so --exclude=__pycache__ \
        {pyproject.toml,setup.py,MANIFEST.in,LICENSE,README.md,cocoop_fast,kernels,csrc} | tar -C source -x
    env -u COCOOP_FAST_REQUIRE_EXT COCOOP_FAST_NO_EXT=1 "$python" -m pip wheel ./source --no-deps --no-build-isolation --quiet --wheel-dir wheels
    "$python" -m venv --without-pip other
    local site=(other/lib/python*/site-packages)
    "$python" -m pip install --no-deps --quiet --target "${site[0]}" wheels/*.whl
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"${site[0]}/all_else.pth"
    echo 'only_in_the_wheel: str = ""' >>"${site[0]}/cocoop_fast/kernels/variants.py"
    types other/bin/python 'another: int = cocoop_fast.kernels.variants.only_in_the_wheel'
}

offline() { # one sentence, within ten seconds of what loading torch and open_clip takes
    local cut=()
    unshare --net true 2>/dev/null && cut=(unshare --net)
    HF_HOME=$work/hub HF_ENDPOINT=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9 \
        timeout 200 "${cut[@]}" "$python" - 2>told >took <<'PY' || { cat told; return 1; }
import time

import open_clip
import cocoop_fast.experiments
from cocoop_fast import cli

start = time.monotonic()
assert cli.run(["train", "--model", "ViT-B/16", "--pretrained", "openai", "--output-dir", "off"]) in (1, 2)
print(time.monotonic() - start)
PY
    (($(grep -c '^error:' told) == 1)) && ! grep -q Traceback told || { cat told; return 1; }
    at_most 10 "$(tail -1 took)" "seconds to the sentence that there is no network"
}

paper() {
    local browser name
    for name in chromium chromium-browser google-chrome; do browser=$(command -v "$name") && break; done
    [[ -n ${browser:-} ]] || { echo "no Chromium: the report is not printed"; return; }
    "$bin/cocoop-fast" report run -q --images 20
    timeout 100 "$browser" --headless --no-sandbox --disable-gpu --print-to-pdf=page.pdf "file://$work/run/report/report.html" 2>/dev/null
    "$python" - <<'PY'
import re
from pypdf import PdfReader

text = " ".join(" ".join(page.extract_text() for page in PdfReader("page.pdf").pages).split())
page = open("run/report/report.html", encoding="utf-8").read()
headings = [re.sub("<.*?>", "", found) for found in re.findall(r"<h[23].*?>(.*?)</h[23]>", page)]
missing = [one for one in headings if one not in text]
assert len(headings) > 7 and not missing, (headings, missing)
print(f"{len(headings)} headings of the report are on paper")
PY
}

start_up() {
    at_most 0.5 "$(cpu "$bin/cocoop-fast" --help)" "seconds of --help"
    local torch ours
    torch=$(cpu "$python" -c 'import torch, open_clip')
    ours=$(cpu "$python" -c 'import cocoop_fast')
    at_most "$("$python" -c "print(1.15 * $torch)")" "$ours" "seconds of import cocoop_fast, whose names load torch when they are asked for"
}

# Those up to `paper` build on the first.
steps=(three_lines save_and_load types wheel_types offline paper start_up)
(($# < 2)) || steps=("${@:2}")
for step in "${steps[@]}"; do
    echo "--- $step"
    "$step"
done
