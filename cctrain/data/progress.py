"""Bars with a rate on standard error, for whatever may take over two seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_TO_SHOW = 1.0
_SECONDS_BETWEEN_LINES = 30.0  # in a log file, where a bar cannot move


@contextmanager
def progress(title: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the one bar by so many units; see `bars`."""
    with bars({title: (unit, total)}) as advance:
        yield lambda amount: advance(title, amount)


@contextmanager
def bars(totals: dict[str, tuple[str, int]]) -> Iterator[Callable[[str, int], None]]:
    """One bar for each title: (unit, total). Yields a function that advances the bar of a title.

    What is done within a second shows nothing. Off a terminal there is a line every half minute, and the end of
    every bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    board = Progress(*columns, console=console)
    bar_of = {title: board.add_task(title, total=total, rate="") for title, (_, total) in totals.items()}
    told = time.monotonic()

    def advance(title: str, amount: int) -> None:
        nonlocal told
        board.advance(bar_of[title], amount)
        rate = _rate(board, bar_of[title], totals[title][0])
        board.update(bar_of[title], rate=rate)
        if not console.is_terminal and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            done = board.tasks[bar_of[title]].completed
            print(f"{title}: {done:,.0f} of {totals[title][1]:,} {totals[title][0]}, {rate}", file=sys.stderr)

    show = threading.Timer(_SECONDS_TO_SHOW, board.start)
    show.daemon = True
    show.start()
    try:
        yield advance
    finally:
        show.cancel()
        show.join()
        if board.live.is_started:
            board.stop()


def _rate(board: Progress, bar: TaskID, unit: str) -> str:
    state = board.tasks[bar]
    return f"{state.completed / state.elapsed:,.0f} {unit}/s" if state.elapsed else ""
