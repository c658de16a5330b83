"""The files for clusters: Ray's validators, its autoscaler and our own command line take them, and they agree."""

import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import typer
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from calibration_jobs import calibrate
from deploy import check
from examples.application import ROOT
from serve_apps.metrics import DESCRIPTIONS, KL_DESCRIPTIONS, SETTINGS, SHADOW_DESCRIPTIONS
from serve_apps.sere import LONGEST_ANSWER_SECONDS, AppConfig

MANIFESTS = check.manifests()
SPECS = {name: manifest["spec"] for name, (manifest, *_others) in MANIFESTS.items()}
CLUSTERS = {  # the part that every kind has
    "raycluster.yaml": SPECS["raycluster.yaml"],
    "rayjob.yaml": SPECS["rayjob.yaml"]["rayClusterSpec"],
    "rayservice.yaml": SPECS["rayservice.yaml"]["rayClusterConfig"],
}
PODS = [
    (name, group["template"]["spec"])
    for name, cluster in CLUSTERS.items()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
]
FILES = [ROOT / "cluster.yaml", ROOT / "deploy" / "Dockerfile", *check.MANIFESTS.glob("*.yaml")]
README = (ROOT / "deploy" / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RAY,) = (pin.partition("==")[2] for pin in PROJECT["dependencies"] if pin.startswith("ray["))
BASE_IMAGE = f"rayproject/ray:{RAY}-py311-gpu"
WEIGHTS = "*.safetensors"


@pytest.fixture(scope="module")
def launched() -> dict:
    """cluster.yaml as `ray up` completes it."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def application() -> dict:
    """The one that the endpoint's manifest serves."""
    return yaml.safe_load((ROOT / "serve_apps" / "qwen3_30b_a3b_tp2.yaml").read_text())


def autoscaled(name: str) -> dict[str, dict]:
    """A manifest's groups as the autoscaler in KubeRay's head pod reads them."""
    cluster = {"metadata": {"name": "sere", "namespace": "default"}, "spec": CLUSTERS[name]}
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def newly_started(types: dict[str, dict], head: str, bundles: list[dict]) -> dict[str, int]:
    """The nodes that the autoscaler would start for these bundles, by type."""

    def score(node: dict, bundles: list[dict], node_type: str) -> tuple | None:
        return _default_utilization_scorer(
            node, bundles, node_type, node_availability_summary=NodeAvailabilitySummary({})
        )

    nodes, unmet = get_nodes_for(types, {}, head, 8, bundles, utilization_scorer=score)
    assert unmet == []
    return dict(nodes)


def job_settings() -> calibrate.CalibrationConfig:
    """The settings that the calibration's own command line reads from the job's entrypoint."""
    python, *arguments = shlex.split(SPECS["rayjob.yaml"]["entrypoint"])
    assert [python, *arguments[:2]] == ["python", "-m", "calibration_jobs.calibrate"]
    command = typer.Typer()
    command.command()(calibrate.main)
    given = typer.main.get_command(command).make_context("calibrate", arguments[2:]).params
    return calibrate.CalibrationConfig.model_validate({name: value for name, value in given.items() if value})


def test_ray_up_takes_the_cluster_file(launched):
    types = dict(launched["available_node_types"])
    head = types.pop(launched["head_node_type"])
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert types and launched["max_workers"] >= 1 and launched["idle_timeout_minutes"] > 0
    assert {name: workers["resources"].get("GPU", 0) for name, workers in types.items()} == {
        "cpu": 0,
        "h100": 8,
        "a100": 8,
    }
    for workers in types.values():
        assert workers["min_workers"] == 0 < workers["max_workers"]
    assert launched["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize(
    ("bundle", "started"),
    [
        ({"GPU": 1, "CPU": 1, "accelerator_type:H100": 0.001}, "h100"),
        ({"GPU": 1, "CPU": 1, "accelerator_type:A100": 0.001}, "a100"),
        ({"CPU": 1}, "cpu"),
    ],
)
def test_ray_up_starts_the_nodes_that_are_asked_for(launched, bundle, started):
    """From the head alone, for as many replicas as a node holds; the bundle is Serve LLM's."""
    assert newly_started(launched["available_node_types"], "head", [bundle] * 8) == {started: 1}


