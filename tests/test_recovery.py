import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_counts, assert_mean, assert_variance
from scipy import stats
from scipy.special import log_expit, logsumexp
from scipy.stats import norm

from drl_jax import diffusion, noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.recovery import Parameterisation

SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-4
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
LEVELS = jnp.arange(6)


def quadratic(x, t):
    """A network f whose curvature differs between levels."""
    return -(t + 1.0) * jnp.sum(x**2, axis=1)


def test_step_sizes_are_those_of_the_paper():
    sigma, sigma_bar = np.float64(SCHEDULE.sigma), np.float64(SCHEDULE.sigma_bar)
    expected = B_SQUARED * sigma_bar[:6] / sigma_bar[0] * sigma[1:] ** 2
    np.testing.assert_allclose(S**2, expected, rtol=1e-6)


def test_conditional_is_F_plus_a_quadratic_and_the_marginal_at_the_top():
    y, x_tilde = jax.random.normal(jax.random.key(0), (2, 6, 3))
    F = recovery.log_density(quadratic, Parameterisation(S**2, recovery.no_reference))
    log_p = recovery.conditional_log_density(F, y, x_tilde, LEVELS, SCHEDULE)
    expected = -(np.arange(6) + 1) * np.sum(np.square(y), axis=1) / np.square(S)
    gaussian = -np.sum(np.square(x_tilde - y), axis=1) / (2 * np.square(SCHEDULE.sigma[1:]))
    np.testing.assert_allclose(log_p[:5], (expected + gaussian)[:5], rtol=1e-5)
    np.testing.assert_allclose(log_p[5], expected[5], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "t"), [(6, t) for t in range(6)] + [(1000, t) for t in (0, 30, 300, 998, 999)]
)
def test_conditional_of_the_exact_energy_satisfies_bayes_rule(T, t):
    """Its normaliser is sqrt(2 pi) sigma_{t+1} times the density of x_{t+1}; 1 at the top.

    The normalised density integrates to one and equals the closed form. The gradient that the
    chains use equals the closed form and central differences of the value. Fails if sigma is
    1% off or that of level t, or if the quadratic term has the wrong sign, is kept at the top
    or is left out below it.
    """
    with jax.enable_x64(True):
        schedule = diffusion.schedule(T)
        data = mixtures.isotropic(np.array([[-0.9], [0.9]]), 0.2, np.array([0.4, 0.6]))
        F = mixtures.exact_F(data, schedule)
        grid, h = np.linspace(-8, 8, 16001, retstep=True)
        y, x_tilde = grid[:, None], np.full((len(grid), 1), 0.3)
        log_p, gradient = value_and_gradient(
            lambda y: recovery.conditional_log_density(
                F, y, x_tilde, jnp.full(len(grid), t), schedule
            ),
            jnp.asarray(y),
        )
        normaliser = 1.0
        if t < T - 1:
            log_q_next = mixtures.marginal(data, t + 1, schedule).log_density(x_tilde[:1])[0]
            normaliser = np.sqrt(2 * np.pi) * schedule.sigma[t + 1] * np.exp(log_q_next)
        assert np.trapezoid(np.exp(log_p) / normaliser, grid) == pytest.approx(1, rel=1e-9)
        exact = mixtures.conditional(data, x_tilde, t, schedule)
        np.testing.assert_allclose(
            log_p - np.log(normaliser), exact.log_density(y), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(gradient, exact.score(y), rtol=1e-8, atol=1e-8)
        difference = (log_p[2:] - log_p[:-2]) / (2 * h)
        np.testing.assert_allclose(difference, gradient[1:-1, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_loss_is_signed_f_weighted_by_level(sign):
    y = jax.random.normal(jax.random.key(3), (6, 3))
    losses, f = recovery.loss(quadratic, y, sign, LEVELS, SCHEDULE)
    np.testing.assert_allclose(f, quadratic(y, LEVELS), rtol=1e-6)
    weight = SCHEDULE.sigma[1] / SCHEDULE.sigma[1:]
    np.testing.assert_allclose(losses, sign * weight * f, rtol=1e-5)


def test_F_with_unit_precision_has_white_noise_as_its_reference_measure():
    x = jax.random.normal(jax.random.key(5), (6, 3))
    tau = jnp.arange(1.0, 7.0)
    F = recovery.log_density(quadratic, Parameterisation(tau, recovery.white_noise))
    expected = quadratic(x, LEVELS) / tau - np.sum(np.square(x), axis=1) / 2
    np.testing.assert_allclose(F(x, LEVELS), expected, rtol=1e-6)


def test_network_of_t1k_has_a_gradient_of_order_one_at_every_level():
    """Tests the exact F of data at a point, the steepest case: N(a_bar x, sigma_bar²).

    For f = tau (F + rho |x|² / 2), the root mean square of grad f is a_bar_t². With s_t², the
    parameterisation of T6, it would be three to six orders of magnitude smaller below the top.
    """
    schedule = diffusion.schedule(1000)
    t = jnp.arange(1000)
    x_t = schedule.a_bar[t] * 0.3 + schedule.sigma_bar[t] * jax.random.normal(
        jax.random.key(0), (500, 1000)
    )

    def gradient_norm(tau, rho):
        grad_F = -(x_t - schedule.a_bar[t] * 0.3) / schedule.sigma_bar[t] ** 2
        return np.sqrt(np.mean((tau * (grad_F + rho * x_t)) ** 2, axis=0))

    of_t1k = gradient_norm(schedule.sigma_bar[:-1], rho=1)
    np.testing.assert_allclose(of_t1k[:900], (schedule.a_bar[:900]) ** 2, rtol=0.3, atol=0.05)
    assert np.max(of_t1k) < 1.2
    s = recovery.step_sizes(schedule, B_SQUARED)
    of_t6 = gradient_norm(s**2, rho=0)
    assert np.max(of_t6[:-1]) < 5e-4
    assert np.min(of_t6) < 5e-6


@pytest.mark.parametrize("half_width", [1.0, 1 + 1 / 16])
def test_uniform_pixels_have_the_density_of_uniform_noise_that_was_diffused(half_width):
    """Compares with SciPy in float64, also 30 standard deviations out in the tail."""
    schedule = diffusion.schedule(6, "cosine")
    x_t = np.concatenate([np.linspace(-1.5, 1.5, 61), [-30.0, 30.0]])
    for t in range(6):
        y = x_t * float(schedule.y_scale(jnp.asarray(t)))
        log_p = recovery.uniform_pixels(schedule, half_width)
        found = log_p(jnp.asarray(y, jnp.float32)[:, None], jnp.full(len(y), t))
        edge, sigma = float(schedule.a_bar[t]) * half_width, float(schedule.sigma_bar[t])
        u = np.abs(x_t)
        expected = logsumexp(
            [norm.logcdf((edge - u) / sigma), norm.logcdf((-edge - u) / sigma)],
            b=[[1], [-1]],
            axis=0,
        )
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("half_width", [1.0, 1 + 1 / 16])
def test_bounded_pixels_turn_normal_pixels_into_uniform_ones(half_width):
    """Added to the log-density of normal pixels with the variance of uniform ones.

    Fails if the variance lacks the noise of the level, or the factor y_t / x_t.
    """
    schedule = diffusion.schedule(6, "cosine")
    uniform = recovery.uniform_pixels(schedule, half_width)
    correction = recovery.bounded_pixels(schedule, half_width)
    for t in range(6):
        y = np.linspace(-1.5, 1.5, 61)
        a, sigma_bar = float(schedule.a_bar[t]), float(schedule.sigma_bar[t])
        std = float(schedule.y_scale(jnp.asarray(t))) * np.hypot(
            a * half_width / 3**0.5, sigma_bar
        )
        pixels, levels = jnp.asarray(y, jnp.float32)[:, None], jnp.full(61, t)
        found = correction(pixels, levels) + (norm.logpdf(y, 0, std) - norm.logpdf(0, 0, std))
        np.testing.assert_allclose(found, uniform(pixels, levels), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_log_density_of_uniform_pixels_is_a_sum_over_pixels_with_a_finite_gradient():
    schedule = diffusion.schedule(100, "cosine")
    log_p = recovery.uniform_pixels(schedule, 1.0)
    t = jnp.array([0, 50, 99])
    y = jnp.array([[0.3, -1.2], [1e3, 0.0], [-1e3, 2.0]])
    by_pixel = sum(log_p(y[:, i : i + 1], t) for i in range(2))
    np.testing.assert_allclose(log_p(y, t), by_pixel, rtol=1e-6)
    gradient = jax.grad(lambda y: log_p(y, t).sum())(y)
    assert np.all(np.isfinite(gradient))
    assert gradient[1, 0] < 0 < gradient[2, 0]


@pytest.mark.parametrize("half_width", [1.0, 1 + 1 / 16])
def test_mixture_adds_the_log_density_of_pixels_that_are_black_with_given_odds(half_width):
    """Compares with SciPy in float64, also in the tails.

    Fails if one of both densities is not normalised.
    """
    schedule = diffusion.schedule(6, "cosine")
    temperature = jnp.linspace(0.5, 2.0, 6)
    form = recovery.mixture(schedule, temperature, half_width)
    uniform = recovery.uniform_pixels(schedule, half_width)
    x_t = np.concatenate([np.linspace(-1.5, 1.5, 61), [-30.0, 30.0]])
    odds, v = np.linspace(-8.0, 8.0, 63), np.linspace(2.0, -2.0, 63)
    u = jnp.asarray(np.stack([v, odds / recovery.LOG_ODDS], 1)[:, :, None], jnp.float32)
    for t in range(6):
        levels = jnp.full(63, t)
        y = jnp.asarray(x_t * float(schedule.y_scale(jnp.asarray(t))), jnp.float32)[:, None]
        found = (form(y, u, levels) - y[:, 0] * v) / temperature[t] + uniform(y, levels)
        a_bar, sigma = float(schedule.a_bar[t]), float(schedule.sigma_bar[t])
        edge, distance = a_bar * half_width, np.abs(x_t)
        grey = logsumexp(
            [norm.logcdf((edge - distance) / sigma), norm.logcdf((-edge - distance) / sigma)],
            b=[[1], [-1]],
            axis=0,
        )
        black = norm.logpdf(x_t, -a_bar, np.hypot(sigma, a_bar * (half_width - 1) / 3**0.5))
        constant = np.log(2 * edge)
        expected = np.logaddexp(log_expit(-odds) + grey, log_expit(odds) + black + constant)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


def test_denoising_loss_of_a_quadratic_energy_has_its_closed_form():
    """F = -c |y|² / 2, so the error is eps - a sigma_bar c y. Fails if a is kept at the top."""
    schedule = diffusion.schedule(6, "cosine")
    c = jnp.array([3.0, 0.1, 1.0, 2.0, 1.0, 0.5])
    y, eps = jax.random.normal(jax.random.key(6), (2, 6, 4))
    losses = recovery.denoising_loss(
        lambda x, t: -c * jnp.sum(x**2, axis=1) / 2, y, eps, LEVELS, schedule
    )
    a = np.append(np.float64(schedule.a[1:6]), 1.0)
    std = a * np.float64(schedule.sigma_bar[:6])
    squares = np.sum((eps - (std * c)[:, None] * y) ** 2, axis=1)
    np.testing.assert_allclose(losses, squares / 8, rtol=1e-5)


def quadratic_energy(h, P):
    """Returns F(y) = h y - P y² / 2 in one dimension; h and P have one number per example."""
    return lambda y, t: h * y[:, 0] - P * y[:, 0] ** 2 / 2


def joint_moments(data, schedule):
    """Returns E y, E x_tilde, Var y, Var x_tilde and Cov(y, x_tilde) at every level."""
    (mean,), ((variance,),) = data.mean_and_covariance()
    t = jnp.arange(schedule.T)
    a, a_y = schedule.a[t + 1], schedule.y_scale(t)
    mean_t = schedule.a_bar[t] * mean
    variance_t = schedule.a_bar[t] ** 2 * variance + schedule.sigma_bar[t] ** 2
    variance_next = a**2 * variance_t + schedule.sigma[t + 1] ** 2
    return a_y * mean_t, a * mean_t, a_y**2 * variance_t, variance_next, a_y * a * variance_t


def wrong(moments):
    """Returns h, P of energies with half the true precision and means off by half a width."""
    mean, _, variance, *_ = moments
    return (mean + 0.5 * jnp.sqrt(variance)) / (2 * variance), 1 / (2 * variance)


def true(moments):
    """Returns h, P of the true energies."""
    mean, _, variance, *_ = moments
    return mean / variance, 1 / variance


PAIRS = (recovery.positives, recovery.positives_with_shared_noise)


@pytest.mark.slow
@pytest.mark.parametrize("energies", [wrong, true])
@pytest.mark.parametrize("pairs", PAIRS)
def test_loss_has_the_gradient_of_maximum_likelihood(pairs, energies):
    """grad E loss = weight_t tau_t grad E[-log p(y | x_tilde)] at every level; 0 for the truth.

    The network is f = tau F. With u = 1 / sigma² (0 at the top), its conditionals are Gaussian
    with precision P + u and mean (h + u x_tilde) / (P + u), so E[-log p] is known; its gradient
    is E y⁻ - E y in h, and (E y² - E y⁻²) / 2 in P. Negative samples are exact. Fails if
    positive and negative samples are swapped, the weight is squared or left out, y is not
    scaled or is scaled at the top, or x_tilde is drawn at level t.

    The expected gradient, that of independent pairs, is also that of pairs with shared noise:
    it depends on the distributions of y and of x_tilde, but not on their covariance.
    """
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    moments = joint_moments(data, SCHEDULE)
    theta = jnp.stack(energies(moments))
    u = (1 - SCHEDULE.is_marginal(LEVELS)) / SCHEDULE.sigma[1:] ** 2

    def expected_nll(theta):
        h, P = theta
        mean, mean_next, variance, variance_next, covariance = moments
        k = u / (P + u)
        bias = mean - k * mean_next - h / (P + u)
        square = bias**2 + variance - 2 * k * covariance + k**2 * variance_next
        return jnp.sum((P + u) * square - jnp.log(P + u)) / 2

    n = 200_000
    t = jnp.repeat(LEVELS, n)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(6 * n))

    @jax.jit
    def gradients(keys):
        x = data.sample(noise.fold(keys, 0))
        y, x_tilde = pairs(noise.fold(keys, 1), x, t, SCHEDULE)
        h, P = theta[:, t, None, None]
        model = mixtures.Mixture(jnp.zeros((6 * n, 1)), h / P, 1 / P, jnp.ones((1, 1, 1)))
        y_neg = model.posterior(x_tilde, 1 / jnp.sqrt(u[t])).sample(noise.fold(keys, 2))

        def loss(theta, y, y_neg, t):
            h, P = S[t] ** 2 * theta  # of f = tau F
            f = quadratic_energy(h, P)
            phases = (y, -1), (y_neg, 1)
            return sum(recovery.loss(f, y[None], s, t[None], SCHEDULE)[0][0] for y, s in phases)

        return jax.vmap(jax.grad(loss))(theta[:, t].T, y, y_neg, t)

    found = np.asarray(gradients(keys)).reshape(6, n, 2).swapaxes(0, 1)
    expected = (SCHEDULE.sigma[1] / SCHEDULE.sigma[1:] * S**2 * jax.grad(expected_nll)(theta)).T
    assert_mean(found, np.asarray(expected), np.var(found, axis=0))
    if energies is true:
        np.testing.assert_allclose(expected / np.std(found, axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("pairs", PAIRS)
def test_shared_noise_reduces_the_variance_of_the_gradient_by_a_known_factor(pairs):
    """For normal data and the true F, y⁻ - y is the gradient of the log-likelihood in h.

    With m = Var y, M = Var x_tilde, y = alpha x + beta eps, x_tilde = alpha x + gamma eps', its
    variance is 2 m (1 - m / M) for independent pairs, and gamma / (gamma + beta) times that for
    eps' = eps. Fails if x_tilde has the noise of level t.
    """
    schedule, n = diffusion.schedule(6, "cosine"), 50_000
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    _, _, variance, variance_next, _ = joint_moments(data, schedule)
    expected = 2 * variance * (1 - variance / variance_next)
    if pairs is recovery.positives_with_shared_noise:
        beta, gamma = schedule.a[1:] * schedule.sigma_bar[:-1], schedule.sigma_bar[1:]
        expected *= gamma / (gamma + beta)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))

    @jax.jit
    def difference(t):
        x = data.sample(noise.fold(keys, 0))
        y, x_tilde = pairs(noise.fold(keys, 1), x, jnp.full(n, t), schedule)
        true_model = mixtures.energy_marginal(data, t, schedule)
        y_neg = true_model.posterior(x_tilde, schedule.sigma[t + 1]).sample(noise.fold(keys, 2))
        return y_neg - y

    for t in range(5):
        assert_variance(difference(t), 0.0, expected[t], of=5)


def test_denoising_loss_is_minimised_by_the_exact_energy_of_the_same_level():
    """Its gradient in h and P is 0 there, and not at the exact energy of the level above.

    The levels are far apart, so that the density of x_{t+1} differs much from that of y_t.
    Compares with the gradient of (a sigma_bar_t)² E |grad F - grad log q(y_t)|² / 2. Fails if
    the noise is that of level t + 1, or y is scaled at the top or not scaled below it.
    """
    schedule, n = diffusion.schedule(6, "cosine"), 20_000
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    mean, mean_next, variance, variance_next, _ = joint_moments(data, schedule)
    of_level = jnp.stack([mean / variance, 1 / variance])
    of_level_above = jnp.stack([mean_next / variance_next, 1 / variance_next])
    t = jnp.repeat(LEVELS, n)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(6 * n))

    @jax.jit
    def gradients(theta):
        x = data.sample(noise.fold(keys, 0))
        y, eps = recovery.positives_with_noise(noise.fold(keys, 1), x, t, schedule)

        def loss(theta, y, eps, t):
            F = quadratic_energy(*theta)
            return recovery.denoising_loss(F, y[None], eps[None], t[None], schedule)[0]

        return jax.vmap(jax.grad(loss))(theta[:, t].T, y, eps, t)

    def expected_loss(theta):  # up to a constant
        std = schedule.y_scale(LEVELS) * schedule.sigma_bar[:6]
        (h, P), (h_true, P_true) = theta, of_level
        bias = (h - h_true) - (P - P_true) * mean
        return jnp.sum(std**2 * (bias**2 + (P - P_true) ** 2 * variance)) / 2

    for theta in (of_level, of_level_above):
        found = np.asarray(gradients(theta)).reshape(6, n, 2).swapaxes(0, 1)
        expected = np.asarray(jax.grad(expected_loss)(theta).T)
        assert_mean(found, expected, np.var(found, axis=0), of=2)
    standard_errors = np.abs(expected) / np.std(found, axis=0) * np.sqrt(n)
    assert standard_errors[1:5, 1].min() > 10


def test_positives_have_the_densities_of_the_levels_and_independent_noise():
    """y has the density that F(·, t) learns, and x_tilde - y is noise of std sigma_{t+1}.

    At the top y is x_{T-1} itself, and x_tilde - a_T y is the noise. Fails if y is scaled at
    the top or not scaled below it, or x_tilde is drawn from the scaled y.
    """
    n = 100_000
    data = mixtures.isotropic(np.array([[-0.9], [0.9]]), 0.2, np.array([0.4, 0.6]))
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))

    @jax.jit
    def draw(t):
        x = data.sample(noise.fold(keys, 0))
        return recovery.positives(noise.fold(keys, 1), x, jnp.full(n, t), SCHEDULE)

    for t in range(6):
        y, x_tilde = (np.asarray(v, np.float64)[:, 0] for v in draw(t))
        marginal = mixtures.marginal if t == 5 else mixtures.energy_marginal
        density = marginal(data, t, SCHEDULE)
        component_cdf = stats.norm.cdf(
            y[:, None], density.means[:, 0], np.sqrt(density.variances[:, 0])
        )
        a = SCHEDULE.a[6] if t == 5 else 1.0
        eps = (x_tilde - a * y) / SCHEDULE.sigma[t + 1]
        # y and eps are independent, so all of 6 x 6 cells have equal probability.
        row, column = (
            np.minimum((6 * u).astype(int), 5)
            for u in (component_cdf @ np.exp(density.log_weights), stats.norm.cdf(eps))
        )
        counts = np.bincount(6 * row + column, minlength=36)
        assert_counts(counts, np.full(36, 1 / 36), of=6)


