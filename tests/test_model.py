import dataclasses
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact, tiny
from helpers.statistical import assert_covariance, assert_mean, assert_variance

import drl_jax
from drl_jax import config as config_lib
from drl_jax import method as method_lib
from drl_jax import model as model_lib
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin
from drl_jax.model import Model
from drl_jax.runtime import sharding
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Adapted, Sampler

PACKAGE = str(Path(drl_jax.__file__).parent)


@pytest.fixture(scope="module")
def model():
    """A model with the exact energies of white noise, on T6 and images of 2x2 pixels."""
    return exact.model(mixtures.gaussian(np.zeros(4), np.eye(4)), 6, shape=(2, 2, 1))


def with_kernel(model, kernel, **tuning):
    """Returns a newly compiled model with another kernel."""
    tuning = {"step_size": jnp.full(6, 0.5)} | tuning
    init = hmc.init if kernel is hmc.kernel else langevin.init
    sampler = Sampler(init, kernel, tuning, K=2)
    method = model.method._replace(sampler=sampler)
    return Model.create(method, model.params, model.mesh)


@pytest.mark.slow
def test_chains_on_the_marginals_forget_their_starts_and_have_the_exact_moments():
    """Levels 0 and 4; all chains start from one point, 6 standard deviations away.

    Fails if `marginals` keeps sigma, and if it keeps the start from the posterior.
    """
    data = mixtures.gaussian(np.array([0.4]), np.array([[0.25]]))
    mala = exact.model(data, 6).with_sampler("mala", K=1).method
    sampler = mala.sampler._replace(start=ladder.start_from_posterior)
    model = Model.create(mala._replace(sampler=sampler), {}, sharding.make_mesh())
    model, adapted = model.marginals().adapt(jax.random.key(0))
    assert np.all((adapted.acceptance > 0.5) & (adapted.acceptance < 0.8))
    n, levels = 2000, (0, 4)
    for t in levels:
        exact_level = mixtures.energy_marginal(data, t, model.method.schedule)
        mean, variance = exact_level.means[0, 0], exact_level.variances[0, 0]
        start = np.full((n, 1), mean + 6 * np.sqrt(variance))
        _, end = model.long_run(jax.random.key(1), start, np.full(n, t), 200, points=0)
        y = end.x * np.asarray(model.method.schedule.y_scale(np.array(t)))
        assert_mean(y, mean, variance, of=len(levels))
        assert_variance(y, mean, variance, of=len(levels))


def test_a_sampling_request_goes_through_at_most_five_calls(model):
    """Counts the functions called between `Model.sample` and the kernel.

    A function defined inside another one counts as part of it.
    """
    calls = []

    def kernel(keys, state, log_density_fn, **tuning):
        frames = [frame.frame.f_code for frame in inspect.stack()]
        names = [code.co_qualname for code in frames if code.co_filename.startswith(PACKAGE)]
        calls.append(names[: names.index("Model.sample")])
        return langevin.kernel(keys, state, log_density_fn, **tuning)

    with_kernel(model, kernel).sample(jax.random.key(0), 1)
    assert calls
    for names in calls:
        between = [name for name in names if "<locals>" not in name]
        assert 0 < len(between) <= 5, between


def test_models_are_immutable(model):
    for field in dataclasses.fields(Model):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(model, field.name, None)


@pytest.mark.slow
def test_adapt_returns_a_new_model_and_does_not_change_the_old_one(model):
    leapfrog = jnp.full(6, 3)
    old = with_kernel(model, hmc.kernel, leapfrog=leapfrog)
    before = old.step_size.copy()
    adapted, warm_up = old.adapt(jax.random.key(0), num_steps=60, target=0.9)
    np.testing.assert_array_equal(old.step_size, before)
    assert np.abs(adapted.step_size - before).min() > 0.01
    np.testing.assert_array_equal(adapted.step_size, warm_up.step_size)
    np.testing.assert_allclose(warm_up.acceptance, 0.9, atol=0.1)
    assert np.max(np.abs(warm_up.correlation)) < 0.6
    np.testing.assert_array_equal(adapted.method.sampler.tuning["leapfrog"], leapfrog)


