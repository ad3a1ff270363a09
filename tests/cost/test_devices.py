"""Profiles of devices: data sheets, and what was measured and kept."""

from dataclasses import replace
from pathlib import Path

import pytest

from cctrain.cost.devices import FOLDER, Measured, known_devices, load_device, save_device
from cctrain.errors import UsageError

H100 = (FOLDER / "h100.yaml").read_text()
WITH = Measured("2026-11-22", "criss_cross, 2 layers, width 64, 2 heads, 8 latents", "fp32", 2)
MEASURED = replace(
    load_device("h100", "fp32"),
    name="a CPU",
    latency=0.0,
    process=1 / 3,
    kind="cpu",
    rehearsed_over_parts=1.7,
    held_over_needed=1.1,
    measured=WITH,
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    save_device(MEASURED, tmp_path / "here.yaml")
    return tmp_path / "here.yaml"


@pytest.mark.parametrize("name", known_devices())
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_profile_is_of_a_device_below_its_peak(name, precision):
    device = load_device(name, precision)
    assert device.attention < device.products < device.peak
    assert device.between < device.inside < device.elementwise
    assert not device.measured


def test_a_device_reaches_the_share_of_its_data_sheet_that_is_said_to_be_attained():
    device = load_device("h100", "bf16")
    assert (device.products, device.attention) == pytest.approx((0.6 * 989e12, 0.35 * 989e12))
    assert (device.inside, device.between) == pytest.approx((0.7 * 450e9, 0.7 * 50e9))
    assert device.elementwise == pytest.approx(0.75 * 3.35e12)
    assert (device.memory, device.process) == (80e9, 2.7e9)
    assert device.parameter_seconds == pytest.approx(90 / device.elementwise)  # bytes
    assert device.target_seconds == pytest.approx(1000 / device.elementwise)


def test_a_profile_of_ones_own_is_a_file_of_the_same_form(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text(H100.replace("name: NVIDIA H100 SXM", "name: ours"))
    assert load_device(str(own), "bf16").name == "ours"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("just text", "is no device"),
        ("name: x", "missing or unknown: .*peak, per_node, process"),
        ("a: [", "is not valid YAML"),
        (H100.replace("bf16:", "fp64:"), "'bf16'"),
        (H100.replace("3.35e+12", "much"), "bandwidth: 'much' is not a number above 0"),
        (H100.replace("3.35e+12", "true"), "bandwidth: True is not"),
        (H100.replace("450.0e+9", "-1"), "inside: -1 is not"),
        (H100.replace("  products: 0.6", "  product: 0.6"), "unknown: attained.product, attained.products"),
    ],
)
def test_a_profile_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str, complaint: str):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(UsageError, match=f"own.yaml.*{complaint}"):
        load_device(str(own), "bf16")


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="a100, h100, h200"):
        load_device("h1000", "bf16")


def test_what_was_measured_is_read_as_it_was_kept_and_says_where_from(kept: Path):
    read = load_device(str(kept), "fp32")
    assert read == MEASURED
    assert isinstance(read.per_node, int)
    assert read.measured is not None
    assert read.measured.file == str(kept)


def test_the_file_says_with_what_it_was_measured(kept: Path):
    told = kept.read_text()
    for line in ("model: criss_cross, 2 layers, width 64, 2 heads, 8 latents", "precision: fp32", "ranks: 2"):
        assert f"  {line}\n" in told


def test_what_was_measured_in_another_precision_is_refused(kept: Path):
    with pytest.raises(UsageError, match=r"here.yaml was measured in fp32, .* training.precision=bf16: measure"):
        load_device(str(kept), "bf16")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("call:", "calls:", "missing or unknown: call, calls; measure it again with --save-device"),
        ("  ranks: 2\n", "", "missing or unknown: measured.ranks"),
        ("  ranks: 2", "  ranks: 2\n  host: a", "missing or unknown: measured.host"),
        ("  ranks: 2", "  ranks: two", "measured.ranks: 'two' is not a number above 0"),
        ("rehearsed_over_parts: 1.7", "rehearsed_over_parts: 0", "rehearsed_over_parts: 0 is not"),
        ("latency: 0.0", "latency: soon", "latency: 'soon' is not"),
        ("kind: cpu", "kind: tpu", "'tpu' is neither cuda nor cpu"),
    ],
)
def test_a_kept_file_that_was_spoilt_is_refused_with_what_is_wrong(kept: Path, before: str, after: str, complaint: str):
    text = kept.read_text()
    assert text.count(before) == 1
    kept.write_text(text.replace(before, after))
    with pytest.raises(UsageError, match=f"here.yaml is no device: .*{complaint}"):
        load_device(str(kept), "fp32")


def test_a_measurement_that_is_no_mapping_is_refused(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("measured: yes")
    with pytest.raises(UsageError, match=r"own\.yaml is no device: these keys are missing or unknown: attention"):
        load_device(str(tmp_path / "own.yaml"), "fp32")


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nowhere/here.yaml cannot be written \(No such file or directory\)"):
        save_device(MEASURED, tmp_path / "nowhere" / "here.yaml")
