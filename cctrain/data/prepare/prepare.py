"""Files of cells -> token store, in an order that keeps held-out cells out of everything that is estimated.

    arrange   matrices that are stored by gene, by cell
    scan      every cell of every source once: validated, profiled (genes, counts, content hash), its tokens kept
    select    quality control of cells; the split; the order: functions of the seed and the cells' content
    sort      each piece of a source by destination row; genes are counted
    write     vocabulary and statistics from training cells; shards, tables, manifest

All but `select` and the tables is done by tasks, in as many processes as there are workers. A task leaves one file
and is not done twice: a prepare that was killed continues. All is written beside OUT and renamed at the end, so OUT
is complete or absent. The manifest has neither times nor paths: the same cells and options give the same bytes,
whatever the number of workers and however often it was stopped.

Memory does not grow with the counts, and little with the cells. In bytes:

    worker    0.25 GB of libraries + the largest of  100 x counts of a block of a source (2 million)
                                                      30 x tokens of a piece (8 million)
                                                       8 x tokens of a shard (2^25) + 16 x tokens of a piece
                                                      25 x tokens of the sample of the statistics (20 million)
    parent    0.25 GB of libraries + about 400 a cell, and the text in its metadata

The disk holds, beside OUT, 4 bytes a count until the store is there (6 where a source has more than 65,536 genes),
and 12 more for a matrix that is stored by gene.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cctrain.data.files import check_free_space, publish_array
from cctrain.data.prepare.assemble import Frame, fit_genes, hash_content, read_fitted, sample_cells, write_shard
from cctrain.data.prepare.counting import (
    Counted,
    count_as_selected,
    count_tokens_of_cells,
    fix_selection,
    sort_cells,
    sum_genes,
)
from cctrain.data.prepare.inputs import (
    BYTES_PER_TOKEN,
    Inputs,
    Plan,
    Scanned,
    arrange_inputs,
    cut_inputs,
    describe_files,
    open_inputs,
    read_digests,
    scan_inputs,
)
from cctrain.data.prepare.metadata import gene_table, merge_obs
from cctrain.data.prepare.pieces import TOKENS_PER_PIECE, Cut, Shuffled
from cctrain.data.prepare.quality import QualityControl, format_table
from cctrain.data.prepare.scan import Expected
from cctrain.data.prepare.selection import Division, Selection, select
from cctrain.data.prepare.statistics import detection_rates, gene_shares
from cctrain.data.prepare.tasks import Task, Workers
from cctrain.data.prepare.vocabulary import GeneUnion, Vocabulary, choose_genes, read_vocabulary
from cctrain.data.prepare.workspace import partial_folder, workspace
from cctrain.data.store import writer
from cctrain.data.store.content_digest import vocabulary_digest
from cctrain.data.store.layout import CONTAINERS, smallest_unsigned
from cctrain.data.store.manifest import FORMAT, VERSION, check_is_store, file_entries, write_manifest
from cctrain.errors import DataError, UsageError

MATRICES = "matrices"  # in the scratch folder: what was stored by gene, by cell, until it is scanned

_LARGEST_BYTE = 2**8 - 1
_LARGEST_STORED = 2**16 - 1


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a store, besides the cells."""

    quality: QualityControl
    division: Division
    counts: str | None
    container: str
    given: np.ndarray | None  # gene ids of a vocabulary that was given, ascending
    min_matched: float

    def check(self) -> None:
        self.division.check()
        if self.container not in CONTAINERS:
            raise UsageError(f"--format {self.container}: a store is one of {', '.join(CONTAINERS)}.")
        if not 0 < self.min_matched <= 1:
            raise UsageError(f"min_matched is {self.min_matched}: a share of genes and counts lies between 0 and 1.")

    def describe(self) -> dict[str, Any]:
        described = {**asdict(self.quality), **asdict(self.division), "counts": self.counts}
        given = None if self.given is None else vocabulary_digest(self.given.tolist())
        return {**described, "container": self.container, "vocabulary": given, "min_matched": self.min_matched}


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
    container: str = "zarr",
    group_by: str | None = None,
    split_by: str | None = None,
    hold_out: tuple[str, ...] | list[str] = (),
    vocabulary: Path | None = None,
    min_matched: float = 0.2,
    workers: int = 1,
    keep_going: bool = False,
    report: Callable[[str], None] = _print,
) -> dict[str, Any]:
    """Write the token store OUT and return its manifest; with `dry_run` write nothing and return the plan.

    `sources` are what `open_source` opens; `counts` chooses the matrix. `vocabulary` is a file of gene ids or a
    store, of whose genes, and of the counts of each source, `min_matched` must be matched. With `keep_going` a
    source that fails is in the manifest's `failed` and not in the store. More than one worker needs a main module
    that can be imported (processes are spawned).

    Raises DataError for input that is not raw counts, for an OUT that exists, and when quality control leaves
    nothing; UsageError for options.
    """
    out = Path(out)
    given = None if vocabulary is None else read_vocabulary(Path(vocabulary))
    division = Division(held_out, seed, group_by, split_by, tuple(hold_out))
    options = Options(quality, division, counts, container, given, min_matched)
    options.check()
    _check_sources(sources, workers)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="cctrain-prepare-") as folder, Workers(workers) as pool:
            inputs = _open(sources, options, Path(folder) / MATRICES, keep_going, report)
            return _plan(inputs, options, pool, Path(folder))
    _check_out(out, overwrite)
    scratch = partial_folder(out) / "scratch"
    inputs = _open(sources, options, scratch / MATRICES, keep_going, report)
    described = {"version": VERSION, "sources": describe_files(inputs), **options.describe()}
    with workspace(out, described, report) as partial, Workers(workers) as pool:
        manifest = _write(inputs, options, pool, partial, scratch)
    report(
        f"{out}: {manifest['num_cells']:,} cells, {manifest['num_tokens']:,} tokens, content {manifest['digest'][:16]}"
    )
    return manifest


