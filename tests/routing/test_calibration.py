"""Thresholds from traffic, for a wanted share or quality, and the calibration file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.calibration import (
    BadCalibration,
    ScoredPrompt,
    calibration,
    curve,
    for_quality,
    for_shares,
    load,
    qualities,
    save,
)

scores = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def rows(*values: float) -> list[ScoredPrompt]:
    return [ScoredPrompt(value) for value in values]


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=60, unique=True), share=st.floats(0, 1))
def test_the_share_is_met_to_the_nearest_call(values: list[float], share: float) -> None:
    point = for_shares(rows(*values), [1, 10], [share])

    above = sum(value >= point.thresholds[1] for value in values)
    assert above == round(point.shares[1] * len(values))
    # Scores a rounding error apart have no room for a threshold between them.
    close = min((b - a for a, b in zip(sorted(values), sorted(values)[1:], strict=False)), default=1)
    if close > 1e-9 and max(values) < 1 - 1e-9 and min(values) > 1e-9:
        assert abs(above - share * len(values)) <= 0.5 + 1e-9


@given(values=scores, shares=st.lists(st.floats(0, 0.25), min_size=3, max_size=3))
def test_thresholds_of_many_tiers_ascend_and_shares_add_up(values: list[float], shares: list[float]) -> None:
    point = for_shares(rows(*values), [1, 2, 4, 8], shares)

    assert list(point.thresholds) == sorted(point.thresholds)
    assert all(0 <= mark <= 1 for mark in point.thresholds)
    assert sum(point.shares) == pytest.approx(1)


def test_equal_scores_are_not_separated() -> None:
    point = for_shares(rows(0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9), [1, 10], [0.3])

    assert point.shares == (0.875, 0.125)


def test_a_wanted_quality_gives_the_cheapest_point_that_reaches_it() -> None:
    """The two prompts that only the large tier gets right score highest, except one that none gets right."""
    labelled = [
        ScoredPrompt(0.1, (1, 1)),
        ScoredPrompt(0.2, (1, 1)),
        ScoredPrompt(0.6, (0, 1)),
        ScoredPrompt(0.7, (0, 0)),
        ScoredPrompt(0.8, (0, 1)),
    ]
    points = curve(labelled, [1, 10])

    assert for_quality(points, 0.5).shares[1] == pytest.approx(0.2)
    assert for_quality(points, 1.0).shares[1] == pytest.approx(0.6)
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    assert points[0].recovered == 0
    assert points[-1].recovered == 1


def test_three_tiers_are_chosen_among_by_quality_and_cost() -> None:
    """The middle tier gets all but the hardest right, so the largest tier is rarely worth its cost."""
    labelled = [
        *[ScoredPrompt(0.1 + place / 1000, (1, 1, 1)) for place in range(10)],
        *[ScoredPrompt(0.5 + place / 1000, (0, 1, 1)) for place in range(10)],
        *[ScoredPrompt(0.9 + place / 1000, (0, 0, 1)) for place in range(10)],
    ]
    best = for_quality(curve(labelled, [1, 4, 20]), 1.0)

    assert best.shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    cheaper = for_quality(curve(labelled, [1, 4, 20]), 0.5)
    assert cheaper.shares == pytest.approx((2 / 3, 1 / 3, 0), abs=0.34)
    assert cheaper.shares[2] == 0, "half of the gap is recovered without the largest tier"


def test_a_wanted_quality_without_labels_is_an_error_that_names_them() -> None:
    with pytest.raises(BadCalibration, match="small_ok and large_ok"):
        for_quality(curve(rows(0.1, 0.9), [1, 10]), 0.9)


def test_labels_are_read_by_the_tiers_names() -> None:
    assert qualities({"small_ok": True, "large_ok": 0.5}, ["small", "large"]) == (1.0, 0.5)
    assert qualities({"prompt": "x"}, ["small", "large"]) == ()
    with pytest.raises(BadCalibration, match="all of small_ok, large_ok"):
        qualities({"small_ok": 1}, ["small", "large"])
    with pytest.raises(BadCalibration, match="0 to 1"):
        qualities({"small_ok": 1, "large_ok": 7}, ["small", "large"])


def test_partly_labelled_traffic_is_rejected() -> None:
    with pytest.raises(BadCalibration, match="some rows have labels"):
        curve([ScoredPrompt(0.1, (1, 1)), ScoredPrompt(0.2)], [1, 10])


@given(values=scores, share=st.floats(0, 1))
def test_a_file_returns_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], share: float
) -> None:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    traffic = rows(*values)
    made = calibration(["small", "large"], for_shares(traffic, [1, 10], [share]), traffic, scorer="abc")

    save(made, path)
    read = load(path)

    assert read.tiers == made.tiers
    assert read.scorer == "abc"
    assert read.thresholds == pytest.approx(made.thresholds, abs=1e-6)
    assert len(read.quantiles) == 101


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "damaged"),
        ("[]", "not a calibration"),
        ('{"kind": "calibration", "format": 99}', "format 99"),
        ('{"kind": "calibration", "format": 1}', "damaged"),
        (
            '{"kind": "calibration", "format": 1, "tiers": [], "scorer": "", "rows": 1e999, "quantiles": []}',
            "damaged",
        ),
        ("[" * 100_000, "damaged"),
    ],
)
def test_the_error_for_an_unusable_file_states_the_problem(
    tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)

    with pytest.raises(BadCalibration, match=complaint):
        load(path)


def test_descending_thresholds_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    tiers = [{"name": name, "threshold": mark, "share": 0.3} for name, mark in [("a", 0), ("b", 1), ("c", 0)]]
    path.write_text(
        json.dumps(
            {"kind": "calibration", "format": 1, "tiers": tiers, "scorer": "", "rows": 1, "quantiles": []}
        )
    )

    with pytest.raises(BadCalibration, match="ascend"):
        load(path)
