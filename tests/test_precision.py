"""float32 and bfloat16 compared with float64.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import drl_jax
from drl_jax import diffusion, method, noise, recovery
from drl_jax.data import pipeline, sources
from drl_jax.mcmc import hmc, langevin, mala
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.model import Model
from drl_jax.networks import mlp, resnet
from drl_jax.networks.convolution import conv3x3
from drl_jax.networks.energy import with_dtype
from drl_jax.recovery import Parameterisation
from drl_jax.sampling import inpainting, ladder
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.storage import runs
from drl_jax.tools import precision

pytestmark = pytest.mark.slow

B, T = 24, 6
LEVELS = jnp.arange(B, dtype=jnp.int32) % T


def away_from_initialisation(energy):
    """Returns normalised parameters: kernels of order inputs^-1/2, biases of order 0.1."""
    params, _ = jax.jit(lambda key: energy.normalise(*energy.init(key)))(jax.random.key(0))
    rng = np.random.default_rng(1)

    def moved(leaf):
        scale = 1 / math.sqrt(max(leaf[..., 0].size, 100))
        return np.asarray(leaf + rng.normal(scale=scale, size=leaf.shape), np.float32)

    return jax.tree.map(moved, params)


def random_resnet():
    energy = resnet.energy(8, 3, ch=16, mult=(1,), N=1)
    x = jax.random.uniform(jax.random.key(2), (B, 8, 8, 3), minval=-1)
    return energy, away_from_initialisation(energy), x


def random_mlp():
    energy = mlp.energy(5, width=32)
    return (
        energy,
        away_from_initialisation(energy),
        jax.random.normal(jax.random.key(2), (B, 5)),
    )


def shipped():
    run = runs.load("digits_t6")
    source = sources.open_source(run.config)
    x = jnp.stack(list(pipeline.all_examples(run.config, source, B)))
    keys, schedule = noise.example_keys(jax.random.key(2), jnp.arange(B)), diffusion.schedule(T)
    x_t = diffusion.diffuse(keys, x, LEVELS, schedule)
    return run.model.method.energy, run.model.params, x_t


def in_float64(tree):
    """Converts the floating-point arrays of a tree to float64."""
    return jax.tree.map(
        lambda a: np.asarray(
            a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
        ),
        tree,
    )


def f_and_gradient(energy, params, x):
    program = jax.jit(
        lambda params, x: value_and_gradient(lambda x: energy.f(params, x, LEVELS), x)
    )
    return jax.tree.map(np.asarray, program(params, x))


def relative_errors(ours, truth):
    """Errors of f relative to its root mean square; errors of each gradient to its norm."""
    (f, gradient), (f_truth, gradient_truth) = ours, truth
    f_error = np.abs(f - f_truth) / np.sqrt(np.mean(f_truth**2))
    difference, norm = (
        np.sqrt(np.sum(g.reshape(B, -1) ** 2, axis=1))
        for g in (gradient - gradient_truth, gradient_truth)
    )
    return f_error, difference / norm


@pytest.mark.parametrize("network", [random_resnet, random_mlp, shipped])
def test_energies_and_gradients_differ_from_float64_by_rounding_errors(network):
    """About 1e-6 in float32; in bfloat16, about a thousand times as much.

    The gradients' errors are medians over the examples, because a rounding error at a kink of
    the leaky ReLU changes a gradient completely. Fails if the network casts x to bfloat16 or to
    float32, and if `with_dtype` does not cast the images.
    """
    energy, params, x = network()
    with jax.enable_x64(True):
        double = in_float64((params, x))
        truth = f_and_gradient(energy, *double)
        assert {leaf.dtype for leaf in truth} == {np.dtype(np.float64)}
        differences_agree(energy, *double, truth[1])
    single = f_and_gradient(energy, params, x)
    assert {leaf.dtype for leaf in single} == {np.dtype(np.float32)}
    f_error, gradient_error = relative_errors(single, truth)
    assert np.max(f_error) < 3e-6
    assert np.median(gradient_error) < 1e-6
    if network is random_mlp:
        return
    half = f_and_gradient(with_dtype(jnp.bfloat16, energy), params, x)
    assert {leaf.dtype for leaf in half} == {np.dtype(np.float32)}
    f_error, gradient_error = relative_errors(half, truth)
    assert 1e-3 < np.max(f_error) < 0.1
    assert 3e-3 < np.median(gradient_error) < 0.1


def differences_agree(energy, params, x, gradient):
    """Compares with central differences: they agree to eight digits, in float32 to two."""
    v = np.random.default_rng(0).normal(size=x.shape)
    h = 1e-6
    f = jax.jit(energy.f)
    difference = (f(params, x + h * v, LEVELS) - f(params, x - h * v, LEVELS)) / (2 * h)
    along = np.sum((gradient * v).reshape(B, -1), axis=1)
    scale = np.sqrt(np.mean(along**2))
    assert np.median(np.abs(difference - along)) < 1e-7 * scale


@pytest.mark.parametrize("network", [random_resnet, random_mlp])
def test_networks_compute_in_the_precision_of_their_images(network):
    """Fails if the time embedding of either network is float32 and not weakly typed."""
    energy, params, x = network()

    def program(params, x):
        return str(
            jax.make_jaxpr(
                lambda x: value_and_gradient(lambda x: energy.f(params, x, LEVELS), x)
            )(x)
        )

    with jax.enable_x64(True):
        assert not re.search(r"\bb?f(16|32)\[", program(*in_float64((params, x))))
    assert not re.search(r"\bb?f(16|64)\[", program(params, np.asarray(x)))


def test_convolutions_multiply_in_bfloat16_and_add_up_in_float32():
    """In f and both its gradients.

    Fails if `with_dtype` does not cast the images, if a kernel is not rounded, and if sums
    have the precision of the images.
    """
    energy, params, x = random_resnet()
    low = with_dtype(jnp.bfloat16, energy).f
    text = (
        jax.jit(jax.grad(lambda params, x: jnp.sum(low(params, x, LEVELS)), (0, 1)))
        .lower(params, x)
        .as_text()
    )
    # On CPUs, the gradients of kernels are sums of matrix products, computed in loops.
    products = re.findall(
        r"stablehlo\.(?:convolution|dot_general)[^\n]*: "
        r"\(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>",
        text,
    )
    # Three forward, three backward; two shapes of kernels.
    assert products.count(("bf16", "bf16", "f32")) >= 3 + 3 + 2
    assert set(products) == {("bf16", "bf16", "f32"), ("f32", "f32", "f32")}


def test_gradients_of_parameters_in_bfloat16_have_its_rounding_errors():
    """They are float32 and have almost the same direction.

    Fails if biases are rounded before they are added: XLA:CPU then sums their gradients in
    bfloat16 and loses half of one.
    """
    energy, params, x = random_resnet()
    half = with_dtype(jnp.bfloat16, energy)

    def gradient(energy):
        return jax.jit(jax.grad(lambda params: jnp.sum(energy.f(params, x, LEVELS))))(params)

    for ours, truth in zip(
        jax.tree.leaves(gradient(half)), jax.tree.leaves(gradient(energy)), strict=True
    ):
        assert ours.dtype == truth.dtype == np.float32
        assert 1e-4 < np.linalg.norm(ours - truth) / np.linalg.norm(truth) < 0.1


def test_a_configuration_chooses_bfloat16_for_f_alone():
    """Fails if the state of a chain or the network's last sum is in bfloat16."""
    run = runs.load("digits_t6")
    config = run.config.copy_and_resolve_references()
    config.energy.dtype = "bfloat16"
    half = method.from_config(config)
    _, params, x = shipped()
    f = np.asarray(jax.jit(half.energy.f)(params, x, LEVELS))
    assert f.dtype == np.float32
    assert np.any(f != np.asarray(jnp.asarray(f, jnp.bfloat16), np.float32))
    keys = noise.example_keys(jax.random.key(0), jnp.arange(B))
    half = half._replace(sampler=half.sampler._replace(K=2))
    y, _ = ladder.sample_conditional(keys, half.conditionals(params), x, LEVELS)
    assert y.dtype == np.float32
    assert np.any(y != np.asarray(jnp.asarray(y, jnp.bfloat16), np.float32))


