"""Compares eight devices with one. Run as a program, this file computes on eight devices."""

import contextlib
import functools
import io
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import exact, tiny
from helpers.fixtures import assert_close
from helpers.runs import abstract_state, assert_same
from jax.tree_util import Partial

from drl_jax import config as config_lib
from drl_jax import method, noise
from drl_jax.data import mixtures, pipeline, sources
from drl_jax.errors import UserError
from drl_jax.metrics import density, ood
from drl_jax.model import Model
from drl_jax.runtime import sharding
from drl_jax.sampling import ladder
from drl_jax.storage import checkpoints, runs
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|send|recv)\b"
)


def main(workdir):
    """Computes on eight devices and on one of them, and writes the results to stdout."""
    one, eight = sharding.make_mesh(jax.devices()[:1]), sharding.make_mesh()
    result = {"devices": eight.size}
    result["noise"] = [noise_on(mesh) for mesh in (one, eight)]
    result["scores"] = [scores_on(mesh) for mesh in (one, eight)]
    result["weights"] = [weights_on(mesh) for mesh in (one, eight)]
    result["particles"] = [particles_on(mesh) for mesh in (one, eight)]

    config = make_config()
    fsdp = sharding.make_mesh(fsdp=4)

    def on_all_meshes(config):
        start = jax.tree.map(np.array, trained(config, one, None, first=0, steps=20))
        return [
            trained(config, one, start, first=20, steps=5),
            trained(config, eight, start, first=20, steps=5),
            trained(config, fsdp, start, first=20, steps=5, accumulate=2),
        ]

    states = on_all_meshes(config)
    result["fractions"] = [fraction_on_first_device(state) for state in states]
    result["states"] = [jax.tree.map(np.asarray, state) for state in states]
    cooperative = on_all_meshes(with_initialiser(config))
    result["cooperative"] = [jax.tree.map(np.asarray, state) for state in cooperative]
    result["restored"] = restored(f"{workdir}/moved", config, states[0])
    result["chains"], result["step"] = compiled(config, eight)

    def run(name, **changes):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            args = tiny.training(f"{workdir}/{name}", train__num_steps=3, **changes)
            return tiny.main(*args), stderr.getvalue()

    result["batch of 12"] = run("refused", train__batch_size=12)
    result["accumulate 3"] = run("refused", train__accumulate=3)
    result["fsdp of 3"] = run("refused", mesh__fsdp=3)
    result["data of 2"] = run("refused", mesh__data=2, mesh__fsdp=2)
    result["width of 12"] = run("trained", energy__ch=12, mesh__fsdp=8, train__accumulate=2)
    sys.stdout.buffer.write(pickle.dumps(result))


def make_config():
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1)
    config.energy.update(ch=8, mult=(1,), N=1)
    config.mcmc.K = 10
    config.train.batch_size = 16
    config.optim.update(learning_rate=1e-3, warmup_steps=200)
    return config


def with_initialiser(config):
    """Returns the configuration with an initialiser, from which all chains start."""
    config = config.copy_and_resolve_references()
    config.mcmc.update(start="initialiser", K=3)
    # With one channel per group, biases that a normalisation follows would have gradients of
    # rounding errors only, which Adam turns into steps of full length.
    config.initialiser.update(network="unet", ch=8, mult=(1, 1), N=1, groups=2, dropout=0.1)
    config.initialiser.update(learning_rate=1e-3, warmup_steps=10, first_step=0)
    config.optim.clip_norm = 1.0
    return config


def noise_on(mesh):
    """Draws noise for 16 examples, each on the device that holds the example."""
    key, examples = jax.random.key(3), jnp.arange(16)

    @functools.partial(jax.jit, out_shardings=sharding.by_example(mesh))
    def draw(examples):
        keys = noise.example_keys(jax.random.fold_in(key, 7), examples)
        return sharding.over_examples(lambda _, k: noise.normal(k, (8, 8, 1)), mesh)((), keys)

    return np.asarray(draw(examples))


def weights_on(mesh):
    """Weights 12 chains, which eight devices pad to 16."""
    data = mixtures.PLANAR_SHAPES["ellipse"]()
    budget = density.DEFAULT._replace(chains=12, distributions=50, transitions=2, burn_in=5)
    x = np.asarray(data.sample(noise.example_keys(jax.random.key(0), jnp.arange(12))))
    model, key = exact.model(data, 6, mesh=mesh), jax.random.key(1)
    begun = density.begin(model, key, x, budget)
    *_, end = density.annealed(model, key, begun, budget, passes=("levels",))
    return end.passes["levels"].log_weight


def particles_on(mesh):
    """Moves 16 particles of two problems, which are resampled across devices."""
    data = mixtures.PLANAR_SHAPES["ellipse"]()
    likelihood = Partial(
        lambda observed, x: -2 * jnp.sum((x - observed) ** 2, axis=1),
        np.array([[0.3, 0.1], [-0.5, 0.2]], np.float32),
    )
    model = exact.model(data, 6, mesh=mesh)
    return model.smc(jax.random.key(0), likelihood, 2, 16, width=0.5, bridges=2)


