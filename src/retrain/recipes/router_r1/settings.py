"""The recipe's parameters as dataclasses, and the config sections that they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Candidate:
    """One model of the pool."""

    name: str
    """As the policy has to write it."""
    model: str
    """As its server calls it."""
    price: float
    """Of a million output tokens, in dollars."""
    about: str
    """What the prompt says of it."""
    temperature: float = 0.0


PUBLISHED_POOL = (
    Candidate(
        "Qwen2.5-7B-Instruct",
        "qwen/qwen2.5-7b-instruct",
        0.3,
        "a 7B model that follows instructions closely; solid in maths, code and structured output, "
        "and at home in many languages.",
    ),
    Candidate(
        "LLaMA-3.1-70B-Instruct",
        "meta/llama-3.1-70b-instruct",
        0.88,
        "a large general model; broad factual knowledge and careful answers to questions that "
        "join several facts.",
    ),
    Candidate(
        "LLaMA-3.1-8B-Instruct",
        "meta/llama-3.1-8b-instruct",
        0.18,
        "a small and cheap general model; fine for everyday questions and short summaries.",
    ),
    Candidate(
        "Mistral-7B-Instruct",
        "mistralai/mistral-7b-instruct-v0.3",
        0.2,
        "a small and quick model for plain text tasks and simple lookups.",
    ),
    Candidate(
        "Mixtral-8x22B-Instruct",
        "mistralai/mixtral-8x22b-instruct-v0.1",
        1.2,
        "a large mixture of experts; strong in reasoning and European languages, and the dearest.",
    ),
    Candidate(
        "Gemma-2-27B-it",
        "google/gemma-2-27b-it",
        0.8,
        "a 27B model; balanced knowledge, clear explanations, good at understanding questions.",
        temperature=0.1,
    ),
)
"""The six models of the published runs with their prices; the descriptions are ours."""


@dataclass(frozen=True)
class RouterConfig:
    """What the recipe can be told; `sections()` is the part of a config that it stands for."""

    url: str = "http://127.0.0.1:8001/v1"
    """Of the OpenAI-compatible API behind which the pool stands."""
    api_key_env: str | None = None
    """The environment variable that holds its key."""
    pool: tuple[Candidate, ...] = PUBLISHED_POOL
    alpha: float = 0.0
    """The cost coefficient; the published runs use 0 and 0.6 to 0.9."""
    metric: Literal["em", "f1"] = "em"
    window: int = 1000
    """Training rollouts whose costs a new one is compared with."""
    max_routes: int = 4
    """Turns that may route; one more may only answer."""
    max_tokens: int = 512
    """Of a routed model's reply."""
    timeout_s: float = 60.0
    """Of one attempt at it."""
    seed: int = 42
    """Sent with every request."""
    published_names: bool = True
    """Names are read by the published implementation's rule."""

    def models(self) -> list[dict[str, Any]]:
        """The pool, as `RouteTool` takes it."""
        shared: dict[str, Any] = {
            "url": self.url,
            "max_tokens": self.max_tokens,
            "timeout_s": self.timeout_s,
            "seed": self.seed,
        }
        if self.api_key_env is not None:
            shared["api_key_env"] = self.api_key_env
        own = [{k: v for k, v in asdict(one).items() if k != "about"} for one in self.pool]
        return [one | shared for one in own]

    def environment(self) -> dict[str, Any]:
        route = {
            "name": "retrain.recipes.router_r1.route:RouteTool",
            "params": {"models": self.models(), "published_names": self.published_names},
        }
        return {
            "type": "smolagent",
            "tools": [route],
            "tool_format": {
                "type": "tags",
                "tool_start": "<search>",
                "tool_end": "</search>",
                "response_start": "\n\n<information>",
                "response_end": "</information>\n\n",
                "answer_end": "</answer>",
            },
            "max_steps": self.max_routes + 1,
            "max_tool_calls": self.max_routes,
        }

    def reward_setup(self) -> dict[str, Any]:
        """The reward, and the answer alone beside it with weight 0, for evaluations."""
        names = None if self.published_names else [one.name for one in self.pool]
        params = {"alpha": self.alpha, "metric": self.metric, "window": self.window}
        router = {
            "function": "retrain.recipes.router_r1.reward:RouterReward",
            "params": params if names is None else params | {"models": names},
        }
        answer = {"function": "retrain.recipes.router_r1.reward:router_em", "weight": 0.0}
        return {"rollout_reward_configs": {"router": router, "em": answer}}

    def prompt_template(self) -> str:
        """The protocol in words, for `prompt_source.prompt_template`."""
        described = "\n".join(f"- {one.name}: {one.about}" for one in self.pool)
        return PROMPT.format(models=described, routes=self.max_routes)

    def sections(self) -> dict[str, Any]:
        """What `retrain.load_config` takes over: environment and rewards."""
        return {"environment": self.environment(), "reward_setup": self.reward_setup()}


PROMPT = """\
Find the answer to the question at the end. You may consult other language models on the way.

Write in this order, and nothing outside the tags:
1. <think> your reasoning </think>: what you know, what is missing, and who may know it. Begin with
it, and come back to it after everything that you are told.
2. <search> name : request </search> to consult one model, at most {routes} times. Write one of the
names below exactly, then one colon, then a question that can be understood alone, without another
colon and without the model's name. Its reply follows between <information> and </information>; do
not write those tags yourself.
3. <answer> the answer </answer> once you are sure: a few words, no explanation. It ends the task,
so write it once. For the question who wrote Faust: <answer> Goethe </answer>

A model costs more the more it writes and the larger it is. Consult nobody about what you know.

Models:
{models}

Question: {{prompt}}
"""
"""The same protocol as the published prompt, in words of our own."""