@pytest.mark.parametrize(
    ("correlation", "warning"),
    [
        ([0.5, -0.5, 0.1, 0.0, 0.2, 0.3], None),
        ([0.5, -0.7, 0.1, 0.0, 0.6, 0.3], "K = 1 is .* -0.70 .* level 1, .*increase K"),
    ],
)
def test_a_warm_up_warns_if_chains_of_K_steps_do_not_forget_their_start(
    model, correlation, warning, monkeypatch, caplog
):
    found = Adapted(jnp.ones(6), jnp.full(6, 0.7), jnp.array(correlation))
    monkeypatch.setattr(ladder, "warm_up", lambda *_: found)
    model.adapt(jax.random.key(0))
    assert len(caplog.messages) == (warning is not None)
    assert all(re.fullmatch(warning, message) for message in caplog.messages)


@pytest.mark.parametrize(
    ("name", "settings", "given"),
    [
        ("langevin", {"noise_scale": 0.9}, {"noise_scale": 0.9}),
        ("mala", {"target_acceptance": 0.8}, {"target": 0.8}),
        ("hmc", {"leapfrog": (3,)}, {"leapfrog": 3}),
    ],
)
def test_a_model_with_another_sampler_is_the_one_of_that_configuration(
    model, name, settings, given, monkeypatch
):
    """Other settings stay those of the model. Fails if one is lost, or nothing is adapted."""
    adaptations = []

    def adapt(model, key, num_steps, target):
        adaptations.append((key, num_steps, target))
        return model.with_step_size(2 * model.step_size), None

    monkeypatch.setattr(Model, "adapt", adapt)
    config = config_lib.default()
    config.mcmc.update(b_squared=1e-3, warmup_steps=20)
    trained_method = method_lib.with_sampler(model.method, b_squared=1e-3, warmup_steps=20)
    trained = dataclasses.replace(model, method=trained_method)
    config.mcmc.update(sampler=name, K=3, **settings)
    expected = method_lib.for_generation(model.method, config).sampler
    found = trained.with_sampler(name, K=3, **given)
    sampler, tuning = found.method.sampler, dict(expected.tuning)
    if name == "langevin":
        assert adaptations == []
        assert np.isfinite(found.sample(jax.random.key(1), 2)).all()
    else:
        tuning["step_size"] *= 2
        target = settings.get("target_acceptance", config.mcmc.target_acceptance)
        assert adaptations == [(jax.random.key(0), 20, target)]
    assert (sampler.kernel, sampler.K) == (expected.kernel, 3)
    jax.tree.map(np.testing.assert_array_equal, sampler.tuning, tuning)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nuts", {}, "sampler is 'nuts': use 'langevin' or 'mala'"),
        ("mala", {"K": 0}, "K is 0: "),
        ("mala", {"noise_scale": 0.9}, "noise_scale is 0.9: "),
        ("hmc", {"leapfrog": (1, 2)}, r"leapfrog is \(1, 2\): .* 6 "),
        ("hmc", {"leapfrog": 0}, r"leapfrog is \(0,\): "),
        ("hmc", {"target": 1.0}, "target_acceptance is 1.0: "),
    ],
)
def test_samplers_and_settings_that_do_not_exist_are_errors_of_one_line(
    model, name, settings, words
):
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        model.with_sampler(name, **settings)


def test_other_step_sizes_and_parameters_compile_nothing(model):
    key = jax.random.key(0)
    x = model.sample(key, 8)
    count = model.programs.generate._cache_size()
    other = model.with_step_size(model.step_size / 2)
    assert np.abs(other.sample(key, 8) - x).max() > 1e-3
    np.testing.assert_array_equal(model.with_params(model.params).sample(key, 8), x)
    assert model.programs.generate._cache_size() == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "mcmc"),
    [
        (6, {"sampler": "langevin", "K": 4, "b_squared": 2e-2}),
        (1000, {"start": "posterior", "K": 0}),
    ],
    ids=["langevin", "posterior"],
)
def test_generation_multiplies_all_noise_by_the_configured_noise_scale(T, mcmc):
    """On Gaussian data a sample is an affine function of the noise of its chains.

    Fails if the noise scale is ignored.
    """
    config = config_lib.default()
    config.mcmc.update(mcmc)
    config.diffusion.T = T
    exact_model = exact.model(mixtures.gaussian(np.zeros(2), np.eye(2)), T)
    x = {}
    for scale in (0.0, 0.3, 1.0):
        config.mcmc.noise_scale = scale
        sampler = method_lib.for_generation(exact_model.method, config).sampler
        method = exact_model.method._replace(sampler=sampler)
        x[scale] = Model.create(method, {}, exact_model.mesh).sample(jax.random.key(0), 8)
    assert np.abs(x[1.0] - x[0.0]).mean() > 0.1
    np.testing.assert_allclose(x[0.3], 0.7 * x[0.0] + 0.3 * x[1.0], atol=1e-4)


