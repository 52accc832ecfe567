"""Pictures of runs with matplotlib, which is imported when the first one is drawn.

Each is a function of a table that `read_spectra` returned, `embedding` of one that `read_embeddings` returned. It gives
a `matplotlib.figure.Figure` that pyplot knows nothing of, and writes it where a path is given, in the format of the
name's ending (.png, .pdf, .svg). Train is blue or solid, eval orange or dashed; layers are in the order of the network,
and where depth has a colour, it is dark at the input and light at the output. No axis reaches beyond 1e±250: larger
values count as infinite, smaller ones as zero.
"""

from delve_ray.analysis.plots.canvas import MAX_LEGEND, depth_colours
from delve_ray.analysis.plots.depth import saturation_per_layer
from delve_ray.analysis.plots.eigenvalues import eigenspectra
from delve_ray.analysis.plots.heatmap import stat_heatmap
from delve_ray.analysis.plots.phases import train_against_eval
from delve_ray.analysis.plots.points import embedding
from delve_ray.analysis.plots.runs import compare_runs
from delve_ray.analysis.plots.steps import saturation_over_steps

__all__ = [
    "MAX_LEGEND",
    "compare_runs",
    "depth_colours",
    "eigenspectra",
    "embedding",
    "saturation_over_steps",
    "saturation_per_layer",
    "stat_heatmap",
    "train_against_eval",
]
