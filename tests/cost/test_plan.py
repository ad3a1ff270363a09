"""The plan for larger machines: what it says follows from the formulas, and the page says what it says."""

from pathlib import Path

import pytest

from cctrain.cost.devices import load_device
from cctrain.cost.plan import KINDS, LENGTHS, memory_of, row, rows, table, work_of_a_step
from cctrain.cost.plan import MODEL as CRISS_CROSS

DEVICE = load_device("h100", "bf16")


def test_the_page_shows_the_table_that_the_command_prints():
    page = (Path(__file__).parents[2] / "cctrain" / "cost" / "README.md").read_text()
    assert table(rows(DEVICE)) in page


def test_a_context_is_shared_by_the_fewest_gpus_that_hold_it():
    found = row("criss-cross", 10_000_000, 64, DEVICE)
    assert found.context_ranks == 16
    fewer = work_of_a_step(10_000_000, 10, 64, 8)
    assert memory_of(CRISS_CROSS, fewer) > 0.9 * DEVICE.memory


def test_no_gpu_is_left_without_a_context():
    assert row("criss-cross", 100_000_000, 512, DEVICE).context_ranks == 512


def test_ulysses_ends_at_the_number_of_heads_and_nothing_is_made_up_beyond():
    assert row("dense, Ulysses", 10_000_000, 512, DEVICE).context_ranks is None


@pytest.mark.parametrize("tokens", LENGTHS[1:])
def test_long_contexts_take_a_hundredth_of_the_time_of_dense_attention_and_less(tokens):
    ours, ring = (row(kind, tokens, 512, DEVICE) for kind in KINDS[:2])
    assert ring.seconds > 100 * ours.seconds
    assert ring.sent > 100 * ours.sent


def test_what_context_ranks_send_does_not_grow_with_the_context():
    shorter, longer = (row("criss-cross", tokens, 512, DEVICE) for tokens in (10_000_000, 100_000_000))
    assert longer.sent < shorter.sent  # the same exchange a context, and fewer contexts