@pytest.mark.slow
def test_after_training_f_is_computed_in_the_dtype_of_evaluation():
    config = config_lib.load(str(tiny.DIGITS))
    config.energy.ch, config.energy.mult = 4, (1,)
    x, t = jax.random.normal(jax.random.key(0), (6, 8, 8, 1)), jnp.arange(6)

    def f(training, evaluation):
        config.energy.dtype, config.evaluation.dtype = training, evaluation
        trained = method_lib.from_config(config)
        params, _ = trained.energy.normalise(*trained.energy.init(jax.random.key(1)))
        params = jax.tree.map(lambda a: a + 0.1, params)
        energies = trained.energy, method_lib.for_generation(trained, config).energy
        return [np.asarray(jax.jit(energy.f)(params, x, t)) for energy in energies]

    exact, exact_again = f("float32", "float32")
    rounded, exact_later = f("bfloat16", "float32")
    np.testing.assert_array_equal(exact_again, exact)
    np.testing.assert_array_equal(exact_later, exact)
    assert not np.array_equal(rounded, exact)
    np.testing.assert_array_equal(f("float32", "bfloat16")[1], rounded)


@pytest.mark.parametrize("parameterisation", ["bounded_gaussians", "uniform", "step"])
def test_with_fewer_levels_the_energies_are_those_of_the_same_noise(parameterisation):
    """Log-densities of x, of all levels of the new ladder, up to a constant per level."""
    config = config_lib.load("digits")
    config.diffusion.T, config.energy.ch, config.energy.N = 12, 8, 1
    config.energy.components = 1
    config.energy.parameterisation = parameterisation
    full = method_lib.from_config(config)
    params, _ = full.energy.normalise(*full.energy.init(jax.random.key(0)))
    params = jax.tree.map(lambda a: a + 0.05, params)
    config.mcmc.levels = 4
    thinned = method_lib.for_generation(full, config)
    assert thinned.schedule.T == 4
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

    def differences(method, levels):
        """Returns how much more probable the first image is than the second."""
        y_scale = method.schedule.y_scale(levels)[:, None, None, None]
        F = method.F(params)
        return F(y_scale * x[0], levels) - F(y_scale * x[1], levels)

    found = differences(thinned, jnp.arange(4))
    np.testing.assert_allclose(found, differences(full, 3 * jnp.arange(4)), rtol=1e-4)
    assert len(np.unique(found)) == 4


@pytest.mark.slow
def test_samples_that_pass_through_fewer_levels_have_the_moments_of_the_data():
    """Gaussian data, 1,000 levels of which 100 are used: starts from the posterior, and MALA.

    The normal approximation is exact here, but for its variance, which MALA corrects.
    """
    covariance = np.array([[0.5, 0.3], [0.3, 0.4]])
    full = exact.model(mixtures.gaussian(np.array([0.3, -0.2]), covariance), 1000)
    method = method_lib.with_sampler(full.method, start="posterior", K=1, levels=100)
    assert method.schedule.T == 100
    x = Model.create(method, {}, full.mesh).with_sampler("mala").sample(jax.random.key(0), 4096)
    level_0 = full.method.schedule.a_bar[0] ** 2 * covariance
    level_0 += float(full.method.schedule.sigma_bar[0]) ** 2 * np.eye(2)
    mean = float(full.method.schedule.a_bar[0]) * np.array([0.3, -0.2])
    assert_mean(x, mean, np.diagonal(level_0), of=3)
    assert_variance(x, mean, np.diagonal(level_0), of=3)
    assert_covariance(
        x[:, 0] - mean[0], x[:, 1] - mean[1], level_0[0, 1], level_0[0, 0], level_0[1, 1], of=3
    )


def test_numbers_of_levels_that_a_model_cannot_have_are_errors():
    model = exact.model(mixtures.gaussian(np.zeros(2), np.eye(2)), 6)
    with pytest.raises(UserError, match=r"mcmc\.levels is 7: the model has 6 levels"):
        model.with_sampler("langevin", levels=7)
    config = config_lib.default()
    config.mcmc.levels, config.mcmc.start = 3, "initialiser"
    with pytest.raises(UserError, match=r"mcmc\.levels is 3: the initialiser predicts"):
        config_lib.validate(config)