def _check_sources(sources: list[Path], workers: int) -> None:
    if not sources:
        raise UsageError("No source: give at least one .h5ad file or 10x folder.")
    resolved = [Path(path).resolve() for path in sources]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UsageError(f"{path} is given twice: each source once.")
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least 1.")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists():
        if not overwrite:
            raise DataError(f"{out} exists: choose another --out, or replace the store with --overwrite.")
        check_is_store(out)  # only a token store is ever replaced


def _open(
    paths: list[Path], options: Options, scratch: Path, keep_going: bool, report: Callable[[str], None]
) -> Inputs:
    return open_inputs(
        paths,
        options.counts,
        scratch,
        options.division.columns(),
        options.quality.max_mitochondrial is not None,
        options.given,
        options.min_matched,
        keep_going,
        report,
    )


def _plan(inputs: Inputs, options: Options, pool: Workers, folder: Path) -> dict[str, Any]:
    """What `prepare` would write. The sources are read once; twice what was not on the side that was expected."""
    division = options.division
    by_content = division.group_by is None and division.split_by is None
    expected = Expected(options.quality, division.held_out, division.seed) if by_content else None
    arrange_inputs(inputs, pool, folder)
    cuts = cut_inputs(inputs, folder)
    scanned = scan_inputs(inputs, pool, cuts, folder, options.given, options.min_matched, Plan(expected))
    selection = select(inputs.sources, scanned.cells, options.quality, options.division)
    count_as_selected(inputs, scanned, selection, pool)
    counted = sum_genes(inputs, scanned, options.given)
    vocabulary = _choose_genes(inputs, scanned, counted, selection, options)
    num_tokens = int(counted.detected[vocabulary.kept].sum())
    return {
        "num_cells": selection.num_cells,
        "num_train": selection.num_train,
        "num_genes": len(vocabulary.ids),
        "num_tokens": num_tokens,
        "unit": _unit(options),
        "num_groups": None if selection.groups is None else len(selection.groups.names),
        "bytes_at_most": num_tokens * sum(dtype.itemsize for dtype in _dtypes(counted, vocabulary)),
        "temporary_bytes": int(scanned.cells.num_genes.sum(dtype=np.int64)) * BYTES_PER_TOKEN,
        "sources": _describe_sources(inputs, scanned, selection, vocabulary, counted.union),
        "failed": inputs.failed,
        "quality": [*selection.table, vocabulary.row],
        "notes": selection.notes,
    }


