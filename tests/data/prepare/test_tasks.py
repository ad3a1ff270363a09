import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cctrain.data.prepare.tasks import Task, WorkerError, Workers, _work
from cctrain.errors import DataError

# In a module of its own, which worker processes can import wherever the tests are run from.
JOBS = """
import multiprocessing, os, signal, time, weakref
from pathlib import Path
from cctrain.errors import DataError

def write(text, target, advance):
    target.write_text(text)
    advance(1)

def write_pid(target, advance):
    time.sleep(0.2)
    write(str(os.getpid()), target, advance)

def refuse(text, target, advance):
    raise DataError(text)

def die(target, advance):
    os.kill(os.getpid(), signal.SIGKILL)

def refuse_after(other, target, advance):
    while not other.exists():
        time.sleep(0.05)
    refuse("no", target, advance)

def wait_with_semaphore(target, advance):
    semaphore = multiprocessing.get_context("spawn").Lock()
    wait(target, advance)

def wait_in_callback(target, advance):
    class Watched:
        pass
    def wait(_):
        target.write_text("")
        time.sleep(60)
    watched = Watched()
    watch = weakref.ref(watched, wait)
    del watched

def blunder(target, advance):
    raise KeyError("a defect")

def wait(target, advance):
    write(str(os.getpid()), target, advance)
    time.sleep(60)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    import jobs_of_a_test

    yield jobs_of_a_test
    del sys.modules["jobs_of_a_test"]


def task(run, target: Path, *arguments) -> Task:
    return Task("testing", "files", 1, target, run, (*arguments, target))


def test_tasks_run_in_several_processes_that_are_not_this_one(jobs, tmp_path):
    targets = [tmp_path / f"{i}" for i in range(4)]
    with Workers(2) as pool:
        pool.run([task(jobs.write_pid, target) for target in targets])
        pids = {int(target.read_text()) for target in targets}
        assert len(pids) == 2
        assert os.getpid() not in pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_one_worker_is_this_process(jobs, tmp_path):
    with Workers(1) as pool:
        pool.run([task(jobs.write_pid, tmp_path / f"{i}") for i in range(2)])
    assert {int((tmp_path / f"{i}").read_text()) for i in range(2)} == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_whose_file_exists_is_not_run_again(jobs, tmp_path, workers):
    (tmp_path / "a").write_text("before")
    with Workers(workers) as pool:
        pool.run([task(jobs.write, tmp_path / name, "now") for name in "abc"])
    assert [(tmp_path / name).read_text() for name in "abc"] == ["before", "now", "now"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work_or_is_told_per_task(jobs, tmp_path, workers):
    tasks = [
        task(jobs.refuse, tmp_path / "a", "a.h5ad: no"),
        task(jobs.write, tmp_path / "b", ""),
        task(jobs.write, tmp_path / "c", ""),
    ]
    with Workers(workers) as pool:
        errors = pool.run(tasks, keep_going=True)
        assert [str(error) for error in errors] == ["a.h5ad: no", "None", "None"]
        with pytest.raises(DataError, match=r"a\.h5ad: no"):
            pool.run([*tasks, task(jobs.write, tmp_path / "d", "")])


def test_a_worker_that_is_killed_is_one_error_that_says_so(jobs, tmp_path):
    tasks = [task(jobs.die, tmp_path / "a"), task(jobs.write, tmp_path / "b", "")]
    with Workers(2) as pool, pytest.raises(WorkerError, match=r"signal 9 .*memory.* while testing.*same command"):
        pool.run(tasks)


def test_a_defect_in_a_worker_shows_its_traceback(jobs, tmp_path):
    tasks = [task(jobs.blunder, tmp_path / "a"), task(jobs.write, tmp_path / "b", "")]
    with Workers(2) as pool, pytest.raises(RuntimeError, match=r"(?s)in blunder.*a defect"):
        pool.run(tasks)


@pytest.mark.parametrize("job", ["refuse", "blunder", "write"])
def test_a_worker_that_nobody_listens_to_any_more_leaves_in_silence(jobs, tmp_path, capfd, job):
    ours, theirs = (context := multiprocessing.get_context("spawn")).Pipe()
    worker = context.Process(target=_work, args=(theirs,))
    worker.start()
    theirs.close()
    run = getattr(jobs, job)
    ours.send((run, (tmp_path / "a",) if run is jobs.blunder else ("text", tmp_path / "a")))
    ours.close()
    worker.join()
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("job", ["wait_with_semaphore", "wait_in_callback"])
def test_a_worker_is_ended_in_silence_wherever_it_is(jobs, tmp_path, job):
    script = tmp_path / "modules" / "stop.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cctrain.data.prepare.tasks import Task, Workers\n"
        "import jobs_of_a_test as jobs\n"
        "if __name__ == '__main__':\n"
        f"    a, b = (Path({str(tmp_path)!r}) / name for name in 'ab')\n"
        "    with Workers(2) as pool:\n"
        "        tasks = [(jobs." + job + ", (a,), a), (jobs.refuse_after, (a, b), b)]\n"
        "        pool.run([Task('t', 'files', 1, place, run, given) for run, given, place in tasks])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("DataError: no")  # of the first process, and nothing behind it
    assert done.stderr.count("Traceback") == 1


def test_workers_end_with_the_process_that_started_them(jobs, tmp_path):
    script = tmp_path / "modules" / "start.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cctrain.data.prepare.tasks import Task, Workers\n"
        "import jobs_of_a_test as jobs\n"
        "if __name__ == '__main__':\n"
        f"    targets = [Path({str(tmp_path)!r}) / name for name in 'ab']\n"
        "    with Workers(2) as pool:\n"
        "        pool.run([Task('t', 'files', 1, target, jobs.wait, (target,)) for target in targets])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)
    targets = [tmp_path / name for name in "ab"]
    wait_until(lambda: all(target.exists() and target.read_text() for target in targets))
    pids = [int(target.read_text()) for target in targets]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