def test_the_conditional_log_density_is_accurate_in_float64():
    """Fails if the temperature is float32."""
    with jax.enable_x64(True):
        schedule = diffusion.schedule(T)
        tau, sigma = np.asarray(schedule.sigma_bar[:-1]), np.asarray(schedule.sigma)
        y, x_tilde = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 3)))
        t = jnp.arange(T)
        F = recovery.log_density(
            lambda x, t: jnp.sum(jnp.sin(x), axis=1),
            Parameterisation(tau, recovery.white_noise),
        )
        ours = recovery.conditional_log_density(F, jnp.asarray(y), x_tilde, t, schedule)
        quadratic = np.sum((x_tilde - y) ** 2, axis=1) / (2 * sigma[1:] ** 2)
        theirs = np.sin(y).sum(1) / tau - (y**2).sum(1) / 2 - (t < T - 1) * quadratic
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_the_same_keys_give_the_same_noise_in_every_precision():
    """Fails if either draw has the default dtype."""
    keys = noise.example_keys(jax.random.key(3), jnp.arange(5))
    with jax.enable_x64(True):
        again = noise.example_keys(jax.random.key(3), jnp.arange(5))
        wide = noise.normal(noise.fold(again, 7), (4, 2)), noise.uniform(again)
    for ours, theirs in zip(
        wide, (noise.normal(noise.fold(keys, 7), (4, 2)), noise.uniform(keys)), strict=True
    ):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def sampler_of(module, s, K):
    tuning = {"step_size": s}
    if module is hmc:
        tuning["leapfrog"] = jnp.full(s.shape, 3)
    return Sampler(module.init, module.kernel, tuning, K)


