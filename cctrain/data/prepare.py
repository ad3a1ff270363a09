"""Files of cells -> token store, in an order that keeps held-out cells out of everything that is estimated.

    scan        every cell of every source once: validated, profiled (genes, counts, content hash)
    select      quality control of cells; the split; the order: functions of the seed and the cells' content
    distribute  a second reading: counts of genes, and all entries into files by destination row
    write       vocabulary and statistics from training cells; shards, tables, manifest

All is written beside OUT and renamed at the end, so OUT is complete or absent. Memory is bounded by blocks of
cells, one shard, the sample that dispersions are fitted on, and some 50 bytes and the metadata of every cell.
The manifest has neither times nor paths: the same cells and options give the same bytes.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from cctrain.data.buckets import Buckets, weighted_edges
from cctrain.data.files import check_free_space, file_entries, file_sha256, workspace
from cctrain.data.metadata import gene_table, merge_obs
from cctrain.data.progress import progress
from cctrain.data.quality import CellProfiles, QualityControl, Row, format_table, select_cells, select_genes
from cctrain.data.scan import GeneCounts, GeneUnion, distribute, scan, unite_genes
from cctrain.data.sources import Source, open_source
from cctrain.data.split import destination_rows, hold_out
from cctrain.data.statistics import detection_rates, dispersions, gene_loadings, gene_shares
from cctrain.data.store import FORMAT, VERSION, read_manifest, vocabulary_digest
from cctrain.data.store_writer import CellWriter, write_tables
from cctrain.errors import DataError, UsageError

ENTRIES_PER_BUCKET = 8_000_000  # counts that are put in order in memory at a time
# Dispersions are fitted on the first training cells of the store, a random sample because it is shuffled.
SAMPLE_CELLS = 50_000
SAMPLE_TOKENS = 40_000_000
_BYTES_PER_ENTRY = 12  # of a bucket; the store itself takes at most half of that


@dataclass
class Selection:
    """Cells that passed, and where they go. Arrays are over these cells, in the order of the sources."""

    cells: CellProfiles
    rows: np.ndarray  # int64 destination row
    num_train: int
    destination: np.ndarray  # int64 (all cells of all sources,) destination row, -1 for a cell left out
    table: list[Row]
    notes: list[str]

    @property
    def num_cells(self) -> int:
        return len(self.cells)

    def in_store_order(self, values: np.ndarray) -> np.ndarray:
        ordered = np.empty_like(values)
        ordered[self.rows] = values
        return ordered


@dataclass
class Vocabulary:
    """Genes of the store: `kept` masks the united genes, the other arrays are over the vocabulary."""

    kept: np.ndarray
    ids: np.ndarray
    measured: np.ndarray  # bool (num_sources, V)
    row: Row


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def prepare(
    sources: list[Path],
    out: Path,
    *,
    quality: QualityControl,
    held_out: float = 0.1,
    seed: int = 0,
    counts: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    report: Callable[[str], None] = _print,
) -> dict[str, Any]:
    """Write the token store OUT and return its manifest; with `dry_run` write nothing and return the plan.

    `sources` are .h5ad files or 10x folders; `counts` chooses the matrix of .h5ad files. Raises DataError for
    input that is not raw counts, for an OUT that exists, and when quality control leaves nothing; UsageError
    for options.
    """
    out = Path(out)
    _check_options(sources, held_out)
    if dry_run:
        return _plan(sources, quality, held_out, seed, counts, report)
    _check_out(out, overwrite, report)
    with workspace(out, overwrite) as partial:
        scratch = partial / "scratch"
        opened = _open(sources, counts, scratch, report)
        union = unite_genes(opened)
        selection = _select(opened, union, quality, held_out, seed, report)
        manifest = _write(partial, opened, union, selection, quality, report)
        manifest |= {"seed": seed, "held_out": held_out}
        manifest["files"] = file_entries(partial / "cells.zarr")
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    report(
        f"{out}: {manifest['num_cells']:,} cells, {manifest['num_tokens']:,} tokens, content {manifest['digest'][:16]}"
    )
    return manifest


def _check_options(sources: list[Path], held_out: float) -> None:
    if not sources:
        raise UsageError("No source: give at least one .h5ad file or 10x folder.")
    resolved = [Path(path).resolve() for path in sources]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UsageError(f"{path} is given twice: each source once.")
    if not 0 < held_out < 1:
        raise UsageError(f"held_out is {held_out}: the share of held-out cells lies between 0 and 1, such as 0.1.")


def _check_out(out: Path, overwrite: bool, report: Callable[[str], None]) -> None:
    if out.exists():
        if not overwrite:
            raise DataError(f"{out} exists: choose another --out, or replace the store with --overwrite.")
        read_manifest(out)  # only a token store is ever replaced
    for left in sorted(out.parent.glob(f"{out.name}.partial-*")) if out.parent.is_dir() else []:
        report(f"{left} was left by a prepare that was killed, or belongs to one that is running")


def _open(paths: list[Path], counts: str | None, scratch: Path | None, report: Callable[[str], None]) -> list[Source]:
    opened = [open_source(Path(path), counts, scratch) for path in paths]
    for source in opened:
        report(
            f"{source.path}: {source.num_cells:,} cells, {len(source.gene_ids):,} genes, "
            f"counts from {source.counts_from}"
        )
        for note in source.notes:
            report(f"  {note}")
    return opened


def _select(
    sources: list[Source],
    union: GeneUnion,
    quality: QualityControl,
    held_out: float,
    seed: int,
    report: Callable[[str], None],
) -> Selection:
    if quality.max_mitochondrial is not None:
        _check_mitochondrial_names(sources)
    everything = scan(sources, union)
    kept, table = select_cells(everything, quality)
    if not kept.any():
        raise DataError(f"No cell passes quality control. Relax the rule that removed them:\n{format_table(table)}")
    cells = CellProfiles(**{name: values[kept] for name, values in vars(everything).items()})
    held, note = hold_out(cells.content, held_out, seed)
    if note:
        report(note)
    rows = destination_rows(cells, held, seed)
    destination = np.full(len(everything), -1, dtype=np.int64)
    destination[kept] = rows
    return Selection(cells, rows, int((~held).sum()), destination, table, [note] if note else [])


def _check_mitochondrial_names(sources: list[Source]) -> None:
    for source in sources:
        if not any(name.upper().startswith("MT-") for name in source.gene_names):
            raise DataError(
                f"{source.path}: max_mitochondrial is set, but no gene is named MT-...: the rule would see "
                "nothing. Give a file with gene names, or leave the rule off."
            )


def _vocabulary(union: GeneUnion, found: GeneCounts, quality: QualityControl, table: list[Row]) -> Vocabulary:
    kept, row = select_genes(found.train_detected.sum(axis=0), quality)
    if not kept.any():
        raise DataError(
            f"No gene is expressed in {quality.min_cells} training cells: relax min_cells, or the rules for "
            "cells:\n" + format_table([*table, row])
        )
    return Vocabulary(kept, union.ids[kept], union.measured()[:, kept], row)


def _plan(
    paths: list[Path],
    quality: QualityControl,
    held_out: float,
    seed: int,
    counts: str | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    opened = _open(paths, counts, None, report)
    union = unite_genes(opened)
    selection = _select(opened, union, quality, held_out, seed, report)
    found = distribute(opened, union, selection.destination, selection.num_train, None)
    vocabulary = _vocabulary(union, found, quality, selection.table)
    table = [*selection.table, vocabulary.row]
    num_tokens = int(found.detected[vocabulary.kept].sum())
    report(format_table(table))
    return {
        "num_cells": selection.num_cells,
        "num_train": selection.num_train,
        "num_genes": len(vocabulary.ids),
        "num_tokens": num_tokens,
        "bytes_at_most": num_tokens * 4,
        "temporary_bytes": int(selection.cells.num_genes.sum()) * _BYTES_PER_ENTRY,
        "sources": _describe_sources(opened, selection, digests=False),
        "quality": table,
        "notes": selection.notes,
    }


def _write(
    partial: Path,
    sources: list[Source],
    union: GeneUnion,
    selection: Selection,
    quality: QualityControl,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Everything but the manifest, which is returned; the scratch folder is gone afterwards."""
    scratch = partial / "scratch"
    sizes = selection.in_store_order(selection.cells.num_genes)
    check_free_space(partial, int(sizes.sum(dtype=np.int64)) * _BYTES_PER_ENTRY * 3 // 2)
    with Buckets(scratch / "order", weighted_edges(sizes, ENTRIES_PER_BUCKET), np.uint32) as buckets:
        found = distribute(sources, union, selection.destination, selection.num_train, buckets)
        vocabulary = _vocabulary(union, found, quality, selection.table)
        table = [*selection.table, vocabulary.row]
        report(format_table(table))
        source_of_cell = selection.in_store_order(selection.cells.source).astype(np.int64)
        writer = CellWriter(
            partial / "cells.zarr",
            num_cells=selection.num_cells,
            num_tokens=int(found.detected[vocabulary.kept].sum()),
            num_genes=len(vocabulary.ids),
            largest_count=int(found.largest[vocabulary.kept].max()),
        )
        sample = _write_cells(writer, buckets, vocabulary.kept, source_of_cell, selection.num_train)
    shutil.rmtree(scratch)
    num_tokens = writer.close()
    var = gene_table(sources, vocabulary.ids)
    num_train_cells = np.bincount(source_of_cell[: selection.num_train], minlength=len(sources))
    detected = found.train_detected[:, vocabulary.kept]
    var["share"] = gene_shares(found.train_total[:, vocabulary.kept], vocabulary.measured)
    var["detection_rate"] = detection_rates(detected, num_train_cells, vocabulary.measured)
    with progress("fitting dispersions", "genes", len(vocabulary.ids)) as advance:
        var["theta"] = dispersions(
            sample, source_of_cell[: sample.shape[0]], var["share"].to_numpy(), vocabulary.measured, advance
        )
    report("finding which genes vary together")
    loadings = gene_loadings(sample, source_of_cell[: sample.shape[0]], var["share"].to_numpy(), vocabulary.measured)
    source, row = (selection.in_store_order(part) for part in (selection.cells.source, selection.cells.row))
    obs, renamed = merge_obs(sources, source, row, selection.num_train)
    for note in renamed:
        report(note)
    write_tables(writer.group, var, vocabulary.measured, loadings, obs)
    return {
        "format": FORMAT,
        "version": VERSION,
        "container": "zarr",
        "digest": writer.digest(vocabulary.ids.tolist(), vocabulary.measured, selection.num_train),
        "vocabulary_digest": vocabulary_digest(vocabulary.ids.tolist()),
        "num_cells": selection.num_cells,
        "num_train": selection.num_train,
        "num_genes": len(vocabulary.ids),
        "num_tokens": int(num_tokens.sum()),
        "num_shards": writer.num_shards,
        "num_cells_without_tokens": int((num_tokens == 0).sum()),
        "num_clipped_counts": writer.num_clipped,
        "dtypes": {"genes": writer.genes_dtype.name, "counts": writer.counts_dtype.name},
        "tokens_per_cell": {
            "median": float(np.median(num_tokens)),
            "percentile_99": float(np.percentile(num_tokens, 99)),
            "max": int(num_tokens.max()),
        },
        "unit": "cell",
        "statistics_cells": sample.shape[0],
        "sources": _describe_sources(sources, selection, digests=True),
        "quality": table,
        "notes": selection.notes + renamed,
    }


def _write_cells(
    writer: CellWriter, buckets: Buckets, kept: np.ndarray, source_of_cell: np.ndarray, num_train: int
) -> sp.csr_matrix:
    """Bucket after bucket into X; returns the first training cells, on which dispersions are fitted."""
    place = np.cumsum(kept) - 1
    sample: list[sp.csr_matrix] = []
    sample_cells = sample_tokens = 0
    with progress("writing cells", "cells", len(source_of_cell)) as advance:
        for first, last, rows, genes, values in buckets.drain():
            entry = kept[genes]
            entries = (values[entry].astype(np.int64), (rows[entry], place[genes[entry]]))
            cells = sp.csr_matrix(entries, shape=(last - first, int(kept.sum())))
            cells = writer.append(cells, source_of_cell[first:last])
            wanted = min(num_train - first, SAMPLE_CELLS - sample_cells, cells.shape[0])
            fits = np.searchsorted(cells.indptr, SAMPLE_TOKENS - sample_tokens, side="right") - 1
            wanted = min(wanted, int(fits))
            if wanted > 0 and sample_cells == first:
                part = cells[:wanted]
                part.data = part.data.astype(np.int32)
                sample.append(part)
                sample_cells += wanted
                sample_tokens += part.nnz
            advance(last - first)
    return sp.vstack(sample, format="csr")


def _describe_sources(sources: list[Source], selection: Selection, digests: bool) -> list[dict[str, Any]]:
    kept = np.bincount(selection.cells.source, minlength=len(sources))
    described: list[dict[str, Any]] = []
    for i, source in enumerate(sources):
        entry: dict[str, Any] = {
            "name": source.path.resolve().name,
            "counts_from": source.counts_from,
            "num_cells": source.num_cells,
            "num_cells_kept": int(kept[i]),
            "num_genes": len(source.gene_ids),
            "num_duplicate_genes": source.num_duplicate_genes,
            "notes": source.notes,
        }
        if digests:
            entry["sha256"] = {file.name: file_sha256(file) for file in source.files}
        described.append(entry)
    return described
