"""The commands. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cctrain.command import is_first, log_to_file, make_log_folder, run_command
from cctrain.errors import CctrainError

app = typer.Typer(
    name="cctrain",
    help="Train criss-cross transformers on whole cells: attention that costs n·M.\n\n"
    "Files of cells become a token store (prepare), a store and a configuration become a run (train), "
    "and a run becomes held-out metrics (evaluate), embeddings (embed) and charts (ui).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cell.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="pbmc3k or retina.")],
    out: Annotated[Path | None, typer.Option(help="Where to put it. Default: data/NAME.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a small public data set from the package index, checked against a pinned SHA-256."""

    def work() -> Any:
        from cctrain.data.fetch import fetch

        path = fetch(name, out or Path("data") / name)
        return {
            "name": name,
            "path": str(path),
        }, f"{path}\nnext: cctrain prepare {path} --out data/{name}-store"

    run_command(work, as_json, debug)


@app.command()
def prepare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help=".h5ad, AnnData Zarr, 10x .h5 or 10x folders.")
    ],
    out: Annotated[Path, typer.Option(help="The token store to write.")],
    counts: Annotated[
        str | None, typer.Option(help="Matrix of raw counts: X, raw.X, layers/NAME. Default: found.")
    ] = None,
    container: Annotated[str, typer.Option("--format", help="Form of the shards: zarr or webdataset.")] = "zarr",
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Keep cells with one value of this obs column together.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of cells (groups, values) that training never sees.")] = 0.1,
    split_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Hold out whole values of this obs column, such as donors.")
    ] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(metavar="VALUE", help="With --split-by: hold out this value; repeat for more.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the split and the shuffle.")] = 0,
    vocabulary: Annotated[
        Path | None,
        typer.Option(metavar="FILE|STORE", help="Exactly these genes: one id a line, or those of another store."),
    ] = None,
    min_matched: Annotated[
        float, typer.Option(help="Smallest share of a given vocabulary's genes, and of counts, that a source matches.")
    ] = 0.2,
    min_genes: Annotated[int, typer.Option(help="Drop cells with fewer detected genes.")] = 200,
    min_cells: Annotated[int, typer.Option(help="Drop genes seen in fewer training cells.")] = 3,
    max_genes: Annotated[int | None, typer.Option(help="Drop cells with more detected genes.")] = None,
    min_counts: Annotated[int | None, typer.Option(help="Drop cells with fewer counts.")] = None,
    max_counts: Annotated[int | None, typer.Option(help="Drop cells with more counts.")] = None,
    max_mitochondrial: Annotated[
        float | None, typer.Option(help="Drop cells with a larger share of MT- counts.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one per core, at most 4.", min=1)] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Prepare the other sources if one fails; the exit code is 3 then.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token store at OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Scan and report; write nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn files of raw counts into a token store: quality control, split, vocabulary, statistics, one shuffle.

    Memory is bounded, whatever the size. Killed, it leaves no OUT; the same command then continues.
    """
    failed: list[dict[str, str]] = []

    def work() -> Any:
        from cctrain.data.prepare.prepare import prepare
        from cctrain.data.prepare.quality import QualityControl
        from cctrain.data.prepare.tasks import default_workers

        quality = QualityControl(min_genes, min_cells, max_genes, min_counts, max_counts, max_mitochondrial)
        manifest = prepare(
            sources,
            out,
            quality=quality,
            held_out=held_out,
            seed=seed,
            counts=counts,
            overwrite=overwrite,
            dry_run=dry_run,
            container=container,
            group_by=group_by,
            split_by=split_by,
            hold_out=hold_out or [],
            vocabulary=vocabulary,
            min_matched=min_matched,
            workers=workers or default_workers(),
            keep_going=keep_going,
        )
        failed.extend(manifest["failed"])
        return manifest, "" if dry_run else f"next: cctrain train configs/cell.yaml data.store={out}"

    run_command(work, as_json, debug)
    if failed:
        from cctrain.errors import DataError

        named = "\n".join(entry["error"] for entry in failed)
        print(
            f"cctrain: {len(failed)} of {len(sources)} sources failed, and are not in the store:\n{named}",
            file=sys.stderr,
        )
        raise SystemExit(DataError.exit_code)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A token store, a run directory or a checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash everything.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a token store, a run or a checkpoint holds; --verify names every damaged file."""

    def work() -> Any:
        from cctrain.apply.inspect import inspect

        return inspect(path, verify)

    run_command(work, as_json, debug)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(help="Local processes. Default: one per GPU, or parallel.context.", min=1)
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with other steps, learning rate or precision than before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration; train nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a run, or resume it if its run directory holds a checkpoint.

    Every KEY of the configuration can be changed on the command line. Ctrl-C saves a checkpoint and leaves; so do
    SIGTERM, SIGUSR1 and a file `stop` in the run directory. A file `save` there saves and goes on. The same command
    resumes, on as many ranks as there are then.
    """

    def work() -> Any:
        from cctrain.config import load_config, to_yaml

        loaded = load_config(config, overrides)
        if dry_run:
            return {}, to_yaml(loaded)
        run_dir = Path(loaded.run.dir or "")
        make_log_folder(run_dir)
        if "RANK" not in os.environ:
            from cctrain.launch.local import default_ranks, run_ranks

            num_ranks = ranks or max(default_ranks(), loaded.parallel.context)
            if num_ranks > 1:
                options = [*(["--accept-changes"] if accept_changes else []), *(["--debug"] if debug else [])]
                arguments = ["train", str(config), *(overrides or []), *options]
                raise SystemExit(run_ranks(arguments, num_ranks, run_dir))
        log_to_file(run_dir)
        from cctrain.training.guards import read_outcome
        from cctrain.training.train import train

        exit_code = train(loaded, accept_changes)
        if not is_first():
            pass
        elif read_outcome(run_dir) == "finished":
            print(f"next: cctrain evaluate {run_dir}")
        else:
            print(f"saved. To resume: cctrain train {run_dir / 'config.yaml'}", file=sys.stderr)
        raise SystemExit(exit_code)

    run_command(work, False, debug)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    profile: Annotated[str, typer.Option(help="A name in launchers/profiles, or a YAML file.")] = "gpu",
    nodes: Annotated[str | None, typer.Option(help="Nodes: N, or MIN-MAX for as many as are free.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node, one rank for each.", min=1)] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of each node without GPUs.", min=1)] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of a job: minutes, HH:MM:SS, D-HH:MM:SS.")] = None,
    chain: Annotated[
        int, typer.Option(help="Submit N jobs that follow each other, where requeueing is forbidden.", min=0)
    ] = 0,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with other steps, learning rate or precision than before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the batch script; write and submit nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a run on Slurm, or resume it; the job goes on after preemption, node failure and its time limit.

    What clusters differ in stands in a profile (launchers/README.md). Configuration, commit and the difference of the
    working tree are kept in the run directory, with the batch script, which can also be edited and submitted by hand.
    """

    def work() -> Any:
        from cctrain.launch.script import Request
        from cctrain.launch.submit import submit

        request = Request(nodes, gpus_per_node, ranks_per_node, time, chain)
        result = submit(
            config,
            overrides or [],
            profile,
            request,
            accept_changes=accept_changes,
            dry_run=dry_run,
            command=["cctrain", *sys.argv[1:]],
        )
        if dry_run:
            return result, result["text"].rstrip("\n")
        jobs = ", ".join(result["jobs"])
        return result, f"submitted: job {jobs}, {result['script']}\nnext: cctrain jobs {result['run']}"

    run_command(work, as_json, debug)


