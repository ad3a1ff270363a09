"""The page of formulas says what the code computes: each of its tables, evaluated on models of several shapes."""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import as_json, estimate
from cctrain.cost.flops import Flops, optimizer_flops, step_flops
from cctrain.cost.memory import activations, reduce_bucket, state
from cctrain.cost.parameters import num_parameters, parameters_by_component
from cctrain.cost.step import step_cost, step_traffic
from cctrain.cost.step_time import collectives, parameters_updated, rank_flops, step_seconds
from cctrain.cost.traffic import DEEPSPEEDS_OWN, Collective, never_partitioned, sent
from cctrain.cost.work import Contexts, Load, Work

PAGE = (Path(__file__).parents[2] / "cctrain" / "cost" / "README.md").read_text(encoding="utf-8")
GENES = 700
MODELS = {
    "criss-cross": ModelConfig(width=48, depth=3, heads=4, latents=6, latent_width=20, cell_encoding=5),
    "large enough to be partitioned": ModelConfig(width=400, depth=2, heads=8, latents=16, cell_encoding=0),
    "dense": ModelConfig(attention="dense", width=32, depth=2, heads=2),
}
LOAD = Load(tokens=900.0, contexts=3.0, targets=45.0)
WORK = Work(6, 2, 5, LOAD, 1, 4, MemoryConfig(), tile_tokens=256)
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def value(formula: str, symbols: dict[str, float]) -> float:
    """Of a formula of the page: arithmetic, and rounding up in ⌈ ⌉."""
    written = {"·": "*", "−": "-", "²": "**2", "⌈": "ceil(", "⌉": ")"}
    plain = "".join(written.get(character, character) for character in formula)

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Call):
            return math.ceil(of(node.args[0]))
        return symbols[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    return of(ast.parse(plain, mode="eval").body)


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head; code without its backticks."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def by_name(rows: list[list[str]], *cases: str) -> dict[str, list[str]]:
    """Formulas by the name of what they are of; a row `case: name` stands for `name` in that case."""
    found = {name: formulas for name, *formulas in rows if ": " not in name}
    for case in cases:
        found |= {name.removeprefix(f"{case}: "): formulas for name, *formulas in rows if name.startswith(f"{case}: ")}
    return found


def case_of(model: ModelConfig) -> tuple[str, ...]:
    return ("dense",) if model.attention == "dense" else ()


def symbols_of(model: ModelConfig, work: Work = WORK) -> dict[str, float]:
    dense = model.attention == "dense"
    return {
        **{"n": work.load.tokens, "k": work.load.contexts, "T": work.load.targets, "V": GENES},
        **{"L": model.depth, "d": model.width, "H": model.heads, "s": model.cell_encoding or 0},
        **{"M": 0 if dense else model.latents, "d_l": 0 if dense else model.latent_width or model.width},
        **{"e": work.element_bytes, "W": work.ranks, "C": work.context_ranks, "A": work.micro_batches},
        **{"P": num_parameters(model, GENES)},
        **{"S": never_partitioned(model, GENES, DEEPSPEEDS_OWN.stage3_param_persistence_threshold)},
        **{"B": reduce_bucket(num_parameters(model, GENES))},
        **{"c": 2 if work.memory.checkpointing else 1, "t": work.tile_tokens},
    }


@every_model
def test_flops_of_every_component(model):
    symbols, tokens = symbols_of(model), [LOAD.tokens / LOAD.contexts] * int(LOAD.contexts)
    law = step_flops(model, tokens, LOAD.targets, checkpointing=True)
    formulas = by_name(table("FLOPs and parameters"), *case_of(model))
    for column, part in enumerate((law.forward, law.backward, law.recomputation)):
        computed = {name: flops for name, flops in part.by_component().items() if name in formulas or flops}
        assert {name: value(cells[column], symbols) for name, cells in formulas.items()} == pytest.approx(computed)
    under_zero_3 = step_flops(model, tokens, LOAD.targets, checkpointing=True, zero_stage=3)
    assert under_zero_3.recomputation == replace(law.forward, read=0)


@every_model
def test_flops_of_a_rank_are_those_of_its_micro_batches(model):
    work = replace(WORK, context_ranks=1) if model.attention == "dense" else WORK
    formulas = by_name(table("FLOPs and parameters"), *case_of(model))
    of_a_micro_batch = {
        name: value(forward, symbols_of(model)) + value(backward, symbols_of(model))
        for name, (forward, backward, *_) in formulas.items()
    }
    computed = rank_flops(model, work)
    assert {name: getattr(computed, name) for name in formulas} == pytest.approx(
        {name: work.micro_batches * flops for name, flops in of_a_micro_batch.items()}
    )


@every_model
def test_parameters_of_every_component(model):
    formulas = by_name(table("FLOPs and parameters"), *case_of(model))
    written = {name: value(cells[-1], symbols_of(model)) for name, cells in formulas.items()}
    assert {name: number for name, number in written.items() if number} == {
        name: number for name, number in parameters_by_component(model, GENES).items() if number
    }


@every_model
def test_the_share_of_attention_in_what_tokens_take_forward(model):
    [share] = re.findall(r"forward `([^`]+)`", PAGE)
    law = step_flops(model, [300], 15).forward
    if model.attention == "criss_cross":
        of_tokens = law.attention + law.token_projections + law.token_mlp
        assert value(share, symbols_of(model)) == pytest.approx(law.attention / of_tokens)


@every_model
@pytest.mark.parametrize("stage", range(4))
def test_state_and_optimizer_under_every_stage_of_zero(model, stage):
    fp32, half, optimizer = by_name(table("State, by ZeRO stage"))[str(stage)]
    symbols = symbols_of(model)
    for formula, element_bytes in ((fp32, 4), (half, 2)):
        kept = state(model, GENES, stage, element_bytes, WORK.ranks, symbols["B"]).kept
        assert value(formula, symbols) == pytest.approx(kept), element_bytes
    updated = parameters_updated(model, GENES, replace(WORK, zero_stage=stage))
    assert value(optimizer, symbols) == pytest.approx(optimizer_flops(updated))


@every_model
@pytest.mark.parametrize("element_bytes", [4, 2])
def test_activations_that_grow_with_tokens(model, element_bytes):
    formulas = by_name(table("Activations"), *case_of(model))
    for column, checkpointing in enumerate((False, True)):
        memory = MemoryConfig(checkpointing=checkpointing)
        made = activations(model, GENES, LOAD, memory, WORK.tile_tokens, element_bytes)
        symbols = symbols_of(model, replace(WORK, element_bytes=element_bytes))
        for name, cells in formulas.items():
            assert value(cells[column], symbols) == getattr(made, name), name


def written_collectives(wheres: Iterable[str], symbols: dict[str, float]) -> list[tuple[str, str, float, float]]:
    """(purpose, operation, payload, times) of the rows that are for all of these words."""
    return [
        (purpose, operation, value(payload, symbols), value(times, symbols))
        for purpose, operation, payload, times, where in table("Bytes over the network")
        if all(word in where for word in wheres)
    ]


def in_one_payload(made: list[Collective]) -> list[tuple[str, str, float, float]]:
    """(purpose, operation, payload, times); of small parameters, which go one by one, what all of them are."""
    small = [one for one in made if one.purpose == "small parameters"]
    of_small = [("small parameters", "all_gather", sum(one.times * one.payload for one in small), 1)] if small else []
    return [(one.purpose, one.operation, one.payload, one.times) for one in made if one not in small] + of_small


@every_model
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("context_ranks", "many"), [(2, "2 to 8"), (9, "more")])
def test_collectives_of_context_ranks_and_of_zero(model, stage, context_ranks, many):
    work = replace(WORK, ranks=18, context_ranks=context_ranks, zero_stage=stage)
    symbols = symbols_of(model, work)
    exchanged, of_zero = (in_one_payload(made) for made in collectives(model, GENES, work))
    if model.attention == "criss_cross":
        assert written_collectives(["context ranks", many], symbols) == exchanged
    assert written_collectives(["ZeRO", str(stage)], symbols) == of_zero


