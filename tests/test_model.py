import weakref

import jax
import numpy as np
import pytest
from etils import epath
from helpers import exact
from ml_collections import ConfigDict

from drl_jax.data import mixtures
from drl_jax.model import Run
from drl_jax.tasks import common, sample


@pytest.fixture
def model():
    data = mixtures.gaussian(np.zeros(4), np.eye(4))
    return exact.model(data, 6, shape=(2, 2, 1))


def test_the_next_batch_is_begun_before_the_one_at_hand_is_given_out(model):
    """And none after it: what waits on the devices does not grow."""
    begun = []

    def compiled(params, tuning, key, numbers, examples, settings):
        begun.append(np.asarray(numbers).tolist())
        return numbers

    size = model._batch_size
    n = 3 * size + 1
    batches = model.batches(compiled, jax.random.key(0), np.arange(n))
    found = []
    for i, batch in enumerate(batches, 1):
        found += batch.tolist()
        assert len(begun) == min(i + 1, 4)
    assert found == list(range(n))
    assert begun[3] == [n - 1] * size


def test_samples_are_written_as_they_come(model, monkeypatch, tmp_path):
    """Of the batches the one at hand is held, and what the grid shows; the files are whole.

    Fails where empty slices of the batches are kept for the grid (tried).
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (700, 2, 2, 1)).astype(np.float32)
    drawn = []

    def draw(*_):
        for start in range(0, len(x), 150):
            assert sum(each() is not None for each in drawn) <= 2
            batch = x[start : start + 150].copy()
            drawn.append(weakref.ref(batch))
            yield batch

    monkeypatch.setattr(common, "draw", draw)
    run = Run(ConfigDict(), model, 5)
    monkeypatch.setattr(sample.model_lib, "load_run", lambda *_: run)
    monkeypatch.setattr(common, "adapt", lambda *_: None)
    sample.run(epath.Path(tmp_path), lambda config: config, 700, 0)
    folder = tmp_path / "samples" / "step_5_seed_0"
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), x)
    assert len(list(folder.iterdir())) == 702
