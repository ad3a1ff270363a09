"""A bar with a rate on standard error, for whatever may take over two seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by so many units; off a terminal only the end is shown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(amount: int) -> None:
            bar.advance(task, amount)
            state = bar.tasks[0]
            if state.elapsed:
                bar.update(task, rate=f"{state.completed / state.elapsed:,.0f} {unit}/s")

        yield advance
