import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.networks import spectral

RULES = {"a/kernel": "normalise", "b/kernel": "clip", "c/kernel": "clip"}


def rule(path):
    return RULES.get(path)


def make_params():
    k = jax.random.split(jax.random.key(0), 5)
    return {
        "a": {"kernel": 3 * jax.random.normal(k[0], (3, 3, 4, 6)), "bias": jnp.ones(6)},
        "b": {"kernel": 2 * jax.random.normal(k[1], (3, 3, 4, 4))},
        "c": {"kernel": 1e-3 * jax.random.normal(k[2], (5, 4))},
        "head": {"kernel": jax.random.normal(k[3], (5, 2))},
    }


def largest_singular_value(kernel):
    return np.linalg.svd(np.reshape(kernel, (-1, kernel.shape[-1])), compute_uv=False)[0]


def converged(params):
    """Returns normalised parameters and vectors after the power iteration has converged."""
    vectors = spectral.init_vectors(jax.random.key(1), params, rule)
    for _ in range(300):
        normalised, vectors = spectral.normalise(params, vectors, rule)
    return normalised, vectors


@pytest.mark.slow
def test_every_normalised_kernel_has_a_unit_vector():
    vectors = spectral.init_vectors(jax.random.key(1), make_params(), rule)
    assert set(vectors) == set(RULES)
    for u in vectors.values():
        np.testing.assert_allclose(np.linalg.norm(u), 1, rtol=1e-6)


def test_norms_become_one_or_at_most_one_and_other_parameters_are_unchanged():
    params = make_params()
    normalised, _ = converged(params)
    np.testing.assert_allclose(largest_singular_value(normalised["a"]["kernel"]), 1, rtol=1e-5)
    np.testing.assert_allclose(largest_singular_value(normalised["b"]["kernel"]), 1, rtol=1e-5)
    np.testing.assert_array_equal(normalised["c"]["kernel"], params["c"]["kernel"])
    np.testing.assert_array_equal(normalised["head"]["kernel"], params["head"]["kernel"])
    np.testing.assert_array_equal(normalised["a"]["bias"], params["a"]["bias"])


@pytest.mark.parametrize("taps", [(3,), (3, 3, 3)], ids=["signals", "volumes"])
def test_kernels_of_signals_and_volumes_are_matrices_of_taps_and_inputs(taps):
    """The norm is that of the matrix with a row per tap and input channel, from an SVD."""
    kernel = 3 * jax.random.normal(jax.random.key(2), (*taps, 2, 4))
    vectors = spectral.init_vectors(jax.random.key(1), {"a": {"kernel": kernel}}, rule)
    normalise = jax.jit(lambda p, u: spectral.normalise(p, u, rule))
    for _ in range(100):
        normalised, vectors = normalise({"a": {"kernel": kernel}}, vectors)
    rows = [np.asarray(kernel)[(*tap, i)] for tap in np.ndindex(taps) for i in range(2)]
    norm = np.linalg.svd(np.stack(rows), compute_uv=False)[0]
    np.testing.assert_allclose(normalised["a"]["kernel"], kernel / norm, rtol=1e-5)


def test_normalise_makes_one_power_iteration():
    params = make_params()
    u = spectral.init_vectors(jax.random.key(1), params, rule)["a/kernel"]
    W = np.float64(params["a"]["kernel"]).reshape(-1, 6)
    expected = W.T @ W @ np.float64(u)
    _, vectors = spectral.normalise(params, {"a/kernel": u}, rule)
    np.testing.assert_allclose(
        vectors["a/kernel"], expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-6
    )


def test_gradient_is_that_of_dividing_by_the_exact_norm():
    """Compares with autodiff of the norm from an SVD. Fails if sigma is treated as constant."""
    params = make_params()
    _, vectors = converged(params)
    weight = jax.random.normal(jax.random.key(2), params["a"]["kernel"].shape)

    def by_iteration(kernel):
        changed = {**params, "a": {**params["a"], "kernel": kernel}}
        return jnp.sum(weight * spectral.normalise(changed, vectors, rule)[0]["a"]["kernel"])

    def by_svd(kernel):
        sigma = jnp.linalg.norm(kernel.reshape(-1, 6), ord=2)
        return jnp.sum(weight * kernel / sigma)

    kernel = params["a"]["kernel"]
    expected = jax.grad(by_svd)(kernel)
    np.testing.assert_allclose(jax.grad(by_iteration)(kernel), expected, rtol=2e-4, atol=1e-5)
