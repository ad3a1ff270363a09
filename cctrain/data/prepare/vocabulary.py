"""Which genes a store has: those that enough training cells express, or those of a file or another store.

A vocabulary that is given is a promise that cells are described in its genes. So each source must measure a floor of
them, and a floor of its counts must fall on them: gene names against Ensembl ids, or another species, would else make
cells of nothing. Genes are matched by id, Ensembl ids without their version.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cctrain.data.prepare.quality import QualityControl, Row, format_table, given_genes_row, select_genes
from cctrain.data.sources.source import Source, without_version
from cctrain.data.store.store import open_store
from cctrain.errors import DataError

_LARGEST_FILE = 64 * 2**20  # bytes; the genes of a hundred species take less


@dataclass(frozen=True)
class GeneUnion:
    """All genes of all sources, and of a vocabulary that was given."""

    ids: np.ndarray  # (U,) str, ascending
    of_source: list[np.ndarray]  # per source int64 (genes of the source,): place in `ids`, in the order of the ids

    def measured(self) -> np.ndarray:
        """bool (num_sources, U)"""
        bitmap = np.zeros((len(self.of_source), len(self.ids)), dtype=bool)
        for i, places in enumerate(self.of_source):
            bitmap[i, places] = True
        return bitmap


@dataclass(frozen=True)
class Vocabulary:
    """Genes of the store: `kept` masks the united genes, the other arrays are over the vocabulary."""

    kept: np.ndarray
    ids: np.ndarray
    measured: np.ndarray  # bool (num_sources, V)
    row: Row

    def places(self, union: GeneUnion, absent: int) -> list[np.ndarray]:
        """Per source int32 (genes of the source, in the order of their ids): number in the vocabulary or `absent`."""
        number = np.where(self.kept, np.cumsum(self.kept) - 1, absent).astype(np.int32)
        return [number[places] for places in union.of_source]


def read_vocabulary(path: Path) -> np.ndarray:
    """Gene ids (V,) str, ascending, of a text file with one id a line, or of a token store. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        return open_store(path).genes.ids
    if not path.is_file():
        raise DataError(f"{path}: no such file. A vocabulary is a text file with one gene id a line, or a token store.")
    if path.stat().st_size > _LARGEST_FILE:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes: not a list of gene ids, one a line.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not text: a vocabulary is a text file with one gene id a line.") from None
    for number, line in enumerate(lines, start=1):
        if len(line.split()) > 1 or "," in line or "\0" in line:
            raise DataError(f"{path}: line {number} is '{line[:80]}': one gene id a line, and nothing else.")
    ids = sorted({without_version(line) for line in lines if line})
    if not ids:
        raise DataError(f"{path}: no gene id in this file.")
    return np.array(ids)


def unite_genes(sources: list[Source], given: np.ndarray | None) -> GeneUnion:
    """DataError if a source shares no gene with the others: then their ids are of two kinds."""
    ordered = [np.sort(np.array(source.gene_ids)) for source in sources]
    ids = np.unique(np.concatenate([*ordered, *([given] if given is not None else [])]))
    union = GeneUnion(ids, [np.searchsorted(ids, part) for part in ordered])
    shared = union.measured().sum(axis=0) > 1
    for source, places in zip(sources, union.of_source, strict=True):
        if len(sources) > 1 and given is None and not shared[places].any():
            raise DataError(
                f"{source.path}: none of its {len(places):,} genes (such as '{source.gene_ids[0]}') is in "
                "another source: gene names against Ensembl ids, or two species? Genes are matched by id."
            )
    return union


def check_matched(source: Source, gene_total: np.ndarray | None, given: np.ndarray, least: float) -> None:
    """DataError if the source measures too few of the given genes, or too few of its counts fall on them.

    `gene_total` int64 (genes, in the order of their ids): the source's counts; None: they are not known yet.
    """
    ids = np.sort(np.array(source.gene_ids))
    known = np.isin(ids, given)
    of_genes = int(known.sum()) / len(given)
    of_counts = None if gene_total is None else float(gene_total[known].sum() / max(1, gene_total.sum()))
    if of_genes >= least and (of_counts is None or of_counts >= least):
        return
    counts = "" if of_counts is None else f", on which {of_counts:.1%} of its counts fall"
    raise DataError(
        f"{source.path}: it measures {int(known.sum()):,} of the {len(given):,} genes of the vocabulary "
        f"({of_genes:.1%}){counts}; at least {least:.0%} is asked for (--min-matched). Its genes are like "
        f"'{_example(ids, given)}', the vocabulary's like '{_example(given, ids)}': names against ids, or two species?"
    )


def _example(genes: np.ndarray, others: np.ndarray) -> str:
    """One that the others lack, if there is one."""
    lacking = genes[~np.isin(genes, others)]
    return str((lacking if len(lacking) else genes)[0])


def choose_genes(
    union: GeneUnion, train_detected: np.ndarray, given: np.ndarray | None, quality: QualityControl, table: list[Row]
) -> Vocabulary:
    """From the training cells that express each united gene (U,); DataError if no gene is left.

    `table` is what quality control has removed so far, for the message.
    """
    if given is not None:
        kept = np.isin(union.ids, given)
        row = given_genes_row(int((~kept).sum()), int(kept.sum()))
    else:
        kept, row = select_genes(train_detected, quality)
    if not kept.any():
        raise DataError(
            f"No gene is expressed in {quality.min_cells} training cells: relax min_cells, or the rules for "
            "cells:\n" + format_table([*table, row])
        )
    return Vocabulary(kept, union.ids[kept], union.measured()[:, kept], row)
