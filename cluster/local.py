"""A Ray cluster of several nodes on this machine, a job on it, and nothing left of either.

    python cluster/local.py                                  # three nodes, and the demo
    python cluster/local.py --nodes 2 train.py --epochs 3    # a script of your own, with its arguments

The script goes through Ray's job submission, as it would to a cluster elsewhere; what lies beside it goes with it. It
finds the cluster with `ray.init(address="auto")`, and where to write in STORAGE_PATH. Needs ray[default].
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).with_name("demo.py")


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(cluster, arguments):
    """Start the nodes, of which the first, the head, takes no training; the port of the job server."""
    port = free_port()
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    cluster.add_node(num_cpus=0, dashboard_agent_listen_port=free_port(), **dashboard)
    for _ in range(arguments.nodes - 1):
        # Each node's agent has the same port by default, which another Ray on this machine may have, too.
        cluster.add_node(num_cpus=arguments.cpus, dashboard_agent_listen_port=free_port())
    print(f"{arguments.nodes} nodes; dashboard: http://127.0.0.1:{port}", flush=True)
    return port


async def follow(client, job):
    """Print what the job prints, until it ends."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def run(arguments, port):
    """Submit the script and wait for its end; whether it succeeded."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.disable(logging.INFO)  # of what the client does
    client = JobSubmissionClient(f"http://127.0.0.1:{port}")
    script = Path(arguments.script).absolute()
    job = client.submit_job(
        entrypoint=shlex.join([sys.executable, "-u", script.name, *arguments.arguments]),
        runtime_env={"working_dir": str(script.parent), "env_vars": {"STORAGE_PATH": arguments.storage}},
    )
    asyncio.run(follow(client, job))
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        reason = client.get_job_info(job).message or "no reason is known"
        print(f"The job has ended as {status}: {reason.splitlines()[0]}", file=sys.stderr)
    return status == JobStatus.SUCCEEDED


def main():
    """Start, run, end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="with the head, which takes no training; 2 or more")
    parser.add_argument("--cpus", type=int, default=2, help="of each node but the head, whatever the machine has")
    parser.add_argument("--storage", default="runs", help="the job's STORAGE_PATH: a directory, or a URI")
    parser.add_argument("script", nargs="?", default=str(DEMO))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    arguments = parser.parse_args()
    if arguments.nodes < 2:
        parser.error(f"--nodes {arguments.nodes}: at least 2 are needed, since the head takes no training")
    if not Path(arguments.script).is_file():
        parser.error(f"{arguments.script}: no such file")
    if importlib.util.find_spec("aiohttp_cors") is None:
        parser.error('job submission needs more of Ray: pip install "ray[default]"')
    if "://" not in arguments.storage:
        arguments.storage = str(Path(arguments.storage).absolute())

    # Short, because Ray puts sockets below it, whose paths may have 107 bytes.
    base = os.environ.get("RAY_TMPDIR") or "/tmp"
    os.makedirs(base, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="ray-", dir=base)
    # Before Ray is imported: its files go there and nowhere else, and nobody else reaches the cluster.
    os.environ |= {"RAY_TMPDIR": scratch, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        port = start(cluster, arguments)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends all, too; Ray's own handler ends one node
        succeeded = run(arguments, port)
    finally:
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"Storage  {arguments.storage}")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
