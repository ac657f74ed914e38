"""Who exchanges weights with whom: graphs, schedules, mixing weights, mixing speed.

    topology = build_topology(TopologyConfig(graph="torus", agents=16), seed=0)
    topology.schedule.row(1, "agent-0")            # {"agent-0": 0.2, "agent-1": 0.2, …}
    summarise(topology.schedule).spectral_gap

Names are loaded lazily: importing this package loads neither networkx nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "BaseK": "base_k",
    "CycleSchedule": "rounds",
    "Mixer": "mixing",
    "NetworkMap": "network_map",
    "Schedule": "rounds",
    "Setting": "schedule",
    "Summary": "analysis",
    "Topology": "network_map",
    "build_graph": "graphs",
    "build_topology": "build",
    "check": "build",
    "check_graph": "graphs",
    "check_matrix": "mixing",
    "check_schedule": "rounds",
    "diameter": "distances",
    "draw_graph": "draw",
    "export": "write",
    "lambda_2": "analysis",
    "list_graphs": "graphs",
    "list_mixings": "mixing",
    "list_schedules": "schedule",
    "load_map": "network_map",
    "make_schedule": "schedule",
    "mixing_matrix": "mixing",
    "models_sent": "analysis",
    "push_sum_matrix": "mixing",
    "read_graph": "build",
    "renormalise": "mixing",
    "resolve_map": "build",
    "rounds_bound": "analysis",
    "rounds_to_consensus": "analysis",
    "spectral_gap": "analysis",
    "summarise": "analysis",
}

__all__ = [
    "BaseK",
    "CycleSchedule",
    "Mixer",
    "NetworkMap",
    "Schedule",
    "Setting",
    "Summary",
    "Topology",
    "build_graph",
    "build_topology",
    "check",
    "check_graph",
    "check_matrix",
    "check_schedule",
    "diameter",
    "draw_graph",
    "export",
    "lambda_2",
    "list_graphs",
    "list_mixings",
    "list_schedules",
    "load_map",
    "make_schedule",
    "mixing_matrix",
    "models_sent",
    "push_sum_matrix",
    "read_graph",
    "renormalise",
    "resolve_map",
    "rounds_bound",
    "rounds_to_consensus",
    "spectral_gap",
    "summarise",
]

if TYPE_CHECKING:
    from dimat.topology.analysis import (
        Summary,
        lambda_2,
        models_sent,
        rounds_bound,
        rounds_to_consensus,
        spectral_gap,
        summarise,
    )
    from dimat.topology.base_k import BaseK
    from dimat.topology.build import build_topology, check, read_graph, resolve_map
    from dimat.topology.distances import diameter
    from dimat.topology.draw import draw_graph
    from dimat.topology.graphs import build_graph, check_graph, list_graphs
    from dimat.topology.mixing import Mixer, check_matrix, list_mixings, mixing_matrix, push_sum_matrix, renormalise
    from dimat.topology.network_map import NetworkMap, Topology, load_map
    from dimat.topology.rounds import CycleSchedule, Schedule, check_schedule
    from dimat.topology.schedule import Setting, list_schedules, make_schedule
    from dimat.topology.write import export


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"dimat.topology.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dimat.topology' has no attribute {name!r}")