def test_samples_do_not_depend_on_the_batches_in_which_they_are_drawn(model):
    key = jax.random.key(3)
    small = Model.create(model.method, model.params, model.mesh, batch_size=8)
    batches = list(small.sample_batches(key, 19))
    assert max(map(len, batches)) == small.engine.batch_size
    np.testing.assert_array_equal(np.concatenate(batches), small.sample(key, 19))


def test_descending_in_two_calls_gives_the_same_samples_as_in_one(model):
    key = jax.random.key(1)
    x_T = np.random.default_rng(0).normal(size=(5, 2, 2, 1))
    halfway = model.descend(key, x_T, top=6, bottom=3)
    np.testing.assert_allclose(
        model.descend(key, halfway, top=3, bottom=0),
        model.descend(key, x_T, top=6, bottom=0),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("top", "bottom"), [(7, 0), (3, -1), (2, 3)])
def test_levels_that_do_not_descend_from_T_to_0_are_errors(model, top, bottom):
    with pytest.raises(UserError, match=f"{top}.* {bottom}.* 6 "):
        model.descend(jax.random.key(0), np.zeros((1, 2, 2, 1)), top, bottom)


def test_the_log_density_of_exact_energies_is_that_of_the_data(model):
    x = np.random.default_rng(0).normal(size=(7, 2, 2, 1)).astype(np.float32)
    t = np.full(7, 5)
    exact_log_density = -(np.square(x).sum(axis=(1, 2, 3)) + 4 * np.log(2 * np.pi)) / 2
    np.testing.assert_allclose(model.log_density(x, t), exact_log_density, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        (np.zeros((2, 2, 3, 1)), [0, 0], "2x2x3x1: give nx2x2x1"),
        (np.zeros((2, 2, 1)), [0, 0], "2x2x1: give nx2x2x1"),
        (np.zeros((2, 2, 2, 1)), [0, 6], "level 6 .* 0 to 5"),
        (np.zeros((2, 2, 2, 1)), [-1, 0], "level -1 .* 0 to 5"),
    ],
)
def test_examples_and_levels_that_do_not_fit_are_errors(model, x, t, words):
    """A wrong level would otherwise silently select the parameters of another one.

    Fails if the check is left out where other values are traced.
    """
    x, t = np.asarray(x, np.float32), np.asarray(t)
    for function in model.f, model.log_density:
        with pytest.raises(UserError, match=words):
            function(x, t)
        with pytest.raises(UserError, match=words):
            jax.jit(lambda x, function=function: function(x, t))(x)
        with pytest.raises(UserError, match=words):
            jax.grad(lambda x, function=function: function(x, jnp.array(t)).sum())(x)


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        (np.zeros((2, 2, 2, 1)), 0, "give one per example, 2"),
        (np.zeros((2, 2, 2, 1)), [0], "give one per example, 2"),
        (np.zeros((2, 2, 2, 1)), [0, 0, 0], "give one per example, 2"),
        (np.zeros((2, 2, 2, 1)), [0.0, 1.0], "levels are of dtype float64: give integers"),
        (np.zeros((2, 2, 2, 1), np.uint8), [0, 0], r"dtype uint8: .* by x / 127.5 - 1"),
        (np.zeros((2, 2, 2, 1), int), [0, 0], r"dtype int32: .* by x / 127.5 - 1"),
    ],
)
def test_levels_are_one_integer_per_example_and_examples_are_no_integers(model, x, t, words):
    """Checked below `f` and `log_density`, whose annotations reject such arrays in tests."""
    with pytest.raises(UserError, match=words):
        model._evaluate(model.programs.f, x, np.asarray(t))


def test_log_densities_can_be_differentiated_and_compiled(model):
    x, t = np.full((3, 2, 2, 1), 0.5, np.float32), np.full(3, 5)
    gradient = jax.jit(jax.grad(lambda x, t: model.log_density(x, t).sum()))(x, t)
    np.testing.assert_allclose(gradient, -x, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, key: model.sample(key, -1), "n is -1: "),
        (lambda model, key: model.sample_batches(key, -1), "n is -1: "),
        (lambda model, key: model.interpolate(key, -1, 3), "pairs is -1: "),
        (lambda model, key: model.interpolate(key, 1, 0), "frames is 0: "),
        (lambda model, key: model.descend(key, np.zeros((1, 2, 3, 1)), 6, 0), "1x2x3x1: "),
        (lambda model, key: model.with_step_size(np.ones(3)), r"\(3,\): give 6"),
        (
            lambda model, key: model.inpaint(
                key, np.zeros((1, 2, 2, 1)), np.eye(2)[..., None] > 0, completions=-1
            ),
            "completions is -1: ",
        ),
        (
            lambda model, key: model.long_run(key, np.zeros((1, 2, 3, 1)), np.array([0]), 1),
            "1x2x3x1: ",
        ),
    ],
)
def test_numbers_and_shapes_that_make_no_sense_are_errors(model, call, words):
    with pytest.raises(UserError, match=words):
        call(model, jax.random.key(0))


