"""What ends a training before its last step, in order: requests to stop, a hang, steps that are not finite.

- `StopRequests` remembers signals and looks for the files `stop` and `save` in the run directory. A rank only
  says what it has seen; all ranks decide together, at the end of a step, from the sum of what each has seen.
- `Watchdog` ends a rank that makes no progress, with the stacks of all its threads in its log.
- `SkippedSteps` counts steps that were skipped because their loss or gradient was not finite.
- `RUN/outcome`, one word, tells a launcher how an attempt ended; there is none when the attempt was killed.
- `record_crashes` puts into a rank's log what it could not say itself.

Nothing here knows of the model, of the engine or of how ranks talk to each other.
"""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from cctrain.errors import TrainingError
from cctrain.run_directory import write_atomically

STOP_FILE, SAVE_FILE, OUTCOME = "stop", "save", "outcome"
OUTCOMES = ("finished", "requeue", "stopped", "failed")

# The order of the vector that ranks sum; of several reasons to stop, the first one counts.
REASONS = ("interrupted", "stop_file", "terminated", "time_limit", "save_file")
REASON_OF_SIGNAL = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGUSR1: "time_limit",  # sent by a batch script when its time limit is near
}

SECONDS_BETWEEN_LOOKS = 1.0  # for the files: each look is a request to a shared file system
# A request that arrives twice at once (from the terminal, and passed on by a launcher or a wrapper) is one.
SECONDS_OF_ONE_REQUEST = 0.5
SECONDS_TO_LEAVE = 5.0  # after the second Ctrl-C, for the last lines of the journal
SECONDS_FOR_LAST_WORDS = 5.0
SECONDS_FOR_OTHERS = 3.0  # between the stacks of a hung rank and its end, which tears the connections of the others
SECONDS_STOOD_STILL = 10.0  # by which a tick of the watchdog comes late when the process was stopped
NUM_SAMPLES_SHOWN = 20

STDERR = 2
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_END = b"\0"  # no signal has this number


class Ending(NamedTuple):
    """What an attempt leaves: a word for the journal and RUN/outcome, and its exit code."""

    outcome: str
    exit_code: int


ENDINGS = {
    "interrupted": Ending("stopped", 130),
    "terminated": Ending("requeue", 0),
    "time_limit": Ending("requeue", 0),
    "stop_file": Ending("stopped", 0),
}


@dataclass(frozen=True)
class Decision:
    """What all ranks do at this step boundary: `stop` is the reason to leave, or None; `save` holds then too."""

    stop: str | None
    save: bool


