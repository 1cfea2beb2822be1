"""Labelled data of a run, and their classifier, which is replaced by one that records them."""

import numpy as np
from etils import epath
from helpers.examples import make_config, save, save_damaged

from drl_jax.data import sources
from drl_jax.metrics import classifier, labelled


def test_images_keep_their_labels_if_others_cannot_be_read(tmp_path, monkeypatch):
    """Image i is of the class i % 3 and has the value i % 3. Fails if labels start at 1."""
    for i in range(36):
        save(tmp_path / "abc"[i % 3] / f"{i:02d}.png", np.full((8, 8), i % 3, np.uint8))
    for i in (4, 6, 20):
        save_damaged(tmp_path / "abc"[i % 3] / f"{i:02d}.png")
    seen = []

    def of_data(config, source, x, labels, workdir):
        seen.append((x, labels))

    monkeypatch.setattr(classifier, "of_data", of_data)
    monkeypatch.setattr(labelled, "MIN_LABELLED", 1)
    monkeypatch.setattr(labelled, "MIN_COMPARED", 1)
    config = make_config(f"folder:{tmp_path}", classes=3, test_fraction=0.25)
    source = sources.open_source(config)
    data = labelled.load(config, source, 10, epath.Path(tmp_path))
    ((train, labels),) = seen
    for x, found in ((train, labels), (data.test, data.test_labels)):
        values = np.rint((x[:, 0, 0, 0] + 1) * 127.5)
        np.testing.assert_array_equal(values, found)
    assert {*labels} == {0, 1, 2}
    assert len(train) + len(data.test) == 33


def test_large_images_have_no_classifier(tmp_path):
    save(tmp_path / "a" / "0.png", np.zeros((8, 8), np.uint8))
    config = make_config(f"folder:{tmp_path}", classes=1, image_size=64)
    source = sources.open_source(config)
    assert labelled.load(config, source, 10, epath.Path(tmp_path)) is None
