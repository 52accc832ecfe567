"""The README's code is run as it stands, and what the README names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from delve_ray import read_spectra

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CHECKS = """
assert "ray" not in __import__("sys").modules
assert 0 < metrics["saturation/train/0"] <= 1
assert list(frame.pivot(index="step", columns="layer", values="saturation").columns) == ["0", "2"]
"""


def test_the_code_runs_without_ray(tmp_path):
    assert len(BLOCKS) >= 2
    program = tmp_path / "readme.py"
    program.write_text("\n".join([*BLOCKS, CHECKS]), encoding="utf-8")
    run = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=240)

    assert run.returncode == 0, run.stderr
    table = read_spectra(tmp_path / "runs" / "first")
    assert set(table.column("step").to_pylist()) == set(range(10))
    assert set(table.column("samples").to_pylist()) == {50 * 32}
    assert (tmp_path / "saturation.png").read_bytes().startswith(b"\x89PNG")
    written = {path.name for path in (tmp_path / "runs" / "first").iterdir()}
    assert written >= {"run.json", "spectra", "tensorboard"}
    named = set(re.findall(r"^ {4}runs/first/([\w.]+)", README, re.MULTILINE))
    assert written <= named


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", README))))
def test_links_lead_to_files(target):
    assert (ROOT / target).is_file()


def test_the_picture_is_small():
    assert (ROOT / "examples" / "quickstart.png").stat().st_size < 100_000


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
