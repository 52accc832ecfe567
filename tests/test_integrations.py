"""What the integrations say where their library is missing, and that none of them is imported unasked."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEEDS = {
    "lightning": (["lightning", "pytorch_lightning"], "delve_ray[lightning]"),
    "transformers": (["transformers"], "delve_ray[transformers]"),
    "report": (["ray.train"], "delve_ray[train]"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_library_that_is_missing(name: str) -> None:
    modules, extra = NEEDS[name]
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"missing = {modules!r}\n"
        "for module in missing:\n    sys.modules[module] = None\n"
        "importlib.util.find_spec = lambda name, *more: None if name in missing else find(name, *more)\n"
        f"try:\n    import delve_ray.integrations.{name}\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"pip install '{extra}'" in found.stdout


def test_nothing_is_imported_unasked() -> None:
    program = (
        "import sys, delve_ray.tracker, delve_ray.integrations.tune\n"
        "print(sorted({'ray', 'lightning', 'pytorch_lightning', 'transformers', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
