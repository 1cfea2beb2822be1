import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import diffusion, noise, recovery
from drl_jax.networks import energy as energy_lib
from drl_jax.networks import image_mlp

pytestmark = pytest.mark.slow

SHAPE = (4, 4, 1)
SCHEDULE = diffusion.schedule(6, "cosine")
LEVELS = SCHEDULE.conditioning[:-1]
MIXTURE = recovery.mixture(SCHEDULE, SCHEDULE.sigma_bar[:-1], half_width=1.0)
# By name, with the number of the network's outputs.
FORMS = {name: (form, 1) for name, form in energy_lib.FORMS.items()} | {"mixture": (MIXTURE, 2)}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form_and_outputs(request):
    return request.param


@pytest.fixture
def energy(form_and_outputs):
    form, outputs = form_and_outputs
    return image_mlp.energy(
        SHAPE, width=32, depth=2, dropout=0.5, form=form, levels=LEVELS, outputs=outputs
    )


@pytest.fixture
def params(energy):
    """Parameters far from their initial values, at which U is almost zero."""
    params, vectors = energy.init(jax.random.key(0))
    assert vectors == {}
    keys = noise.example_keys(jax.random.key(1), jnp.arange(len(jax.tree.leaves(params))))
    return jax.tree.unflatten(
        jax.tree.structure(params),
        [
            p + 0.2 * jax.random.normal(key, p.shape)
            for p, key in zip(jax.tree.leaves(params), keys, strict=True)
        ],
    )


X = jax.random.normal(jax.random.key(2), (6, *SHAPE))
T = jnp.arange(6)


def test_the_output_of_a_new_network_is_almost_zero(energy, form_and_outputs):
    """For the forms with one output, f is almost zero, too."""
    params, _ = energy.init(jax.random.key(0))
    form, outputs = form_and_outputs
    zero = form(X, jnp.zeros((6, *SHAPE) if outputs == 1 else (6, outputs, *SHAPE)), T)
    assert outputs > 1 or np.all(zero == 0)
    np.testing.assert_allclose(energy.f(params, X, T), zero, atol=1e-3, rtol=1e-4)


def test_f_depends_on_the_level(energy, params):
    same = jnp.tile(X[:1], (6, 1, 1, 1))
    assert len(np.unique(energy.f(params, same, T))) == 6


def test_gradient_of_f_agrees_with_finite_differences(energy, params):
    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        x = jnp.asarray(X, jnp.float64)
        direction = jax.random.normal(jax.random.key(3), x.shape, jnp.float64)
        gradient = jax.grad(lambda x: energy.f(params64, x, T).sum())(x)
        step = 1e-5
        difference = energy.f(params64, x + step * direction, T) - energy.f(
            params64, x - step * direction, T
        )
        expected = jnp.sum(gradient * direction, axis=(1, 2, 3))
        np.testing.assert_allclose(difference / (2 * step), expected, rtol=1e-5)


def test_f_grows_at_most_linearly_far_from_the_data(energy, params):
    """So that the reference density can be normalised whatever the parameters are."""
    near, far = (energy.f(params, scale * X, T) for scale in (1e3, 1e6))
    assert np.all(np.abs(far) < 1.1e3 * np.abs(near) + 1e3)


def test_dropout_needs_keys_and_depends_only_on_each_example_and_its_key(energy, params):
    keys = noise.example_keys(jax.random.key(4), jnp.arange(6))
    without, dropped = energy.f(params, X, T), energy.f(params, X, T, keys)
    np.testing.assert_array_equal(without, energy.f(params, X, T))
    assert np.all(np.abs(without - dropped) > 1e-4)
    halves = [energy.f(params, X[i], T[i], keys[i]) for i in (slice(0, 2), slice(2, 6))]
    np.testing.assert_allclose(dropped, jnp.concatenate(halves), rtol=1e-4, atol=1e-5)


def test_the_forms_differ_by_half_the_squared_norm_of_the_output():
    x, u = jax.random.normal(jax.random.key(5), (2, 3, *SHAPE))
    squared = np.sum(np.square(u), axis=(1, 2, 3))
    t = jnp.zeros(3, int)
    inner = energy_lib.inner_product(x, u, t)
    np.testing.assert_allclose(inner, np.einsum("bijk,bijk->b", x, u), rtol=1e-5)
    distance = np.sum(np.square(x), axis=(1, 2, 3)) - np.sum(np.square(x - u), axis=(1, 2, 3))
    np.testing.assert_allclose(
        energy_lib.squared_distance(x, u, t), distance / 2, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        energy_lib.squared_distance(x, u, t), inner - squared / 2, rtol=1e-4, atol=1e-4
    )
