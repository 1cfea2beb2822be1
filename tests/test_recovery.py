import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean

from drl_jax import diffusion, noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.recovery import Parameterisation

SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-4
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
LEVELS = jnp.arange(6)


def quadratic(x, t):
    """f of a known curvature, different at every level."""
    return -(t + 1.0) * jnp.sum(x**2, axis=1)


def test_step_sizes_follow_the_paper():
    sigma, sigma_bar = np.float64(SCHEDULE.sigma), np.float64(SCHEDULE.sigma_bar)
    expected = B_SQUARED * sigma_bar[:6] / sigma_bar[0] * sigma[1:] ** 2
    np.testing.assert_allclose(S**2, expected, rtol=1e-6)


def test_the_conditional_is_energy_plus_gaussian_and_the_top_is_the_marginal():
    y, x_tilde = jax.random.normal(jax.random.key(0), (2, 6, 3))
    F = recovery.log_density(quadratic, Parameterisation(S**2, 0.0))
    log_p = recovery.conditional_log_density(F, y, x_tilde, LEVELS, SCHEDULE)
    expected = -(np.arange(6) + 1) * np.sum(np.square(y), axis=1) / np.square(S)
    gauss = -np.sum(np.square(x_tilde - y), axis=1) / (2 * np.square(SCHEDULE.sigma[1:]))
    np.testing.assert_allclose(log_p[:5], (expected + gauss)[:5], rtol=1e-5)
    np.testing.assert_allclose(log_p[5], expected[5], rtol=1e-6)


