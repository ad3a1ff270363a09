"""What the measured points say: exponents and terms of attention, the law of the whole step, and where dense is slower.

Pure functions of the rows. Exponents are of contexts of FIT_FROM tokens and more: in shorter ones a good part of the
time is that of starting kernels. Terms are of all lengths. Nothing that was left out enters a fit.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from cctrain.apply.scaling.points import CRISS_CROSS, DENSE, Row
from cctrain.cost.fits import PowerLaw, SumOfTerms, crossover, power_law, sum_of_terms

FIT_FROM = 4096
CRISS_CROSS_TERMS = ("n·M", "n", "M", "1")
DENSE_TERMS = ("n²", "n", "1")
# The exponents over all points, and what they should be; those for one M or one n should be 1.
THEORY = {"n·M": 1, "n": 1, "M": 1} | {f"n, {name}": 2 for name in DENSE.values()}


def analyse(rows: Iterable[Row], fit_from: int = FIT_FROM) -> dict[str, Any]:
    """{attention: exponents by name, exponents_by_round: lists of them, attention_terms and total: laws by curve,
    crossovers, speed_ups}, in JSON's types.

    A fit for which there are too few points is None.
    """
    measured = [row for row in rows if "step_seconds" in row]
    ours = [row for row in measured if row["kind"] == CRISS_CROSS and row["context_ranks"] == 1]
    dense = {kind: [row for row in measured if row["kind"] == kind] for kind in DENSE}
    long = [row for row in ours if row["tokens"] >= fit_from]
    law = total_law(ours)
    dense_laws = {kind: dense_law(of_kind) for kind, of_kind in dense.items()}
    pairs = [(latents, kind) for latents in latents_of(ours) for kind in DENSE]
    return {
        "fit_from": fit_from,
        "attention": {name: _as_dict(found) for name, found in attention_laws(long, dense, fit_from).items()},
        "exponents_by_round": exponents_by_round(long),
        "attention_terms": {
            "criss-cross": _as_dict(attention_terms(ours)),
            **{DENSE[kind]: _as_dict(dense_attention_terms(of_kind)) for kind, of_kind in dense.items()},
        },
        "total": {
            "criss-cross": _as_dict(law),
            **{DENSE[kind]: _as_dict(found) for kind, found in dense_laws.items()},
        },
        "crossovers": [
            found
            for latents, kind in pairs
            if (found := _crossover(_of(ours, latents), dense[kind], latents, kind, law, dense_laws[kind]))
        ],
        "speed_ups": [
            found for latents, kind in pairs for found in _speed_ups(_of(ours, latents), dense[kind], latents, kind)
        ],
    }


def attention_laws(long: list[Row], dense: dict[str, list[Row]], fit_from: int) -> dict[str, PowerLaw | None]:
    """Of criss-cross points from `fit_from` tokens on, and of the dense ones among all."""
    over_all = _laws_over_all(long)
    laws = {
        "n·M": over_all["n·M"],
        "n": over_all["n"],
        **{f"n, M = {latents}": _fit(_of(long, latents), lambda row: row["tokens"]) for latents in latents_of(long)},
        "M": over_all["M"],
        **{
            f"M, n = {tokens:,}": _fit([row for row in long if row["tokens"] == tokens], lambda row: row["latents"])
            for tokens in sorted({row["tokens"] for row in long})
        },
    }
    for kind, of_kind in dense.items():
        laws[f"n, {DENSE[kind]}"] = _fit([row for row in of_kind if row["tokens"] >= fit_from], lambda r: r["tokens"])
    return laws


def exponents_by_round(long: list[Row]) -> dict[str, list[float]]:
    """What each round by itself would have found, by name: how far another sweep may be off. Empty unless every point
    was measured in every round, of which there are two at least."""
    by_point = [row.get("attention_by_round", [None]) for row in long]
    rounds = len(by_point[0]) if by_point else 0
    if rounds < 2 or any(len(seconds) != rounds or None in seconds for seconds in by_point):
        return {}
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        of_round = [row | {"attention_seconds": by[number]} for row, by in zip(long, by_point, strict=True)]
        for name, law in _laws_over_all(of_round).items():
            if law:
                found.setdefault(name, []).append(law.exponent)
    return found


def _laws_over_all(long: list[Row]) -> dict[str, PowerLaw | None]:
    return {
        "n·M": _fit(long, lambda row: row["tokens"] * row["latents"]),
        "n": _fit(long, lambda row: row["tokens"], lambda row: row["latents"]),
        "M": _fit(long, lambda row: row["latents"], lambda row: row["tokens"]),
    }


def attention_terms(rows: list[Row]) -> SumOfTerms | None:
    """attention = a·n·M + b·n, seconds."""
    if len(latents_of(rows)) < 2:
        return None  # n·M and n would be one term
    n, m = _column(rows, "tokens"), _column(rows, "latents")
    return sum_of_terms({"n·M": n * m, "n": n}, _column(rows, "attention_seconds"))


def dense_attention_terms(rows: list[Row]) -> SumOfTerms | None:
    """attention = a·n² + b·n, seconds."""
    n = _column(rows, "tokens")
    return sum_of_terms({"n²": n**2, "n": n}, _column(rows, "attention_seconds"))


def total_law(rows: list[Row]) -> SumOfTerms | None:
    """total = a·n·M + b·n + c·M + e, seconds."""
    if len(latents_of(rows)) < 2 or len({row["tokens"] for row in rows}) < 2:
        return None  # n·M and n would be one term, or n·M and M
    return sum_of_terms(_criss_cross_terms(rows), _column(rows, "step_seconds"))


def dense_law(rows: list[Row]) -> SumOfTerms | None:
    """total = a·n² + b·n + e, seconds."""
    if not rows:
        return None
    n = _column(rows, "tokens")
    return sum_of_terms(dict(zip(DENSE_TERMS, (n**2, n, np.ones_like(n)), strict=True)), _column(rows, "step_seconds"))


def one_and_several(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Of each context that was measured on one rank and on several: the two rows; by M, number of ranks and n."""
    ours = [row for row in rows if row["kind"] == CRISS_CROSS and "step_seconds" in row]
    one = {(row["latents"], row["tokens"]): row for row in ours if row["context_ranks"] == 1}
    several = sorted(
        (row for row in ours if row["context_ranks"] > 1),
        key=lambda row: (row["latents"], row["context_ranks"], row["tokens"]),
    )
    return [(one[key], row) for row in several if (key := (row["latents"], row["tokens"])) in one]


