"""vLLM's HTTP interface, as version 0.32 answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_servers.backend import Backend, Job
from engine_servers.chat import chat_routes
from engine_servers.wire import Answer, Call, Dialect, Routes

VERSION = "0.32.0"

MAX_LOGPROBS = 20
"""What `--max-logprobs` is by default."""


class Refused(Exception):
    """An error answer."""

    def __init__(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        self.answer = Answer(status, error(status, message, kind, param))


def error(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class VLLM(Dialect):
    """
    Args:
        name: of the model, as it is asked for.
        environment: `VLLM_SERVER_DEV_MODE` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING` decide which
            paths there are.
        logprobs_mode: `processed_logprobs` is after temperature, `raw_logprobs` (vLLM's default)
            before it.
    """

    generating = frozenset({"/v1/completions", "/v1/chat/completions"})

    def __init__(
        self,
        backend: Backend,
        *,
        name: str = "policy",
        environment: Mapping[str, str] | None = None,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self.backend = backend
        self.name = name
        self.logprobs_mode = logprobs_mode
        self.weight_version = "default"
        environment = environment or {}
        self._dev = environment.get("VLLM_SERVER_DEV_MODE") == "1"
        self._lora = environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") in ("1", "True", "true")

    def routes(self) -> Routes:
        routes: Routes = {
            ("GET", "/health"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): self._completions,
            **chat_routes(self.backend, self.name),
        }
        if self._dev:
            routes |= {
                ("POST", "/pause"): self._pause,
                ("POST", "/resume"): self._resume,
                ("GET", "/is_paused"): self._is_paused,
                ("POST", "/abort_requests"): self._abort_requests,
                ("POST", "/collective_rpc"): self._collective_rpc,
                ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
                ("POST", "/update_weight_version"): self._update_weight_version,
                ("GET", "/weight_info"): self._weight_info,
                ("GET", "/server_info"): self._server_info,
            }
        if self._lora:
            routes |= {
                ("POST", "/v1/load_lora_adapter"): self._load_lora,
                ("POST", "/v1/unload_lora_adapter"): self._unload_lora,
            }
        return routes

    def without(self, answer: Any, name: str) -> Any:
        choices = [{k: v for k, v in c.items() if k != name} for c in answer.get("choices", [])]
        return {k: v for k, v in (answer | {"choices": choices}).items() if k != name}

    def failure(self, message: str) -> Any:
        return error(500, message, "InternalServerError")

    async def _health(self, _: Call) -> Answer:
        return Answer()

    async def _version(self, _: Call) -> Answer:
        return Answer(body={"version": VERSION})

    async def _models(self, _: Call) -> Answer:
        cards = [(self.name, str(self.backend.directory), None, self.backend.context_limit)]
        cards += [(a.name, a.path, self.name, None) for a in self.backend.adapters.values()]
        data = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": root,
                "parent": parent,
                "max_model_len": limit,
                "permission": [],
            }
            for name, root, parent, limit in cards
        ]
        return Answer(body={"object": "list", "data": data})

    async def _completions(self, call: Call) -> Answer:
        try:
            job = self._job(call.body)
        except Refused as refused:
            return refused.answer
        await self.backend.generate(job)
        return Answer(body=await self._completion(job, call.body))

    def _job(self, body: dict[str, Any]) -> Job:
        backend = self.backend
        name = body.get("model") or self.name
        if name != self.name and name not in backend.adapters:
            message = f"The model `{name}` does not exist. Valid aliases: {self.name}."
            raise Refused(404, message, "NotFoundError", "model")
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            prompt = backend.tokenizer.encode(prompt)
        if not prompt or not all(isinstance(token, int) for token in prompt):
            raise Refused(400, "one prompt of text or token ids is served here", "Bad Request")
        limit, most = backend.context_limit, body.get("max_tokens") or 16
        if max(prompt) >= backend.vocab_size:
            raise Refused(400, f"Token id {max(prompt)} is out of vocabulary")
        if most > limit:
            message = f"max_tokens={most} cannot be greater than max_model_len={limit}."
            raise Refused(400, message, param="max_tokens")
        if len(prompt) > limit:
            message = (
                f"This model's maximum context length is {limit} tokens, but the prompt has "
                f"{len(prompt)} input tokens."
            )
            raise Refused(400, message, param="input_tokens")
        if len(prompt) == limit:
            raise Refused(400, "max_tokens must be at least 1, got 0.", param="max_tokens")
        if (asked := body.get("prompt_logprobs") or 0) > MAX_LOGPROBS:
            message = (
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: "
                f"{MAX_LOGPROBS}"
            )
            raise Refused(400, message, param="prompt_logprobs")
        if not -(2**63) <= (body.get("seed") or 0) < 2**63:
            raise Refused(400, "1 validation error: seed is no int64", "Bad Request", "body.seed")
        return self._sampling(body, prompt, min(most, limit - len(prompt)), name)

    def _sampling(self, body: dict[str, Any], prompt: list[int], most: int, name: str) -> Job:
        def given(key: str, default: Any) -> Any:
            return default if body.get(key) is None else body[key]

        stop = given("stop", [])
        seed = body.get("seed")
        job = Job(
            prompt,
            most,
            temperature=given("temperature", 1.0),
            top_p=given("top_p", 1.0),
            top_k=max(0, given("top_k", 0)),
            seed=uuid.uuid4().int if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=frozenset(given("stop_token_ids", [])),
            eos=frozenset() if body.get("ignore_eos") else self.backend.eos,
            skip_special_tokens=given("skip_special_tokens", True),
            adapter=self.backend.adapters.get(name),
            reads_cache=body.get("prompt_logprobs") is None,
            id=given("request_id", uuid.uuid4().hex),
        )
        if job.temperature < 0 or not 0 < job.top_p <= 1:
            raise Refused(400, f"temperature {job.temperature}, top_p {job.top_p} out of range")
        return job

    async def _completion(self, job: Job, body: dict[str, Any]) -> dict[str, Any]:
        ids = job.token_ids
        choice = {
            "index": 0,
            "text": said(self.backend, job, bool(body.get("include_stop_str_in_output"))),
            "logprobs": await self._logprobs(job) if body.get("logprobs") is not None else None,
            "finish_reason": {"length": "length", "abort": "abort"}.get(str(job.reason), "stop"),
            "stop_reason": None if job.reason == "eos" else job.matched,
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_logprobs": None,
            "prompt_token_ids": job.prompt if body.get("return_token_ids") else None,
            "routed_experts": None,
        }
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = await self._prompt_logprobs(job, body["prompt_logprobs"])
        return {
            "id": f"cmpl-{job.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name if job.adapter is None else job.adapter.name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(job.prompt),
                "total_tokens": len(job.prompt) + len(ids),
                "completion_tokens": len(ids),
                "prompt_tokens_details": None,
            },
            "kv_transfer_params": None,
        }

    async def _logprobs(self, job: Job) -> dict[str, Any]:
        found = job.logprobs
        if self.logprobs_mode == "raw_logprobs" and job.temperature not in (0.0, 1.0):
            assert job.weights is not None
            scores = await self.backend.score(job.prompt + job.token_ids, job.weights)
            found = list(scores[len(job.prompt) :])
        tokens = [self.backend.text([t], skip_special_tokens=False) for t in job.token_ids]
        offsets = [len("".join(tokens[:i])) for i in range(len(tokens))]
        top = [{token: logprob} for token, logprob in zip(tokens, found, strict=True)]
        return {
            "text_offset": offsets,
            "token_logprobs": found,
            "tokens": tokens,
            "top_logprobs": top,
        }

    async def _prompt_logprobs(self, job: Job, k: int) -> list[Any]:
        """The `k` likeliest and the prompt's own, of the distribution before temperature, whatever
        the mode; None for the first. The own one has rank k + 1 where it is not among them."""
        assert job.weights is not None
        scores = await self.backend.score(job.prompt, job.weights)
        rows: list[list[tuple[int, float]]] = [[] for _ in job.prompt[1:]]
        if k:
            rows = await self.backend.likeliest(job.prompt, job.weights, k)
        found: list[Any] = [None]
        for token, logprob, row in zip(job.prompt[1:], scores[1:], rows, strict=True):
            ranks = {likely: rank for rank, (likely, _) in enumerate(row, 1)}
            entries = {token: logprob} | dict(row)
            found.append(
                {
                    str(entry): {
                        "logprob": value,
                        "rank": ranks.get(entry, k + 1),
                        "decoded_token": self.backend.text([entry], skip_special_tokens=False),
                    }
                    for entry, value in entries.items()
                }
            )
        return found

    async def _pause(self, call: Call) -> Answer:
        mode = call.query.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            return Answer(400, error(400, f"1 validation error: mode {mode}", "Bad Request"))
        await self.backend.pause("all" if mode == "keep" else "new")
        if mode == "abort":
            self.backend.abort()
        if mode != "keep":
            await self.backend.drain()
            if call.query.get("clear_cache", "true") != "false":
                await self.backend.reset_cache(running=False)
        return Answer(body={"status": "paused"})

    async def _resume(self, _: Call) -> Answer:
        await self.backend.resume()
        return Answer(body={"status": "resumed"})

    async def _is_paused(self, _: Call) -> Answer:
        return Answer(body={"is_paused": self.backend.paused != "no"})

    async def _abort_requests(self, call: Call) -> Answer:
        ids = (call.body or {}).get("request_ids")
        count = sum(self.backend.abort(id=i) for i in ids) if ids else self.backend.abort()
        return Answer(body={"status": "aborted", "aborted": count})

    async def _collective_rpc(self, call: Call) -> Answer:
        if not isinstance(call.body, dict) or "method" not in call.body:
            return Answer(400, error(400, "Missing 'method' in request body", "Bad Request"))
        if call.body["method"] != "reload_weights":
            return Answer(500, self.failure(f"no method {call.body['method']}"))
        path = (call.body.get("kwargs") or {}).get("weights_path") or self.backend.directory
        await self.backend.reload(Path(path))
        return Answer(body={"results": [None]})

    async def _reset_prefix_cache(self, call: Call) -> Answer:
        running = call.query.get("reset_running_requests", "false").lower() in ("true", "1")
        return Answer(body={"success": await self.backend.reset_cache(running=running)})

    async def _update_weight_version(self, call: Call) -> Answer:
        self.weight_version = call.body["new_version"]
        return Answer(body={"success": True, "new_version": self.weight_version})

    async def _weight_info(self, _: Call) -> Answer:
        return Answer(body={"weight_version": self.weight_version})

    async def _server_info(self, call: Call) -> Answer:
        config: Any = {
            "model_config": {
                "model": str(self.backend.directory),
                "max_model_len": self.backend.context_limit,
                "logprobs_mode": self.logprobs_mode,
                "dtype": "torch.float32",
            },
            "lora_config": {"max_lora_rank": rank} if (rank := self.backend.lora_rank) else None,
        }
        if call.query.get("config_format", "text") == "text":
            config = str(config)
        return Answer(body={"vllm_config": config, "vllm_env": {}, "system_env": {}})

    async def _load_lora(self, call: Call) -> Answer:
        name, path = call.body.get("lora_name"), call.body.get("lora_path")
        if not name or not path:
            message = "Both 'lora_name' and 'lora_path' must be provided."
            return Answer(400, error(400, message, "InvalidUserInput"))
        if name == self.name:
            return Answer(400, error(400, f"'{name}' is a served base model", "InvalidUserInput"))
        if name in self.backend.adapters and not call.body.get("load_inplace"):
            message = f"The lora adapter '{name}' has already been loaded."
            return Answer(400, error(400, message, "InvalidUserInput"))
        if not Path(path, "adapter_config.json").is_file():
            return Answer(404, error(404, f"No adapter found for {path}", "NotFoundError"))
        self.backend.add_adapter(name, path)
        return Answer(body=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_lora(self, call: Call) -> Answer:
        name = call.body.get("lora_name")
        if name not in self.backend.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            return Answer(404, error(404, message, "NotFoundError"))
        del self.backend.adapters[name]
        return Answer(body=f"Success: LoRA adapter '{name}' removed successfully.")


def said(backend: Backend, job: Job, with_stop: bool) -> str:
    """The text of a completion, without what ended it unless `with_stop`."""
    ids = job.token_ids
    if job.reason in ("eos", "stop_token") and not with_stop:
        ids = ids[:-1]
    text = backend.text(ids, skip_special_tokens=job.skip_special_tokens)
    if job.reason == "stop_string":
        end = text.index(str(job.matched))
        text = text[: end + len(str(job.matched)) if with_stop else end]
    return text
