"""The covariance store: a plain thread-safe class, and the Ray actor around it."""

from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig

__all__ = ["CovarianceStore", "StoreConfig"]
