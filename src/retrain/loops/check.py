"""What a run of a config would do: everything is resolved, nothing trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import length_hint

from retrain.config.adapters import GymnasiumConfig, OpenEnvConfig, VerifiersConfig
from retrain.config.agents import AgentsConfig
from retrain.config.algorithm import Hyperparameters, Optimization
from retrain.config.engine import TorchEngineConfig
from retrain.config.environment import (
    DialogueConfig,
    PythonEnvironmentConfig,
    ToolEnvironmentConfig,
)
from retrain.config.external import ExternalConfig
from retrain.config.load import resolve_stages
from retrain.config.root import (
    READ_BY,
    StageKind,
    TrainingConfig,
    evaluates,
    generates,
    reads,
    rolls_out,
)
from retrain.config.stages import SandboxConfig
from retrain.data import load_tasks
from retrain.loops.adapters import describe_adapter
from retrain.loops.agents import import_conduct
from retrain.loops.build import build_calculator
from retrain.loops.distill import describe_distillation
from retrain.loops.engines import check_interpreter
from retrain.loops.evaluate import held_out_tasks
from retrain.loops.external import describe_external
from retrain.loops.pipeline import overlapping
from retrain.loops.sft import read_traces, steps_of
from retrain.loops.success import check_curricula
from retrain.loops.update import check_critic
from retrain.loops.validation import hold_out
from retrain.loops.world import (
    build_sandbox,
    endpoints_asked,
    import_environment,
    runs_code,
    tool_schemas,
)
from retrain.models.load import check_origin, choose_device
from retrain.rewards import RewardCalculator
from retrain.tracking.trackers import active_trackers, check_tracker


def check(config: TrainingConfig) -> str:
    """Resolve every name, read every data set, and describe the run, a line each.

    The model is looked for, not loaded: a hub id that is not on this machine is said to be
    fetched by the run.

    Raises:
        UserError: what a run would stop at before it starts.
    """
    lines = [
        f"experiment {config.experiment_name}, seed {config.seed}; "
        f"run directory {config.output_dir}/{config.experiment_name}-NNN",
        f"model: {check_origin(config.model)}",
    ]
    stages = resolve_stages(config)
    if any(generates(kind, stage) for _, kind, stage in stages):
        lines += _engine(config)
    for number, (name, kind, stage) in enumerate(stages, 1):
        lines.append(f"stage {number}, {name} ({kind}):")
        lines += [f"  {line}" for line in _describe(kind, stage)]
    lines += [f"note: {line}" for line in _idle_sections(config, stages)]
    lines += _trackers(config)
    lines.append(f"resuming: {_resuming(config, stages)}")
    return "\n".join(lines)


def _trackers(config: TrainingConfig) -> Iterator[str]:
    """
    Raises:
        UserError: a tracker's package is missing, or there is no such class.
    """
    for tracker in active_trackers(config.tracking):
        check_tracker(tracker)
        given = tracker.model_dump(exclude={"type"}, exclude_none=True)
        settings = ", ".join(f"{key} {value}" for key, value in given.items() if value)
        yield f"tracker {tracker.type}" + (f": {settings}" if settings else "")


def _engine(config: TrainingConfig) -> Iterator[str]:
    """Of servers: which, and what they are given. None is started or asked here.

    Raises:
        UserError: there is no such interpreter.
    """
    section = config.engine
    if isinstance(section, TorchEngineConfig):
        return
    adapter = config.model.peft is not None and section.weights != "full"
    given = "a LoRA adapter" if adapter else "full weights"
    where = ", ".join(section.urls)
    if section.python is not None:
        check_interpreter(section.python)
        servers = "server" if section.replicas == 1 else "servers"
        where = f"{section.replicas} {servers} of {section.python}, started by the run"
    yield f"engine: {section.type}, {where}; given {given} after each step"


def _idle_sections(
    config: TrainingConfig, stages: Sequence[tuple[str, StageKind, TrainingConfig]]
) -> Iterator[str]:
    """Sections that no stage reads. They may be there for another day, so none is refused."""
    read = {name for _, kind, stage in stages for name in reads(kind, stage)}
    for name in config.changed(*dict.fromkeys(n for names in READ_BY.values() for n in names)):
        if name not in read:
            others = READ_BY.keys() - {kind for _, kind, _ in stages}
            readers = " or ".join(k for k in READ_BY if k in others and name in READ_BY[k])
            yield f"{name} does nothing: no stage is of kind {readers}"
    if config.sandbox != SandboxConfig() and not any(
        generates(kind, stage) and runs_code(stage) for _, kind, stage in stages
    ):
        yield "sandbox does nothing: neither a tool nor a reward runs code"


def _resuming(
    config: TrainingConfig, stages: Sequence[tuple[str, StageKind, TrainingConfig]]
) -> str:
    """Whether a run that is stopped and resumed ends with the bits of one that is not."""
    reasons = []
    if (device := choose_device(config.model.device)).type != "cpu":
        reasons.append(f"model.device is {device}")
    if config.model.torch_dtype != "float32":
        reasons.append(f"model.torch_dtype is {config.model.torch_dtype}")
    sampling = [stage for _, kind, stage in stages if generates(kind, stage)]
    engine = config.engine
    exact = engine.deterministic if isinstance(engine, TorchEngineConfig) else False
    if sampling and exact is False:
        why = "deterministic is false" if engine.type == "torch" else f"type is {engine.type}"
        reasons.append(f"engine.{why}")
    reasons += dict.fromkeys(clause for stage in sampling for clause in endpoints_asked(stage))
    reasons += [f"max_staleness is {n} in {name}" for name, n in overlapping(config).items()]
    if reasons:
        return f"goes on, but not bit for bit: {', '.join(reasons)}"
    own = "if tools, rewards and data functions give the same again"
    if sampling and exact is None:
        own += ", and the model lets the engine be deterministic, which a run finds out and says"
    return f"bit for bit, {own}"


def _describe(kind: StageKind, config: TrainingConfig) -> Iterator[str]:
    if kind in ("sft", "distill"):
        yield from _sft(config) if kind == "sft" else describe_distillation(config)
        if not rolls_out(kind, config) and not evaluates(config):
            return
    calculator = build_calculator(config.reward_setup, build_sandbox(config))
    yield from (_rl if rolls_out(kind, config) else _eval)(config, calculator)
    yield from _environment(config)
    if runs_code(config):
        yield _sandbox(config.sandbox)
    yield from _rewards(calculator)


def _sft(config: TrainingConfig) -> Iterator[str]:
    settings = config.sft
    assert settings is not None
    train, held_out = hold_out(settings, read_traces(config, settings))
    size = length_hint(train, -1)
    steps = steps_of(settings, None if size < 0 else size)
    yield f"traces: {'streamed' if size < 0 else size} from {settings.dataset}"
    if held_out:
        yield f"held out: {len(held_out)}, from {settings.validation or 'the same'}"
    yield f"{steps} steps of {settings.batch_size}, {settings.optimizer}, {_rate(settings)}"
    yield from _late_evaluations(config, steps)
    yield from _late_checkpoints(config, steps)


def _rl(config: TrainingConfig, calculator: RewardCalculator) -> Iterator[str]:
    settings = config.algorithm.hyperparameters
    assert config.prompt_source is not None
    rewards = [spec.name for spec in calculator.specs]
    check_curricula(config.prompt_source, config.evaluation, rewards)
    yield from _block("prompts", load_tasks(config.prompt_source, seed=config.seed).summary())
    yield (
        f"{config.algorithm.name} on {config.algorithm.backend}: {settings.steps} steps of "
        f"{settings.prompts_per_step} prompts x {settings.group_size} rollouts, "
        f"{settings.optimizer}, {_rate(settings)}, temperature {settings.temperature:g}, "
        f"up to {settings.max_new_tokens} tokens a turn"
    )
    yield from (f"  {line}" for line in describe_choices(settings))
    check_critic(settings)
    yield from _late_checkpoints(config, settings.steps)
    yield from _late_evaluations(config, settings.steps)


def _late_evaluations(config: TrainingConfig, steps: int) -> Iterator[str]:
    every = None if config.evaluation is None else config.evaluation.every_steps
    if every is not None and every > steps:
        yield f"note: evaluation.every_steps {every} never comes in {steps} steps"


def _late_checkpoints(config: TrainingConfig, steps: int) -> Iterator[str]:
    every = config.checkpoint.every_steps
    if every is not None and every >= steps:
        yield f"note: checkpoint.every_steps {every} adds none to that after {steps} steps"


def describe_choices(settings: Hyperparameters) -> Iterator[str]:
    """What the algorithm's name and the file's own keys amount to."""
    yield (
        f"advantage: {settings.advantage}, normalised: {settings.normalize_advantages}, "
        f"credit: {settings.credit}" + (f", gamma {settings.gamma:g}" if settings.gamma < 1 else "")
    )
    yield f"loss: {settings.loss}{_clip(settings)}; aggregation: {_aggregation(settings)}"
    yield f"updates a step: {settings.epochs} x {settings.mini_batches} (epochs x mini-batches)"
    if settings.updates == 1:
        yield "  (the ratio is 1 in a step's only update: clip bounds do not act)"
    elif settings.loss == "reinforce":
        yield "  (reinforce weighs no ratio: nothing corrects that later updates are off-policy)"
    if settings.entropy_coefficient:
        yield f"entropy bonus: {settings.entropy_coefficient:g}"
    if (kl := settings.kl) is not None:
        refresh = f", refreshed every {kl.refresh_steps} steps" if kl.refresh_steps else ""
        yield f"kl: {kl.estimator} in the {kl.place}, coefficient {kl.coefficient:g}{refresh}"
    if (correction := settings.correction) is not None:
        yield f"correction: {correction.kind} by {correction.level}, cap {correction.cap:g}"
    if settings.max_staleness:
        yield f"rollouts overlap training: up to {settings.max_staleness} steps stale"
    if (critic := settings.critic) is not None:
        rate = critic.learning_rate or settings.learning_rate
        clip = "none" if critic.value_clip is None else f"{critic.value_clip:g}"
        yield (
            f"critic: {critic.backbone} backbone, learning rate {rate:g}, "
            f"lambda {critic.gae_lambda:g}, value clip {clip}, warm-up {critic.warmup_steps} steps"
        )
    if settings.dynamic_sampling_rounds:
        yield f"dynamic sampling: up to {settings.dynamic_sampling_rounds} further rounds"
    if not settings.train_truncated:
        yield "truncated rollouts do not train"
    if settings.train_turns == "last":
        yield "only the last turn of a rollout trains"
    if (overlong := settings.overlong_punishment) is not None:
        share = f"{overlong.buffer_share:.0%} of max_new_tokens"
        yield f"overlong punishment: over the last {share}, up to {overlong.weight:g}"


def _clip(settings: Hyperparameters) -> str:
    low, high = settings.clip
    if high is None:
        return ""
    dual = "" if settings.dual_clip is None else f", dual {settings.dual_clip:g}"
    return f" ({'0' if low is None else f'1 - {low:g}'} to 1 + {high:g}{dual})"


def _aggregation(settings: Hyperparameters) -> str:
    if settings.aggregation != "constant":
        return settings.aggregation
    return f"constant, {settings.aggregation_length or settings.max_new_tokens} tokens"


def _eval(config: TrainingConfig, calculator: RewardCalculator) -> Iterator[str]:
    settings = config.evaluation
    assert settings is not None
    tasks = held_out_tasks(config, settings, calculator)
    yield from _block("tasks", tasks.summary())
    yield f"modes: {', '.join(mode.name for mode in settings.modes)}"
    judge = settings.success_reward or "the total reward"
    yield f"success: {judge} of at least {settings.success_threshold:g}"


def _environment(config: TrainingConfig) -> Iterator[str]:
    section = config.environment
    yield f"environment: {section.type}"
    if isinstance(section, ToolEnvironmentConfig):
        for schema in tool_schemas(section.tool_list(), build_sandbox(config)):
            tool = schema["function"]
            parameters = ", ".join(tool["parameters"].get("properties", {}))
            yield f"  tool {tool['name']}({parameters}): {_first_line(tool['description'])}"
        yield f"  calls: {section.tool_format.type}; at most {section.max_steps} turns"
    elif isinstance(section, AgentsConfig):
        yield from _agents(section, config)
    elif isinstance(section, DialogueConfig):
        yield f"  user: {section.user.type}; at most {section.max_turns} turns"
    elif isinstance(section, GymnasiumConfig | OpenEnvConfig | VerifiersConfig):
        yield f"  {describe_adapter(section)}"
    elif isinstance(section, ExternalConfig):
        yield f"  {describe_external(section)}"
    elif isinstance(section, PythonEnvironmentConfig):
        import_environment(section)
        yield f"  {section.path}"


def _agents(section: AgentsConfig, config: TrainingConfig) -> Iterator[str]:
    for name, agent in section.agents.items():
        tool_schemas(agent.tool_list(), build_sandbox(config))
        trains = agent.trainable and agent.player.type == "policy"
        may = [*(tool.name for tool in agent.tool_list()), *agent.calls]
        yield (
            f"  agent {name}: {agent.player.type}, {'trains' if trains else 'does not train'}"
            + (f"; calls {', '.join(may)}" if may else "")
        )
    if section.path is not None:
        import_conduct(section.path)
        yield f"  conducted by {section.path}"


def _sandbox(section: SandboxConfig) -> str:
    return (
        f"sandbox: {section.type} (retrain doctor says what works here), {section.timeout_s:g} s a "
        f"call, {section.memory_mb} MB a session, {section.max_concurrency} calls at once"
    )


def _rewards(calculator: RewardCalculator) -> Iterator[str]:
    for spec in calculator.specs:
        gates = "".join(f", only if {name}" for name, _ in spec.verifiers)
        yield f"reward {spec.name} ({spec.kind}, weight {spec.weight:g}{gates})"
    for name, _ in calculator.verifiers:
        yield f"verifier {name}: failing it makes the total {calculator.verifier_penalty:g}"
    for warning in calculator.warnings():
        yield f"warning: {warning}"


def _rate(settings: Optimization) -> str:
    return f"learning rate {settings.learning_rate:g}, {settings.schedule}"


def _block(title: str, text: str) -> Iterator[str]:
    first, *rest = text.splitlines()
    yield f"{title}: {first}"
    yield from (f"  {line}" for line in rest)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
