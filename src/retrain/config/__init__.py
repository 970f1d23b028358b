"""The config: pydantic models, one module a section. Imports no torch."""

from retrain.config.load import dump_yaml, load_config, resolve_stages
from retrain.config.root import StageConfig, TrainingConfig

__all__ = ["StageConfig", "TrainingConfig", "dump_yaml", "load_config", "resolve_stages"]
