"""The whole life of a run through the command line, and every kind of bad input: exit code and message."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file

from cctrain.apply.predict import load_model
from cctrain.cli import app
from cctrain.config import load_config, to_yaml
from cctrain.data.store.store import open_store
from cctrain.run_directory import open_run, write_vocabulary
from cctrain.tracking.journal import Journal, read_journal
from cctrain.training.data import resolve
from cctrain.training.guards import read_outcome, write_outcome
from tests.commands import cctrain, refusal
from tests.data.conftest import gene_ids, write_10x, write_h5ad

CELL_YAML = Path(__file__).parents[1] / "configs" / "cell.yaml"
COMMANDS = sorted(typer.main.get_command(app).commands)
HEAVY = ("torch", "deepspeed", "mlflow", "anndata", "zarr", "scipy", "sklearn", "pandas", "matplotlib")
SMALL = (
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "model.latents=4",
    "data.global_batch=8",
    "training.steps=6",
    "training.warmup=2",
    "evaluation.every=3",
    "evaluation.draws=2",
)
STEP_KEYS = {
    *("event", "attempt", "step", "loss", "learning_rate", "grad_norm", "tokens", "contexts", "targets"),
    *("step_seconds", "data_seconds", "samples", "accumulation", "utilisation"),
    *("memory/bytes", "memory/peak_bytes"),
    *("cost/n", "cost/M", "cost/attention_flops", "cost/total_flops"),
}
KEYS_OF_SEVERAL_RANKS = {"communication_seconds", "imbalance_seconds", "cost/sent_bytes"}
SYSTEM_KEYS = {f"system/node-0/{name}" for name in ("cpu_percent", "memory_bytes", "network_bytes_per_second")}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Lab:
    """A folder with cells, a store and two runs, made by the command line alone."""

    folder: Path
    counts: np.ndarray

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "cell"

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.folder / 'tracking' / 'mlflow.db'}"


def process(folder: Path, *arguments: str) -> Done:
    """`python -m cctrain ARGUMENTS` in a process of its own, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "cctrain", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def succeed(folder: Path, *arguments: str) -> Done:
    done = process(folder, *arguments)
    assert done.code == 0, f"cctrain {' '.join(arguments)}\n{done.err}"
    return done


def two_types(num_cells: int = 36, num_genes: int = 150, seed: int = 3) -> np.ndarray:
    """int64 (cells, genes) of two types of cells, some hundred times deeper than others."""
    draws = np.random.default_rng(seed)
    rates = draws.gamma(0.8, size=num_genes) * np.exp(draws.normal(0.0, 1.0, size=(2, num_genes)))
    rates /= rates.sum(axis=1, keepdims=True)
    counts = draws.poisson(np.geomspace(30, 3000, num_cells)[:, None] * rates[np.arange(num_cells) % 2])
    counts[:, 0] += 1
    return counts


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(folder, two_types())
    write_h5ad(folder / "cells.h5ad", lab.counts)
    options = ("--min-genes=5", "--min-cells=1", "--json")
    prepared = cctrain("prepare", folder / "cells.h5ad", f"--out={folder / 'mine'}", *options)
    assert json.loads(prepared.stdout)["num_cells"] == 36
    return lab


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Lab:
    overrides = ("data.store=mine", *SMALL, "training.precision=fp32", f"tracking.uri={lab.tracking}")
    done = succeed(lab.folder, "train", str(CELL_YAML), *overrides)
    assert done.out == "next: cctrain evaluate runs/cell\n", "DeepSpeed or another speaks on standard output"
    return lab


def steps_of(run: Path) -> list[dict]:
    return [line for line in read_journal(run) if line["event"] == "step"]


# ---- help