class StopRequests:
    """Requests to save or to leave. Enter it in the main thread, early: before that, a signal just kills.

    A signal reaches Python's own handler only between two operations of the main thread, which may be minutes
    away (a backward pass, a collective whose partner is dead). The interpreter also writes its number to a
    pipe, at once; a thread reads that, answers the person, and ends a process that cannot even be interrupted.
    """

    def __init__(self, run_dir: Path, is_first: bool) -> None:
        self._files = {"stop_file": Path(run_dir) / STOP_FILE, "save_file": Path(run_dir) / SAVE_FILE}
        self._is_first = is_first
        self._seen: set[str] = set()
        self._last_look = -math.inf
        self._leave_now = self._raised = False
        self._closed = threading.Event()

    def __enter__(self) -> "StopRequests":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._listener = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in REASON_OF_SIGNAL}
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        os.write(self._writer, _END)
        # Before the handlers change: the listener may be about to interrupt this thread.
        self._listener.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)
        os.close(self._reader)

    def local(self) -> list[float]:
        """What this rank has seen, in the order of REASONS, as 0.0 or 1.0: to be summed over all ranks."""
        if self._is_first and time.monotonic() - self._last_look >= SECONDS_BETWEEN_LOOKS:
            self._last_look = time.monotonic()
            self._seen |= {reason for reason, path in self._files.items() if os.path.exists(path)}
        return [float(reason in self._seen) for reason in REASONS]

    @staticmethod
    def agreed(summed: list[float]) -> Decision:
        """The same on all ranks, from the sum of all ranks' `local()`."""
        wanted = [reason for reason, count in zip(REASONS, summed, strict=True) if count > 0]
        stop = next((reason for reason in wanted if reason in ENDINGS), None)
        return Decision(stop, save=bool(wanted))

    def obeyed(self) -> None:
        """Call it when the checkpoint is complete: the first rank removes the files that it had seen."""
        for reason in self._seen & self._files.keys():
            self._files[reason].unlink(missing_ok=True)
            self._seen.discard(reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(REASON_OF_SIGNAL[signal.Signals(number)])
        if self._leave_now and not self._raised:
            self._raised = True  # once: the clean-up that follows is not interrupted in turn
            raise KeyboardInterrupt

    def _listen(self) -> None:
        told: set[int] = set()
        last_ctrl_c = -math.inf
        while (byte := os.read(self._reader, 1)) != _END:
            number = byte[0]
            if number == signal.SIGINT:
                apart = time.monotonic() - last_ctrl_c >= SECONDS_OF_ONE_REQUEST
                last_ctrl_c = time.monotonic() if apart else last_ctrl_c
                if number in told and apart:
                    self._leave()
                    return
                text = "saving a checkpoint at the end of this step; Ctrl-C again leaves at once"
            else:
                text = f"{signal.Signals(number).name}: saving a checkpoint at the end of this step, then leaving"
            if self._is_first and number not in told:
                write_quietly(STDERR, f"cctrain: {text}\n")
            told.add(number)

    def _leave(self) -> None:
        """KeyboardInterrupt in the main thread; should it be stuck in an operation that never ends, the end."""
        self._leave_now = True
        # A real signal, that ends a sleep or a read too: the one just seen may have come a moment before the mark.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._closed.wait(SECONDS_TO_LEAVE):
            os._exit(130)


class Watchdog:
    """Ends this rank with exit code 5 when `seconds` pass without a `beat`.

    In a hung collective every rank waits for another, so all reach their deadlines at about the same time, and
    each writes the stacks of its threads to its standard error and to `logs`, and leaves the others a moment to do
    so. `last_words`, which may be set at any time, is called with the reason after that, for a few seconds at most
    (for the first rank's journal and outcome).

    A process that was stopped for a while (Ctrl-Z, a suspended job) has not hung: its count starts anew. The thread
    cannot run while an operation keeps the interpreter's lock and never returns; then the other ranks reach their
    deadlines, and the launcher ends this one.
    """

    def __init__(self, seconds: float, logs: list[Path], rank: int = 0) -> None:
        self._seconds = seconds
        self._logs = logs
        self.last_words: Callable[[str], None] | None = None
        self.is_ending = False  # from then on what the main thread meets, such as a lost connection, is a consequence
        self._rank = rank
        self._last = (time.monotonic(), "the start")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        # Opened now: a process that hangs may not be able to open anything.
        self._outputs = [STDERR, *(os.open(log, _APPEND, 0o666) for log in self._logs if not is_stderr(log))]
        self.beat("the start")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for output in self._outputs[1:]:
            os.close(output)

    def beat(self, what: str | None = None) -> None:
        """There is progress: `what` has just been reached ("step 12", "batch 3 of the evaluation"), or a part of what
        comes next."""
        self._last = (time.monotonic(), what or self._last[1])

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 4)
        while True:
            before = time.monotonic()
            if self._done.wait(tick):
                return
            since, what = self._last
            if time.monotonic() - before > tick + SECONDS_STOOD_STILL:
                self.beat(what)
            elif time.monotonic() - since >= self._seconds:
                self._end(what)

    def _end(self, what: str) -> None:
        self.is_ending = True
        reason = (
            f"rank {self._rank} made no progress for {self._seconds:g} s (training.hang_seconds), the last was: "
            f"{what}; a rank is lost or asleep, or one operation takes longer than that"
        )
        text = (
            f"cctrain: {reason}. The stacks of its threads follow; the log of the rank that differs from the "
            "others shows the cause. The same command resumes from the newest checkpoint.\n"
        )
        for output in self._outputs:
            write_quietly(output, text)
            with suppress(OSError):
                faulthandler.dump_traceback(output, all_threads=True)
        wait_until = time.monotonic() + min(SECONDS_FOR_OTHERS, self._seconds / 4)
        if self.last_words is not None:
            # In a thread of its own: the file system may be what hangs.
            words = threading.Thread(target=self.last_words, args=(reason,), daemon=True)
            words.start()
            words.join(SECONDS_FOR_LAST_WORDS)
        time.sleep(max(0.0, wait_until - time.monotonic()))
        os._exit(5)


