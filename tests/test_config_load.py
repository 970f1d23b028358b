"""Reading a config: files, overrides, stages; equal after a round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.config import StageConfig, TrainingConfig, dump_yaml, load_config, resolve_stages
from retrain.config.data import ListSourceConfig
from retrain.config.environment import ToolEnvironmentConfig
from retrain.types import UserError

YAML = """\
experiment_name: poem
model: {name_or_path: some/model}
prompt_source:
  type: list
  prompts: [Write a poem, Write another]
reward_setup:
  rollout_reward_configs:
    exact_match: {weight: 2}
"""


def base(**sections: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "some/model"},
        "prompt_source": {"type": "list", "prompts": ["a", "b"]},
        "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
        **sections,
    }


EVALUATION = {"prompt_source": {"type": "list", "prompts": ["a"]}}
SFT = {"dataset": "traces.jsonl"}


def test_from_yaml_reads_a_file_and_fills_in_defaults(tmp_path: Path) -> None:
    path = tmp_path / "poem.yaml"
    path.write_text(YAML)
    config = TrainingConfig.from_yaml(path)
    assert config.experiment_name == "poem"
    assert isinstance(config.prompt_source, ListSourceConfig)
    assert config.prompt_source.prompts == ["Write a poem", "Write another"]
    assert config.reward_setup.rollout_reward_configs["exact_match"].weight == 2.0
    assert config.algorithm.hyperparameters.group_size == 8
    assert config == load_config(str(path))


def test_toml_says_the_same(tmp_path: Path) -> None:
    yaml, toml = tmp_path / "poem.yaml", tmp_path / "poem.toml"
    yaml.write_text(YAML)
    toml.write_text(
        'experiment_name = "poem"\n'
        '[model]\nname_or_path = "some/model"\n'
        '[prompt_source]\ntype = "list"\nprompts = ["Write a poem", "Write another"]\n'
        "[reward_setup.rollout_reward_configs.exact_match]\nweight = 2\n"
    )
    assert load_config(toml) == load_config(yaml)


def test_a_dict_is_not_changed_by_overrides() -> None:
    data = base()
    config = load_config(data, ["prompt_source.prompts.0=other", "seed=3"])
    assert config.seed == 3 and data == base()


FULL = base(
    environment={"type": "smolagent", "tools": ["python", {"name": "a:b", "params": {"x": None}}]},
    algorithm={"hyperparameters": {"max_grad_norm": None, "betas": [0.8, 0.99]}},
    evaluation={**EVALUATION, "modes": [{"name": "T=1"}], "group_by": "form", "exclude": ["x"]},
    sft=SFT,
    stages=[{"kind": "sft"}, {"kind": "rl", "algorithm": {"hyperparameters": {"steps": 3}}}],
)


def test_model_dump_yaml_and_the_config_itself_load_to_an_equal_config(tmp_path: Path) -> None:
    data = FULL | {"prompt_source": {**FULL["prompt_source"], "answer_column": None}}
    config = load_config(data)
    assert load_config(config.model_dump()) == config
    assert load_config(config) == config
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.algorithm.hyperparameters.max_grad_norm is None, "not back at its default of 1"
    assert isinstance(again.prompt_source, ListSourceConfig)
    assert again.prompt_source.answer_column is None


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("algorithm.hyperparameters.learning_rate=1e-5", None, 1e-5),
        ("experiment_name=no", "experiment_name", "no"),
        ("experiment_name='7'", "experiment_name", "7"),
        ('experiment_name="a.b"', "experiment_name", "a.b"),
        ("experiment_name=2020-13-45", "experiment_name", "2020-13-45"),
        ("output_dir=a=b", "output_dir", "a=b"),
    ],
)
def test_override_values_are_yaml(override: str, path: str | None, value: object) -> None:
    config = load_config(base(), [override])
    if path is None:
        assert config.algorithm.hyperparameters.learning_rate == value
    else:
        assert getattr(config, path) == value


def test_overrides_make_sections_index_lists_and_come_in_order() -> None:
    config = load_config(
        base(environment={"type": "smolagent", "tools": [{"name": "python"}]}),
        [
            "model.trust_remote_code=no",
            "model.peft.r=4",
            "evaluation.prompt_source={type: list, prompts: [x, y]}",
            "evaluation.prompt_source.prompts.1=z",
            "environment.tools.0.params.timeout=2",
            "sft=",
            "seed=1",
            "seed=2",
        ],
    )
    assert config.model.trust_remote_code is False
    assert config.model.peft is not None and config.model.peft.r == 4
    assert config.evaluation is not None
    assert isinstance(config.evaluation.prompt_source, ListSourceConfig)
    assert config.evaluation.prompt_source.prompts == ["x", "z"]
    assert isinstance(config.environment, ToolEnvironmentConfig)
    assert config.environment.tool_list()[0].params == {"timeout": 2}
    assert config.sft is None and config.seed == 2


def test_an_override_changes_one_place_of_a_yaml_alias(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text(
        "model: {name_or_path: m}\n"
        "reward_setup: {rollout_reward_configs: {exact_match: {}}}\n"
        "prompt_source: &source {type: list, prompts: [a]}\n"
        "evaluation: {prompt_source: *source}\n"
    )
    config = load_config(path, ["evaluation.prompt_source.prompts=[b]"])
    assert isinstance(config.prompt_source, ListSourceConfig)
    assert config.prompt_source.prompts == ["a"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set 'seed' is not key=value\n  Example: "),
        ("=1", "is not key=value"),
        (
            "prompt_source.prompts.2=x",
            r"prompt_source\.prompts is a list of 2; '2' is not an index",
        ),
        ("prompt_source.prompts.-1=x", "'-1' is not an index"),
        ("prompt_source.prompts.0.x=x", r"prompt_source\.prompts\.0 is a value, not a section"),
        ("seed=[1", r"config: seed: .*got '\[1'"),
        ("algorithm.hyperparameters.stepz=1", "did you mean 'steps'"),
        ("a..b=1", "unknown key a;"),
    ],
)
def test_overrides_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(base(), [override])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dup.yaml", b"seed: 1\nseed: 2\n", r'dup\.yaml is not valid YAML: line 2, .*key "seed"'),
        ("syntax.yaml", b"a: b: c\n", r"syntax\.yaml is not valid YAML: line 1, column 5: "),
        ("date.yaml", b"seed: 2020-13-45\n", "is not valid YAML: month must be"),
        ("float.yaml", b"seed: !!float abc\n", "is not valid YAML"),
        ("digits.yaml", b"seed: " + b"9" * 5000, "is not valid YAML"),
        ("deep.yaml", b"seed: " + b"[" * 5000, "is not valid YAML"),
        ("tag.yaml", b"a: !!python/object:os.system x\n", "is not valid YAML: line 1"),
        ("two.yaml", b"a: 1\n---\nb: 2\n", "another document"),
        ("nul.yaml", b"seed: \x00\n", "is not valid YAML"),
        ("syntax.toml", b"a = \n", r"syntax\.toml is not valid TOML: .*line 1"),
        ("empty.yaml", b"", r"empty\.yaml is empty; .*\n  Start with `model:`"),
        ("list.yaml", b"- 1\n", r"holds a list; expected a mapping of sections"),
        ("binary.yaml", b"\xff\xfe\x80", r"binary\.yaml is not UTF-8 text"),
        ("number.yaml", b"1: 2\n", "unknown key 1;"),
        ("loop.yaml", b"seed: &a [*a]\n", "nested too deeply, or in itself"),
    ],
)
def test_files_that_are_no_config(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "poem.yaml").write_text(YAML)
    with pytest.raises(UserError, match=r"poen\.yaml does not exist\n  Did you mean .*/poem\.yaml"):
        load_config(tmp_path / "poen.yaml")
    with pytest.raises(UserError, match=r"does not exist\n  Check the path"):
        load_config(tmp_path / "nowhere" / "poem.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_without_stages_a_run_is_rl_between_two_evaluations() -> None:
    assert [s[:2] for s in resolve_stages(load_config(base()))] == [("rl", "rl")]
    stages = resolve_stages(load_config(base(evaluation=EVALUATION)))
    assert [s[:2] for s in stages] == [("before", "eval"), ("rl", "rl"), ("after", "eval")]


def test_stages_overlay_the_sections_above() -> None:
    config = load_config(
        base(
            sft={**SFT, "steps": 5, "params": {}},
            environment={"type": "smolagent", "max_steps": 4, "tools": ["python"]},
            reward_setup={
                "rollout_reward_configs": {"a": {"weight": 2, "params": {"x": 1, "y": 1}}}
            },
            stages=[
                {"kind": "sft", "sft": {"steps": 9}},
                {
                    "kind": "rl",
                    "environment": {"tool_format": {"type": "fenced"}},
                    "reward_setup": {
                        "rollout_reward_configs": {"a": {"params": {"y": 2}}, "b": {"weight": 3}}
                    },
                    "prompt_source": {"prompts": ["c"]},
                },
                {"kind": "rl", "environment": {"type": "qa"}},
                {"kind": "distill", "distillation": {"type": "traces", "sources": ["log.jsonl"]}},
            ],
        )
    )
    (_, _, sft), (_, _, first), (_, _, second), (_, _, last) = resolve_stages(config)
    assert last.distillation is not None and last.distillation.type == "traces"
    assert config.distillation is None
    assert sft.sft is not None and (sft.sft.steps, sft.sft.dataset) == (9, "traces.jsonl")
    assert config.sft is not None and config.sft.steps == 5
    assert isinstance(first.environment, ToolEnvironmentConfig)
    assert first.environment.tool_format.type == "fenced"
    assert (first.environment.max_steps, first.environment.tools) == (4, ["python"])
    rewards = first.reward_setup.rollout_reward_configs
    assert rewards["a"].weight == 2 and rewards["a"].params == {"x": 1, "y": 2}
    assert rewards["b"].weight == 3
    assert isinstance(first.prompt_source, ListSourceConfig)
    assert first.prompt_source.prompts == ["c"], "a list is replaced, not merged"
    assert second.environment.type == "qa", "a new type replaces the section"
    assert first.stages is None


def test_stage_names_are_unique() -> None:
    def names(*stages: dict[str, Any]) -> list[str]:
        config = load_config(base(evaluation=EVALUATION, stages=list(stages)))
        return [name for name, _, _ in resolve_stages(config)]

    rl = {"kind": "rl"}
    assert names(rl, {"kind": "eval"}, rl, rl) == ["rl", "eval", "rl-2", "rl-3"]
    assert names(rl, {"kind": "rl", "name": "rl-2"}, rl) == ["rl", "rl-2", "rl-3"]
    assert names({"kind": "eval", "name": "rl"}, rl) == ["rl", "rl-2"]
    with pytest.raises(UserError, match=r"stages\.1: two stages have the name x"):
        names({"kind": "rl", "name": "x"}, {"kind": "eval", "name": "x"})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "sft"}, r"stages\.0: a stage of kind sft needs section sft\n  Add `sft:`"),
        ({"kind": "eval"}, "needs section evaluation"),
        ({"kind": "distill"}, "a stage of kind distill needs section distillation"),
        ({"kind": "rl", "model": {"name_or_path": "y"}}, "model stands above"),
        ({"kind": "rl", "engine": {}}, r"unknown key stages\.0\.engine"),
        ({"kind": "rl", "name": "a/b"}, r"stages\.0\.name: string should match"),
        ({"kind": "rl", "algorithm": {"nam": "x"}}, r"stages\.0: unknown key algorithm\.nam; did"),
        ({"kind": "rl", "reward_setup": {"verifiers": 3}}, r"stages\.0: reward_setup\.verifiers: "),
        ({}, r"stages\.0\.kind is missing"),
    ],
)
def test_stages_that_cannot_run(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(base(stages=[stage]))


def test_rl_needs_prompts_and_a_reward() -> None:
    without_prompts, without_reward = base(), base()
    del without_prompts["prompt_source"], without_reward["reward_setup"]
    with pytest.raises(UserError, match="needs section prompt_source"):
        load_config(without_prompts)
    with pytest.raises(UserError, match="reward_setup has no reward"):
        load_config(without_reward)
    own = {"type": "python", "path": "a:b"}
    assert load_config({**without_reward, "environment": own}).environment.type == "python"


def test_only_keeps_the_stages_of_one_kind() -> None:
    config = load_config(FULL)
    assert [s[:2] for s in resolve_stages(config, only="sft")] == [("sft", "sft")]
    assert [s[:2] for s in resolve_stages(load_config(base(sft=SFT)), only="sft")] == [
        ("sft", "sft")
    ]
    with pytest.raises(UserError, match="config: stages has none of kind eval\n  Add one"):
        load_config(FULL, only="eval")
    with pytest.raises(UserError, match="config: a stage of kind eval needs section evaluation"):
        load_config(base(), only="eval")


def test_only_what_runs_needs_its_sections() -> None:
    model = {"model": {"name_or_path": "m"}}
    assert load_config({**model, "sft": SFT}).prompt_source is None
    with pytest.raises(UserError, match=r"^config: a stage of kind rl needs section prompt_source"):
        load_config({**model, "evaluation": EVALUATION})
    assert load_config({**model, "evaluation": EVALUATION}, only="eval").prompt_source is None


def test_an_empty_overlay_changes_nothing() -> None:
    assert StageConfig(kind="rl").overlays() == {}


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.dates() | st.binary(max_size=3)
)  # fmt: skip
KEYS = sorted({key for key in re.findall(r"[a-z_]+", dump_yaml(load_config(FULL)))})
keys = st.sampled_from([*KEYS, "type", "kind", "modle"])
values = st.recursive(
    scalars | st.sampled_from(["list", "rl", "smolagent", "qa", "tags", "grpo", "a:b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
sections = st.dictionaries(st.sampled_from(sorted(TrainingConfig.model_fields)) | keys, values)


@settings(max_examples=300, deadline=None)
@given(data=sections, whole=st.booleans())
def test_any_mapping_loads_or_is_the_users_error(data: dict[str, Any], whole: bool) -> None:
    try:
        config = load_config(FULL | data if whole else data)
    except UserError as error:
        assert error.cause
    else:
        assert load_config(config.model_dump(mode="json")) == config


@settings(max_examples=200, deadline=None)
@given(key=st.lists(keys | st.sampled_from(["0", ""]), max_size=4).map(".".join), text=st.text())
def test_any_override_loads_or_is_the_users_error(key: str, text: str) -> None:
    try:
        load_config(FULL, [f"{key}={text}"])
    except UserError as error:
        assert error.cause
