import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from drl_jax import diffusion, noise
from drl_jax.data import mixtures
from drl_jax.mcmc import hmc, langevin, mala
from drl_jax.sampling import annealing, ladder
from drl_jax.sampling.ladder import Sampler


def two_modes():
    """Returns a mixture of two Gaussians of unequal width on the line."""
    data = mixtures.isotropic(np.array([[-0.6], [0.5]]), 0.1)
    return data._replace(variances=jnp.array([[0.01], [0.04]]))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 6, 1000])
def test_every_level_is_a_normalised_density_of_x(T):
    """Includes the two highest levels, where y is not scaled. Fails without D log a."""
    schedule, data = diffusion.schedule(T), two_modes()
    F = mixtures.exact_F(data, schedule)
    x = np.linspace(-7, 7, 28001)
    for t in np.unique(np.linspace(0, T, 12).astype(int)).tolist():
        log_q = annealing.level_log_density(
            F, jnp.asarray(x)[:, None], jnp.full(len(x), t), schedule
        )
        np.testing.assert_allclose(np.trapezoid(np.exp(log_q), x), 1, rtol=1e-5)
        if t < T:
            exact = mixtures.marginal(data, t, schedule).log_density(jnp.asarray(x)[:, None])
            np.testing.assert_allclose(log_q, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("T", [1, 2, 6, 501, 1000])
def test_distributions_are_evenly_spaced_from_white_noise_to_data(T):
    schedule = diffusion.schedule(T)
    level, beta = map(np.asarray, annealing.annealing_path(schedule, 200))
    assert (level[0], beta[0], level[-1], beta[-1]) == (T, 0, 0, 0)
    assert set(level) == set(range(T + 1))
    assert np.all(np.diff(level - beta) < 0)
    log_sigma_bar = np.log(np.float64(schedule.sigma_bar))
    steps = -np.diff(np.interp(level - beta, np.arange(T + 1), log_sigma_bar))
    total = log_sigma_bar[-1] - log_sigma_bar[0]
    assert np.max(steps) <= 1.5 * total / 200  # each level has a whole number of steps
    assert len(level) - 1 + T / 2 >= 200
    assert len(level) - 1 <= 200 + T


def test_intermediate_density_is_the_geometric_mean_of_two_levels():
    schedule = diffusion.schedule(6)
    F = mixtures.exact_F(two_modes(), schedule)
    x = jax.random.normal(jax.random.key(0), (5, 1))

    def level(t):
        return annealing.level_log_density(F, x, jnp.full(5, t), schedule)

    for t, beta in ((6, 0.0), (6, 0.3), (3, 0.9), (1, 0.5), (0, 0.0)):
        found = annealing.intermediate_log_density(
            F, x, jnp.int32(t), jnp.float32(beta), schedule
        )
        expected = (1 - beta) * level(t) + beta * level(max(t - 1, 0))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_warm_up_starts_at_step_sizes_sigma_bar_on_the_density_of_every_level():
    """Uses a kernel that does not move, and returns the log-density as its acceptance."""
    schedule, data = diffusion.schedule(6), two_modes()

    def kernel(keys, state, log_density_fn, step_size):
        return state, SimpleNamespace(acceptance=log_density_fn(state.position))

    keys = noise.example_keys(jax.random.key(0), jnp.arange(10))
    sampler = Sampler(langevin.init, kernel, {"step_size": jnp.ones(6)}, K=1)
    F = mixtures.exact_F(data, schedule)
    step_size, log_density = annealing.warm_up(
        keys, F, (1,), schedule, sampler, num_steps=1, target=0.7
    )
    np.testing.assert_allclose(step_size, schedule.sigma_bar[:6], rtol=1e-6)
    x = ladder.white_noise(keys, (1,), schedule)
    exact = [np.mean(mixtures.marginal(data, t, schedule).log_density(x)) for t in range(6)]
    np.testing.assert_allclose(log_density, exact, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "tuning"),
    [(mala.kernel, {}), (hmc.kernel, {"leapfrog": jnp.full(6, 3)})],
    ids=["mala", "hmc"],
)
def test_warm_up_finds_step_sizes_proportional_to_the_widths_of_gaussian_marginals(
    kernel, tuning
):
    """In units of its width every level is white noise, so the step sizes are equal there.

    Chains on white noise with these step sizes, which adapt nothing, reach the target too.
    """
    schedule, std = diffusion.schedule(6), 0.5
    F = mixtures.exact_F(mixtures.isotropic(np.full((1, 8), 0.4), std), schedule)
    sampler = Sampler(hmc.init, kernel, {"step_size": jnp.ones(6)} | tuning, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(600))
    step_size, acceptance = jax.jit(
        lambda keys: annealing.warm_up(
            keys, F, (8,), schedule, sampler, num_steps=200, target=0.7
        )
    )(keys)
    np.testing.assert_allclose(acceptance, 0.7, atol=0.05)
    widths = jnp.sqrt((schedule.a_bar * std) ** 2 + schedule.sigma_bar**2)
    relative = step_size / widths[:6]
    np.testing.assert_allclose(relative, jnp.mean(relative), rtol=0.05)
    _, acceptance = ladder.run_chain(
        keys,
        sampler._replace(tuning=tuning | {"step_size": relative}),
        lambda x: -jnp.sum(x**2, axis=1) / 2,
        position=jax.random.normal(jax.random.key(1), (600, 8)),
        t=jnp.arange(600) % 6,
        steps=jnp.arange(40),
    )
    np.testing.assert_allclose(acceptance.reshape(100, 6).mean(axis=0), 0.7, atol=0.06)


