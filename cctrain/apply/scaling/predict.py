"""What a point will take, before it is measured: seconds, from the closed form and the points measured so far; memory.

Predictions decide what is left out and tell how long a sweep will last. None of them is ever reported as a measurement.
"""

from collections.abc import Mapping

from cctrain.apply.scaling.measure import describe, predicted_seconds, times_of_repeats
from cctrain.apply.scaling.points import Point, Row
from cctrain.apply.scaling.work import Setting, num_targets
from cctrain.cost.memory import activations
from cctrain.cost.parameters import num_parameters
from cctrain.cost.work import ELEMENT_BYTES, Load
from cctrain.model.tiles import TILE_TOKENS

SECONDS_TO_START = 5.0  # a process that imports torch and makes its first tiny step; 3 to 6 were measured
UTILISATION = 0.6  # of the matrix product's rate, where nothing was measured; 0.63 to 1.1 was, on two CPU cores
NUMBERS_A_PARAMETER = 4  # weight, gradient and two moments


def describe_point(point: Point, setting: Setting) -> Row:
    return {
        "key": point.key,
        "kind": point.kind,
        **describe(point.curve, point.model, point.tokens, setting),
        "context_ranks": point.context_ranks,
    }


def seconds_of_turn(row: Row, rows: Mapping[str, Row], product_rate: float) -> float:
    """Of one step and the attention of one layer, from what was measured of this point, else from the longest shorter
    context of this curve that was measured, else from FLOPs at a share of the matrix product's rate."""
    own = rows.get(row["key"], {})
    shorter = [own] if "step_seconds" in own else measured_shorter(row, rows)
    if shorter:
        return predicted_seconds(row, shorter[-1])
    return row["flops"] * (1 + row["attention_share_of_flops"] / row["depth"]) / (UTILISATION * product_rate)


def seconds_of_point(seconds: float, most_repeats: int, seconds_of_repeats: float, rounds: int) -> float:
    """Of so many rounds, each from the start of a process to its end, if a turn takes so long."""
    repeats = times_of_repeats(seconds, most_repeats, seconds_of_repeats)
    return (SECONDS_TO_START + seconds * (1 + repeats)) * (rounds if repeats else 1)


def bytes_of_point(point: Point, setting: Setting) -> float:
    """Of each rank: weights, gradients, two moments and the activations, all in the setting's precision."""
    model, tokens = point.model, -(-point.tokens // point.context_ranks)
    element_bytes = ELEMENT_BYTES[setting.dtype]
    state = NUMBERS_A_PARAMETER * element_bytes * num_parameters(model, setting.num_genes)
    tile = setting.memory.tile_tokens or TILE_TOKENS[setting.device]
    load = Load(tokens, 1, num_targets(point.tokens) / point.context_ranks)
    return state + activations(model, setting.num_genes, load, setting.memory, tile, element_bytes).total


def extrapolated_bytes(row: Row, rows: Mapping[str, Row]) -> float | None:
    """Of each rank, along the straight line through the two longest shorter contexts of this curve; None without."""
    shorter = measured_shorter(row, rows)
    if len(shorter) < 2:
        return None
    first, last = shorter[-2:]
    slope = (last["memory_bytes"] - first["memory_bytes"]) / (last["tokens"] - first["tokens"])
    return last["memory_bytes"] + max(0.0, slope) * (row["tokens"] - last["tokens"])


def measured_shorter(row: Row, rows: Mapping[str, Row]) -> list[Row]:
    """Ascending."""
    return sorted(
        (r for r in rows.values() if r["name"] == row["name"] and r["tokens"] < row["tokens"] and "step_seconds" in r),
        key=lambda r: r["tokens"],
    )