def test_help_imports_nothing_heavy_and_every_command_has_its_own(tmp_path):
    script = (
        "import sys\nfrom cctrain.cli import app\n"
        f"for command in {['', *COMMANDS]!r}:\n"
        "    try:\n        app([part for part in (command, '--help') if part])\n"
        "    except SystemExit as ended:\n        assert ended.code == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    for command in COMMANDS:
        assert f" {command} " in done.stdout


# ---- a life


@pytest.mark.slow
@pytest.mark.representative
def test_a_run_leaves_a_journal_with_every_key_and_weights_that_load(trained):
    lines = read_journal(trained.run)
    look_and_train = ["evaluate", "step", "step", "step"]
    last = ["evaluate", "checkpoint", "stop"]
    assert [line["event"] for line in lines] == ["start", *look_and_train, *look_and_train, *last]
    assert lines[-1]["status"] == "finished"
    assert (trained.run / lines[-2]["path"] / "manifest.json").is_file()
    assert (trained.run / "outcome").read_text() == "finished\n"
    assert not (trained.run / "lock").exists()
    store = open_store(trained.folder / "mine")
    for number, line in enumerate(steps_of(trained.run), start=1):
        assert line.keys() >= STEP_KEYS
        assert not line.keys() & {*KEYS_OF_SEVERAL_RANKS, "checkpoint_seconds"}
        assert line["step"] == number
        assert all(line[key] > 0 for key in STEP_KEYS - {"data_seconds", "event", "samples"})
        assert line["contexts"] <= 8
        assert len(line["samples"]) == 64
    assert steps_of(trained.run)[0].keys() >= SYSTEM_KEYS
    assert sum(line["contexts"] for line in steps_of(trained.run)) <= 6 * 8
    run = open_run(trained.run)
    weights = load_file(run.path / "weights.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    run.config.model.backend = "flash_cuda"  # what trained a run need not be there when it is used
    model = load_model(run)
    assert {layer.backend for layer in model.layers} == {"auto"}
    assert sum(p.numel() for p in model.parameters()) + 2 * len(store.genes.ids) == sum(
        a.size for a in weights.values()
    )
    readable = (run.path / "config.yaml").stat().st_mode
    assert (run.path / "weights.safetensors").stat().st_mode == readable
    assert run.gene_ids == store.genes.ids.tolist()
    assert run.config.data.digest == store.digest
    assert (trained.run / "logs" / "rank-0000.log").read_text().strip()


@pytest.mark.slow
@pytest.mark.representative
def test_evaluate_prints_one_json_object_and_mlflow_holds_the_run_with_all_its_steps(trained):
    from mlflow import MlflowClient

    result = json.loads(cctrain("evaluate", trained.run, "--json").stdout)
    assert {row["name"] for row in result["rows"]} >= {"model", "gene mean (negative binomial)"}
    assert result["sentence"].startswith("On ")

    client = MlflowClient(trained.tracking)
    experiment = client.get_experiment_by_name("cctrain")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "16"
    assert run.data.params["training.steps"] == "6"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {
        line["step"]: line["loss"] for line in steps_of(trained.run)
    }
    assert len(history) == 6
    assert {m.step for m in client.get_metric_history(run.info.run_id, "validation/difference")} == {0, 3, 6}
    assert json.loads((trained.run / "mlflow.json").read_text())["run_id"] == run.info.run_id

    synced = json.loads(cctrain("sync", trained.run, "--json").stdout)
    assert synced["runs"][0]["run_id"] == run.info.run_id
    artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id, "evaluation")}
    assert artifacts == {"evaluation/figure.png", "evaluation/metrics.json", "evaluation/table.md"}
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 6


@pytest.mark.slow
@pytest.mark.representative
def test_embed_writes_a_vector_for_every_cell_in_the_order_of_the_input(trained):
    out = trained.folder / "embedded.h5ad"
    done = cctrain("embed", trained.run, trained.folder / "cells.h5ad", f"--out={out}", "--json")
    assert json.loads(done.stdout)["cells"] == 36
    written = anndata.read_h5ad(out)
    given = anndata.read_h5ad(trained.folder / "cells.h5ad")
    assert written.obs_names.tolist() == given.obs_names.tolist()
    assert (written.X != given.X).nnz == 0
    assert written.obsm["X_cctrain"].shape == (36, 16)
    assert np.isfinite(written.obsm["X_cctrain"]).all()


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_write_their_logs_and_the_losses_of_one(trained):
    overrides = ("data.store=mine", *SMALL, "training.precision=fp32", "run.dir=runs/two")
    succeed(trained.folder, "train", str(CELL_YAML), *overrides, "--ranks=2")
    assert (trained.folder / "runs" / "two" / "logs" / "rank-0000.log").is_file()
    assert (trained.folder / "runs" / "two" / "logs" / "rank-0001.log").is_file()
    one, two = steps_of(trained.run), steps_of(trained.folder / "runs" / "two")
    assert [line["samples"] for line in two] == [line["samples"] for line in one]
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
    assert all(line.keys() >= STEP_KEYS | KEYS_OF_SEVERAL_RANKS for line in two)
    assert all(line["cost/sent_bytes"] > 0 < line["communication_seconds"] for line in two)
    assert (trained.folder / "runs" / "mlflow.db").is_file()  # the default, beside the run


