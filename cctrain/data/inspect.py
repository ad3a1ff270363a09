"""What a token store holds, as facts and as a page of text."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cctrain.data.prepare.quality import format_table
from cctrain.data.store.layout import LARGEST_STORED_COUNT, SHARDS
from cctrain.data.store.manifest import Manifest
from cctrain.data.store.store import TokenStore, open_store, verify_store
from cctrain.errors import DataError

Facts = dict[str, Any]

_BARS = 15  # at most
_LONGEST_BAR = 40
_MOST_LISTED = 6  # sources or notes; --json lists all


def inspect_store(path: Path, verify: bool = False) -> Facts:
    """The manifest of a store, with its files summed up, and what follows from the number of tokens of each cell.

    With `verify`, everything is read and hashed; DataError names each damaged file.
    """
    if verify and (damaged := verify_store(path)):
        raise DataError("\n".join([f"{path} is damaged; copy it again or prepare it again:", *damaged]))
    store = open_store(path)
    facts = {name: value for name, value in store.manifest.items() if name != "files"}
    facts["tokens_per_cell"] = facts["tokens_per_cell"] | {"histogram": _histogram(store.num_tokens)}
    facts["groups"] = _groups(store)
    facts["files"] = len(store.manifest["files"])
    facts["bytes"] = _bytes(store.manifest)
    return facts


def describe(path: Path, facts: Facts, verified: bool) -> str:
    held_out = facts["num_cells"] - facts["num_train"]
    of_tokens, tokens = facts["bytes"]["tokens"], facts["num_tokens"]
    lines = [
        f"token store {path}" + (", every file verified" if verified else ""),
        f"cells       {facts['num_cells']:,}: {facts['num_train']:,} for training, {held_out:,} held out",
        *_describe_split(facts),
        *_describe_groups(facts),
        f"genes       {facts['num_genes']:,}"
        + (", from a given vocabulary" if facts.get("vocabulary") == "given" else ""),
        f"tokens      {tokens:,} of type ({facts['dtypes']['genes']}, {facts['dtypes']['counts']}); "
        f"{facts['num_cells_without_tokens']:,} cells without any; "
        f"{facts['num_clipped_counts']:,} counts clipped at {LARGEST_STORED_COUNT:,}",
        f"form        {facts['container']}, {facts['num_shards']:,} shard(s)",
        f"size        {_size(facts['bytes']['total'])} in {facts['files']:,} files; tokens {_size(of_tokens)}, "
        f"{of_tokens / max(tokens, 1):.2f} bytes each",
        f"content     {facts['digest']}",
        "",
        *_listed(line for source in facts["sources"] for line in _describe_source(source)),
        *_listed(f"note        {note}" for note in facts.get("notes", [])),
        *_listed(f"left out    {failed}" for failed in facts.get("failed", [])),
        "",
        *_describe_lengths(facts["tokens_per_cell"]),
        "",
        format_table(facts["quality"]),
    ]
    return "\n".join(lines)


def _histogram(num_tokens: np.ndarray) -> dict[str, list[int]]:
    """Cells by tokens: bar i has the cells with edges[i] .. edges[i + 1] - 1 tokens, the last one all longer ones too.

    Bars are equally wide and reach to the 99th percentile: a few huge cells would leave one bar for all others.
    """
    low, high = (np.percentile(num_tokens, share) for share in (0, 99))
    width = _round_up((high - low) / _BARS)
    first = int(low) // width * width
    num_bars = int(high - first) // width + 1
    edges = first + width * np.arange(num_bars + 1)
    cells = np.bincount(np.minimum((num_tokens - first) // width, num_bars - 1), minlength=num_bars)
    return {"edges": edges.tolist(), "cells": cells.tolist()}


def _round_up(number: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 10 ** max(0, math.floor(math.log10(max(number, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def _groups(store: TokenStore) -> Facts | None:
    if store.groups is None:
        return None
    cells = np.diff(store.groups.starts)
    tokens = np.add.reduceat(store.num_tokens, store.groups.starts[:-1])
    largest = int(cells.argmax())
    return {
        "num_groups": len(cells),
        "num_train": store.groups.num_train,
        "cells_median": float(np.median(cells)),
        "cells_max": int(cells.max()),
        "largest": str(store.groups.names[largest]),
        "tokens_median": float(np.median(tokens)),
        "tokens_max": int(tokens.max()),
    }


def _bytes(manifest: Manifest) -> dict[str, int]:
    """Of all files, and of those that hold tokens."""
    of_tokens = ("cells.zarr/X/data/", "cells.zarr/X/indices/", f"{SHARDS}/")
    sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    return {
        "total": sum(sizes.values()),
        "tokens": sum(size for name, size in sizes.items() if name.startswith(of_tokens)),
    }


def _describe_split(facts: Facts) -> list[str]:
    if facts.get("hold_out"):
        return [f"split       held out are the cells with {facts.get('split_by')} {', '.join(facts['hold_out'])}"]
    if facts.get("held_out") is None:
        return []
    what = "cells" if facts.get("split_by") is None else f"values of {facts['split_by']}, each with all its cells"
    return [f"split       {facts['held_out']:.0%} of the {what}, by a hash with seed {facts.get('seed')}"]


def _describe_groups(facts: Facts) -> list[str]:
    groups = facts["groups"]
    if groups is None:
        return ["contexts    cells (no groups: `cctrain prepare --group-by COLUMN` makes them)"]
    return [
        f"groups      {groups['num_groups']:,} by {facts.get('group_by')}: {groups['num_train']:,} for training, "
        f"{groups['num_groups'] - groups['num_train']:,} held out",
        f"            of {groups['cells_median']:,.0f} cells and {groups['tokens_median']:,.0f} tokens (median), "
        f"{groups['cells_max']:,} cells (most: {groups['largest']}), {groups['tokens_max']:,} tokens (most)",
    ]


def _describe_source(source: Facts) -> list[str]:
    return [
        f"source      {source['name']}: {source['num_cells_kept']:,} of {source['num_cells']:,} cells kept, "
        f"counts from {source['counts_from']}",
        *(f"            {note}" for note in source["notes"]),
    ]


def _describe_lengths(tokens: Facts) -> Iterator[str]:
    edges, cells = tokens["histogram"]["edges"], tokens["histogram"]["cells"]
    yield (
        f"tokens a cell: {tokens['median']:,.0f} (median), {tokens['percentile_99']:,.0f} (99th percentile), "
        f"{tokens['max']:,} (most)"
    )
    for index, (edge, number) in enumerate(zip(edges[:-1], cells, strict=True)):
        to = f"to {edges[index + 1] - 1:,}" if index < len(cells) - 1 else "and more"
        bar = "#" * -(-number * _LONGEST_BAR // max(*cells, 1))
        yield f"{edge:>9,} {to:<12} {number:>11,} {bar}".rstrip()


def _listed(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    rest = len(every) - _MOST_LISTED
    return every if rest <= 1 else [*every[:_MOST_LISTED], f"            and {rest:,} more lines: --json has all"]


def _size(number: int) -> str:
    power = min(3, len(str(number)) // 3 if number >= 1000 else 0)
    return f"{number / 1000**power:,.1f} {('bytes', 'kB', 'MB', 'GB')[power]}"
