"""SGLang's native HTTP interface, as version 0.5 answers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from engine_servers.backend import Backend, Job
from engine_servers.chat import chat_routes
from engine_servers.vllm import said
from engine_servers.wire import Answer, Call, Dialect, Routes

VERSION = "0.5.23"


class SGLang(Dialect):
    generating = frozenset({"/generate", "/v1/chat/completions"})

    def __init__(self, backend: Backend, *, name: str = "policy") -> None:
        self.backend = backend
        self.name = name
        self.weight_version = "default"
        self._pause_mode = ""

    def routes(self) -> Routes:
        return {
            ("GET", "/health"): self._health,
            ("GET", "/get_model_info"): self._model_info,
            ("GET", "/model_info"): self._model_info,
            ("GET", "/get_server_info"): self._server_info,
            ("GET", "/server_info"): self._server_info,
            ("POST", "/generate"): self._generate,
            ("POST", "/abort_request"): self._abort_request,
            ("POST", "/pause_generation"): self._pause,
            ("POST", "/continue_generation"): self._continue,
            ("POST", "/update_weights_from_disk"): self._update_weights,
            ("POST", "/flush_cache"): self._flush_cache,
            ("GET", "/flush_cache"): self._flush_cache,
            ("POST", "/load_lora_adapter"): self._load_lora,
            ("POST", "/unload_lora_adapter"): self._unload_lora,
            **chat_routes(self.backend, self.name),
        }

    def without(self, answer: Any, name: str) -> Any:
        answer = {key: value for key, value in answer.items() if key != name}
        if "meta_info" in answer:
            answer["meta_info"] = {k: v for k, v in answer["meta_info"].items() if k != name}
        return answer

    def failure(self, message: str) -> Any:
        return {"error": {"message": message}}

    async def _health(self, _: Call) -> Answer:
        return Answer()

    async def _model_info(self, _: Call) -> Answer:
        return Answer(
            body={
                "model_path": str(self.backend.directory),
                "tokenizer_path": str(self.backend.directory),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.weight_version,
            }
        )

    async def _server_info(self, _: Call) -> Answer:
        return Answer(
            body={
                "model_path": str(self.backend.directory),
                "served_model_name": self.name,
                "context_length": self.backend.context_limit,
                "enable_lora": self.backend.lora_rank > 0,
                "max_total_num_tokens": 64 * self.backend.context_limit,
                "max_req_input_len": self.backend.context_limit - 1,
                "version": VERSION,
            }
        )

    async def _generate(self, call: Call) -> Answer:
        body = call.body
        try:
            job = self._job(body)
        except ValueError as error:
            return Answer(400, {"error": {"message": str(error)}})
        await self.backend.generate(job)
        return Answer(body=await self._answer(job, body))

    def _job(self, body: dict[str, Any]) -> Job:
        """
        Raises:
            ValueError: the request is refused.
        """
        backend, params = self.backend, body.get("sampling_params") or {}
        prompt = body.get("input_ids")
        prompt = backend.tokenizer.encode(body["text"]) if prompt is None else prompt
        most, limit = params.get("max_new_tokens", 128), backend.context_limit
        if not prompt or max(prompt) >= backend.vocab_size:
            raise ValueError("The input_ids are empty, or outside the vocabulary.")
        if len(prompt) >= limit:
            raise ValueError(
                f"The input ({len(prompt)} tokens) does not fit the model's context length "
                f"({limit} tokens)."
            )
        if len(prompt) + most > limit:
            raise ValueError(
                f"Requested token count exceeds the model's maximum context length of {limit} "
                f"tokens: {len(prompt)} of input and {most} of completion."
            )
        name = body.get("lora_path")
        if name is not None and name not in backend.adapters:
            raise ValueError(f"The LoRA adapter {name} is not loaded.")
        seed, stop = params.get("sampling_seed"), params.get("stop") or ()
        return Job(
            prompt,
            most,
            temperature=params.get("temperature", 1.0),
            top_p=params.get("top_p", 1.0),
            top_k=max(0, params.get("top_k", -1)),
            seed=uuid.uuid4().int if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=frozenset(params.get("stop_token_ids") or ()),
            eos=frozenset() if params.get("ignore_eos") else backend.eos,
            skip_special_tokens=params.get("skip_special_tokens", True),
            adapter=None if name is None else backend.adapters[name],
            id=body.get("rid") or uuid.uuid4().hex,
        )

    async def _answer(self, job: Job, body: dict[str, Any]) -> dict[str, Any]:
        finish: dict[str, Any] = {"type": "stop", "matched": job.matched}
        if job.reason == "length":
            finish = {"type": "length", "length": len(job.token_ids)}
        elif job.reason == "abort":
            finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        meta: dict[str, Any] = {
            "id": job.id,
            "finish_reason": finish,
            "prompt_tokens": len(job.prompt),
            "completion_tokens": len(job.token_ids),
            "cached_tokens": 0,
            "weight_version": self.weight_version,
            "e2e_latency": 0.01,
        }
        if body.get("return_logprob"):
            pairs = zip(job.logprobs, job.token_ids, strict=True)
            meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
            meta["input_token_logprobs"] = await self._input_logprobs(
                job, body.get("logprob_start_len", -1)
            )
            if body.get("top_logprobs_num"):
                meta["input_top_logprobs"] = await self._input_top(job, body)
        text = said(
            self.backend, job, bool((body.get("sampling_params") or {}).get("no_stop_trim"))
        )
        return {"text": text, "output_ids": job.token_ids, "meta_info": meta}

    async def _input_logprobs(self, job: Job, start: int) -> list[Any]:
        """From token `start` on, None for the first of them; -1 stands for the last. They are not
        divided by the temperature."""
        if start < 0 or start >= len(job.prompt) - 1:
            return [[None, job.prompt[-1], None]]
        assert job.weights is not None
        scores = await self.backend.score(job.prompt, job.weights)
        rows = zip(scores[start:], job.prompt[start:], strict=True)
        return [[None if i == 0 else s, token, None] for i, (s, token) in enumerate(rows)]

    async def _input_top(self, job: Job, body: dict[str, Any]) -> list[Any]:
        """As `_input_logprobs`: the likeliest at each place from the start on."""
        assert job.weights is not None
        start = body.get("logprob_start_len", -1)
        if start < 0 or start >= len(job.prompt) - 1:
            return [None]
        rows = await self.backend.likeliest(job.prompt, job.weights, body["top_logprobs_num"])
        return [None] + [[[logprob, token, None] for token, logprob in row] for row in rows[start:]]

    async def _abort_request(self, call: Call) -> Answer:
        self.backend.abort(id=None if call.body.get("abort_all") else call.body.get("rid", ""))
        return Answer()

    async def _pause(self, call: Call) -> Answer:
        mode = (call.body or {}).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return Answer(400, {"error": {"message": f"Invalid mode: {mode!r}"}})
        self._pause_mode = mode
        await self.backend.pause("new" if mode == "abort" else "all")
        if mode == "abort":
            self.backend.abort()
            await self.backend.drain()
        return Answer(body={"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, _: Call) -> Answer:
        await self.backend.resume()
        return Answer(body={"message": "Generation continued successfully.", "status": "ok"})

    async def _update_weights(self, call: Call) -> Answer:
        body = call.body
        try:
            await self.backend.reload(Path(body["model_path"]))
        except (OSError, ValueError, RuntimeError) as error:
            return Answer(400, {"success": False, "message": str(error), "num_paused_requests": 0})
        if body.get("flush_cache", True) and not await self._flush():
            message = "The cache cannot be flushed while requests are running."
            return Answer(400, {"success": False, "message": message, "num_paused_requests": 0})
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        done = {"success": True, "message": "Succeeded to update model weights."}
        return Answer(body=done | {"num_paused_requests": 0})

    async def _flush(self) -> bool:
        retracted = self.backend.paused == "all" and self._pause_mode == "retract"
        return await self.backend.reset_cache(running=retracted)

    async def _flush_cache(self, _: Call) -> Answer:
        flushed = await self._flush()
        return Answer(200 if flushed else 400, "Cache flushed.\n" if flushed else "Not flushed.\n")

    async def _load_lora(self, call: Call) -> Answer:
        name, path = call.body["lora_name"], call.body["lora_path"]
        problem = None
        if name in self.backend.adapters:
            problem = f"LoRA adapter {name} is already loaded."
        else:
            try:
                self.backend.add_adapter(name, path)
            except (OSError, ValueError, RuntimeError) as error:
                problem = str(error)
        return self._lora_answer(problem)

    async def _unload_lora(self, call: Call) -> Answer:
        name, problem = call.body["lora_name"], None
        if name in self.backend.adapters:
            del self.backend.adapters[name]
        else:
            problem = f"LoRA adapter {name} is not loaded."
        return self._lora_answer(problem)

    def _lora_answer(self, problem: str | None) -> Answer:
        loaded = {name: adapter.path for name, adapter in self.backend.adapters.items()}
        body = {
            "success": problem is None,
            "error_message": problem or "",
            "loaded_adapters": loaded,
        }
        return Answer(200 if problem is None else 400, body)
