"""What a run's page says in words, as Markdown: what was trained, how far it came, and how to read its charts.

Pure functions of the journal's lines and of the configuration. A description that a person has edited is kept: the last
line, which says so, tells cctrain's own from theirs.
"""

from collections.abc import Iterator

from cctrain.tracking.content import EVALUATE_GROUP, metrics_of
from cctrain.tracking.journal import last_attempt
from cctrain.tracking.restarts import Line, how_it_ended, restarts

_MAX_RESTARTS = 10
_WAY_TO_KEEP = "edit it and remove this line, and it stays as you left it.*"
_MEANINGS = {
    "train": "each step's `loss`, in nats a target: the negative log-likelihood of counts that the model did not see. "
    "`grad_norm` is before clipping; `tokens`, `targets` and `contexts` are what the step consumed",
    "validation": "the same on held-out cells, whose targets never change: `nll` of the model, `gene_mean_nll` of the "
    "baseline that knows only each gene's mean, and their `difference`. Below 0, the model has learned from the cell",
    "speed": "`step_seconds`, of which `data_seconds` went into waiting for data, of several ranks "
    "`communication_seconds` into collectives, and on one of them `imbalance_seconds` into waiting for the others; and "
    "what follows per second. "
    "`utilisation` is the share of what the devices could have computed; `packing_efficiency` is 1 where all ranks "
    "have as many tokens in each micro-batch; `checkpoint_seconds` is how long training had stood still for a save "
    "before the step, beside its `step_seconds`; `attempt` steps up at each restart",
    "cost": "by the closed form, not measured: `n` is the mean number of tokens of a context, `M` the number of "
    "latents and `n_times_M` their product, with which attention grows; FLOPs of a step's matrix products in attention "
    "and in all (the optimizer's elementwise ones are in neither), and `attention_share`, the one over the other; "
    "`sent_bytes` of a rank, over the network",
    "memory": "of the rank that holds the most: `bytes` now, `peak_bytes` at most so far",
    "system": "of each node, on the tab *System metrics*: processors, memory, network, GPUs",
}


def description_of(lines: list[Line], counted: list[Line], parameters: dict[str, str]) -> str:
    """Of the whole journal, its history, and the flat configuration, which may be empty."""
    start = next((line for line in reversed(lines) if line["event"] == "start"), {})
    paragraphs = [
        *_what_was_trained(parameters, start),
        *_how_far_it_came(lines, counted, parameters),
        *_restarts(lines),
        *_how_to_read(counted),
    ]
    return signed(paragraphs, "the run's journal")


def signed(paragraphs: list[str], source: str) -> str:
    """A description by cctrain, that it may replace until a person takes the last line away."""
    return "\n\n".join([*paragraphs, f"*Written by cctrain from {source}; {_WAY_TO_KEEP}"])


def is_own_description(text: str) -> bool:
    """Whether a description is empty or cctrain's, so that it may be replaced."""
    return not text.strip() or text.rstrip().endswith(_WAY_TO_KEEP)


def how_to_read(meanings: dict[str, str]) -> str:
    """A list of the groups of metrics with what each means."""
    return "\n".join(["**How to read it**", "", *(f"- `{group}/`: {meaning}." for group, meaning in meanings.items())])


def layers_in_words(depth: int | str | None) -> str:
    return f"{depth} layer{'' if str(depth) == '1' else 's'}"


def _model_in_words(parameters: dict[str, str]) -> str:
    get = parameters.get
    shape = f"{layers_in_words(get('model.depth'))} of width {get('model.width')}, {get('model.heads')} heads"
    if get("model.attention") == "dense":
        return f"dense transformer (the control, cost n²), {shape}"
    width = get("model.latent_width", "null")
    of_width = "" if width == "null" else f" of width {width}"
    return f"criss-cross transformer (cost n·M), {shape}, {get('model.latents')} latents{of_width}"


def _what_was_trained(parameters: dict[str, str], start: Line) -> Iterator[str]:
    if "model.attention" not in parameters:
        yield "There is no config.yaml."
    else:
        yield f"**Model**: {_model_in_words(parameters)}."
    if "data.store" in parameters:
        yield f"**Data**: {_data_in_words(parameters)}."
    if "world_size" in start:
        yield f"**Machine**: {_ranks_in_words(start)}."


def _data_in_words(parameters: dict[str, str]) -> str:
    get = parameters.get
    context = "a cell"
    if get("data.context") == "group":
        window = get("data.window", "null")
        context = "all cells of a group" if window == "null" else f"up to {window} cells of a group"
    most = get("data.max_tokens", "null")
    tokens = "" if most == "null" else f", at most {most} visible tokens a cell"
    return (
        f"`{parameters['data.store']}`; a context is {context}{tokens}; {get('data.global_batch')} contexts make a step"
    )


def _ranks_in_words(start: Line) -> str:
    ranks, sharing = start["world_size"], start.get("context_ranks") or 1
    where = f" on {start['device']}" if "device" in start else ""
    shared = f", {sharing} share each context" if sharing > 1 else ""
    return (
        f"{start.get('precision')} on {ranks} rank{'' if ranks == 1 else 's'}{where}{shared}; "
        f"ZeRO {start.get('zero_stage')}"
    )


def _how_far_it_came(lines: list[Line], counted: list[Line], parameters: dict[str, str]) -> Iterator[str]:
    steps = [line for line in counted if line["event"] == "step"]
    looks = [line for line in counted if line["event"] == "evaluate"]
    if steps:
        first, last = steps[0], steps[-1]
        wanted = f" of {parameters['training.steps']}" if "training.steps" in parameters else ""
        attempts = last_attempt(lines)
        yield (
            f"Step {last['step']}{wanted}, in {attempts} attempt{'s' if attempts > 1 else ''}; training loss "
            f"{first['loss']:.4g} at step {first['step']}, {last['loss']:.4g} at step {last['step']}."
        )
    if looks:
        figures = [
            f"{name} {value:.4g}" for name, value in metrics_of(looks[-1]).items() if name.startswith(EVALUATE_GROUP)
        ]
        yield f"Held-out cells at step {looks[-1]['step']}: {', '.join(figures)}."
    if lines[-1]["event"] == "stop" and lines[-1].get("status") != "finished":
        ended = how_it_ended(lines[-1]["attempt"], lines)
        yield f"{ended[0].upper()}{ended[1:]}. The run goes on when it is started again."


def _restarts(lines: list[Line]) -> Iterator[str]:
    again = restarts(lines)
    if again:
        shown = "\n".join(f"- {restart}" for restart in reversed(again[-_MAX_RESTARTS:]))
        earlier = f"\n- and {len(again) - _MAX_RESTARTS} before" if len(again) > _MAX_RESTARTS else ""
        yield f"Restarts, the latest first:\n\n{shown}{earlier}"


def _how_to_read(counted: list[Line]) -> Iterator[str]:
    """Of the groups that the run has. Not every step looks at its node, but the first one does."""
    first, latest = ({line["event"]: line for line in lines} for lines in (reversed(counted), counted))
    there = {name.partition("/")[0] for line in (*first.values(), *latest.values()) for name in metrics_of(line)}
    meanings = {group: meaning for group, meaning in _MEANINGS.items() if group in there}
    if meanings:
        yield how_to_read(meanings)
