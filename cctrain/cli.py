"""The commands. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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

log = logging.getLogger("cctrain")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


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

    _run(work, as_json, debug)


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help=".h5ad files or 10x folders.")],
    out: Annotated[Path, typer.Option(help="The token store to write.")],
    counts: Annotated[
        str | None, typer.Option(help="Matrix of raw counts: X, raw.X, layers/NAME. Default: found.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of cells that training never sees.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Decides the split and the shuffle.")] = 0,
    min_genes: Annotated[int, typer.Option(help="Drop cells with fewer detected genes.")] = 200,
    min_cells: Annotated[int, typer.Option(help="Drop genes seen in fewer training cells.")] = 3,
    max_genes: Annotated[int | None, typer.Option(help="Drop cells with more detected genes.")] = None,
    min_counts: Annotated[int | None, typer.Option(help="Drop cells with fewer counts.")] = None,
    max_counts: Annotated[int | None, typer.Option(help="Drop cells with more counts.")] = None,
    max_mitochondrial: Annotated[
        float | None, typer.Option(help="Drop cells with a larger share of MT- counts.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token store at OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Scan and report; write nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn files of raw counts into a token store: quality control, split, vocabulary, statistics, one shuffle."""

    def work() -> Any:
        from cctrain.data.prepare import prepare
        from cctrain.data.quality import QualityControl

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
        )
        return manifest, "" if dry_run else f"next: cctrain train configs/cell.yaml data.store={out}"

    _run(work, as_json, debug)


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A token store.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash everything.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a token store holds; --verify names every damaged file."""

    def work() -> Any:
        from cctrain.data.inspect import describe, inspect_store

        manifest = inspect_store(store, verify)
        return manifest, describe(store, manifest, verify)

    _run(work, as_json, debug)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cell.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Local processes. Default: one per GPU, or one.", min=1)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration; train nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a run; every KEY of the configuration can be changed on the command line."""

    def work() -> Any:
        from cctrain.config import load_config, to_yaml
        from cctrain.run_directory import claim_run_directory

        loaded = load_config(config, overrides)
        if dry_run:
            return {}, to_yaml(loaded)
        run_dir = Path(loaded.run.dir or "")
        # Every rank asks; the first one writes there only when all have joined, so all get the same answer.
        claim_run_directory(run_dir)
        if "RANK" not in os.environ:
            num_ranks = ranks or _default_ranks()
            if num_ranks > 1:
                from cctrain.launch.local import run_ranks

                arguments = ["train", str(config), *(overrides or []), *(["--debug"] if debug else [])]
                raise SystemExit(run_ranks(arguments, num_ranks, run_dir))
        _log_to_file(run_dir)
        from cctrain.training.train import train

        # A scheduler's SIGTERM ends a run as Ctrl-C does, with a last line in its journal.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        train(loaded)
        return {}, f"next: cctrain evaluate {run_dir}" if _is_first() else ""

    _run(work, False, debug)


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

    _run(work, as_json, debug)


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

    _run(work, as_json, debug)


@app.command()
def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    uri: Annotated[str | None, typer.Option(help="MLflow store or server. Default: the run's own.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment. Default: the run's own.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replay the journals of runs into an MLflow store or server; what it holds already is not sent again."""

    def work() -> Any:
        from cctrain.tracking.projection import sync

        done = sync(runs, uri, experiment)
        return {"runs": done}, "\n".join(
            f"{run}: {entry['uri']}, run {entry['run_id']}" for run, entry in zip(runs, done, strict=True)
        )

    _run(work, as_json, debug)


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

    _run(work, False, debug)


def main() -> None:
    app()


def _run(work: Callable[[], tuple[dict[str, Any], str]], as_json: bool, debug: bool) -> None:
    """Do a command's work: results on standard output, the log on standard error, errors as exit codes."""
    _log_to_terminal()
    try:
        result, text = work()
    except CctrainError as error:
        if debug:
            traceback.print_exc()
        elif _is_first():
            print(f"cctrain: {error}", file=sys.stderr)
        else:
            log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"cctrain: {error.strerror}: {error.filename}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("cctrain: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(result, allow_nan=False))
    elif text:
        print(text)


def _log_to_terminal() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO if _is_first() else logging.WARNING)


def _log_to_file(run_dir: Path) -> None:
    """The first rank's log, beside the terminal; the others' standard error is such a file already."""
    if not _is_first():
        return
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / "logs" / "rank-0000.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _default_ranks() -> int:
    from cctrain.parallel.mesh import find_device_kind

    if find_device_kind() == "cpu":
        return 1
    import torch

    return torch.cuda.device_count()
