"""vLLM's HTTP API, as `vllm serve` and `python -m vllm.entrypoints.openai.api_server` have it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.engines.server.dialect import (
    ADAPTER,
    CONTROL_S,
    FULL,
    GENERATE,
    INTERRUPT,
    LORA,
    POLICY,
    PROBE_S,
    Answer,
    Ask,
    Facts,
    Interrupted,
    Launch,
    Malformed,
    Reason,
    columns,
    served_paths,
)
from retrain.engines.server.http import Refused, Server, Unreachable

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""

_DEVELOPMENT = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"


class VLLM:
    name = "vllm"
    module = "vllm"

    def command(self, launch: Launch) -> list[str]:
        command = [
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(launch.model), "--served-model-name", POLICY),
            *("--host", "127.0.0.1", "--port", str(launch.port)),
            *("--dtype", launch.dtype, "--max-model-len", str(launch.context_limit)),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        ]
        if launch.lora_rank is not None:
            rank = next((r for r in LORA_RANKS if r >= launch.lora_rank), launch.lora_rank)
            command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        if launch.cpu:
            # A seeded request whose prompt is read in two steps ends the server: it would set back
            # its generator, which CPU generators cannot do.
            command += ["--no-enable-chunked-prefill", "--enforce-eager"]
        return [*command, *launch.args]

    def environment(self) -> dict[str, str]:
        return {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }

    async def facts(self, server: Server) -> Facts:
        paths = await served_paths(server)
        listed = await server.get("/v1/models", PROBE_S)
        model = _first_model(server, listed)
        about = await server.get("/version", PROBE_S)
        config = await _config(server, paths)
        return Facts(
            server=self.name,
            version=str(about.get("version", "unknown")) if isinstance(about, dict) else "unknown",
            model=str(model["id"]),
            context_limit=model.get("max_model_len"),
            dtype=_part(config, "model_config", "dtype"),
            can={
                GENERATE: "/v1/completions" in paths,
                INTERRUPT: {"/pause", "/resume"} <= paths,
                FULL: {"/collective_rpc", "/reset_prefix_cache"} <= paths,
                LORA: {"/v1/load_lora_adapter", "/reset_prefix_cache"} <= paths
                and (config is None or config.get("lora_config") is not None),
            },
            advice={
                GENERATE: "it serves no /v1/completions",
                INTERRUPT: _DEVELOPMENT,
                FULL: _DEVELOPMENT,
                LORA: "start it with --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
                "and VLLM_SERVER_DEV_MODE=1 in its environment",
            },
        )

    async def generate(self, server: Server, ask: Ask) -> Answer:
        body: dict[str, Any] = {
            "model": ask.model,
            "prompt": list(ask.token_ids),
            "max_tokens": ask.max_tokens,
            "temperature": ask.params.temperature,
            "top_p": ask.params.top_p,
            "top_k": ask.params.top_k,
            "seed": ask.seed,
            "stop_token_ids": list(ask.params.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            # Tags may be special tokens: a text without them would never have them as its end.
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "include_stop_str_in_output": True,
        }
        if ask.params.stop:
            body["stop"] = list(ask.params.stop)
        choice = _choice(server, await server.post("/v1/completions", body))
        reason = _reason(server, choice)
        if reason == "aborted" and not choice.get("token_ids"):
            return Answer(array("i"), array("f"), reason)
        logprobs = choice.get("logprobs") or {}
        ids, found = columns(server, choice.get("token_ids"), logprobs.get("token_logprobs"))
        return Answer(ids, found, reason)

    async def score(self, server: Server, model: str, token_ids: Sequence[int]) -> array[float]:
        body = {
            "model": model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        choice = _choice(server, await server.post("/v1/completions", body))
        if _reason(server, choice) == "aborted":
            raise Interrupted(f"{server.url} was paused while it scored")
        rows = choice.get("prompt_logprobs") or []
        try:
            scored = [
                row[str(token)]["logprob"]
                for token, row in zip(token_ids[1:], rows[1:], strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            raise Malformed(f"{server.url} scored other tokens than it was given") from None
        return array("f", [0.0, *scored])

    async def pause(self, server: Server) -> None:
        await server.post("/pause?mode=abort", None, CONTROL_S)

    async def load(self, server: Server, path: Path, version: int, timeout_s: float) -> None:
        await server.post(
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(path)}},
            timeout_s,
        )
        await self._loaded(server, version)

    async def load_adapter(
        self, server: Server, path: Path, version: int, timeout_s: float
    ) -> None:
        await server.post(
            "/v1/load_lora_adapter",
            {"lora_name": ADAPTER, "lora_path": str(path), "load_inplace": True},
            timeout_s,
        )
        await self._loaded(server, version)

    async def _loaded(self, server: Server, version: int) -> None:
        """Forget what was computed under the weights before."""
        answer = await server.post(
            "/reset_prefix_cache?reset_running_requests=true", None, CONTROL_S
        )
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Malformed(f"{server.url} kept its prefix cache, which is of earlier weights")
        try:
            await server.post("/update_weight_version", {"new_version": str(version)}, CONTROL_S)
        except Refused as error:
            if error.status != 404:
                raise

    async def resume(self, server: Server) -> None:
        await server.post("/resume", None, CONTROL_S)


async def _config(server: Server, paths: frozenset[str]) -> Mapping[str, Any] | None:
    """What it was started with, such as whether it takes adapters, which its paths do not say; None
    where the server does not tell."""
    if "/server_info" not in paths:
        return None
    try:
        answer = await server.get("/server_info?config_format=json", CONTROL_S)
    except (Unreachable, Refused):
        return None
    found = answer.get("vllm_config") if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else None


def _part(config: Mapping[str, Any] | None, section: str, key: str) -> str | None:
    inside = (config or {}).get(section)
    value = inside.get(key) if isinstance(inside, dict) else None
    return None if value is None else str(value).removeprefix("torch.")


def _first_model(server: Server, listed: Any) -> Mapping[str, Any]:
    models = listed.get("data") if isinstance(listed, dict) else None
    for model in models or []:
        if isinstance(model, dict) and model.get("parent") is None and "id" in model:
            return model
    raise Malformed(f"{server.url}/v1/models lists no model")


def _choice(server: Server, answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices[0], dict):
        raise Malformed(f"{server.url}/v1/completions gave no choice")
    found: Mapping[str, Any] = choices[0]
    return found


def _reason(server: Server, choice: Mapping[str, Any]) -> Reason:
    finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if finish == "stop":
        return "stop_string" if isinstance(stop, str) else "stop_token"
    if finish == "length":
        return "length"
    if finish == "abort":
        return "aborted"
    raise Malformed(f"{server.url} ended a request for the reason {finish!r}")
