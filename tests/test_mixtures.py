"""Tests Gaussian mixtures against brute force; in float64, except for the samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_counts
from scipy import stats

from drl_jax import diffusion, noise
from drl_jax.data import mixtures

N = 200_000
LEVELS = [(6, t) for t in range(6)] + [(1000, t) for t in (0, 1, 30, 300, 998, 999)]


def components(D, K=4):
    """Returns weights, means and full covariance matrices, all different."""
    rng = np.random.default_rng(D)
    roots = 0.35 * rng.normal(size=(K, D, D)) + 0.1 * np.eye(D)
    weights = np.arange(1.0, K + 1)
    return (
        weights / weights.sum(),
        rng.uniform(-1, 1, size=(K, D)),
        roots @ roots.transpose(0, 2, 1) + 0.04 * np.eye(D),
    )


def brute_log_density(x, weights, means, covariances):
    """Returns log p(x) [n] of x [n, D], by scipy."""
    each = [
        stats.multivariate_normal(m, C).logpdf(x)
        for m, C in zip(means, covariances, strict=True)
    ]
    return np.log(weights @ np.exp(np.reshape(each, (len(weights), -1))))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def points(n, D, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, D)))


def normal_log_density(x, mean, sigma):
    return np.sum(stats.norm.logpdf(x, mean, sigma), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("D", [1, 5])
def test_the_density_with_and_without_added_noise_agrees_with_scipy(D, x64):
    """Fails with the axes transposed, and with the variances halved."""
    weights, means, covariances = components(D)
    data, x = mixtures.mixture(weights, means, covariances), points(50, D)
    expected = brute_log_density(x, weights, means, covariances)
    np.testing.assert_allclose(data.log_density(x), expected, rtol=1e-11)
    diffused = covariances * 0.7**2 + 0.3**2 * np.eye(D)
    expected = brute_log_density(x, weights, 0.7 * means, diffused)
    np.testing.assert_allclose(data.diffused(0.7, 0.3).log_density(x), expected, rtol=1e-11)
    two = data.diffused(jnp.array([1.0, 0.7]), jnp.array([0.0, 0.3]))
    found = two.log_density(jnp.stack([x[0], x[1]]))
    np.testing.assert_allclose(found, [data.log_density(x)[0], expected[1]], rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("D", [1, 5])
def test_the_score_is_the_gradient_of_the_log_density(D, x64):
    """Tests one density for all points, and one per point; fails with the sign flipped."""
    weights, means, covariances = components(D)
    data, x = mixtures.mixture(weights, means, covariances), points(50, D)
    for density in (data, data.posterior(points(50, D, seed=1), 0.4)):
        gradient = jax.grad(lambda x, density=density: density.log_density(x).sum())(x)
        np.testing.assert_allclose(density.score(x), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("D", [1, 5])
def test_conditioning_is_bayes_rule(D, x64):
    """log p(y | x) = log p(y) + log N(x; y, sigma²) - log p(x), with one sigma per example.

    Fails with the weights of the components unchanged, and with sigma not squared.
    """
    weights, means, covariances = components(D)
    data = mixtures.mixture(weights, means, covariances)
    y, x_tilde = points(50, D), points(50, D, seed=1)
    sigma = jnp.linspace(0.05, 2, 50)
    joint = data.log_density(y) + normal_log_density(x_tilde, y, sigma[:, None])
    expected = joint - data.diffused(jnp.ones(50), sigma).log_density(x_tilde)
    np.testing.assert_allclose(
        data.posterior(x_tilde, sigma).log_density(y), expected, rtol=1e-9
    )
    prior = data.posterior(x_tilde, jnp.inf)
    np.testing.assert_allclose(prior.log_density(y), data.log_density(y), rtol=1e-12)


@pytest.mark.parametrize("D", [1, 5])
def test_mean_and_covariance_are_those_of_the_whole_mixture(D, x64):
    """Cov = E x xᵀ - E x E xᵀ; fails without the spread of the means."""
    weights, means, covariances = components(D)
    mean, covariance = mixtures.mixture(weights, means, covariances).mean_and_covariance()
    expected = weights @ means
    second = np.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None])
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(covariance, second - np.outer(expected, expected), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("D", [1, 5])
def test_samples_are_drawn_from_the_density(D):
    """Projections on each axis and on two random directions have the exact distribution.

    So does one sample from each of many posteriors. The distribution function of a sample is
    uniform, which a chi-square test checks. Fails with standard deviations 2% too large, the
    axes transposed, the weights left out, and a posterior's component taken from the first
    example.
    """
    weights, means, covariances = components(D)
    data = mixtures.mixture(weights, means, covariances)
    keys = noise.example_keys(jax.random.key(D), jnp.arange(N))
    x = np.asarray(jax.jit(data.sample)(keys), np.float64)
    across = np.random.default_rng(1).normal(size=(2, D))
    for u in (directions := [*np.eye(D), *across]):
        widths = np.sqrt(np.einsum("i,kij,j->k", u, covariances, u))
        assert_uniform(mixture_cdf(x @ u, weights, means @ u, widths), of=len(directions) + 1)
    x_tilde = jnp.asarray(x + 0.5, jnp.float32)
    posterior = data.posterior(x_tilde, 0.4)
    y = np.asarray(jax.jit(posterior.sample)(noise.fold(keys, 2)), np.float64)
    variances = np.einsum("bkj,kj->bk", posterior.variances, np.square(posterior.axes[:, 0]))
    u = mixture_cdf(
        y[:, 0],
        weights=np.exp(posterior.log_weights),
        means=np.asarray(posterior.means[..., 0]),
        widths=np.sqrt(variances),
    )
    assert_uniform(u, of=len(directions) + 1)


def mixture_cdf(x, weights, means, widths):
    return np.sum(weights * stats.norm.cdf(x[:, None], means, widths), axis=1)


def assert_uniform(u, of):
    counts, _ = np.histogram(u, bins=25, range=(0, 1))
    assert_counts(counts, np.full(25, 1 / 25), of)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "t"), LEVELS)
def test_the_densities_of_every_level_agree_with_quadrature(T, t, x64):
    """Computes q(x_t), q(y_t) and q(y_t | x_{t+1}) by sums over a grid of data points.

    Fails with t + 1 for t in a marginal, y unscaled (below the highest level) or scaled (at
    it), the sigma of level t in the conditional, and the quadratic term at the highest level.
    """
    schedule = diffusion.schedule(T)
    betas = np.append(np.linspace(1e-4, 0.02, 1000), 1.0)
    ends = [0, 100, 200, 300, 400, 500, 999] if T == 6 else np.arange(1001)
    keep = np.cumprod(1 - betas)[ends]  # a_bar²
    a = np.sqrt(keep[t + 1] / keep[t]) if t < T - 1 else 1.0
    weights, means, covariances = components(1)
    data = mixtures.mixture(weights, means, covariances)
    nodes = np.linspace(-5, 5, 4001)
    masses = np.exp(brute_log_density(nodes, weights, means, covariances)) * 10 / 4000

    def diffused(v, scale, variance):
        """Returns the density at v of scale x + sqrt(variance) eps, with x from the data."""
        squares = (v[:, None] - scale * nodes) ** 2
        return np.exp(-squares / (2 * variance)) @ masses / np.sqrt(2 * np.pi * variance)

    v = np.linspace(-6, 6, 301)
    column = jnp.asarray(v)[:, None]
    found = mixtures.marginal(data, t, schedule).log_density(column)
    x_t = diffused(v, np.sqrt(keep[t]), 1 - keep[t])
    np.testing.assert_allclose(np.exp(found), x_t, rtol=1e-8, atol=1e-12)
    y_t = diffused(v, a * np.sqrt(keep[t]), a**2 * (1 - keep[t]))
    np.testing.assert_allclose(
        np.exp(mixtures.exact_F(data, schedule)(column, jnp.full(301, t))),
        y_t,
        rtol=1e-8,
        atol=1e-12,
    )
    sigma = np.sqrt(1 - keep[t + 1] / keep[t])
    near = v if t == T - 1 else 0.3 + sigma * v
    y = diffused(near, a * np.sqrt(keep[t]), a**2 * (1 - keep[t]))
    if t < T - 1:
        y = y * stats.norm.pdf(0.3, near, sigma)
    y = y / np.trapezoid(y, near)
    found = mixtures.conditional(data, jnp.full((301, 1), 0.3), t, schedule)
    log_p = found.log_density(jnp.asarray(near)[:, None])
    np.testing.assert_allclose(np.exp(log_p), y, rtol=1e-6, atol=1e-9)


def test_conditionals_of_several_levels_in_one_call_agree_with_one_call_per_level():
    """One of the two is compiled. Fails with the sigma of the first example for all."""
    schedule, data = diffusion.schedule(6), mixtures.PLANAR_SHAPES["moons"]()
    x_tilde, y = jax.random.normal(jax.random.key(0), (2, 6, 2))

    @jax.jit
    def together(t):
        return mixtures.conditional(data, x_tilde, t, schedule).log_density(y)

    for t in range(6):
        alone = mixtures.conditional(data, x_tilde, t, schedule).log_density(y)
        np.testing.assert_allclose(together(jnp.arange(6))[t], alone[t], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures.PLANAR_SHAPES)
def test_every_shape_integrates_to_one_and_its_samples_follow_its_density(name):
    """Chi-square test on 30 x 30 cells of [-2.4, 2.4]², each integrated with 10 x 10 nodes.

    Fails with the standard deviations of the samples 5% too large; for the ellipse, the blobs
    and the rings, 2%.
    """
    data = mixtures.PLANAR_SHAPES[name]()
    cells, fine, edge = 30, 10, 2.4
    ticks = (np.arange(cells * fine) + 0.5) / (cells * fine) * 2 * edge - edge
    grid = jnp.asarray(np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1))
    rows = jax.lax.map(jax.jit(data.log_density), jnp.float32(grid))
    masses = np.exp(np.float64(rows)) * (2 * edge / (cells * fine)) ** 2
    assert abs(masses.sum() - 1) < 1e-4
    probabilities = masses.reshape(cells, fine, cells, fine).sum(axis=(1, 3)).ravel()
    keys = noise.example_keys(jax.random.key(0), jnp.arange(N))
    x = np.asarray(jax.jit(data.sample)(keys))
    assert np.all(np.abs(x) < edge)
    side = np.linspace(-edge, edge, cells + 1)
    counts, _, _ = np.histogram2d(*x.T, bins=[side, side])
    assert_counts(counts.ravel(), probabilities / probabilities.sum())


def test_a_fitted_gaussian_has_the_mean_and_the_enlarged_covariance_of_the_data():
    """Closed form for K = 1."""
    x = np.random.default_rng(0).normal(size=(50, 2, 2)).astype(np.float32)
    mean, covariance = mixtures.fit(x, 1).mean_and_covariance()
    points = x.reshape(50, 4)
    np.testing.assert_allclose(mean, points.mean(axis=0), atol=1e-5)
    wanted = np.cov(points.T, bias=True) + mixtures.SMALLEST_VARIANCE * np.eye(4)
    np.testing.assert_allclose(covariance, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_a_fitted_mixture_finds_separate_clusters_and_their_covariances(shape):
    """Closed form, as every point belongs to its own cluster with probability 1.

    Clusters of vectors have covariances of their own, those of images the mean covariance.
    """
    rng = np.random.default_rng(0)
    clusters = [rng.normal((-5, 0), (0.1, 0.3), (30, 2)), rng.normal((5, 1), 0.2, (90, 2))]
    x = np.concatenate(clusters).astype(np.float32)
    fitted = mixtures.fit(x.reshape(-1, *shape), 2)
    of = [np.cov(c.T, bias=True) for c in clusters]
    mean = (of[0] + 3 * of[1]) / 4
    order = np.argsort(fitted.means[:, 0])
    np.testing.assert_allclose(np.exp(fitted.log_weights[order]), [0.25, 0.75], atol=1e-5)
    for k, cluster, own in zip(order, clusters, of, strict=True):
        wanted = own if len(shape) == 1 else mean
        np.testing.assert_allclose(fitted.means[k], cluster.mean(axis=0), atol=1e-4)
        found = fitted.axes[k] @ np.diag(fitted.variances[k]) @ fitted.axes[k].T
        smallest = mixtures.SMALLEST_VARIANCE * np.eye(2)
        np.testing.assert_allclose(found, wanted + smallest, atol=1e-4)