def test_positives_with_shared_noise_are_scaled_only_where_y_is():
    """Fails if x_tilde is scaled, or y is scaled at the top."""
    t = jnp.arange(6)
    keys = jax.random.split(jax.random.key(8), 6)
    x = jax.random.uniform(jax.random.key(9), (6, 5), minval=-1, maxval=1)
    y, x_tilde = recovery.positives_with_shared_noise(keys, x, t, SCHEDULE)
    expected, eps = recovery.positives_with_noise(keys, x, t, SCHEDULE)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    a_bar, sigma_bar = SCHEDULE.a_bar[1:, None], SCHEDULE.sigma_bar[1:, None]
    np.testing.assert_allclose(x_tilde, a_bar * x + sigma_bar * eps, rtol=1e-6)


@pytest.mark.parametrize("T", [6, 1000])
def test_positives_with_noise_are_those_of_the_recovery_likelihood(T):
    """y is the scaled x_t of `diffusion.diffuse` with the same keys, and eps is its noise."""
    schedule = diffusion.schedule(T)
    t = jnp.array([0, T // 2, T - 2, T - 1])
    keys = jax.random.split(jax.random.key(8), 4)
    x = jax.random.uniform(jax.random.key(9), (4, 5), minval=-1, maxval=1)
    y, eps = recovery.positives_with_noise(keys, x, t, schedule)
    x_t = diffusion.diffuse(keys, x, t, schedule)
    a = jnp.append(schedule.a[t[:3] + 1], 1.0)[:, None]
    np.testing.assert_allclose(y, a * x_t, rtol=1e-6)
    x_t = schedule.a_bar[t, None] * x + schedule.sigma_bar[t, None] * eps
    np.testing.assert_allclose(y, a * x_t, rtol=1e-6)


@pytest.mark.parametrize(("side", "largest"), [(8, 60.0), (28, 735.0)])
def test_a_limited_f_is_f_where_it_is_small_and_never_exceeds_the_limit_in_nats(side, largest):
    """The limit is proportional to the number of pixels."""
    tau = jnp.linspace(0.5, 3.0, 6)
    f = recovery.limited(lambda y, t: y[:, 0, 0], tau)
    for nats, wanted in ((0.1, 0.1), (-0.1, -0.1), (1e6, largest), (-1e6, -largest)):
        y = jnp.zeros((6, side, side)).at[:, 0, 0].set(nats * tau)
        np.testing.assert_allclose(f(y, jnp.arange(6)) / tau, np.full(6, wanted), rtol=1e-5)


def test_displacement_is_the_euclidean_distance():
    distance = recovery.displacement(jnp.full((2, 2, 2, 1), 3.0), jnp.zeros((2, 2, 2, 1)))
    np.testing.assert_allclose(distance, [6, 6], rtol=1e-6)
