"""Small inference servers for tests: they run a real model, and speak vLLM's or SGLang's HTTP.

In a test process::

    with EngineServer(directory, "vllm", delay_s=0.01) as server:   # or "sglang"
        ...                          # ask server.url for the model server.name
        server.knobs.fail_next = 2   # see `engine_servers.knobs.Knobs`
        server.requests              # [(path, body)], in order of arrival; server.asked(path)
        server.peak                  # most generation requests at once
        server.generated             # tokens so far of each request in flight
        server.backend.current.model # what is served now

As a process of its own, by the command line of the real server::

    Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory,
           "--port", "8011", "--served-model-name", "policy"],
          env=environment(knobs_json, VLLM_SERVER_DEV_MODE="1"))

or `-m sglang.launch_server --model-path DIR --port N --enable-lora`. `environment` puts
`engine_servers/fake` on PYTHONPATH; unknown flags are accepted. Knobs are then those of the JSON
file `knobs_json`, looked at before each request, or of `POST /knobs {"delay_s": 0.1}`; `GET
/recorded` answers `{"requests": [[path, body], ...], "peak": n}`.

What is like the real servers:

- which paths there are depends on VLLM_SERVER_DEV_MODE and VLLM_ALLOW_RUNTIME_LORA_UPDATING
  (`/openapi.json` lists them); adapters need `--enable-lora`, and at most `--max-lora-rank`;
- log-probabilities are before temperature unless vLLM is told
  `--logprobs-mode processed_logprobs`;
- stop strings are looked for in text without special tokens unless `skip_special_tokens` is false;
- a cached prompt (its first BLOCK tokens were seen before) is answered by the weights of before a
  reload until the cache is reset; a request in flight keeps its weights until the cache is reset
  with it;
- while it is paused, new requests wait.

Unlike them: one seed gives other tokens with `delay_s` than without it.
"""