@pytest.mark.parametrize(
    ("T", "t"), [(6, t) for t in range(6)] + [(1000, t) for t in (0, 30, 300, 998, 999)]
)
def test_the_conditional_of_the_exact_energy_is_bayes_rule(T, t):
    """Its evidence is the density of x_{t+1} times sqrt(2 pi) sigma_{t+1}; 1 at the top.

    Over it, exp(log p) integrates to one, is the closed form, and the chains' gradient is the
    derivative of the value, by central differences too. Fails with sigma 1% off or that of
    level t, the quadratic term's sign flipped, kept at the top, or left out below it.
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
        evidence = 1.0
        if t < T - 1:
            of_next = mixtures.marginal(data, t + 1, schedule).log_density(x_tilde[:1])[0]
            evidence = np.sqrt(2 * np.pi) * schedule.sigma[t + 1] * np.exp(of_next)
        assert np.trapezoid(np.exp(log_p) / evidence, grid) == pytest.approx(1, rel=1e-9)
        exact = mixtures.conditional(data, x_tilde, t, schedule)
        np.testing.assert_allclose(
            log_p - np.log(evidence), exact.log_density(y), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(gradient, exact.score(y), rtol=1e-8, atol=1e-8)
        difference = (log_p[2:] - log_p[:-2]) / (2 * h)
        np.testing.assert_allclose(difference, gradient[1:-1, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_loss_weighs_levels_and_raises_f_on_data(sign):
    y = jax.random.normal(jax.random.key(3), (6, 3))
    losses, f = recovery.loss(quadratic, y, sign, LEVELS, SCHEDULE)
    np.testing.assert_allclose(f, quadratic(y, LEVELS), rtol=1e-6)
    weight = SCHEDULE.sigma[1] / SCHEDULE.sigma[1:]
    np.testing.assert_allclose(losses, sign * weight * f, rtol=1e-5)


def test_white_noise_is_the_reference_measure_of_many_levels():
    x = jax.random.normal(jax.random.key(5), (6, 3))
    tau = jnp.arange(1.0, 7.0)
    F = recovery.log_density(quadratic, Parameterisation(tau, 1.0))
    expected = quadratic(x, LEVELS) / tau - np.sum(np.square(x), axis=1) / 2
    np.testing.assert_allclose(F(x, LEVELS), expected, rtol=1e-6)


def test_the_network_of_many_levels_has_a_gradient_of_order_one_at_every_level():
    """Of the exact F for data at a point, the hardest: a normal of variance sigma_bar².

    With f = tau (F + rho |x|² / 2) the root mean square of grad f is a_bar_t². With T6's s_t²
    it would be three to six orders of magnitude smaller below the top.
    """
    many = diffusion.schedule(1000)
    t = jnp.arange(1000)
    x_t = many.a_bar[t] * 0.3 + many.sigma_bar[t] * jax.random.normal(
        jax.random.key(0), (500, 1000)
    )

    def slope(parameterisation):
        tau, rho = parameterisation
        grad_F = -(x_t - many.a_bar[t] * 0.3) / many.sigma_bar[t] ** 2
        return np.sqrt(np.mean((tau * (grad_F + rho * x_t)) ** 2, axis=0))

    ours = slope(Parameterisation(many.sigma_bar[:-1], 1.0))
    np.testing.assert_allclose(ours[:900], (many.a_bar[:900]) ** 2, rtol=0.3, atol=0.05)
    assert np.max(ours) < 1.2
    theirs = slope(Parameterisation(recovery.step_sizes(many, B_SQUARED) ** 2, 0.0))
    assert np.max(theirs[:-1]) < 5e-4
    assert np.min(theirs) < 5e-6


def test_the_denoising_loss_of_a_quadratic_energy_has_its_closed_form():
    """F = -c |x|² / 2, so grad F = -c x, and y - x_tilde - sigma² grad F is known."""
    many = diffusion.schedule(1000)
    t = jnp.array([0, 10, 500, 998, 999])
    c = jnp.array([3.0, 0.1, 1.0, 2.0, 1.0])
    y, x_tilde = jax.random.normal(jax.random.key(6), (2, 5, 4))
    losses = recovery.denoising_loss(
        lambda x, t: -c * jnp.sum(x**2, axis=1) / 2, y, x_tilde, t, many
    )
    sigma, sigma_bar, y, x_tilde = map(
        np.float64, (many.sigma[t + 1], many.sigma_bar[t + 1], y, x_tilde)
    )
    squares = np.sum((y - x_tilde + sigma[:, None] ** 2 * c[:, None] * x_tilde) ** 2, axis=1)
    np.testing.assert_allclose(
        losses, (sigma_bar / sigma) ** 2 * squares / (2 * sigma**2) / 4, rtol=1e-4
    )


def quadratic_energy(h, P):
    """F(y) = h y - P y² / 2 in one dimension, h and P a number an example."""
    return lambda y, t: h * y[:, 0] - P * y[:, 0] ** 2 / 2


def joint_moments(data, schedule):
    """Means of y and x_tilde, their variances and covariance, at every level."""
    (mean,), ((variance,),) = data.mean_and_covariance()
    t = jnp.arange(schedule.T)
    a, a_y = schedule.a[t + 1], schedule.a_y(t)
    mean_t = schedule.a_bar[t] * mean
    variance_t = schedule.a_bar[t] ** 2 * variance + schedule.sigma_bar[t] ** 2
    variance_next = a**2 * variance_t + schedule.sigma[t + 1] ** 2
    return (
        *(a_y * mean_t, a * mean_t),
        *(a_y**2 * variance_t, variance_next, a_y * a * variance_t),
    )


def off(moments):
    """h and P of energies half as precise as the truth, their means off by half a width."""
    mean, _, variance, *_ = moments
    return (mean + 0.5 * jnp.sqrt(variance)) / (2 * variance), 1 / (2 * variance)


def true(moments):
    mean, _, variance, *_ = moments
    return mean / variance, 1 / variance


@pytest.mark.parametrize("where", [off, true])
def test_the_loss_has_the_gradient_of_maximum_likelihood(where):
    """grad E loss = weight_t tau_t grad E[-log p(y | x_tilde)] at every level, 0 at the truth.

    The network is f = tau F, of Gaussian conditionals: with u = 1 / sigma² (0 at the top), of
    precision P + u and mean (h + u x_tilde) / (P + u), so E[-log p] is known. Its gradient in
    h is E y⁻ - E y, in P (E y² - E y⁻²) / 2. Negatives are exact draws. Fails with negatives
    and positives exchanged, the weight squared or left out, y unscaled or the top's scaled,
    and x_tilde drawn at level t.
    """
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    moments = joint_moments(data, SCHEDULE)
    theta = jnp.stack(where(moments))
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
        y, x_tilde = recovery.positives(noise.fold(keys, 1), x, t, SCHEDULE)
        h, P = theta[:, t, None, None]
        model = mixtures.Mixture(jnp.zeros((6 * n, 1)), h / P, 1 / P, jnp.ones((1, 1, 1)))
        y_neg = model.posterior(x_tilde, 1 / jnp.sqrt(u[t])).sample(noise.fold(keys, 2))

        def loss(theta, y, y_neg, t):
            tau = S[t] ** 2
            f = quadratic_energy(*(tau * theta))
            phases = (y, -1), (y_neg, 1)
            return sum(recovery.loss(f, y[None], s, t[None], SCHEDULE)[0][0] for y, s in phases)

        return jax.vmap(jax.grad(loss))(theta[:, t].T, y, y_neg, t)

    found = np.asarray(gradients(keys)).reshape(6, n, 2).swapaxes(0, 1)
    expected = (SCHEDULE.sigma[1] / SCHEDULE.sigma[1:] * S**2 * jax.grad(expected_nll)(theta)).T
    # Of f by its parameters h and P of F = f / tau: S² once, as the loss has f.
    assert_mean(found, np.asarray(expected), np.var(found, axis=0))
    if where is true:
        np.testing.assert_allclose(expected / np.std(found, axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("where", [off, true])
def test_the_denoising_loss_has_the_gradient_of_the_divergence(where):
    """grad E loss = w_t grad E KL(q(y | x_tilde) | N(x_tilde + sigma² grad F, sigma²)).

    All levels of T1k, the expectations exact: Gauss-Hermite sums, for the loss is a polynomial.
    The truth does not quite have the least divergence, since the conditional's mean is
    x_tilde + sigma² grad F / (1 + P sigma²): the gradient in P is there of order sigma⁴,
    P² sigma⁴ / (1 + P sigma²) Var x_tilde, and the gradient in h is 0. Fails with sigma 1%
    off, the weight left out, and the gradient of F taken at y.
    """
    with jax.enable_x64(True):
        many = diffusion.schedule(1000)
        t = jnp.arange(1000)
        data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
        moments = mean, mean_next, variance, variance_next, covariance = joint_moments(
            data, many
        )
        sigma2, theta = many.sigma[1:] ** 2, jnp.stack(where(moments))
        weight = many.sigma_bar[1:] ** 2 / sigma2

        def expected_divergence(theta):  # but for what theta does not change
            h, P = theta
            k = 1 - sigma2 * P
            bias = mean - k * mean_next - sigma2 * h
            square = bias**2 + variance - 2 * k * covariance + k**2 * variance_next
            return jnp.sum(square / (2 * sigma2))

        def expected_loss(theta):
            nodes, masses = np.polynomial.hermite_e.hermegauss(3)
            masses = masses / np.sqrt(2 * np.pi)
            slope = covariance / variance_next
            rest = jnp.sqrt(variance - slope * covariance)
            total = 0.0
            for z, mass in zip(nodes, masses, strict=True):
                x_tilde = mean_next + jnp.sqrt(variance_next) * z
                for e, share in zip(nodes, masses, strict=True):
                    y = mean + slope * (x_tilde - mean_next) + rest * e
                    F = quadratic_energy(*theta)
                    losses = recovery.denoising_loss(F, y[:, None], x_tilde[:, None], t, many)
                    total += mass * share * jnp.sum(losses)
            return total

        found = jax.grad(expected_loss)(theta)
        expected = weight * jax.grad(expected_divergence)(theta)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        if where is true:
            P = theta[1, :-1]
            left = P**2 * sigma2[:-1] ** 2 / (1 + P * sigma2[:-1]) * variance_next[:-1]
            np.testing.assert_allclose(found[1, :-1] / weight[:-1], left, rtol=1e-6)
            np.testing.assert_allclose(found[0, :-1] / weight[:-1], 0, atol=1e-10)


@pytest.mark.parametrize("draw", [recovery.positives, recovery.expected_positives])
def test_drawn_pairs_give_the_denoising_losss_gradient(draw):
    """In the mean; with y drawn or its mean given the data, by the energy F = 0 in h and P.

    There the gradient of the loss is w_t times that of -E (y - x_tilde) grad F(x_tilde).
    Fails with x_tilde drawn at level t, and with the mean of y not scaled by a.
    """
    many, n = diffusion.schedule(1000), 200_000
    levels = jnp.array([0, 300, 998, 999])
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    t = jnp.repeat(levels, n)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(len(t)))

    @jax.jit
    def gradients(keys):
        y, x_tilde = draw(noise.fold(keys, 1), data.sample(noise.fold(keys, 0)), t, many)

        def loss(theta, y, x_tilde, t):
            F = quadratic_energy(*theta)
            return recovery.denoising_loss(F, y[None], x_tilde[None], t[None], many)[0]

        return jax.vmap(jax.grad(loss))(jnp.zeros((len(t), 2)), y, x_tilde, t)

    found = np.asarray(gradients(keys)).reshape(len(levels), n, 2).swapaxes(0, 1)
    mean, mean_next, _, variance_next, covariance = joint_moments(data, many)
    in_h = mean_next - mean  # E (x_tilde - y)
    in_P = covariance + mean * mean_next - variance_next - mean_next**2
    weight = many.sigma_bar[1:] ** 2 / many.sigma[1:] ** 2
    expected = np.asarray(weight * jnp.stack([in_h, in_P])).T[levels]
    assert_mean(found, expected, np.var(found, axis=0))


def test_the_mean_of_y_given_the_data_is_noise_of_unit_variance_to_the_denoising_loss():
    """With it and F = 0 the loss is |eps_bar|² / 2D: what every level starts from."""
    many = diffusion.schedule(1000)
    n = 1000
    t = jnp.arange(n) % 999
    keys = jax.random.split(jax.random.key(8), n)
    x = jax.random.uniform(jax.random.key(9), (n, 64), minval=-1, maxval=1)
    y, x_tilde = recovery.expected_positives(keys, x, t, many)
    losses = recovery.denoising_loss(lambda x, t: 0 * x[:, 0], y, x_tilde, t, many)
    a_bar, sigma_bar = many.a_bar[t + 1, None], many.sigma_bar[t + 1, None]
    eps_bar = (x_tilde - a_bar * x) / sigma_bar
    np.testing.assert_allclose(losses, jnp.mean(eps_bar**2, axis=1) / 2, rtol=2e-3)


def test_displacement_is_euclidean():
    distance = recovery.displacement(jnp.full((2, 2, 2, 1), 3.0), jnp.zeros((2, 2, 2, 1)))
    np.testing.assert_allclose(distance, [6, 6], rtol=1e-6)
