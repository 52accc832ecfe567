"""Questions to the files of finished and running runs; needs neither Ray nor the training code."""

from delve_ray.analysis.embeddings import read_embeddings
from delve_ray.analysis.reading import read_covariances, read_scalars, read_spectra

__all__ = ["read_covariances", "read_embeddings", "read_scalars", "read_spectra"]
