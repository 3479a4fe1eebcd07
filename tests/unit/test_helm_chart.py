"""The chart in deploy/helm, rendered by Helm's own engine and checked against the schemas of those who read it."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from service.config import OTHER_VARIABLES, PROGRAMS, Settings, known_variables
from service.rpc.services import HOST_SERVICE

helm = pytest.importorskip("helm_python")
kubernetes = pytest.importorskip("kubernetes_validate")
keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
prometheus_operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm"
# The oldest that the chart allows, and the newest whose schemas are there.
VERSIONS = ("1.27", "1.37")
DATABASE = {"database": {"existingSecret": "batch"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "least": {},
    "most": {
        "image": {"tag": "1", "pullSecrets": ["registry"]},
        "database": {"gatewayKey": "gateway-url"},
        "extraEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "tls": {"existingSecret": "tls", "serverName": "batch.example"},
        "tokens": {"existingSecret": "tokens"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "workers": {
            "autoscaling": {"kind": "keda", "prometheus": "http://prometheus:9090"},
            "cache": {"storageClassName": "fast"},
            "nodeSelector": {"gpu": "yes"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
    "hpa": {"workers": {"autoscaling": {"kind": "hpa"}, "cache": {"enabled": False}}},
    "own users": {"podSecurityContext": {"runAsUser": None, "fsGroup": None}},
    "workers only": {"gateway": {"enabled": False}, "http": {"enabled": False}},
    "no workers": {"workers": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
}
# The kinds that are not Kubernetes' own.
OPERATORS = {"ScaledObject": keda.ScaledObject, "ServiceMonitor": prometheus_operator.ServiceMonitor}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, the second before the first."""
    both = deepcopy(first)
    for name, value in second.items():
        both[name] = merged(both[name], value) if isinstance(value, dict) and name in both else value
    return both


def render(values: dict[str, Any], name: str = "demo") -> dict[tuple[str, str], dict[str, Any]]:
    """The documents of a release, by kind and name."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(merged(DATABASE, values), name=name, namespace="prod")
    found = [one for name, text in texts.items() if name.endswith("yaml") for one in yaml.safe_load_all(text) if one]
    named = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(named) == len(found)
    return named


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """All variants."""
    return {name: render(values) for name, values in VARIANTS.items()}


def pods(documents: dict[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Component, pod template and container of each workload."""
    for (kind, _), one in documents.items():
        if kind in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            [container] = template["spec"]["containers"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], one, container


def fits_operator(document: dict[str, Any]) -> None:
    """Raises ValidationError unless the operator's schema has every field, with such a value."""
    document = deepcopy(document)
    if document["kind"] == "ScaledObject":
        # Of KEDA 2.17; the models for Python 3.13 and older are those of 2.16.
        assert document["spec"]["fallback"].pop("behavior") == "currentReplicasIfHigher"
    # The models leave these two out of what they require.
    assert {"apiVersion", "kind"} <= document.keys()
    OPERATORS[document["kind"]].model_validate(document, strict=True, extra="forbid")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_fits_kubernetes(rendered: Any, variant: str, version: str) -> None:
    """Every document is valid by the schema of its kind, without unknown fields."""
    documents = rendered[variant]
    assert documents
    for (kind, _), one in documents.items():
        if kind in OPERATORS:
            fits_operator(one)
        else:
            kubernetes.validate(one, version, strict=True)


