"""The published numbers agree with themselves: averages, harmonic means, and marks on what cannot be checked."""

from __future__ import annotations

import pytest

from cocoop_fast.data import REGISTRY
from cocoop_fast.protocols.protocol import IMAGENET, IMAGENET_VARIANTS, PROTOCOLS, TRANSFER_SETS
from cocoop_fast.protocols.published import published_results, published_setting

NUMBERS = published_results()
ROUNDING = 0.005 + 1e-9  # of a number with two decimals
METHODS = ("zeroshot", "coop", "cocoop")


def value(*key):
    return NUMBERS[key].value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", ["base", "new"])
def test_the_eleven_rows_have_the_published_average(method, metric):
    rows = [value("base2new", name, method, metric) for name in (IMAGENET, *TRANSFER_SETS)]
    # The average was taken before rounding, and the rows are rounded: two roundings.
    assert abs(sum(rows) / 11 - value("base2new", "average", method, metric)) <= 2 * ROUNDING


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["average", IMAGENET, *TRANSFER_SETS])
def test_h_is_the_harmonic_mean(method, dataset):
    base, new, h = (value("base2new", dataset, method, metric) for metric in ("base", "new", "h"))
    assert abs(2 * base * new / (base + new) - h) <= 2 * ROUNDING


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_the_ten_targets_have_the_published_average(method):
    rows = [value("cross-dataset", name, method, "accuracy") for name in TRANSFER_SETS]
    assert abs(sum(rows) / 10 - value("cross-dataset", "average", method, "accuracy")) <= 2 * ROUNDING


def test_the_paper_s_text():
    """Section 4.1: CoCoOp raises new classes from CoOp's 63.22 to 71.69; Table 1's averages."""
    assert value("base2new", "average", "coop", "new") == 63.22
    assert value("base2new", "average", "cocoop", "new") == 71.69


def test_what_nothing_checks_is_marked():
    unchecked = {key for key, number in NUMBERS.items() if not number.checked}
    assert {key for key in NUMBERS if key[0] == "domain-generalization"} <= unchecked
    assert {key for key in NUMBERS if key[3] == "all"} <= unchecked
    assert {("cross-dataset", IMAGENET, method, "accuracy") for method in ("coop", "cocoop")} <= unchecked
    assert len(unchecked) == 15 + 3 + 2
    for key in unchecked:
        assert "look" in NUMBERS[key].source or "nothing checks" in NUMBERS[key].source
    # The source model of Tables 2 and 3 is the same.
    for method in ("coop", "cocoop"):
        assert value("cross-dataset", IMAGENET, method, "accuracy") == value(
            "domain-generalization", IMAGENET, method, "accuracy"
        )


def test_every_number_has_a_source_and_a_place_in_a_table():
    assert "CVPR 2022" in published_setting()
    for (protocol, dataset, method, metric), number in NUMBERS.items():
        known = {PROTOCOLS[protocol].source, *PROTOCOLS[protocol].datasets, "average"}
        assert dataset in known and method in METHODS
        assert metric in (("base", "new", "h", "all") if protocol == "base2new" else ("accuracy",))
        assert number.source and 0 < number.value < 100


def test_the_data_sets_can_be_named():
    assert {IMAGENET, *TRANSFER_SETS, *IMAGENET_VARIANTS} <= set(REGISTRY)
