"""A request over its interruptions."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from retrain.engines.server.dialect import Answer, Reason
from retrain.engines.stops import StopRule


@dataclass
class Sampled:
    """What a request has so far, over its interruptions; columns [T]."""

    token_ids: array[int] = field(default_factory=lambda: array("i"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    versions: array[int] = field(default_factory=lambda: array("i"))

    def extend(self, answer: Answer, version: int, rule: StopRule) -> Reason:
        """Add what a server gave; why the request ends, or "aborted" if it goes on.

        A server that goes on does not see a stop string that began before, so it is looked for
        here; what was sampled behind it is left out.
        """
        if not self.token_ids:
            taken, reason = len(answer.token_ids), answer.reason
        else:
            taken, reason = self._until_stop(answer, rule)
        self.token_ids.extend(answer.token_ids[:taken])
        self.logprobs.extend(answer.logprobs[:taken])
        self.versions.extend([version] * taken)
        return reason

    def _until_stop(self, answer: Answer, rule: StopRule) -> tuple[int, Reason]:
        generated = self.token_ids[:]
        for taken, token in enumerate(answer.token_ids, start=1):
            generated.append(token)
            if rule.flags[token] and (reason := rule.reason(generated)):
                return taken, reason
        return len(answer.token_ids), answer.reason


def seed_after(seed: int, sampled: int) -> int:
    """The seed of what is left of a request, after so many tokens."""
    key = f"{seed}\0{sampled}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
