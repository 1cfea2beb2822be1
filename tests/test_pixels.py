import numpy as np
import pytest

from drl_jax.metrics import pixels


def test_pixel_metrics_are_distance_reference_distance_and_range():
    data = np.random.default_rng(0).uniform(-1, 1, size=(500, 2, 2, 1))
    metrics = pixels.pixel_metrics(data + 0.5, data)
    assert metrics["pixel_frechet"] == pytest.approx(4 * 0.25, rel=1e-6)
    assert metrics["pixel_frechet_of_data_halves"] < 0.1
    assert metrics["pixel_max"] == pytest.approx(1.5, abs=0.01)
    assert metrics["pixel_min"] == pytest.approx(-0.5, abs=0.01)


def test_images_with_a_pixel_far_outside_are_counted_once():
    data = np.random.default_rng(0).uniform(-1, 1, size=(5, 2, 2, 1))
    samples = data.copy()
    samples[1] = 1.4
    samples[2, 0, 0] = 1.6
    samples[3] = -1.6
    samples[4] = 1.5
    assert pixels.pixel_metrics(data, data)["num_outside"] == 0
    assert pixels.pixel_metrics(samples, data)["num_outside"] == 2
