"""The README's tables of the comparison of quality."""

import json

from tests.tools.quality_results import CUT, GENE_MEAN, a_result, a_row, rows_of_three_seeds
from tools.quality_overview import KEPT, cut_contexts, whole_cells
from tools.quality_plan import DENSE, FLOPS, REFERENCE, STEPS
from tools.quality_report import report_text


def body(table: str) -> list[str]:
    return table.splitlines()[2:]


def test_each_budget_has_the_models_whose_training_serves_it_after_the_baselines() -> None:
    named = [tuple(line.split(" | ")[:2]) for line in body(whole_cells(a_result(rows_of_three_seeds())))]
    both = (REFERENCE, DENSE)
    budgets = [(f"| {budget}", model) for budget in ("steps", "FLOPs", "time") for model in both]
    assert named == [("| ", "gene mean"), *budgets]


def test_scores_are_means_with_their_intervals_over_seeds() -> None:
    rows = [a_row(REFERENCE, (STEPS,), seed, nll=nll) for seed, nll in enumerate((0.80, 0.82, 0.84))]
    half = 4.302653 * 0.02 / 3**0.5  # Student's t of two degrees of freedom
    assert body(whole_cells(a_result(rows)))[1] == (
        f"| steps | {REFERENCE} | 30 | 0.8200 ± {half:.4f} | 0.4000 ± 0.0000 |"
    )


def test_a_model_no_better_than_the_gene_mean_is_marked_at_its_nll() -> None:
    rows = [a_row(REFERENCE, (STEPS,), 0), a_row(DENSE, (FLOPS,), 0, nll=GENE_MEAN)]
    [reference, dense] = body(whole_cells(a_result(rows)))[1:]
    assert "†" not in reference
    assert dense == "| FLOPs | dense | 30 | 0.9500 † | 0.4000 |"


def test_label_transfer_has_a_column_where_there_are_labels() -> None:
    result = a_result([a_row(REFERENCE, (STEPS,), 0, label_transfer=0.7)])
    assert "label transfer" not in whole_cells(result)
    result["datasets"]["pbmc3k"]["facts"]["labels"] = "cell_type"
    assert "| pbmc3k: label transfer |" in whole_cells(result)
    assert body(whole_cells(result))[1].endswith("| 0.7000 |")


def test_cut_contexts_are_told_apart_by_what_they_were_judged_with_and_their_seconds_are_marked_as_scaled() -> None:
    table = cut_contexts(a_result(rows_of_three_seeds()))
    assert body(table) == [
        "| steps | 500 | 500 | ≈ 30 | 0.9000 ± 0.0000 | 0.4000 ± 0.0000 |",
        "| steps | 500 | all | ≈ 30 | 0.8500 ± 0.0000 | 0.4000 ± 0.0000 |",
    ]
    assert CUT not in whole_cells(a_result(rows_of_three_seeds()))


def test_trainings_at_other_learning_rates_are_in_no_table() -> None:
    rows = rows_of_three_seeds()
    others = [a_row(REFERENCE, (), 0, nll=0.1), a_row(DENSE, (), 0, nll=0.1)]
    assert whole_cells(a_result(rows + others)) == whole_cells(a_result(rows))


def test_a_model_that_one_data_set_does_not_have_leaves_its_cells_empty() -> None:
    result = a_result([a_row(DENSE, (STEPS,), 0)])
    result["datasets"]["retina"] = result["datasets"]["pbmc3k"]
    assert body(whole_cells(result))[1] == "| steps | dense | 30 | 0.8000 | 0.4000 |  |  |  |"


def test_the_readme_and_the_report_say_what_the_kept_result_says() -> None:
    result = json.loads(KEPT.read_text())
    readme = (KEPT.parents[2] / "README.md").read_text()
    assert whole_cells(result) in readme
    assert cut_contexts(result) in readme
    assert KEPT.with_suffix(".md").read_text() == report_text(result, "quality.png")