def mlp_conditionals(module, params, dtype):
    """Conditionals of the random MLP, in the enabled precision."""
    schedule = diffusion.schedule(T)
    s = recovery.step_sizes(schedule, 1e-2)
    f = lambda x, t: mlp.energy(5, width=32).f(params, x, t)  # noqa: E731
    F = recovery.log_density(f, Parameterisation(s**2 * 300, recovery.white_noise))
    assert schedule.a.dtype == s.dtype == dtype
    return Conditionals(F, schedule, sampler_of(module, s, 30))


@pytest.mark.parametrize("module", [langevin, mala, hmc])
def test_chains_of_thirty_steps_are_the_same_in_float32_and_float64(module):
    """The energy is smooth: chains diverge only where they differ in an accept decision.

    Fails if the noise, or the uniform number of the accept decision, has the default dtype.
    """
    _, params, x = random_mlp()

    def run(params, x):
        conditionals = mlp_conditionals(module, params, x.dtype)
        keys = noise.example_keys(jax.random.key(5), jnp.arange(B))
        program = jax.jit(lambda x: ladder.sample_conditional(keys, conditionals, x, LEVELS))
        return jax.tree.map(np.asarray, program(x))

    y, accepted = run(params, np.asarray(x))
    with jax.enable_x64(True):
        truth, accepted_truth = run(*in_float64((params, x)))
    assert truth.dtype == accepted_truth.dtype == np.float64
    assert y.dtype == accepted.dtype == np.float32
    difference, moved = (np.sqrt(np.mean(d**2, axis=1)) for d in (y - truth, truth - x))
    difference /= np.median(moved)
    assert np.median(moved) > 0.1
    assert 1e-9 < np.median(difference) < 2e-6
    assert np.mean(difference < 1e-4) > 0.9
    np.testing.assert_allclose(np.median(accepted - accepted_truth), 0, atol=1e-5)


@pytest.mark.parametrize("module", [langevin, mala, hmc])
def test_generation_warm_up_and_inpainting_run_in_float64(module):
    """Fails if the momentum or white noise is float32: loops reject a carry of that type."""
    _, params, _ = random_mlp()
    with jax.enable_x64(True):
        conditionals = mlp_conditionals(module, in_float64(params), np.float64)
        sampler = conditionals.sampler._replace(K=1)
        conditionals = conditionals._replace(sampler=sampler)
        keys = noise.example_keys(jax.random.key(5), jnp.arange(2))
        x = jax.jit(lambda keys: ladder.generate(keys, conditionals, (5,)))(keys)
        known = jnp.tile(jnp.array([True, False, False, True, False]), (2, 1))
        inpainted = jax.eval_shape(
            lambda x: inpainting.inpaint(keys, conditionals, x, known, 2), x
        )
        assert x.dtype == inpainted.dtype == np.float64
        if module in (mala, hmc):
            adapted = jax.eval_shape(
                lambda keys: ladder.warm_up(keys, conditionals, (5,), 4, 0.65), keys
            )
            assert {a.dtype for a in adapted} == {np.dtype(np.float64)}
    assert np.all(np.isfinite(x))


