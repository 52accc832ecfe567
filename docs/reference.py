"""Render the docstrings as HTML: `python docs/reference.py build/docs`."""

import sys
from pathlib import Path

import pdoc

import delve_ray

for name in delve_ray.__all__:  # they are imported at their first use; pdoc wants to find them
    setattr(delve_ray, name, getattr(delve_ray, name))
pdoc.render.configure(docformat="google")
pdoc.pdoc("delve_ray", "!delve_ray.cuda", output_directory=Path(sys.argv[1]))
