"""Damage small valid inputs in seeded ways, and see that each is read correctly or refused with one clear line.

    python -m tools.fuzz [--mutants 200] [--seed S] [--forms FORM,FORM] [--only ID] [--out FILE]

Inputs are files of cells in every form that `cctrain prepare` reads, and token stores in every form that it writes.
A mutant is one of them with one mutation: blind (bits, ranges, whole files, links), aware of what lies where (types,
shapes, indices, ids, attributes, metadata, pickles), or forged (a store whose manifest agrees with its damage). It is
a pure function of the seed and its id, to the last byte; `--only ID` makes it again, runs it, and keeps its folder.

The real commands run on it, with limits of time and of memory: `prepare` on a file of cells; `inspect`, `inspect
--verify` and a reading of every cell as training does it on a store. A mutant is survived if

- the exit code is 0, and the store that was made says what the mutated file says when it is read plainly by other
  code (`fuzz_oracle`); or, of a mutated store, everything that training reads is as it was before; or
- the exit code is 3, with exactly one error that is one printable line and names the file, and no store is there;
- and never is there another exit code, a traceback, a signal, a hang, or a payload that was executed.

A damaged store whose sizes and digests no longer agree must not be read as something else even without --verify. A
forged one may; --verify compares the content digest, and must see what happened to cells, genes, groups and split.
"""

import argparse
import random
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.fuzz_inputs import ANY_CELL, FORMS, Form
from tools.fuzz_mutations import CRATER, IN_FOLDER, Mutation, mutate_blindly
from tools.fuzz_stores import damage, forgeries
from tools.fuzz_trees import in_tree
from tools.fuzz_worker import Ran, Worker
from tools.record import add_out, circumstances, keep

READ, REFUSED, FAILED = "read correctly", "refused", "failed"
SHOWN_EVERY = 50
LONGEST_LINE = 1500  # characters of an error
# Errors about what quality control has left show its table, and no file: all sources together may be the cause.
WITH_TABLE = ("No cell passes quality control", "No gene is expressed")


@dataclass(frozen=True)
class Mutant:
    id: str
    kind: str
    what: str
    verdict: str
    said: str  # the error, or what is wrong
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--forms", default=",".join(FORMS), help="of inputs, separated by commas; default: all")
    parser.add_argument("--only", metavar="ID", help="this mutant alone, such as h5ad-csr-7")
    add_out(parser)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    forms = arguments.forms.split(",")
    if strange := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms: no {strange[0]}; there are {', '.join(FORMS)}")
    ids = [arguments.only] if arguments.only else plan(forms, arguments.mutants)
    if strange := [one for one in ids if one.rpartition("-")[0] not in FORMS or not one.rpartition("-")[2].isdecimal()]:
        parser.error(f"--only: {strange[0]} is not a form, a hyphen and a number")
    warnings.simplefilter("ignore")  # the libraries warn of what is done here on purpose
    folder = Path(tempfile.mkdtemp(prefix="cctrain-fuzz-"))
    result = fuzz(folder, ids, seed, keep=arguments.only is not None)
    if result["failures"] or arguments.only:
        say(f"kept in {folder}")
    else:
        shutil.rmtree(folder)
    keep(result, arguments.out)
    raise SystemExit(1 if result["failures"] else 0)


def plan(forms: Sequence[str], mutants: int) -> list[str]:
    """Ids, the forms in turn."""
    return [f"{forms[i % len(forms)]}-{i // len(forms)}" for i in range(mutants)]


def fuzz(folder: Path, ids: Sequence[str], seed: int, keep: bool = False) -> dict[str, Any]:
    """Run the mutants of these ids in `folder`, where those that failed stay; returns the result."""
    started = time.monotonic()
    say(f"seed {seed}: {len(ids)} mutants")
    mutants: list[Mutant] = []
    with Worker(folder) as worker:
        originals = {
            name: Original.make(folder / "originals", name, worker) for name in dict.fromkeys(map(_form_of, ids))
        }
        for one in ids:
            mutant = run_mutant(folder, one, seed, originals[_form_of(one)], worker, keep)
            mutants.append(mutant)
            if mutant.verdict == FAILED or keep:
                say(f"{mutant.verdict.upper()} {mutant.id}: {mutant.what}\n  {mutant.said}")
            if len(mutants) % SHOWN_EVERY == 0:
                say(f"{len(mutants)} of {len(ids)}, {time.monotonic() - started:.0f} s")
    result = summary(mutants, seed, time.monotonic() - started)
    say(f"{result['verdict']}; {result['by_verdict']}, {result['seconds']:.0f} s")
    return result