@pytest.mark.slow
def test_the_configuration_for_a_laboratory_needs_nothing_but_a_store(lab, tmp_path):
    shutil.copytree(lab.folder / "mine", tmp_path / "mine")
    done = succeed(tmp_path, "train", str(CELL_YAML), "data.store=mine", *SMALL)
    assert done.out == "next: cctrain evaluate runs/cell\n"
    [start, *_] = read_journal(tmp_path / "runs" / "cell")
    assert start["precision"] == "bf16"
    assert len(steps_of(tmp_path / "runs" / "cell")) == 6
    assert succeed(tmp_path, "evaluate", "runs/cell").out.startswith("On ")


# ---- bad input


@pytest.fixture
def train_arguments(lab: Lab, tmp_path: Path) -> tuple[str, ...]:
    return ("train", str(CELL_YAML), f"data.store={lab.folder / 'mine'}", f"run.dir={tmp_path / 'run'}", *SMALL)


def test_a_misspelt_key_is_named_with_the_right_one(train_arguments):
    message = refusal(2, *train_arguments, "training.learningrate=1e-3")
    assert "training.learningrate" in message
    assert "did you mean training.learning_rate?" in message


def test_a_value_of_the_wrong_type_is_refused(train_arguments):
    assert "training.steps" in refusal(2, *train_arguments, "training.steps=many")


def test_a_missing_configuration_file_is_named(tmp_path):
    assert "no configuration file" in refusal(2, "train", tmp_path / "no.yaml")


def test_a_training_without_a_store_says_which_key_is_missing(tmp_path):
    assert "data.store" in refusal(2, "train", CELL_YAML, f"run.dir={tmp_path / 'run'}")


def test_a_store_that_is_not_there_is_named(train_arguments, tmp_path):
    message = refusal(3, *train_arguments, f"data.store={tmp_path / 'nowhere'}")
    assert "nowhere" in message
    assert "cctrain prepare" in message


def test_a_store_that_was_cut_short_is_refused(train_arguments, lab, tmp_path):
    shutil.copytree(lab.folder / "mine", tmp_path / "cut")
    files = [file for file in (tmp_path / "cut" / "cells.zarr").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    message = refusal(3, *train_arguments, f"data.store={tmp_path / 'cut'}")
    assert str(largest) in message
    assert "cut short" in message


def test_another_store_than_the_digest_names_is_refused(train_arguments):
    message = refusal(3, *train_arguments, "data.digest=feed")
    assert "feed" in message
    assert "another store" in message


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("memory.offload_dir={tmp_path}/nowhere", "nowhere is not a folder that can be written to"),
        ("data.micro_batch_tokens=1000000000000", "memory.offload=disk needs up to"),
    ],
)
def test_activations_that_will_find_no_room_on_disk_are_refused_before_a_step(train_arguments, tmp_path, change, shown):
    offloaded = ("memory.checkpointing=true", "memory.offload=disk", f"memory.offload_dir={tmp_path}")
    assert shown in refusal(2, *train_arguments, *offloaded, change.format(tmp_path=tmp_path))


def begun_run(folder: Path, arguments: tuple[str, ...]) -> Path:
    """What a training leaves behind that was killed at its first step."""
    _, config, *overrides = arguments
    loaded = load_config(Path(config), list(overrides))
    store = open_store(Path(loaded.data.store))
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(resolve(loaded, store)))
    write_vocabulary(folder, store.genes.ids.tolist(), store.genes.names.tolist())
    journal = Journal(folder)
    journal.write("start", 0, run="first")
    journal.close()
    return folder


def test_a_run_of_another_configuration_is_not_continued_and_the_differences_are_listed(train_arguments, tmp_path):
    run = begun_run(tmp_path / "run", train_arguments)
    kept = (run / "config.yaml").read_bytes()
    changes = ("model.depth=3", "run.seed=7", "training.steps=9", "checkpoint.every=4")
    message = refusal(2, *train_arguments, *changes)
    assert [line.strip() for line in message.splitlines() if " → " in line] == ["run.seed: 0 → 7", "model.depth: 2 → 3"]
    assert "run.dir=DIR" in message
    assert (run / "config.yaml").read_bytes() == kept
    assert (run / "outcome").read_text() == "failed\n"
    assert "training.steps: 6 → 9" in refusal(2, *train_arguments, *changes[2:])


@pytest.mark.parametrize(("override", "code"), [("training.steps=9", 2), ("data.digest=feed", 3)])
def test_a_refused_start_leaves_the_outcome_of_the_attempt_before(train_arguments, tmp_path, override, code):
    run = begun_run(tmp_path / "run", train_arguments)
    write_outcome(run, "finished")
    refusal(code, *train_arguments, override)
    assert read_outcome(run) == "finished"