@pytest.mark.parametrize("std", [1.0, 10.0])
def test_tempered_distributions_lead_from_a_gaussian_to_level_0(std):
    """A level 0 as narrow as its noise becomes narrower by equal factors, as stated."""
    schedule = diffusion.schedule(6)
    sigma = float(schedule.sigma_bar[0])
    beta, width = map(np.float64, annealing.tempering(80, std, schedule))
    assert (beta[0], beta[-1], len(beta)) == (0, 1, 81)
    np.testing.assert_allclose(width[[0, -1]], [std, sigma], rtol=1e-5)
    np.testing.assert_allclose(np.diff(np.log(width)), np.log(sigma / std) / 80, rtol=1e-3)
    precision = (1 - beta) / std**2 + beta / sigma**2
    np.testing.assert_allclose(precision, 1 / width**2, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.4, 1.0])
def test_a_tempered_density_is_a_geometric_mean_of_level_0_and_the_normalised_gaussian(beta):
    schedule = diffusion.schedule(6)
    F = mixtures.exact_F(two_modes(), schedule)
    x = 3 * jax.random.normal(jax.random.key(0), (5, 1))
    level_0 = annealing.level_log_density(F, x, jnp.zeros(5, int), schedule)
    found = annealing.tempered_log_density(F, x, jnp.float32(beta), 10.0, schedule)
    gaussian = stats.norm.logpdf(np.float64(x)[:, 0], 0, 10)
    np.testing.assert_allclose(found, (1 - beta) * gaussian + beta * level_0, rtol=1e-5)


@pytest.mark.slow
def test_the_tempered_warm_up_finds_step_sizes_proportional_to_the_widths():
    """On white noise with these step sizes in units of the width, the target is reached too."""
    schedule, std, wide = diffusion.schedule(6), 0.5, 10.0
    F = mixtures.exact_F(mixtures.isotropic(np.zeros((1, 8)), std), schedule)
    tempering = annealing.tempering(11, wide, schedule)
    sampler = Sampler(hmc.init, hmc.kernel, {"leapfrog": jnp.ones(12, int)}, K=1)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(600))
    step_size, acceptance = jax.jit(
        lambda keys: annealing.warm_up_tempered(
            keys, F, (8,), tempering, schedule, sampler, num_steps=200, target=0.7
        )
    )(keys)
    np.testing.assert_allclose(acceptance, 0.7, atol=0.05)
    beta = np.float64(tempering.beta)
    level_0 = float(schedule.a_bar[0] * std) ** 2 + float(schedule.sigma_bar[0]) ** 2
    widths = ((1 - beta) / wide**2 + beta / level_0) ** -0.5
    relative = step_size / widths
    np.testing.assert_allclose(relative, np.mean(relative), rtol=0.06)


