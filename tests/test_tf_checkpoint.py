"""Compares with numbers that the authors' program computed from its own checkpoint."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import tf_checkpoints
from helpers.fixtures import ORIGINAL, assert_close

from drl_jax import config as config_lib
from drl_jax import diffusion, method, noise, recovery
from drl_jax.errors import UserError
from drl_jax.mcmc import langevin
from drl_jax.recovery import Parameterisation
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.storage import tf_checkpoint

pytestmark = pytest.mark.slow

SCHEDULE = diffusion.schedule(6)
S = recovery.step_sizes(SCHEDULE, b_squared=2e-4)


@pytest.fixture(scope="module")
def expected():
    with np.load(ORIGINAL / "expected.npz") as arrays:
        return dict(arrays)


def extract(tensors):
    """The configuration and the parts of a training state that the tensors are."""
    config = tf_checkpoint.configure(config_lib.default(), tensors, image_size=32)
    return config, tf_checkpoint.extract(tensors, config)


@pytest.fixture(scope="module")
def network():
    """f with the authors' averaged weights, through our spectral normalisation."""
    config, parts = extract(tf_checkpoint.read(str(ORIGINAL / "ckpt")))
    energy = method.from_config(config).energy
    params, _ = energy.normalise(parts.ema, parts.vectors)
    f = jax.jit(energy.f)
    return lambda x, t: f(params, x, t)


def test_schedule_and_step_sizes(expected):
    assert_close(SCHEDULE.sigma, expected["sigmas"], 1e-6)
    assert_close(SCHEDULE.a, expected["a_s"], 1e-6)
    assert_close(SCHEDULE.a_bar, expected["a_s_cum"], 1e-6)
    assert_close(SCHEDULE.sigma_bar, expected["sigmas_cum"], 1e-6)
    t = jnp.arange(6)
    assert_close(SCHEDULE.y_scale(t), expected["a_s_prev"][1:], 1e-6)
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
        F = recovery.log_density(network, Parameterisation(S**2, recovery.no_reference))
        return recovery.conditional_log_density(F, y, x_tilde, t, SCHEDULE)

    value, vjp = jax.vjp(log_p, jnp.asarray(expected["x"]))
    assert_close(value, expected["log_p"], 1e-5)
    assert_close(vjp(jnp.ones(6))[0], expected["grad_log_p"], 1e-5)


def test_three_noiseless_langevin_steps(network, expected):
    x_tilde, t = jnp.asarray(expected["x_noisy"]), jnp.asarray(expected["t"])
    keys = jax.random.split(jax.random.key(0), 6)
    tuning = {"step_size": S, "noise_scale": jnp.zeros(6)}
    conditionals = Conditionals(
        F=recovery.log_density(network, Parameterisation(S**2, recovery.no_reference)),
        schedule=SCHEDULE,
        sampler=Sampler(langevin.init, langevin.kernel, tuning, K=3),
    )
    y, _ = ladder.sample_conditional(keys, conditionals, x_tilde, t)
    x = y / noise.per_example(SCHEDULE.y_scale(t), y)
    assert_close(x, expected["langevin3_noiseless"], 1e-5)


def test_loss(network, expected):
    x_pos, t = jnp.asarray(expected["x_pos"]), jnp.asarray(expected["t"])
    a = noise.per_example(SCHEDULE.y_scale(t), x_pos)
    phases = (a * x_pos, -1), (a * expected["x_neg"], 1)
    losses = sum(recovery.loss(network, y, sign, t, SCHEDULE)[0] for y, sign in phases)
    assert_close(jnp.mean(losses), expected["loss"], 1e-5)
    assert_close(jnp.abs(losses), expected["loss_ts"], 1e-4)


def test_the_architecture_is_that_of_the_averaged_network():
    config, _ = extract(tf_checkpoints.untrained())
    assert (config.energy.ch, config.energy.mult, config.energy.N) == (16, (1, 2, 2, 2), 2)
    assert (config.data.image_size, config.data.channels) == (32, 3)
    assert config.energy.parameterisation == "step"


def test_every_part_of_a_training_state_is_extracted():
    """Raw parameters and moments of the fixture are the average plus 1, 2 and 3."""
    tensors = tf_checkpoints.trained()
    config, parts = extract(tensors)
    assert (int(parts.step), parts.step.dtype) == (5000, "int32")
    assert (int(parts.moments.updates), parts.moments.updates.dtype) == (5001, "int32")
    shapes = jax.eval_shape(method.from_config(config).energy.init, jax.random.key(0))
    trees = [(parts.ema, parts.vectors), (parts.params, parts.vectors)]
    trees += [(moment, parts.vectors) for moment in (parts.moments.mu, parts.moments.nu)]
    for tree in trees:
        assert jax.tree.structure(tree) == jax.tree.structure(shapes)
        for ours, like in zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True):
            assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
    ema = traverse_util.flatten_dict(parts.ema, sep="/")
    shifted = {0: parts.ema, 1: parts.params, 2: parts.moments.mu, 3: parts.moments.nu}
    for shift, tree in shifted.items():
        for path, value in traverse_util.flatten_dict(tree, sep="/").items():
            np.testing.assert_array_equal(value, np.asarray(ema[path]) + np.float32(shift))
    np.testing.assert_array_equal(
        parts.vectors["level_2_block_1/conv2/kernel"],
        tensors["model_ema/net/res_levels/2/1/conv2d_2/conv/sn_u"][0],
    )