def test_every_gpu_that_an_application_names_has_a_node_type(launched):
    wanted = {
        f"accelerator_type:{app['args']['accelerator_type']}"
        for path in (ROOT / "serve_apps").glob("*.yaml")
        for app in yaml.safe_load(path.read_text())["applications"]
        if "accelerator_type" in app["args"]
    }
    assert wanted <= {resource for each in launched["available_node_types"].values() for resource in each["resources"]}


def test_nothing_but_the_wheel_and_the_secrets_is_uploaded(launched):
    assert {".git", "build", WEIGHTS} <= set(launched["rsync_exclude"])
    mounts = {remote: local for remote, local in launched["file_mounts"].items() if not local.startswith("~")}
    assert list(mounts.values()) == ["build/wheel", "requirements"]
    folder, locks = mounts
    wheel = f"{folder}/{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}-py3-none-any.whl"
    words = [shlex.split(command) for command in launched["setup_commands"]]
    assert [each[-1] for each in words] == [f"{locks}/gpu.lock", wheel]
    assert "--require-hashes" in words[0] and "--no-deps" in words[1]


def test_ray_up_asks_for_a_token_and_reads_secrets_from_files(launched):
    options = [option.split(" ", 1) for option in launched["docker"]["run_options"]]
    environment = dict(value.split("=", 1) for flag, value in options if flag == "--env")
    assert environment.pop("RAY_AUTH_MODE") == "token"
    mounted = [remote for remote, local in launched["file_mounts"].items() if local.startswith("~")]
    for name in ("RAY_AUTH_TOKEN_PATH", "SERE_API_KEY_FILE", "SERE_ADMIN_TOKEN_FILE"):
        assert str(PurePosixPath(environment[name]).parent) in mounted
        assert PurePosixPath(environment[name]).name in README


def test_one_ray_one_python_one_image(launched):
    """Everywhere what pyproject.toml pins."""
    assert launched["docker"]["image"] == BASE_IMAGE
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)$", dockerfile, re.MULTILINE) == [BASE_IMAGE]
    assert "--require-hashes -r gpu.lock" in dockerfile and "--no-deps ." in dockerfile
    tag = f"{PROJECT['version']}-ray{BASE_IMAGE.partition(':')[2]}"
    (image,) = {pod["containers"][0]["image"] for _name, pod in PODS}
    assert image.endswith(f"/sere-dist:{tag}")
    assert {cluster["rayVersion"] for cluster in CLUSTERS.values()} == {RAY}
    assert "PYTHON ?= python3.11\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml"])
def test_kubernetes_clusters_grow_from_a_head_alone(name):
    assert CLUSTERS[name]["enableInTreeAutoscaling"]
    head, workers = autoscaled(name).values()
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert workers["min_workers"] == 0 < workers["max_workers"]
    assert workers["resources"]["GPU"] in (4, 8)


def test_a_calibrations_cluster_has_its_gpus_from_the_start_and_gives_them_back():
    """KubeRay submits the job when all pods run."""
    head, workers = autoscaled("rayjob.yaml").values()
    assert head["resources"]["CPU"] == 0
    (group,) = CLUSTERS["rayjob.yaml"]["workerGroupSpecs"]
    assert group["replicas"] == workers["min_workers"] == workers["max_workers"] == 1
    assert "enableInTreeAutoscaling" not in CLUSTERS["rayjob.yaml"]
    assert SPECS["rayjob.yaml"]["shutdownAfterJobFinishes"] and SPECS["rayjob.yaml"]["activeDeadlineSeconds"]


def test_the_job_calibrates_what_the_endpoint_serves(application):
    settings, args = job_settings(), application["applications"][0]["args"]
    assert settings.model == args["model"] and str(settings.output) == args["rerouting"]["artifact"]
    assert settings.device == "cuda"  # `auto` would take CPUs where GPUs are yet to come
    assert not settings.dry_run


