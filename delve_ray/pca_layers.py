"""Layers that project their input onto the eigenspace of a covariance.

With the mean z̄ of a layer's output, its covariance's eigenvectors v1 … vd by falling eigenvalue, k = k(δ) and
V = (v1 … vk), the projection of a row x is z̄ + (x − z̄) V Vᵀ. Source: Shenk et al., Feature Space Saturation during
Training, arXiv 2006.08679, where trained networks are evaluated with their layers projected so.

The names and first arguments are those of `delve.pca_layers`, where such a layer gathers its covariance itself while it
is in training; here it is given one, as a rule a recorded run's (`delve_ray.pca.project`), and projects in training and
evaluation alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from delve_ray.checks import check_flag, check_integer
from delve_ray.errors import OptionError
from delve_ray.matrices import FLOAT32_EPS, eigenvalues, second_moment
from delve_ray.schema import F64
from delve_ray.spectrum import intrinsic_dimensionality
from delve_ray.stat_options import check_threshold as check_share


class LinearPCALayer(nn.Module):
    """Projects rows onto the leading eigenvectors of their covariance, about their mean: z̄ + (x − z̄) V Vᵀ.

    k is the intrinsic dimensionality k(δ) as published (`delve_ray.spectrum.intrinsic_dimensionality`). At δ = 1 it
    counts the directions whose variance is more than rounding: those of a layer of full rank are all, and the layer
    returns its input as it is; one of lower rank still loses what rows have outside of the recorded space. A constant
    layer has k = 0 and returns its mean.

    `mean` (d,), `eigenvalues` (d,), descending, and `eigenvectors` (d, d), one a column, are buffers. They are float64
    and stay it where the module is made half: they follow its device, and the output has the input's dtype. Products
    are taken in float32, in float64 where the input is; also under autocast. They go through the k kept directions, or
    through the d − k others where these are fewer. state_dict holds the buffers and the options, so that a layer made
    with `in_features` alone can load it.

    Args:
        in_features: d, the width.
        threshold: δ in (0, 1], the share of variance to keep; may be changed later.
        dim: The dimension of an input that holds the features, as torch counts them; by default the last.
        random: True keeps k random directions instead, uniformly distributed: a control. Those of a lower k are among
            those of a higher one. May be changed later.
        seed: Of the random directions; may be changed later.
        product_eps: Machine epsilon of the products that the covariance was summed from, see `rounding_reach`.

    Raises:
        OptionError: an argument that cannot be used; from `forward`, a layer without an eigenspace, or an input of
            another width.

    Example:
        >>> layer = LinearPCALayer.from_covariance(mean=[5.0, 1.0], covariance=[[4.0, 0.0], [0.0, 0.01]])
        >>> layer.intrinsic_dimensionality, layer(torch.tensor([[3.0, 7.0]])).tolist()
        (1, [[3.0, 1.0]])
        >>> layer.threshold = 1.0
        >>> layer.intrinsic_dimensionality, layer(torch.tensor([[3.0, 7.0]])).tolist()
        (2, [[3.0, 7.0]])
    """

    default_dim = -1
    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    _rotation: Tensor | None

    def __init__(
        self,
        in_features: int,
        threshold: float = 0.99,
        *,
        dim: int | None = None,
        random: bool = False,
        seed: int = 0,
        product_eps: float = FLOAT32_EPS,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.dim = self.default_dim if dim is None else dim
        self._threshold = check_threshold(threshold)
        self._random = check_flag("random", random)
        self._seed = check_integer("seed", seed)
        self._product_eps = float(product_eps)
        self._kept: int | None = None
        unknown = torch.full((self.in_features, self.in_features), torch.nan, dtype=torch.float64)
        self.register_buffer("mean", unknown[0].clone())
        self.register_buffer("eigenvalues", unknown[0].clone())
        self.register_buffer("eigenvectors", unknown)
        self.register_buffer("_rotation", None, persistent=False)

    @classmethod
    def from_covariance(
        cls,
        mean: npt.ArrayLike,
        covariance: npt.ArrayLike,
        threshold: float = 0.99,
        *,
        centering: bool = True,
        **options: Any,
    ) -> Self:
        """A layer for rows of this mean (d,) and population covariance (d, d), of which the upper triangle is read.

        Without `centering` the eigenspace is that of the uncentred second moment Q + z̄ ⊗ z̄, and the projection x V Vᵀ
        goes to zero and not to the mean; k then differs from the published one. Other options are the constructor's.
        The decomposition is float64, on the CPU.

        Raises OptionError for an option, ValueError for shapes that do not fit or values that are not finite.
        """
        centre, matrix = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if centre.ndim != 1 or not centre.size or matrix.shape != (centre.size, centre.size):
            raise ValueError(f"a mean (d,) and a covariance (d, d) are needed, got {centre.shape} and {matrix.shape}")
        if not np.isfinite(centre).all():
            raise ValueError("the mean holds NaN or inf")
        layer = cls(centre.size, threshold, **options)
        if not check_flag("centering", centering):
            matrix, centre = second_moment(matrix, centre), np.zeros_like(centre)
        spectrum = eigenvalues(matrix)  # as the store takes them, so that k agrees where only rounding decides
        vectors = np.linalg.eigh(matrix, UPLO="U")[1][:, ::-1]
        layer.mean.copy_(torch.tensor(centre))
        layer.eigenvalues.copy_(torch.tensor(spectrum))
        layer.eigenvectors.copy_(torch.tensor(vectors.copy()))
        layer._choose()
        return layer

    @property
    def threshold(self) -> float:
        """δ, the share of variance to keep; set it, and k follows."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = check_threshold(value)
        self._choose()

    @property
    def random(self) -> bool:
        """Whether k random directions are kept instead of the leading ones."""
        return self._random

    @random.setter
    def random(self, value: bool) -> None:
        self._random = check_flag("random", value)
        self._choose()

    @property
    def seed(self) -> int:
        """Seed of the random directions."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = check_integer("seed", value)
        self._rotation = None
        self._choose()

    @property
    def intrinsic_dimensionality(self) -> int:
        """k, the number of directions that are kept. Raises OptionError where no eigenspace is known yet."""
        if self._kept is None:
            raise OptionError(
                f"this {type(self).__name__} has no eigenspace yet; make it with from_covariance(mean, covariance), or "
                f"load the state_dict of one that has"
            )
        return self._kept

    @property
    def directions(self) -> Tensor:
        """The k directions that are kept, (d, k) float64 with orthonormal columns."""
        return self._basis()[:, : self.intrinsic_dimensionality]

    def forward(self, x: Tensor) -> Tensor:
        """The projection of `x`, of its shape and dtype."""
        kept, features = self.intrinsic_dimensionality, self.in_features
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != features:
            raise OptionError(
                f"an input of shape {tuple(x.shape)} does not have the {features} features of this "
                f"{type(self).__name__} in dimension {self.dim}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        others = 2 * kept > features
        basis = (self._basis()[:, kept:] if others else self._basis()[:, :kept]).to(dtype)
        device = x.device.type
        uncast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with uncast:
            return _project(x.to(dtype), self.mean.to(dtype), basis, self.dim, others).to(x.dtype)

    def extra_repr(self) -> str:
        """What stands in the parentheses of the layer's text."""
        control = f", random, seed={self._seed}" if self._random else ""
        return f"{self.in_features}, threshold={self._threshold}, intrinsic_dimensionality={self._kept}{control}"

    def get_extra_state(self) -> dict[str, Any]:
        """The options, for state_dict: plain values, which `torch.load(weights_only=True)` takes."""
        return {
            "threshold": self._threshold,
            "random": self._random,
            "seed": self._seed,
            "product_eps": self._product_eps,
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the options of a state_dict; torch loads the buffers before."""
        self._threshold = check_threshold(state["threshold"])
        self._random = check_flag("random", state["random"])
        self._seed = check_integer("seed", state["seed"])
        self._product_eps = float(state["product_eps"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._rotation = None
        self._choose()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a change of device, and not one of precision: half of it would not do for k, nor for the basis."""
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            try:
                moved = fn(buffer)
            except TypeError:  # a device without float64
                buffer = buffer.float()
                moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _basis(self) -> Tensor:
        """The d orthonormal directions (d, d) of which the first k are kept."""
        return self.eigenvectors if self._rotation is None else self._rotation

    def _choose(self) -> None:
        """Take k, and the directions, anew."""
        spectrum: F64 = self.eigenvalues.detach().cpu().numpy()
        if np.isnan(spectrum).any():
            self._kept, self._rotation = None, None
            return
        self._kept = intrinsic_dimensionality(spectrum, self._threshold, self._product_eps)
        if not self._random:
            self._rotation = None
        elif self._rotation is None:
            self._rotation = torch.tensor(random_rotation(self.in_features, self._seed)).to(self.mean)


class Conv2dPCALayer(LinearPCALayer):
    """Projects each position of feature maps N×C×H×W, or C×H×W, as a row of C features; else as `LinearPCALayer`.

    For maps of one dimension `LinearPCALayer(…, dim=-2)` does it, for those of three `dim=-4`.

    >>> layer = Conv2dPCALayer.from_covariance(torch.zeros(3), torch.diag(torch.tensor([2.0, 1.0, 0.0])), 0.6)
    >>> layer(torch.ones(1, 3, 1, 2)).squeeze().tolist()
    [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """

    default_dim = -3


def check_threshold(value: object) -> float:
    """The option `threshold`, a number in (0, 1]. Raises OptionError.

    >>> check_threshold(0.9)
    0.9
    """
    try:
        return check_share(value)
    except OptionError as error:
        raise OptionError(str(error).removeprefix("sat_")) from None


def random_rotation(features: int, seed: int) -> F64:
    """A random orthogonal matrix (d, d), uniformly distributed (Haar): any k columns are uniform k-frames, too.

    The Q of a normal matrix's QR decomposition, with signs such that R's diagonal is positive; without these LAPACK's
    choice of signs would show. Source: Mezzadri, How to generate random matrices from the classical compact groups,
    Notices of the AMS 54, 2007.

    >>> rotation = random_rotation(3, seed=0)
    >>> np.allclose(rotation.T @ rotation, np.eye(3))
    True
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(features, features)))
    signed: F64 = q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0)
    return signed


def _project(x: Tensor, mean: Tensor, basis: Tensor, dim: int, others: bool) -> Tensor:
    """The projection of what lies along `dim` onto `basis` (d, m), with `others` onto its complement, about `mean`.

    Two products with a thin basis cost 4dm operations a row, and m ≤ d/2: never more than the d×d matrix's 2d², and
    no matrix to keep. Through the complement, a projection that keeps everything is the identity to the bit.
    """
    dim %= x.dim()
    rows = x.movedim(dim, -1)
    if dim == x.dim() - 1 or rows.is_contiguous():  # so lie maps in the memory format channels_last
        spanned = (((rows - mean) @ basis) @ basis.T).movedim(-1, dim)
    else:  # a product per map, which would otherwise be turned first
        maps = x.flatten(dim + 1)
        spanned = (basis @ (basis.T @ (maps - mean.unsqueeze(-1)))).reshape(x.shape)
    if others:
        return x - spanned
    return mean.view(-1, *[1] * (x.dim() - 1 - dim)) + spanned
