"""A run in words: what was trained, how far it came, how to read it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cctrain.tracking.content import parameters_of
from cctrain.tracking.description import description_of, is_own_description
from cctrain.tracking.journal import Journal, history, read_journal

MakeRun = Callable[..., Path]


def description(run_dir: Path, **changed: str) -> str:
    lines = read_journal(run_dir)
    parameters = parameters_of(run_dir / "config.yaml")
    return description_of(lines, history(lines), parameters | {k.replace("__", "."): v for k, v in changed.items()})


def test_it_says_what_was_trained_on_what_and_how_far(make_run: MakeRun) -> None:
    text = description(make_run((1, 60, "finished")))
    assert (
        "**Model**: criss-cross transformer (cost n·M), 6 layers of width 256, 4 heads, 64 latents.\n\n"
        "**Data**: `stores/pbmc3k`; a context is a cell; 16 contexts make a step.\n\n"
        "**Machine**: fp32 on 2 ranks; ZeRO 1.\n\n"
        "Step 60 of 60, in 1 attempt; training loss "
    ) in text
    assert "Held-out cells at step 50: validation/nll" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__attention": "dense", "model__depth": "1"}, "dense transformer (the control, cost n²), 1 layer of"),
        ({"model__latent_width": "32"}, "64 latents of width 32."),
        ({"data__max_tokens": "900"}, "a context is a cell, at most 900 visible tokens a cell;"),
        ({"data__context": "group"}, "a context is all cells of a group;"),
        ({"data__context": "group", "data__window": "16"}, "a context is up to 16 cells of a group;"),
    ],
)
def test_it_says_what_the_configuration_says(make_run: MakeRun, changed: dict[str, str], said: str) -> None:
    assert said in description(make_run((1, 1, None)), **changed)


def test_it_says_on_what_the_latest_attempt_ran(make_run: MakeRun) -> None:
    run_dir = make_run((1, 2, None))
    journal = Journal(run_dir)
    facts = {"world_size": 8, "context_ranks": 2, "device": "cuda", "precision": "bf16", "zero_stage": 3}
    journal.write("start", 2, **facts)
    assert "**Machine**: bf16 on 8 ranks on cuda, 2 share each context; ZeRO 3." in description(run_dir)


def test_it_explains_the_groups_of_metrics_that_the_run_has(make_run: MakeRun) -> None:
    run_dir = make_run((1, 60, "finished"))
    groups = ("train", "validation", "speed", "cost")
    assert [group for group in groups if f"\n- `{group}/`: " in description(run_dir)] == list(groups)
    assert "`memory/`" not in description(run_dir)
    Journal(run_dir).write(
        "step", 61, loss=0.5, step_seconds=0.1, **{"memory/bytes": 1, "system/node-0/cpu_percent": 1}
    )
    assert "\n- `memory/`: " in description(run_dir)
    assert "\n- `system/`: " in description(run_dir)


def test_it_explains_what_the_first_step_has_and_the_last_one_has_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("start", 0, run="cell")
    journal.write("step", 1, loss=0.5, step_seconds=0.1, **{"system/node-0/cpu_percent": 1})
    journal.write("step", 2, loss=0.5, step_seconds=0.1)
    assert "\n- `system/`: " in description(tmp_path)


def test_without_any_step_there_is_nothing_to_read(make_run: MakeRun) -> None:
    assert "How to read it" not in description(make_run((1, 0, None)))


def test_it_is_cctrains_own_until_somebody_takes_the_last_line_away(make_run: MakeRun) -> None:
    text = description(make_run((1, 3, None)))
    assert is_own_description(text)
    assert is_own_description("")
    assert not is_own_description(text.rpartition("\n")[0])