def test_a_move_records_the_log_density_before_it_and_the_log_weight():
    """Distribution i has log q = -(i + 1) x². Fails if either is that of the other one."""
    x = jnp.arange(1.0, 5.0)[:, None]
    tuning = {"step_size": jnp.full(4, 0.1), "leapfrog": jnp.ones(4, int)}
    found = annealing.anneal(
        noise.example_keys(jax.random.key(0), jnp.arange(4)),
        log_q=lambda x, i: -(i + 1) * x[:, 0] ** 2,
        x=x,
        move=jnp.arange(1),
        start=jnp.array([1]),
        end=jnp.array([3]),
        sampler=Sampler(hmc.init, hmc.kernel, tuning, K=1),
    )
    np.testing.assert_allclose(found.log_density, -2 * x**2)
    np.testing.assert_allclose(found.log_weights, -2 * x**2)


def same(n):
    """Returns log-weights and log-densities of n chains of each pass that all agree."""
    log_w = 0.1 * np.random.default_rng(0).standard_normal((6, n))
    return dict(zip(annealing.PASSES, log_w[:4], strict=True)) | {
        "log_density": (log_w[4], log_w[5])
    }


def test_partitions_of_passes_that_agree_are_not_rejected():
    found = annealing.partition(**same(256))
    assert found.agreement.rejected == []
    assert found.lower in (found.levels, found.tempered)
    assert found.upper.log_Z == max(found.from_data.log_Z, found.from_model.log_Z)
    assert found.gap == found.upper.log_Z - found.lower.log_Z


@pytest.mark.parametrize(("std_error", "used"), [(0.08, "levels"), (0.01, "tempered")])
def test_the_lower_bound_is_not_the_larger_number_if_its_error_explains_it(std_error, used):
    """It is compared after two standard errors less. Fails without them."""
    exact = annealing.bound(np.zeros(4))
    found = annealing.partition(**same(256))._replace(
        levels=exact._replace(log_Z=6.2, std_error=0.01),
        tempered=exact._replace(log_Z=6.25, std_error=std_error),
    )
    assert found.lower == getattr(found, used)
    assert math.isnan(found._replace(levels=exact._replace(log_Z=math.nan)).lower.log_Z)


@pytest.mark.parametrize("name", ["levels", "tempered", "from_data", "from_model"])
def test_one_pass_in_the_wrong_order_is_rejected(name):
    """Shifts each by half the stated limit and by 1.5 times it: only the latter is rejected.

    Fails if one of the passes is left out of the comparisons, or compared with wrong sign.
    """
    passes = same(256)
    partition = annealing.partition(**passes)
    error = np.hypot(0.1, 0.1) / np.sqrt(256)
    limit = stats.norm.isf(annealing.SIGNIFICANCE / 4) * error + annealing.ROUNDING
    assert partition.detectable == pytest.approx(limit, abs=0.03)
    for factor in (0.5, 1.5):
        # A larger w raises a lower bound, and lowers an upper one.
        shifted = passes | {name: passes[name] + factor * limit}
        found = annealing.partition(**shifted).agreement
        assert (found.order < annealing.SIGNIFICANCE) == (factor > 1)


def test_the_p_value_of_the_order_is_corrected_for_four_comparisons():
    """Only the bound `tempered` is too large, and both upper bounds have no error."""
    rng = np.random.default_rng(0)
    passes = same(256) | {"from_data": np.zeros(256), "from_model": np.zeros(256)}
    for shift in (0.02, 0.03, 0.04):
        passes["tempered"] = shift + 0.1 * rng.standard_normal(256)
        found = annealing.partition(**passes)
        z = (found.tempered.log_Z - annealing.ROUNDING) / found.tempered.std_error
        assert found.agreement.order == pytest.approx(min(1, 4 * stats.norm.sf(z)))
    assert found.agreement.order < 0.01


