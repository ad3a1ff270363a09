"""One training at a time in a run directory: RUN/lock, which says who trains there, and which outlives nobody.

Two things hold a run, because neither is enough on every file system:

- `flock` on the file, which the kernel drops with the process however it dies. Some file systems have none, and
  Lustre (mounted with `localflock`) keeps it within one machine.
- a lease: a thread renews the file's modification time every 15 s. After 60 s without that the holder is dead.

The file is JSON: who holds it. It never exists without its content: it is written under another name, locked,
and then linked (where there is none) or renamed (over a dead holder's). Both are atomic on every machine that
shares the directory.

What a newcomer does:

    flock refused                       somebody trains here: UsageError
    holder on this machine              flock would have been refused were it alive: taken at once
    holder an earlier start of this     Slurm requeues a job only when the earlier start has ended: taken at once
      very Slurm job
    holder on another machine           dead if its lease has run out: taken; else wait until it has run out or is
                                        released, and raise UsageError if it is renewed all the while
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from cctrain.errors import UsageError

log = logging.getLogger(__name__)

LOCK = "lock"

SECONDS_BETWEEN_RENEWALS = 15.0
LEASE_SECONDS = 60.0
# A process that was killed keeps its locks until its memory is freed, which can take seconds.
SECONDS_TO_DIE = 5.0
# Of two machines that find a lease run out at the same moment, the last one to replace the file holds the run:
# so long each of them waits until it looks whether that is itself.
SECONDS_TO_SETTLE = 2.0
SECONDS_BETWEEN_TRIES = 0.5

_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Holder:
    """Who holds a run. Every field has a default: a file that says less, or nothing, is read as well."""

    token: str = ""  # of this one holding, and no other
    host: str = "an unknown host"
    machine: str = ""  # one start of one kernel, whatever name a container gives it
    pid_space: str = ""  # a process id means something only within it
    pid: int = 0
    started: float = 0.0  # when the process did: another one may have got its id since
    job: str = ""  # Slurm's job id
    restart: int = 0  # how often Slurm has requeued that job
    since: str = "an unknown time"

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid or 'unknown'} on {self.host}{job}, since {self.since}"


HELD = (
    "another training holds {directory}: {holder}. Wait for its end, make it save and leave with "
    "`touch {directory}/stop`, or choose another run.dir"
)


@contextmanager
def hold_run(run_dir: Path, held: str = HELD) -> Iterator[None]:
    """Hold the run for this process. Raises UsageError, with the text `held`, if another one does, or if it cannot
    write there."""
    run_dir = Path(run_dir)
    me = myself()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _acquire(run_dir / LOCK, me, held)
    except OSError as error:
        raise UsageError(
            f"cannot write in the run directory {run_dir}: {error.strerror}; choose a run.dir that can be written, "
            "or free the disk"
        ) from error
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(run_dir / LOCK, file, me, ended), name="lock", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        # While we hold flock and our lease is young, nobody replaces the file between the question and the deed.
        with suppress(OSError):
            if _read(run_dir / LOCK).token == me.token:
                (run_dir / LOCK).unlink()
        os.close(file)


def myself() -> Holder:
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_first_line("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        pid_space=_link_target("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(restart) if restart.isdigit() else 0,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _acquire(path: Path, me: Holder, held: str) -> int:
    """Take the lock, or wait for it; returns the open file, with flock on it where there is such a thing."""
    claim = path.with_name(f".{path.name}.{me.token}")
    patience = _Patience(path, me, held)
    while True:
        file = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        taken = False
        try:
            _flock(file)
            os.write(file, json.dumps(asdict(me)).encode())
            os.fsync(file)
            taken = _try_to_take(path, claim, file, patience)
        finally:
            claim.unlink(missing_ok=True)
            if not taken:
                os.close(file)
        if taken:
            return file
        time.sleep(SECONDS_BETWEEN_TRIES)


def _try_to_take(path: Path, claim: Path, file: int, patience: "_Patience") -> bool:
    """Put our claim in the lock's place if there is none, or a dead one; False: look again soon."""
    me = patience.me
    try:
        theirs = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return _link(claim, path)
    try:
        flocked = _flock(theirs)
        if not _is_at(path, theirs):
            return False  # released or replaced since we opened it
        holder = _parse(os.pread(theirs, 65536, 0))
        renewed = os.fstat(theirs).st_mtime
        # Our claim was written just now: its time tells the age, whatever the clocks of the machines say.
        if not patience.finds_dead(holder, flocked, renewed, age=os.fstat(file).st_mtime - renewed):
            return False
        log.warning("%s: %s ended without a word; taking over its lock", path.parent, holder)
        os.rename(claim, path)
    finally:
        os.close(theirs)
    if flocked and holder.machine == me.machine:
        return True
    time.sleep(SECONDS_TO_SETTLE)
    return _read(path).token == me.token


