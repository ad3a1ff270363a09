from collections import Counter
from dataclasses import replace

import pytest

from cctrain.cost.parameters import num_parameters, parameter_tensors, parameters_by_component, parameters_of_a_layer
from tests.cost.counting import MODELS, built

PARTS = {
    "embedding": ("embedding.",),
    "token_projections": (
        *("read.norm_tokens.", "read.key.", "read.value.", "write.norm_tokens.", "write.query.", "write.out."),
        "attention.",
    ),
    "token_mlp": ("token_mlp.",),
    "latents": (
        *("latents", "latent_mlp.", "read.norm_latents.", "read.query.", "read.out."),
        *("write.norm_latents.", "write.key.", "write.value."),
    ),
    "head": ("head.",),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("num_genes", "cell_encoding"), [(41, 0), (77, 13)])
def test_every_tensor_of_every_component_is_counted_exactly(config, num_genes, cell_encoding):
    config = replace(config, cell_encoding=cell_encoding)
    found: Counter[tuple[str, int]] = Counter()
    for name, parameter in built(config, num_genes).named_parameters():
        within = name.split(".", 2)[2] if name.startswith("layers.") else name
        [component] = [part for part, starts in PARTS.items() if within.startswith(starts)]
        found[component, parameter.numel()] += 1
    law: Counter[tuple[str, int]] = Counter()
    for component, size, number in parameter_tensors(config, num_genes):
        law[component, size] += number
    assert law == found
    by_component = {part: sum(size * number for (of, size), number in found.items() if of == part) for part in PARTS}
    assert parameters_by_component(config, num_genes) == by_component
    assert num_parameters(config, num_genes) == sum(by_component.values())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_the_parameters_of_a_layer_are_counted_exactly(config):
    layer = built(config).layers[0]
    assert parameters_of_a_layer(config) == sum(parameter.numel() for parameter in layer.parameters())