@pytest.mark.parametrize("test", ["log_density", "log_weight"])
def test_starting_points_with_other_densities_or_weights_are_rejected(test):
    passes, rng = same(256), np.random.default_rng(1)
    wider = 0.4 * rng.standard_normal(256)
    if test == "log_density":
        passes["log_density"] = passes["log_density"][0], wider
    else:
        passes["from_model"] = wider - 0.07  # the same log mean w
    assert annealing.partition(**passes).agreement.rejected == [test]


def test_a_pass_without_numbers_makes_the_gap_nan_and_the_order_rejected():
    for name in annealing.PASSES:
        passes = same(16)
        passes[name] = np.full(16, np.nan)
        found = annealing.partition(**passes)
        assert np.isnan(found.gap)
        assert "order" in found.agreement.rejected


def test_bounds_contradict_each_other_by_the_exponential_of_their_difference():
    """As Markov's inequality says. Fails if the bounds are exchanged."""
    high, low = (annealing.bound(np.full(4, log_Z)) for log_Z in (10.0, 3.0))
    assert annealing.contradiction(high, low) == pytest.approx(math.exp(-7))
    assert annealing.contradiction(low, high) == 1


def test_weights_of_any_spread_contradict_exact_starts_no_more_often_than_stated():
    """log w is normal with E[w] = 1, and so spread out that one chain has all the weight.

    In 4,000 repetitions, p-values below 0.05 occur at most as often as by chance (0.03
    standard errors of 0.0034 above 0.05 are about nine).
    """
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 5.0):
        log_w = spread * rng.standard_normal((4000, 2, 8)) - spread**2 / 2
        bounds = [[annealing.bound(row) for row in pair] for pair in log_w]
        p = [annealing.contradiction(down, up._replace(log_Z=-up.log_Z)) for down, up in bounds]
        assert np.mean(np.array(p) < 0.05) < 0.05 + 0.03


@pytest.mark.slow
def test_exact_starts_are_rejected_no_more_often_than_stated(monkeypatch):
    """At a false-alarm rate of 5%, from normal log-weights with log mean w of zero.

    A rate of 5% gives more than 130 alarms in 2000 with probability 0.001.
    """
    number = len(annealing.Agreement._fields)
    assert annealing.SIGNIFICANCE * number == pytest.approx(annealing.FALSE_ALARM)
    monkeypatch.setattr(annealing, "SIGNIFICANCE", 0.05 / number)
    rng, n, alarms = np.random.default_rng(0), 64, 0
    for i in range(2000):
        s = (0.1, 0.5, 2.0)[i % 3]
        log_w = s * rng.standard_normal((4, n)) - s**2 / 2
        names = annealing.PASSES
        found = annealing.partition(
            **dict(zip(names, log_w, strict=True)), log_density=(log_w[2], log_w[3])
        )
        alarms += bool(found.agreement.rejected)
    assert 0 < alarms <= 130


def test_resampling_gives_every_index_the_expected_number_of_copies():
    weights = np.array([0.5, 0.0, 0.1, 0.4])
    with np.errstate(divide="ignore"):
        log_w = np.log(weights) + 2000
    counts = np.array(
        [
            np.bincount(annealing.resample(log_w, 6, u), minlength=4)
            for u in np.linspace(0, 1, 1000, endpoint=False) + 5e-4
        ]
    )
    expected = 6 * weights
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=5e-3)
    assert np.all(np.abs(counts - expected) < 1)
    unusable = np.array([np.nan, 0.0, -np.inf, np.inf])
    assert set(annealing.resample(unusable, 5, 0.99)) == {1}


