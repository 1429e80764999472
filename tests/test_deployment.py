"""Examples for containers, clusters and systemd: well formed, and their flags are vLLM's."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gimbal
from gimbal.vllm_plugin.versions import is_supported
from tests.test_docs_commands import fault

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "deployment"
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
RULES = (
    "{extends: default, rules: {line-length: {max: 120}, truthy: {check-keys: false}, "
    "document-start: disable, braces: {max-spaces-inside: 1}}}"
)


def documents(path: Path) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all(path.read_text(encoding="utf-8")) if part]


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container of a manifest, with its pod's volumes."""
    if isinstance(value, dict):
        for container in value.get("containers", ()):
            yield container | {"volumes": value.get("volumes", [])}
        for part in value.values():
            yield from containers(part)
    elif isinstance(value, list):
        for part in value:
            yield from containers(part)


SERVERS = [
    pytest.param(container, id=f"{path.name}-{index}")
    for path in MANIFESTS
    for index, container in enumerate(containers(documents(path)))
]


@pytest.mark.parametrize("path", [*MANIFESTS, *FORMS], ids=lambda path: path.name)
def test_yaml_is_clean(path: Path) -> None:
    assert documents(path)
    beside = Path(sys.executable).with_name("yamllint")
    yamllint = str(beside) if beside.exists() else shutil.which("yamllint")
    if yamllint is None:
        pytest.skip("yamllint is not installed")
    done = subprocess.run(
        [yamllint, "--strict", "-d", RULES, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_has_its_flags_memory_and_resources(server: dict[str, Any]) -> None:
    assert fault(["gimbal", "serve", *server["args"]]) is None
    assert server["image"].endswith(f":{gimbal.__version__}")
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    [shm] = [v for v in server["volumes"] if v["name"] == mounts["/dev/shm"]]
    assert shm["emptyDir"]["medium"] == "Memory"
    assert set(mounts.values()) <= {volume["name"] for volume in server["volumes"]}
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "8"
    if "--headless" in server["args"]:
        return
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert f"--port={ports['http']}" in server["args"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_nodes_of_one_server_agree() -> None:
    leader, worker = containers(documents(FOLDER / "kubernetes" / "several-nodes.yaml"))

    def flags(server: dict[str, Any]) -> dict[str, str]:
        return dict(arg[2:].split("=") for arg in server["args"] if "=" in arg)

    ours, theirs = flags(leader), flags(worker)
    assert {k: v for k, v in ours.items() if k != "port"} == {
        k: v for k, v in theirs.items() if k != "data-parallel-start-rank"
    }
    assert theirs["data-parallel-start-rank"] == ours["data-parallel-size-local"]
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert ports["rpc"] == int(ours["data-parallel-rpc-port"]) == ports["board"] - 1


def labels(value: Any) -> Iterator[dict[str, str]]:
    """Labels of everything in a manifest that has a pod's specification."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value["metadata"]["labels"]
        for part in value.values():
            yield from labels(part)
    elif isinstance(value, list):
        for part in value:
            yield from labels(part)


@pytest.mark.parametrize("name", ["one-node.yaml", "several-nodes.yaml"])
def test_a_service_reaches_one_kind_of_pod(name: str) -> None:
    parts = documents(FOLDER / "kubernetes" / name)
    [service] = [part for part in parts if part["kind"] == "Service"]
    selector = service["spec"]["selector"].items()
    assert len([found for found in labels(parts) if selector <= found.items()]) == 1
    [port] = service["spec"]["ports"]
    assert (port["name"], port["targetPort"]) == ("http", "http")
    [monitor] = documents(FOLDER / "kubernetes" / "service-monitor.yaml")
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    assert monitor["spec"]["endpoints"][0]["port"] == port["name"]


def test_the_image_is_of_a_supported_vllm() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    version = re.search(r"^ARG VLLM_VERSION=v(\S+)$", text, re.MULTILINE)
    assert version is not None
    assert is_supported(version[1])
    assert text.index("ARG VLLM_VERSION") < text.index("FROM vllm/vllm-openai:${VLLM_VERSION}")
    assert 'ENTRYPOINT ["gimbal", "serve"]' in text


def test_the_unit_starts_a_server_and_does_not_repeat_a_refusal() -> None:
    text = (FOLDER / "vllm-gimbal.service").read_text(encoding="utf-8").replace("\\\n", " ")
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    program, *words = service["ExecStart"].split()
    assert program.endswith("/gimbal")
    assert fault(["gimbal", *words]) is None
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert service["KillMode"] == "mixed"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_ask_for_what_doctor_says(path: Path) -> None:
    [form] = documents(path)
    if path.name == "config.yml":
        return
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    labels = " ".join(part["attributes"]["label"] for part in asked)
    assert "gimbal doctor --json" in labels
    for command in re.findall(r"`gimbal ([^`]+)`", labels):
        assert fault(["gimbal", *command.split()]) is None
