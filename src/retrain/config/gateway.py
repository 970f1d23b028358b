"""`gateway`: what `retrain gateway` serves, to whom, and what it writes down."""

from __future__ import annotations

import ipaddress

from pydantic import Field, model_validator

from retrain.config.base import Section, VariableName
from retrain.config.formats import ToolFormatConfig


class UpstreamConfig(Section):
    """A model behind an OpenAI-compatible endpoint."""

    url: str
    """The API's base, such as `https://api.openai.com/v1`."""
    model: str | None = None
    """Asked for instead of what requests name."""
    api_key_env: VariableName | None = None
    """The environment variable that holds the endpoint's key; callers never see it."""
    timeout_s: float = Field(600.0, gt=0)
    """Of one attempt at an answer."""
    retries: int = Field(2, ge=0)
    """Further attempts where the endpoint fails or is busy."""
    max_concurrency: int = Field(64, ge=1)
    """Most requests at once; further ones wait for their turn."""


class GatewayConfig(Section):
    """An OpenAI- and Anthropic-compatible server that keeps what is said."""

    upstream: UpstreamConfig | None = None
    """Who answers: this endpoint, kept as text; without it the model of the section `model`, kept
    token for token."""
    host: str = "127.0.0.1"
    """To listen on; others than this machine's own need `keys_env`."""
    port: int = Field(8765, ge=0, le=65535)
    """To listen on; 0 takes a free one, which is printed."""
    keys_env: VariableName | None = None
    """The environment variable with the API keys that callers may use, separated by commas; null
    takes any key, which then only tells sessions apart."""
    records: str = "records.jsonl"
    """The file that conversations are appended to, for `retrain distill --from`."""
    rollouts: str | None = None
    """A file (gzip, `.jsonl.gz`) for the policy's rollouts, one a session, with token ids and
    log-probabilities; null writes none."""
    tool_format: ToolFormatConfig | None = None
    """How the model of the config writes calls; the system message says what tools there are, where
    the chat template does not. Null: as the section `environment` has it."""
    idle_s: float = Field(600.0, gt=0)
    """Of silence, after which a session is over."""
    max_body_mb: float = Field(64.0, gt=0)
    """Of one request."""

    @model_validator(mode="after")
    def _keys_beyond_this_machine(self) -> GatewayConfig:
        if self.keys_env is None and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached by others, so callers need keys: set keys_env"
            )
        return self

    @model_validator(mode="after")
    def _an_upstream_is_text(self) -> GatewayConfig:
        if self.upstream is not None:
            for name in self.changed("rollouts", "tool_format"):
                raise ValueError(
                    f"{name} does nothing with upstream, whose answers have no tokens of ours; "
                    "remove it"
                )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
