"""Names of other people's files and classes do nothing to a terminal, nor to a drawing."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from tiny_runs import write_images

from cocoop_fast import UserError, cli
from cocoop_fast.cli import output
from cocoop_fast.cli.progress import Lines

TITLE, CLIPBOARD = "\x1b]0;pwned\x07", "\x9b2J\x1b]52;c;cHduZWQ=\x07"
HOSTILE = f"{TITLE}{CLIPBOARD}\u202ecat"


def harmless(text: str) -> str:
    """The text, which is what a terminal may be sent."""
    assert not [
        one
        for one in text
        if (ord(one) < 32 and one not in "\t\n") or 127 <= ord(one) < 160 or one == "\u202e"
    ]
    return text


def test_names_on_the_command_line(tmp_path, capsys):
    [image] = write_images(tmp_path, 1)
    assert cli.run(["predict", str(image), "--classes", f"{HOSTILE},dog", "--device", "cpu"]) == 0
    assert r"\u001b]0;pwned\u0007" in harmless(capsys.readouterr().out)
    assert cli.run(["predict", str(image), "--classes", f"{HOSTILE},dog", "--device", "cpu", "--json"]) == 0
    line = harmless(capsys.readouterr().out)
    names = {one["name"] for one in json.loads(line)["predictions"][0]["classes"]}
    assert names == {HOSTILE, "dog"}  # a program gets what it was given


def test_names_in_a_list(tmp_path, capsys):
    write_images(tmp_path / "one", 2)
    rows = ["path,classname,split", f"{HOSTILE}.png,a,train", "one/001.png,b,test"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    arguments = ["--root", str(tmp_path / "list.csv"), "-o", str(tmp_path / "out"), "--subset", "all"]
    assert cli.run(["train", "-q", "--no-compare", *arguments]) in (1, 2)
    said = harmless(capsys.readouterr().err)
    assert said.startswith("error: ") and r"\u001b]0;pwned" in said


@pytest.mark.parametrize(
    "tell",
    [
        lambda: output.say(HOSTILE),
        lambda: output.warn([HOSTILE]),
        lambda: output.teller("report", silent=False)(HOSTILE),
        lambda: output.print_table(["Name", HOSTILE], [[HOSTILE, "1"]]),
        lambda: output.print_json({HOSTILE: [HOSTILE]}),
    ],
)
def test_everything_that_is_printed(capsys, tell):
    tell()
    printed = capsys.readouterr()
    assert "pwned" in harmless(printed.out + printed.err)


def test_progress(capsys):
    import sys

    Lines(sys.stderr).on_message(HOSTILE)
    assert "pwned" in harmless(capsys.readouterr().err)


def test_errors(capsys, monkeypatch):
    def fail(*_, **__):
        raise UserError(f"The image {HOSTILE} cannot be read.")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run([]) == 2
    assert "pwned" in harmless(capsys.readouterr().err)


def test_drawings():
    pytest.importorskip("matplotlib")
    from cocoop_fast.report.style import drawing, picture
    from cocoop_fast.report.words import data_name, method_name, shorten

    with drawing(6.0) as (figure, axes):
        axes.set_yticks([0, 1], [shorten(HOSTILE), shorten(HOSTILE, 20)])
        axes.set_title(f"{method_name(shorten(HOSTILE))} on {data_name(HOSTILE)}")
        drawn = picture(figure, "name", alt="", caption="")
    ET.fromstring(harmless(drawn.svg))  # XML has no place for control characters either


ADDRESS = "https://example.org/" + "x" * 90
PROSE = "what is said of it in so many words that eighty characters are too few"


def test_a_pipe_gets_a_row_in_each_line_and_whole_addresses(capsys):
    output.print_table(["Name", "What", "From"], [["a", PROSE, ADDRESS], ["b", "", None]], left=3)
    found = capsys.readouterr().out.split("\n")
    assert found[3].split() == ["a", *PROSE.split(), ADDRESS] and found[4].split() == ["b", "-"]
    assert all(line == line.rstrip() for line in found)
    output.say(PROSE * 5)
    assert capsys.readouterr().out == f"{PROSE * 5}\n"


def test_a_terminal_gets_nothing_broken_within_a_word(monkeypatch):
    def printed(print_it, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout", Terminal())
        monkeypatch.setattr("sys.stderr", sys.stdout)
        print_it()
        return sys.stdout.getvalue()

    def table():
        output.print_table(
            ["Image", "Class", "Share"],
            [["a/b.png", "red fox", "97 %"], ["", PROSE, "3 %"], ["c.png", ADDRESS, "1 %"]],
        )

    assert printed(table).split("\n") == [
        "",
        "a/b.png",
        "  Class: red fox; Share: 97 %",
        f"  Class: {PROSE}",
        "  Share: 3 %",
        "",
        "c.png",
        "  Class:",
        f"    {ADDRESS}",
        "  Share: 1 %",
        "",
        "",
    ]
    assert len({line.find("%") for line in printed(table, 140).split("\n") if "%" in line}) == 1  # a table
    for tell in (output.say, output.note, output.teller("plan", silent=False)):
        told = printed(lambda tell=tell: tell(f"{PROSE} {ADDRESS} {PROSE}"))
        assert told.split()[-len(PROSE.split()) :] == PROSE.split() and ADDRESS in told.split("\n")
        assert all(len(line) <= 80 for line in told.split("\n") if line != ADDRESS)


def test_a_table_moves_together_before_it_is_folded_and_is_folded_before_it_is_given_up(monkeypatch):
    def printed(width):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.stdout", Terminal())
        output.print_table(["Name", "What", "N"], [["a", PROSE, "1,000"]], left=2)
        return re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).split("\n")

    whole = len(" Name") + len(PROSE) + len("1,000 ")
    for gap in (3, 2, 1):
        assert printed(whole + 2 * gap)[3] == f" a   {gap * ' '}{PROSE}{gap * ' '}1,000"
    folded = printed(whole)
    assert max(map(len, folded)) <= whole and len(folded) == 7 and folded[3].endswith("  1,000")
    assert printed(20)[:2] == ["", "a"]


def test_a_shell_can_complete_commands(monkeypatch, capsys):
    for name, value in {
        "_COCOOP_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "cocoop-fast ver",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    cli.run([])
    assert capsys.readouterr().out.split() == ["verify"]


def test_help_names_values_as_people_do(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "<path>" not in text and "|z " not in text
    assert "NAME" in text and "PATH" in text and "FILE" in text
    assert not re.search(
        r"<\w|TEXT +(Also tell|Data set)|images.classes", text
    )  # types of Python, and choices cut in two
    assert "first five classes) with the embedded CLIP" in text  # no line ends where the source's does


def test_a_group_alone_shows_its_commands(capsys):
    assert cli.run(["checkpoint"]) == 2
    told = capsys.readouterr()
    assert told.err == "error: name one of the commands.\n" and "share" in told.out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_while_libraries_load_a_terminal_has_a_word_and_a_file_none(monkeypatch, capsys):
    with output.loading():
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    with output.loading(silent=True):
        pass
    with output.loading():
        assert sys.stderr.getvalue() == "loading…"  # type: ignore[attr-defined]
    assert sys.stderr.getvalue().endswith("\r\x1b[K")  # type: ignore[attr-defined]


def test_the_word_comes_before_torch():
    """Within a second, that is; torch takes several."""
    tried = (
        "import sys; from cocoop_fast import cli; from cocoop_fast.cli import output\n"
        "def loading(**_): print('torch' in sys.modules); raise SystemExit\n"
        "output.loading = loading\n"
        "for words in ('train', 'eval x', 'predict x', 'run base2new', 'bench', 'plan', 'verify'): cli.run(words.split())"
    )
    done = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True)
    assert done.stdout == "False\n" * 7, done
