"""Conversations and plain formulas for the tests of `retrain.native`.

Rollouts are spelled out as text in the plain format, and losses are written over the full logits
of the model's own forward pass: nothing here goes through the renderer or the learner.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrain import Message, MessageType, Rollout
from retrain.types import Prompt, Source, Turn
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
Gradients = dict[str, Tensor]


def conversation(*texts: str, **fields: Any) -> Rollout:
    """Questions and MODEL messages in turn, none of them sampled."""
    rollout = Rollout(**fields)
    kinds = (MessageType.MESSAGE, MessageType.MODEL)
    rollout.add_messages(*(Message(text, kinds[i % 2]) for i, text in enumerate(texts)))
    return rollout


def spelled(*texts: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the turn of each trained token, -1 elsewhere."""
    ids: list[int] = []
    turns: list[int] = []
    for i, text in enumerate(texts):
        said = TOKENIZER.encode(f"{text}<eos>" if i % 2 else f"User:\n{text}\n\nAssistant:\n")
        glue = TOKENIZER.encode("\n\n") if i % 2 and i + 1 < len(texts) else []
        ids += said + glue
        turns += [i // 2 if i % 2 else -1] * len(said) + [-1] * len(glue)
    return ids, turns


def sampled(
    prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], **fields: Any
) -> Rollout:
    """A rollout of one sampled turn, with the engine's log-probabilities as given."""
    rollout = Rollout(messages=[Message("?", MessageType.MESSAGE)], **fields)
    asked = Prompt(None, 0, list(prompt), [int(Source.CONTEXT)] * len(prompt))
    versions = array("i", [0]) * len(tokens)
    turn = Turn(asked, array("i", tokens), array("f", logprobs), versions, "length")
    rollout.add_messages(Message("!", MessageType.MODEL, turn=turn))
    return rollout


def token_logprobs(model: Any, *texts: str, temperature: float = 1.0) -> tuple[Tensor, list[int]]:
    """Log-probabilities of a conversation's trained tokens [M], and the turn of each."""
    ids, turns = spelled(*texts)
    return of_ids(model, ids, [t >= 0 for t in turns], temperature), [t for t in turns if t >= 0]


def of_ids(
    model: Any, ids: Sequence[int], mask: Sequence[bool], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the masked tokens [M]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1] / temperature
    every = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    chosen: Tensor = every[torch.tensor(mask[1:])]
    return chosen


def gradients(model: Any, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-9) -> None:
    assert any(bool(gradient.any()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)
