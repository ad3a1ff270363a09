import json
import re

import numpy as np
import pytest

from cctrain.data.inspect import describe, inspect_store
from cctrain.data.store.layout import Groups
from cctrain.errors import DataError
from tests.data.conftest import random_counts
from tests.data.stores import CONTAINERS, flip_a_bit, many_shards, write_store


def page(path) -> list[str]:
    return describe(path, inspect_store(path), verified=False).splitlines()


def test_a_page_of_a_store_from_cells(small_store):
    lines = page(small_store.path)
    assert lines[0] == f"token store {small_store.path}"
    text = "\n".join(lines)
    for fact in (
        "cells       60: 54 for training, 6 held out",
        "genes       30",
        "split       10% of the cells, by a hash with seed 0",
        f"tokens      {small_store.manifest['num_tokens']:,} of type (uint8, uint8)",
        "0 counts clipped at 65,535",
        f"content     {small_store.digest}",
        "form        zarr, 1 shard(s)",
        "source      cells.h5ad: 60 of 60 cells kept, counts from X",
        "min_genes",
        "no groups",
    ):
        assert fact in text, fact
    assert len(lines) <= 45


@pytest.mark.parametrize("container", CONTAINERS)
def test_sizes_are_those_on_the_disk(tmp_path, container):
    store = many_shards(tmp_path / "store", container)[0]
    facts = inspect_store(store.path)
    files = [file for file in store.path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    of_tokens = [file for file in files if re.search(r"/X/(data|indices)/|/shards/cells-", file.as_posix())]
    assert facts["files"] == len(files)
    assert facts["bytes"]["total"] == sum(file.stat().st_size for file in files)
    assert 0 < facts["bytes"]["tokens"] == sum(file.stat().st_size for file in of_tokens)


def test_the_bars_hold_every_cell_once_and_the_last_one_the_longest(tmp_path):
    draws = np.random.default_rng(0)
    num_tokens = np.append(draws.integers(120, 480, size=299), 5_000)
    counts = (np.arange(5_000) < num_tokens[:, None]).astype(np.int64)
    store = write_store(tmp_path / "store", counts, "zarr", tokens_per_chunk=2**16, tokens_per_shard=2**20)
    facts = inspect_store(store.path)
    edges, cells = (facts["tokens_per_cell"]["histogram"][name] for name in ("edges", "cells"))
    assert sum(cells) == 300
    assert edges == list(range(100, 501, 50))
    expected = [int(((num_tokens >= low) & (num_tokens < low + 50)).sum()) for low in edges[:-1]]
    expected[-1] += 1
    assert cells == expected
    bars = [line for line in page(store.path) if re.match(r" +\d+ (to|and more) ", line)]
    assert len(bars) == len(cells)
    assert max(line.count("#") for line in bars) == 40
    assert " and more " in bars[-1]


@pytest.mark.parametrize("num_tokens", [[3], [3, 3, 3], [0, 0], [0, 70_000]])
def test_odd_lengths_have_bars_too(tmp_path, num_tokens):
    counts = (np.arange(max([1, *num_tokens])) < np.array(num_tokens)[:, None]).astype(np.int64)
    store = write_store(tmp_path / "store", counts, "zarr", tokens_per_chunk=2**16, tokens_per_shard=2**20)
    facts = inspect_store(store.path)
    assert sum(facts["tokens_per_cell"]["histogram"]["cells"]) == len(num_tokens)
    assert page(store.path)


def test_the_split_is_told_as_it_was_made(small_store):
    facts = inspect_store(small_store.path)
    by_donor = facts | {"split_by": "donor", "hold_out": []}
    assert "10% of the values of donor, each with all its cells" in describe(small_store.path, by_donor, verified=False)
    named = by_donor | {"hold_out": ["d1", "d7"]}
    assert "held out are the cells with donor d1, d7" in describe(small_store.path, named, verified=False)


def test_sources_that_failed_are_listed(small_store):
    facts = inspect_store(small_store.path) | {"failed": ["b.h5ad: not raw counts"]}
    assert "left out    b.h5ad: not raw counts" in describe(small_store.path, facts, verified=False)


def test_groups_are_told_with_their_sizes(tmp_path):
    groups = Groups(np.array(["liver", "lung", "eye"]), np.array([0, 10, 13, 25]), num_train=2)
    counts = random_counts(25, 10)
    store = write_store(tmp_path / "store", counts, "webdataset", groups=groups, num_train=13)
    told = inspect_store(store.path)["groups"]
    tokens = [int(np.count_nonzero(counts[low:high])) for low, high in ((0, 10), (10, 13), (13, 25))]
    assert told == {
        "num_groups": 3,
        "num_train": 2,
        "cells_median": 10.0,
        "cells_max": 12,
        "largest": "eye",
        "tokens_median": float(np.median(tokens)),
        "tokens_max": max(tokens),
    }
    assert "3 by None: 2 for training, 1 held out" in "\n".join(page(store.path))


def test_the_facts_are_json_without_the_list_of_files(small_store):
    facts = json.loads(json.dumps(inspect_store(small_store.path), allow_nan=False))
    assert facts["num_cells"] == 60
    assert isinstance(facts["files"], int)
    assert facts["quality"]


def test_many_sources_do_not_make_the_page_longer(small_store):
    facts = inspect_store(small_store.path)
    facts["sources"] = facts["sources"] * 50
    lines = describe(small_store.path, facts, verified=True).splitlines()
    assert len(lines) <= 45
    assert "and 44 more lines: --json has all" in "\n".join(lines)


def test_verifying_names_each_damaged_file_and_what_to_do(tmp_path):
    store = many_shards(tmp_path / "store", "webdataset")[0]
    assert inspect_store(store.path, verify=True)["num_cells"] == 70
    flip_a_bit(store.path / "shards" / "cells-00001.tar", 700)
    (store.path / "shards" / "cells-00000.tar").unlink()
    with pytest.raises(DataError, match="prepare it again") as caught:
        inspect_store(store.path, verify=True)
    _, *damaged = str(caught.value).splitlines()
    assert len(damaged) == 2
    assert "cells-00000.tar: missing" in damaged[0]
    assert "cells-00001.tar: its bytes have changed" in damaged[1]
