"""From a run's spectra to findings that change a design: what to make narrower, wider, shorter, or to mend.

Each rule is a plain function of the last complete window, for collapse of all of them, with its bounds beside it.
docs/diagnosis.md shows how often each rule finds a flaw that was built in, and how often it cries wolf.
"""

from delve_ray.analysis.diagnosis.diagnose import diagnose
from delve_ray.analysis.diagnosis.finding import KINDS, Finding

__all__ = ["KINDS", "Finding", "diagnose"]