@pytest.mark.parametrize(
    "key", [0, np.int64(3), np.arange(2), jax.random.split(jax.random.key(0)), None]
)
def test_what_is_not_a_random_key_is_an_error(model, key):
    """Checked below the public methods, whose annotations reject such keys in tests."""
    with pytest.raises(UserError, match=r"random key is .*: give jax.random.key\(SEED\)"):
        model.run.__wrapped__(model, model.programs.generate, key, np.arange(2))


KNOWN = np.eye(2)[..., None] > 0


def images(n):
    return np.full((n, 2, 2, 1), 0.25, np.float32)


# Every method that draws n examples: (model, key, n) -> arrays whose first axis has length n.
DRAWS = {
    "sample": lambda model, key, n: model.sample(key, n),
    "descend": lambda model, key, n: model.descend(key, images(n), top=6, bottom=0),
    "interpolate": lambda model, key, n: model.interpolate(key, pairs=n, frames=3),
    "interpolate_images": lambda model, key, n: model.interpolate_images(
        key, images(n), -images(n), frames=3, level=2
    ),
    "inpaint": lambda model, key, n: model.inpaint(key, images(n), KNOWN, completions=2),
    "long_run": lambda model, key, n: model.long_run(
        key, images(n), np.zeros(n, int), num_steps=2, points=4
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_no_examples_are_arrays_of_length_0_and_raw_keys_draw_the_same_as_typed_ones(
    model, draw
):
    """Raw keys are those of `jax.random.PRNGKey`."""
    drawn = draw(model, jax.random.key(3), 2)
    raw = draw(model, jax.random.PRNGKey(3), 2)
    none = draw(model, jax.random.key(3), 0)
    for x, same, empty in zip(*map(jax.tree.leaves, (drawn, raw, none)), strict=True):
        np.testing.assert_array_equal(same, x)
        assert (empty.shape, empty.dtype) == ((0, *x.shape[1:]), x.dtype)


def test_no_completions_and_no_log_densities_are_empty_arrays(model):
    key = jax.random.key(0)
    assert model.inpaint(key, images(3), KNOWN, completions=0).shape == (3, 0, 2, 2, 1)
    assert model.log_density(images(0), np.zeros(0, int)).shape == (0,)
    assert model.f(images(0), np.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "digits",
            "Model(shape=(8, 8, 1), levels=100, network=ImageMLP, parameters=932,948,\n"
            "      sampler=one draw per level, devices=DEVICES)",
        ),
        (
            "digits_t6",
            "Model(shape=(8, 8, 1), levels=6, network=ResNet, parameters=134,112,\n"
            "      sampler=langevin (K=15), devices=DEVICES)",
        ),
    ],
)
def test_repr_describes_data_levels_network_sampler_and_devices(name, expected):
    model = drl_jax.load(name)
    assert repr(model) == expected.replace("DEVICES", str(model.mesh.size))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((1, 2, 2, 1), np.uint8), r"uint8: .* by x / 127.5 - 1"),
        (np.zeros((1, 2, 3, 1)), "1x2x3x1: give nx2x2x1"),
        (np.zeros((2, 2, 1)), "2x2x1"),
        (np.full((1, 2, 2, 1), 255.0), r"\[255, 255\]"),
        (np.full((1, 2, 2, 1), np.nan), "nan"),
    ],
)
def test_arrays_that_do_not_fit_the_model_are_errors(x, words):
    with pytest.raises(UserError, match=words):
        model_lib.as_images(x, (2, 2, 1))


def test_images_may_leave_the_range_by_a_rounding_error():
    x = np.full((1, 2, 2, 1), 1.000001)
    np.testing.assert_array_equal(model_lib.as_images(x, (2, 2, 1)), np.float32(x))


@pytest.mark.parametrize("number", [2.5, -1, np.float32(2)])
def test_counts_are_whole_numbers(number):
    require = inspect.unwrap(model_lib.require_at_least)  # without the tests' check of types
    require(0, n=np.int64(2))
    with pytest.raises(UserError, match=f"^n is {number}: it must be a whole number, 0 or mo"):
        require(0, n=number)
