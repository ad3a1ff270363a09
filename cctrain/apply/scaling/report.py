"""The sweep in words and tables: report.md, and points.csv with every number of every point."""

import csv
import io
import platform
from collections import Counter
from collections.abc import Iterable
from typing import Any

from cctrain.apply.processes import threads_of_a_rank
from cctrain.apply.scaling.analysis import THEORY, one_and_several
from cctrain.apply.scaling.measure import is_timed_once
from cctrain.apply.scaling.points import CRISS_CROSS, DENSE, Row
from cctrain.config import ModelConfig
from cctrain.cost.traffic import exchange_of_a_layer, sent
from cctrain.cost.work import ELEMENT_BYTES

COLUMNS = (
    *("name", "kind", "attention", "latents", "context_ranks", "depth", "parameters", "tokens"),
    *("step_seconds", "attention_seconds", "rest_seconds", "warm_up_seconds", "repeats", "tokens_per_second"),
    *("flops", "attention_share_of_flops", "attention_share_of_time", "utilisation"),
    *("matrix_product_flops_per_second", "memory_bytes", "left_out", "predicted_seconds", "time", "commit"),
)
MIB = 2**20


def csv_text(rows: Iterable[Row]) -> str:
    """One line a point; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    for row in in_order(rows):
        more = {}
        if "step_seconds" in row:
            more["rest_seconds"] = row["step_seconds"] - row["attention_seconds"]
            more["warm_up_seconds"] = row["timings"]["warm_up"]
        writer.writerow(row | more)
    return text.getvalue()


def report_text(rows: Iterable[Row], found: dict[str, Any], settings: dict[str, Any], figures: list[str]) -> str:
    """Markdown; `found` is what `analyse` says, `figures` are paths of PNG files beside the report."""
    ordered = in_order(rows)
    sections = [
        "# The cost law, measured",
        _setting_in_words(ordered, settings),
        "## Attention",
        _attention(found),
        _attention_terms(found),
        "## The whole step",
        _total(found),
        "## Dense beside criss-cross",
        _crossovers(found),
        _speed_ups(found),
        _context_ranks(one_and_several(ordered), settings),
        *(f"![{path}]({path})" for path in figures),
        "## All points",
        _points(ordered),
        "## How it was measured",
        HOW,
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


HOW = """\
Points are measured in rounds, every one once in each, so that a machine that is slow for some minutes is not slow for
one length alone; and in processes of their own, one for each context rank. A step is forward, loss, backward and AdamW
on one context of random tokens; no token store is read. After one step that does not count (`warm_up_seconds` in
points.csv is that of the first round), a step, the attention of one layer and a plain matrix product take turns;
medians over all rounds count. A step of over 20 s is timed once, the first time. Attention is that of one layer run
alone, forward and backward, times the number of layers: what the rest of a step does to the caches is not seen that
way, and the rest is the difference of the two. Memory is what the first step added, weights, gradients and AdamW's
moments among it: on a CPU the growth of the process's peak of resident memory, on a GPU the most that PyTorch had
allocated; of the round with the most, and with several ranks of the one with the most. FLOPs are by the closed form,
recomputation included.