def test_another_store_under_the_same_run_is_refused(train_arguments, tmp_path):
    begun_run(tmp_path / "run", train_arguments)
    write_h5ad(tmp_path / "other.h5ad", two_types(seed=4))
    cctrain("prepare", tmp_path / "other.h5ad", f"--out={tmp_path / 'other'}", "--min-genes=5", "--min-cells=1")
    assert "  data.digest: " in refusal(2, *train_arguments, f"data.store={tmp_path / 'other'}")


def test_fp16_on_a_cpu_is_refused(train_arguments):
    assert "training.precision=fp16 needs a GPU" in refusal(2, *train_arguments, "training.precision=fp16")


def test_a_context_that_is_too_long_is_refused_before_the_run_directory_is_taken(train_arguments, tmp_path):
    message = refusal(2, *train_arguments, "data.micro_batch_tokens=50")
    assert "data.micro_batch_tokens=50" in message
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(("value", "shown"), [(-1.0, "-1"), (0.5, "0.5")])
def test_values_that_are_no_counts_are_refused_with_their_cell_and_gene(tmp_path, value, shown):
    counts = two_types().astype(np.float64)
    counts[7, 11] = value
    write_h5ad(tmp_path / "bad.h5ad", counts)
    message = refusal(3, "prepare", tmp_path / "bad.h5ad", "--out", tmp_path / "store", "--counts=X")
    assert shown in message
    assert "cell7" in message
    assert gene_ids(12)[11] in message
    assert not (tmp_path / "store").exists()


def test_columns_with_the_same_gene_are_added_and_reported(tmp_path):
    genes = gene_ids(150)
    genes[5] = genes[4]
    write_h5ad(tmp_path / "twice.h5ad", two_types(), genes=genes)
    done = cctrain("prepare", tmp_path / "twice.h5ad", f"--out={tmp_path / 'store'}", "--min-genes=5", "--json")
    assert "1 columns with the id of another gene were added to it" in done.stderr
    assert json.loads(done.stdout)["sources"][0]["num_duplicate_genes"] == 1


def test_quality_control_that_leaves_no_cell_says_which_rule_it_was(lab, tmp_path):
    message = refusal(3, "prepare", lab.folder / "cells.h5ad", f"--out={tmp_path / 'store'}", "--min-genes=1000")
    assert "No cell passes quality control" in message
    assert "min_genes" in message


def test_evaluate_needs_a_run(tmp_path):
    assert "is not a run directory" in refusal(2, "evaluate", tmp_path)


@pytest.mark.parametrize("command", ["evaluate", "embed"])
def test_a_run_that_has_not_saved_yet_has_no_weights(lab, train_arguments, tmp_path, command):
    run = begun_run(tmp_path / "run", train_arguments)
    arguments = [lab.folder / "cells.h5ad", f"--out={tmp_path / 'out.h5ad'}"] if command == "embed" else []
    assert "no weights yet: neither weights.safetensors nor a checkpoint" in refusal(4, command, run, *arguments)


@pytest.mark.parametrize("command", ["evaluate", "embed"])
def test_damaged_weights_are_refused(lab, train_arguments, tmp_path, command):
    run = begun_run(tmp_path / "run", train_arguments)
    (run / "weights.safetensors").write_bytes(b"\x10" + b"\x00" * 40)
    arguments = [lab.folder / "cells.h5ad", f"--out={tmp_path / 'out.h5ad'}"] if command == "embed" else []
    assert "weights.safetensors" in refusal(4, command, run, *arguments)


@pytest.mark.slow
@pytest.mark.representative
def test_embedding_a_file_of_other_genes_says_what_both_look_like(trained, tmp_path):
    source = write_10x(tmp_path / "mouse", two_types(5), genes=[f"ENSMUSG{i:011d}" for i in range(150)])
    message = refusal(3, "embed", trained.run, source, f"--out={tmp_path / 'out.h5ad'}")
    assert "none of its 150 genes" in message
    assert "ENSMUSG" in message
    assert not (tmp_path / "out.h5ad").exists()


def test_debug_shows_a_traceback_and_keeps_the_exit_code(tmp_path):
    plain, debug = (cctrain("train", tmp_path / "no.yaml", *more, code=2).stderr for more in ([], ["--debug"]))
    assert "Traceback" not in plain
    assert "Traceback" in debug
    assert "no configuration file" in plain
    assert "no configuration file" in debug
