"""Amounts with a unit, as people read them."""

import pytest

from cocoop_fast.readable import readable_bytes, readable_flops, readable_time


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
