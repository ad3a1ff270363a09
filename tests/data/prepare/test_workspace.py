import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cctrain.data.prepare.tasks import WorkerError
from cctrain.data.prepare.workspace import partial_folder, workspace
from cctrain.errors import DataError, UsageError


def work(out: Path, inputs: dict, messages: list[str], error: BaseException | None = None) -> list[str]:
    """One attempt, which adds a file; the files that it found."""
    with workspace(out, inputs, messages.append) as partial:
        (partial / "scratch").mkdir(exist_ok=True)
        found = sorted(path.name for path in (partial / "scratch").iterdir())
        (partial / "scratch" / f"file{len(found)}").touch()
        (partial / "store").mkdir()
        (partial / "store" / "content").write_text("new")
        if error is not None:
            (partial / "store" / "content").unlink()
            (partial / "store").rmdir()
            raise error
    return found


def test_the_store_takes_its_place_and_nothing_else_is_left(tmp_path):
    out = tmp_path / "deep" / "out"
    work(out, {"a": 1}, [])
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "content").read_text() == "new"


def test_an_existing_store_is_replaced(tmp_path):
    out = tmp_path / "out"
    work(out, {}, [])
    (out / "old").touch()
    work(out, {}, [])
    assert [path.name for path in out.iterdir()] == ["content"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), WorkerError("died"), OSError(errno.ENOSPC, "full")])
def test_what_was_done_is_found_again_after(tmp_path, error):
    out, messages = tmp_path / "out", []
    with pytest.raises((KeyboardInterrupt, DataError)):
        work(out, {"a": 1}, messages, error)
    assert not out.exists()
    assert work(out, {"a": 1}, messages) == ["file0"]
    assert any("continuing" in message for message in messages)


def test_an_interrupt_says_how_to_go_on(tmp_path):
    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out", {}, messages, KeyboardInterrupt())
    assert "the same command continues" in messages[-1]


def test_input_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no cells"):
        work(tmp_path / "out", {}, [], DataError("no cells"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_can_be_done(tmp_path):
    with pytest.raises(DataError, match=r"disk or quota is full.*continues.*remove .*out\.partial"):
        work(tmp_path / "out", {}, [], OSError(errno.ENOSPC, "full"))


def test_other_inputs_begin_anew_and_say_what_differs(tmp_path):
    out, messages = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        work(out, {"seed": 1, "same": 2}, messages, KeyboardInterrupt())
    assert work(out, {"seed": 3, "same": 2}, messages) == []
    assert any("(seed): beginning anew" in message for message in messages)


def test_a_torn_record_of_the_inputs_begins_anew(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        work(out, {"a": 1}, [], KeyboardInterrupt())
    record = partial_folder(out) / "inputs.json"
    record.write_text(json.dumps({"a": 1})[:-2])
    assert work(out, {"a": 1}, []) == []


def test_a_second_process_is_refused_while_the_first_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("cctrain.run_lock.SECONDS_TO_DIE", 0.2)
    script = (
        "import sys, pathlib\n"
        "from cctrain.data.prepare.workspace import workspace\n"
        "with workspace(pathlib.Path(sys.argv[1]), {}, print):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"another prepare is writing .*process {holder.pid}"):
        work(tmp_path / "out", {}, [])
    holder.kill()
    holder.wait()
    assert work(tmp_path / "out", {}, []) == []


def test_it_works_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=work, args=(tmp_path / "out", {}, []))
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "content").exists()


def test_a_folder_of_somebody_else_is_refused_and_keeps_its_files(tmp_path):
    mine = tmp_path / "out.partial" / "raw" / "cells.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match="no prepare has left there"):
        work(tmp_path / "out", {}, [])
    assert mine.read_text() == "mine"


def test_a_folder_that_was_being_emptied_is_emptied_to_the_end(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        work(out, {"a": 1}, [], KeyboardInterrupt())
    (partial / "inputs.json").write_text(json.dumps({"being emptied": True}))
    (partial / "link").symlink_to(tmp_path)
    assert work(out, {"a": 1}, []) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["file/out", "taken"])
def test_a_place_where_no_folder_can_be_is_refused(tmp_path, out):
    (tmp_path / "file").touch()
    (tmp_path / "taken.partial").touch()
    with pytest.raises(DataError, match="cannot be made"):
        work(tmp_path / out, {}, [])
