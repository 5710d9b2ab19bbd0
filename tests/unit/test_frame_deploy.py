"""cluster.yaml and the KubeRay manifests, checked without a network."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from twotower.cluster.haproxy import VARIABLE
from twotower.environment import read_settings

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def _manifest(name: str) -> dict:
    return yaml.safe_load((ROOT / "deploy" / f"{name}.yaml").read_text())


def _cluster_of(name: str) -> dict:
    spec = _manifest(name)["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def _pods(name: str) -> list[dict]:
    cluster = _cluster_of(name)
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(prepared)
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**prepared, "max_worker": 1})


def test_ray_accepts_the_start_commands_of_the_cluster_file():
    """Options of `ray start` are checked by asking its own parser."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    commands = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        used = {
            word.split("=")[0] for word in command.partition("ray start")[2].split() if word.startswith("--")
        }
        assert used
        assert used <= known


def test_the_environment_is_set_in_the_shell_of_each_start():
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        [command] = [c for c in CLUSTER[key] if "ray start" in c]
        assert command.startswith(". ~/twotower/deploy/ray.env && ")
        program = (
            f"{VARIABLE}=$(python -m twotower.cluster.haproxy ~/twotower-haproxy) && export {VARIABLE} && "
        )
        assert program in command


def test_the_image_starts_haproxy_through_the_program_that_it_holds():
    lines = (ROOT / "deploy" / "Containerfile").read_text().splitlines()
    [variable] = [line for line in lines if line.startswith("ENV ")]
    name, _, path = variable.removeprefix("ENV ").partition("=")
    assert name == VARIABLE
    assert lines.index(f"RUN python -m twotower.cluster.haproxy {path}") > lines.index(
        "RUN pip install --no-cache-dir --no-deps --editable ."
    )


def test_every_node_gets_the_token_and_the_code():
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert CLUSTER["file_mounts"]["~/twotower"] == "."
    assert {"**/.git", "**/.venv", "**/runs"} <= set(CLUSTER["rsync_exclude"])


def test_there_are_gpu_and_cpu_nodes_each_with_their_pins():
    types = CLUSTER["available_node_types"]
    assert {"gpu", "cpu"} <= types.keys()
    assert any("requirements/gpu.txt" in c for c in types["gpu"]["worker_setup_commands"])
    assert any("requirements/cpu.txt" in c for c in CLUSTER["setup_commands"])


def test_the_image_has_the_pinned_ray():
    pins = (ROOT / "requirements" / "cpu.txt").read_text().split()
    [version] = [pin.removeprefix("ray==") for pin in pins if pin.startswith("ray==")]
    assert CLUSTER["docker"]["image"] == f"rayproject/ray:{version}-py311"
    assert f"rayproject/ray:{version}-py311" in (ROOT / "deploy" / "Containerfile").read_text()
    for name in ("rayjob", "rayservice"):
        assert _cluster_of(name)["rayVersion"] == version


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_every_pod_has_the_environment_and_a_shared_memory_volume(name):
    # KubeRay itself sets the variables of the token from authOptions.
    wanted = {key: value for key, value in read_settings().items() if key != "RAY_AUTH_MODE"}
    assert len(wanted) > 3
    assert _cluster_of(name)["authOptions"] == {"mode": "token"}
    for pod in _pods(name):
        [container] = pod["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == wanted
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/mnt/shared", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_job_runs_a_module_that_exists_with_a_file_that_exists():
    words = _manifest("rayjob")["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    config = words[words.index("--config") + 1]
    assert (ROOT / Path(config).relative_to("/home/ray/twotower")).is_file()


def test_the_service_names_an_application_and_arguments_that_exist():
    from ray.serve.schema import ServeDeploySchema

    import serve.app as app

    config = yaml.safe_load(_manifest("rayservice")["spec"]["serveConfigV2"])
    # Ray's schema lets unknown keys pass.
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    [application] = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    assert module == app.__name__
    [parameter] = inspect.signature(getattr(app, name), eval_str=True).parameters.values()
    parameter.annotation.model_validate(application.args)
