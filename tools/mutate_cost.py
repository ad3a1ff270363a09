"""Change one number or operator of a cost formula at a time, and see that a test fails.

    python -m tools.mutate_cost [--modules step,work] [--tests tests/cost] [--slow] [--jobs N] [--out FILE]
    python -m tools.mutate_cost --dry-run

In the modules of `cctrain/cost` with formulas + becomes -, * becomes /, and the other way round; a number n becomes
n + 1, a large one or a fraction 2 n. Default values are left alone, for they are configuration, and what stands in
f-strings, for it is words. Each mutant is a copy of the repository in a folder of its own, on which the quick tests
run until one fails: those that failed for other mutants of the module first, then its own file, then those that name
it. With --slow, the slow tests run on what survives these.

FILE keeps every mutation, as text of its line before and after, with the first test that failed, or null, and how:

    failed   in its assertions, or by an error that it met itself
    error    while the test was collected or prepared, or the process of the tests ended
    hang     killed after 20 minutes
    unknown  one of these: the row was kept before this was told

The first mutation of every line comes first. The same command goes on where it was stopped; other modules are added,
and with --slow the survivors of the quick tests are tried again. A mutation that survives changed a formula that no
test looks at, or changed nothing: a person has to see which.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from cctrain.code_version import code_commit
from cctrain.words import duration
from tools.record import add_out, circumstances, keep

ROOT = Path(__file__).parents[1]
COST = "cctrain/cost"
MODULES = ("flops", "parameters", "memory", "traffic", "step_time", "step", "work", "plan", "devices", "estimate")
COPIED = {"cctrain", "tests", "configs", "pyproject.toml"}
SWAPPED = {ast.Add: (b"+", b"-"), ast.Sub: (b"-", b"+"), ast.Mult: (b"*", b"/"), ast.Div: (b"/", b"*")}
KILLED_WHEN_HANGING = ("timeout", "--verbose", "-s", "KILL", "1200")  # tests that hang may have started ranks
QUICK, SLOW = "not slow", "slow"
NO_TESTS = 5  # pytest's exit status
HOW = {"FAILED": "failed", "ERROR": "error"}  # by pytest's words
Verdict = dict[str, str | None]
SURVIVED: Verdict = {"failed": None, "how": None}


@dataclass(frozen=True, order=True)
class Mutation:
    """`before` and `after` are text of the line; `column`, from 0 on, counts bytes, as `ast` does."""

    module: str
    line: int
    column: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.before}  ->  {self.after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", default=",".join(MODULES), help="separated by commas (default: all)")
    parser.add_argument("--tests", default="tests/cost", help="files and folders, with commas (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="try slow tests on what survives the quick ones")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the mutations and run nothing")
    add_out(parser)
    arguments = parser.parse_args()
    modules = arguments.modules.split(",")
    if strange := [module for module in modules if module not in MODULES]:
        parser.error(f"--modules: no {strange[0]}; there are {', '.join(MODULES)}")
    tests = arguments.tests.split(",")
    if strange := [test for test in tests if not (ROOT / test).exists()]:
        parser.error(f"--tests: there is no {strange[0]}")
    if arguments.dry_run:
        mutations = [mutation for module in modules for mutation in mutants(ROOT, module)]
        print("\n".join([*map(str, mutations), f"{len(mutations)} mutations"]))
        return
    rows = mutate(ROOT, modules, tests, arguments.slow, arguments.jobs, arguments.out)
    raise SystemExit(1 if any(row["failed"] is None for row in rows) else 0)


def mutate(
    root: Path, modules: list[str], tests: list[str], slow: bool, jobs: int, out: Path | None
) -> list[dict[str, Any]]:
    """Run the mutations of these modules that `out` does not have yet; returns the rows that it has then."""
    with tempfile.TemporaryDirectory(prefix="cctrain-original-") as folder, ThreadPoolExecutor(jobs) as pool:
        # The checkout may change in the hour that this takes.
        original = Path(shutil.copytree(root, folder, ignore=partial(left_out, root), dirs_exist_ok=True))
        wanted = {mutation: source for module in modules for mutation, source in mutants(original, module).items()}
        kept = kept_rows(out, tests, slow).items()
        rows = {mutation: row for mutation, row in kept if mutation in wanted or mutation.module not in modules}
        missing = [mutation for mutation in in_turns(wanted) if mutation not in rows]
        if missing:
            check_tests(original, modules[0], tests, slow)
        started, commit = time.monotonic(), code_commit()
        caught: dict[str, dict[str, None]] = {module: {} for module in modules}  # the tests that failed, in order

        def judged(mutation: Mutation) -> Verdict:
            before = caught[mutation.module]
            verdict = judge(original, mutation.module, wanted[mutation], tests, slow, list(before))
            if verdict["how"] == "failed":
                before[verdict["failed"] or ""] = None
            return verdict

        verdicts = pool.map(judged, missing)
        for done, (mutation, verdict) in enumerate(zip(missing, verdicts, strict=True), 1):
            rows[mutation] = asdict(mutation) | verdict | {"commit": commit}
            keep(summary(rows, tests, slow), out)
            left = (time.monotonic() - started) / done * (len(missing) - done)
            said = f"{verdict['how']}: {verdict['failed']}" if verdict != SURVIVED else "SURVIVED"
            print(f"{mutation}\n  {said}\n{done} of {len(missing)}, {duration(left)} left", flush=True)
    found = summary(rows, tests, slow)
    print(f"{found['verdict']} make a test fail ({', '.join(f'{how} {times}' for how, times in found['how'].items())})")
    return list(rows.values())


def in_turns(mutations: Iterable[Mutation]) -> list[Mutation]:
    """The first of every line, then the second of each, and so on: stopped early, this has seen most formulas."""
    earlier: Counter[tuple[str, int]] = Counter()
    turns = {}
    for mutation in mutations:
        turns[mutation] = earlier[mutation.module, mutation.line]
        earlier[mutation.module, mutation.line] += 1
    return sorted(turns, key=turns.__getitem__)


def left_out(root: Path, folder: str, names: list[str]) -> set[str]:
    """What a copy does not have."""
    return set(names) - COPIED if Path(folder) == root else {"__pycache__"}


def kept_rows(out: Path | None, tests: list[str], slow: bool) -> dict[Mutation, dict[str, Any]]:
    """What stands whatever the slow tests say is adopted from a file that was made without them."""
    if out is None or not out.exists():
        return {}
    kept = json.loads(out.read_text())
    with_slow = kept.get("slow", False)
    if kept["tests"] != tests or (with_slow and not slow):
        of = ", ".join(kept["tests"]) + (", with --slow" if with_slow else "")
        raise SystemExit(f"{out} is of the tests {of}: choose these, or another file")
    rows = [with_how(row) for row in kept["mutations"] if row["failed"] is not None or with_slow == slow]
    return {Mutation(**{field.name: row[field.name] for field in fields(Mutation)}): row for row in rows}


def with_how(row: dict[str, Any]) -> dict[str, Any]:
    """Rows were once kept without it."""
    return {**row, "how": row.get("how", None if row["failed"] is None else "unknown")}


def summary(rows: dict[Mutation, dict[str, Any]], tests: list[str], slow: bool) -> dict[str, Any]:
    how = Counter(row["how"] for row in rows.values() if row["how"] is not None)
    return {
        "question": "does a test fail when one number or operator of a cost formula is changed?",
        "verdict": f"{how.total()} of {len(rows)}",
        "how": dict(sorted(how.items())),
        "tests": tests,
        "slow": slow,
        "mutations": [rows[mutation] for mutation in sorted(rows)],
        **circumstances("torch", "deepspeed", "pytest"),
    }


# The mutants of a module


def mutants(root: Path, module: str) -> dict[Mutation, bytes]:
    """The whole source of each, in the order of the text."""
    source = (root / COST / f"{module}.py").read_bytes()
    found = {}
    for begin, end, text in sorted(edits(source)):
        mutant = source[:begin] + text + source[end:]
        assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(source)), "what was changed is no code"
        line, line_begin = source.count(b"\n", 0, begin), source.rfind(b"\n", 0, begin) + 1
        before, after = (version.split(b"\n")[line].decode().strip() for version in (source, mutant))
        found[Mutation(module, line + 1, begin - line_begin, before, after)] = mutant
    return found


def edits(source: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(begin, end, what stands there instead)."""
    lines = [0, *accumulate(map(len, source.splitlines(keepends=True)))]

    def begin(node: Any) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def end(node: Any) -> int:
        return lines[node.end_lineno - 1] + node.end_col_offset

    for node in formulas(ast.parse(source)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield begin(node), end(node), repr(another(node.value)).encode()
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPPED:
            left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            symbol, other = SWAPPED[type(node.op)]
            at = source.index(symbol, end(left), begin(right))
            if not is_text(left) and not is_text(right):
                yield at, at + 1, other


def another(number: Any) -> Any:
    return 2 * number if number >= 1000 or (isinstance(number, float) and number) else number + 1


def formulas(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one, without default values, and without f-strings, of which Python 3.11 does not say where
    the parts are."""
    for child in ast.iter_child_nodes(node):
        is_field = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
        if not is_field and not isinstance(child, ast.arguments | ast.JoinedStr):
            yield child
            yield from formulas(child)


def is_text(node: ast.AST) -> bool:
    """Strings and lists are joined by + too."""
    match node:
        case ast.BinOp(left=one, right=other) | ast.IfExp(body=one, orelse=other):
            return is_text(one) or is_text(other)
        case ast.JoinedStr() | ast.List() | ast.Constant(value=str()):
            return True
    return False


# The tests of a mutant


def check_tests(original: Path, module: str, tests: list[str], slow: bool) -> None:
    """They must pass, and be of the copy: else no verdict would mean anything."""
    unchanged = judge(original, module, (original / COST / f"{module}.py").read_bytes(), tests, slow)
    if unchanged != SURVIVED:
        raise SystemExit(f"without any mutation {unchanged['failed']} fails")
    if judge(original, module, b"raise ImportError", tests, slow) == SURVIVED:
        raise SystemExit(f"no test of {', '.join(tests)} imports {COST}/{module}.py")


def judge(
    original: Path, module: str, source: bytes, tests: list[str], slow: bool, likely: Sequence[str] = ()
) -> Verdict:
    """By the tests, in a copy that has this source of the module; first by those that are likely to fail."""
    with tempfile.TemporaryDirectory(prefix="cctrain-mutant-") as folder:
        copy = Path(shutil.copytree(original, folder, dirs_exist_ok=True))
        (copy / COST / f"{module}.py").write_bytes(source)
        if likely and (verdict := run_tests(copy, likely, QUICK))["how"] == "failed":
            return verdict
        files = in_order(copy, module, tests)
        verdict = run_tests(copy, files, QUICK)
        return run_tests(copy, files, SLOW) if slow and verdict == SURVIVED else verdict


def in_order(copy: Path, module: str, tests: list[str]) -> list[str]:
    paths = [copy / test for test in tests]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))]
    own, name = f"test_{module}.py", re.compile(rf"\bcctrain\.cost\.{module}\b")
    files.sort(key=lambda file: (file.name != own, name.search(file.read_text()) is None))
    return [str(file.relative_to(copy)) for file in files]


def run_tests(copy: Path, files: Sequence[str], selection: str) -> Verdict:
    # No bytecode: of two mutants of the same size within a second Python would take the first one's for both.
    # No plugins: importing them would take a third of the time of a mutant, and no test of these needs one.
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    options = ["-x", "-v", "-rfE", "-m", selection, "-p", "no:cacheprovider", "--tb=no"]
    command = [*KILLED_WHEN_HANGING, sys.executable, "-m", "pytest", *options, *files]
    ran = subprocess.run(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return verdict_of(ran.returncode, ran.stdout, selection)


def verdict_of(returncode: int, output: str, selection: str = QUICK) -> Verdict:
    """Of a run of pytest with -v."""
    none_chosen = selection == SLOW and returncode == NO_TESTS
    if returncode == 0 or none_chosen:
        return SURVIVED
    before, killed, _ = output.rpartition("timeout: ")
    if killed and returncode == -signal.SIGKILL:  # so it ends too where another killed the tests, but says nothing
        return {"failed": before.rpartition("\n")[2].strip(), "how": "hang"}
    if told := re.search(r"^(FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE):
        return {"failed": told[2], "how": HOW[told[1]]}
    return {"failed": f"pytest ends with {returncode}: {output.strip()[-300:]}", "how": "error"}


if __name__ == "__main__":
    main()
