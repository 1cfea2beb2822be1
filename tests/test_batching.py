from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.runtime import sharding
from drl_jax.runtime.batching import Engine


@pytest.fixture(scope="module")
def engine():
    """An engine with batches of at most 16 examples on all devices of this process."""
    return Engine(sharding.make_mesh(), batch_size=16)


def scale(shared, examples):
    return {"y": shared["factor"] * examples["x"], "index": examples["index"]}


@pytest.mark.parametrize("n", [0, 1, 5, 16, 17, 40])
def test_results_are_those_of_the_single_examples_in_order(engine, n):
    examples = {"x": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)}
    examples["index"] = np.arange(n)
    batches = engine.run(
        engine.compile(scale), {"factor": np.float32(2)}, engine.split(examples)
    )
    results = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    np.testing.assert_array_equal(results["y"], 2 * examples["x"])
    np.testing.assert_array_equal(results["index"], np.arange(n))


@pytest.mark.parametrize("n", [3, 16, 35])
def test_a_stream_of_examples_has_the_same_results_as_an_array(engine, n):
    x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    program = engine.compile(lambda shared, x: jnp.sum(x**2, axis=1))
    of_array, of_stream = (
        np.concatenate(list(engine.run(program, (), batches)))
        for batches in (engine.split(x), engine.stack(iter(x)))
    )
    np.testing.assert_array_equal(of_stream, of_array)


def test_all_batches_run_one_program_and_are_padded_with_the_last_example(engine):
    sizes, last = [], []

    def program(shared, x):
        sizes.append(len(x))
        return x

    compiled = engine.compile(program)

    def recorded(shared, x):
        last.append(np.asarray(x)[-1])
        return compiled(shared, x)

    x = np.arange(37, dtype=np.float32)[:, None]
    list(engine.run(recorded, (), engine.split(x)))
    assert sizes == [16 // engine.mesh.size]  # traced once, for the examples of one device
    np.testing.assert_array_equal(np.ravel(last), [15, 31, 36])


def test_exactly_one_further_batch_has_started_when_results_are_returned(engine):
    started = []

    def compiled(shared, x):
        started.append(np.asarray(x)[0, 0])
        return x

    batches = engine.run(compiled, (), engine.split(np.arange(64.0)[:, None]))
    for number, _ in enumerate(batches, start=1):
        assert len(started) == min(number + 1, 4)


def test_no_examples_have_no_results(engine):
    assert list(engine.run(engine.compile(scale), (), engine.stack(iter([])))) == []


def test_batch_size_is_rounded_up_to_a_multiple_of_the_number_of_devices():
    mesh = SimpleNamespace(size=8)
    assert Engine(mesh, batch_size=9).batch_size == 16
    assert Engine(mesh, batch_size=8).batch_size == 8
