"""Kubernetes manifests. References: kubernetes-validate (the API's own schemas, strictly), `kubectl kustomize` where
there is one, and what the pods need of each other and of the map."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import yaml

from dimat.agent.setup.prepare import addresses_on_map
from dimat.config import load_experiment
from dimat.net.pki.identity import load_identity
from tests.deploy.tools import DEPLOY, documents, passes, program, run, tool

FOLDER = DEPLOY / "kubernetes"
BASE = FOLDER / "base"
(STATEFUL,) = documents(BASE / "statefulset.yaml")
(SERVICE,) = documents(BASE / "service.yaml")
(CUSTOM,) = documents(BASE / "kustomization.yaml")
POD: dict[str, Any] = STATEFUL["spec"]["template"]["spec"]
(AGENT,) = POD["containers"]
(KEYS,) = POD["initContainers"]
CONFIG = load_experiment(BASE / "agents.toml", (), env={})


def manifests() -> list[Path]:
    return [BASE / name for name in CUSTOM["resources"]]


def validate(*files: Path) -> subprocess.CompletedProcess[str]:
    return run(tool("kubernetes-validate"), "--strict", *files)


def test_manifests_follow_the_schemas(tmp_path: Path) -> None:
    done = validate(*manifests())
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed") == len(manifests())
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((BASE / "statefulset.yaml").read_text().replace("readOnlyRootFilesystem", "readOnlyRoot"))
    assert validate(wrong).returncode != 0


def test_kustomizations_can_be_built(tmp_path: Path) -> None:
    """Base and overlay, as `kubectl apply -k` would send them; the overlay asks for a GPU and the image that uses it,
    and leaves the rest as it is."""
    kubectl = tool("kubectl")
    built: dict[str, dict[str, Any]] = {}
    for name in ("base", "overlays/gpu"):
        file = tmp_path / f"{name.replace('/', '-')}.yaml"
        file.write_text(passes(kubectl, "kustomize", FOLDER / name))
        done = validate(file)
        assert done.returncode == 0, done.stdout + done.stderr
        built[name] = {each["kind"]: each for each in documents(file)}
        maps = built[name]["ConfigMap"]["data"]
        assert maps == {key: (BASE / key).read_text() for key in ("agents.toml", "map.toml")}
        assert {each["metadata"].get("namespace", "dimat") for each in built[name].values()} == {"dimat"}
    plain, gpu = (built[name]["StatefulSet"]["spec"]["template"]["spec"] for name in built)
    assert {each["image"] for each in (*gpu["containers"], *gpu["initContainers"])} == {"dimat:cuda"}
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for pod in (plain, gpu):
        pod.pop("tolerations", None)
        for each in (*pod["containers"], *pod["initContainers"]):
            del each["image"], each["resources"]
    assert plain == gpu


def test_pods_are_the_agents_of_the_map() -> None:
    """Names and addresses of the map are those that the StatefulSet and its headless Service give the pods."""
    spec = STATEFUL["spec"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"]
    assert spec["serviceName"] == SERVICE["metadata"]["name"]
    namespace = CUSTOM["namespace"]
    names = [f"{STATEFUL['metadata']['name']}-{ordinal}" for ordinal in range(spec["replicas"])]
    (port,) = [each["containerPort"] for each in AGENT["ports"] if each["name"] == "peers"]
    host = f"{spec['serviceName']}.{namespace}.svc.cluster.local:{port}"
    assert addresses_on_map(CONFIG) == {name: (f"{name}.{host}",) for name in names}
    assert AGENT["args"][:4] == ["agent", "/etc/dimat/agents.toml", "--name", "$(POD_NAME)"]
    (variable,) = AGENT["env"]
    assert variable == {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    for file in ("poddisruptionbudget", "networkpolicy", "service"):
        (found,) = documents(BASE / f"{file}.yaml")
        chosen = found["spec"].get("selector") or found["spec"]["podSelector"]
        labels = STATEFUL["spec"]["template"]["metadata"]["labels"]
        assert (chosen.get("matchLabels") or chosen).items() <= labels.items()


def test_pods_are_confined() -> None:
    """Not root, nothing writable but state, keys and scratch, no capabilities, no token of the cluster; time to drain;
    probes by the agent's own socket."""
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not POD["automountServiceAccountToken"]
    assert not POD["enableServiceLinks"]  # DIMAT_… variables are settings
    for each in (AGENT, KEYS):
        context = each["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert each["resources"]["limits"]["memory"]
    assert POD["terminationGracePeriodSeconds"] > CONFIG.agent.drain_s + 10
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert AGENT[probe]["exec"]["command"] == ["dimat", "status", "/var/lib/dimat/agent"]
    mounts = {each["name"]: each for each in AGENT["volumeMounts"]}
    assert "secret" not in mounts
    assert "subPath" not in mounts["config"]
    writable = {each["mountPath"] for each in mounts.values() if not each.get("readOnly")}
    assert writable == {"/var/lib/dimat", "/tmp"}


def test_keys_come_from_the_secret(tmp_path: Path) -> None:
    """The page's commands make the Secret's files out of the key script's folder, and the init container's own command
    hands a pod its keys, with modes that an agent takes. (kubectl is a stand-in here that keeps what it is told.)"""
    text = (BASE / "kustomization.yaml").read_text()
    lines = re.sub(r"\\\n", " ", "\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE))).splitlines()
    issue = next(line for line in lines if "issue-keys.sh" in line)
    create = next(line for line in lines if "create secret" in line)
    assert re.search(r"create secret generic (\S+)", create)[1] == POD["volumes"][1]["secret"]["secretName"]  # type: ignore[index]
    folder = program(tmp_path / "bin")
    secret = tmp_path / "secret"
    secret.mkdir()
    (folder / "kubectl").write_text(
        f'#!/bin/bash\nfor word; do case $word in --from-file=*) cp "${{word#*=}}" "{secret}"; esac; done\n'
    )
    (folder / "kubectl").chmod(0o755)
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("keys"))
    path = f"{folder}:{os.environ['PATH']}"
    for line in (issue, create):
        passes("bash", "-euc", line, cwd=tmp_path, PATH=path)
    names = {f"agent-{ordinal}" for ordinal in range(STATEFUL["spec"]["replicas"])}
    assert {path.name for path in secret.iterdir()} == {"ca.crt", *(f"{n}.{e}" for n in names for e in ("key", "crt"))}
    for path_ in secret.iterdir():
        path_.chmod(0o440)  # as a Secret's files are with fsGroup
    own = tmp_path / "keys-of-pod"
    own.mkdir()
    command = [word.replace("/secret/", f"{secret}/").replace("/run/dimat/keys", str(own)) for word in KEYS["command"]]
    passes(*command, POD_NAME="agent-3")
    assert {path.name for path in own.iterdir()} == {"agent-3.key", "agent-3.crt", "ca.crt"}
    assert stat.S_IMODE((own / "agent-3.key").stat().st_mode) & 0o077 == 0
    assert load_identity(own, "agent-3").name == "agent-3"


def test_yaml_means_what_it_looks_like() -> None:
    """No value was read as another kind of thing than it is meant to be: an octal mode is a number, ports are too."""
    text = yaml.safe_dump(STATEFUL)
    assert POD["volumes"][1]["secret"]["defaultMode"] == 0o440
    assert "null" not in text
