"""What `cctrain submit` writes, refuses and hands over; the jobs here never start. Their lives are in test_cluster."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cctrain.cli import app
from cctrain.config import load_config, to_yaml
from cctrain.data.store.store import TokenStore
from cctrain.errors import DataError, UsageError
from cctrain.launch.jobs import cancel_jobs, describe_jobs, show_jobs, tail_logs
from cctrain.launch.script import Request
from cctrain.launch.submissions import read_submissions
from cctrain.launch.submit import submit
from cctrain.tracking.journal import Journal

PASSWORD = "correct-horse-battery"


@pytest.fixture
def folder(tmp_path: Path, tiny_store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(f"data: {{store: {tiny_store.path}}}\nmodel: {{width: 16, heads: 2}}\n")
    (tmp_path / "held.yaml").write_text("sbatch: {hold: true}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return tmp_path


@pytest.fixture
def slurm(folder: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with Slurm's commands speaking to the test cluster."""
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    return folder


def held(run: str = "runs/a", *overrides: str, nodes: str | None = None, **options) -> dict:
    words = [f"run.dir={run}", *overrides]
    return submit(Path("tiny.yaml"), words, "held.yaml", Request(nodes, ranks_per_node=2), **options)


def files_of(run_dir: Path) -> dict[str, str]:
    return {str(path.relative_to(run_dir)): path.read_text() for path in run_dir.rglob("*") if path.is_file()}


# ---- without Slurm


@pytest.mark.parametrize(
    "told", ["sbatch: {gpus-per-node: 'nvidia_h200:4'}", "{sbatch: {gpus-per-node: 4}, device: h200}"]
)
def test_it_says_what_the_training_needs_and_how_long_it_takes_on_such_gpus(folder, caplog, told):
    (folder / "own.yaml").write_text(told)
    app(
        ["submit", "tiny.yaml", "run.dir=runs/a", "--profile=own.yaml", "--nodes=2-4", "--dry-run"],
        standalone_mode=False,
    )
    said = caplog.text
    assert "on each of 8 rank(s)" in said
    assert re.search(
        r"fits into 127 GB of the 141 GB of NVIDIA H200 SXM; about .* s a step, .* h for 10,000 steps", said
    )


def test_where_nothing_names_the_gpus_it_says_what_the_training_needs(folder, caplog):
    app(["submit", "tiny.yaml", "run.dir=runs/a", "--profile=gpu", "--dry-run"], standalone_mode=False)
    said = caplog.text
    assert "on each of 1 rank(s)" in said
    assert "fits" not in said


def test_a_dry_run_shows_the_script_and_writes_nothing(folder, capfd):
    before = sorted(folder.rglob("*"))
    words = ["submit", "tiny.yaml", "run.dir=runs/a", "--profile=cpu", "--nodes=2", "--dry-run"]
    app(words, standalone_mode=False)
    script = capfd.readouterr().out
    assert f"run_dir={folder}/runs/a\n" in script
    assert f"python={sys.executable}\n" in script
    assert "#SBATCH --nodes=2\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert sorted(folder.rglob("*")) == before


def test_where_there_is_no_slurm_that_is_said_and_nothing_is_written(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UsageError, match="sbatch is not here: call this where Slurm is"):
        held()
    assert not (folder / "runs").exists()


