"""p(label | x) from the energies of the classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_classes
from helpers.gaussian_classes import DIMENSION, LOG_Z, MEANS, SCHEDULE, VARIANCES

from drl_jax import recovery
from drl_jax.metrics import energy_classifier

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return gaussian_classes.model()


def test_classes_have_the_posterior_of_bayes_rule(model):
    """Fails if the prior is not added, or the labels are counted from 0."""
    x = np.random.default_rng(0).normal(size=(50, DIMENSION))
    log_prior = np.log([0.2, 0.3, 0.5]) - LOG_Z[1:]
    found = np.exp(model.classify(x, np.arange(50) % 6, log_prior))
    joint = [
        prior * np.exp(-np.sum((x - m) ** 2, axis=1) / (2 * v)) / v ** (DIMENSION / 2)
        for prior, m, v in zip([0.2, 0.3, 0.5], MEANS[1:], VARIANCES[1:], strict=True)
    ]
    expected = np.transpose(joint / np.sum(joint, axis=0))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def test_the_fitted_prior_makes_up_for_log_z(model):
    """log Z of the classes is up to 43 nats apart; the fit finds prior - log Z.

    With 20,000 examples. The tolerance is ten standard errors of the fit, whose inverse Fisher
    information is below 4 / n for each of the three values.
    """
    rng, n = np.random.default_rng(1), 20_000
    labels = rng.choice([1, 2, 3], p=[0.2, 0.3, 0.5], size=n)
    x = MEANS[labels, None] + np.sqrt(VARIANCES[labels, None]) * rng.normal(size=(n, 2))
    log_p = np.asarray(model.classify(x, np.zeros(n, int)), np.float64)
    b = energy_classifier.fit_prior(log_p, labels)
    expected = np.log([0.2, 0.3, 0.5]) - LOG_Z[1:]
    np.testing.assert_allclose(b, expected - expected.mean(), atol=10 * np.sqrt(4 / n))
    p = np.exp(log_p + b)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p.mean(axis=0), np.bincount(labels)[1:] / n, atol=1e-6)
    exact = energy_classifier.accuracy(log_p + expected, labels)
    assert abs(energy_classifier.accuracy(log_p + b, labels) - exact) < 0.01


def test_a_comparison_uses_the_best_level_and_reports_the_accuracy_of_test_data(monkeypatch):
    """At the chosen level, labels are certain; at the others, they are random."""
    n = 300
    labels = np.random.default_rng(0).integers(1, 4, n)

    def classify_data(model, key, x, level):
        certain = np.where(x[:, :1] == np.arange(1, 4), 0.0, -9.0)
        certain = certain + np.array([0, 20, -20])
        return certain if level == 2 else np.zeros((n, 3))

    monkeypatch.setattr(energy_classifier, "classify_data", classify_data)
    x = labels[:, None].astype(float)
    wrong = np.where(np.arange(n) < 60, labels % 3 + 1, labels)
    found = energy_classifier.compare(gaussian_classes.model(), KEY, x, labels, x, wrong)
    assert (found["level"], found["accuracy"], found["accuracy_of_test"]) == (2, 1.0, 0.8)


def test_data_are_diffused_to_the_level_before_they_are_classified(model):
    """With one seed; a wrong scale or level changes the values by far more than rounding."""
    x = np.random.default_rng(0).normal(size=(5, DIMENSION)).astype(np.float32)
    found = energy_classifier.classify_data(model, KEY, x, 4)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    y, _ = recovery.positives(keys, jnp.asarray(x), jnp.full(5, 4), SCHEDULE)
    np.testing.assert_allclose(found, model.classify(y, np.full(5, 4)), rtol=1e-5)


def test_a_class_without_examples_is_never_found():
    """Fails if its logarithm of zero spreads to the other classes."""
    labels = np.array([1, 1, 3, 3, 3])
    log_p = np.log([[0.6, 0.3, 0.1]] * 2 + [[0.1, 0.7, 0.2]] * 3)
    b = energy_classifier.fit_prior(log_p, labels)
    assert b[1] == -np.inf
    assert np.isfinite(b[[0, 2]]).all()
    assert energy_classifier.accuracy(log_p + b, labels) == 1
