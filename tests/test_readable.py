"""Amounts with a unit, as people read them, and text that does nothing but be read."""

import json
import unicodedata

import pytest

from cocoop_fast.readable import printable, readable_bytes, readable_flops, readable_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9999, "1,000 ms"),
        (12.3, "12.3 s"),
        (3600, "60 min"),
        (9000, "2.5 h"),
        (1e6, "11.6 days"),
    ],
)
def test_times(seconds, text):
    assert readable_time(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 kB"),
        (1500, "1.5 kB"),
        (123_400_000, "123 MB"),
        (999_900_000, "1,000 MB"),
        (8e9, "8 GB"),
        (1.5e12, "1.5 TB"),
        (1.234e16, "12,340 TB"),
    ],
)
def test_bytes(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(9e5, "0.9 M"), (2.5e9, "2.5 G"), (1.23e14, "123 T"), (4e15, "4 P")]
)
def test_floating_point_operations(count, text):
    assert readable_flops(count) == text


def test_no_control_character_is_printed():
    everything = "".join(map(chr, range(0x11000)))
    shown = printable(everything)
    assert not [one for one in shown if unicodedata.category(one) in ("Cc", "Cs") and one not in "\t\n"]
    assert not [
        one
        for one in shown
        if unicodedata.bidirectional(one) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]
    shown.encode()  # halves of characters could not be


@pytest.mark.parametrize("text", ["tabby cat", "naïve 猫 🐈 a\u0301", "two\nlines\tand a tab", r"C:\\cats"])
def test_ordinary_names_stay(text):
    assert printable(text) == text


def test_what_is_shown_of_a_control_sequence():
    text = "\x1b]0;pwned\x07cat\x9b2J"
    assert printable(text) == r"\u001b]0;pwned\u0007cat\u009b2J"
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
