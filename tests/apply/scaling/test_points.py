import json

import pytest

from cctrain.apply.scaling.points import POINTS, SETTINGS, adopt_settings, append_point, digest_of, read_points
from cctrain.errors import DataError, UsageError
from tests.apply.scaling.sweeps import DIGEST, a_plan, a_row, settings


def three_rows() -> list[dict]:
    return [a_row(point) for point in a_plan().points[:3]]


def test_points_are_read_back_as_they_were_appended(tmp_path):
    for row in three_rows():
        append_point(tmp_path, row)
    assert list(read_points(tmp_path, DIGEST).values()) == three_rows()


def test_short_contexts_come_first_and_every_length_has_both_dense_controls():
    points = a_plan(lengths=[64, 32], latents=[8, 4], context_ranks=(2, 1)).points
    assert [point.key for point in points[:6]] == [
        "criss-cross, M = 4, n = 32",
        "criss-cross, M = 8, n = 32",
        "criss-cross, M = 4, 2 context ranks, n = 32",
        "criss-cross, M = 8, 2 context ranks, n = 32",
        "dense, same depth, n = 32",
        "dense, same parameters, n = 32",
    ]
    assert {point.tokens for point in points[6:]} == {64}


def test_a_torn_last_line_is_ignored_and_gone_after_the_next_point(tmp_path):
    first, second, third = three_rows()
    append_point(tmp_path, first)
    with open(tmp_path / POINTS, "ab") as file:
        file.write(json.dumps(second).encode()[:40])
    assert list(read_points(tmp_path, DIGEST)) == [first["key"]]
    append_point(tmp_path, third)
    assert list(read_points(tmp_path, DIGEST)) == [first["key"], third["key"]]
    assert len((tmp_path / POINTS).read_text().splitlines()) == 2


def test_of_two_lines_of_a_point_the_last_one_counts(tmp_path):
    first = three_rows()[0]
    append_point(tmp_path, first)
    append_point(tmp_path, first | {"step_seconds": 7.0})
    assert read_points(tmp_path, DIGEST)[first["key"]]["step_seconds"] == 7.0


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / POINTS).write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        read_points(tmp_path, DIGEST)


def test_a_point_of_other_settings_is_refused(tmp_path):
    append_point(tmp_path, three_rows()[0])
    with pytest.raises(DataError, match="other settings"):
        read_points(tmp_path, "beef")


def test_the_same_settings_are_the_same_sweep(tmp_path):
    assert adopt_settings(tmp_path, settings()) == adopt_settings(tmp_path, settings())
    assert digest_of(settings()) == digest_of(json.loads(json.dumps(settings())))


def test_other_settings_are_refused_with_their_differences(tmp_path):
    adopt_settings(tmp_path, settings())
    other = settings() | {"precision": "bf16"}
    other["machine"] = other["machine"] | {"threads": 4}
    with pytest.raises(UsageError, match=r"machine\.threads: 2 → 4\n  precision: fp32 → bf16"):
        adopt_settings(tmp_path, other)


def test_a_dry_run_writes_no_settings(tmp_path):
    adopt_settings(tmp_path, settings(), write=False)
    assert not (tmp_path / SETTINGS).exists()
