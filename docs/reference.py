"""Render the docstrings as HTML: `python docs/reference.py build/docs`."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import delve_ray

for name in delve_ray.__all__:  # they are imported at their first use; pdoc wants to find them
    setattr(delve_ray, name, getattr(delve_ray, name))
modules = [module.name for module in pkgutil.walk_packages(delve_ray.__path__, "delve_ray.")]
warnings.filterwarnings("ignore", "The module specification")  # a package without __all__ brings its modules along
pdoc.render.configure(docformat="google")
pdoc.pdoc(
    "delve_ray",
    *(name for name in modules if not name.startswith("delve_ray.cuda")),  # kernels, which only Triton can import
    output_directory=Path(sys.argv[1]),
)
