"""The configuration tree: every setting of dimat, its default, its unit and its meaning.

One experiment is one TOML file (see `dimat init`). Precedence: flag > environment `DIMAT_*` > file > default.
This is the only place where defaults live.
"""

from dimat.config.agent import AgentConfig, DhtConfig, ExchangeConfig
from dimat.config.experiment import (
    DistilConfig,
    ExperimentConfig,
    MapChange,
    PartitionConfig,
    ScheduleConfig,
    TaskConfig,
    TopologyConfig,
    agent_folder,
)
from dimat.config.load import (
    build,
    load_experiment,
    naming,
    quoted,
    read_toml,
)
from dimat.config.merge import BaseConfig, MergeConfig
from dimat.config.monitor import MlflowConfig, MonitorConfig, WandbConfig
from dimat.config.presets import CEILING, FLOOR, PRESETS, Preset
from dimat.config.simulate import (
    ComputeConfig,
    FaultConfig,
    LinkConfig,
    Moment,
    NetworkConfig,
    RandomFaultsConfig,
    SimulateConfig,
    Span,
)
from dimat.config.train import LrScheduleConfig, OptimizerConfig, TrainConfig
from dimat.config.tree import (
    Named,
    NamedConfig,
    Options,
    Tree,
)
from dimat.config.variants import VariantConfig, changed

__all__ = [
    "CEILING",
    "FLOOR",
    "PRESETS",
    "AgentConfig",
    "BaseConfig",
    "ComputeConfig",
    "DhtConfig",
    "DistilConfig",
    "ExchangeConfig",
    "ExperimentConfig",
    "FaultConfig",
    "LinkConfig",
    "LrScheduleConfig",
    "MapChange",
    "MergeConfig",
    "MlflowConfig",
    "Moment",
    "MonitorConfig",
    "Named",
    "NamedConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "Options",
    "PartitionConfig",
    "Preset",
    "RandomFaultsConfig",
    "ScheduleConfig",
    "SimulateConfig",
    "Span",
    "TaskConfig",
    "TopologyConfig",
    "TrainConfig",
    "Tree",
    "VariantConfig",
    "WandbConfig",
    "agent_folder",
    "build",
    "changed",
    "load_experiment",
    "naming",
    "quoted",
    "read_toml",
]
