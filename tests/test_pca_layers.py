from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from delve_ray.errors import OptionError
from delve_ray.pca_layers import Conv2dPCALayer, LinearPCALayer, random_rotation
from tests.covariances import rotated
from tests.helpers import F64, assert_refused, dimensionality, float64_rows, random_rows, two_pass_covariance

LINEAR = LinearPCALayer.from_covariance


def fitted(rows: Tensor, threshold: float = 0.99, **options: Any) -> LinearPCALayer:
    """A layer with the mean and covariance of rows."""
    return LINEAR(float64_rows(rows).mean(0), two_pass_covariance(rows), threshold, **options)


def reference(rows: Tensor, x: Tensor, threshold: float) -> tuple[int, F64]:
    """k and the projection of `x` in float64, from an SVD of the centred rows and a projector of d×d."""
    values, points = float64_rows(rows), float64_rows(x)
    mean = values.mean(0)
    _, singular, directions = np.linalg.svd(values - mean, full_matrices=True)
    eigenvalues = np.zeros(mean.size)
    eigenvalues[: singular.size] = singular**2
    k = dimensionality(eigenvalues, threshold)
    projector = directions[:k].T @ directions[:k]
    return k, (mean + (points - mean) @ projector).reshape(x.shape)


def projector(layer: LinearPCALayer) -> F64:
    """The matrix P of a layer's map x ↦ z̄ + (x − z̄) P."""
    shifted = torch.eye(layer.in_features, dtype=torch.float64) + layer.mean
    return np.asarray((layer(shifted) - layer.mean).numpy())


def decaying(features: int, **options: Any) -> LinearPCALayer:
    """A layer whose eigenvalues fall like 2^-i, about a mean of 1 … d."""
    eigenvalues = 0.5 ** np.arange(features)
    return LINEAR(np.arange(1.0, features + 1), rotated(eigenvalues), **options)


def position_rows(maps: Tensor, dim: int) -> Tensor:
    return maps.movedim(dim, -1).reshape(-1, maps.shape[dim])


# --- what it computes ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    features=st.integers(1, 12),
    observations=st.integers(2, 40),
    leading=st.sampled_from([(), (5,), (2, 3), (0,), (2, 1, 3)]),
    threshold=st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.9999]),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_it_is_the_projection_of_a_float64_computation(features, observations, leading, threshold, offset, seed):
    rows = random_rows(observations, features, seed=seed, dtype=torch.float64, offset=offset, decay=0.05)
    x = random_rows(max(1, int(np.prod(leading))), features, seed=seed + 100, dtype=torch.float64, offset=offset)
    x = x[: int(np.prod(leading))].reshape(*leading, features)
    layer = fitted(rows, threshold)

    k, expected = reference(rows, x, threshold)
    assert layer.intrinsic_dimensionality == k
    assert layer(x).shape == x.shape
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=0, atol=1e-9 * (1 + offset))


@settings(deadline=None, max_examples=40)
@given(features=st.integers(2, 16), threshold=st.floats(0.05, 1.0), random=st.booleans(), seed=st.integers(0, 99))
def test_it_is_an_orthogonal_projection(features, threshold, random, seed):
    layer = fitted(random_rows(200, features, seed=seed, decay=0.1), threshold, random=random, seed=seed)
    matrix = projector(layer)

    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.trace(matrix) == pytest.approx(layer.intrinsic_dimensionality, abs=1e-10)
    directions = layer.directions.numpy()
    assert directions.shape == (features, layer.intrinsic_dimensionality)
    np.testing.assert_allclose(matrix, directions @ directions.T, atol=1e-12)
    x = random_rows(30, features, seed=seed + 1, dtype=torch.float64)
    np.testing.assert_allclose((x - layer(x)).numpy() @ directions, 0.0, atol=1e-11)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95, 0.999])
def test_it_keeps_the_share_of_variance_with_as_few_directions_as_can(threshold):
    rows = random_rows(500, 24, dtype=torch.float64, offset=3.0, decay=0.02)
    layer = fitted(rows, threshold)
    total = float(np.trace(two_pass_covariance(rows)))

    kept = np.trace(two_pass_covariance(layer(rows))) / total
    assert kept >= threshold - 1e-9
    smaller = layer.directions[:, :-1].numpy()
    assert np.trace(smaller.T @ two_pass_covariance(rows) @ smaller) / total < threshold


def test_the_mean_is_kept():
    rows = random_rows(400, 10, dtype=torch.float64, offset=50.0, decay=0.1)
    layer = fitted(rows, 0.5)
    np.testing.assert_allclose(float64_rows(layer(rows)).mean(0), float64_rows(rows).mean(0), rtol=1e-12)
    torch.testing.assert_close(layer(layer.mean), layer.mean, rtol=1e-13, atol=0)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_with_all_directions_it_is_the_identity_to_the_bit(dtype, random):
    layer = fitted(random_rows(100, 8), 1.0, random=random)
    assert layer.intrinsic_dimensionality == 8
    x = random_rows(50, 8, seed=1, dtype=dtype, offset=100.0)
    assert torch.equal(layer(x), x)


