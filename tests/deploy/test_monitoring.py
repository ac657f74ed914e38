"""Prometheus' and Grafana's files. References: promtool (syntax of all, and alerts over recorded series); the metrics
that an agent really has (dimat.ui.trackers.prometheus)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dimat.ui.trackers.prometheus import LABELS, METRICS
from tests.deploy.tools import DEPLOY, documents, passes, run, tool

FOLDER = DEPLOY / "monitoring"
BOARD = json.loads((FOLDER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule for group in documents(FOLDER / "alerts.yml")[0]["groups"] for rule in group["rules"]
]
TESTS: list[dict[str, Any]] = documents(FOLDER / "alerts_test.yml")[0]["tests"]
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$run": ".*", "$agent": ".*", "$metric": "accuracy"}


def panel_queries() -> Iterator[str]:
    """Yield the dashboard's queries with its variables filled in."""
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield query


def everything() -> str:
    """Return all text in which metrics are named."""
    queries = [variable["query"]["query"] for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
    series = [entry["series"] for test in TESTS for entry in test["input_series"]]
    return "\n".join([*panel_queries(), *queries, *(rule["expr"] for rule in RULES), *series])


def test_prometheus_takes_configuration_and_rules() -> None:
    promtool = tool("promtool")
    passes(promtool, "check", "config", "prometheus.yml", cwd=FOLDER)
    passes(promtool, "check", "rules", "--lint-fatal", "alerts.yml", cwd=FOLDER)


def test_alerts_over_recorded_series() -> None:
    """promtool: each alert fires where it should, with its labels and text, and is quiet where it should be."""
    promtool = tool("promtool")
    assert "SUCCESS" in passes(promtool, "test", "rules", "alerts_test.yml", cwd=FOLDER)
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) > 10
    assert [test["name"] for test in TESTS] == [f"{name} {what}" for name in names for what in ("fires", "is quiet")]
    for test in TESTS:
        (asked,) = test["alert_rule_test"]
        assert asked["alertname"] == test["name"].split()[0]
        assert bool(asked["exp_alerts"]) == test["name"].endswith("fires")


@pytest.mark.parametrize("instead", ["vector(0) > 1", 'label_replace(vector(1), "agent", "x", "", "")'])
def test_recorded_series_can_tell(tmp_path: Path, instead: str) -> None:
    """With rules that never fire, or always, promtool finds fault with every alert."""
    promtool = tool("promtool")
    shutil.copy(FOLDER / "alerts_test.yml", tmp_path)
    rules = documents(FOLDER / "alerts.yml")[0]
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = instead
            rule.pop("for", None)
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    done = run(promtool, "test", "rules", "alerts_test.yml", cwd=tmp_path)
    assert done.returncode != 0
    for rule in RULES:
        assert rule["alert"] in done.stdout + done.stderr


def test_prometheus_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules, which promtool parses; a query that is none is found."""
    promtool = tool("promtool")
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(panel_queries())]
    assert len(rules) > 25
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    passes(promtool, "check", "rules", file)
    rules.append({"record": "panel:wrong", "expr": "sum(dimat_round"})
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert run(promtool, "check", "rules", file).returncode != 0


def test_the_dashboard_is_whole() -> None:
    """Numbers of panels differ, panels do not overlap, each says what it shows in, and its source is a variable."""
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
    named = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__all"}
    assert used <= named, used - named


def test_every_metric_that_is_named_exists() -> None:
    """In panels, alerts and recorded series; with labels, and values of labels, that the metric has. And all that an
    agent tells is shown somewhere."""
    text = everything()
    named = set(re.findall(r"\bdimat_\w+", text))
    assert named <= set(METRICS), named - set(METRICS)
    shown = set(re.findall(r"\bdimat_\w+", "\n".join([*panel_queries(), *(rule["expr"] for rule in RULES)])))
    assert set(METRICS) == shown
    for metric, chosen in re.findall(r"\b(dimat_\w+)\{([^}]*)\}", text):
        own = {"agent", "run", *LABELS.get(metric, ())}
        assert set(re.findall(r"(\w+)=", chosen)) <= own, (metric, chosen)


def test_what_is_provisioned() -> None:
    """Grafana's files name the data source and the folder that compose mounts the dashboard into."""
    (source,) = documents(FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml")[0]["datasources"]
    (provider,) = documents(FOLDER / "grafana" / "provisioning" / "dashboards" / "dimat.yml")[0]["providers"]
    (compose,) = documents(DEPLOY / "compose" / "compose.yaml")
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounts
    assert source["url"].split("//")[1].split(":")[0] in compose["services"]
