"""What a token store holds, in a page of text."""

from pathlib import Path
from typing import Any

from cctrain.data.quality import format_table
from cctrain.data.store import read_manifest, verify_store
from cctrain.errors import DataError


def inspect_store(path: Path, verify: bool = False) -> dict[str, Any]:
    """The manifest of a store. With `verify`, everything is read and hashed; DataError names each damaged file."""
    manifest = read_manifest(path)
    if verify and (damaged := verify_store(path)):
        raise DataError("\n".join([f"{path} is damaged; copy it again or prepare it again:", *damaged]))
    return manifest


def describe(path: Path, manifest: dict[str, Any], verified: bool) -> str:
    tokens = manifest["tokens_per_cell"]
    held_out = manifest["num_cells"] - manifest["num_train"]
    lines = [
        f"token store {path}" + (", every file verified" if verified else ""),
        f"cells     {manifest['num_cells']:,}: {manifest['num_train']:,} for training, {held_out:,} held out",
        f"genes     {manifest['num_genes']:,}",
        f"tokens    {manifest['num_tokens']:,}; a cell has {tokens['median']:,.0f} (median), "
        f"{tokens['percentile_99']:,.0f} (99th percentile), {tokens['max']:,} (most)",
        f"content   {manifest['digest']}",
    ]
    lines += [
        f"source    {source['name']}: {source['num_cells_kept']:,} of {source['num_cells']:,} cells kept, "
        f"counts from {source['counts_from']}"
        for source in manifest["sources"]
    ]
    return "\n".join([*lines, "", format_table(manifest["quality"])])