def _form_of(mutant: str) -> str:
    return mutant.rpartition("-")[0]


def summary(mutants: list[Mutant], seed: int, seconds: float) -> dict[str, Any]:
    survived = [mutant for mutant in mutants if mutant.verdict != FAILED]

    def counted(names: list[str]) -> dict[str, dict[str, int]]:
        return {
            name: dict(Counter(m.verdict for m, its in zip(mutants, names, strict=True) if its == name))
            for name in sorted(set(names))
        }

    return {
        "question": "is a damaged file of cells or store read correctly, or refused with exit code 3 and one line?",
        "verdict": f"{len(survived)} of {len(mutants)}",
        "seed": seed,
        "mutants": len(mutants),
        "by_verdict": dict(Counter(mutant.verdict for mutant in mutants)),
        "by_form": counted([_form_of(mutant.id) for mutant in mutants]),
        "by_kind": counted([mutant.kind for mutant in mutants]),
        "seconds": round(seconds, 1),
        "slowest": max((mutant.seconds for mutant in mutants), default=0.0),
        "failures": [
            asdict(mutant) | {"reproduce": f"python -m tools.fuzz --seed {seed} --only {mutant.id}"}
            for mutant in mutants
            if mutant.verdict == FAILED
        ],
        "survivors": [asdict(mutant) for mutant in survived],
        **circumstances("anndata", "h5py", "zarr"),
    }


# One mutant


@dataclass(frozen=True)
class Original:
    """An input before it is damaged. `content`: what training reads of a store, as a digest."""

    form: Form
    path: Path
    content: str | None

    @staticmethod
    def make(folder: Path, name: str, worker: Worker) -> "Original":
        """Written, and found to be read correctly: else no verdict on its mutants would mean anything."""
        form, here = FORMS[name], folder / name
        here.mkdir(parents=True)
        path = form.write(here)
        store = here / "store"
        verdict, said = judge_source(path, store, worker, form.options)
        if verdict == READ and form.kind == "store":
            content = worker.run("read", str(store)).output
            verdict, said = judge_store(store, worker, content, forged=False)
            path = store
        if verdict != READ:
            raise SystemExit(f"{name}: the undamaged input is not read correctly: {said}")
        return Original(form, path, content if form.kind == "store" else None)


def run_mutant(folder: Path, id_: str, seed: int, original: Original, worker: Worker, keep: bool = False) -> Mutant:
    here = folder / id_
    here.mkdir()
    kind, path, what = make_mutant(here, id_, seed, original)
    started = time.monotonic()
    if original.content is None:
        verdict, said = judge_source(path, here / "out", worker)
    else:
        verdict, said = judge_store(path, worker, original.content, forged=kind == "forged")
    if (folder / CRATER).exists():
        verdict, said = FAILED, "a payload was executed"
        (folder / CRATER).rmdir()
    if verdict != FAILED and not keep:
        shutil.rmtree(here)
    seconds = round(time.monotonic() - started, 2)
    return Mutant(id_, kind, what, verdict, said.replace(f"{folder}/", ""), seconds)


def make_mutant(here: Path, id_: str, seed: int, original: Original) -> tuple[str, Path, str]:
    """Its kind, its place in the folder `here`, and what was done to it."""
    form, number = original.form, int(id_.rpartition("-")[2])
    path = here / original.path.name
    if original.path.is_dir():
        shutil.copytree(original.path, path)
    else:
        shutil.copy(original.path, path)
    mutations = mutations_of(form)
    kinds = list(mutations)
    kind, turn = kinds[number % len(kinds)], number // len(kinds)
    known = list(mutations[kind])
    random.Random(f"{seed} {_form_of(id_)} {kind}").shuffle(known)
    what = known[turn % len(known)](path, random.Random(f"{seed} {id_}"))
    return kind, path, what


