"""Errors and calibration of restored images."""

import numpy as np
import pytest

from drl_jax.metrics import restoration


def test_psnr_is_relative_to_the_range_of_pixels():
    truth = np.zeros((2, 4, 4, 1))
    x = np.stack([truth[0] + 0.2, truth[1] - 0.02])
    np.testing.assert_allclose(restoration.psnr(x, truth), [20, 40])


def direct_ssim(x, t):
    """Returns SSIM by its definition, window by window."""
    H, W = x.shape
    h, w = min(7, H), min(7, W)
    values = []
    for i in range(H - h + 1):
        for j in range(W - w + 1):
            a, b = x[i : i + h, j : j + w].ravel(), t[i : i + h, j : j + w].ravel()
            covariance = np.cov(a, b)
            ratio = (2 * a.mean() * b.mean() + 0.02**2) * (2 * covariance[0, 1] + 0.06**2)
            ratio /= a.mean() ** 2 + b.mean() ** 2 + 0.02**2
            values.append(ratio / (covariance[0, 0] + covariance[1, 1] + 0.06**2))
    return np.mean(values)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (4, 8)])
def test_ssim_is_that_of_its_definition(size):
    rng = np.random.default_rng(0)
    x, truth = rng.uniform(-1, 1, (2, 3, *size, 2))
    wanted = [
        np.mean([direct_ssim(a[..., c], b[..., c]) for c in range(2)])
        for a, b in zip(x, truth, strict=True)
    ]
    np.testing.assert_allclose(restoration.ssim(x, truth), wanted, atol=1e-9)
    np.testing.assert_allclose(restoration.ssim(truth, truth), 1)


def test_coverage_of_a_calibrated_posterior_is_the_probability():
    """With 20,000 pixels, a share is within 5 standard errors but once in 10^6 runs."""
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(20, 1, 1000))
    samples = centre + rng.normal(size=(20, 99, 1000))
    truth = centre[:, 0] + rng.normal(size=(20, 1000))
    found = restoration.coverage(samples, truth)
    for p in (0.5, 0.9, 0.95):
        assert abs(found[f"{p:g}"] - p) < 5 * np.sqrt(p * (1 - p) / 20_000)
    narrow = restoration.coverage(centre + (samples - centre) / 2, truth)
    assert narrow["0.9"] < 0.7


def test_the_report_compares_mean_and_samples():
    truth = np.zeros((1, 8, 8, 1))
    samples = np.stack([truth + 0.2, truth - 0.18], axis=1)
    report = restoration.report(samples, truth)
    assert report["psnr_of_mean"] == pytest.approx(-20 * np.log10(0.01 / 2))
    assert report["psnr_of_samples"] == pytest.approx((20 - 20 * np.log10(0.18 / 2)) / 2)
    assert 1 > report["ssim_of_mean"] > report["ssim_of_samples"]


@pytest.mark.parametrize("shape", [(5,), (6, 2), (2, 2, 2, 1)])
def test_the_report_of_other_examples_has_root_mean_square_errors(shape):
    truth = np.random.default_rng(0).normal(size=(3, *shape))
    report = restoration.report(np.stack([truth + 0.2, truth - 0.18], axis=1), truth)
    assert set(report) == {"rmse_of_mean", "rmse_of_samples", "coverage"}
    assert report["rmse_of_mean"] == pytest.approx(0.01)
    assert report["rmse_of_samples"] == pytest.approx(np.sqrt((0.2**2 + 0.18**2) / 2))
    assert report["coverage"] == restoration.coverage(
        np.stack([truth + 1, truth - 1], axis=1), truth
    )
