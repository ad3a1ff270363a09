"""Fetches a small public data set of real counts, to try everything with.

The data lie inside source archives of the Python package index, so whoever can `pip install` can have them.
An archive is only downloaded, never built or imported. Its SHA-256 is compared with the pinned one *before*
it is opened; then the pinned members, and nothing else, are copied out of it and compared with their own
SHA-256. The folder appears complete or not at all.
"""

import difflib
import hashlib
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cctrain.data.package_index import Archive, download
from cctrain.errors import DataError, UsageError


@dataclass(frozen=True)
class Member:
    """One file of an archive: its path inside, its name in the data folder, its digest and size in bytes."""

    path: str
    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Dataset:
    archive: Archive
    members: tuple[Member, ...]
    to_prepare: str  # what `cctrain prepare` takes, relative to the data folder
    description: str
    origin: str
    citation: str


_HG19 = "PhenoGraph-1.5.7/examples/data/filtered_gene_bc_matrices/hg19"

DATASETS: dict[str, Dataset] = {
    "pbmc3k": Dataset(
        archive=Archive(
            package="PhenoGraph",
            version="1.5.7",
            sha256="46b28f9e043a00deba53bb5f35dd84793669ab2bd4ce78900bf7f15f1321515a",
            num_bytes=8_449_829,
        ),
        members=(
            Member(
                path=f"{_HG19}/matrix.mtx",
                name="matrix.mtx",
                sha256="7d92358b9d29128a225c50f2a662d6ccca9c71bc665e0af82692ed1361eb94e4",
                num_bytes=28_179_564,
            ),
            Member(
                path=f"{_HG19}/genes.tsv",
                name="genes.tsv",
                sha256="8778dd78085086be6dcafa8334f95f7cf76b25526e8ef2b63186db5127a1492c",
                num_bytes=816_952,
            ),
            Member(
                path=f"{_HG19}/barcodes.tsv",
                name="barcodes.tsv",
                sha256="58c2a224a2b4258f7e8799a18890bda6d23824b247b80db2b08a0dcc36a4c660",
                num_bytes=45_900,
            ),
        ),
        to_prepare="",
        description="PBMC3k: 2,700 peripheral blood mononuclear cells of one healthy human donor, raw counts "
        "of 32,738 genes (hg19), without cell types.",
        origin="10x Genomics, data set '3k PBMCs from a Healthy Donor' (Chromium Single Cell 3' v1, Cell "
        "Ranger 1.1.0), as shipped among the examples of PhenoGraph 1.5.7.",
        citation="10x Genomics, '3k PBMCs from a Healthy Donor', 2016. Usually cited as CC BY 4.0: licence "
        "to be checked with 10x Genomics.",
    ),
    "retina": Dataset(
        archive=Archive(
            package="grnndata",
            version="1.3.2",
            sha256="4bd0d2e9ffa34fb953d7bfdc1a55ea340d5a1b8e4d768fbed9c46760d0de3ade",
            num_bytes=13_113_069,
        ),
        members=(
            Member(
                path="grnndata-1.3.2/tests/test.h5ad",
                name="retina.h5ad",
                sha256="9ed3aaee807df5597a99c8c3f25fa822e80ec6d167b6425b566ebc1b30d2053c",
                num_bytes=49_919_376,
            ),
        ),
        to_prepare="retina.h5ad",
        description="1,000 nuclei of the retina of one human donor (10x multiome, 55 years, male), raw "
        "counts of 70,116 Ensembl genes, 11 cell types in obs['cell_type']. obs also holds totals of counts.",
        origin="Test data of grnndata 1.3.2 (Cantini laboratory, MIT licence of the package). The file does "
        "not name its source. Its donor (LVG1, 55 years, male), its assay and its 13 author cell types are "
        "those of GEO GSE196235: that it comes from there is our inference.",
        citation="Probably Wang SK, Nair S, Li R, et al., 'Single-cell multiome of the human retina and deep "
        "learning nominate causal variants in complex eye diseases', Cell Genomics 2(8), 2022, "
        "doi:10.1016/j.xgen.2022.100164. Licence of the counts to be checked with its authors.",
    ),
}


def fetch(name: str, out: Path) -> Path:
    """Put the data set `name` into the folder `out` and return the path that `cctrain prepare` takes.

    A folder that already holds it is checked and kept, without any download. UsageError for an unknown name;
    DataError when `out` holds something else, the archive cannot be had, or a digest differs.
    """
    if name not in DATASETS:
        raise UsageError(_unknown(name))
    dataset = DATASETS[name]
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        if _is_there(name, dataset, out):
            return out / dataset.to_prepare
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        packed = partial / "archive"
        download(dataset.archive, packed)
        _extract(dataset, packed, partial)
        packed.unlink()
        (partial / "SOURCE.txt").write_text(_source_text(dataset), encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise DataError(
            f"{name} could not be written to {out}: {error.strerror or error}. "
            "Choose another folder with --out, or free some space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / dataset.to_prepare


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"There is no data set {name!r} to fetch.{hint} There are: {', '.join(DATASETS)}."


def _is_there(name: str, dataset: Dataset, out: Path) -> bool:
    """True when `out` holds every file with its digest, False when nothing is there yet, else DataError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    for member in dataset.members:
        path = out / member.name
        problem = _difference(path, member) if path.is_file() else "is missing"
        if problem:
            raise DataError(
                f"{out} is there already and does not hold {name}: {member.name} {problem}. "
                "Move it away, or choose another folder with --out."
            )
    return True


def _extract(dataset: Dataset, packed: Path, folder: Path) -> None:
    """Copy the pinned members out of an archive whose digest has been checked; links are refused."""
    package = f"{dataset.archive.package} {dataset.archive.version}"
    wanted = {member.path: member for member in dataset.members}
    try:
        with tarfile.open(packed, "r:gz") as tar:
            for info in tar:
                member = wanted.pop(info.name, None)
                if member is None:
                    continue
                content = tar.extractfile(info) if info.isreg() else None
                if content is None or info.size != member.num_bytes:
                    expected = f"a plain file of {member.num_bytes} bytes"
                    raise DataError(f"{member.path} in the archive of {package} is not {expected}.")
                _copy(content, folder / member.name, member)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"The archive of {package} cannot be read: {error}.") from error
    raise DataError(f"The archive of {package} lacks {', '.join(wanted)}.")


def _copy(content: IO[bytes], path: Path, member: Member) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if problem := _difference(path, member):
        raise DataError(f"{member.path} in the archive {problem}.")


def _difference(path: Path, member: Member) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == member.sha256 else f"has SHA-256 {digest}, expected {member.sha256}"


def _source_text(dataset: Dataset) -> str:
    archive = dataset.archive
    files = "".join(f"  {member.name}  sha256 {member.sha256}\n" for member in dataset.members)
    return (
        f"{dataset.description}\n\nOrigin: {dataset.origin}\n\nCitation: {dataset.citation}\n\n"
        f"Taken from the source archive of {archive.package} {archive.version} on the Python package index,\n"
        f"sha256 {archive.sha256}:\n{files}"
    )
