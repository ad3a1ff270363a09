"""The content digest: a SHA-256 of what a store holds, whatever its container and compression."""

import hashlib

import numpy as np


class ContentDigest:
    """Cells in order, then genes, bitmaps of measured genes, the split, and the groups where there are any."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, num_tokens: np.ndarray, source: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> None:
        """The next cells: per cell its number of tokens, source, genes and counts, as little-endian uint32.

        num_tokens and source (cells,); genes and counts (sum of num_tokens,), of any integer type.
        """
        genes, counts = genes.astype("<u4"), counts.astype("<u4")
        heads = np.stack([num_tokens, source], axis=1).astype("<u4")
        stops = np.cumsum(num_tokens, dtype=np.int64)
        # Hashed cell by cell from where they lie: laid out as one array first, they took four times as long.
        for head, start, stop in zip(heads, (stops - num_tokens).tolist(), stops.tolist(), strict=True):
            self._hash.update(head.data)
            self._hash.update(genes[start:stop].data)
            self._hash.update(counts[start:stop].data)

    def hexdigest(
        self, gene_ids: list[str], measured: np.ndarray, num_train: int, group_starts: np.ndarray | None = None
    ) -> str:
        """With the vocabulary, the bitmap (num_sources, V), the split point and the groups' first cells; ends the
        hash."""
        self._hash.update(vocabulary_digest(gene_ids).encode())
        self._hash.update(np.packbits(np.asarray(measured, dtype=bool), axis=1).tobytes())
        self._hash.update(np.array([len(gene_ids), len(measured), num_train], dtype="<u8").tobytes())
        if group_starts is not None:
            self._hash.update(np.asarray(group_starts).astype("<u8").tobytes())
        return self._hash.hexdigest()


def vocabulary_digest(gene_ids: list[str]) -> str:
    return hashlib.sha256("\n".join(gene_ids).encode()).hexdigest()
