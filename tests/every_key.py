"""Which test observes what each key of a config does, or that it is refused.

By section class (a section that stands in several places is one) and by key, those inherited under
the class that declares them. `tests/test_every_key.py` holds this against the config and the tests.
"""

from __future__ import annotations

BUILT, RUN, LEARNING = (f"test_config_effects{part}.py" for part in ("", "_run", "_learning"))
WEIGHTS = f"{LEARNING}::test_a_key_changes_the_weights"
ERRORS = "test_config_errors.py::test_refusals"
OWN_STAGE = f"{RUN}::test_a_stage_has_its_own"
MODE = f"{RUN}::test_every_key_of_a_mode_acts"
EVALUATED = f"{RUN}::test_every_key_of_an_evaluation_acts"
TRACKED = f"{RUN}::test_every_key_of_tracking_acts"
GUARD = "test_trackers_guard.py"
TRACKER_INTERVALS = f"{GUARD}::test_evaluations_reach_a_tracker_at_their_interval"
MADE = f"{GUARD}::test_each_is_made_with_what_the_config_says"
WANDB = "test_trackers.py::test_wandb_goes_on_with_one_run_over_its_own_axis"
TRACKIO = "test_trackers.py::test_trackio_keeps_one_run_with_traces"
MLFLOW = "test_trackers.py::test_mlflow_keeps_one_run"
SFT = f"{RUN}::test_every_key_of_sft_acts"
SFT_STAGES = "test_sft.py"
SFT_COLUMNS = f"{SFT_STAGES}::test_the_columns_are_those_named"
SFT_STREAM = f"{SFT_STAGES}::test_a_stream_in_order_trains_as_the_file_does"
STEP = f"{RUN}::test_sizes_and_sampling_of_a_step"
REWARD = f"{RUN}::test_every_key_of_a_reward_acts"
SCRIPTED = f"{RUN}::test_a_scripted_user_and_the_ends_of_a_dialogue"
PLAYED = f"{RUN}::test_a_user_that_a_model_plays_is_sampled_as_described"
AGENTS, AGENT_RUNS = "test_agents.py", "test_agents_run.py"
OF_AGENTS = f"{AGENT_RUNS}::test_an_own_class_gets_its_params"
WITH_TOOLS = f"{AGENT_RUNS}::test_every_key_of_an_agent_with_tools_acts"
PHONED = "test_endpoint_user.py::test_every_key_of_an_endpoint_user_acts"
WAITED = "test_endpoint_user.py::test_deadline_retries_and_concurrency_of_an_endpoint_user"
SOURCE_TYPE = f"{RUN}::test_type_path_and_format_decide_what_is_read"
WHERE = f"{RUN}::test_a_run_is_where_and_what_the_config_says"
SCRATCH = f"{BUILT}::test_a_model_from_scratch_is_as_described"
LOADED = f"{BUILT}::test_torch_dtype_device_and_attention"
HUB = f"{BUILT}::test_what_the_hub_is_asked_for"
ADAPTER = f"{BUILT}::test_an_adapter_has_the_rank_the_scale_and_the_modules_given"
ENGINE = f"{BUILT}::test_the_engine_is_as_described"
SERVERS = "test_server_engine.py"
STARTED = "test_server_engine_launched.py"
LAUNCHED = f"{STARTED}::test_what_the_config_says_reaches_the_servers"
LIMITS = f"{BUILT}::test_the_limits_of_the_sandbox_are_those_given"
WISHES = f"{BUILT}::test_what_only_some_sandboxes_can_do_is_asked_for"
CALLS = f"{BUILT}::test_the_limits_of_calls_are_those_given"
REACHES = "test_every_key_reaches_the_environment"
OUTSIDE = "test_env_external"
OUTSIDE_TASK = f"{OUTSIDE}.py::test_the_task_reaches_both_kinds_whole"
FORMAT = f"{BUILT}::test_calls_are_read_and_answered_in_the_format_given"
TOOLS = f"{BUILT}::test_tools_are_those_named_with_the_params_given"
ROW = "test_data_sources.py::test_a_row_becomes_a_task"
SKIP = "test_data_sources.py::test_skip_and_limit_count_what_is_left"
HOLDOUT = "test_data_sources.py::test_a_holdout_splits_by_content"
FILTER = "test_data_filters.py::test_a_condition_on_a_column"
CURRICULUM = "test_data_curriculum.py"
MIXED = "test_data_mixture.py::test_weights_interleave_and_each_part_has_its_own_epochs"
FUNCTION = "test_data_sources.py::test_a_function_gives_rows_or_tasks"
DATASETS = "test_data_sources.py::test_saved_datasets_and_directories_of_data"
GENERATED = "test_data_reasoning_gym.py::test_seed_size_and_params_act"
KEPT = f"{RUN}::test_every_key_of_a_checkpoint_acts"
BEST = "test_checkpoints.py::test_the_best_are_kept"
DISTILLED = "test_distill_traces.py"
SERVED = "test_gateway_run.py"
EVALUATES = "test_loops.py::test_evaluation_during_and_after"
MONITOR = "test_monitors.py::test_each_turns_on_its_own_trouble_only"
GUIDED = "test_distill_on_policy_run.py"
STORED = "test_distill_logits.py"
OVERLONG = "test_presets.py::test_a_run_punishes_what_comes_near_its_own_limit"
TEACHERS = "test_teachers_config.py"
TEACHER_SERVER = f"{TEACHERS}::test_a_server_is_asked_with_the_key_and_the_name"
TEACHER_PATIENCE = f"{TEACHERS}::test_patience_and_turns_of_a_server"

