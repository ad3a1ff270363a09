"""The tables of a store: `obs`, merged from the sources, and `var`.

Metadata are kept for people and for evaluation; they are never inputs of a model.
"""

import numpy as np
import pandas as pd

from cctrain.data.prepare.split import Labels
from cctrain.data.sources.source import Source
from cctrain.errors import DataError

_RESERVED = {"source", "split", "_index", "index"}


def merge_obs(
    sources: list[Source], source: np.ndarray, row: np.ndarray, num_train: int
) -> tuple[pd.DataFrame, list[str]]:
    """obs of the cells (source, row) in store order, and notes on the columns that had to be renamed.

    All columns of all sources are there; a cell lacks those that its source lacks. A column whose type
    differs between sources becomes text.
    """
    notes: list[str] = []
    names = _safe_names(sources, notes)
    offsets = np.concatenate([[0], np.cumsum([item.num_cells for item in sources])])
    place = offsets[source] + row
    obs = pd.DataFrame(index=pd.Index(_unique_ids(sources)[place], name="cell_id"))
    obs["source"] = source.astype(_smallest(len(sources)))
    obs["split"] = pd.Categorical.from_codes(
        (np.arange(len(place)) >= num_train).astype(np.int8), categories=["train", "held_out"]
    )
    for name, new in names.items():
        obs[new] = _column(sources, name).iloc[place].set_axis(obs.index)
    return obs, notes


def check_column(sources: list[Source], column: str, option: str) -> None:
    """DataError if a source lacks the column; `option` asked for it."""
    for source in sources:
        if column not in source.obs:
            has = ", ".join(map(str, source.obs.columns)) or "no column"
            raise DataError(f"{source.path}: no column '{column}' in obs, which {option} asks for; it has {has}.")


def label_cells(sources: list[Source], column: str, source: np.ndarray, row: np.ndarray) -> Labels:
    """The column as text, of the cells (source, row). DataError if it is missing for one of them."""
    everything = _labels_of_all(sources, column)
    offsets = np.concatenate([[0], np.cumsum([item.num_cells for item in sources])])
    labels = everything.at(offsets[source] + row)
    missing = np.flatnonzero(labels.codes < 0)
    if len(missing):
        first = missing[0]
        item = sources[source[first]]
        raise DataError(
            f"{item.path}: {len(missing):,} cells that pass quality control have no '{column}', the first is "
            f"'{item.cell_ids[row[first]]}' (row {row[first]}): every cell needs one. Fill the column, or remove "
            "these cells."
        )
    return labels


def _labels_of_all(sources: list[Source], column: str) -> Labels:
    """Code -1 for a missing value."""
    factors = [pd.factorize(_texts(item.obs[column])) for item in sources]
    names = np.unique(np.concatenate([np.array(list(values), dtype=str) for _, values in factors]))
    codes = []
    for part, values in factors:
        place = np.concatenate([np.searchsorted(names, np.array(list(values), dtype=str)), [-1]])
        codes.append(place[part])
    return Labels(column, names, np.concatenate(codes).astype(np.int64))


def gene_table(sources: list[Source], gene_ids: np.ndarray) -> pd.DataFrame:
    """var with the index and gene_name: the name that the first source which has the gene gives it, else its id."""
    names: dict[str, str] = {}
    for source in reversed(sources):
        names.update(zip(source.gene_ids, source.gene_names, strict=True))
    ids = gene_ids.tolist()
    return pd.DataFrame({"gene_name": [names.get(gene, gene) for gene in ids]}, index=pd.Index(ids, name="gene_id"))


def _safe_names(sources: list[Source], notes: list[str]) -> dict[str, str]:
    """New name of every column: not one of ours, no slash, unique."""
    names: dict[str, str] = {}
    for source in sources:
        for name in source.obs.columns:
            if name in names:
                continue
            new = str(name).replace("/", "_") or "unnamed"
            while new in _RESERVED or new in names.values():
                new = f"input_{new}"
            if new != name:
                notes.append(f"obs column '{name}' is kept as '{new}'")
            names[name] = new
    return names


def _column(sources: list[Source], name: str) -> pd.Series:
    """The column over all cells of all sources."""
    parts = [item.obs.get(name) for item in sources]
    present = [part for part in parts if part is not None]
    kinds = {_kind(part) for part in present}
    if kinds == {"number"} or (kinds == {"boolean"} and len(present) == len(parts)):
        filled = [
            pd.Series(np.full(item.num_cells, np.nan)) if part is None else part
            for item, part in zip(sources, parts, strict=True)
        ]
        return pd.concat(filled, ignore_index=True)
    texts = [
        np.full(item.num_cells, None, dtype=object) if part is None else _texts(part)
        for item, part in zip(sources, parts, strict=True)
    ]
    return pd.Series(pd.Categorical(np.concatenate(texts)))


def _kind(column: pd.Series) -> str:
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        return "number"
    return "boolean" if column.dtype == np.dtype(bool) else "text"


def _texts(column: pd.Series) -> np.ndarray:
    """Numbers that are whole as such: a column of integers with a gap comes as floats, and donor 4.0 is donor 4."""
    if pd.api.types.is_float_dtype(column.dtype) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    values = column.astype(object).to_numpy()
    return np.array([None if pd.isna(value) else str(value) for value in values], dtype=object)


def _unique_ids(sources: list[Source]) -> np.ndarray:
    """Cell ids, prefixed by the number of the source if two sources share one; a repeat gets its row."""
    ids = pd.Series(np.concatenate([np.array(item.cell_ids, dtype=object) for item in sources]))
    if ids.duplicated().any() and len(sources) > 1:
        number = np.repeat(np.arange(len(sources)), [item.num_cells for item in sources])
        ids = pd.Series([f"{i}:{cell}" for i, cell in zip(number, ids, strict=True)], dtype=object)
    repeated = ids.duplicated(keep=False)
    if repeated.any():
        row = np.concatenate([np.arange(item.num_cells) for item in sources])
        ids[repeated] = [f"{cell}#{i}" for cell, i in zip(ids[repeated], row[repeated], strict=True)]
    return ids.to_numpy()


def _smallest(num_sources: int) -> np.dtype:
    return np.min_scalar_type(num_sources - 1)