Intervals are at 95 % (Student's t): they hold the noise from point to point, and not what a law leaves out. Sums of
terms are fitted to relative errors, with coefficients that are not negative, since each is time that something takes.
A crossover is *measured* when it lies between two measured lengths (straight line between logarithms), and
*extrapolated*, by the fitted laws, when it does not. Where these meet between measured lengths although the curves do
not cross, that is said."""


def in_order(rows: Iterable[Row]) -> list[Row]:
    kinds = [CRISS_CROSS, *DENSE]
    return sorted(
        rows, key=lambda row: (kinds.index(row["kind"]), row["context_ranks"], row["latents"] or 0, row["tokens"])
    )


def exponent_in_words(law: dict[str, Any] | None) -> str:
    """Such as `1.02 (0.99 to 1.05)`."""
    if law is None:
        return "too few points"
    if law["low"] is None:
        return f"{law['exponent']:.3f} (too few points for an interval)"
    return f"{law['exponent']:.3f} ({law['low']:.3f} to {law['high']:.3f})"


def crossover_in_words(found: dict[str, Any]) -> str:
    common = f"{found['from']:,} to {found['to']:,}"
    if found["verdict"] == "always":
        beyond = ", and by the laws at all shorter ones" if found["by_laws"] else ""
        return f"dense is slower at every length measured of both ({common}){beyond}"
    if found["verdict"] == "never":
        beyond = ", nor by the laws beyond" if found["by_laws"] else ""
        return f"dense is not slower at n = {found['to']:,}, the longest measured of both{beyond}"
    how = {
        "measured": "measured",
        "fitted": f"where the laws meet; the curves, measured at {common}, do not cross there",
        "extrapolated": f"extrapolated by the laws; measured was {common}",
    }[found["verdict"]]
    return f"dense is slower from n = {found['tokens']:,.0f} on ({how})"


def _setting_in_words(rows: list[Row], settings: dict[str, Any]) -> str:
    model, machine = settings["model"], settings["machine"]
    left_out = sum("left_out" in row for row in rows)
    commits = sorted({row["commit"] or "unknown" for row in rows})
    memory = ", ".join(f"{key}={value}" for key, value in settings["memory"].items())
    latent_width = model["latent_width"] or model["width"]
    return "\n".join(
        [
            f"{len(rows) - left_out} points measured, {left_out} left out. Criss-cross: {model['depth']} layer(s) of "
            f"width {model['width']}, {model['heads']} heads, latents of width {latent_width}, "
            f"{settings['precision']}. Random contexts; a gene table of {settings['genes']:,} rows. {memory}.",
            "",
            "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None) + ".",
            f"Commit: {', '.join(commits)}. Report made with Python {platform.python_version()}.",
            "",
            *_commands(rows),
        ]
    )


def _commands(rows: list[Row]) -> list[str]:
    """Points did not always say it."""
    lines = ["Points by the command that made them:", ""]
    for command, points in Counter(row.get("command") for row in rows).items():
        lines.append(f"- {points}: " + (f"`{command}`" if command else "it was not kept with them"))
    return lines


def _attention(found: dict[str, Any]) -> str:
    lines = [f"Time of attention alone, contexts of {found['fit_from']:,} tokens and more, as a power of"]
    lines += ["", "| | exponent (95 %) | theory | away | R² | points |", "|---|---|---|---|---|---|"]
    for name, law in found["attention"].items():
        theory = THEORY.get(name, 1)
        rest = f"{law['exponent'] - theory:+.3f} | {law['r_squared']:.4f} | {law['points']}" if law else "| |"
        lines.append(f"| {name} | {exponent_in_words(law)} | {theory} | {rest} |")
    lines += ["", "`n` and `M` alone: one exponent for all points, with a factor of its own for each M, or each n."]
    by_round = [
        f"of {name} {', '.join(f'{exponent:.3f}' for exponent in exponents)}"
        for name, exponents in found["exponents_by_round"].items()
    ]
    if by_round:
        lines += ["", f"By each round alone the exponents over all points would be: {'; '.join(by_round)}."]
    return "\n".join(lines)


def _attention_terms(found: dict[str, Any]) -> str:
    lines = ["Seconds of attention as a sum of terms, all measured lengths on one context rank:", ""]
    lines.append(_laws(found["attention_terms"]))
    law = found["attention_terms"]["criss-cross"]
    of_a_pair, of_a_token = (law["coefficients"][term]["value"] for term in ("n·M", "n")) if law else (0.0, 0.0)
    if of_a_token > of_a_pair > 0:
        lines += [
            "",
            "The term with `n` of criss-cross attention is what a token takes however few the latents, such as to read "
            "and write its query, key, value and result, and their gradients: as much as "
            f"{of_a_token / of_a_pair:.0f} latents more would take, which pulls the exponents of n·M and of M below 1.",
        ]
    return "\n".join(lines)


def _total(found: dict[str, Any]) -> str:
    return "\n".join(["Seconds of a step, all measured lengths on one context rank:", "", _laws(found["total"])])


def _laws(laws: dict[str, dict[str, Any] | None]) -> str:
    """Sums of terms, by curve."""
    lines = ["| | law | R² | error: median | largest | points |", "|---|---|---|---|---|---|"]
    for name, law in laws.items():
        if law is None:
            lines.append(f"| {name} | too few points | | | | |")
            continue
        said = " + ".join(_term(coefficient, term) for term, coefficient in law["coefficients"].items())
        lines.append(
            f"| {name} | {said} | {law['r_squared']:.4f} | {law['median_error']:.1%} | {law['largest_error']:.1%} "
            f"| {law['points']} |"
        )
    return "\n".join(lines)


def _term(coefficient: dict[str, float | None], term: str) -> str:
    factor = "" if term == "1" else f"·{term}"
    if coefficient["low"] is None:
        return f"{coefficient['value']:.3g}{factor}"
    return f"{coefficient['value']:.3g} ({coefficient['low']:.3g} to {coefficient['high']:.3g}){factor}"


def _crossovers(found: dict[str, Any]) -> str:
    if not found["crossovers"]:
        return "No length was measured of both."
    lines = [
        f"- M = {entry['latents']}, {DENSE[entry['against']]}: {crossover_in_words(entry)}"
        for entry in found["crossovers"]
    ]
    return "\n".join(lines)


def _speed_ups(found: dict[str, Any]) -> str:
    times = {(e["latents"], e["against"], e["tokens"]): e["times"] for e in found["speed_ups"]}
    if not times:
        return ""
    columns = sorted({(latents, kind) for latents, kind, _ in times}, key=lambda c: (c[1], c[0]))
    lines = ["How many times as long dense takes:", ""]
    lines.append("| n | " + " | ".join(f"M = {latents}, {DENSE[kind]}" for latents, kind in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for tokens in sorted({tokens for _, _, tokens in times}):
        cells = [times.get((latents, kind, tokens)) for latents, kind in columns]
        lines.append(f"| {tokens:,} | " + " | ".join("" if c is None else f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines)


def threads_in_words(machine: dict[str, Any], context_ranks: Iterable[int]) -> str:
    """What one rank alone computes with, and each of so many."""
    if machine["device"] == "cuda":
        return "a GPU for each rank"
    threads = machine["threads"]
    several = [f"{threads_of_a_rank(threads, ranks)} for each of {ranks}" for ranks in context_ranks]
    return f"threads: {threads} for one rank, {', '.join(several)}"


def _context_ranks(pairs: list[tuple[Row, Row]], settings: dict[str, Any]) -> str:
    """`pairs` as `one_and_several` gives them."""
    if not pairs:
        return ""
    numbers = sorted({several["context_ranks"] for _, several in pairs})
    lines = [
        "## Context ranks",
        "",
        "A context on one rank, and shared by several, each with its part of the tokens "
        f"({threads_in_words(settings['machine'], numbers)}). {_meaning_of_speed_ups(settings['machine'], numbers)}",
        "",
        "| M | n | ranks | step s: one | several | times as fast | attention s: one | several | bytes sent "
        "| MiB of a rank: one | several | ratio |",
        "|---" * 12 + "|",
    ]
    for one, several in pairs:
        seconds, attention, memory = (
            (one[key], several[key]) for key in ("step_seconds", "attention_seconds", "memory_bytes")
        )
        lines.append(
            f"| {several['latents']} | {several['tokens']:,} | {several['context_ranks']} "
            f"| {seconds[0]:.4g} | {seconds[1]:.4g} | {seconds[0] / seconds[1]:.2f} "
            f"| {attention[0]:.4g} | {attention[1]:.4g} | {_exchanged_bytes(several, settings):,.0f} "
            f"| {memory[0] / MIB:,.0f} | {memory[1] / MIB:,.0f} | {memory[1] / memory[0]:.2f} |"
        )
    gradients = [_gradient_bytes(several, settings) for _, several in pairs]
    lines += [
        "",
        "Bytes sent are by the closed form: of one rank in a step, to exchange what the latents read and its gradient, "
        "which is in the time of attention, and as much whatever n is. To sum the gradients of the parameters a rank "
        f"sends up to {max(gradients):,.0f} more. Weights, gradients and moments are whole on every rank: a sweep runs "
        "without ZeRO.",
    ]
    return "\n".join(lines)


def _meaning_of_speed_ups(machine: dict[str, Any], context_ranks: list[int]) -> str:
    if machine["device"] == "cuda":
        return "As many times as fast as there are ranks would be to share at no cost."
    threads = machine["threads"]
    if any(ranks * threads_of_a_rank(threads, ranks) != threads for ranks in context_ranks):
        return "These are not as many cores in all, so the times do not tell what sharing costs."
    return (
        "These are as many cores in all, so less than 1 times as fast is what sharing costs: what it gives here is "
        "memory, and time only where it brings more cores."
    )


def _exchanged_bytes(row: Row, settings: dict[str, Any]) -> float:
    model = ModelConfig(**settings["model"] | {"latents": row["latents"]})
    return row["depth"] * sum(one.sent for one in exchange_of_a_layer(model, 1, row["context_ranks"]))


def _gradient_bytes(row: Row, settings: dict[str, Any]) -> float:
    return sent("all_reduce", ELEMENT_BYTES[settings["precision"]] * row["parameters"], row["context_ranks"])


def _points(rows: list[Row]) -> str:
    lines = [
        "| model | layers | parameters | n | step s | steps timed | attention s | attention: of FLOPs | of time | MiB "
        "| tokens/s |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        model = f"| {row['name']} | {row['depth']} | {row['parameters']:,} | {row['tokens']:,} |"
        share = f"{row['attention_share_of_flops']:.1%}"
        if "left_out" in row:
            lines.append(f"{model} left out: {row['left_out']} | | | {share} | | | |")
        else:
            timed = "the first" if is_timed_once(row["timings"]) else row["repeats"]
            lines.append(
                f"{model} {row['step_seconds']:.4g} | {timed} | {row['attention_seconds']:.4g} | {share} "
                f"| {row['attention_share_of_time']:.1%} | {row['memory_bytes'] / MIB:,.0f} "
                f"| {row['tokens_per_second']:,.0f} |"
            )
    if any(is_timed_once(row["timings"]) for row in rows if "timings" in row):
        lines += ["", "`the first`: timed once; what a first step takes longer than later ones is in it."]
    return "\n".join(lines)
