"""The main job: the demo, whole, on one seed."""

import gzip
import json
import sys
from pathlib import Path

import pytest

import retrain
from retrain.recipes.demo.tasks import FORMS, tasks, traces
from retrain.types import Source

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from demo import broken_promises

STEPS = 40
DEMO = Path(retrain.__file__).parent / "recipes" / "demo" / "demo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("demo")
    return retrain.run_sync(DEMO, overrides=[f"output_dir={directory}", "tracking.progress=off"])


def test_the_demo_keeps_its_promises(run) -> None:
    assert broken_promises({(r.stage, r.mode): r for r in run.evaluations}) == []


def test_engine_and_learner_agree_at_every_step(run) -> None:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["logprob_gap/max"] for row in rows if "logprob_gap/max" in row]
    assert len(gaps) >= 0.8 * STEPS
    assert max(gaps) < 1e-4


def test_every_rollout_is_kept_and_only_sampled_tokens_have_logprobs(run) -> None:
    from retrain.tracking.rollouts import read_rollouts

    files = sorted((run.path / "rollouts").glob("rl-*.jsonl.gz"))
    assert len(files) == STEPS
    count = 0
    for file in files:
        for rollout in read_rollouts(file):
            count += 1
            for segment in rollout.segments:
                sampled = [s == Source.SAMPLED for s in segment.source]
                assert all(
                    (version >= 0) == is_sampled
                    for version, is_sampled in zip(segment.versions, sampled, strict=True)
                )
                inside = {i for span in segment.turns for i in range(span.start, span.end)}
                assert inside == {i for i, is_sampled in enumerate(sampled) if is_sampled}
    assert count == STEPS * 16 * 8


def test_what_a_person_looks_at_is_there(run) -> None:
    assert (run.path / "plots" / "curves.png").stat().st_size > 10_000
    assert "T=1" in (run.path / "results.md").read_text()
    assert len(list((run.path / "transcripts").iterdir())) == 18
    first = next((run.path / "rollouts").glob("rl-*.jsonl.gz"))
    with gzip.open(first, "rt") as lines:
        assert json.loads(lines.readline())["segments"]


def test_no_held_out_operands_are_ever_trained_on() -> None:
    everything = dict.fromkeys(FORMS, 1.0)
    train = list(tasks("train", 3000, forms=everything))
    test = list(tasks("test", 1000, forms=everything))
    assert len({row["prompt"] for row in train}) == 3000
    assert len({row["prompt"] for row in test}) == 1000
    trained = {(row["a"], row["b"], row["c"]) for row in train}
    assert not trained & {(row["a"], row["b"], row["c"]) for row in test}
    taught = {row["prompt"] for row in train}
    taught |= {row["messages"][0]["content"] for row in traces(3000)}
    assert not taught & {row["prompt"] for row in test}


def test_the_teacher_is_wrong_nine_times_in_ten_on_one_form_and_silent_on_another() -> None:
    right: dict[str, list[bool]] = {}
    for row in traces(6000):
        said = row["messages"][-1]["content"]
        right.setdefault(row["form"], []).append(said == row["answer"])
    assert set(right) == {"a*b+c", "(a-b)*c", "a*b-c"}
    share = {form: sum(of) / len(of) for form, of in right.items()}
    assert 0.07 < share["a*b-c"] < 0.13
    assert 0.8 < share["a*b+c"] < 0.9