class SkippedSteps:
    """Counts steps that were skipped; more than `max_in_a_row` of them without one between end the training."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self._samples: list[int] = []
        self._num_samples = 0

    def check(self, step: int, finite: bool, samples: list[int]) -> None:
        """`samples`: the ids that this step ran, on all ranks. Raises TrainingError, the same on all ranks."""
        if finite:
            self.in_a_row, self._samples, self._num_samples = 0, [], 0
            return
        self.in_a_row += 1
        self._samples = [*self._samples, *samples][:NUM_SAMPLES_SHOWN]
        self._num_samples += len(samples)
        if self.in_a_row <= self.max_in_a_row:
            return
        shown = ", ".join(map(str, self._samples))
        more = self._num_samples - len(self._samples)
        raise TrainingError(
            f"the loss or the gradient of {self.in_a_row} steps in a row, the last of them step {step}, was not "
            f"finite; training.max_skipped is {self.max_in_a_row}. Their samples: {shown}"
            f"{f' and {more:,} more, in the skip lines of the journal' if more else ''}. Lower "
            "training.learning_rate or lengthen training.warmup (with --accept-changes), or look at the counts of "
            "these cells; the same command resumes from the newest checkpoint"
        )


def write_outcome(run_dir: Path, outcome: str) -> None:
    """How this attempt ended: one word for the launcher (see OUTCOMES)."""
    assert outcome in OUTCOMES, f"unknown outcome {outcome!r}: one of {', '.join(OUTCOMES)}"
    write_atomically(Path(run_dir) / OUTCOME, f"{outcome}\n".encode())


def clear_outcome(run_dir: Path) -> None:
    """An attempt that starts has not ended yet; if it is killed, no word shall say otherwise."""
    (Path(run_dir) / OUTCOME).unlink(missing_ok=True)


def read_outcome(run_dir: Path) -> str | None:
    """How the last attempt ended; None if it was killed, or still trains."""
    try:
        word = (Path(run_dir) / OUTCOME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return word if word in OUTCOMES else None


def record_crashes(log: Path) -> None:
    """From now on the log of this rank has what ends the process without a word of its own.

    That is uncaught exceptions, and fatal signals with the stacks of all threads. SIGUSR2 writes the stacks, too,
    and ends nothing: `kill -USR2 PID` shows what a rank is doing, and a launcher sends it before it kills one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    own_file = not is_stderr(log)
    output = os.open(log, _APPEND, 0o666) if own_file else STDERR
    faulthandler.enable(output, all_threads=True)
    faulthandler.register(signal.SIGUSR2, output, all_threads=True)
    if not own_file:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        write_quietly(output, "".join(traceback.format_exception(kind, error, trace)))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def is_stderr(path: Path) -> bool:
    """Whether what goes to standard error ends up in this file anyway."""
    try:
        return os.path.samestat(os.fstat(STDERR), os.stat(path))
    except OSError:
        return False


def write_quietly(output: int, text: str) -> None:
    with suppress(OSError):  # a terminal that is gone, a full disk: the words are lost, nothing else
        os.write(output, text.encode())
