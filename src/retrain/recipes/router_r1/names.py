"""Which model of the pool a routed name means."""

from __future__ import annotations

from collections.abc import Sequence

PUBLISHED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("qwen",), "Qwen2.5-7B-Instruct"),
    (("palmyra",), "Palmyra-Creative-122B"),
    (("creative",), "Palmyra-Creative-122B"),
    (("llama", "70b"), "LLaMA-3.1-70B-Instruct"),
    (("llama", "51b"), "LLaMA-3.1-Nemotron-51B-Instruct"),
    (("llama", "49b"), "LLaMA-3.3-Nemotron-Super-49B-v1"),
    (("llama", "8b", "chatqa"), "LLaMA3-ChatQA-1.5-8B"),
    (("llama", "8b"), "LLaMA-3.1-8B-Instruct"),
    (("llama",), ""),
    (("mistral",), "Mistral-7B-Instruct"),
    (("mixtral",), "Mixtral-8x22B-Instruct"),
    (("granite",), "Granite-3.0-8B-Instruct"),
    (("gemma",), "Gemma-2-27B-it"),
)
"""The published implementation's rule: the first line all of whose pieces occur in the name decides
it. An empty model is none."""


def published_name(name: str) -> str | None:
    """The model that the published implementation takes a name for, whatever else it says.

    `Qwen2.5-7B` and `qwen, please` are both Qwen2.5-7B-Instruct; a LLaMA without a size is none.
    """
    wanted = name.strip().lower()
    for pieces, model in PUBLISHED:
        if all(piece in wanted for piece in pieces):
            return model or None
    return None


def pool_name(name: str, pool: Sequence[str] | None) -> str | None:
    """The name as the pool writes it, upper and lower case aside; without a pool, by the published
    implementation's rule. None where there is no such model."""
    if pool is None:
        return published_name(name)
    wanted = name.strip().lower()
    return next((known for known in pool if known.strip().lower() == wanted), None)
