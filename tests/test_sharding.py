"""Eight devices against one. Run as a program, this file is what happens on the eight."""

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
from helpers import exact, random_inception, tiny
from helpers.fixtures import assert_close
from helpers.runs import assert_same

from drl_jax import config as config_lib
from drl_jax import method, model, noise
from drl_jax.data import mixtures, pipeline
from drl_jax.errors import UserError
from drl_jax.metrics import density, inception, ood
from drl_jax.runtime import sharding
from drl_jax.storage import checkpoints, exported
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|send|recv)\b"
)


def main(workdir):
    """Works on eight devices, and on one of them, and prints what came out, pickled."""
    one, eight = sharding.make_mesh(jax.devices()[:1]), sharding.make_mesh()
    result = {"devices": eight.size}
    result["noise"] = [noise_of(mesh) for mesh in (one, eight)]
    result["features"] = [features_on(mesh) for mesh in (one, eight)]
    result["scores"] = [scores_on(mesh) for mesh in (one, eight)]

    result["bounds"] = [bounds_on(mesh) for mesh in (one, eight)]

    config = make_config()
    folded = sharding.make_mesh(fsdp=4)
    start = jax.tree.map(np.array, trained(config, one, None, 0, 20))
    states = [
        trained(config, one, start, 20, 5),
        trained(config, eight, start, 20, 5),
        trained(config, folded, start, 20, 5),
        trained(config, eight, start, 20, 5, parts=2),
        trained(config, folded, start, 20, 5, parts=2),
    ]
    result["held"] = [held(state) for state in states]
    result["states"] = [jax.tree.map(np.asarray, state) for state in states]
    result["restored"] = restored(f"{workdir}/moved", config, states[0])
    result["chains"], result["step"] = compiled(config, eight)

    def run(name, **changes):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            args = tiny.training(f"{workdir}/{name}", train__num_steps=3, **changes)
            return tiny.main(*args), told.getvalue()

    result["batch of 12"] = run("refused", train__batch_size=12)
    result["3 parts"] = run("refused", train__parts=3)
    result["fsdp of 3"] = run("refused", mesh__fsdp=3)
    result["data of 2"] = run("refused", mesh__data=2, mesh__fsdp=2)
    result["width of 12"] = run("wide", energy__ch=12, mesh__fsdp=8, train__parts=2)
    result["batch of 16"] = run("trained", train__batch_size=16)
    sys.stdout.buffer.write(pickle.dumps(result))


def make_config():
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1)
    config.energy.update(ch=8, mult=(1,), N=1)
    config.mcmc.K = 10
    config.train.batch_size = 16
    config.optim.update(learning_rate=1e-3, warmup_steps=200)
    return config


def noise_of(mesh):
    """The noise of 16 examples, drawn where each lies."""
    key, examples = jax.random.key(3), jnp.arange(16)

    @functools.partial(jax.jit, out_shardings=sharding.by_example(mesh))
    def draw(examples):
        keys = noise.example_keys(jax.random.fold_in(key, 7), examples)
        return sharding.over_examples(lambda _, k: noise.normal(k, (8, 8, 1)), mesh)((), keys)

    return np.asarray(draw(examples))


def bounds_on(mesh):
    """Bounds of log Z by 12 chains, which eight devices fill up to 16."""
    data = mixtures.PLANE["ellipse"]()
    budget = density.DEFAULT._replace(chains=12, rungs=50, transitions=2, burn_in=5)
    x = np.asarray(pipeline.sample(noise.example_keys(jax.random.key(0), jnp.arange(12))))
    found = density.log_partition(exact.model(data, 6, mesh=mesh), jax.random.key(1), x, budget)
    return jax.tree.leaves(found)


def features_on(mesh):
    """The Inception network's features of 5 images, in a batch of 8."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    extractor = inception.Extractor(random_inception.variables(), mesh, batch_size=8)
    (batch,) = extractor(images)
    return batch


def scores_on(mesh):
    """The shipped model's scores of 11 digits, in batches of 8."""
    config, shipped, _ = exported.load("digits")
    x = np.stack(list(pipeline.all_images(config, limit=11)))
    placed = model.Model(shipped.method, shipped.params, mesh)
    return tuple(ood.Scorer(placed, batch_size=8)(jax.random.key(0), x))