EVERY_KEY: dict[str, dict[str, str]] = {
    "TrainingConfig": {
        "experiment_name": WHERE,
        "output_dir": WHERE,
        "seed": "test_loops.py::test_the_same_seed_gives_the_same_run",
        "logging_level": "test_cli.py::test_logging_follows_the_config",
    },
    "StageConfig": {
        "kind": EVALUATES,
        "name": EVALUATES,
        "model": "test_config_load.py::test_stages_that_cannot_run",
        "algorithm": OWN_STAGE,
        "environment": OWN_STAGE,
        "prompt_source": OWN_STAGE,
        "reward_setup": OWN_STAGE,
        "rollout": OWN_STAGE,
        "checkpoint": OWN_STAGE,
        "monitors": OWN_STAGE,
        "evaluation": OWN_STAGE,
        "sft": "test_config_load.py::test_stages_overlay_the_sections_above",
        "distillation": "test_config_load.py::test_stages_overlay_the_sections_above",
    },
    "ModelConfig": {
        "name_or_path": f"{BUILT}::test_name_or_path_decides_the_weights",
        "revision": HUB,
        "loader": f"{BUILT}::test_unsloth_has_to_be_installed",
        "torch_dtype": LOADED,
        "device": LOADED,
        "trust_remote_code": HUB,
        "attn_implementation": LOADED,
        "gradient_checkpointing": f"{BUILT}::test_gradient_checkpointing_is_switched_on",
    },
    "LoraConfig": {
        "r": ADAPTER,
        "alpha": ADAPTER,
        "dropout": ERRORS,
        "target_modules": ADAPTER,
    },
    "FromScratch": {"model_type": SCRATCH, "config": SCRATCH},
    "TokenizerFromScratch": {
        "vocab_size": SCRATCH,
        "corpus": SCRATCH,
        "params": SCRATCH,
        "special_tokens": SCRATCH,
    },
    "AlgorithmConfig": {
        "name": "test_presets.py::test_a_preset_is_its_choices_and_the_defaults",
        "backend": ERRORS,
    },
    "Optimization": {
        "learning_rate": WEIGHTS,
        "optimizer": WEIGHTS,
        "betas": WEIGHTS,
        "weight_decay": WEIGHTS,
        "schedule": WEIGHTS,
        "warmup_steps": WEIGHTS,
        "min_lr_ratio": WEIGHTS,
        "max_grad_norm": WEIGHTS,
        "micro_batch_tokens": (
            f"{LEARNING}::test_micro_batches_are_no_larger_than_micro_batch_tokens"
        ),
        "share_prefixes": f"{LEARNING}::test_share_prefixes_runs_a_prompt_once",
    },
    "Hyperparameters": {
        "steps": STEP,
        "prompts_per_step": STEP,
        "group_size": STEP,
        "dynamic_sampling_rounds": (
            "test_presets.py::test_groups_without_variance_are_made_up_for_by_further_tasks"
        ),
        "epochs": WEIGHTS,
        "mini_batches": WEIGHTS,
        "temperature": STEP,
        "max_new_tokens": STEP,
        "advantage": WEIGHTS,
        "normalize_advantages": WEIGHTS,
        "gamma": WEIGHTS,
        "credit": WEIGHTS,
        "loss": WEIGHTS,
        "clip_low": WEIGHTS,
        "clip_high": WEIGHTS,
        "dual_clip": WEIGHTS,
        "aggregation": WEIGHTS,
        "aggregation_length": WEIGHTS,
        "entropy_coefficient": WEIGHTS,
        "train_truncated": WEIGHTS,
        "train_turns": WEIGHTS,
        "max_staleness": (
            "test_overlap_run.py::test_no_token_is_older_than_the_bound_and_the_order_is_the_tasks"
        ),
    },
    "KLConfig": {
        "coefficient": WEIGHTS,
        "estimator": WEIGHTS,
        "place": WEIGHTS,
        "refresh_steps": WEIGHTS,
    },
    "CorrectionConfig": {"kind": WEIGHTS, "level": WEIGHTS, "cap": WEIGHTS},
    "CriticConfig": {
        "backbone": WEIGHTS,
        "learning_rate": WEIGHTS,
        "gae_lambda": WEIGHTS,
        "value_clip": WEIGHTS,
        "loss_coefficient": WEIGHTS,
        "warmup_steps": WEIGHTS,
        "from_checkpoint": (
            "test_critic.py::test_a_run_saves_its_critic_and_another_goes_on_with_it"
        ),
    },
    "OverlongConfig": {"buffer_share": OVERLONG, "weight": OVERLONG},
    "ToolEnvironmentConfig": {
        "type": TOOLS,
        "max_steps": CALLS,
        "tool_timeout_s": CALLS,
        "tool_retries": CALLS,
        "max_output_chars": CALLS,
        "max_tool_calls": CALLS,
        "tools_column": CALLS,
        "describe_tools": CALLS,
    },
    "ToolConfig": {"name": TOOLS, "params": TOOLS, "max_calls": CALLS},
    "TagsFormat": {
        "type": FORMAT,
        "tool_start": FORMAT,
        "tool_end": FORMAT,
        "response_start": FORMAT,
        "response_end": FORMAT,
        "answer_end": "test_recipe_router_r1.py::test_generation_stops_at_the_answer_too",
    },
    "FencedFormat": {"type": FORMAT, "language": FORMAT, "output": FORMAT},
    "NativeFormat": {"type": FORMAT},
    "GymnasiumConfig": dict.fromkeys(
        (
            "type",
            "id",
            "params",
            "action",
            "choices",
            "action_pattern",
            "observation_field",
            "observations",
            "max_steps",
            "invalid_reward",
        ),
        f"test_env_gymnasium.py::{REACHES}",
    ),
    "OpenEnvConfig": dict.fromkeys(
        (
            "type",
            "url",
            "client",
            "action",
            "action_field",
            "action_pattern",
            "observation_field",
            "max_steps",
            "invalid_reward",
            "timeout_s",
            "max_sessions",
        ),
        f"test_env_openenv.py::{REACHES}",
    ),
    "VerifiersConfig": {
        **dict.fromkeys(("type", "env", "path", "params"), f"test_env_verifiers.py::{REACHES}"),
    },
    "ExternalConfig": {
        "type": f"{OUTSIDE}_run.py::{REACHES}",
        **dict.fromkeys(("command", "function", "pass_answer", "working_dir"), OUTSIDE_TASK),
        "preload": f"{OUTSIDE}_processes.py::test_a_client_that_is_made_by_the_import",
        "env": f"{OUTSIDE}.py::test_the_environment_of_a_program",
        "timeout_s": f"{OUTSIDE}_failures.py::test_or_scored_as_it_stands",
        "kill_after_s": f"{OUTSIDE}_run.py::{REACHES}",
        "ends_on_reward": f"{OUTSIDE}_failures.py::test_its_reward_call_may_end_it",
        "on_failure": f"{OUTSIDE}_failures.py::test_or_scored_as_it_stands",
        "output_dir": f"{OUTSIDE}.py::test_what_programs_print_is_kept",
        "describe_tools": f"{OUTSIDE}.py::test_tools_need_a_format_and_are_called_in_it",
    },
    "QAConfig": {"type": "test_loops_variants.py::test_gpt2_in_the_plain_format"},
    "DialogueConfig": {"type": SCRIPTED, "max_turns": SCRIPTED, "stop_phrase": SCRIPTED},
    "ScriptedUser": {"type": SCRIPTED, "replies": SCRIPTED, "replies_column": SCRIPTED},
    "ModelPlayer": {"type": PLAYED, "max_new_tokens": PLAYED, "temperature": PLAYED},
    "ModelUser": {"system_prompt": PLAYED},
    "EndpointUser": {
        "system_prompt": "test_endpoint_user.py::test_an_endpoint_user_sees_the_parties_exchanged",
    },
    "EndpointPlayer": {
        "type": PHONED,
        "url": PHONED,
        "model": PHONED,
        "api_key_env": PHONED,
        "max_new_tokens": PHONED,
        "temperature": PHONED,
        "timeout_s": WAITED,
        "retries": WAITED,
        "max_concurrency": WAITED,
    },
    "PolicyPlayer": {"type": OF_AGENTS},
    "AgentConfig": {
        "trainable": f"{AGENT_RUNS}::test_a_frozen_agents_words_and_rewards_change_no_weight",
        "system_prompt": f"{AGENTS}::test_agents_take_turns_and_hear_each_other",
        "sees_task": OF_AGENTS,
        "calls": WITH_TOOLS,
        "description": WITH_TOOLS,
        "max_steps": WITH_TOOLS,
    },
    "AgentsConfig": {
        "type": OF_AGENTS,
        "path": OF_AGENTS,
        "params": OF_AGENTS,
        "max_turns": f"{AGENT_RUNS}::test_an_endpoint_plays_an_agent",
        "stop_phrase": f"{AGENTS}::test_agents_take_turns_and_hear_each_other",
        "tool_timeout_s": WITH_TOOLS,
        "tool_retries": WITH_TOOLS,
        "max_output_chars": WITH_TOOLS,
        "describe_tools": WITH_TOOLS,
    },
    "PythonEnvironmentConfig": {
        "type": "test_loops_variants.py::test_an_environment_of_ones_own",
        "path": "test_loops_variants.py::test_an_environment_of_ones_own",
        "params": "test_loops_variants.py::test_an_environment_of_ones_own",
    },
    "SourceSection": {
        "prompt_column": ROW,
        "answer_column": ROW,
        "id_column": ROW,
        "messages_column": "test_data_sources.py::test_messages_as_the_prompt",
        "metadata_columns": "test_data_sources.py::test_metadata_columns_are_those_named",
        "metadata": "test_data_columns.py::test_metadata_constants_are_added_to_each_task",
        "system_prompt": "test_data_sources.py::test_template_and_system_prompt",
        "prompt_template": "test_data_sources.py::test_template_and_system_prompt",
        "skip": SKIP,
        "limit": SKIP,
        "shuffle": "test_data_sources.py::test_epochs_are_shuffled_by_seed_and_number",
        "deduplicate": "test_data_sources.py::test_kept_duplicates_have_different_ids",
    },
    "FilterConfig": {
        "column": FILTER,
        "one_of": FILTER,
        "none_of": FILTER,
        "min": FILTER,
        "max": FILTER,
        "min_chars": FILTER,
        "max_chars": FILTER,
        "matches": FILTER,
        "function": "test_data_filters.py::test_a_function_decides",
        "params": "test_data_filters.py::test_a_function_decides",
    },
    "CurriculumConfig": {
        "column": f"{CURRICULUM}::test_shares_are_sizes_times_weights",
        "window": f"{CURRICULUM}::test_success_is_that_of_the_latest_rollouts_of_a_level",
        "min_weight": f"{CURRICULUM}::test_success_is_that_of_the_latest_rollouts_of_a_level",
        "success_reward": f"{CURRICULUM}::test_a_run_measures_and_is_resumed_to_the_bit",
        "success_threshold": f"{CURRICULUM}::test_a_run_measures_and_is_resumed_to_the_bit",
    },
    "MixturePart": {"name": MIXED, "weight": MIXED},
    "MixtureSourceConfig": {"type": MIXED},
    "HoldoutConfig": {"fraction": HOLDOUT, "part": HOLDOUT, "seed": HOLDOUT},
    "StreamableSection": {
        "streaming": "test_data_sources.py::test_a_stream_reads_no_further_than_it_must",
        "shuffle_buffer": "test_data_sources.py::test_a_stream_shuffles_within_its_buffer",
    },
    "ListSourceConfig": {"type": SOURCE_TYPE, "prompts": SOURCE_TYPE},
    "FileSourceConfig": {"type": SOURCE_TYPE, "path": SOURCE_TYPE, "format": SOURCE_TYPE},
    "HFDatasetSourceConfig": {
        "type": DATASETS,
        "path": DATASETS,
        "name": DATASETS,
        "split": DATASETS,
    },
    "ReasoningGymSourceConfig": {
        "type": SOURCE_TYPE,
        "dataset": SOURCE_TYPE,
        "size": SOURCE_TYPE,
        "params": GENERATED,
    },
    "PythonSourceConfig": {"type": FUNCTION, "function": FUNCTION, "params": FUNCTION},
    "RewardSetup": {
        "verifiers": REWARD,
        "verifier_penalty": REWARD,
        "on_error": "test_rollout_failures.py::test_on_error_mask",
        "error_penalty": "test_rollout_failures.py::test_on_error_penalty",
    },
    "RewardConfig": {
        "agents": f"{AGENT_RUNS}::test_a_frozen_agents_words_and_rewards_change_no_weight",
        "function": REWARD,
        "weight": REWARD,
        "params": REWARD,
        "verifiers": REWARD,
        "verifier_penalty": REWARD,
    },
    "RolloutRewardConfig": {"distribution_strategy": REWARD},
    "RolloutConfig": {
        "timeout_s": "test_failures.py::test_an_environment_that_hangs_delays_its_own_rollout",
        "turn_timeout_s": "test_failures.py::test_an_engine_that_hangs_on_a_turn_is_asked_again",
        "retries": "test_failures.py::"
        "test_a_tool_whose_infrastructure_is_away_masks_its_rollouts_only",
        "backoff_s": "test_failures_rollout.py::test_waits_double_and_belong_to_the_seed",
        "max_concurrency": "test_failures_rollout.py::"
        "test_rollouts_beyond_the_limit_wait_outside_their_clock",
        "min_group_size": "test_failures_rollout.py::"
        "test_a_group_with_too_few_survivors_does_not_teach",
        "max_lost_steps": "test_failures.py::"
        "test_a_run_that_loses_every_rollout_stops_and_says_how_to_go_on",
    },
    "TorchEngineConfig": {
        "type": ERRORS,
        "max_slots": ENGINE,
        "num_threads": ENGINE,
        "context_limit": ENGINE,
        "deterministic": "test_checkpoints.py::"
        "test_an_engine_that_must_be_deterministic_and_cannot_is_refused",
    },
    "ServerEngineConfig": {
        "type": f"{SERVERS}::test_prepare_refuses_what_is_no_such_server",
        "python": f"{STARTED}::test_an_interpreter_that_is_none_or_has_no_server",
        "urls": f"{SERVERS}::test_groups_stay_together_and_servers_share_the_rest",
        "replicas": LAUNCHED,
        "devices": LAUNCHED,
        "args": LAUNCHED,
        "env": LAUNCHED,
        "start_timeout_s": f"{STARTED}::test_start_timeout_s_is_how_long_it_may_take",
        "context_limit": f"{SERVERS}::test_the_context_limit_is_the_servers_where_that_is_smaller",
        "max_concurrency": f"{SERVERS}::test_max_concurrency_is_of_each_server",
        "weights": f"{SERVERS}::test_an_adapter_is_loaded_or_merged_as_weights_says",
        "weights_dir": f"{SERVERS}::test_weights_dir_is_where_they_are_left_and_may_be_shared",
        "untie_embeddings": f"{SERVERS}::test_untie_embeddings_cures_a_server_that_keeps_its_head",
        "load_timeout_s": f"{SERVERS}::test_load_timeout_s_of_a_server_that_never_loads",
        "probe_tolerance": f"{SERVERS}::test_probe_tolerance_is_what_is_held_against",
        "health_timeout_s": "test_server_engine_faults.py::"
        "test_a_server_that_stops_is_replaced_after_health_timeout_s",
        "max_restarts": "test_server_engine_outages.py::test_max_restarts_0_gives_up_at_once",
    },
    "SandboxConfig": {
        "type": WISHES,
        "timeout_s": LIMITS,
        "memory_mb": LIMITS,
        "max_output_chars": LIMITS,
        "max_concurrency": LIMITS,
        "stateful": f"{BUILT}::test_variables_last_over_calls_where_the_sandbox_is_stateful",
        "packages": WISHES,
        "files": WISHES,
        "writable": WISHES,
        "bubblewrap": WISHES,
        "url": WISHES,
    },
    "KeepBestConfig": {"metric": BEST, "mode": BEST, "count": BEST},
    "CheckpointConfig": {
        "every_steps": KEPT,
        "keep_last": KEPT,
        "merge_lora": "test_loops_variants.py::test_merged_lora",
    },
    "TrackingConfig": {
        "rollouts": TRACKED,
        "plots": TRACKED,
        "transcripts": EVALUATES,
        "progress": TRACKED,
        "rollouts_logged": TRACKER_INTERVALS,
        "rollouts_logged_every": TRACKER_INTERVALS,
        "artifacts": f"{GUARD}::test_a_failed_run_says_so_and_artifacts_are_given_if_asked",
        "finish_timeout_s": f"{GUARD}::test_a_run_with_a_tracker_that_hangs_completes",
    },
    "WandbConfig": {
        "type": WANDB,
        "project": WANDB,
        "entity": WANDB,
        "name": WANDB,
        "group": WANDB,
        "tags": WANDB,
        "mode": f"{GUARD}::test_check_describes_them_and_disabled_is_as_if_not_listed",
    },
    "TensorboardConfig": {"type": MADE, "directory": MADE},
    "TrackioConfig": {
        "type": MADE,
        "project": TRACKIO,
        "name": TRACKIO,
        "directory": TRACKIO,
        "space_id": MADE,
    },
    "MLflowConfig": {
        "type": MLFLOW,
        "tracking_uri": MLFLOW,
        "experiment": MLFLOW,
        "name": MLFLOW,
    },
    "PythonTrackerConfig": {
        "type": TRACKER_INTERVALS,
        "path": TRACKER_INTERVALS,
        "params": TRACKER_INTERVALS,
    },
    "EvaluationConfig": {
        "agents": f"{AGENT_RUNS}::test_evaluations_count_the_agents_named",
        "every_steps": EVALUATES,
        "max_new_tokens": EVALUATED,
        "success_reward": f"{RUN}::test_success_may_be_that_of_one_reward",
        "success_threshold": EVALUATED,
        "group_by": EVALUATED,
        "exclude": EVALUATED,
    },
    "EvaluationMode": {
        "name": MODE,
        "temperature": MODE,
        "top_p": MODE,
        "top_k": MODE,
        "tools": EVALUATES,
        "repeats": MODE,
    },
    "Imitation": {
        "steps": SFT,
        "epochs": SFT,
        "batch_size": SFT,
        "shuffle": SFT,
        "validation": f"{SFT_STAGES}::test_validation_loss_is_that_of_the_formula",
        "holdout": f"{SFT_STAGES}::test_a_share_is_held_out_by_what_was_asked",
        "validation_every_steps": (
            f"{SFT_STAGES}::test_when_it_is_scored_and_that_it_changes_nothing"
        ),
    },
    "TraceData": {
        "dataset": SFT,
        "params": SFT,
        "messages_column": SFT_COLUMNS,
        "prompt_column": SFT_COLUMNS,
        "completion_column": SFT_COLUMNS,
        "system_prompt": SFT_COLUMNS,
        "streaming": SFT_STREAM,
        "shuffle_buffer": SFT_STREAM,
    },
    "GatewayConfig": {
        "records": f"{SERVED}::test_an_agent_is_recorded_in_front_of_an_endpoint",
        "rollouts": f"{SERVED}::test_the_model_of_the_config_keeps_its_tokens",
        **dict.fromkeys(
            ("host", "port", "keys_env", "idle_s", "max_body_mb"),
            f"{SERVED}::test_it_serves_until_it_is_stopped",
        ),
    },
    "UpstreamConfig": {
        **dict.fromkeys(
            ("url", "model", "api_key_env"),
            f"{SERVED}::test_an_agent_is_recorded_in_front_of_an_endpoint",
        ),
        **dict.fromkeys(
            ("timeout_s", "retries", "max_concurrency"),
            "test_gateway_upstream.py::test_every_key_of_an_upstream_acts",
        ),
    },
    "TracesDistillation": {
        "type": f"{DISTILLED}::test_what_the_log_alone_decides",
        "sources": f"{DISTILLED}::test_the_command_trains_on_what_the_model_said",
        "format": f"{DISTILLED}::test_the_format_that_is_named_is_the_one_read",
        "system_prompt": f"{DISTILLED}::test_what_does_not_fit_and_what_opens",
        "min_reward": f"{DISTILLED}::test_what_the_log_alone_decides",
        "threshold": f"{DISTILLED}::test_rewards_and_verifiers_reject",
        "per_prompt": f"{DISTILLED}::test_the_best_of_each_prompt",
    },
    "MonitorsConfig": dict.fromkeys(
        (
            "logprob_gap",
            "ratio",
            "clip_fraction",
            "approx_kl",
            "kl",
            "entropy_low",
            "entropy_growth",
            "grad_norm_spike",
            "zero_variance",
            "truncated",
            "masked",
            "tool_calls",
            "tool_failures",
            "invalid_calls",
            "length_growth",
            "staleness",
            "flat_reward_steps",
            "reward_drop",
        ),
        MONITOR,
    ),
    "OnPolicyDistillation": {
        "type": f"{GUIDED}::test_every_key_of_the_section_acts",
        "coefficient": f"{GUIDED}::test_every_key_of_the_section_acts",
        "task_reward": f"{GUIDED}::test_every_key_of_the_section_acts",
        "estimator": f"{GUIDED}::test_every_key_of_the_section_acts",
        "top_k": f"{GUIDED}::test_every_key_of_the_section_acts",
    },
    "LogitsDistillation": {
        "type": f"{STORED}::test_a_run_learns_the_distributions_and_asks_once",
        "top_k": f"{STORED}::test_a_run_learns_the_distributions_and_asks_once",
        "temperature": f"{STORED}::test_a_run_learns_the_distributions_and_asks_once",
        "cross_entropy": f"{STORED}::test_a_run_learns_the_distributions_and_asks_once",
        "cache": f"{STORED}::test_a_run_learns_the_distributions_and_asks_once",
    },
    "BaseTeacher": {
        "name": f"{TEACHERS}::test_weights_and_tasks",
        "weight": f"{TEACHERS}::test_weights_and_tasks",
        "when": f"{TEACHERS}::test_weights_and_tasks",
    },
    "ModelTeacher": {
        "type": f"{TEACHERS}::test_a_model_of_ones_own_is_loaded_and_frozen",
        "batch_tokens": f"{TEACHERS}::test_batch_tokens_bound_a_forward_pass",
    },
    "ServerTeacher": {
        "type": TEACHER_SERVER,
        "url": TEACHER_SERVER,
        "tokenizer": TEACHER_SERVER,
        "api_key_env": TEACHER_SERVER,
        "timeout_s": TEACHER_PATIENCE,
        "retries": TEACHER_PATIENCE,
        "max_concurrency": TEACHER_PATIENCE,
    },
    "VLLMTeacher": {"model": TEACHER_SERVER},
}