def scores_on(mesh):
    """Scores 11 digits with the model that comes with the package, in batches of 8."""
    config, shipped, _ = runs.load("digits_t6")
    images = pipeline.all_examples(config, sources.open_source(config), limit=11)
    model = Model.create(shipped.method, shipped.params, mesh, batch_size=8)
    return tuple(ood.Scorer(model)(jax.random.key(0), images))


def trained(config, mesh, state, first, steps, accumulate=1):
    """Trains on a mesh from step `first`, and returns the state."""
    learned = method.from_config(config)
    training = train_step.from_config(config)._replace(accumulate=accumulate)
    if state is None:
        create = jax.jit(
            lambda key: train_state.create(key, learned.energy, training.optimiser)
        )
        state = create(jax.random.key(0))
    shardings = train_state.shardings(learned.energy, training.optimiser, mesh)
    state = jax.device_put(jax.tree.map(np.array, state), shardings)
    step = train_step.compile_step(mesh, learned, training)
    source = sources.open_source(config)
    batches = pipeline.training_batches(config, source, start_step=first)
    for _ in range(steps):
        x = jax.device_put(next(batches)["image"], sharding.by_example(mesh))
        state, _ = step(state, {"image": x}, jax.random.key(1))
    return state


def fraction_on_first_device(state):
    """Returns the fraction of a state's kernels, in bytes, that the first device holds."""
    kernels = [a for a in jax.tree.leaves(state) if a.ndim > 1]
    first = [a.addressable_shards[0].data for a in kernels]
    return sum(a.nbytes for a in first) / sum(a.nbytes for a in kernels)


def restored(workdir, config, state):
    """Saves a state on eight devices, restores and saves it on two, and again on eight."""
    for devices, fsdp in ((8, 1), (2, 2), (8, 4)):
        mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
        with checkpoints.Checkpoints(epath.Path(workdir), config) as manager:
            if devices == 8 and fsdp == 1:
                state = jax.device_put(jax.tree.map(np.array, state), sharding.replicated(mesh))
            else:
                _, state = manager.restore(
                    abstract_state, functools.partial(sharding.fully_sharded, mesh=mesh)
                )
            state = state.replace(step=state.step + 1)
            manager.save(int(state.step), state)
    return fraction_on_first_device(state), jax.tree.map(np.asarray, state)