class _Patience:
    """What one newcomer has seen of a lock so far, and what follows from it."""

    def __init__(self, path: Path, me: Holder, held: str) -> None:
        self.path = path
        self.me = me
        self._held_text = held
        self._started = time.monotonic()
        self._refused_since: float | None = None
        self._seen: tuple[str, float] | None = None  # the holder's token and the last renewal
        self._seen_since = 0.0
        self._told = False

    def finds_dead(self, holder: Holder, flocked: bool | None, renewed: float, age: float) -> bool:
        """False: not sure yet. Raises UsageError when the holder is alive."""
        me, now = self.me, time.monotonic()
        if self._seen != (holder.token, renewed):
            self._seen, self._seen_since = (holder.token, renewed), now
        here = holder.machine == me.machine
        requeued = bool(me.job) and holder.job == me.job and holder.restart < me.restart
        lapsed = max(age, now - self._seen_since) > LEASE_SECONDS
        known_by_pid = here and holder.pid_space == me.pid_space
        refused = flocked is False or (flocked is None and known_by_pid and _lives(holder))

        if refused:
            self._refused_since = now if self._refused_since is None else self._refused_since
            # It may be about to die, or, on a server that keeps the locks, wait for its machine to be given up.
            if now - self._refused_since > (LEASE_SECONDS if requeued or lapsed else SECONDS_TO_DIE):
                raise self._held(holder)
            if requeued or lapsed:
                self._tell_waiting(holder)
            return False
        self._refused_since = None
        if lapsed or requeued or (here and flocked) or known_by_pid:
            return True
        self._tell_waiting(holder)
        if now - self._started > LEASE_SECONDS and now - self._seen_since < LEASE_SECONDS / 3:
            raise self._held(holder)  # it has been renewed while we watched
        return False

    def _held(self, holder: Holder) -> UsageError:
        return UsageError(self._held_text.format(directory=self.path.parent, holder=holder))

    def _tell_waiting(self, holder: Holder) -> None:
        if not self._told:
            log.warning(
                "%s is held by %s: waiting until it is released, or has not been renewed for %.0f s",
                self.path.parent,
                holder,
                LEASE_SECONDS,
            )
        self._told = True


def _renew(path: Path, file: int, me: Holder, ended: threading.Event) -> None:
    told = False
    while not ended.wait(SECONDS_BETWEEN_RENEWALS):
        try:
            os.utime(file)
            holder = _read(path)
        except FileNotFoundError:
            if not told:
                log.warning("%s was removed: nothing keeps another training out of this run now", path)
            told = True
        except OSError as error:
            log.debug("cannot renew %s: %s", path, error)
        else:
            if holder.token != me.token:
                # This process, or its file system, stood still for so long that another one took over.
                print(
                    f"cctrain: {path.parent} now belongs to another training ({holder}): leaving at once, so that "
                    "the two do not write over each other",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(UsageError.exit_code)


def _flock(file: int) -> bool | None:
    """Whether flock was granted; None where the file system has no flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _link(claim: Path, path: Path) -> bool:
    """Give the claim the lock's name, unless somebody else was faster."""
    try:
        os.link(claim, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here. The empty file is ours for this moment: others wait for its lease.
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        os.rename(claim, path)
    return True


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _read(path: Path) -> Holder:
    # Opened anew each time: that is when NFS asks its server what the file is now.
    return _parse(path.read_bytes())


def _parse(content: bytes) -> Holder:
    """Fields that are missing or of another type, like a file that is no JSON at all, say nothing."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return Holder()
    if not isinstance(values, dict):
        return Holder()
    kinds: dict[str, type] = {entry.name: type(entry.default) for entry in fields(Holder)}
    known: dict[str, Any] = {key: value for key, value in values.items() if type(value) is kinds.get(key)}
    return Holder(**known)


def _lives(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder.started) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link_target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
