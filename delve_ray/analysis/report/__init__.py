"""The report: one self-contained HTML page about one or several runs.

`write_report` reads the runs one after the other (`reading`), describes each (`describing`), packs its numbers
(`numbers`), and puts them together with the page's own HTML, CSS and JavaScript (`assets/`) and with plotly's (`page`).
"""

from __future__ import annotations

from delve_ray.analysis.report.page import write_report

__all__ = ["write_report"]
