"""The comparison in tables: what was trained and what it cost, how good it is, and where criss-cross loses to dense.

Every number is a mean over seeds; intervals are Student's t at 95 % over seeds, of differences paired by seed. They
hold how much the initial weights and the order of samples matter, not which cells were held out. A model that has not
learned more than the mean of each gene is marked: comparing with it is no comparison of attention.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from scipy.stats import t as student

from cctrain.words import duration
from tools.quality_plan import BUDGETS, DENSE, GENE_MEAN, REFERENCE, STEPS, Training

Row = dict[str, Any]
LOSSES = ("nll",)
BETTER, NOT_TOLD_APART, WORSE = VERDICTS = ("better", "not told apart", "worse")
METRICS = {
    "nll": "NLL per target",
    "correlation_within_gene": "correlation within a gene",
    "label_transfer": "label transfer",
}


def interval(values: list[float]) -> dict[str, Any]:
    """mean, low, high (None for a single value) and seeds, the number of values."""
    mean, seeds = statistics.fmean(values), len(values)
    if seeds < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": seeds}
    half = float(student.ppf(0.975, seeds - 1)) * statistics.stdev(values) / seeds**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": seeds}


def groups_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seed alone, in the order of their first ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], tuple(row["equal"]), row["judged_on"]), []).append(row)
    return groups


def in_budgets(rows: Iterable[Row]) -> list[Row]:
    """Those that serve a budget. The others were trained at a learning rate of their own, and are no rival in any."""
    return [row for row in rows if row["equal"]]


def average(rows: list[Row], metric: str) -> dict[str, Any] | None:
    """None where the metric is not known."""
    values = [row[metric] for row in rows]
    return None if None in values else interval(values)


def paired(rows: list[Row], others: list[Row], metric: str) -> dict[str, Any] | None:
    """Of rows − others over the seeds that both have; None where there is none, or the metric is not known."""
    theirs = {row["seed"]: row[metric] for row in others}
    pairs = [(row[metric], theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return interval([mine - other for mine, other in pairs])


def verdict(difference: dict[str, Any], metric: str) -> str | None:
    """As far as the interval says; None without one."""
    if difference["low"] is None:
        return None
    low, high = difference["low"], difference["high"]
    if low <= 0 <= high:
        return NOT_TOLD_APART
    return BETTER if (high < 0) == (metric in LOSSES) else WORSE


def nll_of_gene_mean(known: dict[str, Any]) -> float:
    """On a data set."""
    return known["baselines"][GENE_MEAN]["nll"]


def no_better(rows: list[Row], gene_mean: float) -> bool:
    """By NLL, in one seed at least."""
    return any(row["nll"] >= gene_mean for row in rows)


def against_dense(rows: list[Row], gene_mean: float) -> list[dict[str, Any]]:
    """Each criss-cross model that was trained on whole cells, minus dense, in each budget and metric, of a data set.
    `no_better`: one of the two is no better than the gene mean, whose NLL is given."""
    whole = {key: group for key, group in groups_of(rows).items() if group[0]["trained_on"] is None}
    found = []
    for budget in BUDGETS:
        in_budget = {model: group for (model, equal, _), group in whole.items() if budget in equal}
        dense = in_budget.pop(DENSE, [])
        for model, group in in_budget.items():
            for metric in METRICS:
                difference = paired(group, dense, metric)
                if difference is not None:
                    row = {"budget": budget, "model": model, "metric": metric, **difference}
                    row["no_better"] = no_better(group, gene_mean) or no_better(dense, gene_mean)
                    found.append(row | {"verdict": verdict(difference, metric)})
    return found


def report_text(result: dict[str, Any], figure: str) -> str:
    """Markdown; `figure` is the path of the picture beside it. Raises ValueError if models of a data set were judged on
    different targets."""
    rows_of = {name: [row for row in result["rows"] if row["dataset"] == name] for name in result["datasets"]}
    gene_means = {name: nll_of_gene_mean(known) for name, known in result["datasets"].items()}
    comparisons = {name: against_dense(rows, gene_means[name]) for name, rows in rows_of.items()}
    seeds = sorted({row["seed"] for row in result["rows"]})
    seconds = {row["run"]: row["seconds"] for row in result["rows"]}
    parts = [
        "# Quality against cost",
        f"{len(seconds)} trainings (seed {', '.join(map(str, seeds))}), whose steps take "
        f"{duration(sum(seconds.values()))} on {result['machine']['cores']} cores with nothing else to do, by what a "
        "step took when it was measured. Judging, and what was interrupted, is not in it.",
        summary(comparisons),
        steps_are_not_cost(result["datasets"]),
        who_is_no_better(rows_of, gene_means),
        f"![held-out NLL against training FLOPs and seconds]({figure})",
    ]
    for name, rows in rows_of.items():
        known = result["datasets"][name]
        if {row["targets"] for row in rows} - {known["facts"]["targets_digest"]}:
            raise ValueError(f"{name}: not all models were judged on the same targets")
        compared = in_budgets(rows)
        parts += [f"## {name}", _facts(known["facts"]), _costs(compared, known), _scores(compared, known)]
        if comparisons[name]:
            parts += ["Criss-cross minus dense, by what is equal:", _comparison(comparisons[name])]
        for seed in dict.fromkeys(row["seed"] for row in rows):
            at_peaks = by_learning_rate([row for row in rows if row["seed"] == seed])
            if at_peaks:
                parts += [f"### Learning rate, seed {seed}", _learning_rates(at_peaks), _at_best_peaks(at_peaks)]
    return "\n\n".join([*parts, "## How to read this", HOW]) + "\n"


HOW = f"""\
The reference is {REFERENCE}. *Equal* says in what a model's training equals the reference's: **steps**, the same
contexts in the same order with about as many parameters; **FLOPs**, by the closed form on the contexts of the store;
**time**, by step times that were measured before, the models taking turns. **FLOPs of dense** and **time of dense** are
those that dense takes for the reference's number of steps. Seconds are steps times the median of what a step took while
the models took turns; those of cut contexts (≈) are not measured, but the reference's seconds a FLOP times their
FLOPs, so nothing is trained on these for equal time. Warm-up and decay of the learning rate follow the number of steps;
its peak is the configuration's, which is that of two layers: those of a deeper model learn at 1/√(depth / 2) of it and
slower. **Learning rate**, where it was asked for, holds the reference and dense after the reference's number of steps
at other peaks too, of one seed; these trainings are in no other table. Which peak is best is told by the same held-out
cells that judge, for both alike.

