"""What the page says of each statistic: its label, how it is written, and a sentence for those who meet it first."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """How a statistic is shown.

    `form` is "share" (written as per cent), "count" or "number"; `log` says that its values span orders of magnitude.
    """

    label: str
    meaning: str
    form: str = "number"
    log: bool = False


STATISTICS = {
    "saturation": Words(
        "saturation",
        "The intrinsic dimensionality divided by the layer's width: the share of its features that the layer uses.",
        "share",
    ),
    "intrinsic_dimensionality": Words(
        "intrinsic dimensionality",
        "The number of directions, largest variance first, that together hold the share δ of the output's variance.",
        "count",
    ),
    "trace": Words("trace", "The total variance of the layer's output: the sum of its features' variances.", log=True),
    "diagonal_trace": Words(
        "diagonal trace", "The sum of the eigenvalues, which equals the trace up to rounding.", log=True
    ),
    "determinant": Words(
        "determinant",
        "The product of the eigenvalues; in wide layers often below or above what a number holds.",
        log=True,
    ),
    "log_determinant": Words("log determinant", "The sum of the eigenvalues' logarithms; −∞ if a direction is unused."),
    "effective_rank": Words(
        "effective rank", "The exponential of the spectral entropy: directions used, each weighted by its variance."
    ),
    "participation_ratio": Words(
        "participation ratio", "(Σλ)² / Σλ²: directions used, with more weight on the largest than the effective rank."
    ),
    "stable_rank": Words("stable rank", "Σλ / λ1: the total variance in units of the largest direction's."),
    "spectral_entropy": Words(
        "spectral entropy", "The entropy, in nats, of how the variance is shared among the directions."
    ),
    "condition_number": Words(
        "condition number", "Largest eigenvalue by smallest; ∞ if a direction is unused.", log=True
    ),
    "alpha": Words(
        "α, power law", "How steeply the eigenvalues fall: the exponent of λ ∝ rank^−α after the first few directions."
    ),
    "noise_rank": Words(
        "noise rank",
        "Eigenvalues that are larger than noise alone would make them (above the Marchenko–Pastur edge).",
        "count",
    ),
    "correlation_saturation": Words(
        "correlation saturation",
        "Saturation of the correlation matrix: every feature counts alike, however large.",
        "share",
    ),
    "correlation_intrinsic_dimensionality": Words(
        "correlation dimensionality", "Intrinsic dimensionality of the correlation matrix.", "count"
    ),
    "correlation_effective_rank": Words("correlation effective rank", "Effective rank of the correlation matrix."),
    "rankme": Words("RankMe", "Effective rank of the outputs themselves, from their singular values, mean included."),
    "saturation_low": Words(
        "saturation, at least", "Of a layer too wide to be kept whole, which is sketched: the least it can be.", "share"
    ),
    "saturation_high": Words(
        "saturation, at most", "Of a layer too wide to be kept whole, which is sketched: the most it can be.", "share"
    ),
    "unseen_variance": Words(
        "unseen variance",
        "The variance that a sketch has not seen: no eigenvalue is more than that above the one shown.",
    ),
    "alpha_r2": Words("r² of α", "How well the power law fits: 1 is a straight line of log λ over log rank."),
    "mean_norm": Words("norm of the mean", "The length of the mean output vector.", log=True),
    "nonfinite_rows": Words("non-finite rows", "Observations with a NaN or an infinity, which were left out.", "count"),
    "workers": Words("workers", "Workers whose share of the window is complete.", "count"),
}
"""What can be chosen for the charts and as a column of the table, in that order."""

OF_EVERY_ROW = ("samples", *STATISTICS)
"""The columns of the spectra whose numbers the page holds."""