def test_only_the_average_is_required():
    tensors = tf_checkpoints.untrained()
    average = {name: t for name, t in tensors.items() if name.startswith("model_ema/")}
    _, parts = extract(average)
    assert parts.params is None
    assert parts.moments is None
    assert int(parts.step) == 0
    jax.tree.map(np.testing.assert_array_equal, parts.ema, extract(tensors)[1].ema)


def test_tensors_outside_the_networks_are_logged(caplog):
    extract(tf_checkpoints.untrained() | {"critic/w": np.zeros(3, np.float32)})
    assert "not imported: critic/w" in caplog.messages


def drop(start):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(start)}


def add(name, shape=()):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.fixture(scope="module")
def trained_tensors():
    return tf_checkpoints.trained()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            drop("model_ema/net/temb_dense_2/dense/b"),
            "lacks model_ema/net/temb_dense_2/dense/b:",
        ),
        (drop("model_ema/net/conv2d_in/conv/sn_u"), "lacks model_ema/net/conv2d_in/conv/sn_u:"),
        (drop("model_ema/net/res_levels/1/1/"), "lacks .*/1/1/conv2d_1/.* and 6 more"),
        (drop("model_ema/net/res_levels/1/"), "lacks .*/res_levels/1/.* and 15 more"),
        (drop("model_ema/net/res_levels/"), "no averaged network"),
        (drop("model_ema/net/conv2d_in/"), "no averaged network"),
        (drop("model_ema/"), "no averaged network"),
        (drop("model/net/res_levels/0/0/dense/dense/w"), "lacks model/net/.*/dense/dense/w:"),
        (drop("opt_c/iter"), "lacks opt_c/iter"),
        (
            drop("model/net/conv2d_in/conv/w/.OPTIMIZER_SLOT/opt_c/v"),
            "lacks .*conv/w/.*opt_c/v:",
        ),
        (add("model_ema/net/attn_s/16/0/q/W"), "holds model_ema/net/attn_s/16/0/q/W,"),
        (add("model/net/fc_out/dense/b"), "holds model/net/fc_out/dense/b,"),
        (add("model/more"), "holds model/more,"),
        (
            add("model_ema/net/temb_dense_0/dense/w", (64, 16)),
            r"temb_dense_0/dense/w has shape \[64, 16\], not \[16, 64\]",
        ),
        (
            add("model_ema/net/res_levels/0/0/conv2d_1/conv/w", (3, 3, 15, 16)),
            r"res_levels/0/0/conv2d_1/conv/w has shape \[3, 3, 15, 16\]",
        ),
        (add("model_ema/net/res_levels/3/1/conv2d_1/conv/w", (3, 3, 32, 8)), "energy.mult is"),
        (add("i_iter_var", (2,)), r"i_iter_var has shape \[2\]"),
    ],
)
def test_a_checkpoint_of_another_network_is_rejected_by_name(trained_tensors, change, words):
    with pytest.raises(UserError, match=words) as raised:
        extract(change(trained_tensors))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["absent", "text", "folder", "no data", "cut", "flipped"])
def test_files_that_are_not_a_checkpoint_are_rejected_in_one_line(tmp_path, kind):
    prefix = tmp_path / "ckpt"
    index, content = (tmp_path / f"ckpt.{end}" for end in ("index", "data-00000-of-00001"))
    if kind == "text":
        prefix.write_text("no checkpoint")
    if kind == "folder":
        prefix.mkdir()
    if kind in ("no data", "cut", "flipped"):
        shutil.copyfile(ORIGINAL / index.name, index)
    if kind in ("cut", "flipped"):
        whole = bytearray((ORIGINAL / content.name).read_bytes())
        whole[len(whole) // 2] ^= 1
        content.write_bytes(whole[: len(whole) // 2] if kind == "cut" else whole)
    words = re.escape(f"--tf_checkpoint={prefix} cannot be read")
    with pytest.raises(UserError, match=words) as raised:
        tf_checkpoint.read(str(prefix))
    assert "\n" not in str(raised.value)


def test_read_returns_tensors_by_the_names_of_their_variables(tmp_path):
    tensors = tf_checkpoints.trained()
    tf_checkpoints.write(tmp_path / "ckpt", tensors)
    found = tf_checkpoint.read(str(tmp_path / "ckpt"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
