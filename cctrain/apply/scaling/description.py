"""What the pages of a sweep say in words, as Markdown: what was measured, what came out, and how to read it."""

from collections.abc import Iterable
from typing import Any

from cctrain.apply.scaling.analysis import THEORY
from cctrain.apply.scaling.points import CRISS_CROSS, DENSE, Row
from cctrain.apply.scaling.report import exponent_in_words
from cctrain.tracking.description import how_to_read, layers_in_words, signed

SOURCE = "the sweep's points"
_OF_PARENT = {
    "speed": "seconds of a training step, and of its attention alone, one curve for each model; the step of these "
    "curves is n",
    "cost": "bytes of memory over n in the same way; then what was fitted: each `exponent of …` with the ends of its "
    "95 % interval (`low`, `high`), the law of the whole step (`total`), and the n from which dense is slower "
    "(`crossover with …`)",
}
_CLOSED_FORM = "`n`, `M`, parameters and FLOPs by the closed form"
_OF_POINT = {
    "speed": "measured: seconds of the step, of its attention and of the rest, medians after a step of warm-up",
    "cost": f"{_CLOSED_FORM}; measured are `memory_bytes` and `attention_share_of_time`",
}


def sweep_description(rows: Iterable[Row], found: dict[str, Any], parameters: dict[str, str]) -> str:
    """Of the parent run; `found` is what `analyse` says, `parameters` the flat configuration."""
    rows = list(rows)
    left_out = sum("left_out" in row for row in rows)
    exponents = [f"- attention, exponent of {name}: {exponent_in_words(found['attention'][name])}" for name in THEORY]
    missing = f"; {left_out} left out, and the tag `cctrain.left_out` of its child says why" if left_out else ""
    paragraphs = [
        "**What it is**: a scaling sweep. The time and memory of one training step were measured over n tokens and M "
        "latents, with dense controls; contexts are random and nothing is learned.",
        f"**Model**: {_models_in_words(rows, parameters)}.",
        f"**Points**: {len(rows) - left_out} measured{missing}.",
        "\n".join(["**Found** (theory: n·M, n and M 1, dense 2; 95 % intervals)", "", *exponents]),
        how_to_read(_OF_PARENT),
        "The child runs are the points, one each. Under *Artifacts*: `figures/`, `report.md` with all in words, "
        "`points.csv` with every number.",
    ]
    return signed(paragraphs, SOURCE)


def point_description(row: Row) -> str:
    """Of a child run."""
    kind = "criss-cross" if row["kind"] == CRISS_CROSS else "dense"
    latents = f", M = {row['latents']} latents" if row["latents"] is not None else ""
    ranks = f", shared by {row['context_ranks']} context ranks" if row["context_ranks"] > 1 else ""
    if "left_out" in row:
        result = f"**Left out**: {row['left_out']}. What is here is by the closed form."
    else:
        result = (
            f"**Found**: a step takes {row['step_seconds']:.4g} s; {row['attention_share_of_time']:.1%} of it is "
            f"attention, which is {row['attention_share_of_flops']:.1%} of the FLOPs."
        )
    paragraphs = [
        f"**What it is**: one point of a scaling sweep, which is the parent run: a training step of a {kind} "
        f"transformer, {layers_in_words(row['depth'])}{latents}, on a random context of n = {row['tokens']:,} "
        f"tokens{ranks}.",
        result,
        how_to_read(_OF_POINT if "step_seconds" in row else {"cost": _CLOSED_FORM}),
    ]
    return signed(paragraphs, SOURCE)


def _models_in_words(rows: list[Row], parameters: dict[str, str]) -> str:
    """What the models have in common, and what was swept."""
    ours = [row for row in rows if row["kind"] == CRISS_CROSS]
    tokens = sorted({row["tokens"] for row in rows})
    latents = ", ".join(map(str, sorted({row["latents"] for row in ours})))
    ranks = sorted({row["context_ranks"] for row in rows})
    shared = f" on {' and '.join(map(str, ranks))} context ranks" if len(ranks) > 1 else ""
    get = parameters.get
    controls = " and ".join(DENSE[kind] for kind in DENSE if any(row["kind"] == kind for row in rows))
    return (
        f"criss-cross, {layers_in_words(get('model.depth'))} of width {get('model.width')}, "
        f"{get('model.heads')} heads, {get('training.precision')}; "
        f"n = {tokens[0]:,} to {tokens[-1]:,}, M = {latents}{shared}" + (f"; beside it {controls}" if controls else "")
    )
