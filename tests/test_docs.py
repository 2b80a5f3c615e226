"""What the documentation says can be run, and names what there is."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core
from doc_blocks import PAGES, ROOT, arguments, blocks, command_lines, mentions, shell_lines

import cocoop_fast
from cocoop_fast import cli
from cocoop_fast.cli import configuration
from cocoop_fast.cli.reference_config import METHOD_RULES, RULES
from cocoop_fast.config import RunConfig

TUTORIAL = ROOT / "docs" / "tutorial.md"
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

# -- code blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.language == "python" for b in blocks(page))],
    ids=lambda page: page.stem,
)
def test_a_pages_blocks_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Python blocks share their names and a directory; a block of another language with a file's name is that file.

    The tutorial's commands are run as well, since its code reads what they write.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, page.name, "exec")
            if block.note != "no-run":
                exec(code, names)
        elif block.note not in ("", "no-run"):
            (tmp_path / block.note).write_text(block.text)
        elif page == TUTORIAL and block.language == "bash" and not block.note:
            for line in shell_lines(block):
                assert cli.run(arguments(line) or []) == 0, line


# -- command lines ----------------------------------------------------------------------------------------------


class Reached(BaseException):
    """A command has read its arguments, found nothing wrong, and begins its work."""


# Where the work of a command begins. Commands that are not here are stopped once their arguments are parsed; of those
# that are, options are merged and checked too, and what never comes to these lines is run to its end.
WORK = {
    # Trackers are asked for first, and need packages that need not be there.
    "train": ["cocoop_fast.experiments.experiment.run", "cocoop_fast.report.trackers.trackers"],
    "eval": ["cocoop_fast.experiments.experiment.evaluate_run"],
    "predict": [
        "cocoop_fast.experiments.predict.Predictor.from_run",
        "cocoop_fast.experiments.predict.Predictor.from_pretrained",
        "cocoop_fast.experiments.shared.load_clip",
    ],
    "run": ["cocoop_fast.protocols.cells.check_present"],
    "sweep": ["cocoop_fast.protocols.cells.check_present"],
    "bench": ["cocoop_fast.measure.problem.build_problem"],
    "plan": ["cocoop_fast.measure.this_machine.measure_cpu"],
    "datasets": [
        "cocoop_fast.data.inventory.take_inventory",
        "cocoop_fast.data.download.download",
        "cocoop_fast.data.mirror.download_from_mirror",
        "cocoop_fast.data.load_dataset",
    ],
}
PLACEHOLDERS = {"COMMAND": "train", "METHOD": "coop", "PROTOCOL": "base2new", "N": "1", "S": "1"}
FILES = {
    "names.txt": "cat\ndog\n",
    "config.yaml": "seed: 1\n",
    "vit_b16_c4_ep10_batch1_ctxv1.yaml": "OPTIM: {MAX_EPOCH: 10}\nMODEL: {BACKBONE: {NAME: ViT-B/16}}\nTRAINER: {COCOOP: {N_CTX: 4}}\n",
}

COMMANDS = [
    pytest.param(page, given, id=f"{page.stem} {' '.join(given)}")
    for page in PAGES
    for given in dict.fromkeys(tuple(arguments(line) or ()) for line in command_lines(page))
    if given
]


@pytest.mark.parametrize("page, given", COMMANDS)
def test_every_command_is_one_that_the_program_takes(page, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = {block.note: block.text for block in blocks(page) if "." in block.note}
    for name, text in {**FILES, **written}.items():
        (tmp_path / name).write_text(text)

    def reach(*args: object, **options: object) -> None:
        raise Reached

    if given[0] not in WORK:
        monkeypatch.setattr(typer.core.TyperCommand, "invoke", reach)
    for place in WORK.get(given[0], []):
        monkeypatch.setattr(place, reach)
    try:
        status = cli.run([PLACEHOLDERS.get(word, word) for word in given])
    except Reached:
        status = 0
    assert status == 0, capsys.readouterr().err


def unknown_words(mention: str) -> list[str]:
    """Commands and options in it that the program does not have."""
    words = [word for word in arguments(mention) or [] if word not in PLACEHOLDERS]
    here = typer.main.get_command(cli.app)
    while words and words[0] in getattr(here, "commands", {}):
        here = here.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in here.params for option in parameter.opts} | {"--help"}
    commands = words[:1] if isinstance(here, typer.core.TyperGroup) else []
    return [word for word in commands if not word.startswith("-")] + [
        word for word in words if word.startswith("--") and word not in known
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_that_the_text_mentions_exist(page):
    for mention in mentions(page):
        assert not unknown_words(mention), mention


def test_mistakes_in_commands_are_found(monkeypatch):
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", lambda *_: None)
    for line in (
        "cocoop-fast train --no-such-option 1",
        "cocoop-fast trian",
        "cocoop-fast datasets remove dtd",
    ):
        assert cli.run(arguments(line) or []) == 2, line
    assert cli.run(arguments("cocoop-fast train --seed 1  # a comment") or []) == 0
    assert unknown_words("cocoop-fast train --no-such-option") == ["--no-such-option"]
    assert unknown_words("cocoop-fast trian") == ["trian"]
    assert unknown_words("cocoop-fast datasets check NAME --root DIR") == []


def test_the_program_is_found_within_a_line():
    assert arguments("CUDA_VISIBLE_DEVICES=0 cocoop-fast eval RUN | tail") == ["eval", "RUN"]
    assert arguments("torchrun --nproc-per-node 2 -m cocoop_fast train ...") == ["train"]
    assert arguments("python tools/check_plan.py --k 20") is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_scripts_with_their_options_and_targets_of_make_are_there(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in command_lines(page):
        program, *words = line.partition("#")[0].split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), line
        elif program == "python" and words[0].endswith(".py"):
            script = ROOT / words[0]
            sources = [script, *(script.with_name(f"{name}.py") for name in shared_modules(script))]
            options = " ".join(source.read_text(encoding="utf-8") for source in sources)
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in options, line


def shared_modules(script: Path) -> list[str]:
    """Modules beside a script that it imports: scripts of one kind have options in common."""
    imports = re.findall(r"^(?:from|import) (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in imports if script.with_name(f"{name}.py").is_file()]


def test_every_command_is_in_the_readme():
    lines = command_lines(ROOT / "README.md")
    shown = {given[0] for given in map(arguments, lines) if given}
    assert shown == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


# -- names and links --------------------------------------------------------------------------------------------


def test_the_api_page_names_what_there_is_and_every_public_name():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == len(set(names)) > 50
    for name in names:
        home, _, short = name.rpartition(".")
        assert getattr(importlib.import_module(home), short).__doc__, name
    shown = {name.rpartition(".")[2] for name in names}
    assert set(cocoop_fast.__all__) - {"__version__"} <= shown


def test_the_pictures_are_of_the_tree_and_of_the_table_of_performance():
    """Otherwise `python tools/make_pictures.py` makes them anew."""
    for name, made in tool("make_pictures").pictures().items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == made, name


def test_the_readme_s_times_are_those_of_performance():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "images" / "step.svg").read_text(encoding="utf-8")
    assert ">10.20 s<" in picture and ">0.39 s (26.2 times faster)<" in picture
    assert readme.count("0.39 s") == 3 and "takes 10.2 s dense" in readme


@pytest.mark.slow
def test_the_site_builds_strictly_and_has_the_docstrings(tmp_path):
    pytest.importorskip("mkdocstrings", reason="of the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "sharing every row that is shared" in page and ":class:" not in page
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'src="images/tree.svg"' in start and 'href="tutorial/"' in start


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_fields_is_complete_and_true():
    documented = dict(re.findall(r"^\| `([a-z_.]+)` \| `?([^|`]*?)`? \|", CONFIGURATION, re.MULTILINE))
    assert set(documented) == set(configuration.field_names())
    for name, shown in documented.items():
        value = RunConfig()
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            assert shown == "none", name
        elif isinstance(value, float):
            assert float(shown) == value, name
        else:
            assert shown == str(value).lower() or shown == str(value), name


def test_every_key_of_the_reference_is_documented():
    for key in RULES:
        assert f"`{key}`" in CONFIGURATION, key
    for key in METHOD_RULES:
        assert re.search(rf"`TRAINER\.(COCOOP|\*)\.{key}`", CONFIGURATION), key


def _anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")
        ):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page.name}: {target}#{anchor}"


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