def compiled(config, mesh):
    """Returns the compiled programs of the chains alone and of a training step, as text."""
    learned, training = method.from_config(config), train_step.from_config(config)
    whole, split = sharding.replicated(mesh), sharding.by_example(mesh)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
        abstract_state(config),
    )
    x = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32, sharding=split)
    t = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split)
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split)

    def chains(params, examples):
        keys, x_tilde, t = examples
        return ladder.sample_conditional(keys, learned.conditionals(params), x_tilde, t)

    step = train_step.compile_step(mesh, learned, training)
    return (
        jax.jit(sharding.over_examples(chains, mesh))
        .lower(state.params, (keys, x, t))
        .compile()
        .as_text(),
        step.lower(state, {"image": x}, key).compile().as_text(),
    )


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The results of `main`, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("eight")
    flags = f"--xla_force_host_platform_device_count=8 {tiny.COMPILE_FAST}"
    done = subprocess.run(
        [sys.executable, __file__, folder],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    result = pickle.loads(done.stdout)
    assert result["devices"] == 8
    return result | {"folder": epath.Path(folder)}


@pytest.mark.slow
def test_an_example_gets_the_same_noise_on_one_and_on_eight_devices(eight):
    on_one, on_eight = eight["noise"]
    np.testing.assert_array_equal(on_one, on_eight)
    assert len(np.unique(on_one)) > 0.99 * on_one.size


@pytest.mark.slow
def test_images_have_the_same_scores_on_one_and_on_eight_devices(eight):
    for on_one, on_eight in zip(*eight["scores"], strict=True):
        assert on_one.shape == (6, 11)
        for of_level in zip(on_eight, on_one, strict=True):
            assert_close(*of_level, 2e-5)


@pytest.mark.slow
def test_weights_of_annealed_chains_do_not_depend_on_the_number_of_devices(eight):
    on_one, on_eight = eight["weights"]
    np.testing.assert_allclose(on_eight, on_one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_particles_that_are_resampled_do_not_depend_on_the_number_of_devices(eight):
    on_one, on_eight = eight["particles"]
    assert np.min(on_one.effective_sample_size) < 8  # so that they are resampled
    for one, other in zip(on_one, on_eight, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["states", "cooperative"])
def test_training_does_not_depend_on_the_mesh_or_on_gradient_accumulation(eight, kind):
    """Five steps end in states equal to 1e-5 of the largest entry of each array.

    The meshes are 1 x 1, 8 x 1 and 2 x 4 (data x fsdp), the last one with gradient
    accumulation. The five steps do not start at initialisation, where the gradients of weights
    of 1e-10 are only rounding errors, which Adam turns into steps of full length (errors of up
    to 9e-6). 'cooperative' is with an initialiser, whose gradient is clipped.
    """
    on_one, *others = eight[kind]
    assert len(others) == 2
    for other in others:
        assert on_one.step == other.step == 25
        for a, b in zip(jax.tree.leaves(on_one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.slow
def test_fsdp_divides_the_training_state_of_kernels(eight):
    """Parameters, average and Adam's moments; with ch = 8 every kernel is divisible by 4."""
    assert eight["fractions"] == [1, 1, 0.25]


@pytest.mark.slow
def test_a_state_is_unchanged_by_moving_to_other_meshes(eight):
    """From 8 x 1 to 1 x 2 to 2 x 4 (data x fsdp)."""
    fraction, state = eight["restored"]
    assert fraction == 0.25
    assert_same(state.replace(step=state.step - 3), eight["states"][0])


@pytest.mark.slow
def test_the_chains_of_eight_devices_do_not_communicate(eight):
    assert " while(" in eight["chains"]
    assert not COLLECTIVE.search(eight["chains"])


@pytest.mark.slow
def test_a_training_step_does_not_communicate_inside_loops(eight):
    computations = dict(
        re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", eight["step"], re.M | re.S)
    )
    communicating = {name for name, text in computations.items() if COLLECTIVE.search(text)}
    assert communicating  # the mean of the gradients
    in_loops = set(re.findall(r"body=%?([\w.-]+)", eight["step"]))
    assert in_loops
    while (
        called := {
            name
            for caller in in_loops
            for name in re.findall(r"=%?([\w.-]+)", computations[caller])
            if name in computations
        }
        - in_loops
    ):
        in_loops |= called
    assert not communicating & in_loops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("batch of 12", ["config.train.batch_size is 12", "8 devices", "use 8 or 16"]),
        ("accumulate 3", ["config.train.batch_size is 16", "accumulate = 3", "use 24"]),
        ("fsdp of 3", ["config.mesh", "fsdp = 3", "8 devices", "1, 2, 4, 8"]),
        ("data of 2", ["config.mesh", "data = 2", "fsdp = 2", "8 devices"]),
    ],
)
def test_a_batch_or_mesh_that_does_not_divide_is_an_error(eight, run, words):
    status, stderr = eight[run]
    assert status == 1
    assert re.fullmatch(r"error: [^\n]*\n", stderr)
    assert all(word in stderr for word in words), stderr
    assert not (eight["folder"] / "refused").exists()


@pytest.mark.slow
def test_kernels_that_do_not_divide_are_named_and_replicated(eight):
    _, stderr = eight["width of 12"]
    assert re.search(r"fsdp = 8 .* conv_in/kernel", stderr)


@pytest.mark.slow
def test_one_device_loads_what_eight_devices_trained(eight):
    status, stderr = eight["width of 12"]
    assert status == 0, stderr
    assert (eight["folder"] / "trained" / "samples.png").exists()
    run = runs.load(eight["folder"] / "trained")
    assert run.step == 3
    assert run.model.sample(jax.random.key(0), 2).shape == (2, 8, 8, 1)


EIGHT = jax.sharding.AbstractMesh((4, 2), sharding.AXES)


@pytest.mark.parametrize(
    ("batch_size", "nearest"),
    [(12, "use 8 or 16"), (5, "use 8"), (17, "use 16 or 24"), (30, "use 24 or 32")],
)
def test_the_error_names_the_nearest_batch_sizes_that_divide(batch_size, nearest):
    with pytest.raises(UserError) as error:
        sharding.require_divisible(batch_size, EIGHT, "train.batch_size")
    assert f"config.train.batch_size is {batch_size}," in str(error.value)
    assert "8 devices" in str(error.value)
    assert str(error.value).endswith(nearest)


def test_a_batch_that_divides_is_accepted():
    sharding.require_divisible(24, EIGHT, "train.batch_size")
    sharding.require_divisible(48, EIGHT, "train.batch_size", accumulate=3)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 3, 8, 16), (None, None, None, "fsdp")),
        ((3, 3, 16, 8), (None, None, "fsdp")),
        ((3, 3, 8, 8), (None, None, None, "fsdp")),
        ((3, 3, 5, 1), ()),  # no axis is divisible by 2
        ((8,), ()),  # vectors are replicated
        ((), ()),
    ],
)
def test_fsdp_splits_the_longest_axis_that_divides(shape, axes):
    assert tuple(sharding.fully_sharded(shape, EIGHT).spec) == axes


if __name__ == "__main__":
    main(sys.argv[1])
