"""What tells an unchanged program where its model is."""

from __future__ import annotations


def variables(url: str, name: str | None, key: str) -> dict[str, str]:
    """Environment variables that the SDKs of OpenAI and Anthropic read, and those built on them.

    Args:
        url: of the gateway, without a path.
        name: of the session; None leaves it to the key.
        key: its API key.
    """
    base = url if name is None else f"{url}/sessions/{name}"
    return {
        "OPENAI_BASE_URL": f"{base}/v1",
        "OPENAI_API_BASE": f"{base}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": base,
        "ANTHROPIC_API_KEY": key,
        "RETRAIN_REWARD_URL": f"{base}/v1/reward",
    }
