"""Against numbers that the authors' TensorFlow program computed from its own checkpoint.

The files lie beside the repository, or where the environment variable DRL_FIXTURES says.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from drl_jax import diffusion, noise, recovery, sampling
from drl_jax.energies import resnet
from drl_jax.mcmc import langevin
from drl_jax.recovery import Parameterisation
from drl_jax.sampling import Sampler

HERE = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = pathlib.Path(os.environ.get("DRL_FIXTURES", HERE.parent / "shared" / "fixtures"))
FOLDER = FIXTURES / "original_t6_32px"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no {FOLDER}: set DRL_FIXTURES to where the fixtures lie"
)

SCHEDULE = diffusion.schedule(6)
S = recovery.step_sizes(SCHEDULE, b_squared=2e-4)


def original_name(path):
    """The authors' name of one of our parameters."""
    module, *inner, leaf = path.split("/")
    if module == "head":
        return "temb_dense_2/dense/" + {"kernel": "W", "bias": "b"}[leaf]
    if module == "conv_in":
        layer = "conv2d_in/conv"
    elif module.startswith("temb"):
        layer = f"temb_dense_{module[-1]}/dense"
    else:
        _, level, _, block = module.split("_")
        kind = {
            "conv1": "conv2d_1/conv",
            "conv2": "conv2d_2/conv",
            "skip": "conv2d_shortcut/conv",
            "dense": "dense/dense",
        }[inner[0]]
        layer = f"res_levels/{level}/{block}/{kind}"
    return f"{layer}/" + {"kernel": "w", "bias": "layer/b", "g": "layer/g"}[leaf]


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def network():
    """f of the authors' averaged weights, through our spectral normalisation."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(FOLDER / "ckpt"))

    def get(name):
        return jnp.asarray(
            reader.get_tensor(f"model_ema/net/{name}/.ATTRIBUTES/VARIABLE_VALUE")
        )

    energy = resnet.energy(32, 3, ch=16, mult=(1, 2, 2, 2), N=2)
    params, vectors = energy.init(jax.random.key(0))
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {path: get(original_name(path)) for path in flat}
    vectors = {path: get(original_name(path).removesuffix("w") + "sn_u")[0] for path in vectors}
    params, _ = energy.normalise(traverse_util.unflatten_dict(flat, sep="/"), vectors)
    f = jax.jit(energy.f)
    return lambda x, t: f(params, x, t)


def assert_close(ours, theirs, rtol):
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    error = np.max(np.abs(np.float64(ours) - theirs)) / np.max(np.abs(theirs))
    assert error < rtol, f"relative error {error:.1e}"


def test_schedule_and_step_sizes(expected):
    assert_close(SCHEDULE.sigma, expected["sigmas"], 1e-6)
    assert_close(SCHEDULE.a, expected["a_s"], 1e-6)
    assert_close(SCHEDULE.a_bar, expected["a_s_cum"], 1e-6)
    assert_close(SCHEDULE.sigma_bar, expected["sigmas_cum"], 1e-6)
    t = jnp.arange(6)
    assert_close(SCHEDULE.a_y(t), expected["a_s_prev"][1:], 1e-6)
    np.testing.assert_array_equal(1 - SCHEDULE.is_marginal(t), expected["is_recovery"][1:])
    assert_close(S**2, expected["step_size_square"], 1e-6)


def test_network_and_its_gradient(network, expected):
    x, t = jnp.asarray(expected["x"]), jnp.asarray(expected["t"])
    f, vjp = jax.vjp(lambda x: network(x, t), x)
    assert_close(f, expected["f"], 1e-5)
    assert_close(vjp(jnp.ones(6))[0], expected["grad_f"], 1e-5)


def test_conditional_log_density_and_its_gradient(network, expected):
    x_tilde, t = jnp.asarray(expected["x_noisy"]), jnp.asarray(expected["t"])

    def log_p(y):
        F = recovery.log_density(network, Parameterisation(S**2, 0.0))
        return recovery.conditional_log_density(F, y, x_tilde, t, SCHEDULE)

    value, vjp = jax.vjp(log_p, jnp.asarray(expected["x"]))
    assert_close(value, expected["log_p"], 1e-5)
    assert_close(vjp(jnp.ones(6))[0], expected["grad_log_p"], 1e-5)


def test_three_noiseless_langevin_steps(network, expected):
    x_tilde, t = jnp.asarray(expected["x_noisy"]), jnp.asarray(expected["t"])
    keys = jax.random.split(jax.random.key(0), 6)
    tuning = {"step_size": S, "noise_scale": jnp.zeros(6)}
    y, _ = sampling.sample_conditional(
        keys,
        recovery.log_density(network, Parameterisation(S**2, 0.0)),
        x_tilde,
        t,
        SCHEDULE,
        Sampler(langevin.init, langevin.kernel, tuning, K=3),
    )
    x = y / noise.per_example(SCHEDULE.a_y(t), y)
    assert_close(x, expected["langevin3_noiseless"], 1e-5)


def test_loss(network, expected):
    x_pos, t = jnp.asarray(expected["x_pos"]), jnp.asarray(expected["t"])
    a = noise.per_example(SCHEDULE.a_y(t), x_pos)
    losses, _ = recovery.loss(network, a * x_pos, a * expected["x_neg"], t, SCHEDULE)
    assert_close(jnp.mean(losses), expected["loss"], 1e-5)
    assert_close(jnp.abs(losses), expected["loss_ts"], 1e-4)
