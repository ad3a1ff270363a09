"""What the tables of the comparison say: intervals over seeds, and who is better where."""

from pathlib import Path

import pytest
from matplotlib import image
from scipy import stats

from tests.tools.quality_results import CUT, a_result, a_row, rows_of_three_seeds
from tools.quality_figure import STYLES, draw, series_of
from tools.quality_plan import BUDGETS, DENSE, FLOPS, REFERENCE, STEPS, TIME
from tools.quality_report import against_dense, interval, paired, report_text, verdict, where_worse

VALUES = [0.811, 0.798, 0.834, 0.820]


def test_the_interval_is_that_of_a_t_test() -> None:
    found = interval(VALUES)
    expected = stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found["seeds"] == 4


def test_a_single_seed_has_no_interval() -> None:
    assert interval([0.8]) == {"mean": 0.8, "low": None, "high": None, "seeds": 1}


def test_differences_are_paired_by_seed_whatever_the_order_of_rows() -> None:
    mine = [a_row(DENSE, (STEPS,), seed, nll=value) for seed, value in ((2, 0.5), (0, 0.7), (1, 0.9))]
    theirs = [a_row(REFERENCE, BUDGETS, seed, nll=value) for seed, value in ((0, 0.6), (1, 0.7), (2, 0.1), (3, 9.0))]
    found = paired(mine, theirs, "nll")
    expected = stats.ttest_rel([0.7, 0.9, 0.5], [0.6, 0.7, 0.1]).confidence_interval(0.95)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found["seeds"] == 3


def test_a_lower_loss_and_a_higher_correlation_are_better() -> None:
    below, above, around = {"low": -2, "high": -1}, {"low": 1, "high": 2}, {"low": -1, "high": 1}
    assert [verdict(d, "nll") for d in (below, above, around)] == ["better", "worse", "no different"]
    assert [verdict(d, "label_transfer") for d in (below, above, around)] == ["worse", "better", "no different"]


def test_criss_cross_is_compared_with_the_dense_model_of_the_same_budget() -> None:
    rows = {(row["budget"], row["metric"]): row for row in against_dense(rows_of_three_seeds())}
    assert {(budget, row["verdict"]) for (budget, metric), row in rows.items() if metric == "nll"} == {
        (STEPS, "worse"),
        (FLOPS, "no different"),
        (TIME, "better"),
    }
    assert rows[STEPS, "nll"]["mean"] == pytest.approx(0.06)
    assert rows[TIME, "nll"]["mean"] == pytest.approx(-0.1 / 3)
    assert {row["model"] for row in rows.values()} == {REFERENCE}, "cut contexts have no dense rival"


def test_where_criss_cross_is_worse_is_said_and_where_it_is_not_is_not() -> None:
    said = where_worse({"pbmc3k": against_dense(rows_of_three_seeds())})
    assert f"pbmc3k, {REFERENCE}, equal in steps: NLL per target" in said
    assert "equal in FLOPs" not in said
    one_seed = [row for row in rows_of_three_seeds() if row["seed"] == 0]
    assert where_worse({"pbmc3k": against_dense(one_seed)}).startswith("One seed has no interval")


def test_the_report_shows_absolute_values_and_differences_with_their_intervals() -> None:
    report = report_text(a_result(rows_of_three_seeds()), "figure.png")
    absolute, difference = stats.ttest_1samp([0.75, 0.76, 0.77], 0), stats.ttest_1samp([-0.05, -0.06, -0.07], 0)
    half = absolute.confidence_interval(0.95).high - 0.76
    ends = difference.confidence_interval(0.95)
    assert (
        f"| dense | steps | all genes | 0.7600 ± {half:.4f} | **-0.0600 ({ends.low:+.4f} to {ends.high:+.4f})** |"
        in (report)
    )
    assert f"| {CUT} | steps | n = 500 | 0.9000" in report
    assert f"| {CUT} | steps | all genes | 0.8500" in report
    assert "| gene mean | | all genes | 0.9000" in report
    assert "no label transfer" in report
    assert "65 min" in report


def test_models_that_were_judged_on_different_targets_make_no_report() -> None:
    rows = rows_of_three_seeds()
    rows[-1]["targets"] = "another digest"
    with pytest.raises(ValueError, match="pbmc3k: not all models were judged on the same targets"):
        report_text(a_result(rows), "figure.png")


def test_every_row_is_in_a_series_of_the_figure_and_no_two_series_have_a_marker_in_common() -> None:
    assert {series_of(row) for row in rows_of_three_seeds()} < STYLES.keys()
    assert len({style["marker"] for style in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_is_drawn_with_intervals_and_without(tmp_path: Path, seeds: int) -> None:
    out = tmp_path / "quality.png"
    draw(a_result([row for row in rows_of_three_seeds() if row["seed"] < seeds]), out)
    drawn = image.imread(out)
    assert drawn.std() > 0
