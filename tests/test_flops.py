import collections
import functools

import jax
import jax.numpy as jnp
import pytest

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.networks import resnet
from drl_jax.sampling import ladder
from drl_jax.tools import flops


def test_forward_flops_of_a_network_counted_by_hand():
    # Embedding 2 -> 8 -> 8; conv_in 1 -> 2 at 4x4; a block with 2 channels at 4x4; a block with
    # 4 channels at 2x2 and a convolution in its skip connection; head 8 -> 4.
    dense = 2 * 8 + 8 * 8 + 8 * 2 + 8 * 4 + 8 * 4
    taps = 9 * (16 * (1 * 2 + 2 * 2 + 2 * 2) + 4 * (2 * 4 + 4 * 4 + 2 * 4))
    assert flops.resnet(4, 1, ch=2, mult=(1, 2), N=1) == 2 * (dense + taps)


def test_forward_flops_agree_with_xlas_count():
    size, ch, mult, N = 64, 32, (1, 2), 2
    energy = resnet.energy(size, 3, ch=ch, mult=mult, N=N)
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jnp.zeros((1,), jnp.int32)
    traced = jax.jit(energy.f).trace(params, x, t)
    lowered = traced.lower(lowering_platforms=("cuda",))  # no Winograd there
    counted = lowered.cost_analysis()["flops"]
    # XLA omits products with padding and counts elementwise operations: a few percent.
    assert flops.resnet(size, 3, ch, mult, N) == pytest.approx(counted, rel=0.05)


def test_forward_flops_of_a_u_net_counted_by_hand():
    # Embedding 2 -> 8 -> 8. At 4x4 there is a block and one that halves; at 2x2 a block from 2
    # to 4 channels, with attention. The middle has two blocks and attention. On the way up,
    # blocks read 4 + 4 and 4 + 2 channels at 2x2, with attention; one doubles; then 4 + 2 and
    # 2 + 2 channels at 4x4. A block's time embedding goes to two numbers per channel.
    dense = 2 * 8 + 8 * 8 + 8 * (2 * 2 + 2 * 2 + 2 * 4 + 4 * 4 * 2 + 2 * 4 + 2 * 2 * 2)
    small = 9 * (2 * 4 + 4 * 4 + 4 * 4 * 4 + 8 * 4 + 4 * 4 + 6 * 4 + 4 * 4)
    large = 9 * (2 * 2 * 2 + 6 * 2 + 2 * 2 + 4 * 2 + 2 * 2)
    ends, halved, doubled = 9 * 16 * 2 * 1 * 2, 9 * 4 * 2 * 2 * 2, 9 * 16 * 4 * 4 * 2
    skips = 4 * (2 * 4 + 8 * 4 + 6 * 4) + 16 * (6 * 2 + 4 * 2)
    attention = 4 * (4 * 4 * 4 * 4 + 2 * 4 * 4 * 4)
    total = dense + 4 * small + 16 * large + ends + halved + doubled + skips + attention
    assert flops.unet(4, 1, ch=2, mult=(1, 2), N=1, attention=(2,)) == 2 * total


@pytest.mark.parametrize(("network", "axes"), [("resnet", 1), ("resnet", 3), ("unet", 3)])
def test_forward_flops_of_signals_and_volumes_agree_with_xlas_count(config, network, axes):
    """XLA omits products with padding, which are up to a quarter here.

    The time embedding costs the same for any number of axes, but almost nothing.
    """
    config.data.update(axes=axes, image_size={1: 512, 3: 16}[axes])
    config.energy.update(network=network, ch=16, mult=(1, 2))
    if network == "unet":
        config.energy.update(attention=(8,), patch=1)
    energy = method.from_config(config).energy
    params, _ = jax.eval_shape(energy.init, jax.eval_shape(lambda: jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, *energy.shape), jnp.float32)
    t = jnp.zeros((1,), jnp.int32)
    lowered = jax.jit(energy.f).trace(params, x, t).lower(lowering_platforms=("cuda",))
    ratio = lowered.cost_analysis()["flops"] / flops.forward(config)
    assert 0.75 < ratio < 1.05


@pytest.fixture
def config():
    config = config_lib.default()
    config.energy.N = 1
    config.mcmc.K = 10
    return config


@pytest.mark.parametrize(
    ("patch", "form"), [(1, "inner_product"), (2, "inner_product"), (2, "mixture")]
)
def test_forward_flops_of_a_u_net_agree_with_xlas_count(config, patch, form):
    size = config.data.image_size = 32 * patch
    config.energy.update(network="unet", ch=32, mult=(1, 2), attention=(16,), patch=patch)
    config.energy.update(form=form, parameterisation="uniform")
    energy = method.from_config(config).energy
    params, _ = jax.eval_shape(energy.init, jax.eval_shape(lambda: jax.random.key(0)))
    x, t = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jnp.zeros((1,), jnp.int32)
    lowered = jax.jit(energy.f).trace(params, x, t).lower(lowering_platforms=("cuda",))
    assert flops.forward(config) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def passes(config, program):
    return program(config) / flops.forward(config)


def test_a_langevin_step_costs_two_passes_and_the_loss_six(config):
    assert passes(config, flops.training_step) == 2 * 10 + 6
    assert passes(config, flops.sampling) == 6 * 2 * 10


