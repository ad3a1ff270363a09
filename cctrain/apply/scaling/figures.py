"""Pictures of a sweep, each as PNG and SVG: cost against n, the collapse on n·M, memory, and where time goes."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from cctrain.apply.figures import ACCENT, INK, MUTED
from cctrain.apply.scaling.analysis import latents_of, one_and_several
from cctrain.apply.scaling.points import CRISS_CROSS, DENSE, Row
from cctrain.apply.scaling.report import exponent_in_words, threads_in_words

DENSE_STYLES = {
    "same_depth": {"color": ACCENT, "marker": "s", "linestyle": "-"},
    "same_parameters": {"color": ACCENT, "marker": "D", "linestyle": "--"},
}
MARKERS = "ov^Pph*X"
SIZE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "cctrain",
}
MIB = 2**20


def draw_figures(rows: Iterable[Row], found: dict[str, Any], machine: dict[str, Any], folder: Path) -> list[Path]:
    """Every figure for which there are points; returns the PNG files. `found` is what `analyse` says."""
    measured = [row for row in rows if "step_seconds" in row]
    one_rank = [row for row in measured if row["context_ranks"] == 1]
    compared = [row for pair in one_and_several(measured) for row in pair]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw, needed in (
        ("cost", _cost, one_rank),
        ("collapse", _collapse, [row for row in one_rank if row["kind"] == CRISS_CROSS]),
        ("memory", _memory, one_rank),
        ("time", _where_time_goes, one_rank),
        ("context_ranks", partial(_context_ranks, machine=machine), compared),
    ):
        if not needed:
            continue
        with plt.rc_context(SIZE):
            figure = draw(needed, found)
            for ending in ("png", "svg"):
                # Without a date, the same points make the same file.
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(folder / f"{name}.{ending}", dpi=200, metadata=metadata)
            plt.close(figure)
        drawn.append(folder / f"{name}.png")
    return drawn


def _cost(rows: list[Row], found: dict[str, Any]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    _curves(left, rows, lambda row: row["step_seconds"])
    left.set(ylabel="seconds", title="A whole training step")
    _curves(right, rows, lambda row: row["attention_seconds"])
    right.set(title="Attention alone, all layers")
    right.tick_params(labelleft=True)
    lengths = sorted({row["tokens"] for row in rows})
    for power, label in ((1, "∝ n"), (2, "∝ n²")):
        _guide(right, rows, lengths, power, label)
    for axes in (left, right):
        _logarithmic(axes, lengths)
    left.legend(frameon=False)
    return figure


def _collapse(rows: list[Row], found: dict[str, Any]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained")
    law, terms = found["attention"]["n·M"], found["attention_terms"]["criss-cross"]
    for latents, style in _styles(rows).items():
        points = sorted((row for row in rows if row["latents"] == latents), key=lambda row: row["tokens"])
        products = [row["tokens"] * latents for row in points]
        seconds = [row["attention_seconds"] for row in points]
        left.plot(products, seconds, markersize=5, **style | {"linestyle": "none"}, label=f"M = {latents}")
        per_pair = [1e9 * second / product for second, product in zip(seconds, products, strict=True)]
        right.plot(products, per_pair, markersize=5, linewidth=1, **style)
        if terms:
            fitted = 1e9 * (terms["coefficients"]["n·M"]["value"] + terms["coefficients"]["n"]["value"] / latents)
            ends = [products[0], products[-1]]
            right.plot(ends, [fitted, fitted], color=style["color"], linewidth=0.8, linestyle="--")
    if law and law["scale"] is not None:
        long = [row["tokens"] * row["latents"] for row in rows if row["tokens"] >= found["fit_from"]]
        ends = [min(long), max(long)]
        left.plot(ends, [law["scale"] * x ** law["exponent"] for x in ends], color=MUTED, linewidth=1, zorder=0)
        said = f"{exponent_in_words(law)}, R² {law['r_squared']:.4f}"
        left.set_title(f"Attention: exponent of n·M from n = {found['fit_from']:,} on\n{said}")
    left.set(xscale="log", yscale="log", xlabel="n·M", ylabel="seconds of attention, all layers")
    right.set(
        xscale="log",
        xlabel="n·M",
        ylabel="nanoseconds / (n·M), all layers",
        title="Attention per pair of token and latent" + ("\ndashed: as fitted, a + b / M" if terms else ""),
    )
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _memory(rows: list[Row], found: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    _curves(axes, rows, lambda row: row["memory_bytes"] / MIB)
    _logarithmic(axes, sorted({row["tokens"] for row in rows}))
    axes.set(ylabel="MiB", title="Memory of a training step")
    axes.legend(frameon=False)
    return figure


def _where_time_goes(rows: list[Row], found: dict[str, Any]) -> Any:
    """Share of attention in the measured time, as bars, and in FLOPs by the closed form, as marks."""
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=_rank_of_curve)))
    figure, grid = plt.subplots(
        1, len(names), figsize=(1.0 + 2.1 * len(names), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        points = sorted((row for row in rows if row["name"] == name), key=lambda row: row["tokens"])
        places = range(len(points))
        shares = [row["attention_share_of_time"] for row in points]
        axes.bar(places, shares, color=ACCENT, label="attention")
        axes.bar(places, [max(0.0, 1 - share) for share in shares], bottom=shares, color="#dfe3e8", label="the rest")
        flops = [row["attention_share_of_flops"] for row in points]
        axes.plot(places, flops, "_", color=INK, markersize=11, markeredgewidth=2, label="attention, of FLOPs")
        axes.set_xticks(places, [_short(row["tokens"]) for row in points], rotation=45)
        axes.set(title=name.replace(", ", ",\n"), xlabel="n", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    grid[0][0].set_ylabel("share of a training step")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _context_ranks(rows: list[Row], found: dict[str, Any], machine: dict[str, Any]) -> Any:
    """Time of a step and memory of a rank, for contexts on one rank and shared by several."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    styles, numbers = _styles(rows), sorted({row["context_ranks"] for row in rows})
    for latents, number in sorted({(row["latents"], row["context_ranks"]) for row in rows}):
        shared = {"linestyle": (0, (4, numbers.index(number))), "markerfacecolor": "white"} if number > 1 else {}
        style = styles[latents] | shared | {"label": f"M = {latents}, {number} rank" + "s" * (number > 1)}
        points = sorted(
            (row["tokens"], row["step_seconds"], row["memory_bytes"] / MIB)
            for row in rows
            if (row["latents"], row["context_ranks"]) == (latents, number)
        )
        tokens, seconds, memory = zip(*points, strict=True)
        left.plot(tokens, seconds, markersize=5, linewidth=1.3, **style)
        right.plot(tokens, memory, markersize=5, linewidth=1.3, **style)
    for axes in (left, right):
        _logarithmic(axes, sorted({row["tokens"] for row in rows}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    left.set(ylabel="seconds", title=f"A whole training step\n{threads_in_words(machine, numbers[1:])}")
    right.set(ylabel="MiB", title="Memory of a rank; weights, gradients\nand moments are whole on each")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curves(axes: Axes, rows: list[Row], of: Callable[[Row], float]) -> None:
    styles: dict[str, dict[str, Any]] = {
        **{f"criss-cross, M = {latents}": style for latents, style in _styles(rows).items()},
        **{DENSE[kind]: style for kind, style in DENSE_STYLES.items()},
    }
    for name, style in styles.items():
        points = sorted((row["tokens"], of(row)) for row in rows if row["name"] == name)
        if points:
            axes.plot(*zip(*points, strict=True), markersize=5, linewidth=1.3, **style, label=name)


def _styles(rows: list[Row]) -> dict[int, dict[str, Any]]:
    """By M: light to dark, for it is a quantity; markers, for those who print in grey."""
    numbers = latents_of(row for row in rows if row["kind"] == CRISS_CROSS)
    shades = colormaps["Blues"]
    return {
        number: {
            "color": shades(0.45 + 0.5 * place / max(1, len(numbers) - 1)),
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "-",
        }
        for place, number in enumerate(numbers)
    }


def _guide(axes: Axes, rows: list[Row], lengths: list[int], power: int, label: str) -> None:
    """A grey line of that slope, beside the long end of the uppermost curve that should have it."""
    candidates = [row for row in rows if (row["kind"] == CRISS_CROSS) == (power == 1)]
    if not candidates or len(lengths) < 2:
        return
    last = max(candidates, key=lambda row: (row["tokens"], row["attention_seconds"]))
    aside, ends = (1.6 if power == 1 else 0.5), [n for n in lengths if n >= last["tokens"] / 8]
    seconds = [aside * last["attention_seconds"] * (n / last["tokens"]) ** power for n in ends]
    axes.plot(ends, seconds, color=MUTED, linewidth=1, linestyle=":", zorder=0)
    axes.annotate(label, (ends[-1], seconds[-1]), (5, -3), textcoords="offset points", color=MUTED)


def _logarithmic(axes: Axes, lengths: list[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="n, tokens of the context")
    apart = [n for n, following in pairwise([*lengths, math.inf]) if following / n > 1.2]
    axes.set_xticks(apart)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _short(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def _short(n: float) -> str:
    """4k for 4,096."""
    return f"{n / 1024:.0f}k" if n >= 1024 and n % 1024 == 0 else f"{n:,.0f}"


def _rank_of_curve(row: Row) -> tuple[int, int]:
    return [CRISS_CROSS, *DENSE].index(row["kind"]), row["latents"] or 0
