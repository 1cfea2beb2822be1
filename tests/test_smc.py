"""Sequential Monte Carlo on mixtures of Gaussians, whose posteriors have closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact, statistical
from jax.tree_util import Partial
from scipy import stats

from drl_jax import diffusion, operators
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.sampling import smc

DATA = mixtures.mixture(
    np.array([0.3, 0.7]),
    np.array([[-0.6, 0.4], [0.7, -0.2]]),
    np.array([[[0.05, 0.02], [0.02, 0.04]], [[0.08, -0.03], [-0.03, 0.05]]]),
)
A = np.array([1.0, 0.5])  # what is observed of x is A x
STD = 0.2  # of the noise
P = 200  # problems


def log_likelihood(observed, std, x):
    z = (x @ jnp.asarray(A, x.dtype) - observed) / std
    return -(z**2) / 2 - jnp.log(std) - math.log(2 * math.pi) / 2


def likelihoods(observed, std=STD):
    return Partial(log_likelihood, jnp.float32(observed), jnp.full(len(observed), std))


def draw(schedule, n, seed=0):
    """Draws points of level 0, and observes each."""
    level_0 = mixtures.marginal(DATA, 0, schedule)
    x = np.asarray(level_0.sample(jax.random.split(jax.random.key(seed), n)))
    rng = np.random.default_rng(seed)
    return x, x @ A + STD * rng.normal(size=n)


class Exact:
    """The posterior of level 0 given each of several observations.

    Attributes:
      log_evidence: [P].
      responsibilities: of both components, [2, P].
      mean: [P, 2].
      covariance: [P, 2, 2].
    """

    def __init__(self, schedule, observed):
        data = mixtures.marginal(DATA, 0, schedule)
        m, w = np.asarray(data.means, np.float64), np.exp(np.float64(data.log_weights))
        C = np.einsum("kij,kj,klj->kil", data.axes, data.variances, data.axes)
        variance = np.einsum("i,kij,j->k", A, C, A) + STD**2
        error = observed - (m @ A)[:, None]
        joint = w[:, None] * stats.norm.pdf(error, scale=np.sqrt(variance)[:, None])
        self.log_evidence = np.log(joint.sum(0))
        self.responsibilities = joint / joint.sum(0)
        gain = C @ A / variance[:, None]
        means = m[:, None] + error[..., None] * gain[:, None]
        covariances = C - gain[:, :, None] * (C @ A)[:, None]
        self.mean = np.einsum("kp,kpi->pi", self.responsibilities, means)
        second = covariances[:, None] + means[..., :, None] * means[..., None, :]
        self.covariance = np.einsum("kp,kpij->pij", self.responsibilities, second)
        self.covariance -= self.mean[:, :, None] * self.mean[:, None, :]


@functools.cache
def solved(T, sampler="mala", **settings):
    """Returns the schedule, the observations and the particles of P problems."""
    model = exact.model(DATA, T)
    if sampler == "hmc":
        model = model.with_sampler("hmc", K=1, leapfrog=3)
    schedule = model.method.schedule
    _, observed = draw(schedule, P)
    result = model.smc(jax.random.key(1), likelihoods(observed), P, 128, STD, **settings)
    return schedule, observed, result


def deviations(schedule, observed, x):
    """Returns h(x) - E h, for x_1, x_2, their products and the first mode, [N, P, 6]."""
    wanted, data = Exact(schedule, observed), mixtures.marginal(DATA, 0, schedule)
    offsets = np.float64(x) - wanted.mean
    products = offsets[..., [0, 0, 1]] * offsets[..., [0, 1, 1]]
    products -= wanted.covariance[:, [0, 0, 1], [0, 1, 1]]
    of_first = jax.vmap(lambda x: jax.nn.softmax(data._log_joint(x), axis=1)[:, 0])(x)
    mode = np.float64(of_first) - wanted.responsibilities[0]
    return np.concatenate([offsets, products, mode[..., None]], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "sampler"), [(6, "mala"), (6, "hmc"), (1000, "mala")])
def test_mean_covariance_mode_weights_and_evidence_are_those_of_the_posterior(T, sampler):
    """Of P independent problems. The false-alarm rate is 10^-6, by Student's distribution.

    The mean over particles of w (h(x) - E h) / Z has the expectation 0 for any number of
    particles, but for what they share (step sizes and variances); that of w / Z is 1.
    """
    schedule, observed, result = solved(T, sampler)
    w = np.exp(np.float64(result.log_weights - Exact(schedule, observed).log_evidence))
    h = deviations(schedule, observed, result.x)
    errors = np.concatenate([w[..., None] - 1, w[..., None] * h], axis=-1).mean(axis=0)
    standard_error = errors.std(axis=0, ddof=1) / math.sqrt(P)
    z = errors.mean(axis=0) / standard_error
    assert np.all(np.abs(z) < stats.t.isf(statistical.RATE / (2 * len(z)), P - 1)), z
    assert standard_error[0] < 0.01
    assert np.all(standard_error[1:] < 0.0025)


@pytest.mark.slow
@pytest.mark.parametrize("T", [6, 100])
def test_the_mean_of_samples_without_weights_is_off_by_less_than_a_third_of_the_spread(T):
    """And by more than the sampling error explains, over P problems."""
    schedule, observed, result = solved(T, bridges=1, corrected=False)
    N = len(result.x)
    variance = np.diagonal(Exact(schedule, observed).covariance, axis1=1, axis2=2).mean(axis=0)
    means = deviations(schedule, observed, result.x)[..., :2].mean(axis=0)
    bias = np.mean(means**2, axis=0) - variance / N
    assert np.all(bias < variance / 9)
    assert np.all(bias > variance / 100)


def ranks(T, corrected, draws=15):
    """Returns the rank of the true x[0] among draws of the posterior, for 500 problems.

    Problem by problem, truth and observation are drawn from the model, so the rank is uniform
    in 0..draws if the posterior is exact (Talts et al. 2018).
    """
    model, n = exact.model(DATA, T), 500
    x, observed = draw(model.method.schedule, n, seed=2)
    settings = {"bridges": 16} if corrected else {"bridges": 1, "corrected": False}
    result = model.smc(jax.random.key(3), likelihoods(observed), n, 128, STD, **settings)
    rng = np.random.default_rng(4)
    w = np.float64(jax.nn.softmax(result.log_weights, axis=0))
    chosen = np.stack([rng.choice(128, draws, p=w_p / w_p.sum()) for w_p in w.T], axis=1)
    values = np.take_along_axis(result.x[..., 0], chosen, axis=0)
    return np.sum(values < x[:, 0], axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [True, False])
def test_the_posterior_is_calibrated_only_with_the_correction(corrected):
    """The false-alarm rate of the chi-square test is 10^-4."""
    counts = np.bincount(ranks(6, corrected), minlength=16)
    p_value = stats.chisquare(counts).pvalue
    assert (p_value > 1e-4) == corrected, (counts, p_value)


@pytest.mark.slow
@pytest.mark.parametrize("log_Z", [0.0, 5.0])
def test_the_evidence_does_not_depend_on_the_constants_of_the_energies(log_Z):
    """Within 5 standard errors; each is the spread of eight runs."""
    model = exact.model(DATA, 6, log_Z=log_Z)
    _, observed = draw(model.method.schedule, 1)
    likelihood = jax.tree.map(lambda leaf: leaf[0], likelihoods(observed))
    found, error = model.evidence(jax.random.key(0), likelihood, 256, width=STD)
    wanted = Exact(model.method.schedule, observed).log_evidence[0]
    assert error < 0.1
    assert abs(found - wanted) < 5 * max(error, 0.005)
    prior = model.smc(jax.random.key(0), likelihoods(observed), 1, 1024, STD, strength=0.0)
    assert smc.log_mean_weight(prior)[0] == pytest.approx(log_Z, abs=0.2)


def test_the_standard_error_of_the_evidence_is_the_spread_about_the_truth():
    """Of 2,000 sets of three runs, whose estimates of Z scatter about known values.

    The ratio of the mean squares has a standard error of 0.04. It doubles if the error of the
    model's log Z is left out, and becomes 1.5 if n replaces n - 1 in the variances.
    """
    rng, trials, runs, spread = np.random.default_rng(0), 2000, 3, 0.05
    log_Z, of_model = np.array([-3.0, 4.0]), 5.0  # of two problems

    def particles(truth):
        log_w = truth + spread * rng.normal(size=(1, len(truth))) - spread**2 / 2
        return smc.Posterior(*5 * [log_w])

    deviations, errors = [], []
    for _ in range(trials):
        posterior, prior = particles(np.tile(log_Z, runs)), particles(np.full(runs, of_model))
        found, error = smc.log_evidence(posterior, prior, len(log_Z))
        deviations.append(found - (log_Z - of_model))
        errors.append(error)
    ratio = np.mean(np.square(deviations)) / np.mean(np.square(errors))
    assert 0.8 < ratio < 1.2, ratio


@pytest.mark.slow
def test_a_product_of_models_is_sampled_exactly():
    """The product of two Gaussians is one; z-scores over 16 runs of 256 particles."""
    a, b = (
        exact.model(mixtures.gaussian(np.array(mean), np.diag(variance)), 6)
        for mean, variance in (([0.5, 0.0], [0.2, 0.3]), ([-0.3, 0.4], [0.1, 0.2]))
    )
    result = (a + b).smc(jax.random.key(0), lambda x: jnp.zeros(len(x)), 16, 256)
    level_0 = a.method.schedule
    variances, means = [], []
    for mean, variance in (([0.5, 0.0], [0.2, 0.3]), ([-0.3, 0.4], [0.1, 0.2])):
        variances.append(level_0.a_bar[0] ** 2 * np.array(variance) + level_0.sigma_bar[0] ** 2)
        means.append(level_0.a_bar[0] * np.array(mean))
    variance = 1 / (1 / variances[0] + 1 / variances[1])
    mean = variance * (means[0] / variances[0] + means[1] / variances[1])
    w = np.float64(jax.nn.softmax(result.log_weights, axis=0))
    found = np.einsum("np,npi->pi", w, result.x)
    squares = np.einsum("np,npi->pi", w, (result.x - mean) ** 2)
    for error in (found - mean, squares - variance):
        z = error.mean(axis=0) / error.std(axis=0, ddof=1) * 4
        assert np.all(np.abs(z) < 10)  # Student's t with 15 degrees of freedom: 10^-7
        assert np.all(np.abs(error.mean(axis=0)) < 0.05)


def test_the_likelihood_counts_fully_at_level_0_and_less_the_higher_the_level():
    schedule = diffusion.schedule(6)
    exponents = np.asarray(smc.tempering(schedule, 0.01, 1.0))
    assert exponents[0] == 1
    assert np.all(np.diff(exponents) < 0)
    # Normal data of variance 0.5: Var[x | x_t] = 0.5 sigma_bar² / (0.5 a_bar² + sigma_bar²).
    noise, signal = schedule.sigma_bar[2] ** 2, schedule.a_bar[2] ** 2 / 2
    found = smc.tempering(schedule, 0.3, 0.5)[2]
    assert found == pytest.approx(0.09 / (0.09 + 0.5 * noise / (signal + noise)))


def test_particles_are_drawn_in_proportion_to_their_weights():
    w = np.array([0.05, 0.5, 0.0, 0.25, 0.2])
    n = np.zeros(5)
    for u in np.linspace(0, 0.999, 200):
        counts = np.bincount(smc.ancestors(jnp.log(w), jnp.float32(u)), minlength=5)
        assert np.all(np.abs(counts - 5 * w) < 1)
        n += counts
    np.testing.assert_allclose(n / n.sum(), w, atol=2e-3)


def test_draws_are_in_proportion_to_the_weights_of_each_problem():
    x, w = np.arange(8.0).reshape(4, 2), np.array([[0.5, 0], [0.25, 0], [0.25, 0], [0, 1]])
    with np.errstate(divide="ignore"):
        posterior = smc.Posterior(x, np.log(w), x, x, x)
    drawn = smc.draws(posterior, 8, np.array([0.5, 0.5]))
    np.testing.assert_array_equal(np.sort(drawn[:, 0]), [0, 0, 0, 0, 2, 2, 4, 4])
    np.testing.assert_array_equal(drawn[:, 1], 7)


def test_the_effective_sample_size_counts_equal_weights():
    log_w = np.stack([np.full(8, 3.0), np.full(8, 900.0), np.full(8, -np.inf)], axis=1)
    log_w[3:, 1] = -np.inf
    np.testing.assert_allclose(smc.effective_sample_size(jnp.float32(log_w)), [8, 3, 0])
    w = np.random.default_rng(0).exponential(size=8)
    found = smc.effective_sample_size(jnp.log(jnp.float32(w)) - 1e4)
    assert found == pytest.approx(w.sum() ** 2 / np.sum(w**2), rel=1e-3)


def test_resampling_keeps_the_mean_weight_and_the_problems_of_many_effective_particles():
    rng = np.random.default_rng(0)
    log_w = jnp.float32(rng.normal(size=(32, 2)) * [3, 0.3])
    x, keys = jnp.arange(64).reshape(32, 2), jax.random.split(jax.random.key(0), 2)
    (moved, of_moved), after = smc._resample(keys, (x, log_w), log_w, smc.ALONE)
    np.testing.assert_array_equal(moved % 2, x % 2)  # each from its own problem
    np.testing.assert_array_equal(of_moved, np.ravel(log_w)[moved])
    np.testing.assert_array_equal(moved[:, 1], x[:, 1])
    np.testing.assert_array_equal(after[:, 1], log_w[:, 1])
    assert len(np.unique(moved[:, 0])) < 16
    np.testing.assert_allclose(np.exp(after[:, 0]), np.mean(np.exp(log_w[:, 0])), rtol=1e-5)


def test_a_problem_does_not_depend_on_the_others():
    model = exact.model(DATA, 6)
    observed = np.array([0.1, -0.4, 0.8])
    key = jax.random.key(0)
    together = model.smc(key, likelihoods(observed), 3, 128, STD)
    others = model.smc(key, likelihoods(observed + np.array([0, 1, 1])), 3, 128, STD)
    np.testing.assert_array_equal(together.x[:, 0], others.x[:, 0])
    assert np.all(together.x[:, 1] != others.x[:, 1])
    assert np.any(together.x[:, 0] != together.x[:, 1])


def test_other_values_need_no_new_compilation():
    model = exact.model(DATA, 6)
    for seed, std in enumerate((0.2, 0.5)):
        _, observed = draw(model.method.schedule, 2, seed)
        settings = {"width": std, "strength": 1.0 - seed, "bridges": 1 + seed}
        model.smc(jax.random.key(seed), likelihoods(observed, std), 2, 16, **settings)
    assert model.programs.smc._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_likelihoods": lambda x: x}, r"must return an array \[2\]"),
        ({"log_likelihoods": lambda x: (x[:, 0], x)}, r"must return an array \[2\]"),
        ({"width": 0.0}, "width is 0.0: give a finite number above 0"),
        ({"width": math.nan}, "width is nan"),
        ({"particles": 0}, "particles is 0"),
        ({"problems": 0}, "problems is 0"),
        ({"bridges": 0}, "bridges is 0"),
        ({"log_likelihoods": likelihoods([0.1])}, r"\(1,\): give one entry for each of 2"),
        (
            {"log_likelihoods": Partial(log_likelihood, 0.1, 0.2), "problems": 1},
            r"has the shape \(\): give one",
        ),
    ],
)
def test_bad_input_is_refused(arguments, message):
    given = {"log_likelihoods": lambda x: x[:, 0], "problems": 2, **arguments}
    with pytest.raises(UserError, match=message):
        exact.model(DATA, 6).smc(jax.random.key(0), **given)


def test_a_likelihood_that_is_not_a_number_names_the_image():
    observed = np.array([0.1, math.nan])
    with pytest.raises(UserError, match=r"of image 1 is not a number .* check its observation"):
        exact.model(DATA, 6).smc(jax.random.key(0), likelihoods(observed), 2, 16)


@pytest.mark.slow
def test_inpainting_and_the_operator_mask_agree():
    """The mean of the hidden one of two pixels, given the other, for one Gaussian.

    Inpainting fixes the known pixel; the operator observes it with noise of 0.05, which its
    closed form takes into account.
    """
    covariance = np.array([[0.25, 0.2], [0.2, 0.25]])
    data = mixtures.gaussian(np.zeros(2), covariance)
    model = exact.model(data, 6, shape=(1, 2, 1))
    known = np.array([[[True], [False]]])
    x = np.array([[[[0.4], [0.0]]]], np.float32)
    a, std = float(model.method.schedule.a_bar[0]), 0.05
    level_0 = a**2 * covariance + float(model.method.schedule.sigma_bar[0]) ** 2 * np.eye(2)
    likelihood = operators.likelihood(operators.mask(known), x[0], std)
    samples = model.posterior(jax.random.key(0), likelihood, 4000, 4096, width=std)
    wanted = level_0[0, 1] / (level_0[0, 0] + std**2) * 0.4
    assert samples[:, 0, 1, 0].mean() == pytest.approx(wanted, abs=0.02)
    assert samples[:, 0, 0, 0].std() == pytest.approx(std, rel=0.15)
    completed = model.with_sampler("mala", K=10).inpaint(jax.random.key(1), x, known, 4000)
    assert np.all(completed[0, :, 0, 0] == x[0, 0, 0])
    wanted = level_0[0, 1] / level_0[0, 0] * 0.4
    assert completed[0, :, 0, 1].mean() == pytest.approx(wanted, abs=0.02)