def test_a_bfloat16_convolution_on_a_cpu_rounds_inputs_and_outputs():
    keys = jax.random.split(jax.random.key(0))
    with jax.default_device(jax.devices("cpu")[0]):
        x = jax.random.normal(keys[0], (2, 8, 8, 16)).astype(jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (3, 3, 16, 8)).astype(jnp.bfloat16)
        ours = jax.jit(conv3x3)(x, kernel)
        theirs = jax.jit(conv3x3)(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, lax.reduce_precision(theirs, 8, 7))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Output of the command for the shipped model, and its JSON values."""
    path = tmp_path_factory.mktemp("precision") / "precision.json"
    capture = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **_: capture.append(" ".join(args)))
        small = ("--images=8", "--K=10", "--samples=20", f"--json={path}")
        assert precision.main(["precision", *small]) == 0
    return "\n".join(capture), json.loads(path.read_text())


def test_the_command_prints_a_row_per_level_and_precision_and_verdicts(table):
    printed, result = table
    lines = printed.splitlines()
    assert len(lines) == 2 + 2 * T + 1 + 2 + 2
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "float32"], ["0", "bfloat16"]]
    assert "nan" not in printed
    numbers = [v for row in result["levels"] for v in row.values() if isinstance(v, float)]
    assert np.all(
        np.isfinite(
            [*numbers, *result["samples"].values(), *result["log_weight_error"].values()]
        )
    )
    assert "accept decisions accurate" in lines[-2]
    assert "accept decisions not accurate (" in lines[-1]


def test_float32_is_accurate_and_accept_decisions_in_bfloat16_are_not(table):
    """For the shipped model.

    The bound on chains is loose, since those at a kink diverge (3e-3 was observed). Fails if
    float32 and bfloat16 are exchanged.
    """
    rows = table[1]["levels"]
    single, half = (
        {row["level"]: row for row in rows if row["precision"] == name}
        for name in ("float32", "bfloat16")
    )
    for t in range(T):
        assert single[t]["f_error"] < 1e-6
        assert single[t]["F_error"] < (0.05 if t == 0 else 5e-4)
        assert single[t]["delta_F_error"] < (0.05 if t == 0 else 5e-4)
        assert single[t]["end_error_by_displacement"] < 2e-2
        assert single[t]["changed_decisions"] <= 0.01
        assert 5e-4 < half[t]["f_error"] < 3e-2
        assert 0.03 < half[t]["F_error"] < (1000 if t == 0 else 10)
        assert half[t]["delta_F_error"] > 100 * single[t]["delta_F_error"]
        assert 1e-3 < half[t]["end_error_by_displacement"] < 0.15
        assert half[t]["changed_decisions"] > 0.03


def test_log_weights_are_accurate_in_float32_and_not_in_bfloat16(table):
    """In nats, for annealing through all levels of the digits model, whose F is about 1e4.

    Fails if f is bfloat16 in place of float32.
    """
    errors = table[1]["log_weight_error"]
    assert 1e-4 < errors["float32"] < 0.03
    assert errors["bfloat16"] > 10


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model=nonesuch"], "'nonesuch'"),
        (["--precision=half"], "flag 'precision'"),
        (["--K=0"], "flag --K=0"),
        (["digits"], "argument 'digits'"),
    ],
)
def test_a_user_error_is_one_line_and_status_one(args, words, capsys):
    assert precision.main(["precision", *args]) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_the_network_of_a_model_can_be_replaced_by_one_in_bfloat16():
    model = drl_jax.load("digits_t6")
    energy = with_dtype(jnp.bfloat16, model.method.energy)
    low = Model.create(model.method._replace(energy=energy), model.params, model.mesh)
    x, t = np.full((6, 8, 8, 1), 0.3, np.float32), np.arange(6)
    assert low.log_density(x, t).dtype == np.float32
    np.testing.assert_allclose(low.f(x, t), model.f(x, t), atol=0.1)
    assert np.all(low.f(x, t) != model.f(x, t))
