"""What the tests of cluster/ share: its files, the versions that they should name, and tools that may be missing."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def read(name: str) -> str:
    """A file of cluster/."""
    return (CLUSTER / name).read_text(encoding="utf-8")


def documents(name: str) -> list[Any]:
    """The documents of a YAML file of cluster/."""
    return list(yaml.safe_load_all(read(name)))


def constrained(package: str) -> str:
    """The version of a package that the project is tested with."""
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{re.escape(package)}==(\S+)$", constraints, re.MULTILINE)
    return version


def own_version() -> str:
    """The version of delve_ray."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["project"]["version"])


def tool(name: str, package: str) -> str:
    """The path of a program, beside this Python or on the PATH; skips the test where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: {package}")
    return found
