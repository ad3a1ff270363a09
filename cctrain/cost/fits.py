"""Laws fitted to measured times: a power of one quantity, a sum of terms, and where two curves cross.

    power law     t = s · x^p           least squares of log t on log x: every point counts alike, whatever its size
    sum of terms  t = Σ coefficient · term, none negative, for each term is time that something takes. Times span three
                  orders of magnitude, and noise is a share of them: so least squares of *relative* errors, without
                  which the longest point alone would decide
    crossover     the n from which on one curve lies above another: between measured points by the straight line
                  through their logarithms, beyond them by the fitted laws, and marked so, as is where
                  these meet between measured points although the curves do not cross

Intervals are at 95 %, from Student's t: they say what noise that is independent from point to point does to a number,
and nothing of a law that does not hold. Where points are too few for one it is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls
from scipy.stats import t as student_t

CONFIDENCE = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """t = scale · x^exponent; with groups, each has a scale of its own, and `scale` is None."""

    exponent: float
    low: float | None
    high: float | None
    r_squared: float
    points: int
    scale: float | None


@dataclass(frozen=True)
class Coefficient:
    """Of one term. Held at its bound, 0, it has no interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SumOfTerms:
    """Errors are relative, |predicted − measured| / measured; `r_squared` is weighted as the fit is."""

    coefficients: dict[str, Coefficient]
    r_squared: float
    median_error: float
    largest_error: float
    points: int

    def predict(self, terms: Mapping[str, ArrayLike]) -> Floats:
        return np.asarray(sum(c.value * np.asarray(terms[name], float) for name, c in self.coefficients.items()))


@dataclass(frozen=True)
class Crossover:
    """From `tokens` on the second curve lies above the first.

    measured      between two measured lengths
    extrapolated  at shorter or longer ones, where the laws meet
    fitted        where the laws meet within the measured lengths, although the curves do not cross there
    always        the second lies above at every measured length, and the laws do not meet at shorter ones
    never         the first lies above at the longest measured length, and the laws do not meet at longer ones

    `by_laws`: the laws, too, say always or never, of every length.
    """

    tokens: float | None
    verdict: str
    by_laws: bool = False


def power_law(x: ArrayLike, y: ArrayLike, groups: Sequence[object] | None = None) -> PowerLaw | None:
    """One exponent for all points (k,), x and y positive; points of a group share a scale of their own.

    `r_squared` is of what x explains within the groups. None where x does not vary within any.
    """
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    labels = list(groups) if groups is not None else [None] * len(log_x)
    num_groups = len(set(labels))
    dx, dy = _without_means(log_x, labels), _without_means(log_y, labels)
    spread = float(dx @ dx)
    if spread < 1e-12:
        return None
    exponent = float(dx @ dy) / spread
    errors = dy - exponent * dx
    freedom = len(log_x) - num_groups - 1
    margin = None
    if freedom > 0:
        margin = _quantile(freedom) * float(np.sqrt(errors @ errors / freedom / spread))
    total = float(dy @ dy)
    return PowerLaw(
        exponent,
        None if margin is None else exponent - margin,
        None if margin is None else exponent + margin,
        1 - float(errors @ errors) / total if total else 1.0,
        len(log_x),
        float(np.exp(log_y.mean() - exponent * log_x.mean())) if num_groups == 1 else None,
    )


def sum_of_terms(terms: Mapping[str, ArrayLike], y: ArrayLike) -> SumOfTerms | None:
    """Non-negative coefficients of the terms, (k,) each, for y (k,) positive; None for fewer points than terms."""
    names, measured = list(terms), np.asarray(y, float)
    if len(measured) < len(names):
        return None
    relative = np.stack([np.asarray(terms[name], float) / measured for name in names], axis=1)
    sizes = np.linalg.norm(relative, axis=0)  # terms differ by ten orders of magnitude
    scaled, ones = relative / sizes, np.ones(len(measured))
    values = nnls(scaled, ones)[0]
    errors = scaled @ values - ones
    kept = values > 0
    margins = np.full(len(names), np.nan)
    margins[kept] = _margins(scaled[:, kept], errors)
    coefficients = {
        name: Coefficient(value, None, None) if np.isnan(margin) else Coefficient(value, value - margin, value + margin)
        for name, value, margin in zip(names, (values / sizes).tolist(), (margins / sizes).tolist(), strict=True)
    }
    weights = measured**-2
    total = float(weights @ (measured - weights @ measured / weights.sum()) ** 2)
    return SumOfTerms(
        coefficients,
        1 - float(errors @ errors) / total if total else 1.0,
        float(np.median(np.abs(errors))),
        float(np.abs(errors).max()),
        len(measured),
    )


def crossover(
    lengths: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    laws: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Crossover:
    """Of two curves, (k,) positive, at the same ascending lengths (k,), one at least.

    `laws` are polynomials in n, highest power first, of both; without them nothing is extrapolated. Where noise makes
    the curves cross several times, the last time counts.
    """
    log_n = np.log(np.asarray(lengths, float))
    above = np.log(np.asarray(second, float) / np.asarray(first, float))
    rises = [k for k in range(len(above) - 1) if above[k] < 0 <= above[k + 1]]
    if rises and above[-1] >= 0:
        k = rises[-1]
        share = -above[k] / (above[k + 1] - above[k])
        return Crossover(float(np.exp(log_n[k] + share * (log_n[k + 1] - log_n[k]))), "measured")
    meetings = _meetings(*laws) if laws else []
    verdict = "always" if above[-1] >= 0 else "never"
    if not meetings:
        return Crossover(None, verdict, by_laws=laws is not None)
    shortest, longest = np.asarray(lengths, float)[[0, -1]]
    beyond = [n for n in meetings if (n < shortest if above[-1] >= 0 else n > longest)]
    within = [n for n in meetings if shortest <= n <= longest]
    if beyond or within:
        return Crossover(max(beyond or within), "extrapolated" if beyond else "fitted")
    return Crossover(None, verdict)  # the laws say otherwise, but what was measured says this


def _meetings(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """The n ≥ 1 at which the second polynomial rises above the first."""
    difference = np.polysub(second, first)
    slope = np.polyder(difference)
    roots = np.roots(difference)
    real = [float(root.real) for root in roots if abs(root.imag) < 1e-9 * abs(root)]
    return [n for n in real if n >= 1 and np.polyval(slope, n) > 0]


def _without_means(values: Floats, labels: Sequence[object]) -> Floats:
    """Each value less the mean of its group."""
    centred = values.copy()
    for label in set(labels):
        members = np.array([other == label for other in labels])
        centred[members] -= values[members].mean()
    return centred


def _margins(columns: Floats, errors: Floats) -> Floats:
    """Half the interval of each least-squares coefficient of these columns (k, c); NaN where there is none."""
    freedom = columns.shape[0] - columns.shape[1]
    if freedom <= 0 or np.linalg.matrix_rank(columns) < columns.shape[1]:
        return np.full(columns.shape[1], np.nan)
    variances = np.diag(np.linalg.inv(columns.T @ columns)) * float(errors @ errors) / freedom
    return _quantile(freedom) * np.sqrt(variances)


def _quantile(freedom: int) -> float:
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))
