import numpy as np
import pytest

from cctrain.data.store.layout import Groups
from cctrain.data.store.store import verify_store
from cctrain.errors import DataError
from tests.data.conftest import random_counts
from tests.data.stores import many_shards, to_dense, write_store
from tools.repack import repack


@pytest.mark.parametrize(("of", "into"), [("zarr", "webdataset"), ("webdataset", "zarr"), ("zarr", "zarr")])
def test_a_store_in_another_form_is_the_same_store(tmp_path, of, into):
    store, counts = many_shards(tmp_path / "one", of)
    other = repack(store, tmp_path / "other", into)
    assert other.manifest["container"] == into
    assert other.digest == store.digest
    assert verify_store(other.path) == []
    assert np.array_equal(to_dense(other, np.arange(70)), counts)
    assert other.obs().equals(store.obs())
    assert other.var().equals(store.var())
    assert np.array_equal(other.genes.loadings, store.genes.loadings)


def test_there_and_back_has_the_same_bytes(tiny_store, tmp_path):
    there = repack(tiny_store, tmp_path / "there", "webdataset")
    back = repack(there, tmp_path / "back", "zarr")
    assert (back.path / "manifest.json").read_bytes() == (tiny_store.path / "manifest.json").read_bytes()


def test_groups_come_along(tmp_path):
    groups = Groups(np.array(["b", "a"]), np.array([0, 10, 25]), num_train=1)
    store = write_store(tmp_path / "one", random_counts(25, 10), "zarr", groups=groups, num_train=10)
    again = repack(store, tmp_path / "other", "webdataset").groups
    assert again is not None
    assert (again.names.tolist(), again.starts.tolist(), again.num_train) == (["b", "a"], [0, 10, 25], 1)


def test_what_exists_is_not_replaced(tiny_store, tmp_path):
    with pytest.raises(DataError, match="exists: choose another place"):
        repack(tiny_store, tmp_path, "webdataset")
