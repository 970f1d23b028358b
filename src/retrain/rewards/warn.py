"""What `retrain check` says about penalties that would teach the wrong thing."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.rewards.spec import NamedVerifier, RewardSpec


def penalty_warnings(
    specs: Sequence[RewardSpec], verifiers: Sequence[NamedVerifier], verifier_penalty: float
) -> list[str]:
    """Sentences for verifiers whose failure may pay better than passing them.

    Only rewards with a declared range can be judged. A step reward counts one turn; the
    environment's own reward is unknown and counts as 0.
    """
    found = [_own(spec) for spec in specs] + [_whole(specs, verifiers, verifier_penalty)]
    return [sentence for sentence in found if sentence is not None]


def _own(spec: RewardSpec) -> str | None:
    known = spec.weighted_range
    if not spec.verifiers or known is None or spec.verifier_penalty <= known[0]:
        return None
    return (
        f"reward '{spec.name}': failing {_names(spec.verifiers)} pays {spec.verifier_penalty:g}, "
        f"but passing can pay as little as {known[0]:g}, so the model may learn to fail it; "
        f"set verifier_penalty to {known[0]:g} or less"
    )


def _whole(
    specs: Sequence[RewardSpec], verifiers: Sequence[NamedVerifier], verifier_penalty: float
) -> str | None:
    if not verifiers:
        return None
    lowest = {spec.name: low for spec in specs if (low := _lowest(spec)) < 0}
    total = sum(lowest.values())
    # Rewards that cannot go below 0 add nothing to the worst case; those with an unknown range
    # are left out of it.
    if not lowest or verifier_penalty <= total:
        return None
    listed = ", ".join(f"{name}: {low:g}" for name, low in lowest.items())
    return (
        f"reward set-up: failing {_names(verifiers)} pays {verifier_penalty:g}, but passing can "
        f"pay as little as {total:g} ({listed}), so the model may learn to fail it; "
        f"set the set-up's verifier_penalty to {total:g} or less"
    )


def _lowest(spec: RewardSpec) -> float:
    """The least that this component can pay a rollout which passes the set-up's verifiers."""
    known = spec.weighted_range
    low = 0.0 if known is None else known[0]
    return min(low, spec.verifier_penalty) if spec.verifiers else low


def _names(verifiers: Sequence[NamedVerifier]) -> str:
    names = [f"'{name}'" for name, _ in verifiers]
    return f"verifier {names[0]}" if len(names) == 1 else f"verifiers {', '.join(names)}"