def test_a_store_that_is_not_there_is_named_before_a_job_waits_for_it(folder):
    with pytest.raises(DataError, match="nowhere"):
        held("runs/a", f"data.store={folder}/nowhere")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tracking.uri=https://me:{}@mlflow.example.org", "MLFLOW_TRACKING_PASSWORD in the environment"),
        ("tracking.experiment={}", "the value of the environment variable MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_configuration_with_a_password_is_refused_without_repeating_it(folder, override, said):
    with pytest.raises(UsageError, match=said) as raised:
        held("runs/a", override.format(PASSWORD))
    assert PASSWORD not in str(raised.value)
    assert not (folder / "runs").exists()


def test_a_profile_with_a_password_is_refused(folder):
    (folder / "held.yaml").write_text("setup: |\n  export WANDB_API_KEY=0123456789\n")
    with pytest.raises(UsageError, match=r"the profile held sets WANDB_API_KEY.*cat FILE"):
        held()


def test_changed_keys_of_a_run_that_has_begun_are_refused_at_once(folder, tiny_store):
    from cctrain.training.data import resolve

    run_dir = folder / "runs" / "a"
    run_dir.mkdir(parents=True)
    config = resolve(load_config(folder / "tiny.yaml", [f"run.dir={run_dir}"]), tiny_store)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    journal = Journal(run_dir)
    journal.write("start", 0)
    journal.close()
    with pytest.raises(UsageError, match=r"model\.width: 16 → 32"):
        held("runs/a", "model.width=32", dry_run=True)
    with pytest.raises(UsageError, match="--accept-changes"):
        held("runs/a", "training.steps=7", dry_run=True)
    text = held("runs/a", "training.steps=7", dry_run=True, accept_changes=True)["text"]
    assert "train_options=(--accept-changes)" in text


@pytest.mark.parametrize("nodes", ["1", "1-2", "2-3"])
def test_ranks_that_do_not_divide_into_rows_of_context_ranks_are_refused_before_a_job_waits_for_them(folder, nodes):
    with pytest.raises(UsageError, match=r"parallel\.context=4 does not divide the [26] rank\(s\) of [13] node"):
        held("runs/a", "parallel.context=4", nodes=nodes, dry_run=True)
    assert held("runs/a", "parallel.context=4", nodes="2", dry_run=True)["jobs"] == []


def test_a_chain_that_is_refused_half_way_is_recorded_as_far_as_it_is_queued(folder, fake_command):
    script = '((call <= 2)) && echo $((40 + call)) || { echo "job limit reached" >&2; exit 1; }'
    handed = fake_command("sbatch", script)
    request = Request(ranks_per_node=2, chain=4)
    with pytest.raises(UsageError, match=r"sbatch refuses .*: job limit reached\n.* queued and recorded \(41, 42\)"):
        submit(Path("tiny.yaml"), ["run.dir=runs/a"], "held.yaml", request)
    submitted = folder / "runs" / "a" / "slurm" / "submission-1" / "job.sbatch"
    assert handed.read_text() == f"--parsable {submitted}\n" * 3
    [submission] = read_submissions(folder / "runs" / "a")
    assert (submission["jobs"], submission["script"]) == (["41", "42"], str(submitted))


# ---- with Slurm


@pytest.mark.slurm
def test_what_is_submitted_is_frozen_in_the_run_directory_and_slurm_holds_the_job(slurm):
    run_dir = slurm / "runs" / "a"
    result = held(command=["cctrain", "submit", "tiny.yaml", "run.dir=runs/a", "a b"])
    [job] = result["jobs"]
    [submission] = json.loads((run_dir / "submission.json").read_text())["submissions"]
    assert submission["jobs"] == [job]
    assert submission["command"] == "cctrain submit tiny.yaml run.dir=runs/a 'a b'"
    assert submission["code"] in Path(result["script"]).read_text()
    config = load_config(run_dir / "slurm" / "submission-1" / "config.yaml")
    assert config.run.dir == str(run_dir)
    assert config.model.width == 16
    assert set(files_of(run_dir)) == {
        "submission.json",
        *(f"slurm/submission-1/{name}" for name in ("config.yaml", "job.sbatch", "submitted.diff")),
    }
    found = describe_jobs(run_dir)
    assert [(one["job"], one["state"], one["reason"]) for one in found["jobs"]] == [(job, "PENDING", "JobHeldUser")]
    assert f"job {job}: PENDING (JobHeldUser)" in show_jobs(found)
    assert "step 0 of 10,000" in show_jobs(found)
    with pytest.raises(UsageError, match=f"job {job} of .* is PENDING, and two jobs cannot train one run"):
        held()


@pytest.mark.slurm
def test_a_password_in_the_environment_is_in_no_file_and_reaches_the_job(slurm):
    (slurm / "held.yaml").write_text("setup: printenv MLFLOW_TRACKING_PASSWORD | sha256sum >seen; exit 0\n")
    (slurm / "runs" / "a").mkdir(parents=True)
    [job] = held(command=["cctrain", "submit", PASSWORD])["jobs"]
    subprocess.run(["srun", f"--dependency=afterany:{job}", "true"], check=True, capture_output=True)
    run_dir = slurm / "runs" / "a"
    assert all(PASSWORD not in text for text in files_of(run_dir).values())
    expected = subprocess.run(["sha256sum"], input=f"{PASSWORD}\n", capture_output=True, text=True, check=True)
    assert (slurm / "seen").read_text() == expected.stdout


@pytest.mark.slurm
def test_a_cancelled_run_can_be_submitted_again_beside_its_former_submission(slurm):
    run_dir = slurm / "runs" / "a"
    first = held(command=["cctrain", "submit", "tiny.yaml"])
    cancelled, text = cancel_jobs(run_dir)
    assert cancelled == {"cancelled": first["jobs"]}
    assert "to resume: cctrain submit tiny.yaml" in text
    assert cancel_jobs(run_dir) == ({"cancelled": []}, "no job of this run waits or runs")
    second = held()
    assert Path(second["script"]) == run_dir / "slurm" / "submission-2" / "job.sbatch"
    assert Path(first["script"]).is_file()
    states = {one["job"]: one["state"] for one in describe_jobs(run_dir)["jobs"]}
    assert states == {first["jobs"][0]: "CANCELLED", second["jobs"][0]: "PENDING"}
    cancel_jobs(run_dir)


@pytest.mark.slurm
def test_what_sbatch_refuses_is_told_in_its_words_and_not_recorded(slurm):
    (slurm / "held.yaml").write_text("sbatch: {partition: nowhere}\n")
    with pytest.raises(UsageError, match=r"sbatch refuses .*invalid partition specified: nowhere"):
        held()
    assert not (slurm / "runs" / "a" / "submission.json").exists()
    (slurm / "held.yaml").write_text("sbatch: {hold: true}\n")
    assert "submission-1" in held()["script"]
    cancel_jobs(slurm / "runs" / "a")


@pytest.mark.slurm
def test_jobs_that_slurm_has_forgotten_are_named(slurm):
    run_dir = slurm / "runs" / "a"
    held()
    cancel_jobs(run_dir)
    record = json.loads((run_dir / "submission.json").read_text())
    record["submissions"][0]["jobs"] = ["999999"]
    (run_dir / "submission.json").write_text(json.dumps(record))
    found = describe_jobs(run_dir)
    assert found["forgotten"] == ["999999"]
    assert "Slurm no longer knows the jobs of this run (999999)" in show_jobs(found)


def test_the_newest_batch_log_and_the_ranks_logs_are_shown(folder):
    run_dir = folder / "run"
    (run_dir / "logs").mkdir(parents=True)
    record = {"submissions": [{"jobs": ["1"], "command": "c", "script": "s"}]}
    (run_dir / "submission.json").write_text(json.dumps(record))
    assert tail_logs(run_dir)[1].endswith("is empty: the job has not started")
    for number in range(10):
        (run_dir / "logs" / f"rank-{number:04d}.log").write_text(f"rank {number}\n")
    (run_dir / "logs" / "slurm-1.log").write_text("".join(f"line {number}\n" for number in range(1, 31)))
    tails, text = tail_logs(run_dir)
    assert text.startswith(f"==> {run_dir}/logs/slurm-1.log <==\nline 16\n")
    assert "line 15\n" not in text
    assert len(tails["logs"]) == 9
    assert text.endswith(f"(2 more ranks in {run_dir}/logs)")


def test_a_run_that_was_never_submitted_has_no_jobs(folder):
    with pytest.raises(UsageError, match="nothing was submitted for runs/a"):
        describe_jobs(Path("runs/a"))
