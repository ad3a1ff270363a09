"""A made-up repository of one formula, with a file of tests that looks at it and one that does not."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tools import mutate_cost
from tools.mutate_cost import (
    MODULES,
    QUICK,
    ROOT,
    SLOW,
    Mutation,
    edits,
    in_turns,
    mutants,
    mutate,
    run_tests,
    verdict_of,
)

FORMULA = '''"""The area of 2 frames."""

BORDER = 1.5


def area(width: float, number: int = 2) -> float:
    return number * (width + BORDER)
'''
NUMBER_OF_MUTATIONS = 3
CATCHES = "from cctrain.cost.area import area\n\n\ndef test_area():\n    assert area(1.0) == 5.0\n"
PREPARED_BY_IT = """import pytest

from cctrain.cost.area import area

@pytest.fixture
def checked():
    assert area(1.0) == 5.0

def test_prepared(checked):
    pass
"""
CATCHES_NOTHING = "from cctrain.cost.area import area\n\n\ndef test_sign():\n    assert area(1.0) != 0\n"


def slow(test: str) -> str:
    return "import pytest\n" + test.replace("def ", "@pytest.mark.slow\ndef ")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "cctrain/__init__.py": "",
        "cctrain/cost/__init__.py": "",
        "cctrain/cost/area.py": FORMULA,
        "tests/cost/test_area.py": CATCHES,
        "tests/cost/test_sign.py": CATCHES_NOTHING,
    }
    for name, text in files.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "repository"


def kept_without_how(repository: Path, folder: Path, failed: list[str | None]) -> Path:
    """A file of the quick tests, as it once was."""
    rows = zip(mutants(repository, "area"), failed, strict=True)
    mutations = [asdict(mutation) | {"failed": test, "commit": None} for mutation, test in rows]
    (folder / "mutations.json").write_text(json.dumps({"tests": ["tests/cost"], "mutations": mutations}))
    return folder / "mutations.json"


def texts(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def mutated(source: str) -> list[str]:
    text = source.encode()
    return [(text[:begin] + new + text[end:]).decode() for begin, end, new in sorted(edits(text))]


def test_each_mutation_has_its_lines_and_the_first_test_that_fails(repository, tmp_path):
    before, out = texts(repository), tmp_path / "mutations.json"
    rows = mutate(repository, ["area"], ["tests/cost"], False, 1, out)
    assert [(row["before"], row["after"]) for row in rows] == [
        ("BORDER = 1.5", "BORDER = 3.0"),
        ("return number * (width + BORDER)", "return number / (width + BORDER)"),
        ("return number * (width + BORDER)", "return number * (width - BORDER)"),
    ]
    assert {(row["failed"], row["how"]) for row in rows} == {("tests/cost/test_area.py::test_area", "failed")}
    kept = json.loads(out.read_text())
    assert (kept["verdict"], kept["how"], kept["mutations"]) == ("3 of 3", {"failed": 3}, rows)
    assert texts(repository) == before


def test_a_mutation_that_no_test_sees_survives_and_what_is_kept_is_not_run_again(repository, tmp_path, monkeypatch):
    out = tmp_path / "mutations.json"
    rows = mutate(repository, ["area"], ["tests/cost/test_sign.py"], False, 2, out)
    assert [(row["failed"], row["how"]) for row in rows] == [(None, None)] * NUMBER_OF_MUTATIONS
    monkeypatch.setattr(mutate_cost, "run_tests", None)
    assert mutate(repository, ["area"], ["tests/cost/test_sign.py"], False, 1, out) == rows
    with pytest.raises(SystemExit, match=r"is of the tests tests/cost/test_sign\.py"):
        mutate(repository, ["area"], ["tests/cost"], False, 1, out)


def test_what_caught_a_mutant_is_tried_first_on_the_next(repository, monkeypatch):
    tried = []

    def noted(copy, files, selection):
        tried.append([Path(file).name for file in files])
        return run_tests(copy, files, selection)

    monkeypatch.setattr(mutate_cost, "run_tests", noted)
    mutate(repository, ["area"], ["tests/cost"], slow=False, jobs=1, out=None)
    everything, alone = ["test_area.py", "test_sign.py"], ["test_area.py::test_area"]
    unchanged_and_broken = [everything, everything]
    assert tried == [*unchanged_and_broken, everything, *[alone] * (NUMBER_OF_MUTATIONS - 1)]


def test_every_line_has_a_turn_before_one_has_its_second():
    mutations = [Mutation("a", line, column, "", "") for line, column in ((1, 0), (1, 5), (1, 9), (4, 0), (4, 2))]
    assert [(one.line, one.column) for one in in_turns(mutations)] == [(1, 0), (4, 0), (1, 5), (4, 2), (1, 9)]


def test_a_test_that_cannot_be_prepared_is_an_error(repository):
    (repository / "tests/cost/test_area.py").write_text(PREPARED_BY_IT)
    rows = mutate(repository, ["area"], ["tests/cost/test_area.py"], False, 1, None)
    assert {(row["failed"], row["how"]) for row in rows} == {("tests/cost/test_area.py::test_prepared", "error")}


def test_the_test_that_hangs_is_told_apart_from_one_whose_process_was_killed():
    output = "collected 2 items\n\ntests/test_a.py::test_b PASSED [ 50%]\ntests/test_a.py::test_c "
    told = output + "timeout: sending signal KILL to command 'python'\n"
    assert verdict_of(-9, told) == {"failed": "tests/test_a.py::test_c", "how": "hang"}
    assert verdict_of(-9, output)["how"] == "error"


def test_slow_tests_judge_what_survives_the_quick_ones_and_other_rows_stay(repository, tmp_path, monkeypatch):
    (repository / "tests/cost/test_area.py").write_text(slow(CATCHES))
    out = kept_without_how(repository, tmp_path, [None, "test_sign", "test_sign"])
    chosen = []
    monkeypatch.setattr(mutate_cost, "run_tests", lambda *arguments: chosen.append(arguments) or run_tests(*arguments))
    rows = mutate(repository, ["area"], ["tests/cost"], True, 1, out)
    assert [(row["failed"], row["how"]) for row in sorted(rows, key=lambda row: row["column"])] == [
        ("tests/cost/test_area.py::test_area", "failed"),
        *[("test_sign", "unknown")] * 2,
    ]
    assert [selection for *_, selection in chosen] == [QUICK, SLOW, QUICK, QUICK, SLOW]  # three are of the check
    with pytest.raises(SystemExit, match="is of the tests tests/cost, with --slow"):
        mutate(repository, ["area"], ["tests/cost"], False, 1, out)


def test_rows_that_were_kept_before_it_was_told_how_stay(repository, tmp_path, monkeypatch):
    out = kept_without_how(repository, tmp_path, [None, "test_area", "test_area"])
    monkeypatch.setattr(mutate_cost, "run_tests", None)
    rows = mutate(repository, ["area"], ["tests/cost"], False, 1, out)
    assert [(row["failed"], row["how"]) for row in rows] == [(None, None), *[("test_area", "unknown")] * 2]


def test_without_tests_that_pass_and_import_the_module_nothing_is_said(repository):
    (repository / "tests/cost/test_sign.py").write_text("def test_nothing():\n    pass\n")
    with pytest.raises(SystemExit, match=r"no test of tests/cost/test_sign\.py imports"):
        mutate(repository, ["area"], ["tests/cost/test_sign.py"], False, 1, None)
    (repository / "cctrain/cost/area.py").write_text(FORMULA.replace("+", "-"))
    with pytest.raises(SystemExit, match=r"without any mutation .*::test_area fails"):
        mutate(repository, ["area"], ["tests/cost"], False, 1, None)


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a = 3", ["a = 4"]),
        ("a = 0.0, 2.5, 1000", ["a = 1.0, 2.5, 1000", "a = 0.0, 5.0, 1000", "a = 0.0, 2.5, 2000"]),
        ("a = b * (c) / d", ["a = b / (c) / d", "a = b * (c) * d"]),
        ("a -= b", ["a += b"]),
        ("a = 'ν' * b", []),
        ("a = ['ν'], b - c", ["a = ['ν'], b + c"]),
        ("a = 'x' + (b if c else d)", []),
        ("a = f'{1 + b}'", []),
        ("a = True", []),
        ("def a(b=1, *, c=2): '3'", []),
        ("class A:\n    b: int = 1", []),
    ],
)
def test_numbers_and_operators_of_formulas_change_and_nothing_else(source, changed):
    assert mutated(source) == changed


@pytest.mark.parametrize("module", MODULES)
def test_every_module_with_formulas_has_mutants(module):
    assert mutants(ROOT, module)
