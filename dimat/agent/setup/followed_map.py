"""The network map that an agent uses: its file, or a newer one from the DHT."""

from __future__ import annotations

from pathlib import Path

from dimat.config import ExperimentConfig, agent_folder
from dimat.errors import ConfigError
from dimat.topology import load_map

MAP_FILE = "map.toml"
"""Name of the followed map in the folder of what belongs to the DHT."""


def followed_file(config: ExperimentConfig, agent: str) -> Path:
    """Return the path of the newest map from the DHT; there is no file before the first one."""
    return agent_folder(config, agent) / "dht" / MAP_FILE


def with_newest_map(config: ExperimentConfig) -> ExperimentConfig:
    """Return an agent's configuration with the current map: the one from the DHT if its version is above that of the
    operator's file, else that file. Raises ConfigError if the configuration names no map file."""
    if not config.dht.follow_map or config.agent.name is None:
        return config
    if config.topology.map is None:
        raise ConfigError("dht.follow_map needs topology.map, the file of the network map that it begins with")
    path = followed_file(config, config.agent.name)
    if not path.exists() or load_map(path).version <= own_version(config):
        return config
    return with_map(config, path)


def with_map(config: ExperimentConfig, path: Path) -> ExperimentConfig:
    """Return a configuration with another map file."""
    topology = config.topology.model_copy(update={"map": str(path.resolve())})
    return config.model_copy(update={"topology": topology})


def own_version(config: ExperimentConfig) -> int:
    """Return the version in the operator's map file, 0 for none."""
    return load_map(Path(config.folder) / str(config.topology.map)).version