def test_mala_needs_one_more_gradient_to_initialise(config):
    config.mcmc.sampler = "mala"
    assert passes(config, flops.training_step) == 2 * 11 + 6
    assert passes(config, flops.sampling) == 6 * 2 * 11


def test_hmc_needs_one_gradient_per_leapfrog_step_of_the_longest_trajectory(config):
    config.mcmc.sampler = "hmc"
    config.mcmc.leapfrog = (1, 2, 3, 4, 5, 6)
    assert passes(config, flops.training_step) == 2 * 61 + 6
    assert passes(config, flops.sampling) == 2 * (6 + 10 * 21)
    assert flops.leapfrog(config) == 6


def test_a_denoising_step_costs_six_passes(config):
    config.diffusion.T, config.train.objective = 1000, "denoising"
    assert passes(config, flops.training_step) == 6


@pytest.mark.parametrize(
    ("sampler", "K", "gradients"), [("langevin", 0, 1), ("mala", 0, 1), ("mala", 10, 12)]
)
def test_starting_from_the_posterior_costs_one_gradient_per_level(
    config, sampler, K, gradients
):
    """Without steps, MALA needs no gradient to initialise its chains."""
    config.mcmc.update(start="posterior", sampler=sampler, K=K)
    assert passes(config, flops.sampling) == 6 * 2 * gradients
    assert passes(config, flops.training_step) == 2 * gradients + 6


@pytest.mark.parametrize("network", ["unet", "mlp"])
def test_an_initialiser_costs_three_passes_in_training_and_one_per_level(config, network):
    """And the final denoising costs one gradient."""
    config.data.image_size, config.data.channels = 8, 1
    without = flops.training_step(config), flops.sampling(config)
    config.mcmc.start = "initialiser"
    config.initialiser.update(network=network, ch=16, mult=(1, 1), N=2, attention=(4,))
    g = {"unet": flops.unet(8, 1, 16, (1, 1), 2, (4,)), "mlp": flops.image_mlp(64, 16, 2)}
    assert flops.initialiser(config) == g[network]
    assert flops.training_step(config) == pytest.approx(without[0] + 3 * g[network])
    assert flops.sampling(config) == pytest.approx(without[1] + 6 * g[network])
    config.mcmc.denoise = "tweedie"
    expected = without[1] + 6 * g[network] + 2 * flops.forward(config)
    assert flops.sampling(config) == pytest.approx(expected)
    config.mcmc.start = "x_tilde"
    assert flops.sampling(config) == pytest.approx(without[1] + 2 * flops.forward(config))


@pytest.mark.parametrize("form", ["inner_product", "mixture"])
def test_an_image_mlp_costs_two_flops_per_weight(config, form):
    config.energy.network, config.data.image_size, config.data.channels = "image_mlp", 8, 1
    config.energy.update(ch=32, N=3, form=form, parameterisation="uniform")
    energy = method.from_config(config).energy
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    assert flops.forward(config) == 2 * weights


def test_an_mlp_costs_two_flops_per_weight(config):
    config.energy.network, config.data.channels, config.energy.N = "mlp", 2, 3
    energy = method.from_config(config).energy
    params, _ = jax.eval_shape(
        energy.init, jax.eval_shape(functools.partial(jax.random.key, 0))
    )
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    assert flops.forward(config) == 2 * kernels


@pytest.mark.parametrize("denoise", ["no", "tweedie"])
@pytest.mark.parametrize(
    ("start", "sampler", "K", "levels"),
    [
        ("x_tilde", "langevin", 2, 0),
        ("x_tilde", "hmc", 2, 0),
        ("posterior", "langevin", 0, 0),
        ("posterior", "mala", 2, 0),
        ("posterior", "mala", 2, 2),
        ("initialiser", "langevin", 2, 0),
        ("initialiser", "mala", 0, 0),
    ],
)
def test_evaluations_are_those_that_generation_makes(
    config, start, sampler, K, levels, denoise
):
    """Counts the calls of both networks in the compiled program."""
    config.data.channels, config.diffusion.T, config.mcmc.levels = 2, 3, levels
    config.energy.update(network="mlp", ch=8, N=1)
    config.mcmc.update(start=start, sampler=sampler, K=K, denoise=denoise, leapfrog=(2, 1, 3))
    if start == "initialiser":
        config.initialiser.update(network="mlp", ch=8, N=1)
    built = method.for_generation(method.from_config(config), config)
    params, _ = built.energy.init(jax.random.key(0))
    calls = collections.Counter()

    def counted(name, function):
        def call(*args):
            jax.debug.callback(lambda: calls.update([name]))
            return function(*args)

        return call

    conditionals = built.conditionals(params)
    conditionals = conditionals._replace(
        F=counted("gradients", conditionals.F),
        propose=counted("proposals", conditionals.propose),
    )
    keys = jax.random.split(jax.random.key(1), 4)
    jax.jit(lambda keys: ladder.generate(keys, conditionals, (2,)))(keys).block_until_ready()
    jax.effects_barrier()
    assert flops.evaluations(config) == (calls["gradients"], calls["proposals"])