def mutations_of(form: Form) -> dict[str, list[Mutation]]:
    if form.kind == "store":
        has_tars = "--format=webdataset" in form.options
        return {"forged": forgeries(has_tars), "damaged": damage(has_tars), "blind": [mutate_blindly]}
    return {"aware": IN_FOLDER if form.kind == "folder" else in_tree(form), "blind": [mutate_blindly]}


# The verdict

_IN_ONE_PROCESS = "--workers=1"  # which has the limits


def judge_source(path: Path, out: Path, worker: Worker, options: Sequence[str] = ()) -> tuple[str, str]:
    """Verdict on `cctrain prepare` of one source, with the error or what is wrong."""
    ran = worker.run("prepare", str(path), "--out", str(out), _IN_ONE_PROCESS, *ANY_CELL, *options)
    if fault := fault_of(ran, path):
        return FAILED, fault
    if ran.code != 0:
        return (FAILED, f"refused, and {out.name} is there") if out.exists() else (REFUSED, error_of(ran))
    if not (out / "manifest.json").is_file():
        return FAILED, "exit code 0, and no store"
    checked = worker.run("inspect", str(out), "--verify")
    if checked.code != 0:
        return FAILED, f"the new store does not verify: {_last_line(checked)}"
    compared = worker.run("compare", str(path), str(out))
    if compared.code != 0:
        return FAILED, f"accepted, but plain code cannot read it: {_last_line(compared)}"
    if compared.output:
        return FAILED, compared.output
    return READ, ""


def judge_store(path: Path, worker: Worker, content: str, forged: bool) -> tuple[str, str]:
    """Verdict on `cctrain inspect`, with and without --verify, and on a reading as training does it."""
    shown = worker.run("inspect", str(path))
    verified = worker.run("inspect", str(path), "--verify")
    read = worker.run("read", str(path))
    for name, ran in (("inspect", shown), ("inspect --verify", verified), ("training", read)):
        if fault := fault_of(ran, path):
            return FAILED, f"{name}: {fault}"
    if verified.code == 0:
        if read.code != 0:
            return FAILED, f"--verify finds nothing, and training refuses it: {error_of(read)}"
        # Whoever forges all digests can change statistics; cells, genes and split have a digest of their content.
        if read.output != content and not (forged and read.output.split()[0] == content.split()[0]):
            return FAILED, "--verify finds nothing, and training reads something else than before"
        return READ, ""
    if read.code == 0 and read.output != content and not forged:
        return FAILED, f"training reads something else than before; only --verify says: {error_of(verified)}"
    return REFUSED, error_of(verified)


def fault_of(ran: Ran, path: Path) -> str | None:
    """What no command may do, whatever it is given."""
    if ran.code is None:
        return f"hangs: not done after {ran.seconds:.0f} s"
    if ran.code < 0:
        return f"ended by signal {-ran.code}: {_last_line(ran)}"
    if "Traceback (most recent call last)" in ran.errors or ran.code not in (0, 3):
        return f"exit code {ran.code}: {_last_line(ran)}"
    errors = re.findall(r"^cctrain: ", ran.errors, re.MULTILINE)
    if len(errors) != (ran.code == 3):
        return f"exit code {ran.code} with {len(errors)} errors: {_last_line(ran)}"
    return fault_of_message(error_of(ran), path) if ran.code == 3 else None


def fault_of_message(message: str, path: Path) -> str | None:
    lines = message.split("\n")
    if message.startswith(WITH_TABLE):
        return None
    if path.name not in lines[0]:
        return f"an error that does not name {path.name}: {message[:300]}"
    if stray := [line for line in lines[1:] if path.name not in line]:  # a line for each damaged file is welcome
        return f"an error of {len(lines)} lines, such as {stray[0][:300]!r}"
    if long := [line for line in lines if len(line) > LONGEST_LINE or not line.isprintable()]:
        return f"an error of {len(long[0]):,} characters, or of some that are not printable: {long[0][:200]!r}"
    return None


def error_of(ran: Ran) -> str:
    """The error, without the name of the program and what was reported before."""
    return re.split(r"^cctrain: ", ran.errors, flags=re.MULTILINE)[-1].rstrip("\n")


def _last_line(ran: Ran) -> str:
    lines = ran.errors.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