def test_at_a_threshold_of_one_rounding_is_no_direction():
    eigenvalues = np.array([4.0, 1.0, 1e-3, 1e-9, 1e-10, 0.0])
    layer = LINEAR(np.zeros(6), rotated(eigenvalues), 1.0)
    assert layer.intrinsic_dimensionality == 3
    assert LINEAR(np.zeros(6), rotated(eigenvalues), 1.0, product_eps=2.0**-52).intrinsic_dimensionality == 5
    inside = torch.randn(20, 3, dtype=torch.float64) @ layer.directions.T
    torch.testing.assert_close(layer(inside), inside, rtol=0, atol=1e-12)


def test_a_constant_layer_becomes_its_mean():
    for random in (False, True):
        layer = LINEAR([1.0, -2.0, 3.0], np.zeros((3, 3)), 1.0, random=random)
        assert layer.intrinsic_dimensionality == 0
        assert layer(torch.full((2, 4, 3), 9.0)).tolist() == [[[1.0, -2.0, 3.0]] * 4] * 2
        assert Conv2dPCALayer.from_covariance([1.0, 2.0], np.zeros((2, 2)))(torch.ones(1, 2, 1, 3)).tolist() == [
            [[[1.0] * 3], [[2.0] * 3]]
        ]


@pytest.mark.parametrize("threshold", [0.9, 0.99999])
def test_a_mean_far_away_costs_float32_no_more_than_its_rounding(threshold):
    rows = random_rows(300, 20, offset=1e4, decay=0.01)
    layer = fitted(rows, threshold)
    assert (2 * layer.intrinsic_dimensionality > 20) == (threshold > 0.9)  # kept directions, and the others
    _, expected = reference(rows, rows, threshold)
    assert np.abs(layer(rows).numpy() - expected).max() <= 2e4 * 2.0**-23


def test_without_centering_the_space_is_that_of_the_second_moment():
    rows = random_rows(300, 7, dtype=torch.float64, offset=2.0, decay=0.1)
    layer = fitted(rows, 0.9, centering=False)
    values = float64_rows(rows)
    _, singular, directions = np.linalg.svd(values, full_matrices=False)
    k = dimensionality(singular**2, 0.9)
    assert layer.intrinsic_dimensionality == k
    np.testing.assert_allclose(layer(rows).numpy(), values @ directions[:k].T @ directions[:k], atol=1e-10)
    assert layer(torch.zeros(7)).tolist() == [0.0] * 7


# --- feature maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.999])
@pytest.mark.parametrize(
    ("dim", "shape"),
    [
        (-3, (4, 6, 5, 3)),
        (-3, (6, 5, 3)),
        (-3, (0, 6, 5, 3)),
        (-3, (2, 6, 0, 3)),
        (-3, (4, 6, 1, 1)),
        (-2, (4, 6, 9)),
        (-2, (6, 9)),
        (-4, (2, 6, 3, 2, 2)),
        (1, (4, 6)),
        (1, (4, 6, 9)),
        (0, (6, 9)),
        (-3, (2, 3, 6, 4, 5)),
    ],
)
def test_a_position_of_a_map_is_a_row(dim, shape, threshold):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = random_rows(200, 6, dtype=torch.float64, offset=2.0, decay=0.05)
    on_maps, on_rows = fitted(rows, threshold, dim=dim), fitted(rows, threshold)
    projected = on_maps(maps)
    assert projected.shape == maps.shape
    torch.testing.assert_close(position_rows(projected, dim), on_rows(position_rows(maps, dim)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.999])