def trained(config, mesh, state, first, n, parts=1):
    """The state after n more steps on the devices of a mesh."""
    learned, optimiser = method.from_config(config), train_state.optimiser(config)
    if state is None:
        create = jax.jit(lambda key: train_state.create(key, learned.energy, optimiser))
        state = create(jax.random.key(0))
    shardings = train_state.shardings(learned.energy, optimiser, mesh)
    state = jax.device_put(jax.tree.map(np.array, state), shardings)
    step = train_step.compile_for(mesh, learned, optimiser, config.optim.ema_decay, parts)
    batches = pipeline.training_batches(config, start_step=first)
    for _ in range(n):
        x = jax.device_put(next(batches)["image"], sharding.by_example(mesh))
        state, _ = step(state, x, jax.random.key(1))
    return state


def held(state):
    """What the first device holds, of all the bytes of a state's kernels."""
    kernels = [a for a in jax.tree.leaves(state) if a.ndim > 1]
    first = [a.addressable_shards[0].data for a in kernels]
    return sum(a.nbytes for a in first) / sum(a.nbytes for a in kernels)


def restored(workdir, config, state):
    """A state saved by eight devices, two and eight again, each from the one before."""
    for devices, fsdp in ((8, 1), (2, 2), (8, 4)):
        mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
        with checkpoints.Checkpoints(epath.Path(workdir), config) as manager:
            if devices == 8 and fsdp == 1:
                state = jax.device_put(jax.tree.map(np.array, state), sharding.replicated(mesh))
            else:
                _, state = manager.restore(
                    model.abstract_state,
                    functools.partial(sharding.fully_sharded, mesh=mesh),
                )
            state = state.replace(step=state.step + 1)
            manager.save(state)
    return held(state), jax.tree.map(np.asarray, state)


def compiled(config, mesh):
    """The compiled programs of the chains alone, and of a whole step."""
    learned, optimiser = method.from_config(config), train_state.optimiser(config)
    whole, split = sharding.replicated(mesh), sharding.by_example(mesh)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
        model.abstract_state(config),
    )
    x = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32, sharding=split)
    t = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split)
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split)

    def chains(params, examples):
        keys, x, t = examples
        return train_step.negatives(keys, params, x, t, learned)

    step = train_step.compile_for(mesh, learned, optimiser, 0.99)
    return (
        jax.jit(sharding.over_examples(chains, mesh))
        .lower(state.params, (keys, x, t))
        .compile()
        .as_text(),
        step.lower(state, x, key).compile().as_text(),
    )


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What `main` printed, and the folder of its run."""
    folder = tmp_path_factory.mktemp("eight")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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
def test_an_example_meets_the_same_noise_on_one_and_on_eight_devices(eight):
    on_one, on_eight = eight["noise"]
    np.testing.assert_array_equal(on_one, on_eight)
    assert len(np.unique(on_one)) > 0.99 * on_one.size


@pytest.mark.slow
def test_images_have_the_same_features_on_one_and_on_eight_devices(eight):
    on_one, on_eight = eight["features"]
    for name in ("2048", "logits_unbiased"):
        assert len(on_one[name]) == 5
        assert_close(on_eight[name], on_one[name], 1e-5)


@pytest.mark.slow
def test_images_have_the_same_scores_on_one_and_on_eight_devices(eight):
    for on_one, on_eight in zip(*eight["scores"], strict=True):
        assert on_one.shape == (6, 11)
        for of_level in zip(on_eight, on_one, strict=True):
            assert_close(*of_level, 2e-5)


@pytest.mark.slow
def test_bounds_of_log_Z_do_not_depend_on_the_number_of_devices(eight):
    one, many = eight["bounds"]
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_five_steps_end_in_equal_states_on_any_mesh_and_in_any_parts(eight):
    """Equal to 1e-5 of the greatest entry of each array.

    On 1 x 1, 8 x 1 and 2 x 4 devices, data x fsdp, at once and in two parts.
    From a state that has left its start: there, weights of 1e-10 have gradients of rounding
    alone, which Adam turns into steps of full length (their error reaches 9e-6).
    """
    on_one, *others = eight["states"]
    assert len(others) == 4
    for other in others:
        assert on_one.step == other.step == 25
        for a, b in zip(jax.tree.leaves(on_one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.slow
def test_along_fsdp_a_device_holds_its_part_of_what_training_carries(eight):
    """Parameters, average and Adam's moments; of ch = 8 every kernel divides by 4."""
    assert eight["held"] == [1, 1, 0.25, 1, 0.25]