def _write(inputs: Inputs, options: Options, pool: Workers, partial: Path, scratch: Path) -> dict[str, Any]:
    """OUT.partial/store, complete. The manifest is returned."""
    arrange_inputs(inputs, pool, scratch)
    cuts = cut_inputs(inputs, scratch)
    _check_space(partial, inputs, cuts)
    scanned = scan_inputs(inputs, pool, cuts, scratch, options.given, options.min_matched)
    shutil.rmtree(scratch / MATRICES, ignore_errors=True)
    selection = select(inputs.sources, scanned.cells, options.quality, options.division)
    for note in selection.notes:
        inputs.report(note)
    fix_selection(scratch, selection)
    sort_cells(inputs, scanned, selection, pool, scratch)
    counted = sum_genes(inputs, scanned, options.given)
    vocabulary = _choose_genes(inputs, scanned, counted, selection, options)

    shuffled = Shuffled(scanned.cuts, scratch)
    num_tokens = count_tokens_of_cells(shuffled, vocabulary, counted.union, selection.num_cells, pool)
    frame = _frame(partial / "store", options, counted, vocabulary, num_tokens, scratch)
    source_of_cell = selection.in_store_order(selection.cells.source).astype(np.int64)
    var = gene_table(inputs.sources, vocabulary.ids)
    var["share"] = gene_shares(counted.train_total[:, vocabulary.kept], vocabulary.measured)
    num_train_cells = np.bincount(source_of_cell[: selection.num_train], minlength=len(inputs.sources))
    detected = counted.train_detected[:, vocabulary.kept]
    var["detection_rate"] = detection_rates(detected, num_train_cells, vocabulary.measured)

    sample = sample_cells(num_tokens, selection.num_train, options.division.seed, selection.groups is not None)
    fit = (shuffled, frame.indptr, sample, var["share"].to_numpy(), vocabulary.measured)
    digest, num_shards = _assemble(frame, shuffled, selection, vocabulary, fit, scratch, pool)
    var["theta"], loadings = read_fitted(scratch / "fitted.npz")
    source, row = (selection.in_store_order(part) for part in (selection.cells.source, selection.cells.row))
    obs, renamed = merge_obs(inputs.sources, source, row, selection.num_train)
    for note in renamed:
        inputs.report(note)
    writer.write_tables(frame.root, var, vocabulary.measured, loadings, obs, selection.groups)

    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "container": options.container,
        "digest": digest,
        "vocabulary_digest": vocabulary_digest(vocabulary.ids.tolist()),
        "num_cells": selection.num_cells,
        "num_train": selection.num_train,
        "num_genes": len(vocabulary.ids),
        "num_tokens": int(num_tokens.sum()),
        "num_shards": num_shards,
        "num_cells_without_tokens": int((num_tokens == 0).sum()),
        "num_clipped_counts": int(counted.clipped[vocabulary.kept].sum()),
        "dtypes": {"genes": frame.genes_dtype, "counts": frame.counts_dtype},
        "tokens_per_cell": {
            "median": float(np.median(num_tokens)),
            "percentile_99": float(np.percentile(num_tokens, 99)),
            "max": int(num_tokens.max()),
        },
        "unit": _unit(options),
        "group_by": options.division.group_by,
        "num_groups": None if selection.groups is None else len(selection.groups.names),
        "split_by": options.division.split_by or options.division.group_by,
        "hold_out": list(options.division.hold_out),
        "held_out": options.division.held_out,
        "seed": options.division.seed,
        "vocabulary": "given" if options.given is not None else "found",
        "statistics_cells": len(sample),
        "sources": _describe_sources(inputs, scanned, selection, vocabulary, counted.union),
        "failed": inputs.failed,
        "quality": [*selection.table, vocabulary.row],
        "notes": selection.notes + renamed,
    }
    if manifest["num_clipped_counts"]:
        inputs.report(f"{manifest['num_clipped_counts']:,} counts over {_LARGEST_STORED:,} were clipped to it")
    manifest["files"] = file_entries(frame.root)
    write_manifest(frame.root, manifest)
    return manifest


def _check_space(partial: Path, inputs: Inputs, cuts: list[Cut]) -> None:
    """Pieces, and a store that compresses not at all; less what an earlier attempt has written."""
    num_cuts = np.bincount([cut.source for cut in cuts], minlength=len(inputs.sources)).tolist()
    num_tokens = 0
    for source, of_source in zip(inputs.sources, num_cuts, strict=True):
        num_bytes = sum(file.stat().st_size for file in source.files)  # no form takes less than a byte a count
        num_tokens += min(of_source * TOKENS_PER_PIECE, num_bytes)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    check_free_space(partial, max(0, num_tokens * 2 * BYTES_PER_TOKEN - there))