def test_a_wrong_field_is_noticed(rendered: Any) -> None:
    """The schemas refuse a field that does not exist, deep in a pod."""
    wrong = deepcopy(rendered["least"]["StatefulSet", "demo-worker"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["periodSecond"] = 1
    with pytest.raises(kubernetes.ValidationError, match="periodSecond"):
        kubernetes.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("ScaledObject", ("spec", "fallback", "replica"), 1, "Extra inputs are not permitted"),
        ("ScaledObject", ("spec", "maxReplicaCount"), "8", "should be a valid integer"),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "threshold"), 5000, "should be a valid string"),
        ("ScaledObject", ("apiVersion",), "keda.sh/v1", "should be 'keda.sh/v1alpha1'"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "intervall"), "15s", "Extra inputs are not permitted"),
        ("ServiceMonitor", ("spec", "endpoints", 1, "port"), 9101, "should be a valid string"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), "15", "should match pattern"),
        ("ServiceMonitor", ("metadata", "labels", "release"), 1, "should be a valid string"),
    ],
)
def test_a_wrong_field_of_an_operator_is_noticed(
    rendered: Any, kind: str, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    """The operators' schemas refuse a field that does not exist, and a value of a wrong type or form."""
    [wrong] = [deepcopy(one) for (each, _), one in rendered["most"].items() if each == kind]
    fits_operator(wrong)
    within = wrong
    for name in path[:-1]:
        within = within[name]
    within[path[-1]] = value
    with pytest.raises(ValueError, match=rf"{'.'.join(map(str, path))}\n.*{message}"):
        fits_operator(wrong)


def test_lint() -> None:
    """Helm's linter finds nothing to warn of."""
    found = helm.lint(str(CHART))
    assert found["errors"] == []
    assert [one for one in found["messages"] if one["severity"] > 1] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_fit_together(rendered: Any, variant: str) -> None:
    """Selectors find pods, services and probes name ports that exist, and mounts name volumes."""
    documents = rendered[variant]
    by_component = {component: (workload, container) for component, workload, container in pods(documents)}
    labels = [one["spec"]["template"]["metadata"]["labels"] for one, _ in by_component.values()]
    for (kind, _), one in documents.items():
        spec = one["spec"]
        if kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
            selector = spec.get("selector") or spec["podSelector"]
            selector = selector.get("matchLabels", selector)
            assert sum(selector.items() <= each.items() for each in labels) == 1
        if kind == "Service":
            _, container = by_component[spec["selector"]["app.kubernetes.io/component"]]
            offered = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert {port["name"]: port["port"] for port in spec["ports"]} == offered
        if kind == "NetworkPolicy":
            _, container = by_component[spec["podSelector"]["matchLabels"]["app.kubernetes.io/component"]]
            allowed = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", ())}
            assert allowed <= {port["name"] for port in container["ports"]}
        if kind in ("ScaledObject", "HorizontalPodAutoscaler"):
            target = spec["scaleTargetRef"]
            assert "replicas" not in documents[target["kind"], target["name"]]["spec"]
    for workload, container in by_component.values():
        spec = workload["spec"]
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("variant", VARIANTS)
def test_fits_the_server(rendered: Any, variant: str) -> None:
    """Variables, ports and programs are those of the server; no pod is root, or can write to its image."""
    default = {name: field.default for name, field in Settings.model_fields.items()}
    for component, workload, container in pods(rendered[variant]):
        environment = {one["name"]: one.get("value") for one in container["env"]}
        assert {name for name in environment if name.startswith("BATCH_")} <= known_variables() - OTHER_VARIABLES
        programs = environment["BATCH_PROGRAMS"].split(",")
        assert set(programs) <= set(PROGRAMS)
        assert component in programs
        wanted = {default[f"{program}_port"] for program in programs}
        wanted |= {default[f"{program}_metrics_port"] for program in programs}
        assert {port["containerPort"] for port in container["ports"]} == wanted
        spec = workload["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not spec["automountServiceAccountToken"]
        probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
        for probe in probes:
            # A gateway is ready once the schema of its version is there.
            is_of_schema = component == "gateway" and probe is container["readinessProbe"]
            if "exec" in probe:
                assert (
                    probe["exec"]["command"][1:] == ["-m", "scripts.probe", component] + [HOST_SERVICE] * is_of_schema
                )
            elif "grpc" in probe:
                asked = {"service": HOST_SERVICE} if is_of_schema else {}
                assert probe["grpc"] == {"port": default[f"{component}_port"], **asked}
        # Room for preStop, the stop of the worker and that of the watchdog.
        assert spec["terminationGracePeriodSeconds"] >= (120 if component == "worker" else 35)


def test_image_and_chart_agree(rendered: Any) -> None:
    """The paths in the chart are those of the Containerfile, and both leave out what must not be in an image."""
    containerfile = (ROOT / "deploy/Containerfile").read_text()
    for _, _, container in pods(rendered["most"]):
        assert f"WORKDIR {container['workingDir']}\n" in containerfile
        home = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "home")
        assert f"BATCH_HOME={home} " in containerfile
    command = rendered["least"]["StatefulSet", "demo-worker"]["spec"]["template"]["spec"]["containers"][0]
    stop = command["lifecycle"]["preStop"]["exec"]["command"]
    assert stop[stop.index("-c") + 1] == f"{home}/supervisord.conf"
    assert {".env", ".venv", "var"} <= set((ROOT / ".dockerignore").read_text().split())


def test_scales_by_a_metric_that_exists(rendered: Any) -> None:
    """Both autoscalers use the documented metric of the queue."""
    [trigger] = rendered["most"]["ScaledObject", "demo-worker"]["spec"]["triggers"]
    [metric] = rendered["hpa"]["HorizontalPodAutoscaler", "demo-worker"]["spec"]["metrics"]
    names = {*re.findall(r"vllm_batch_\w+", trigger["metadata"]["query"]), metric["external"]["metric"]["name"]}
    assert names == {"vllm_batch_requests"}
    assert "`vllm_batch_requests`" in (ROOT / "docs/observability.md").read_text()
    pytest.importorskip("promql_parser").parse(trigger["metadata"]["query"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"database": {"existingSecret": ""}}, "database.existingSecret is required"),
        ({"tls": {"existingSecret": "tls"}}, "tls.serverName is required"),
        ({"networkPolicy": {"enabled": False}}, "everyone could call"),
        ({"workers": {"drainTimeoutS": 90}}, "workers.drainTimeoutS must be at most 80"),
        ({"workers": {"autoscaling": {"kind": "vpa"}}}, "workers.autoscaling.kind must be"),
        ({"workers": {"autoscaling": {"minReplicas": 0}}}, "workers.autoscaling.minReplicas must be"),
        ({"workers": {"autoscaling": {"kind": "keda"}}}, "workers.autoscaling.prometheus is required"),
        ({"workers": {"autoscaling": {"minReplicas": 9}}}, "workers.autoscaling.maxReplicas must be"),
        ({"workers": {"autoscaling": {"scaleDownAfterS": 3601}}}, "/workers/autoscaling/scaleDownAfterS': maximum"),
        ({"worker": {"replicas": 3}}, "'worker' not allowed"),
        ({"workers": {"replica": 3}}, "'replica' not allowed"),
        ({"workers": {"replicas": "three"}}, "/workers/replicas': got string, want integer"),
        ({"http": {"enabled": "no"}}, "/http/enabled': got string, want boolean"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    """Values that could not work, or would let everyone call, are refused by name."""
    with pytest.raises(helm.HelmError, match=message):
        render(values)


def test_a_list_of_nobody_lets_nobody_in() -> None:
    """Without clients or monitoring no rule is left whose empty list of peers would be everybody."""
    for key in ("clients", "monitoring"):
        found = render({"networkPolicy": {key: []}})
        for (kind, name), document in found.items():
            if kind == "NetworkPolicy":
                assert all(rule["from"] for rule in document["spec"]["ingress"]), name


def test_a_release_with_dots() -> None:
    """A release may be called so; a Service may not."""
    assert ("Service", "my-batch-gateway") in render({}, "my.batch")


def test_the_schema_has_every_value() -> None:
    """values.schema.json, by which Helm refuses misspelled values, has those of values.yaml and no others."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].pop("global") == {}

    def names(given: dict[str, Any]) -> dict[str, Any]:
        """What the schema names, as a tree."""
        return {name: names(one) for name, one in given.get("properties", {}).items()}

    def compare(given: Any, named: dict[str, Any], path: str) -> None:
        if named or path in ("", "global"):
            assert given.keys() == named.keys(), path
            for name in named:
                compare(given[name], named[name], f"{path}.{name}")

    compare(values, names(schema), "")


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values."""
    for name, value in values.items():
        if isinstance(value, dict) and value and name not in ("resources", "monitoring"):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def test_every_value_is_used() -> None:
    """No value in values.yaml is without effect, and each template reads only values that are there."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in CHART.glob("templates/*"))
    for path in leaves(values):
        if path[0] != "podSecurityContext":
            assert re.search(rf"\.{path[-1]}\b", templates), path
    for used in re.findall(r"\.Values((?:\.\w+)+)", templates):
        found: Any = values
        for name in used.strip(".").split("."):
            assert name in found, used
            found = found[name]