def test_the_job_has_the_committed_runtime_environment():
    environment = yaml.safe_load(SPECS["rayjob.yaml"]["runtimeEnvYAML"])
    assert environment == yaml.safe_load((ROOT / "calibration_jobs" / "runtime_env.yaml").read_text())
    assert {".git", "build", WEIGHTS} <= set(environment["excludes"])


def test_the_endpoint_serves_the_application_file(application):
    """Spread over pods, of which another cluster may have too few. Ray's schema and ours take it, and the cluster can
    grow to what it asks for, and to a pod more while a new version starts."""
    served = yaml.safe_load(SPECS["rayservice.yaml"]["serveConfigV2"])
    (deployed,) = ServeDeploySchema.model_validate(served).applications
    spread = served["applications"][0]["args"]
    assert spread.pop("deployment") == {"max_surge_percent": 25}
    assert spread["ingress"].pop("max_replicas_per_node") == 1
    assert served == application
    config = AppConfig.model_validate(deployed.args)
    assert config.require_api_key
    bundles = [{"GPU": 1, "CPU": 1, f"accelerator_type:{config.accelerator_type}": 0.001}]
    bundles *= config.num_replicas * config.tensor_parallel_size
    (started,) = newly_started(autoscaled("rayservice.yaml"), "headgroup", bundles).items()
    assert started == ("h100", 2) and CLUSTERS["rayservice.yaml"]["workerGroupSpecs"][0]["maxReplicas"] > 2


