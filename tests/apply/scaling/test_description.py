"""The pages of a sweep in words."""

from cctrain.apply.scaling.analysis import analyse
from cctrain.apply.scaling.description import point_description, sweep_description
from cctrain.tracking.description import is_own_description
from tests.apply.scaling.sweeps import a_plan, a_row, rows_of

PARAMETERS = {"model.depth": "2", "model.width": "16", "model.heads": "2", "training.precision": "fp32"}


def test_a_sweep_says_what_was_swept_what_was_found_and_how_to_read_it():
    plan = a_plan([4096, 8192], [32, 64])
    rows = rows_of(plan)
    rows[plan.points[-1].key] = a_row(plan.points[-1], left_out="out of memory")
    text = sweep_description(rows.values(), analyse(rows.values()), PARAMETERS)
    assert (
        "criss-cross, 2 layers of width 16, 2 heads, fp32; n = 4,096 to 8,192, M = 32, 64; "
        "beside it dense, same depth and dense, same parameters."
    ) in text
    assert "7 measured; 1 left out" in text
    assert "- attention, exponent of n·M: 1.000" in text
    assert "\n- `speed/`: " in text
    assert is_own_description(text)


def test_a_sweep_over_context_ranks_says_so():
    rows = rows_of(a_plan([4096], [32], context_ranks=(1, 2)))
    assert "M = 32 on 1 and 2 context ranks;" in sweep_description(rows.values(), analyse(rows.values()), PARAMETERS)


def test_a_point_says_what_it_is_and_what_it_took():
    row = next(iter(rows_of(a_plan([4096], [32])).values()))
    text = point_description(row)
    assert "a criss-cross transformer, 2 layers, M = 32 latents, on a random context of n = 4,096 tokens." in text
    assert f"a step takes {row['step_seconds']:.4g} s" in text
    assert is_own_description(text)


def test_a_point_that_was_left_out_says_why_and_promises_no_times():
    text = point_description(a_row(a_plan([4096], [32]).points[-1], left_out="out of memory"))
    assert "**Left out**: out of memory." in text
    assert "a dense transformer" in text
    assert "`speed/`" not in text
