import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cctrain.config import Config, check_config, field_help, load_config, to_yaml
from cctrain.errors import UsageError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
STORE = "data: {store: some/store}\n"
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Reads a YAML text as `mine.yaml`, with overrides."""

    def read(text: str, *overrides: str) -> Config:
        (tmp_path / "mine.yaml").write_text(text)
        return load_config(tmp_path / "mine.yaml", list(overrides))

    return read


def complaint(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Reading


def test_a_file_changes_the_defaults_and_an_override_changes_the_file(load):
    config = load(STORE + "training: {steps: 7, warmup: 3}\n", "training.steps=9", "model.attention=dense")
    assert (config.training.steps, config.training.warmup) == (9, 3)
    assert config.model.attention == "dense"
    assert config.training.learning_rate == Config().training.learning_rate


def test_of_two_overrides_of_one_key_the_last_wins(load):
    assert load(STORE, "run.seed=1", "run.seed=2").run.seed == 2


def test_numbers_may_be_written_as_people_write_them(load):
    config = load(STORE, "training.learning_rate=2e-3", "training.steps=1_000", "training.clip=1")
    assert config.training.learning_rate == 0.002
    assert config.training.steps == 1_000
    assert config.training.clip == 1.0


def test_a_key_can_be_set_back_to_its_default_by_null(load):
    assert load(STORE + "model: {latent_width: 8}\n", "model.latent_width=null").model.latent_width is None


def test_the_run_directory_is_named_after_the_file_unless_it_is_given(load):
    assert load(STORE).run.dir == "runs/mine"
    assert load(STORE, "run.dir=elsewhere/x").run.dir == "elsewhere/x"


def test_deepspeed_keys_pass_through_untouched(load):
    text = STORE + "deepspeed: {zero_optimization: {overlap_comm: true, sub_group_size: 1e9}, tags: [a, b]}\n"
    config = load(text, "deepspeed.zero_optimization.reduce_bucket_size=5", "deepspeed.wall_clock_breakdown=true")
    assert config.deepspeed == {
        "zero_optimization": {"overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": 5},
        "tags": ["a", "b"],
        "wall_clock_breakdown": True,
    }
    assert type(config.deepspeed) is dict
    assert type(config.deepspeed["zero_optimization"]) is dict


def test_a_value_may_refer_to_another(load):
    config = load(STORE, "tracking.experiment=${model.attention}-${model.latents}")
    assert config.tracking.experiment == "criss_cross-64"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads_and_says_who_it_is_for(path):
    config = load_config(path, ["data.store=some/store"])
    assert config.run.dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# For ")


def test_there_are_configurations_in_the_repository():
    assert {path.name for path in CONFIGS} >= {"cell.yaml", "quickstart.yaml"}


# Writing


def test_a_resolved_configuration_is_read_back_as_it_was(load, tmp_path):
    config = load(
        STORE + "deepspeed: {a: {b: [1, 2.5, null]}}\ntracking: {experiment: \"a: 'b' #c\"}\n",
        "model.latent_width=24",
        "training.learning_rate=1.2345678901234567e-3",
        "run.seed=12345678901",
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_every_default_is_read_back_as_it_was(load, tmp_path):
    config = load(STORE)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("text", ["2024_01", "0123", "1e3", "a=b"])
def test_text_that_looks_like_something_else_stays_as_it_was_typed(load, text):
    assert load(STORE, f"run.dir={text}").run.dir == text


def test_every_key_has_a_sentence_and_says_what_a_resumed_run_may_do_with_it():
    for key, (help_text, resume, _) in field_help().items():
        assert resume in ("fixed", "schedule", "free"), key
        assert help_text[0].isupper() or help_text.startswith("`"), key
        assert help_text.endswith("."), key
        assert len(help_text) > 15, key


def test_what_decides_the_order_of_samples_and_the_shape_of_the_model_is_fixed():
    resume = {key: kind for key, (_, kind, _) in field_help().items()}
    order = ("data.digest", "data.global_batch", "data.block", "data.mixed_blocks", "data.window", "data.weights")
    science = ("model.", "objective.", "run.seed", *order)
    how = "model.backend"
    assert {kind for key, kind in resume.items() if key.startswith(science) and key != how} == {"fixed"}
    assert {resume[key] for key in ("training.steps", "training.learning_rate", "training.precision")} == {"schedule"}
    where = (how, "parallel.", "memory.", "tracking.", "run.dir", "data.store", "data.micro_batch_tokens")
    assert {kind for key, kind in resume.items() if key.startswith(where)} == {"free"}


def test_the_defaults_are_legal():
    check_config(Config())


# Mistakes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("trainning: {steps: 5}", "trainning in .*mine.yaml: did you mean training.steps"),
        ("training: {stepps: 5}", "training.stepps in .*mine.yaml: did you mean training.steps"),
        ("training: {learning_rat: 5}", "did you mean training.learning_rate"),
        ("modl: {atention: dense}", "did you mean model.attention"),
        ("steps: 5", "unknown key steps in .*: did you mean training.steps"),
        ("max_tokens: 5", "did you mean data.max_tokens"),
        ("dir: 5", "did you mean run.dir"),
        ("every: 5", "did you mean evaluation.every"),
        ("width: 5", "did you mean model.width"),
        ("optimizer: {lr: 5}", "unknown key optimizer in .*: did you mean "),
        ("1: 2", "unknown key 1 "),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_the_right_one(load, text, named):
    assert re.search(named, complaint(load, STORE + text))


def test_a_misspelt_override_is_an_error_that_shows_it(load):
    message = complaint(load, STORE, "training.stepps=5")
    assert "'training.stepps=5'" in message
    assert "did you mean training.steps?" in message


@pytest.mark.parametrize(
    "override",
    [
        "model.width=abc",
        "model.width=2.5",
        "model.width=true",
        "model.width=null",
        "model.width.x=3",
        "training.learning_rate=fast",
        "memory.checkpointing=7x",
        "deepspeed=3",
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_key_and_origin(load, override):
    message = complaint(load, STORE, override)
    key = override.partition("=")[0].removesuffix(".x")
    assert message.startswith(f"{key} in the override {override!r}")


def test_a_value_of_the_wrong_type_in_a_file_names_the_file(load):
    message = complaint(load, STORE + "training: {steps: many}\n")
    assert message.startswith("training.steps in ")
    assert "mine.yaml" in message
    assert "many" in message


@pytest.mark.parametrize("text", ["model:\n", "model: 3\n", "model: [1, 2]\n"])
def test_a_section_without_keys_is_an_error_that_shows_one(load, text):
    assert "is a section: give keys below it, such as model.attention" in complaint(load, STORE + text)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("memory.offload=host",), "memory.checkpointing, which is off"),
        (("parallel.context=2", "model.attention=dense"), "dense attention is not sharded"),
        (("training.compile=true", "parallel.zero_stage=3"), "does not know the sharded weights"),
    ],
)
def test_options_that_cannot_go_together_are_an_error_that_says_why(load, overrides, said):
    assert said in complaint(load, STORE, *overrides)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=r"no configuration file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no configuration file"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["a: b: c", "data: [", STORE + STORE, "\x00"])
def test_what_is_not_yaml_is_an_error_that_names_the_file(load, text):
    assert "mine.yaml is not valid YAML" in complaint(load, text)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "[]"])
def test_what_is_not_a_mapping_is_an_error_that_shows_one(load, text):
    assert "mine.yaml holds no keys" in complaint(load, text)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "training: {steps: 5}\n"])
def test_a_missing_store_is_an_error_that_says_what_it_is(load, text):
    message = complaint(load, text)
    assert message.startswith("data.store is missing")
    assert "cctrain prepare" in message


@pytest.mark.parametrize("override", ["training.steps", "training.steps: 5", "=5", "--steps"])
def test_an_override_without_key_or_value_is_an_error_that_shows_one(load, override):
    message = complaint(load, STORE, override)
    assert repr(override) in message
    assert "training.steps=500" in message


@pytest.mark.parametrize("override", ["model.width=[", "run.dir=${nope}", "run.dir=${oc.env:CCTRAIN_NOT_SET}"])
def test_an_override_that_cannot_be_read_is_an_error(load, override):
    assert override.partition("=")[0] in complaint(load, STORE, override)


@pytest.mark.parametrize(
    "override",
    [
        "data.context=tissue",
        "data.max_tokens=0",
        "data.global_batch=0",
        "data.micro_batch_tokens=-1",
        "data.block=0",
        "data.window=0",
        "data.window=16",
        "data.mixed_blocks=0",
        "model.attention=ring",
        "model.width=0",
        "model.depth=0",
        "model.latents=0",
        "model.latent_width=0",
        "model.heads=3",
        "training.steps=0",
        "training.precision=int8",
        "training.schedule=linear",
        "training.learning_rate=0",
        "training.learning_rate=nan",
        "training.learning_rate=.inf",
        "training.clip=-1",
        "training.warmup=-1",
        "training.decay=0",
        "training.decay=1.5",
        "training.final_learning_rate=-0.1",
        "training.weight_decay=-1",
        "training.beta1=1",
        "training.beta2=1.5",
        "training.epsilon=0",
        "objective.target_rate=0",
        "objective.target_rate=1",
        "objective.detection_cap=0",
        "evaluation.every=-1",
        "evaluation.cells=0",
        "evaluation.draws=0",
        "parallel.zero_stage=4",
        "run.seed=-1",
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_key_and_value(load, override):
    key, value = override.split("=")
    message = complaint(load, STORE, override)
    assert key in message
    assert value.strip(".") in message


@pytest.mark.parametrize(
    "override",
    [
        "training.clip=0",
        "training.warmup=0",
        "training.decay=1",
        "training.final_learning_rate=0",
        "training.final_learning_rate=1",
        "training.beta1=0",
        "training.weight_decay=0",
        "objective.detection_cap=1",
        "evaluation.every=0",
        "parallel.zero_stage=3",
    ],
)
def test_the_ends_of_a_range_that_make_sense_are_allowed(load, override):
    load(STORE, override)
