import hashlib

import numpy as np
import pytest

from cctrain.data.store.content_digest import ContentDigest, vocabulary_digest

IDS = ["ENSG1", "ENSG2", "ENSG3"]
MEASURED = np.array([[True, False, True], [True, True, True]])


def digest(*parts: slice, dtype: type = np.int64, **split: np.ndarray) -> str:
    """Three cells (genes, counts): ([0, 2], [5, 1]), ([], []) and ([1], [300]), added in the given parts."""
    num_tokens, source = np.array([2, 0, 1]), np.array([0, 1, 1])
    genes, counts = np.array([0, 2, 1]), np.array([5, 1, 300])
    offsets = np.array([0, 2, 2, 3])
    content = ContentDigest()
    for part in parts or [slice(0, 3)]:
        tokens = slice(offsets[part.start], offsets[part.stop])
        content.add(num_tokens[part], source[part], genes[tokens].astype(dtype), counts[tokens].astype(dtype))
    return content.hexdigest(IDS, MEASURED, 2, **split)


def test_it_hashes_cells_then_genes_then_bitmaps_and_the_split():
    words = [2, 0, *(0, 2), *(5, 1), 0, 1, 1, 1, *(1,), *(300,)]
    expected = hashlib.sha256(np.array(words, dtype="<u4").tobytes())
    expected.update(hashlib.sha256(b"ENSG1\nENSG2\nENSG3").hexdigest().encode())
    expected.update(bytes([0b10100000, 0b11100000]))
    expected.update(np.array([3, 2, 2], dtype="<u8").tobytes())
    assert digest() == expected.hexdigest()


@pytest.mark.parametrize("parts", [(slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 2), slice(2, 3))])
def test_how_the_cells_are_cut_into_parts_changes_nothing(parts):
    assert digest(*parts) == digest()


def test_the_type_that_tokens_are_stored_in_changes_nothing():
    assert digest(dtype=np.uint16) == digest()


def test_where_groups_start_changes_it():
    starts = [np.array([0, 1, 3]), np.array([0, 2, 3])]
    assert len({digest(), *(digest(group_starts=s) for s in starts)}) == 3
    assert digest(group_starts=starts[0].astype(np.int32)) == digest(group_starts=starts[0])


def test_the_vocabulary_digest_depends_on_order():
    assert vocabulary_digest(["a", "b"]) != vocabulary_digest(["b", "a"])
