"""`engine`: what samples from the policy."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from retrain.config.base import Section


class TorchEngineConfig(Section):
    """In the same process, from the very weights that train."""

    type: Literal["torch"] = "torch"
    max_slots: int = Field(128, ge=1)
    """Sequences decoded together."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads for decoding; by default torch's own number. One is best for tiny models."""
    context_limit: int | None = Field(None, ge=2)
    """Most tokens of a sequence; by default what the model's config says."""
    deterministic: bool | None = None
    """What a request gets depends on its own tokens and seed alone, to the bit, whatever its
    company and however long tools take: what exact resuming needs. True refuses to run where that
    cannot be had: it takes a CPU, and a model for which it proves true when the engine starts.
    False is faster where rollouts share long prompts. Null takes it where it can be had."""


class ServerEngineConfig(Section):
    """Inference servers, started by the run (`python`) or running already (`urls`)."""

    type: str
    python: str | None = None
    """Interpreter of the Python environment that has the server: the run starts it, watches it, and
    ends it."""
    urls: list[str] = Field(default_factory=list)
    """Of servers that run already, such as `http://127.0.0.1:8000`; nobody else should use them:
    what they are doing is interrupted whenever they are given weights."""
    replicas: int = Field(1, ge=1)
    """Servers to start."""
    devices: list[str] = Field(default_factory=list)
    """What each of them sees as CUDA_VISIBLE_DEVICES, such as `["1", "2,3"]`; by default what the
    run sees."""
    args: list[str] = Field(default_factory=list)
    """Further arguments of the server's command line."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further variables of the server's environment."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Until a server that was started has to be well."""
    context_limit: int | None = Field(None, ge=2)
    """Most tokens of a sequence; by default what the model's config says, and no more than the
    server's own limit."""
    max_concurrency: int = Field(256, ge=1)
    """Requests at one server at the same time; further ones wait."""
    weights: Literal["auto", "full", "lora"] = "auto"
    """What servers are given after each step: the whole model (a LoRA adapter merged into it), or
    the adapter alone, loaded beside the base model. `auto`: the adapter where there is one."""
    weights_dir: str | None = None
    """Where weights are left for servers to read: a directory that they see too, best in memory
    (/dev/shm), with room for three versions. By default in the run directory. They are removed
    at the end."""
    untie_embeddings: bool | None = None
    """Give servers a model with tied embeddings as an untied one, which costs them the memory of
    the output layer. vLLM on a CPU needs it: it would keep its old output layer. Null does so where
    the run starts a build for CPUs."""
    load_timeout_s: float = Field(600.0, gt=0)
    """Of a server's loading weights."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Most nats between a server's log-probability of a token and the policy's own, on a probe that
    is sampled after every update; more stops the run. By default 0.001 for a policy in float32, 0.1
    for others."""
    health_timeout_s: float = Field(10.0, gt=0)
    """A server that does not answer for this long, three times in a row, hangs: it is started
    again, or waited for."""
    max_restarts: int = Field(3, ge=0)
    """How often a server may fail, without answering a request in between, before it is given up;
    without any server left the run stops."""

    @field_validator("weights", mode="before")
    @classmethod
    def _built(cls, value: Any) -> Any:
        if value == "nccl":
            raise ValueError(
                "nccl is not built; weights go by a directory: full, or lora for an adapter alone"
            )
        return value

    @model_validator(mode="after")
    def _started_or_running(self) -> ServerEngineConfig:
        if bool(self.urls) == (self.python is not None):
            raise ValueError(
                "set python, the interpreter of an environment that has the server, or urls, of "
                "servers that run already" + ("; not both" if self.urls else "")
            )
        idle = self.changed("replicas", "devices", "args", "env", "start_timeout_s")
        if self.urls and idle:
            raise ValueError(
                f"{' and '.join(idle)}: nothing to act on, since the servers of urls are not "
                "started by the run; remove it"
            )
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError(f"urls: {url!r} is not a web address; write http://host:port")
        if len({url.rstrip("/").removesuffix("/v1") for url in self.urls}) < len(self.urls):
            raise ValueError("urls has one server twice")
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(
                f"devices has {len(self.devices)} entries for {self.replicas} replicas; give one "
                "for each"
            )
        if self.devices and "CUDA_VISIBLE_DEVICES" in self.env:
            raise ValueError("env.CUDA_VISIBLE_DEVICES does nothing beside devices; remove one")
        return self

    @model_validator(mode="after")
    def _arguments_of_its_own(self) -> ServerEngineConfig:
        for argument in self.args:
            flag = argument.partition("=")[0].replace("_", "-")
            if (why := _SET_BY_THE_RUN.get(flag)) is not None:
                raise ValueError(f"args: {flag} is set by the run{why}; remove it")
        return self


_SET_BY_THE_RUN = {
    "--host": ": a server that lets its weights be changed listens on this machine only",
    "--port": "",
    "--model": "",
    "--model-path": "",
    "--served-model-name": "",
    "--max-model-len": " (engine.context_limit)",
    "--context-length": " (engine.context_limit)",
    "--logprobs-mode": ": training needs log-probabilities after temperature",
}
"""Arguments of servers that cannot be given, and why."""


class VLLMEngineConfig(ServerEngineConfig):
    """vLLM, over HTTP."""

    type: Literal["vllm"] = "vllm"


class SGLangEngineConfig(ServerEngineConfig):
    """SGLang, over HTTP."""

    type: Literal["sglang"] = "sglang"


def _typed(value: Any) -> Any:
    """`torch` need not be said; what only gives text is refused."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "openai":
        raise ValueError(
            "openai gives text only, and training needs the token ids that were sampled, with "
            "their log-probabilities; use torch, vllm or sglang (an OpenAI-compatible endpoint can "
            "play a user: environment.user.type: openai)"
        )
    return {"type": "torch"} | value


EngineConfig = Annotated[
    Annotated[
        TorchEngineConfig | VLLMEngineConfig | SGLangEngineConfig, Field(discriminator="type")
    ],
    BeforeValidator(_typed),
]
