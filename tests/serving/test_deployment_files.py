"""What can be said of docs/serving without a container engine or a cluster: it parses, and it agrees with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer.main

from alitok_fast.cli.app import app as commands
from alitok_fast.serving.replicas import SERVES_OWN, arguments
from alitok_fast.serving.settings import API_KEYS, ServeSettings

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "serving"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
KUBERNETES = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
(RAYSERVICE,) = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
SERVE_CONFIG = yaml.safe_load(RAYSERVICE["spec"]["serveConfigV2"])
KNOWN_VARIABLES = {API_KEYS, "OMP_NUM_THREADS", "RAY_USAGE_STATS_ENABLED"}


def kind(name: str) -> dict:
    (found,) = [one for one in KUBERNETES if one["kind"] == name]
    return found


def pod() -> dict:
    return kind("Deployment")["spec"]["template"]["spec"]


def container() -> dict:
    (found,) = pod()["containers"]
    return found


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of that name; lines that go on are joined, comments left out."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    return re.findall(rf"^{name}\s+(.*)$", re.sub(r"\\\n\s*", "", lines), re.MULTILINE)


def served(parts: list[str]) -> dict:
    """The options of `alitok-fast serve` in a command line."""
    assert parts[:2] == ["alitok-fast", "serve"]
    command = typer.main.get_command(commands).commands["serve"]
    return command.make_context("serve", list(parts[2:])).params


def entry() -> list[str]:
    (line,) = instructions("ENTRYPOINT")
    return json.loads(line)


def routes() -> set[str]:
    source = (ROOT / "alitok_fast" / "serving" / "app.py").read_text()
    return set(re.findall(r'@app\.get\(\s*"([^"]+)"', source))


@pytest.mark.parametrize("name", ["Dockerfile", "kubernetes.yaml", "rayservice.yaml"])
def test_files_say_that_they_were_not_run(name):
    assert (FOLDER / name).read_text().startswith("# Not run: where this was written there is no ")


def test_the_image_serves_on_every_address_of_the_container():
    (command,) = instructions("CMD")[-1:]
    options = served(entry() + json.loads(command))
    assert options["host"] == "0.0.0.0" and instructions("EXPOSE") == [str(options["port"])]
    (health,) = instructions("HEALTHCHECK")
    (port, path) = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", health).groups()
    assert int(port) == options["port"] and path in routes()
    assert API_KEYS in DOCKERFILE


def test_commands_in_the_dockerfile_parse():
    shown = re.findall(r"docker run .*? alitok-fast(?::\w+)?((?: --?[\w-]+ \S+)*)(?:\s|$)", DOCKERFILE, re.MULTILINE)
    assert len(shown) == 3
    for arguments_ in shown:
        served(entry() + arguments_.split())


def test_the_image_is_made_of_files_that_are_here_and_runs_without_rights():
    for line in instructions("COPY"):
        *files, _ = [part for part in line.split() if not part.startswith("--")]
        if "--from=build" not in line:
            assert all((ROOT / file).exists() for file in files), line
    assert instructions("ARG")[:2] == ["BUILD_BASE=python:3.12-slim", "BASE=python:3.12-slim"]
    assert [line.split()[0] for line in instructions("FROM")] == ["${BUILD_BASE}", "${BASE}"]
    (user,) = instructions("USER")
    assert int(user) > 0 and f"--uid {user}" in DOCKERFILE
    # The build needs what pyproject.toml reads.
    project = (ROOT / "pyproject.toml").read_text()
    assert all(name in " ".join(instructions("COPY")) for name in re.findall(r'"(README\.md|LICENSE)"', project))
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in ("serve", "ray"))


def test_extras_of_the_image_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE + (FOLDER / "rayservice.yaml").read_text()):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_probes_ask_for_routes_on_the_port_that_is_served():
    options = served(entry() + container()["args"])
    (port,) = container()["ports"]
    assert port["containerPort"] == options["port"]
    paths = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/ready", "readiness": "/ready", "liveness": "/health",
    }  # fmt: skip
    assert {probe["path"] for probe in paths.values()} <= routes()
    assert {probe["port"] for probe in paths.values()} == {port["name"]}
    (service,) = kind("Service")["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    labels = kind("Deployment")["spec"]["template"]["metadata"]
    assert kind("Service")["spec"]["selector"].items() <= labels["labels"].items()
    assert kind("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels["labels"].items()
    assert labels["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert labels["annotations"]["prometheus.io/path"] in routes()


def test_a_pod_has_time_to_finish_what_runs():
    grace = served(entry() + container()["args"])["grace_seconds"]
    assert grace == ServeSettings.grace_seconds
    (name, pause) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep" and pod()["terminationGracePeriodSeconds"] > int(pause) + grace + 2


def test_variables_are_those_that_something_reads():
    groups = RAYSERVICE["spec"]["rayClusterConfig"]
    pods = [pod(), groups["headGroupSpec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in groups["workerGroupSpecs"]]
    for one in pods:
        variables = {variable["name"]: variable for variable in one["containers"][0]["env"]}
        assert API_KEYS in variables and set(variables) <= KNOWN_VARIABLES
        secret = variables[API_KEYS]["valueFrom"]["secretKeyRef"]
        assert not secret.get("optional")  # no keys, no container
        for file in ("kubernetes.yaml", "rayservice.yaml"):
            text = (FOLDER / file).read_text()
            assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in text
        assert one["securityContext"]["runAsUser"] == int(instructions("USER")[0])


def test_the_autoscaler_looks_at_a_metric_there_is():
    spec = kind("HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == kind("Deployment")["metadata"]["name"]
    name = spec["metrics"][0]["pods"]["metric"]["name"]
    source = (ROOT / "alitok_fast" / "serving" / "metrics.py").read_text()
    assert name.startswith("alitok_") and f'("{name.removeprefix("alitok_")}",' in source


def test_serve_takes_its_config():
    (application,) = SERVE_CONFIG["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (ROOT / f"{module.replace('.', '/')}.py").exists() and name == "build"
    given = arguments(application["args"])
    options = given.deployment()
    group = RAYSERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    spec = group["template"]["spec"]
    limits = spec["containers"][0]["resources"]["limits"]
    assert options["ray_actor_options"]["num_cpus"] <= float(limits["cpu"])
    assert group["maxReplicas"] >= options["autoscaling_config"]["max_replicas"]
    assert spec["terminationGracePeriodSeconds"] > options["graceful_shutdown_timeout_s"]
    assert not SERVES_OWN.keys() & application["args"].keys()
    ports = {
        one["name"]: one["containerPort"]
        for one in RAYSERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert SERVE_CONFIG["http_options"]["port"] == ports["serve"]

    schema = pytest.importorskip("ray.serve.schema")
    assert schema.ServeDeploySchema.model_validate(SERVE_CONFIG).applications[0].args == application["args"]
