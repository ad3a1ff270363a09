"""The sources of one `prepare`: opened, put in order by cell, scanned; those that fail are left out or end it all.

Numbers of sources are those among the sources that have not failed, so that a store does not tell what else was
tried: it is the one that the good sources alone would have given.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cctrain.data.prepare.metadata import check_column
from cctrain.data.prepare.pieces import Cut
from cctrain.data.prepare.quality import CellProfiles
from cctrain.data.prepare.scan import (
    Expected,
    Opening,
    arrange,
    hash_source,
    is_mitochondrial,
    plan_piece,
    read_edges,
    read_profiles,
    scan_piece,
)
from cctrain.data.prepare.tasks import Task, Workers
from cctrain.data.prepare.vocabulary import check_matched
from cctrain.data.sources.source import Source, open_source
from cctrain.errors import CctrainError, DataError

BYTES_PER_TOKEN = 4  # of a piece; 6 where a source has more than 65,536 genes


@dataclass
class Inputs:
    """What is still good, in the order given, and what is not."""

    keep_going: bool
    report: Callable[[str], None]
    sources: list[Source] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # for the names of files: which of the inputs it was
    failed: list[dict[str, str]] = field(default_factory=list)

    def fail(self, path: Path, error: CctrainError) -> None:
        """Raise the error, or list it."""
        if not self.keep_going:
            raise error
        self.report(f"failed: {error}")
        name = path.resolve().name
        self.failed.append({"name": name, "error": str(error).replace(str(path), name)})

    def drop(self, errors: dict[int, CctrainError]) -> None:
        """Take the sources with these numbers out. DataError if none is left."""
        for i, error in sorted(errors.items()):
            self.fail(self.sources[i].path, error)
        left = [i for i in range(len(self.sources)) if i not in errors]
        self.sources = [self.sources[i] for i in left]
        self.openings = [self.openings[i] for i in left]
        self.labels = [self.labels[i] for i in left]
        self.check_some_left()

    def check_some_left(self) -> None:
        if not self.sources:
            raise DataError("\n".join(["No source can be read:", *(entry["error"] for entry in self.failed)]))


@dataclass(frozen=True)
class Plan:
    """That this is a dry run, and the sides of the cells that it can expect."""

    expected: Expected | None


@dataclass
class Scanned:
    cuts: list[Cut]
    cells: CellProfiles  # all cells of all sources
    gene_totals: list[np.ndarray]  # per source int64 (genes, in the order of their ids): counts of all cells
    digests: list[Path]  # per source a JSON file of the SHA-256 of its inputs

    def first_cells(self) -> list[int]:
        """Place of the first cell of every cut among all cells."""
        sizes = [cut.stop - cut.start for cut in self.cuts]
        return (np.cumsum(sizes) - sizes).tolist()


def open_inputs(
    paths: list[Path],
    counts: str | None,
    scratch: Path,
    columns: dict[str, str],
    mitochondrial: bool,
    given: np.ndarray | None,
    min_matched: float,
    keep_going: bool,
    report: Callable[[str], None],
) -> Inputs:
    """Whatever can be said without reading counts. `columns`: obs columns that are needed, and the option that does."""
    inputs = Inputs(keep_going, report)
    for number, path in enumerate(paths):
        opening = Opening(Path(path), counts, scratch)
        try:
            source = open_source(opening.path, counts)  # nothing is written yet, whatever it finds
            report(
                f"{source.path}: {source.num_cells:,} cells, {len(source.gene_ids):,} genes, "
                f"counts from {source.counts_from}"
            )
            for note in source.notes:
                report(f"  {note}")
            if len(source.obs) != source.num_cells:
                raise DataError(f"{path}: {source.num_cells:,} cells of counts, but {len(source.obs):,} rows of obs.")
            for column, option in columns.items():
                check_column([source], column, option)
            if mitochondrial:
                _check_mitochondrial_names(source)
            if given is not None:
                check_matched(source, None, given, min_matched)
        except DataError as error:
            inputs.fail(Path(path), error)
            continue
        inputs.sources.append(source)
        inputs.openings.append(opening)
        inputs.labels.append(f"{number:04d}")
    inputs.check_some_left()
    return inputs


def describe_files(inputs: Inputs) -> list[dict[str, Any]]:
    """What tells whether the files of the sources are those of an earlier attempt."""
    described = []
    for source in inputs.sources:
        stats = [(file.name, file.stat()) for file in source.files]
        described.append(
            {
                "path": str(source.path.resolve()),
                "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            }
        )
    return described


def arrange_inputs(inputs: Inputs, pool: Workers, folder: Path) -> None:
    """Matrices that are stored by gene, by cell; and where each source is cut into pieces."""
    tasks = [
        Task("putting in order by cell", "sources", 1, target, arrange, (opening, target))
        for opening, target in zip(inputs.openings, (_arranged(folder, label) for label in inputs.labels), strict=True)
    ]
    errors = pool.run(tasks, inputs.keep_going)
    inputs.drop({i: error for i, error in enumerate(errors) if error is not None})


def _arranged(folder: Path, label: str) -> Path:
    return folder / "arranged" / f"{label}.npy"


def cut_inputs(inputs: Inputs, folder: Path) -> list[Cut]:
    cuts = []
    for i, label in enumerate(inputs.labels):
        for start, stop in pairwise(read_edges(_arranged(folder, label))):
            cuts.append(Cut(f"{label}-{start:012d}", i, start, stop, folder))
    return cuts


def scan_inputs(
    inputs: Inputs,
    pool: Workers,
    cuts: list[Cut],
    folder: Path,
    given: np.ndarray | None,
    min_matched: float,
    plan: Plan | None = None,
) -> Scanned:
    """The one reading. With a plan (a dry run) no token is kept, and no file is hashed."""
    digests = [folder / "digests" / f"{label}.json" for label in inputs.labels]
    hashing = [
        Task("hashing sources", "sources", 1, target, hash_source, (opening, target))
        for opening, target in zip(inputs.openings, digests, strict=True)
        if plan is None
    ]
    scanning = [_scan_task(inputs.openings[cut.source], cut, plan) for cut in cuts]
    owners = [*range(len(hashing)), *(cut.source for cut in cuts)]
    errors: dict[int, CctrainError] = {}
    for owner, error in zip(owners, pool.run(hashing + scanning, inputs.keep_going), strict=True):
        if error is not None:
            errors.setdefault(owner, error)
    good = [cut for cut in cuts if cut.source not in errors]
    if given is not None:
        errors |= _unmatched(inputs, good, given, min_matched)
    numbers = {old: new for new, old in enumerate(i for i in range(len(inputs.sources)) if i not in errors)}
    inputs.drop(errors)
    cuts = [replace(cut, source=numbers[cut.source]) for cut in good if cut.source in numbers]
    cells, totals = read_profiles(cuts)
    return Scanned(
        cuts, cells, [totals[i] for i in range(len(numbers))], [] if plan is not None else [digests[i] for i in numbers]
    )


def _scan_task(opening: Opening, cut: Cut, plan: Plan | None) -> Task:
    of_bar = ("checking cells", "cells", cut.stop - cut.start, cut.profiles)
    if plan is None:
        return Task(*of_bar, scan_piece, (opening, cut))
    return Task(*of_bar, plan_piece, (opening, cut, plan.expected))


def _unmatched(inputs: Inputs, cuts: list[Cut], given: np.ndarray, min_matched: float) -> dict[int, CctrainError]:
    """Errors of the sources of which too few counts fall on the vocabulary."""
    errors: dict[int, CctrainError] = {}
    for i, total in read_profiles(cuts)[1].items():
        try:
            check_matched(inputs.sources[i], total, given, min_matched)
        except DataError as error:
            errors[i] = error
    return errors


def read_digests(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())


def _check_mitochondrial_names(source: Source) -> None:
    if not any(map(is_mitochondrial, source.gene_names)):
        raise DataError(
            f"{source.path}: max_mitochondrial is set, but no gene is named MT-...: the rule would see "
            "nothing. Give a file with gene names, or leave the rule off."
        )
