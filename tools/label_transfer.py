"""Do the embeddings know cell types they were never shown? Label transfer on held-out cells, beside PCA.

    python -m tools.label_transfer RUN --label cell_type --out tools/results/label_transfer

Every cell of the run's store is embedded with nothing hidden. 15 nearest training cells vote on the label of
each held-out cell; the score is balanced accuracy over types. PCA of log-normalised counts, fitted on training
cells, with as many dimensions, is judged in the same way. Writes OUT.json and a picture of both UMAPs, OUT.png
(needs `tools/setup.sh --extra figures`).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import scipy.sparse as sp

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from cctrain.apply.predict import embed_contexts, load_model
from cctrain.data.loading.contexts import Context, ContextRule, build_context, nothing_hidden
from cctrain.data.store.store import TokenStore, open_store
from cctrain.model.transformer import Transformer
from cctrain.run_directory import open_run
from tools.record import add_out, circumstances, keep

NEIGHBOURS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--label", default="cell_type", help="column of obs")
    add_out(parser, "path of a JSON file and a PNG, without their endings", required=True)
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    store = open_store(Path(run.config.data.store), run.config.data.digest)
    labels = store.obs()[arguments.label].astype(str).to_numpy()
    most = run.config.data.max_tokens or len(store.genes.ids)
    rule = nothing_hidden(store.genes.share, most, run.config.model.cell_encoding or 0)
    vectors = {"criss-cross": embed_store(load_model(run), rule, store)}
    vectors["PCA"] = principal_components(store, vectors["criss-cross"].shape[1])
    scores = {name: transfer(places, labels, store.num_train) for name, places in vectors.items()}
    result = {
        "question": "balanced accuracy of labels of held-out cells, by 15 nearest training cells",
        **circumstances("torch", "scikit-learn"),
        "store_digest": store.digest,
        "training_cells": store.num_train,
        "held_out_cells": store.num_cells - store.num_train,
        "types": len(np.unique(labels)),
        "types_held_out": len(np.unique(labels[store.num_train :])),
        "dimensions": vectors["PCA"].shape[1],
        "balanced_accuracy": scores,
    }
    keep(result, arguments.out.with_suffix(".json"))
    draw(vectors, labels, scores, arguments.out.with_suffix(".png"))
    print(json.dumps(result))


def embed_store(model: Transformer, rule: ContextRule, store: TokenStore) -> np.ndarray:
    """float32 (num_cells, width of the embedding)."""

    def contexts() -> Iterator[Context]:
        for row in range(store.num_cells):
            cell = store.cells(np.array([row]))
            measured = store.measured[store.source_of_cell[row]]
            yield build_context(rule, 0, 0, cell.genes, cell.counts, measured)

    return embed_contexts(model, contexts())


def principal_components(store: TokenStore, dimensions: int) -> np.ndarray:
    cells = store.cells(np.arange(store.num_cells))
    counts = sp.csr_matrix((cells.counts, cells.genes, cells.offsets), shape=(store.num_cells, len(store.genes.ids)))
    totals = np.asarray(counts.sum(axis=1)).ravel()
    logs = np.log1p(counts.toarray() * (np.median(totals[: store.num_train]) / np.maximum(totals, 1))[:, None])
    return PCA(dimensions, random_state=0).fit(logs[: store.num_train]).transform(logs)


def transfer(places: np.ndarray, labels: np.ndarray, num_train: int) -> float:
    """Balanced accuracy on the cells from `num_train` on; places (num_cells, dimensions), labels str (num_cells,)."""
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(places[:num_train], labels[:num_train])
    return float(balanced_accuracy_score(labels[num_train:], classifier.predict(places[num_train:])))


def draw(vectors: dict[str, np.ndarray], labels: np.ndarray, scores: dict[str, float], out: Path) -> None:
    import umap

    types = np.unique(labels)
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, len(types)))
    figure, axes = plt.subplots(1, len(vectors), figsize=(12, 5.2), layout="constrained")
    for ax, (name, places) in zip(axes, vectors.items(), strict=True):
        plane = umap.UMAP(n_neighbors=NEIGHBOURS, random_state=0).fit_transform(places)
        for kind, colour in zip(types, colours, strict=True):
            chosen = labels == kind
            ax.scatter(plane[chosen, 0], plane[chosen, 1], s=9, color=colour, label=kind, linewidths=0)
        ax.set_title(f"{name}, {places.shape[1]} dimensions: balanced accuracy {scores[name]:.2f} on held-out cells")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, markerscale=2)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
