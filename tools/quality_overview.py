"""The comparison of quality as the README has it: each model in each budget, on both data sets.

python -m tools.quality_overview    # prints the tables of tools/results/quality.json
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.quality_plan import BUDGETS, CUT_TO, DENSE, OTHER_LATENTS, REFERENCE, REFERENCE_LATENTS, criss_cross
from tools.quality_report import (
    METRICS,
    Row,
    average,
    dagger,
    groups_of,
    in_budgets,
    mean_and_interval,
    nll_of_gene_mean,
    no_better,
    number,
)

KEPT = Path(__file__).with_name("results") / "quality.json"
SECONDS = "seconds"
HEADS = {SECONDS: SECONDS, "nll": "NLL", "correlation_within_gene": "correlation", "label_transfer": "label transfer"}
WHOLE_CELLS = (*(criss_cross(latents) for latents in sorted((REFERENCE_LATENTS, *OTHER_LATENTS))), DENSE)
Key = tuple[str, str, int | None]  # budget, model, the most visible tokens it was judged with


def main() -> None:
    result = json.loads(KEPT.read_text())
    print(f"{whole_cells(result)}\n\n{cut_contexts(result)}")


def whole_cells(result: dict[str, Any]) -> str:
    """Baselines, then budget by budget the models that read whole cells, in training and when they were judged."""
    datasets = result["datasets"].values()
    baselines = dict.fromkeys(name for known in datasets for name in known["baselines"])
    keys = [(budget, model, None) for budget in BUDGETS for model in WHOLE_CELLS]
    return "\n".join(
        [
            *head(result, "equal in", "model"),
            *(baseline_line(result, name) for name in baselines),
            *lines(result, {key: f"{key[0]} | {key[1]}" for key in keys}),
        ]
    )


def cut_contexts(result: dict[str, Any]) -> str:
    """The reference's shape, trained on n visible tokens of a cell, and judged with n and with all."""
    titles = {
        (budget, f"{REFERENCE}, n = {n:,}", judged_on): f"{budget} | {n:,} | {'all' if judged_on is None else f'{n:,}'}"
        for budget in BUDGETS
        for n in CUT_TO
        for judged_on in (n, None)
    }
    return "\n".join([*head(result, "equal in", "n in training", "n when judged"), *lines(result, titles)])


def columns(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(data set, what of it). Label transfer where there are labels."""
    return [
        (dataset, column)
        for dataset, known in result["datasets"].items()
        for column in (SECONDS, *METRICS)
        if column != "label_transfer" or known["facts"]["labels"] is not None
    ]


def head(result: dict[str, Any], *first: str) -> list[str]:
    titles = [*first, *(f"{dataset}: {HEADS[column]}" for dataset, column in columns(result))]
    return [line(titles), f"|{'---|' * len(titles)}"]


def baseline_line(result: dict[str, Any], name: str) -> str:
    scores = {dataset: known["baselines"].get(name, {}) for dataset, known in result["datasets"].items()}
    return line([f" | {name}", *(number(scores[dataset].get(column)) for dataset, column in columns(result))])


def lines(result: dict[str, Any], titles: dict[Key, str]) -> list[str]:
    """One for each key that some data set has."""
    found = {}
    for key in titles:
        groups = {dataset: rows_for(key, result["rows"], dataset) for dataset in result["datasets"]}
        if any(groups.values()):
            found[key] = [cell(result, groups[dataset], dataset, column) for dataset, column in columns(result)]
    return [line([titles[key], *cells]) for key, cells in found.items()]


def rows_for(key: Key, rows: Iterable[Row], dataset: str) -> list[Row]:
    """One for each seed."""
    budget, *wanted = key
    groups = groups_of(row for row in in_budgets(rows) if row["dataset"] == dataset)
    return next((group for (model, equal, n), group in groups.items() if [model, n] == wanted and budget in equal), [])


def cell(result: dict[str, Any], rows: list[Row], dataset: str, column: str) -> str:
    if not rows:
        return ""
    found = average(rows, column)
    if column == SECONDS:
        about = "" if rows[0]["trained_on"] is None else "≈ "
        return f"{about}{found['mean']:,.0f}" if found else ""
    of_gene_mean = nll_of_gene_mean(result["datasets"][dataset])
    return mean_and_interval(found) + dagger(column == "nll" and no_better(rows, of_gene_mean))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
