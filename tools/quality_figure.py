"""The picture of the comparison: held-out NLL against what training cost, in FLOPs and in seconds."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from cctrain.apply.evaluate import NEIGHBOURS
from cctrain.apply.figures import ACCENT, INK, MUTED
from tools.quality_plan import DENSE, GENE_MEAN, OTHER_LATENTS, REFERENCE_LATENTS, criss_cross
from tools.quality_report import Row, average, groups_of, in_budgets

COSTS = {
    "flops": (1e12, "training FLOPs, 10¹²"),
    "seconds": (1.0, "seconds of training; with n genes: scaled by FLOPs"),
}
CUT, CUT_THEN_WHOLE = (
    f"M = {REFERENCE_LATENTS} trained and judged with n genes",
    f"M = {REFERENCE_LATENTS} trained with n genes, judged with all",
)
# More latents are darker, for M is a quantity; markers and dashes for those who print in grey.
STYLES: dict[str, dict[str, Any]] = {
    criss_cross(latents): {"color": colormaps["Blues"](shade), "marker": marker}
    for latents, shade, marker in zip(
        sorted((REFERENCE_LATENTS, *OTHER_LATENTS)), (0.45, 0.7, 0.95), "ov^", strict=True
    )
} | {
    DENSE: {"color": ACCENT, "marker": "D", "linestyle": "--"},
    # No lines: each n is trained for equal steps and for equal FLOPs.
    CUT: {"color": MUTED, "marker": "P", "linestyle": "none", "markerfacecolor": "white"},
    CUT_THEN_WHOLE: {"color": INK, "marker": "X", "linestyle": "none", "markerfacecolor": "white"},
}

# A model above the first has not learned more than the mean of each gene.
BASELINES: dict[str, dict[str, Any]] = {
    GENE_MEAN: {"color": MUTED, "linestyle": ":"},
    NEIGHBOURS: {"color": MUTED, "linestyle": "-."},
}


def draw(result: dict[str, Any], out: Path) -> None:
    """A row of two panels for each data set that has results."""
    compared = in_budgets(result["rows"])
    rows_of = {name: [row for row in compared if row["dataset"] == name] for name in result["datasets"]}
    rows_of = {name: rows for name, rows in rows_of.items() if rows}
    figure, grid = plt.subplots(
        len(rows_of), 2, figsize=(10, 1.0 + 3.8 * len(rows_of)), layout="constrained", sharey="row", squeeze=False
    )
    for (name, rows), panels in zip(rows_of.items(), grid, strict=True):
        baselines = result["datasets"][name]["baselines"]
        for (cost, (unit, label)), axes in zip(COSTS.items(), panels, strict=True):
            for baseline, style in BASELINES.items():
                if baseline in baselines:
                    axes.axhline(baselines[baseline]["nll"], linewidth=1, label=baseline, **style)
            for series, style in STYLES.items():
                curve(axes, [row for row in rows if series_of(row) == series], cost, unit, style | {"label": series})
            axes.set(xscale="log", xlabel=label)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("held-out NLL, nats per target")
        panels[0].set_title(name, loc="left")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for axes in grid.flat:
        hide_overlapping_labels(figure, axes)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def series_of(row: Row) -> str:
    if row["trained_on"] is None:
        return row["model"]
    return CUT_THEN_WHOLE if row["judged_on"] is None else CUT


def curve(axes: Axes, rows: list[Row], cost: str, unit: float, style: dict[str, Any]) -> None:
    """Means over seeds with their intervals, a point for each number of steps or each n, in the order of cost."""
    points = []
    for group in groups_of(rows).values():
        paid, nll = average(group, cost), average(group, "nll")
        assert paid is not None
        assert nll is not None
        half = 0.0 if nll["high"] is None else nll["high"] - nll["mean"]
        points.append((paid["mean"] / unit, nll["mean"], half, group[0]["trained_on"]))
    if not points:
        return
    costs, means, halves, cuts = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    axes.errorbar(costs, means, halves if any(halves) else None, markersize=6, linewidth=1.2, capsize=2, **style)
    for x, y, cut in zip(costs, means, cuts, strict=True):
        if style["label"] == CUT_THEN_WHOLE:
            axes.annotate(f"{cut:,}", (x, y), (4, 5), textcoords="offset points", fontsize=7, color=style["color"])


def hide_overlapping_labels(figure: Figure, axes: Axes) -> None:
    """Of points that lie together the first has a label."""
    figure.canvas.draw()
    shown: list[Bbox] = []
    for label in axes.texts:
        box = label.get_window_extent()
        if box.count_overlaps(shown):
            label.set_visible(False)
        else:
            shown.append(box)
