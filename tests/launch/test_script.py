"""The rendered batch script: each profile against its golden file, and what the shell and Slurm say of it.

After a deliberate change, `python -m tests.launch.test_script` writes the golden files anew: read the difference.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cctrain.errors import UsageError
from cctrain.launch.profile import LAUNCHERS, Profile, load_profile
from cctrain.launch.script import TEMPLATE, Request, job_name, render, resources

GOLDEN = Path(__file__).with_name("golden")
CASES = {
    "gpu": ("gpu", Request(nodes="2", gpus_per_node=2, time="1-00:00:00")),
    "gpu-chain": ("gpu", Request(nodes="1-2", gpus_per_node=2, chain=3)),
    "cpu": ("cpu", Request(nodes="2", ranks_per_node=4)),
    "apptainer": ("apptainer", Request(gpus_per_node=2)),
}


def rendered(name: str, run_dir: str = "/scratch/me/runs/cell") -> str:
    profile, request = CASES[name]
    config = Path(run_dir) / "slurm" / "submission-1" / "config.yaml"
    python = "/home/me/cctrain/.venv/bin/python"
    return render(Path(run_dir), config, load_profile(profile), request, python, "c0de" * 16, [])


@pytest.mark.parametrize("name", CASES)
def test_the_script_of_every_profile_is_its_golden_file(name):
    assert rendered(name) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("option", ["no-requeue: true", "requeue: true", "job-name: mine"])
def test_a_chain_keeps_its_order_whatever_the_profile_says(option, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"sbatch: {{{option}, time: 10}}\n")
    profile = load_profile(str(tmp_path / "mine.yaml"))
    lines = render(tmp_path, tmp_path / "c.yaml", profile, Request(chain=3), "python", "c0de", []).splitlines()
    assert "#SBATCH --dependency=singleton" in lines
    assert "#SBATCH --no-requeue" in lines
    assert "chain=1" in lines
    assert sum(line.startswith("#SBATCH --job-name=cctrain-") for line in lines) == 1
    assert not any(line.startswith(("#SBATCH --requeue", "#SBATCH --job-name=mine")) for line in lines)


def test_every_profile_has_a_golden_file():
    assert {path.stem for path in (LAUNCHERS / "profiles").iterdir()} == {profile for profile, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_bash_reads_the_script_and_shellcheck_finds_nothing(name):
    for checker in (["bash", "-n", "-"], ["shellcheck", "-"]):
        if shutil.which(checker[0]) is None:
            assert "CI" not in os.environ, f"CI has {checker[0]} from tools/test.sh"
            pytest.skip(f"{checker[0]} is missing")
        done = subprocess.run(checker, input=rendered(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slurm
@pytest.mark.parametrize("name", CASES)
def test_slurm_accepts_the_script(name, cluster, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(name))
    done = subprocess.run(["sbatch", "--test-only", script], env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.slurm
def test_slurm_understands_a_run_directory_with_blanks_and_percent_signs(cluster, tmp_path):
    run_dir = tmp_path / "50% of a cell, $HOME"
    (run_dir / "logs").mkdir(parents=True)
    script = rendered("cpu", str(run_dir)).splitlines()
    script[script.index("main")] = 'cd "$run_dir" && srun --output="${run_dir//%/%%}/logs/rank-%4t.log" pwd'
    (tmp_path / "job.sbatch").write_text("\n".join(script))
    done = subprocess.run(
        ["sbatch", "--wait", "--parsable", tmp_path / "job.sbatch"], env=cluster, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    names = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert names == [*(f"rank-000{rank}.log" for rank in range(8)), f"slurm-{job}.log"]
    assert (run_dir / "logs" / "rank-0007.log").read_text() == f"{run_dir}\n"


def test_the_template_is_a_script_of_its_own_for_the_shell():
    assert subprocess.run(["bash", "-n", TEMPLATE]).returncode == 0


@pytest.mark.parametrize(
    ("refusals", "code", "said"),
    [
        (0, 0, "requeued to go on from step-00000002"),
        (1, 0, "requeued to go on from step-00000002"),
        (2, 1, "Slurm refuses to requeue the job. The run is saved: submit it again"),
    ],
)
def test_a_refused_requeue_is_tried_once_more_after_10_seconds(fake_command, tmp_path, refusals, code, said):
    tries, waits = fake_command("scontrol", f"((call > {refusals}))"), fake_command("sleep", "")
    script = render(tmp_path, tmp_path / "c.yaml", Profile("p"), Request(), "python", "c0de", [])
    assert script.endswith("\nmain\n")
    script = script.removesuffix("main\n") + 'requeue "to go on from step-00000002"\n'
    environment = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert tries.read_text().splitlines() == ["requeue 42"] * min(refusals + 1, 2)
    assert waits.read_text().splitlines() == ["10"] * min(refusals, 1)


def test_what_a_profile_says_of_the_templates_options_stands_in_their_place():
    profile = Profile("mine", {"signal": "B:USR1@600", "job-name": "night shift", "no-requeue": "", "account": "lab"})
    lines = render(Path("/r"), Path("/r/c.yaml"), profile, Request(), "python", "c", []).splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [
        '#SBATCH --job-name="night shift"',
        "#SBATCH --output=/r/logs/slurm-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --no-requeue",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH --nodes=1",
        "#SBATCH --account=lab",
        "#SBATCH --ntasks-per-node=1",
    ]
    assert "so many seconds before" in lines[lines.index("#SBATCH --signal=B:USR1@600") - 2]


def test_words_for_the_shell_are_quoted_and_nothing_in_a_path_is_filled_in():
    run_dir = Path("/data/it's @CODE@; rm -rf")
    text = render(run_dir, run_dir / "c.yaml", Profile("p"), Request(), "/my python", "c0de", ["--accept-changes"])
    assert "run_dir='/data/it'\"'\"'s @CODE@; rm -rf'" in text
    assert "python='/my python'" in text
    assert "train_options=(--accept-changes)" in text
    done = subprocess.run(["bash", "-n", "-"], input=text, text=True)
    assert done.returncode == 0


def test_a_rank_for_each_gpu_however_the_profile_asks_for_them():
    for sbatch, gpus, shown in (
        ({"gpus-per-node": "4"}, None, {"gpus-per-node": "4"}),
        ({"gpus-per-node": "a100:4"}, 2, {"gpus-per-node": "a100:2"}),
        ({"gres": "gpu:h100:4,scratch:1"}, 8, {"gres": "gpu:h100:8,scratch:1"}),
        ({"gres": "gpu"}, 4, {"gres": "gpu:4"}),
        ({}, 4, {"gpus-per-node": "4"}),
    ):
        found, ranks = resources(Profile("p", sbatch), Request(gpus_per_node=gpus))
        assert found == {"nodes": "1"} | shown | {"ntasks-per-node": str(gpus or 4)}
        assert ranks == (gpus or 4)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(nodes="two"), "--nodes=two"),
        (Request(time="soon"), "--time=soon"),
        (Request(gpus_per_node=2, ranks_per_node=3), "3 ranks on a node need as many GPUs"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(request_, said):
    with pytest.raises(UsageError, match=said):
        resources(Profile("p"), request_)


def test_runs_of_the_same_name_in_other_folders_do_not_share_a_chain():
    assert job_name(Path("/a/cell"), 0) == job_name(Path("/b/cell"), 0) == "cctrain-cell"
    assert job_name(Path("/a/cell"), 2) != job_name(Path("/b/cell"), 2)


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.sbatch").write_text(rendered(case))