def latents_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["latents"] for row in rows})


def _fit(rows: list[Row], of: Callable[[Row], float], group: Callable[[Row], object] | None = None) -> PowerLaw | None:
    if len(rows) < 2:
        return None
    groups = [group(row) for row in rows] if group else None
    return power_law([of(row) for row in rows], _column(rows, "attention_seconds"), groups)


def _criss_cross_terms(rows: list[Row]) -> dict[str, Any]:
    n, m = _column(rows, "tokens"), _column(rows, "latents")
    return dict(zip(CRISS_CROSS_TERMS, (n * m, n, m, np.ones_like(n)), strict=True))


def _crossover(
    ours: list[Row], dense: list[Row], latents: int, kind: str, law: SumOfTerms | None, of_dense: SumOfTerms | None
) -> dict[str, Any] | None:
    common = _at_common_lengths(ours, dense)
    if not common:
        return None
    polynomials = None
    if law and of_dense:
        a, b, c, e = (law.coefficients[term].value for term in CRISS_CROSS_TERMS)
        quadratic = [of_dense.coefficients[term].value for term in DENSE_TERMS]
        polynomials = ([a * latents + b, c * latents + e], quadratic)
    lengths, first, second = zip(*common, strict=True)
    found = crossover(lengths, first, second, polynomials)
    return {"latents": latents, "against": kind, **asdict(found)} | {
        "from": lengths[0],
        "to": lengths[-1],
    }


def _speed_ups(ours: list[Row], dense: list[Row], latents: int, kind: str) -> list[dict[str, Any]]:
    return [
        {"tokens": tokens, "latents": latents, "against": kind, "times": second / first}
        for tokens, first, second in _at_common_lengths(ours, dense)
    ]


def _at_common_lengths(ours: list[Row], dense: list[Row]) -> list[tuple[int, float, float]]:
    """(tokens, criss-cross seconds, dense seconds), ascending."""
    first, second = ({row["tokens"]: row["step_seconds"] for row in rows} for rows in (ours, dense))
    return [(tokens, first[tokens], second[tokens]) for tokens in sorted(first.keys() & second.keys())]


def _of(rows: list[Row], latents: int) -> list[Row]:
    return [row for row in rows if row["latents"] == latents]


def _column(rows: list[Row], key: str) -> Any:
    return np.array([row[key] for row in rows], float)


def _as_dict(law: PowerLaw | SumOfTerms | None) -> dict[str, Any] | None:
    return None if law is None else asdict(law)