def test_the_memory_format_of_maps_makes_no_difference(threshold):
    rows = random_rows(200, 6, offset=2.0, decay=0.05)
    layer = Conv2dPCALayer.from_covariance(float64_rows(rows).mean(0), two_pass_covariance(rows), threshold)
    maps = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = layer(maps)
    assert expected.is_contiguous()
    channels_last = layer(maps.to(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(maps.transpose(2, 3)).transpose(2, 3), expected, rtol=0, atol=1e-5)


# --- random directions -----------------------------------------------------------------------------------


def test_random_directions_are_as_many_seeded_and_nested():
    layer, again = decaying(12, threshold=0.9, random=True, seed=7), decaying(12, threshold=0.9, random=True, seed=7)
    leading = decaying(12, threshold=0.9)
    assert layer.intrinsic_dimensionality == leading.intrinsic_dimensionality == 4
    assert torch.equal(layer.directions, again.directions)
    np.testing.assert_allclose(layer.directions.T @ layer.directions, np.eye(4), atol=1e-14)
    few = layer.directions.clone()
    layer.threshold = 0.99
    assert torch.equal(layer.directions[:, :4], few)
    layer.seed = 8
    assert not torch.allclose(layer.directions[:, :4], few)
    layer.random = False
    leading.threshold = 0.99
    assert torch.equal(layer.directions, leading.directions)
    layer.random, layer.seed, layer.threshold = True, 7, 0.9
    assert torch.equal(layer.directions, few)


def test_random_directions_leave_the_global_generators_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(3)
    np.random.seed(3)
    decaying(9, random=True, seed=1)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_random_directions_are_uniform():
    """Of the first column in three dimensions each entry is uniform on [-1, 1] (Archimedes)."""
    columns = np.array([random_rotation(3, seed)[:, 0] for seed in range(2000)])
    for entries in np.sort(columns, axis=0).T:
        uniform = np.linspace(-1, 1, len(entries))
        assert np.abs(entries - uniform).max() / 2 < 1.63 / 2000**0.5  # Kolmogorov and Smirnov, at 1 %
    determinants = [np.linalg.det(random_rotation(3, seed)) for seed in range(400)]
    assert 160 < sum(det > 0 for det in determinants) < 240


def test_random_directions_keep_a_share_of_variance_like_their_number():
    rows = random_rows(400, 32, dtype=torch.float64, decay=0.05)
    layer = fitted(rows, 0.9, random=True)
    total = np.trace(two_pass_covariance(rows))
    shares = []
    for layer.seed in range(60):
        shares.append(np.trace(two_pass_covariance(layer(rows))) / total)
    assert np.mean(shares) == pytest.approx(layer.intrinsic_dimensionality / 32, abs=0.03)
    assert max(shares) < 0.8


# --- the threshold ---------------------------------------------------------------------------------------


def test_the_threshold_changes_in_place():
    layer = decaying(10)
    directions = layer.eigenvectors
    for threshold, k in [(0.5, 1), (0.75, 2), (0.9, 4), (0.99, 7), (0.5, 1)]:
        layer.threshold = threshold
        assert (layer.threshold, layer.intrinsic_dimensionality) == (threshold, k)
        assert np.linalg.matrix_rank(projector(layer), tol=1e-8) == k
    assert layer.eigenvectors is directions
    assert f"10, threshold=0.5, intrinsic_dimensionality={1}" in repr(layer)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, 99, "0.9", None, True, float("nan")])
def test_a_threshold_that_is_none_is_refused_and_changes_nothing(value):
    layer = decaying(6, threshold=0.9)
    with pytest.raises(OptionError, match=r"^threshold=.*share of variance"):
        layer.threshold = value
    with pytest.raises(OptionError, match=r"^threshold="):
        LinearPCALayer(6, value)
    assert (layer.threshold, layer.intrinsic_dimensionality) == (0.9, 4)


# --- dtypes, devices, gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.6, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_once(dtype, threshold):
    rows = random_rows(300, 16, offset=3.0, decay=0.05)
    layer, x = fitted(rows, threshold), rows.to(dtype)
    _, expected = reference(rows, x, threshold)
    for made in (layer, copy.deepcopy(layer).to(dtype), copy.deepcopy(layer).half().float()):
        projected = made(x)
        assert projected.dtype == dtype
        error = np.abs(projected.double().numpy() - expected)
        assert (error <= 0.5001 * torch.finfo(dtype).eps * np.abs(expected) + 1e-5).all()


def test_a_half_module_loses_neither_k_nor_its_space():
    layer = decaying(20, threshold=0.99999)
    half = copy.deepcopy(layer).half()
    half.threshold = 0.9999
    layer.threshold = 0.9999
    assert half.intrinsic_dimensionality == layer.intrinsic_dimensionality == 14
    assert torch.equal(half.eigenvectors, layer.eigenvectors)
    assert next(half.buffers()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype):
    rows = random_rows(100, 12, offset=5.0, decay=0.1)
    layer, x = fitted(rows, 0.8), rows.to(dtype)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = layer(x)
    assert projected.dtype == dtype
    assert torch.equal(projected, expected)


def test_it_moves_to_a_device_without_float64():
    """As Apple's are: the buffers are float32 there, and so are random directions that are drawn later."""
    layer = decaying(8, threshold=0.9)
    expected = layer(torch.ones(8))

    def move(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("no float64 there")
        return tensor.clone()

    layer._apply(move)
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32}
    torch.testing.assert_close(layer(torch.ones(8)), expected)
    layer.random = True
    assert layer.directions.dtype == torch.float32
    assert layer.intrinsic_dimensionality == 4