All models of a data set are judged on the same hidden counts, drawn by gene alone, at the same size factors, which come
from the counts that are not hidden. NLL is in nats, averaged within a cell, then over cells. Correlation is of log1p
counts across cells within a gene, then the mean over genes detected in over 5 % of training cells. Label transfer is
the balanced accuracy of 15 nearest training cells on held-out cells, by embeddings that saw no label. **Untrained**:
the reference with its first weights, which predict the gene mean; its label transfer is what training has to beat.
**Nearest neighbours** are those of `cctrain evaluate`, tuned on training cells. n is the most visible tokens of a
context; size factors always are of the whole cell.

Behind ± and in parentheses: 95 % t intervals over seeds, of differences paired by seed. They hold what initial weights
and the order of samples do, not what other held-out cells would; with three seeds they are wide. **Not told apart**:
the interval holds zero, which does not say that both are alike. **Bold**: zero is outside. Of twenty differences that
are none, one is expected to be bold. **†**: by NLL no better than the gene mean in one seed at least, or compared with
such a model, which says nothing of attention. Under **Learning rate**, the best of a row is bold."""


def summary(comparisons: dict[str, list[dict[str, Any]]]) -> str:
    """How often criss-cross is better and worse than dense, budget by budget, and in what it is worse."""
    judged = [(name, row) for name, rows in comparisons.items() for row in rows if row["verdict"] is not None]
    if not judged:
        return "One seed has no interval: nothing is said of which is better."
    lines = [
        "Criss-cross against dense, in how many comparisons, over all data sets, numbers of latents and scores:\n",
        f"| equal in | {' | '.join(VERDICTS)} | no comparison of attention (†) |",
        "|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        rows = [row for _, row in judged if row["budget"] == budget]
        counts = [sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS]
        if rows:
            of_no_use = sum(row["no_better"] for row in rows)
            lines.append(f"| {budget} | {' | '.join(map(str, counts))} | {of_no_use} of {len(rows)} |")
    worse = [
        f"- {name}, {row['model']}{dagger(row['no_better'])}, equal in {row['budget']}: {METRICS[row['metric']]}, "
        f"{_signed(row)}"
        for name, row in judged
        if row["verdict"] == WORSE
    ]
    return "\n".join([*lines, *(["\nIt is worse here:\n"] if worse else []), *worse])


def steps_are_not_cost(datasets: dict[str, dict[str, Any]]) -> str:
    times = []
    for name, known in datasets.items():
        flops = {model: known["facts"]["variants"][model]["flops_a_step"] for model in (REFERENCE, DENSE)}
        times.append(f"{flops[DENSE] / flops[REFERENCE]:.2g} times the FLOPs of the reference's on {name}")
    return f"Equal steps are not equal cost: a step of dense takes {', '.join(times)}."


def who_is_no_better(rows_of: dict[str, list[Row]], gene_means: dict[str, float]) -> str:
    """One paragraph: which models have learned no more than the mean of each gene, in how many of their seeds."""
    found = []
    for name, rows in rows_of.items():
        for (model, equal, judged_on), group in groups_of(in_budgets(rows)).items():
            if judged_on is None and no_better(group, gene_means[name]):
                seeds = sum(no_better([row], gene_means[name]) for row in group)
                found.append(f"{name}, {model}, equal in {' and '.join(equal)} (in {seeds} of {len(group)} seeds)")
    if not found:
        return "Every model is better than the gene mean, by NLL, in every seed."
    return f"No better than the gene mean, so that comparing with them says nothing of attention: {'; '.join(found)}."


def _facts(facts: dict[str, Any]) -> str:
    labels = (
        "it has no cell types, so there is no label transfer"
        if facts["labels"] is None
        else (f"labels: `{facts['labels']}`")
    )
    return (
        f"{facts['training_cells']:,} training cells, {facts['held_out_cells']:,} held out; contexts of "
        f"{facts['tokens_a_context']:,.0f} tokens in the mean, at most {facts['longest']:,} visible; "
        f"{facts['targets']:,} targets in {facts['draws']} draws; {facts['steps_an_epoch']:,} steps an epoch; {labels}."
    )


def _costs(rows: list[Row], known: dict[str, Any]) -> str:
    facts, predicted = known["facts"], known["seconds_a_step"]
    lines = [
        "| model | equal | layers | parameters | steps | epochs | training FLOPs | seconds | a step "
        "| cells cut |\n|---|---|---|---|---|---|---|---|---|---|"
    ]
    for (model, equal, judged_on), group in groups_of(rows).items():
        if judged_on is not None:
            continue
        variant, mean = facts["variants"][model], {key: average(group, key) for key in ("steps", "flops", "seconds")}
        about = "" if variant["max_tokens"] is None else "≈ "
        lines.append(
            f"| {model} | {', '.join(equal)} | {variant['depth']} | {variant['parameters']:,} "
            f"| {mean['steps']['mean']:,.0f} | {mean['steps']['mean'] / facts['steps_an_epoch']:.2g} "
            f"| {mean['flops']['mean'] / 1e12:.3g} · 10¹² "
            f"| {about}{mean['seconds']['mean']:,.0f} | {about}{predicted[model]:.3f} s | {variant['cells_cut']:.0%} |"
        )
    return "\n".join(lines)


def _scores(rows: list[Row], known: dict[str, Any]) -> str:
    shown = [metric for metric in METRICS if metric != "label_transfer" or known["facts"]["labels"] is not None]
    heads = [f"{METRICS[metric]} | minus reference" for metric in shown]
    lines = [f"| model | equal | judged with | {' | '.join(heads)} |", "|---|---|---|" + "---|---|" * len(shown)]
    groups, gene_mean = groups_of(rows), nll_of_gene_mean(known)
    reference = next((group for key, group in groups.items() if key[0] == REFERENCE and STEPS in key[1]), [])
    for name, scores in known["baselines"].items():
        cells = [f"{number(scores[metric])} | " for metric in shown]
        lines.append(f"| {name} | | all genes | {' | '.join(cells)} |")
    for (model, equal, judged_on), group in groups.items():
        cells = []
        for metric in shown:
            difference = None if group is reference else paired(group, reference, metric)
            cells.append(f"{mean_and_interval(average(group, metric))} | {_signed(difference)}")
        judged = "all genes" if judged_on is None else f"n = {judged_on:,}"
        lines.append(
            f"| {model}{dagger(no_better(group, gene_mean))} | {', '.join(equal)} | {judged} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _comparison(comparisons: list[dict[str, Any]]) -> str:
    shown = [metric for metric in METRICS if any(row["metric"] == metric for row in comparisons)]
    found = {(row["budget"], row["model"], row["metric"]): row for row in comparisons}
    marked = {(row["budget"], row["model"]) for row in comparisons if row["no_better"]}
    lines = [
        f"| equal | model | {' | '.join(METRICS[metric] for metric in shown)} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for budget, model in dict.fromkeys((row["budget"], row["model"]) for row in comparisons):
        cells = []
        for metric in shown:
            row = found.get((budget, model, metric))
            cells.append("" if row is None else f"{_signed(row)}{', ' + row['verdict'] if row['verdict'] else ''}")
        lines.append(f"| {budget} | {model}{dagger((budget, model) in marked)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_learning_rate(rows: list[Row]) -> dict[float, dict[str, Row]]:
    """Of one seed: the reference and dense after the reference's steps, by model, for each peak that both were trained
    at, the lowest first. Empty if that is the configuration's alone."""
    at_peaks: dict[float, dict[str, Row]] = {}
    for row in rows:
        if row["model"] in (REFERENCE, DENSE) and (STEPS in row["equal"] or not row["equal"]):
            at_peaks.setdefault(row["learning_rate"], {})[row["model"]] = row
    of_both = {peak: at_peaks[peak] for peak in sorted(at_peaks) if len(at_peaks[peak]) == 2}
    return of_both if len(of_both) > 1 else {}