@app.command()
def jobs(
    run: Run,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the jobs; the ranks save first.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Show the ends of the newest logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what Slurm is doing with a run, and how far it is."""

    def work() -> Any:
        from cctrain.launch.jobs import cancel_jobs, describe_jobs, show_jobs, tail_logs

        if cancel:
            return cancel_jobs(run)
        if logs:
            return tail_logs(run)
        found = describe_jobs(run)
        return found, show_jobs(found)

    run_command(work, as_json, debug)


@app.command()
def evaluate(
    run: Run,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a run with baselines on held-out cells: a sentence, a table, a picture."""

    def work() -> Any:
        from cctrain.apply.evaluate import evaluate, table

        result = evaluate(run)
        return (
            result,
            f"{result['sentence']}\n\n{table(result)}\n\npicture: {run / 'evaluation' / 'figure.png'}",
        )

    run_command(work, as_json, debug)


@app.command()
def embed(
    run: Run,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An .h5ad file or a 10x folder of raw counts.")],
    out: Annotated[Path, typer.Option(help="The .h5ad file to write.")],
    counts: Annotated[
        str | None, typer.Option(help="Matrix of raw counts: X, raw.X, layers/NAME. Default: found.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a copy of SOURCE with obsm['X_cctrain'], one vector for every cell, in the input's order."""

    def work() -> Any:
        from cctrain.apply.embed import embed

        result = embed(run, source, out, counts)
        return {
            **result,
            "path": str(out),
        }, f"{out}: {result['cells']:,} cells × {result['dimensions']} in obsm['X_cctrain']"

    run_command(work, as_json, debug)


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(help="Devices in all. Default: those of this machine or FILE, or 1.", min=1)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="h100, h200, a100, or a YAML file: like theirs, or of --save-device. Default: this machine.",
        ),
    ] = None,
    save_device: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is measured here, for --device FILE, here or elsewhere."),
    ] = None,
    token_budget: Annotated[
        float | None, typer.Option(metavar="N", help="Tokens to train on, such as 10e9: tell steps and hours of it.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a context, where there is no store yet.", min=1)] = None,
    genes: Annotated[int, typer.Option(help="With --tokens: genes of the vocabulary.", min=1)] = 20_000,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a training will need, before it is spent: memory, FLOPs, traffic, time.

    On this machine it measures the parts of a step and rehearses a few, for up to a minute; --save-device keeps that.
    Of other devices it is a model.
    """

    def work() -> Any:
        from cctrain.apply.estimate import estimate_configuration
        from cctrain.cost.estimate import as_json, as_text, check_budget

        check_budget(token_budget)
        found = estimate_configuration(config, overrides or [], ranks, device, tokens, genes, save_device)
        return as_json(found, token_budget), as_text(found, token_budget)

    run_command(work, as_json, debug)


@app.command()
def scaling(
    config: ConfigFile,
    overrides: Overrides = None,
    lengths: Annotated[str | None, typer.Option(metavar="N,N", help="Tokens n. CPU: 1024 to 65536.")] = None,
    latents: Annotated[str | None, typer.Option(metavar="M,M", help="Default: 32,64,128,256.")] = None,
    context: Annotated[str | None, typer.Option(metavar="C,C", help="Context ranks, such as 1,2.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: RUN.DIR-scaling.")] = None,
    budget: Annotated[float | None, typer.Option(help="Leave out points predicted to take more seconds.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often all points are measured. Default: 3.", min=1)] = None,
    repeats: Annotated[int | None, typer.Option(help="Most repeats of a point in a round. Default: 3.", min=1)] = None,
    genes: Annotated[int | None, typer.Option(help="Rows of the gene table. Default: 2000.", min=1)] = None,
    fit_from: Annotated[int | None, typer.Option(help="Shortest n in exponents. Default: 4096.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the points, time and memory; measure none.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the cost law: time and memory over n × M and of dense controls, on random contexts; fit, draw, track.

    No token store is needed. Every point is kept when it is measured: the same command goes on where it was stopped.
    """

    def work() -> Any:
        from cctrain.apply.scaling.command import Grid, scaling

        grid = Grid(lengths, latents, context)
        return scaling(config, overrides, grid, out, budget, rounds, repeats, genes, fit_from, dry_run)

    run_command(work, as_json, debug)


@app.command()
def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    uri: Annotated[str | None, typer.Option(help="MLflow store or server. Default: the run's own.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment. Default: the run's own.")] = None,
    every_step: Annotated[
        bool, typer.Option("--all", help="Every step, also of runs of more than 6,000, of which charts need fewer.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replay the journals of runs into an MLflow store or server; what it holds already is not sent again.

    Of a long run it sends the last 1,000 steps and at most 5,000 of those before, evenly chosen.
    """

    def work() -> Any:
        from cctrain.tracking.projection import sync

        done = sync(runs, uri, experiment, every_step)
        return {"runs": done}, "\n".join(
            f"{run}: {entry['uri']}, run {entry['run_id']}" for run, entry in zip(runs, done, strict=True)
        )

    run_command(work, as_json, debug)


@app.command()
def ui(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run directory. Default: the newest in runs/.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="Another MLflow store or server.")] = None,
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1. Default: 5000, or a free one.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    debug: Debug = False,
) -> None:
    """Serve the MLflow UI on this machine and open the run's own chart page."""

    def work() -> Any:
        from cctrain.tracking.ui import serve

        serve(run, uri=uri, port=port, open_browser=browser)
        return {}, ""

    run_command(work, False, debug)


def main() -> None:
    from cctrain.launch.step import adopt_step

    try:
        adopt_step()
    except CctrainError as error:
        print(f"cctrain: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    app()