@pytest.mark.slow
def test_a_state_moves_from_eight_devices_to_two_and_back_unchanged(eight):
    """From 8 x 1 to 1 x 2 to 2 x 4, data x fsdp."""
    part, state = eight["restored"]
    assert part == 0.25
    assert_same(state.replace(step=state.step - 3), eight["states"][0])


@pytest.mark.slow
def test_the_chains_of_eight_devices_do_not_communicate(eight):
    assert " while(" in eight["chains"]
    assert not COLLECTIVE.search(eight["chains"])


@pytest.mark.slow
def test_a_step_on_eight_devices_communicates_outside_its_loops_alone(eight):
    computations = dict(
        re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", eight["step"], re.M | re.S)
    )
    found = {name for name, text in computations.items() if COLLECTIVE.search(text)}
    assert found  # the gradients' mean
    inside = set(re.findall(r"body=%?([\w.-]+)", eight["step"]))
    assert inside
    while (
        calls := {
            called
            for name in inside
            for called in re.findall(r"=%?([\w.-]+)", computations[name])
            if called in computations
        }
        - inside
    ):
        inside |= calls
    assert not found & inside


@pytest.mark.slow
def test_a_batch_that_eight_devices_cannot_share_is_refused(eight):
    status, told = eight["batch of 12"]
    assert status == 1
    assert re.fullmatch(
        r"error: config.train.batch_size is 12, .* 8 devices: use 8 or 16\n", told
    )
    assert not (eight["folder"] / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("3 parts", r"train.batch_size is 16, .* 8 devices times 3 parts: use 24"),
        ("fsdp of 3", r"mesh is fsdp = 3, and there are 8 devices: fsdp can be 1, 2, 4, 8,.*"),
        ("data of 2", r"mesh is data = 2 times fsdp = 2, and there are 8 devices: .*"),
    ],
)
def test_a_mesh_or_parts_that_do_not_divide_are_refused(eight, run, told):
    status, said = eight[run]
    assert status == 1
    assert re.fullmatch(rf"error: config.{told}\n", said)


@pytest.mark.slow
def test_kernels_that_do_not_divide_are_named_and_stay_whole(eight):
    status, said = eight["width of 12"]
    assert status == 0, said
    assert re.search(r"fsdp = 8 divides no axis of conv_in/kernel, .*: whole on", said)


@pytest.mark.slow
def test_what_eight_devices_trained_one_can_load(eight):
    status, told = eight["batch of 16"]
    assert status == 0, told
    assert (eight["folder"] / "trained" / "samples.png").exists()
    run = model.load_run(eight["folder"] / "trained")
    assert run.step == 3
    assert run.model.sample(jax.random.key(0), 2).shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(12, "use 8 or 16"), (5, "use 8"), (17, "use 16 or 24")]
)
def test_an_unequal_batch_is_refused_with_the_nearest_that_work(batch_size, nearest):
    mesh = jax.sharding.AbstractMesh((4, 2), sharding.AXES)
    with pytest.raises(UserError, match=rf"train.batch_size is {batch_size}, .*: {nearest}$"):
        sharding.require_divisible(batch_size, mesh, "train.batch_size")


def test_an_equal_batch_is_taken():
    mesh = jax.sharding.AbstractMesh((4, 2), sharding.AXES)
    sharding.require_divisible(24, mesh, "train.batch_size")


if __name__ == "__main__":
    main(sys.argv[1])
