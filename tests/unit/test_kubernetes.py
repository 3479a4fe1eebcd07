"""The manifest in docs/kubernetes.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from service.config import OTHER_VARIABLES, Settings

ROOT = Path(__file__).resolve().parents[2]


def manifests() -> dict[str, dict[str, Any]]:
    """The documents in the manifest, by kind."""
    yaml = pytest.importorskip("yaml")
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL)
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def test_manifest_fits_the_server() -> None:
    """The manifest's probes ask the gateway itself, and its ports, settings, volumes and command exist."""
    found = manifests()
    assert set(found) == {"Service", "NetworkPolicy", "StatefulSet"}
    port = Settings.model_fields["gateway_port"].default
    assert [one["port"] for one in found["Service"]["spec"]["ports"]] == [port]
    spec = found["StatefulSet"]["spec"]
    assert spec["serviceName"] == found["Service"]["metadata"]["name"]
    assert (
        found["Service"]["spec"]["selector"]
        == spec["selector"]["matchLabels"]
        == spec["template"]["metadata"]["labels"]
        == found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    )
    [container] = spec["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": port}
    known = {f"BATCH_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES | {"DATABASE_URL"}
    assert {variable["name"] for variable in container["env"]} <= known
    assert (ROOT / container["command"][0].removeprefix("/opt/vllm-batch/")).exists()
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
