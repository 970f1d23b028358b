"""An inference server within a test process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from engine_servers.backend import Backend
from engine_servers.knobs import KnobFile, Knobs
from engine_servers.sglang import SGLang
from engine_servers.vllm import VLLM
from engine_servers.wire import Dialect, Wire

DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""The environment under which vLLM lets its weights be changed."""


class EngineServer:
    """Serves the model of a directory on 127.0.0.1; see `engine_servers`.

    Args:
        directory: a model with its tokenizer, in Hugging Face format.
        dialect: whose interface it speaks.
        name: of the model, as it is asked for.
        environment: of vLLM: which of its paths there are.
        logprobs_mode: of vLLM: whether log-probabilities are after temperature.
        lora_rank: the largest of an adapter; 0 takes none.
        port: 0 takes a free one.
        knobs: initial ones, by name.
    """

    def __init__(
        self,
        directory: Path | str,
        dialect: Literal["vllm", "sglang"] = "vllm",
        *,
        name: str = "policy",
        environment: Mapping[str, str] = DEVELOPMENT,
        logprobs_mode: str = "processed_logprobs",
        context_limit: int | None = None,
        cache_prefixes: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
        knob_file: KnobFile | None = None,
        may_die: bool = False,
        lora_rank: int = 64,
        **knobs: Any,
    ) -> None:
        self.knobs = Knobs(**knobs)
        if knob_file is not None:
            knob_file.bind(self.knobs)
        self.backend = Backend(
            Path(directory),
            self.knobs,
            context_limit=context_limit,
            cache_prefixes=cache_prefixes,
            lora_rank=lora_rank,
        )
        self._loop = asyncio.new_event_loop()
        speaks: Dialect
        if dialect == "vllm":
            speaks = VLLM(
                self.backend, name=name, environment=environment, logprobs_mode=logprobs_mode
            )
        else:
            speaks = SGLang(self.backend, name=name)
        self._wire = Wire(
            speaks,
            self.knobs,
            self._loop,
            host=host,
            port=port,
            knob_file=knob_file,
            may_die=may_die,
        )
        self.name = name
        self.port = self._wire.port
        self.url = f"http://{host}:{self.port}"
        self._threads = [
            threading.Thread(target=self._loop.run_forever, name="server loop", daemon=True),
            threading.Thread(target=self._wire.serve, name="server", daemon=True),
        ]

    @property
    def requests(self) -> list[tuple[str, Any]]:
        """Path and body of everything that was asked, in order of arrival."""
        return self._wire.requests

    @property
    def headers(self) -> list[dict[str, str]]:
        """Of the same requests, with lower-case names."""
        return self._wire.headers

    def asked(self, path: str) -> list[Any]:
        """The bodies that were sent to a path."""
        return [body for asked, body in self.requests if asked == path]

    @property
    def peak(self) -> int:
        """Most generation requests at once so far."""
        return self._wire.peak

    @property
    def hung_up(self) -> threading.Event:
        """Set when a client hung up before it had its answer."""
        return self._wire.hung_up

    @property
    def generated(self) -> list[int]:
        """How many tokens each job in flight has so far."""
        return [len(job.token_ids) for job in list(self.backend.in_flight)]

    def __enter__(self) -> EngineServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        jobs = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in jobs:
            task.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self.backend.close()

    def wait(self) -> None:
        """Serve until the process ends."""
        self._threads[1].join()
