"""Any OpenAI-compatible chat endpoint, text only: for simulated users, judges, tools and teachers.

It gives no token ids and no log-probabilities of what it sampled, and its weights follow nobody's:
it can play any party but the policy.
"""

from __future__ import annotations

from retrain.engines.openai.chat import ChatEndpoint, ChatReply, MessagesRefused
from retrain.engines.openai.settings import endpoint_of, read_key

__all__ = ["ChatEndpoint", "ChatReply", "MessagesRefused", "endpoint_of", "read_key"]