def test_bytes_that_a_rank_sends_for_a_payload():
    once, twice = re.findall(r"`([^`]*s·\(R − 1\)[^`]*)`", PAGE)
    symbols = {"s": 1000.0, "R": 8.0}
    assert value(once, symbols) == sent("all_gather", 1000, 8) == sent("reduce_scatter", 1000, 8)
    assert value(twice, symbols) == sent("all_reduce", 1000, 8)


@every_model
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_seconds_of_every_part_of_a_step(model, checkpointing, stage):
    device = load_device("h100", "bf16")
    context_ranks = 1 if model.attention == "dense" else 2
    memory = MemoryConfig(checkpointing=checkpointing)
    work = replace(WORK, context_ranks=context_ranks, zero_stage=stage, element_bytes=2, memory=memory)
    flops, rates = rank_flops(model, work), asdict(device)
    symbols = symbols_of(model, work) | {"F": flops.total, "F_a": flops.attention} | rates
    seconds = asdict(step_seconds(model, GENES, work, device))
    formulas = by_name(table("Time of a step"), *case_of(model), f"ZeRO {stage}")
    assert formulas.keys() == seconds.keys()
    called = dict(zip(("exchange", "zero"), collectives(model, GENES, work), strict=True))
    for name, [formula] in formulas.items():
        made = called.get(name, [])
        started = sum(one.times * one.calls for one in made)
        of_collectives = {"sent": sum(one.sent for one in made), "started": started}
        assert value(formula, symbols | of_collectives) == pytest.approx(seconds[name]), name


def test_the_page_has_every_component():
    rows = {name.removeprefix("dense: ") for name, *_ in table("FLOPs and parameters")}
    assert rows == {field.name for field in fields(Flops)}


def test_the_page_has_the_names_of_the_journal_and_no_others():
    said = step_cost(MODELS["criss-cross"], [300], 15) | step_traffic(
        Config(), GENES, contexts=2, micro_batches=1, ranks=2
    )
    assert set(re.findall(r"`(cost/\w+)`", PAGE)) == said.keys()


def test_the_page_names_keys_that_the_configuration_has():
    config: Any = Config()
    keys = re.findall(r"`((?:model|data|training|memory|parallel)\.(?!py)\w+)`", PAGE)
    assert "model.latents" in keys
    for section, key in (key.split(".") for key in keys):
        assert hasattr(getattr(config, section), key), key


def test_the_page_names_what_an_estimate_as_json_has():
    config = Config()
    config.data.micro_batch_tokens = 4000
    found = estimate(config, Contexts(300, 15, GENES), load_device("h100", "bf16"), ranks=1)
    names = re.findall(r"`(\w+_(?:by_component|of_a_rank))`", PAGE)
    assert len(names) == 5
    assert set(names) <= as_json(found).keys()
