"""Monitors turn on the history that they are for, and are silent on a healthy one."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from retrain import load_config
from retrain.config.load import merge
from retrain.config.monitors import MonitorsConfig
from retrain.config.root import TrainingConfig
from retrain.loops.monitors import MONITORS, REPEAT_STEPS, Monitors, check
from retrain.loops.rl import thresholds
from test_envs import TASK, Speaker, tagged, tools_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "when_training_goes_wrong.md").read_text(encoding="utf-8")
THRESHOLDS: dict[str, float | None] = MonitorsConfig().model_dump()
Metrics = dict[str, float]
STEPS = 30


def healthy(step: int, steps: int = STEPS) -> Metrics:
    """A run that learns: success rises, entropy falls, everything wavers a little."""
    done = step / steps
    wave = (-1) ** step
    success = 0.3 + 0.5 * done + 0.02 * wave
    return {
        "reward/mean": success,
        "reward/std": math.sqrt(success * (1 - success)),
        "success": success,
        "rollouts": 128.0,
        "rollouts/masked": float(step % 3),
        "groups": 16.0,
        "groups/zero_variance": round(4 + 9 * done),
        "truncated": 0.03 + 0.02 * wave,
        "tool_calls/mean": 0.9,
        "tool_calls/ok/mean": 0.8,
        "tool_calls/model_error/mean": 0.09,
        "tool_calls/timeout/mean": 0.01,
        "ratio/mean": 1.0 + 0.002 * wave,
        "clip_fraction": 0.05,
        "approx_kl": 0.003,
        "kl": 0.02 + 0.05 * done,
        "entropy": 0.3 - 0.25 * done,
        "grad_norm": 1.0 + 0.4 * wave,
        "logprob_gap/mean": 1e-5,
        "response_tokens/mean": 100.0 + 40 * done,
        "staleness/mean": 0.0,
        "loss": -0.01,
    }


def run(change: Callable[[int, Metrics], Metrics] = lambda step, metrics: {}) -> list[Metrics]:
    """The healthy run, overlaid in each step."""
    return [healthy(s) | change(s, healthy(s)) for s in range(1, STEPS + 1)]


def late(**overlay: float) -> Callable[[int, Metrics], Metrics]:
    """From step 20 on."""
    named = {name.replace("__", "/"): value for name, value in overlay.items()}
    return lambda step, _: named if step >= 20 else {}


def rise_and_fall(step: int, _: Metrics) -> Metrics:
    """0.2 for 5 steps, 0.8 for 15, then 0.3: five sixths of the gain are lost."""
    return {"reward/mean": 0.2 if step <= 5 else 0.8 if step <= 20 else 0.3}


WRONG: dict[str, tuple[Callable[[int, Metrics], Metrics], float]] = {
    "logprob_gap": (late(logprob_gap__mean=0.06), 0.06),
    "ratio": (late(ratio__mean=0.75), 0.25),
    "clip_fraction": (late(clip_fraction=0.4), 0.4),
    "approx_kl": (late(approx_kl=0.2), 0.2),
    "kl": (late(kl=0.8), 0.8),
    "entropy_low": (late(entropy=0.001), 0.001),
    "entropy_growth": (late(entropy=1.1), 4.0),  # 0.275 in the first five steps
    "grad_norm_spike": (lambda step, _: {"grad_norm": 35.0 if step == STEPS else 1.4}, 25.0),
    "zero_variance": (late(groups__zero_variance=15.0), 15 / 16),
    "truncated": (late(truncated=0.5), 0.5),
    "masked": (late(rollouts__masked=32.0), 0.25),
    "tool_calls": (late(tool_calls__mean=0.01), 0.01),
    "tool_failures": (
        late(tool_calls__tool_error__mean=0.81, tool_calls__timeout__mean=0.3),
        0.555,
    ),
    "invalid_calls": (late(tool_calls__model_error__mean=2.43), 0.75),
    "length_growth": (late(response_tokens__mean=416.0), 4.0),  # 104 in the first five
    "staleness": (late(staleness__mean=12.0), 12.0),
    "flat_reward_steps": (lambda step, _: {"reward/mean": 0.0, "reward/std": 0.0}, float(STEPS)),
    "reward_drop": (rise_and_fall, 5 / 6),
}


def test_a_healthy_run_turns_none() -> None:
    history = run()
    for step in range(1, STEPS + 1):
        assert check(history[:step], THRESHOLDS) == []


@pytest.mark.parametrize("name", MONITORS)
def test_each_turns_on_its_own_trouble_only(name: str) -> None:
    change, value = WRONG[name]
    history = run(change)
    [alert] = check(history, THRESHOLDS)
    assert alert.name == name
    assert alert.value == pytest.approx(value)
    assert alert.threshold == THRESHOLDS[name]
    assert check(history, {**THRESHOLDS, name: None}) == []
    assert check(history[:4], THRESHOLDS) == []


@pytest.mark.parametrize("name", MONITORS)
def test_its_warning_says_what_by_how_much_and_where_to_read_on(name: str) -> None:
    change, _ = WRONG[name]
    [alert] = check(run(change), THRESHOLDS)
    side = "below" if name in ("entropy_low", "tool_calls") else "above"
    assert f"{name} is {alert.value:.3g}, {side} {alert.threshold:.3g}" in alert.message
    assert MONITORS[name].cure in alert.message
    assert alert.message.endswith(f"docs/when_training_goes_wrong.md#{name}")


def test_no_metric_is_needed() -> None:
    assert check([{}], THRESHOLDS) == []
    assert check([{"learning_rate": 1e-5}] * STEPS, THRESHOLDS) == []
    masked = {"rollouts": 8.0, "rollouts/masked": 8.0, "groups": 1.0, "groups/zero_variance": 1.0}
    assert [alert.name for alert in check([masked], THRESHOLDS)] == ["zero_variance", "masked"]


@pytest.mark.parametrize("name", MONITORS)
def test_a_metric_that_is_gone_is_not_checked(name: str) -> None:
    change, _ = WRONG[name]
    history = [*run(change), {}]
    assert name == "tool_calls" or check(history, THRESHOLDS) == []


def test_a_threshold_that_is_met_is_not_crossed() -> None:
    assert check([{"truncated": 0.2}], {"truncated": 0.2}) == []
    assert check([{"entropy": 0.005}], {"entropy_low": 0.005}) == []


def test_nan_crosses() -> None:
    history = [{"entropy": math.nan, "kl": math.nan}]
    assert [a.name for a in check(history, THRESHOLDS)] == ["kl", "entropy_low"]


def test_groups_of_one_have_no_variance_to_miss() -> None:
    """The spread over all rollouts still says whether there is anything to learn."""
    alone = {"rollouts": 8.0, "groups": 8.0, "groups/zero_variance": 8.0, "reward/mean": 0.5}
    assert check([alone | {"reward/std": 0.5}] * STEPS, THRESHOLDS) == []
    [alert] = check([alone | {"reward/std": 0.0}] * STEPS, THRESHOLDS)
    assert alert.name == "flat_reward_steps"


def test_flat_groups_count_as_a_flat_reward_until_the_first_that_varies() -> None:
    flat = {"rollouts": 8.0, "groups": 2.0, "groups/zero_variance": 2.0, "reward/mean": 0.5}
    flat |= {"reward/std": 0.5}
    only = {"flat_reward_steps": 10.0}
    assert check([flat] * 10, only) == []
    assert check([flat] * 11, only)[0].value == 11
    assert check([*[flat] * 11, flat | {"groups/zero_variance": 1.0}, *[flat] * 11], only) == []


def test_a_reward_that_only_wavers_does_not_collapse() -> None:
    wavering = [{"reward/mean": 0.5 + 0.1 * math.sin(1.7 * step)} for step in range(200)]
    for step in range(1, 201):
        assert check(wavering[:step], {"reward_drop": 0.5}) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_it_warns_when_one_turns_and_again_while_it_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitors = Monitors({"truncated": 0.2}, stage="tools")
    counts, told = [], []
    for step in range(1, 51):
        caplog.clear()
        crossed = 3 <= step < 46 or step == 48
        counts.append(len(monitors.observe(step, {"truncated": 0.9 if crossed else 0.1})))
        if warnings(caplog):
            told.append(step)
            assert warnings(caplog)[0].startswith(f"tools step {step}: many rollouts are cut")
    assert REPEAT_STEPS == 20
    assert told == [3, 23, 43, 48]
    assert sum(counts) == 44 and counts[1:3] == [0, 1]


def test_a_step_without_the_metric_does_not_make_it_turn_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitors = Monitors({"clip_fraction": 0.3}, stage="rl")
    assert len(monitors.observe(1, {"clip_fraction": 0.5})) == 1
    assert monitors.observe(2, {}) == []
    assert len(monitors.observe(3, {"clip_fraction": 0.5})) == 1
    assert len(warnings(caplog)) == 1


def test_a_step_is_kept_as_it_was_observed() -> None:
    monitors, metrics = Monitors({"length_growth": 3.0}, stage="rl"), {"response_tokens/mean": 1.0}
    alerts = []
    for step in range(12):
        alerts = monitors.observe(step, metrics)
        metrics["response_tokens/mean"] += 1
    # (8 + 9 + 10 + 11 + 12) / 5 over (1 + 2 + 3 + 4 + 5) / 5
    assert alerts[0].value == pytest.approx(10 / 3)


def test_thresholds_of_unknown_monitors_are_refused() -> None:
    with pytest.raises(ValueError, match="no monitor truncation"):
        Monitors({"truncation": 0.2}, stage="rl")


def test_the_section_has_one_threshold_for_each() -> None:
    assert list(MonitorsConfig.model_fields) == list(MONITORS)
    everything_off = MonitorsConfig(**dict.fromkeys(MONITORS))
    assert set(everything_off.model_dump().values()) == {None}
    for wrong in ({"kl": 0.0}, {"truncated": 1.5}, {"length_growth": 0.5}, {"nothing": 1.0}):
        with pytest.raises(ValidationError):
            MonitorsConfig(**wrong)


async def test_the_environment_counts_calls_also_where_there_are_none() -> None:
    renderer = tagged()
    for lines, calls in ((["no call"], 0.0), (["<code>1</code>", "<code>x</code>", "2"], 2.0)):
        rollout = await tools_of(renderer).spawn().run(TASK, Speaker(lines, renderer))
        assert rollout.metrics["tool_calls"] == calls


# The page


def keys_of_a_config() -> set[str]:
    """Dotted names of sections and keys."""
    spec = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "scripts" / "config_reference.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = {f"monitors.{name}" for name in MONITORS}
    for leaf in script.leaves(TrainingConfig):
        parts = leaf.split(".")
        found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return found


DOTTED = re.compile(r"^[a-z][a-z_]*(?:\.[a-z_]+)+$")
FILES = re.compile(r"\.(?:jsonl|png|md|gz)$|^retrain\.")


def test_every_monitor_has_its_section() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert len(set(headings)) == len(headings)
    assert set(MONITORS) <= set(headings)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    targets = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert targets <= anchors
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| "))
    assert [anchor for anchor in anchors if f"(#{anchor})" not in table] == []


def test_every_key_that_the_page_and_the_warnings_name_exists() -> None:
    known = keys_of_a_config()
    spans = [span.split(":")[0] for span in re.findall(r"`([^`\n]+)`", PAGE)]
    named = {span for span in spans if DOTTED.match(span) and not FILES.search(span)}
    cures = " ".join(monitor.cure for monitor in MONITORS.values())
    named |= set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", cures))
    assert len(named) > 40
    assert sorted(named - known) == []


def test_every_section_of_a_monitor_names_its_cure() -> None:
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
    for name, monitor in MONITORS.items():
        keys = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", monitor.cure)
        for key in keys:
            assert key.rsplit(".", maxsplit=1)[-1] in sections[name], f"{name}: {key}"


BASE: dict[str, Any] = {
    "model": {"name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"},
    "environment": {"type": "smolagent", "tools": ["python"]},
    "prompt_source": {"type": "list", "prompts": [{"prompt": "2 + 2?", "answer": "4"}]},
    "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
}
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_is_part_of_a_config(text: str) -> None:
    part = YAML(typ="safe", pure=True).load(text)
    MonitorsConfig.model_validate(part.pop("monitors", {}))
    load_config(merge(BASE, part))


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 15


def test_monitors_of_groups_are_off_where_groups_are_not_compared() -> None:
    for name, off in (("grpo", False), ("ppo", True), ("reinforce_plus_plus", True)):
        config = {"model": {"name_or_path": "x"}, "algorithm": {"name": name}}
        found = thresholds(TrainingConfig.model_validate(config))
        assert found.keys() == MonitorsConfig.model_fields.keys()
        for monitor in ("zero_variance", "flat_reward_steps"):
            assert (found[monitor] is None) == off


def test_the_gap_is_not_watched_where_it_holds_what_was_learnt_since() -> None:
    for staleness, off in ((0, False), (1, True)):
        hyper = {"max_staleness": staleness, "correction": {"kind": "tis"}}
        config = {"model": {"name_or_path": "x"}, "algorithm": {"hyperparameters": hyper}}
        assert (thresholds(TrainingConfig.model_validate(config))["logprob_gap"] is None) == off
