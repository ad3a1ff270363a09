"""What a profile may say, and what is said about one that is wrong."""

import pytest

from cctrain.errors import UsageError
from cctrain.launch.profile import LAUNCHERS, load_profile


def test_a_profile_is_found_by_name_and_by_path(tmp_path):
    by_name = load_profile("cpu")
    path = tmp_path / "cpu.yaml"
    path.write_text((LAUNCHERS / "profiles" / "cpu.yaml").read_text())
    assert load_profile(str(path)) == by_name


def test_an_unknown_profile_is_answered_with_the_known_ones_and_where_they_are():
    with pytest.raises(UsageError, match=r"no profile gpus in .*launchers/profiles: choose one of apptainer, cpu, gpu"):
        load_profile("gpus")
    with pytest.raises(UsageError, match=r"there is no profile my/gpu\.yaml"):
        load_profile("my/gpu.yaml")


def test_values_are_taken_as_they_are_written(tmp_path):
    """YAML alone would read 24:00:00 as 86400, which Slurm would take for minutes."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "sbatch: {time: 24:00:00, exclusive: true, overcommit:, mem: 0, no-kill: false, --qos: long}\n"
        'setup: |\n  module load a\n  export B=1\nprefix: run "$c"\n'
    )
    profile = load_profile(str(path))
    assert profile.sbatch == {"time": "24:00:00", "exclusive": "", "overcommit": "", "mem": "0", "qos": "long"}
    assert profile.setup == ["module load a", "export B=1"]
    assert profile.prefix == 'run "$c"'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sbacth: {}", "unknown key sbacth.*keys sbatch, setup, prefix, device"),
        ("- a", "is no mapping"),
        ("sbatch: [a]", "sbatch must be a mapping"),
        ("sbatch: {a: {b: c}}", "sbatch must be a mapping"),
        ("sbatch: {p: gpu}", "long name"),
        ("sbatch: {output: log}", "logs are in RUN/logs"),
        ("sbatch: {ntasks: 4}", "--ranks-per-node"),
        ("sbatch: {gpus-per-node: '$(nproc)'}", "NUMBER or TYPE:NUMBER"),
        ("setup: {a: b}", "setup must be lines"),
        ("prefix: [a]", "prefix must be one line"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_named_with_what_is_wrong(tmp_path, content, said):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=said) as raised:
        load_profile(str(path))
    assert str(path) in str(raised.value)
