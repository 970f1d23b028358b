"""SGLang's native HTTP API, as `python -m sglang.launch_server` has it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
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
from retrain.engines.server.http import Refused, Server

_NEWER = "its version is too old"
_ALL_TOKENS = 1 << 30
"""As `top_k`: off."""


class SGLang:
    name = "sglang"
    module = "sglang"

    def command(self, launch: Launch) -> list[str]:
        command = [
            *("-m", "sglang.launch_server"),
            *("--model-path", str(launch.model), "--served-model-name", POLICY),
            *("--host", "127.0.0.1", "--port", str(launch.port)),
            *("--dtype", launch.dtype, "--context-length", str(launch.context_limit)),
        ]
        if launch.lora_rank is not None:
            command += ["--enable-lora", "--max-loras-per-batch", "2"]
            command += ["--max-lora-rank", str(launch.lora_rank), "--lora-target-modules", "all"]
        return [*command, *launch.args]

    def environment(self) -> dict[str, str]:
        return {}

    async def facts(self, server: Server) -> Facts:
        paths = await served_paths(server)
        about = await _first_of(server, paths, "/get_server_info", "/server_info")
        model = await _first_of(server, paths, "/get_model_info", "/model_info")
        limit = about.get("context_length") or about.get("max_req_input_len")
        return Facts(
            server=self.name,
            version=str(about.get("version", "unknown")),
            model=str(model.get("model_path", "unknown")),
            context_limit=limit if isinstance(limit, int) else None,
            dtype=str(about["dtype"]) if "dtype" in about else None,
            can={
                GENERATE: "/generate" in paths,
                INTERRUPT: {"/pause_generation", "/continue_generation"} <= paths,
                FULL: "/update_weights_from_disk" in paths,
                LORA: "/load_lora_adapter" in paths and bool(about.get("enable_lora", True)),
            },
            advice={
                GENERATE: "it serves no /generate",
                INTERRUPT: _NEWER,
                FULL: _NEWER,
                LORA: "start it with --enable-lora, --max-lora-rank and --lora-target-modules",
            },
        )

    async def generate(self, server: Server, ask: Ask) -> Answer:
        sampling: dict[str, Any] = {
            "max_new_tokens": ask.max_tokens,
            "temperature": ask.params.temperature,
            "top_p": ask.params.top_p,
            "top_k": ask.params.top_k or _ALL_TOKENS,
            "stop_token_ids": list(ask.params.stop_token_ids),
            "ignore_eos": True,
            "sampling_seed": ask.seed % 2**31,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "no_stop_trim": True,
        }
        if ask.params.stop:
            sampling["stop"] = list(ask.params.stop)
        answer = await self._ask(
            server, ask.model, {"input_ids": list(ask.token_ids), "sampling_params": sampling}
        )
        about = answer["meta_info"]
        reason = _reason(server, about.get("finish_reason"))
        if reason == "aborted" and not about.get("output_token_logprobs"):
            return Answer(array("i"), array("f"), reason)
        ids, found = columns(server, *_unzip(server, about.get("output_token_logprobs")))
        return Answer(ids, found, reason)

    async def score(self, server: Server, model: str, token_ids: Sequence[int]) -> array[float]:
        answer = await self._ask(
            server,
            model,
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "logprob_start_len": 0,
            },
        )
        if _reason(server, answer["meta_info"].get("finish_reason")) == "aborted":
            raise Interrupted(f"{server.url} was paused while it scored")
        scored = answer["meta_info"].get("input_token_logprobs")
        ids, found = _unzip(server, scored)
        if ids != list(token_ids):
            raise Malformed(f"{server.url} scored other tokens than it was given")
        return array("f", [0.0, *columns(server, ids[1:], found[1:])[1]])

    async def _ask(self, server: Server, model: str, body: dict[str, Any]) -> dict[str, Any]:
        body |= {"return_logprob": True}
        if model == ADAPTER:
            body["lora_path"] = ADAPTER
        answer = await server.post("/generate", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("meta_info"), dict):
            raise Malformed(f"{server.url}/generate gave no meta_info")
        return answer

    async def pause(self, server: Server) -> None:
        await server.post("/pause_generation", {"mode": "abort"}, CONTROL_S)

    async def load(self, server: Server, path: Path, version: int, timeout_s: float) -> None:
        body = {"model_path": str(path), "weight_version": str(version), "flush_cache": True}
        _check(server, await server.post("/update_weights_from_disk", body, timeout_s))

    async def load_adapter(
        self, server: Server, path: Path, version: int, timeout_s: float
    ) -> None:
        try:
            await server.post("/unload_lora_adapter", {"lora_name": ADAPTER}, timeout_s)
        except Refused as error:
            if error.status >= 500:  # 400: it was never loaded
                raise
        body = {"lora_name": ADAPTER, "lora_path": str(path)}
        _check(server, await server.post("/load_lora_adapter", body, timeout_s))
        await server.post("/flush_cache", None, CONTROL_S)

    async def resume(self, server: Server) -> None:
        await server.post("/continue_generation", {}, CONTROL_S)


async def _first_of(server: Server, paths: frozenset[str], *names: str) -> dict[str, Any]:
    for name in names:
        if name in paths:
            answer = await server.get(name, PROBE_S)
            return answer if isinstance(answer, dict) else {}
    return {}


def _unzip(server: Server, scored: Any) -> tuple[list[int], list[Any]]:
    """From [[log-probability, id, text], ...]."""
    try:
        return [int(row[1]) for row in scored], [row[0] for row in scored]
    except (TypeError, IndexError, ValueError):
        raise Malformed(f"{server.url} gave no token log-probabilities") from None


def _check(server: Server, answer: Any) -> None:
    if isinstance(answer, dict) and answer.get("success") is False:
        raise Refused(server.url, 400, str(answer.get("message") or answer.get("error_message")))


def _reason(server: Server, finish: Any) -> Reason:
    kind = finish.get("type") if isinstance(finish, dict) else None
    if kind == "stop":
        return "stop_string" if isinstance(finish.get("matched"), str) else "stop_token"
    if kind == "length":
        return "length"
    if kind == "abort":
        return "aborted"
    raise Malformed(f"{server.url} ended a request for the reason {finish!r}")