def test_a_bound_has_the_standard_error_and_effective_sample_size_of_its_weights():
    rng = np.random.default_rng(0)
    n, s = 400, 0.7
    bounds = [annealing.bound(s * rng.standard_normal(n)) for _ in range(4000)]
    estimates, errors, sizes = np.array(
        [(b.log_Z, b.std_error, b.effective_sample_size) for b in bounds]
    ).T
    np.testing.assert_allclose(np.std(estimates), np.median(errors), rtol=0.06)
    np.testing.assert_allclose(np.median(sizes), n * np.exp(-(s**2)), rtol=0.03)
    np.testing.assert_allclose(np.mean([b.spread for b in bounds]), s, rtol=0.01)
    equal = annealing.bound(np.full(50, -3.0))
    assert (equal.log_Z, equal.std_error) == (-3.0, 0.0)
    assert equal.effective_sample_size == pytest.approx(50)
    dominated = annealing.bound(np.append(np.zeros(49), 1000.0))
    assert dominated.effective_sample_size == 1
    assert not dominated.reliable
    assert dominated.log_Z == pytest.approx(1000 - np.log(50))


@pytest.mark.parametrize(("chains", "least"), [(256, 10), (20, 10), (8, 4)])
def test_a_bound_is_reliable_if_ten_chains_or_half_of_them_contribute(chains, least):
    bound = annealing.bound(np.zeros(chains))
    assert bound.reliable
    assert bound._replace(effective_sample_size=least + 0.1).reliable
    assert not bound._replace(effective_sample_size=least - 0.1).reliable


@pytest.mark.slow
@pytest.mark.parametrize("values", [2, 17, 256])
@pytest.mark.parametrize("dequantised", [False, True])
def test_the_bound_of_a_uniform_pixel_is_its_probability(values, dequantised):
    """If p(x_0) is the density of uniform pixels with the noise, the bound is tight: -log V.

    The density is computed with SciPy in float64.
    """
    schedule = diffusion.schedule(6)
    n = 2000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    v = np.linspace(-1, 1, values)
    x = v[np.arange(n) % values][:, None]
    width = 2 / (values - 1) if dequantised else 0.0
    _, x_0 = annealing.noisy_log_density(
        keys, lambda y, t: jnp.zeros(len(y)), jnp.asarray(x, jnp.float32), width, schedule
    )
    a, sigma = float(schedule.a_bar[0]), float(schedule.sigma_bar[0])
    distances = np.float64(x_0) - a * v
    if dequantised:
        ends = (
            stats.norm.cdf((distances + a * width / 2) / sigma),
            stats.norm.cdf((distances - a * width / 2) / sigma),
        )
        densities = (ends[0] - ends[1]) / (a * width)
    else:
        densities = stats.norm.pdf(distances / sigma) / sigma
    log_p = np.log(np.mean(densities, axis=1))
    bounds = log_p + annealing.log_volume(x_0, values, dequantised, schedule)
    np.testing.assert_allclose(bounds, -np.log(values), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dequantised", [False, True])
def test_the_bounds_of_all_values_of_a_pixel_add_up_to_at_most_one(dequantised):
    """With dequantisation noise, and a smooth density like this normal one, almost to one."""
    values, schedule = 17, diffusion.schedule(6)
    v = np.repeat(np.linspace(-1, 1, values), 20_000)[:, None]
    keys = noise.example_keys(jax.random.key(0), jnp.arange(len(v)))
    width = 2 / (values - 1) if dequantised else 0.0
    x = jnp.asarray(v, jnp.float32)
    _, x_0 = annealing.noisy_log_density(
        keys, lambda y, t: jnp.zeros(len(y)), x, width, schedule
    )
    log_p = stats.norm.logpdf(np.float64(x_0)[:, 0], 0.1, 0.4)
    log_P = log_p + annealing.log_volume(x_0, values, dequantised, schedule)
    total = np.exp(log_P.reshape(values, -1).mean(axis=1)).sum()
    assert total < 1 + 1e-3
    # Without it, the pixels' noise is narrow, and the density between them is wasted.
    assert total > (0.9 if dequantised else 0.15)
