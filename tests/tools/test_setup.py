"""The set-up script, as far as it decides: `--dry-run` makes nothing and needs no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "cat", "cut", "sed", "sha256sum")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that the script reads, in a folder without an environment."""
    (tmp_path / "tree" / "tools").mkdir(parents=True)
    for name in ("pyproject.toml", "tools/setup.sh", "tools/constraints.txt"):
        (tmp_path / "tree" / name).symlink_to(ROOT / name)
    # The script finds its tree from its own path, so this one must not be a link to another tree.
    script = tmp_path / "tree" / "tools" / "setup.sh"
    script.unlink()
    script.write_text((ROOT / "tools" / "setup.sh").read_text())
    return tmp_path / "tree"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with the few programs that the script needs, so that a test decides which others there are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (folder / name).symlink_to(found.stdout.strip())
    add_program(folder, "python3", f'exec {sys.executable} "$@"')
    return folder


def add_program(folder: Path, name: str, text: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def run_setup(tree: Path, path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it from another folder, with nothing of Slurm or of this environment in the way."""
    inherited = {key: value for key, value in os.environ.items() if not re.match("SLURM|PYTHON|VIRTUAL_ENV", key)}
    return subprocess.run(
        ["bash", str(tree / "tools" / "setup.sh"), *options],
        env=inherited | {"PATH": str(path)} | environment,
        cwd=path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_names_every_option(tree: Path, path: Path) -> None:
    result = run_setup(tree, path, "--help")

    assert result.returncode == 0
    for option in ("--device", "--extra", "--dry-run", "PYTHON="):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu"], "unknown option --gpu"),
        (["--device", "gpu"], "auto, cpu or cuda, not 'gpu'"),
        (["--device"], "--device needs a value"),
        (["--extra", "figure"], "no extra 'figure'"),
    ],
)
def test_a_wrong_option_exits_with_2_and_says_what_is_right(
    tree: Path, path: Path, options: list[str], message: str
) -> None:
    result = run_setup(tree, path, *options)

    assert result.returncode == 2
    assert message in result.stderr


def test_a_login_node_gets_cpu_and_is_told_how_to_choose_otherwise(tree: Path, path: Path) -> None:
    add_program(path, "sbatch")

    result = run_setup(tree, path, "--dry-run")

    assert result.returncode == 0
    assert "login node: installing for cpu" in result.stderr
    assert "tools/setup.sh --device cuda" in result.stderr
    assert re.search(r"Would make .venv with .*python3 for cpu: torch \d", result.stderr)
    assert not (tree / ".venv").exists()


def test_slurm_conf_alone_tells_a_login_node_too(tree: Path, path: Path) -> None:
    assert "login node" in run_setup(tree, path, "--dry-run", SLURM_CONF="/etc/slurm/slurm.conf").stderr
    assert "login node" not in run_setup(tree, path, "--dry-run").stderr


def test_a_visible_gpu_means_cuda_even_beside_slurm(tree: Path, path: Path) -> None:
    add_program(path, "sbatch")
    add_program(path, "nvidia-smi")

    assert "for cuda: torch" in run_setup(tree, path, "--dry-run").stderr


def test_a_driver_without_a_gpu_means_cpu(tree: Path, path: Path) -> None:
    add_program(path, "nvidia-smi", "exit 9")

    assert "for cpu: torch" in run_setup(tree, path, "--dry-run").stderr


def test_an_old_python_is_not_used(tree: Path, path: Path) -> None:
    add_program(path, "python3.9", "exit 1")

    result = run_setup(tree, path, "--dry-run", PYTHON="python3.9")

    assert result.returncode == 1
    assert "no Python 3.11 or newer was found (looked for: python3.9)" in result.stderr


def test_a_python_without_venv_is_answered_with_the_package_to_install(tree: Path, path: Path) -> None:
    add_program(path, "python3.12", 'case "$2" in *ensurepip*) exit 1;; esac')

    result = run_setup(tree, path, "--dry-run", PYTHON="python3.12")

    assert result.returncode == 1
    assert "apt-get install python3.12-venv" in result.stderr


def make_environment(tree: Path, path: Path, device: str, extras: str) -> None:
    """What a finished set-up leaves that the script looks at: an interpreter that starts, and the stamp."""
    (tree / ".venv" / "bin").mkdir(parents=True)
    add_program(tree / ".venv" / "bin", "python")
    digest = subprocess.run(
        "{ echo $PWD; cat pyproject.toml tools/constraints.txt; } | sha256sum | cut -d' ' -f1",
        shell=True,
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    (tree / ".venv" / "setup.done").write_text(f"{digest.stdout.strip()} {device} {extras}\n")


def test_an_unchanged_environment_is_kept_with_the_device_and_extras_it_was_made_for(tree: Path, path: Path) -> None:
    make_environment(tree, path, "cuda", "figures,test")

    result = run_setup(tree, path)

    assert result.returncode == 0
    assert "(cuda) is up to date" in result.stderr


def test_an_environment_for_another_device_or_without_an_extra_is_made_again(tree: Path, path: Path) -> None:
    make_environment(tree, path, "cpu", "test")

    assert "for cuda: torch" in run_setup(tree, path, "--dry-run", "--device", "cuda").stderr
    assert "extras figures,test" in run_setup(tree, path, "--dry-run", "--extra", "figures").stderr


def test_changed_requirements_are_noticed(tree: Path, path: Path) -> None:
    make_environment(tree, path, "cpu", "test")
    text = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").unlink()
    (tree / "pyproject.toml").write_text(text + "\n")

    assert "Would make .venv" in run_setup(tree, path, "--dry-run").stderr


def test_an_environment_whose_interpreter_is_gone_is_made_again(tree: Path, path: Path) -> None:
    make_environment(tree, path, "cpu", "test")
    (tree / ".venv" / "bin" / "python").unlink()

    assert "Would make .venv" in run_setup(tree, path, "--dry-run").stderr


def test_the_constraints_pin_exact_versions_and_leave_the_build_of_torch_open() -> None:
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    names = {pin.split("==")[0].lower() for pin in pins}
    assert {"torch", "deepspeed", "mlflow", "pytest", "ruff", "mypy", "hypothesis", "umap-learn"} <= names


def test_the_test_script_explains_itself(path: Path) -> None:
    result = subprocess.run(
        [ROOT / "tools" / "test.sh", "--help"], cwd=path, capture_output=True, text=True, timeout=60
    )

    assert result.returncode == 0
    assert "--all" in result.stdout
