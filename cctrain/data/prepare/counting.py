"""The steps between selection and shards: pieces sorted by destination, and what is counted on the way.

Each is a list of tasks and the sum of what they left behind.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cctrain.data.files import publish_array, publish_text
from cctrain.data.prepare.inputs import Inputs, Scanned
from cctrain.data.prepare.pieces import (
    ABSENT,
    Shuffled,
    count_tokens,
    index_cells,
    read_found,
    sort_piece,
    sorted_marker,
)
from cctrain.data.prepare.scan import HELD_OUT, LEFT_OUT, TRAINED, count_piece, has_counted
from cctrain.data.prepare.selection import Selection
from cctrain.data.prepare.tasks import Task, Workers
from cctrain.data.prepare.vocabulary import GeneUnion, Vocabulary, unite_genes
from cctrain.errors import DataError

DESTINATION = "destination.npy"


@dataclass(frozen=True)
class Counted:
    """Genes of the cells that were selected, over all sources; the arrays are over the united genes (U,)."""

    union: GeneUnion
    train_detected: np.ndarray  # int64 (num_sources, U)
    train_total: np.ndarray  # int64 (num_sources, U)
    detected: np.ndarray
    beyond_byte: np.ndarray
    clipped: np.ndarray


def fix_selection(scratch: Path, selection: Selection) -> None:
    """Sorted pieces are for one selection. Another one, in the same attempt, is of other sources that failed."""
    record = scratch / "selection.sha256"
    digest = hashlib.sha256(selection.destination.tobytes()).hexdigest()
    if record.exists() and record.read_text() != digest:
        raise DataError(
            "Other sources can be read than in the earlier attempt that this one continued. It is removed: the same "
            "command begins anew."
        )
    publish_text(record, digest)
    publish_array(scratch / DESTINATION, selection.destination)


def sort_cells(inputs: Inputs, scanned: Scanned, selection: Selection, pool: Workers, scratch: Path) -> None:
    """Every piece by destination row, which counts its genes."""
    tasks = []
    for cut, first in zip(scanned.cuts, scanned.first_cells(), strict=True):
        num_genes = len(inputs.sources[cut.source].gene_ids)
        work = (cut, scratch / DESTINATION, first, selection.num_train, num_genes)
        tasks.append(Task("sorting cells", "cells", cut.stop - cut.start, sorted_marker(cut), sort_piece, work))
    pool.run(tasks)


def count_as_selected(inputs: Inputs, scanned: Scanned, selection: Selection, pool: Workers) -> None:
    """In a dry run: the genes of every piece, as `sort_cells` counts them."""
    destination = selection.destination
    sides = np.where(destination < 0, LEFT_OUT, np.where(destination < selection.num_train, TRAINED, HELD_OUT))
    tasks = []
    for cut, first in zip(scanned.cuts, scanned.first_cells(), strict=True):
        size = cut.stop - cut.start
        of_cut = sides[first : first + size]
        if not has_counted(cut, of_cut):
            cut.found.unlink(missing_ok=True)
            work = (inputs.openings[cut.source], cut, of_cut)
            tasks.append(Task("counting genes", "cells", size, cut.found, count_piece, work))
    pool.run(tasks)


def sum_genes(inputs: Inputs, scanned: Scanned, given: np.ndarray | None) -> Counted:
    """What was counted piece by piece, over the united genes."""
    union = unite_genes(inputs.sources, given)
    shape = (len(inputs.sources), len(union.ids))
    counted = Counted(
        union, *(np.zeros(shape, np.int64) for _ in range(2)), *(np.zeros(shape[1], np.int64) for _ in range(3))
    )
    for cut in scanned.cuts:
        found, places = read_found(cut), union.of_source[cut.source]
        counted.train_detected[cut.source, places] += found.train_detected
        counted.train_total[cut.source, places] += found.train_total
        counted.detected[places] += found.detected
        counted.beyond_byte[places] += found.beyond_byte
        counted.clipped[places] += found.clipped
    return counted


def count_tokens_of_cells(
    shuffled: Shuffled, vocabulary: Vocabulary, union: GeneUnion, num_cells: int, pool: Workers
) -> np.ndarray:
    """int64 (cells,): the tokens of every row of the store."""
    for i, place in enumerate(vocabulary.places(union, ABSENT)):
        publish_array(shuffled.vocabulary_place(i), place)
    tasks = [
        Task(
            *("counting tokens", "cells", cut.stop - cut.start, cut.num_tokens, count_tokens),
            (cut, shuffled.vocabulary_place(cut.source)),
        )
        for cut in shuffled.cuts
    ]
    pool.run(tasks)
    return index_cells(shuffled, num_cells)
