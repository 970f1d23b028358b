"""Several teachers as one."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np

from retrain.teachers.base import Top


def mixed(
    logprobs: Sequence[Sequence[float]], weights: Sequence[float], *, geometric: bool
) -> array[float]:
    """One log-probability a token [T], of those of N teachers; NaN where none has one.

    Teachers of one tokenizer mix as distributions: log(sum_i w_i p_i). Where one of them was
    aligned by spans of text, its numbers are no log-probabilities of single tokens, and all mix as
    `geometric`: sum_i w_i log p_i, for which sums over spans stay exact. At each token the weights
    are normalised over the teachers that have a number there.
    """
    table = np.array([list(row) for row in logprobs], dtype=np.float64)
    shares = np.where(np.isnan(table), 0.0, np.asarray(weights, dtype=np.float64)[:, None])
    total = shares.sum(0)
    speaks = total > 0
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=speaks)
    if geometric:
        found = (shares * np.where(shares > 0, table, 0.0)).sum(0)
    else:
        with np.errstate(divide="ignore"):
            parts = np.where(shares > 0, table, -np.inf) + np.log(shares)
        found = np.logaddexp.reduce(parts, axis=0)
    return array("d", np.where(speaks, found, np.nan).tobytes())


def mixed_top(tops: Sequence[Top], weights: Sequence[float], k: int) -> Top:
    """The likeliest `k` tokens of the mixture sum_i w_i p_i, of each teacher's own.

    A token that a teacher does not list counts as impossible for that one, so its probability in
    the mixture is underestimated by at most w_i times the teacher's smallest listed one.
    """
    if len(tops) == 1:
        return tops[0]
    total = math.fsum(weights)
    result = Top.empty(len(tops[0].ids), k)
    for place in range(len(result.ids)):
        found: dict[int, float] = {}
        for top, weight in zip(tops, weights, strict=True):
            for token, logprob in zip(top.ids[place], top.logprobs[place], strict=True):
                if token >= 0:
                    more = math.log(weight / total) + float(logprob)
                    found[int(token)] = float(np.logaddexp(found.get(int(token), -np.inf), more))
        likeliest = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
        for column, (token, logprob) in enumerate(likeliest):
            result.ids[place, column] = token
            result.logprobs[place, column] = logprob
    return result
