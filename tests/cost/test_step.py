import pytest

from cctrain.config import ModelConfig
from cctrain.cost.flops import step_flops
from cctrain.cost.step import step_cost


def test_the_values_of_a_step_name_tokens_latents_and_the_share_of_attention():
    config = ModelConfig(latents=32)
    cost = step_cost(config, [100, 300], 40)
    law = step_flops(config, [100, 300], 40)
    assert cost == {
        "cost/n": 200,
        "cost/M": 32,
        "cost/n_times_M": 200 * 32,
        "cost/attention_flops": law.attention,
        "cost/total_flops": law.total,
        "cost/attention_share": pytest.approx(law.attention / law.total),
    }


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_checkpointing_computes_again_counts(zero_stage):
    config = ModelConfig(latents=32)
    cost = step_cost(config, [100, 300], 40, checkpointing=True, zero_stage=zero_stage)
    law = step_flops(config, [100, 300], 40, checkpointing=True, zero_stage=zero_stage)
    assert (cost["cost/total_flops"], cost["cost/attention_flops"]) == (law.total, law.attention)


def test_dense_attention_has_no_latents_to_name():
    cost = step_cost(ModelConfig(attention="dense"), [100, 300], 40)
    assert not {"cost/M", "cost/n_times_M"} & cost.keys()