def test_the_endpoint_has_what_its_manifest_names():
    """kustomization.yaml brings it: the Redis of the head, and what the pods' labels are selected by."""
    kustomization = yaml.safe_load((check.MANIFESTS / "kustomization.yaml").read_text())
    objects = [each for name in kustomization["resources"] for each in MANIFESTS[name]]
    assert "monitoring.yaml" not in kustomization["resources"]  # not every cluster has Prometheus' operator
    cluster = CLUSTERS["rayservice.yaml"]
    (service,) = [each for each in objects if each["kind"] == "Service"]
    (port,) = service["spec"]["ports"]
    state = cluster["gcsFaultToleranceOptions"]
    assert state["redisAddress"] == f"redis://{service['metadata']['name']}:{port['port']}"
    (redis,) = [each["spec"]["template"] for each in objects if each["kind"] == "StatefulSet"]
    (secret,) = redis["spec"]["containers"][0]["env"]
    assert secret["valueFrom"] == state["redisPassword"]["valueFrom"]
    pods = [redis["metadata"]["labels"]] + [
        group["template"]["metadata"]["labels"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    selectors = [each["spec"].get("podSelector", each["spec"].get("selector", {})) for each in objects]
    selectors = [each.get("matchLabels", each) for each in selectors if each]
    assert len(selectors) == 5
    assert all(any(wanted.items() <= labels.items() for labels in pods) for wanted in selectors)


def test_pods_that_end_are_drained_in_time():
    """The hook gets as long as an answer may take, and Kubernetes waits for the hook."""
    (workers,) = CLUSTERS["rayservice.yaml"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:-1] == ["python", "-m", "serve_apps.drain", "--seconds"]
    assert LONGEST_ANSWER_SECONDS < int(hook[-1]) < pod["terminationGracePeriodSeconds"]
    assert SPECS["rayservice.yaml"]["rayClusterDeletionDelaySeconds"] > LONGEST_ANSWER_SECONDS


def test_no_pod_may_do_more_than_it_must():
    for name, pod in PODS:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            is_head = container["name"] == "ray-head"  # its autoscaler asks Kubernetes for pods
            assert pod.get("automountServiceAccountToken") is (None if is_head else False), name


def test_every_alert_is_in_the_runbook_and_asks_for_metrics_that_exist():
    (rules,) = [each for each in MANIFESTS["monitoring.yaml"] if each["kind"] == "PrometheusRule"]
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    guides = (ROOT / "docs" / "guides.md").read_text()
    assert re.findall(r"^\| `(Sere\w+)` \|", guides, re.MULTILINE) == [alert["alert"] for alert in alerts]
    ours = {f"ray_sere_{name}" for name in (*SETTINGS, *KL_DESCRIPTIONS)}
    ours |= {f"ray_sere_{name}_total" for name in (*DESCRIPTIONS, *SHADOW_DESCRIPTIONS)}
    for alert in alerts:
        named = set(re.findall(r"ray_sere_\w+", alert["expr"]))
        assert named <= ours and ("ray_" in alert["expr"])


def test_pods_share_a_volume_and_read_secrets_from_files(application):
    """Keys are where an ingress may run, which is not the head."""
    artifact = PurePosixPath(application["applications"][0]["args"]["rerouting"]["artifact"])
    for name, pod in PODS:
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert mounts["/mnt/shared"]["persistentVolumeClaim"] == {"claimName": "sere-shared"}
        assert artifact.is_relative_to("/mnt/shared")
        assert PurePosixPath(environment.pop("HF_HOME")).is_relative_to("/mnt/shared")
        assert (environment.pop("RAY_USAGE_STATS_ENABLED"), environment.pop("DO_NOT_TRACK")) == ("0", "1")
        if container["name"] == "ray-head":
            assert not environment
            continue
        assert environment.pop("HF_TOKEN_PATH") == "/etc/huggingface/token"
        assert mounts["/etc/huggingface"]["secret"]["optional"]  # most models need none
        if name == "rayjob.yaml":
            assert not environment
        else:
            assert set(environment) == {"SERE_API_KEY_FILE", "SERE_ADMIN_TOKEN_FILE"}
            assert {str(PurePosixPath(path).parent) for path in environment.values()} == {"/etc/sere"}
            assert mounts["/etc/sere"]["secret"]["secretName"] == "sere-keys"
    for cluster in CLUSTERS.values():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "sere-ray-token"}


def test_what_is_to_be_filled_in_stands_once_and_is_named():
    for path in FILES:
        found = re.findall(r"CHANGE_ME_[A-Z_]+|registry\.example", path.read_text())
        assert len(found) == len(set(found)), path.name
        assert all(f"`{placeholder}`" in README for placeholder in found)
    assert all(f"`{path.relative_to(ROOT / 'deploy')}`" in README for path in check.MANIFESTS.glob("*.yaml"))


def definition(**fields) -> dict:
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
    for name in ("apiVersion", "kind"):
        schema["properties"][name] = {"type": "string"}
    schema["properties"]["metadata"] = {"type": "object"}
    version = {"name": "v1", "served": True, "schema": {"openAPIV3Schema": schema}}
    spec = {"group": "ray.io", "names": {"kind": "RayCluster"}, "versions": [version]}
    return {"kind": "CustomResourceDefinition", "spec": spec}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"replicas": 1, "labels": {"a": "b"}, "port": "http", "pods": [{"name": "a"}, {"name": "b"}]}, None),
        ({"replicsa": 1}, "spec: .*'replicsa' was unexpected"),
        ({"replicas": "1"}, "spec.replicas: '1' is not of type 'integer'"),
        ({"labels": {"a": 1}}, "spec.labels.a: 1 is not of type 'string'"),
        ({"pods": [{"name": "a", "image": "b"}]}, r"spec.pods\[0\]: .*'image' was unexpected"),
        ({"pods": [{"name": "a"}, {"name": "a"}]}, "spec.pods: a is there 2 times"),
    ],
)
def test_the_check_refuses_what_a_server_would_refuse_or_drop(tmp_path, spec, message):
    named = {"type": "object", "properties": {"name": {"type": "string"}}}
    crd = definition(
        replicas={"type": "integer"},
        labels={"type": "object", "additionalProperties": {"type": "string"}},
        port={"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
        pods={"type": "array", "items": named, "x-kubernetes-list-map-keys": ["name"]},
    )
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a", "labels": {}}, "spec": spec}
    problems = check.problems(manifest, check.definitions(tmp_path))
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert re.match(message, problem)


def test_the_check_says_what_it_lacks(tmp_path, capsys):
    with pytest.raises(SystemExit, match="name the folder of the operators' custom resource definitions"):
        check.main(None)
    with pytest.raises(SystemExit, match="1"):
        check.main(Path(tmp_path))
    assert "no definition of ray.io/v1 RayJob is among: none" in capsys.readouterr().out
