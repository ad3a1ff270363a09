"""How often each training sample is to come, from a column of the store's `obs`."""

import numpy as np
import pandas as pd

from cctrain.data.loading.samples import Samples
from cctrain.data.store.store import TokenStore
from cctrain.errors import DataError, UsageError


def sample_weights(store: TokenStore, samples: Samples, column: str) -> np.ndarray:
    """float64 (samples.num_train,): numbers of the column are weights; of its names, each is to come equally often.

    A sample of several cells has the value of its cells, which must all have one. Raises UsageError for a column that
    is not there, DataError for values that cannot be weights.
    """
    obs = store.obs()
    if column not in obs:
        raise UsageError(f"data.weights={column}: {store.path} has no such obs column; it has {', '.join(obs.columns)}")
    values = obs[column].iloc[: store.num_train]
    if values.isna().any():
        missing = values.index[values.isna()]
        raise DataError(
            f"{store.path}: obs column '{column}' has no value for {len(missing):,} training cells, '{missing[0]}' for "
            "one: data.weights needs a value for each"
        )
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        of_cells = values.to_numpy(np.float64)
        if not (np.isfinite(of_cells) & (of_cells >= 0)).all() or not of_cells.any():
            raise DataError(
                f"{store.path}: obs column '{column}' holds negative or infinite values, or only zeros: data.weights "
                "needs weights of 0 or more, with a sum above 0"
            )
        return _of_samples(store, samples, column, of_cells)
    codes, names = pd.factorize(values.astype(str))
    of_sample = _of_samples(store, samples, column, codes)
    return 1.0 / np.bincount(of_sample, minlength=len(names))[of_sample]


def _of_samples(store: TokenStore, samples: Samples, column: str, of_cells: np.ndarray) -> np.ndarray:
    starts, sizes = samples.starts[: samples.num_train], samples.sizes[: samples.num_train]
    changes = np.concatenate(([0], np.cumsum(of_cells[1:] != of_cells[:-1])))
    mixed = np.flatnonzero(changes[starts + sizes - 1] != changes[starts])
    if len(mixed):
        first, last = int(starts[mixed[0]]), int((starts + sizes)[mixed[0]]) - 1
        raise DataError(
            f"{store.path}: obs column '{column}' differs within the group of rows {first:,} to {last:,}: data.weights "
            "needs one value for all cells of a group"
        )
    return of_cells[starts]