def _learning_rates(at_peaks: dict[float, dict[str, Row]]) -> str:
    peaks = [f"{peak:g}" for peak in at_peaks]
    lines = [f"| model | score at a peak of | {' | '.join(peaks)} |", "|---|---|" + "---|" * len(peaks)]
    for model in (REFERENCE, DENSE):
        for metric, best_of in (("nll", min), ("correlation_within_gene", max)):
            values = [models[model][metric] for models in at_peaks.values()]
            best = best_of((value for value in values if value is not None), default=None)
            cells = [f"**{value:.4f}**" if value is not None and value == best else number(value) for value in values]
            lines.append(f"| {model} | {METRICS[metric]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_best_peaks(at_peaks: dict[float, dict[str, Row]]) -> str:
    """What the comparison at equal steps would be with each model at the peak where its NLL is lowest."""
    best = {model: min(at_peaks, key=lambda peak: at_peaks[peak][model]["nll"]) for model in (REFERENCE, DENSE)}
    configured = next(peak for peak, models in at_peaks.items() if models[REFERENCE]["equal"])

    def difference(peaks: dict[str, float]) -> str:
        nll = {model: at_peaks[peak][model]["nll"] for model, peak in peaks.items()}
        return f"{nll[REFERENCE] - nll[DENSE]:+.4f}"

    text = (
        f"With each at its best peak, {best[REFERENCE]:g} for {REFERENCE} and {best[DENSE]:g} for {DENSE}, the NLL of "
        f"criss-cross minus that of dense after as many steps is {difference(best)}; at the configuration's "
        f"{configured:g} it is {difference(dict.fromkeys(best, configured))}. Below zero, criss-cross is better. "
        "One seed, no interval."
    )
    ends = {min(at_peaks), max(at_peaks)}
    open_ended = [model for model, peak in best.items() if peak in ends]
    if open_ended:
        text += f" That of {' and of '.join(open_ended)} is the lowest or highest tried: a better one may lie beyond."
    return text


def dagger(no_better: bool) -> str:
    return " †" if no_better else ""


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def mean_and_interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return number(found["mean"]) + ("" if found["high"] is None else f" ± {found['high'] - found['mean']:.4f}")


def _signed(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    words = f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
    return words if found["low"] <= 0 <= found["high"] else f"**{words}**"


def plan_text(trainings: list[Training], seconds: list[float]) -> str:
    """What would be trained, and how long each of it takes with judging, for all seeds together."""
    totals: dict[tuple[str, str, str, int], list[float]] = {}
    for training, one in zip(trainings, seconds, strict=True):
        key = training.dataset, training.variant.name, training.purpose, training.steps
        totals.setdefault(key, []).append(one)
    lines = [f"{'data set':<10} {'model':<32} {'purpose':<52} {'steps':>7} {'seeds':>5}  time"]
    lines += [
        f"{dataset:<10} {model:<32} {purpose:<52} {steps:>7,} {len(times):>5}  {duration(sum(times))}"
        for (dataset, model, purpose, steps), times in totals.items()
    ]
    return "\n".join([*lines, f"{len(trainings)} trainings, about {duration(sum(seconds))}"])