def test_a_meta_tensor_has_the_shape():
    layer = decaying(8).to("meta")
    assert layer(torch.zeros(3, 8, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("threshold", [0.6, 0.99])
@pytest.mark.parametrize("dim", [-1, -3])
def test_gradients_are_those_of_the_projection(dim, threshold):
    layer = decaying(5, threshold=threshold, dim=dim)
    shape = (3, 5) if dim == -1 else (2, 5, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    weights = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    expected = position_rows(weights, dim).numpy() @ projector(decaying(5, threshold=threshold))
    np.testing.assert_allclose(position_rows(gradient, dim).numpy(), expected, atol=1e-12)
    assert not list(layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dim", [-1, -3])
def test_it_compiles_whole_and_follows_the_threshold(dim):
    layer = decaying(5, threshold=0.6, dim=dim)
    x = torch.randn(4, 5, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for threshold in (0.6, 0.99, 0.3):
        layer.threshold = threshold
        torch.testing.assert_close(compiled(x), layer(x))
    layer.random = True
    torch.testing.assert_close(compiled(x), layer(x))


# --- copies and checkpoints ------------------------------------------------------------------------------


def through_a_checkpoint(layer: LinearPCALayer) -> LinearPCALayer:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = type(layer)(layer.in_features)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def through_an_assignment(layer: LinearPCALayer) -> LinearPCALayer:
    with torch.device("meta"):
        fresh = type(layer)(layer.in_features)
    fresh.load_state_dict(layer.state_dict(), assign=True)
    return fresh


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        through_a_checkpoint,
        through_an_assignment,
    ],
    ids=["deepcopy", "pickle", "state_dict", "assign"],
)
def test_a_copy_is_the_same_and_on_its_own(copied, random):
    layer = decaying(9, threshold=0.97, random=random, seed=5, product_eps=2.0**-52)
    x = torch.randn(4, 9)
    expected = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), expected)
    assert (other.threshold, other.random, other.seed) == (0.97, random, 5)
    assert repr(other) == repr(layer)
    other.threshold = 1.0
    assert other.intrinsic_dimensionality == 9
    other.threshold, other.seed = 0.5, 6
    assert torch.equal(layer(x), expected)
    assert layer.intrinsic_dimensionality == 5


def test_the_state_of_a_model_holds_its_projections():
    model = nn.Sequential(nn.Linear(3, 9), decaying(9, threshold=0.97))
    assert set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        *(f"1.{name}" for name in ("mean", "eigenvalues", "eigenvectors", "_extra_state")),
    }
    other = nn.Sequential(nn.Linear(3, 9), LinearPCALayer(9))
    x = torch.randn(5, 3)
    with pytest.raises(OptionError, match=r"no eigenspace yet.*from_covariance"):
        other(x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_loading_another_space_replaces_a_random_one():
    layer = decaying(9, random=True, seed=1)
    for other in (decaying(9, random=True, seed=2), decaying(9, threshold=0.5), decaying(9, random=True, seed=1)):
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.directions, other.directions)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(decaying(8).state_dict())


# --- what is refused -------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_by_name():
    assert_refused(lambda: LinearPCALayer(0), "in_features=0", "at least 1")
    assert_refused(lambda: LinearPCALayer(3, random="yes"), "random='yes'", "True or False")
    assert_refused(lambda: LinearPCALayer(3, seed=-1), "seed=-1")
    assert_refused(lambda: LINEAR([0.0], [[1.0]], centering=1), "centering=1")
    layer = decaying(4)
    assert_refused(lambda: layer(torch.zeros(2, 5)), "(2, 5)", "4 features", "dimension -1")
    assert_refused(lambda: layer(torch.zeros(())), "()", "4 features")
    maps = Conv2dPCALayer.from_covariance(np.zeros(4), np.eye(4))
    assert_refused(lambda: maps(torch.zeros(2, 4)), "(2, 4)", "Conv2dPCALayer", "dimension -3")
    assert_refused(lambda: maps(torch.zeros(2, 3, 4, 4)), "(2, 3, 4, 4)", "4 features")


@pytest.mark.parametrize(
    ("mean", "covariance", "word"),
    [
        ([0.0, 0.0], np.eye(3), r"\(2,\) and \(3, 3\)"),
        ([[0.0]], np.eye(1), r"\(1, 1\)"),
        ([], np.zeros((0, 0)), r"\(0,\)"),
        ([np.nan, 0.0], np.eye(2), "NaN"),
        ([0.0, 0.0], np.full((2, 2), np.inf), "inf"),
    ],
)
def test_moments_that_are_none_are_refused(mean, covariance, word):
    with pytest.raises(ValueError, match=word):
        LINEAR(mean, covariance)
