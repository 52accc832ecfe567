"""The pages of docs/: their code is run as it stands, page by page, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"lightning": "lightning", "transformers": "accelerate"}
ON_RAY = ("ray-train", "reading", "sweeps")
RAY = """\
import ray
ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, "a page without code"
    program = tmp_path / "page.py"
    start = f"storage = {str(tmp_path / 'runs')!r}\n" + (RAY if page.stem in ON_RAY else "")
    program.write_text(start + "\n".join(blocks), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "runs").rglob("*.parquet"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).resolve().is_file(), target


def test_the_readme_names_every_page() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"](docs/{page.name})" in readme


@pytest.mark.slow
def test_the_docstrings_render_as_a_reference(tmp_path: Path) -> None:
    import delve_ray

    command = [sys.executable, DOCS / "reference.py", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    shown = (tmp_path / "delve_ray.html").read_text(encoding="utf-8")
    for name in delve_ray.__all__:
        assert f'id="{name}"' in shown, name
    for page in ("tracker", "writers/base", "integrations/tune", "integrations/report", "integrations/lightning"):
        assert (tmp_path / "delve_ray" / f"{page}.html").is_file(), page