def _choose_genes(
    inputs: Inputs, scanned: Scanned, counted: Counted, selection: Selection, options: Options
) -> Vocabulary:
    detected = counted.train_detected.sum(axis=0)
    vocabulary = choose_genes(counted.union, detected, options.given, options.quality, selection.table)
    inputs.report(format_table([*selection.table, vocabulary.row]))
    for i, source in enumerate(inputs.sources):
        genes, of_counts = _matched(scanned.gene_totals[i], vocabulary.kept[counted.union.of_source[i]])
        inputs.report(
            f"{source.path}: {genes:,} of {len(source.gene_ids):,} genes and {of_counts:.2%} of the counts are in the "
            "vocabulary"
        )
    return vocabulary


def _matched(gene_total: np.ndarray, known: np.ndarray) -> tuple[int, float]:
    """Genes of a source in the vocabulary, and the share of its counts that is theirs."""
    return int(known.sum()), float(gene_total[known].sum() / max(1, gene_total.sum()))


def _dtypes(counted: Counted, vocabulary: Vocabulary) -> tuple[np.dtype, np.dtype]:
    """The smallest that hold genes and counts."""
    largest = _LARGEST_STORED if counted.beyond_byte[vocabulary.kept].any() else _LARGEST_BYTE
    return smallest_unsigned(len(vocabulary.ids) - 1), smallest_unsigned(largest)


def _frame(
    root: Path, options: Options, counted: Counted, vocabulary: Vocabulary, num_tokens: np.ndarray, scratch: Path
) -> Frame:
    indptr = scratch / "indptr.npy"
    publish_array(indptr, np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64))
    genes, counts = _dtypes(counted, vocabulary)
    return Frame(root, options.container, indptr, len(vocabulary.ids), genes.name, counts.name)


def _assemble(
    frame: Frame,
    shuffled: Shuffled,
    selection: Selection,
    vocabulary: Vocabulary,
    fit: tuple[Any, ...],
    scratch: Path,
    pool: Workers,
) -> tuple[str, int]:
    """Shards, digest and fit, at the same time; the content digest and the number of shards."""
    layout = frame.layout()
    edges = writer.create(frame.root, layout)
    digest, fitted = scratch / "digest", scratch / "fitted.npz"
    starts = None if selection.groups is None else selection.groups.starts
    content = (shuffled, frame.indptr, vocabulary.ids.tolist(), vocabulary.measured, selection.num_train, starts)
    tasks = [
        Task("fitting dispersions", "genes", len(vocabulary.ids), fitted, fit_genes, (*fit, fitted)),
        Task("hashing content", "tokens", layout.num_tokens, digest, hash_content, (*content, digest)),
    ]
    for shard in range(len(edges) - 1):
        marker = scratch / "shards" / f"{shard:06d}"
        amount = int(edges[shard + 1] - edges[shard])
        tasks.append(Task("writing shards", "tokens", amount, marker, write_shard, (frame, shuffled, shard, marker)))
    pool.run(tasks)
    writer.close(frame.root, layout)
    return digest.read_text(), len(edges) - 1


def _unit(options: Options) -> str:
    return "cell" if options.division.group_by is None else "group"


def _describe_sources(
    inputs: Inputs, scanned: Scanned, selection: Selection, vocabulary: Vocabulary, union: GeneUnion
) -> list[dict[str, Any]]:
    """Without digests in a dry run, which hashes nothing."""
    kept = np.bincount(selection.cells.source, minlength=len(inputs.sources))
    described: list[dict[str, Any]] = []
    for i, source in enumerate(inputs.sources):
        genes, of_counts = _matched(scanned.gene_totals[i], vocabulary.kept[union.of_source[i]])
        entry: dict[str, Any] = {
            "name": source.path.resolve().name,
            "counts_from": source.counts_from,
            "num_cells": source.num_cells,
            "num_cells_kept": int(kept[i]),
            "num_genes": len(source.gene_ids),
            "num_genes_in_vocabulary": genes,
            "share_of_counts_in_vocabulary": round(of_counts, 6),
            "num_duplicate_genes": source.num_duplicate_genes,
            "notes": source.notes,
        }
        if scanned.digests:
            entry["sha256"] = read_digests(scanned.digests[i])
        described.append(entry)
    return described
