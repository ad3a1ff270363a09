"""Pictures of a run: what training did, and what the held-out comparison says."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from cctrain.tracking.journal import history, read_journal

INK, ACCENT, MUTED = "#1b2a41", "#c8553d", "#8d99ae"


def evaluation_figure(run_dir: Path, result: dict[str, Any], out: Path) -> None:
    """Left: held-out difference to the gene mean while training. Right: model minus each baseline, with intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    looks = [line for line in history(read_journal(run_dir)) if line["event"] == "evaluate"]
    left.axhline(0.0, color=MUTED, linewidth=1)
    left.plot(
        [look["step"] for look in looks],
        [look["difference"] for look in looks],
        "o-",
        color=ACCENT,
        markersize=4,
    )
    left.set(xlabel="optimizer step", ylabel="nats per target", title="Held-out NLL, model minus gene mean")

    # Poisson loses by so much that its row would flatten all others; it is in the table.
    rows = [row for row in result["rows"] if row["difference"] and "Poisson" not in row["name"]]
    right.axvline(0.0, color=MUTED, linewidth=1)
    for place, row in enumerate(reversed(rows)):
        d = row["difference"]
        right.plot([d["low"], d["high"]], [place, place], color=INK, linewidth=2)
        right.plot(d["mean"], place, "o", color=ACCENT, markersize=7)
        right.annotate(
            f"{d['mean']:+.4f}",
            (d["mean"], place),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    right.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    right.set(
        xlabel="nats per target, 95 % interval over cells",
        title=f"Model minus …, {result['cells']:,} held-out cells",
    )
    right.set_ylim(-0.5, len(rows) - 0.2)
    right.annotate("◂ model better", (0.01, 0.02), xycoords="axes fraction", fontsize=8, color=MUTED)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
