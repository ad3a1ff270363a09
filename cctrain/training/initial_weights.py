"""Start a new run from another run's weights, its genes matched by id."""

import logging
from pathlib import Path
from typing import Any

import torch

from cctrain.errors import CheckpointError
from cctrain.model.transformer import Transformer, gene_tables
from cctrain.run_directory import open_run
from cctrain.training.checkpoint_files import run_weights
from cctrain.training.engine import full_shape, whole

log = logging.getLogger(__name__)

CELL_PROJECTION = "embedding.cell.weight"


def start_from(model: Transformer, gene_ids: list[str], source: Path) -> dict[str, Any]:
    """Copy the weights of the run `source` into the model, whose genes are `gene_ids`; returns what was matched.

    A gene that the source does not have keeps its initial vector. A run on groups may start from one on cells, which
    has no projection of their signs, and the other way round. Raises CheckpointError if the shapes of anything else
    differ, or if no gene is found.
    """
    run = open_run(source)
    weights = run_weights(source)
    place = {gene: row for row, gene in enumerate(run.gene_ids)}
    pairs = [(row, place[gene]) for row, gene in enumerate(gene_ids) if gene in place]
    if not pairs:
        raise CheckpointError(
            f"none of the {len(gene_ids):,} genes is in {source}, whose ids look like {run.gene_ids[0]!r} "
            f"({gene_ids[0]!r} here): both stores must name genes in one way"
        )
    rows, source_rows = (torch.tensor(side) for side in zip(*pairs, strict=True))
    parameters, tables = dict(model.named_parameters()), gene_tables(model)
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    if CELL_PROJECTION not in weights:
        shapes.pop(CELL_PROJECTION, None)
    misfits = [
        f"  {name}: {_shape(weights.get(name))} there, {list(shape)} here"
        for name, shape in shapes.items()
        if name not in weights or weights[name].shape[name in tables :] != shape[name in tables :]
    ]
    here = {*parameters, *(name for name, _ in model.named_buffers()), CELL_PROJECTION}
    misfits += [f"  {name}: absent here" for name in weights if name not in here]
    if misfits:
        raise CheckpointError(
            f"the model of {source} has another shape; give this run the same model section:\n" + "\n".join(misfits[:8])
        )
    with torch.no_grad():
        for name in shapes:
            parameter = parameters[name]
            with whole([parameter]):
                if name in tables:
                    parameter[rows] = weights[name][source_rows].to(parameter.dtype)
                else:
                    parameter.copy_(weights[name])
    log.info(
        "weights from %s: %s of %s genes found by id, the others keep their initial vectors",
        source,
        f"{len(pairs):,}",
        f"{len(gene_ids):,}",
    )
    return {"init_from": str(source), "init_genes_matched": len(pairs)}


def _shape(tensor: torch.Tensor | None) -> list[int] | str:
    return "absent" if tensor is None else list(tensor.shape)
