"""The corrected resampled t test for pooled folds (Nadeau and Bengio 2003, "Inference for the generalization error").

The folds of a cross-validation are not independent: two training sets of N folds share (N - 2) / (N - 1) of their cases. The
variance over folds, divided by N, is therefore too small for the variance of their mean. Nadeau and Bengio's correction replaces
1 / N by 1 / N + n_test / n_train, which is 1 / N + 1 / (N - 1) here. Several seeds of one fold share their training set; they
are averaged first.

Contributions have the shape (..., seeds, cases), with NaN where a case has no value; their mean is the difference. A fold without
any value counts for nothing; with fewer than two folds there is no test.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]


def p_values(contributions: Values, folds: tuple[int, ...]) -> Values:
    """Two-sided p-values of a mean contribution other than 0, (...); 0 where the contributions have no spread at all."""
    mean, error, freedom = moments(contributions, folds)
    with np.errstate(divide="ignore", invalid="ignore"):
        p: Values = 2 * stats.t.sf(abs(mean) / error, freedom)
    return np.where(error == 0, np.where(mean == 0, 1.0, 0.0), p)  # NaN stays NaN


def intervals(contributions: Values, folds: tuple[int, ...]) -> tuple[Values, Values]:
    """The ends of the 95 % intervals of the mean contribution, (...) each: all values that the test does not reject."""
    mean, error, freedom = moments(contributions, folds)
    half = stats.t.ppf(0.975, freedom) * error
    return mean - half, mean + half


def margin(contributions: Values, folds: tuple[int, ...]) -> float:
    """How far the test is from rejecting a mean contribution of 0 in (seeds, cases); below 0 it does not reject."""
    mean, error, freedom = moments(contributions, folds)
    return float(abs(mean) - stats.t.ppf(0.975, freedom) * error)


def moments(contributions: Values, folds: tuple[int, ...]) -> tuple[Values, Values, Values]:
    """Mean, standard error with the correction, and degrees of freedom."""
    labels = np.array(folds)
    of_folds = np.stack([_nanmean(contributions[..., labels == number]) for number in np.unique(labels)], axis=-1)
    valid = ~np.isnan(of_folds)
    total = valid.sum(axis=-1)
    freedom = np.where(total > 1, total - 1.0, np.nan)
    centre = np.where(valid, of_folds, 0.0).sum(axis=-1) / np.maximum(total, 1)
    variance = np.where(valid, (of_folds - centre[..., None]) ** 2, 0.0).sum(axis=-1) / freedom
    return _nanmean(contributions), np.sqrt((1 / np.maximum(total, 1) + 1 / freedom) * variance), freedom


def _nanmean(values: Values) -> Values:
    """Mean over seeds and cases, without NaN; NaN where all are NaN."""
    valid = ~np.isnan(values)
    count, sums = valid.sum(axis=(-2, -1)), np.where(valid, values, 0.0).sum(axis=(-2, -1))
    mean: Values = np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0)
    return mean
