"""Inference servers as policy engines: vLLM and SGLang over HTTP, weights in step with the learner.

`ServerEngine` is what the loops see. A `Dialect` knows one server's calls, a `Replica` one server
and whether it can be used, `Router` which replica a request goes to, `Weights` what the servers are
to load and what their log-probabilities then have to be, `Sync` gives it to them and sees that they
took it, `Supervisor` brings back those that fail or hang.
"""
