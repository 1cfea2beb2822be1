import json
import logging

import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.examples import make_config, one_line, save

from drl_jax.data import sources
from drl_jax.errors import UserError
from drl_jax.storage import data_record


def folder_of(path, count):
    """Writes images to a folder, and returns the source that reads them."""
    for i in range(count):
        save(path / f"{i}.png", np.full((8, 8), i, np.uint8))
    return sources.open_source(make_config(f"folder:{path}"))


@pytest.fixture(autouse=True)
def _only_warnings(caplog):
    caplog.set_level(logging.WARNING, logger="drl_jax")


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return epath.Path(tmp_path / "run")


def test_data_that_moved_are_the_same(tmp_path, workdir, caplog):
    data_record.update(workdir, folder_of(tmp_path / "a", 3), resumed=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "c")
    moved = sources.open_source(make_config(f"folder:{tmp_path}/b/c/"))
    data_record.update(workdir, moved, resumed=True)
    data_record.warn_if_changed(workdir, moved)
    assert not caplog.records
    assert json.loads((workdir / "data.json").read_text())["folder"] == f"{tmp_path}/b/c"


def test_data_that_changed_are_reported_once_when_a_run_resumes(tmp_path, workdir, caplog):
    data_record.update(workdir, folder_of(tmp_path / "a", 5), resumed=False)
    for i in (1, 3):
        (tmp_path / "a" / f"{i}.png").unlink()
    source = folder_of(tmp_path / "a", 0)
    data_record.warn_if_changed(workdir, source)
    data_record.update(workdir, source, resumed=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    for line in caplog.messages:
        assert "number of images was 5, now 3" in line
    assert "have changed" in caplog.messages[1]
    caplog.clear()
    data_record.update(workdir, source, resumed=True)
    assert not caplog.records


def test_an_image_that_was_replaced_by_another_of_the_same_name_is_reported(
    tmp_path, workdir, caplog
):
    data_record.update(workdir, folder_of(tmp_path / "a", 2), resumed=False)
    save(tmp_path / "a" / "1.png", np.random.default_rng(0).integers(0, 99, (8, 8), np.uint8))
    data_record.update(workdir, folder_of(tmp_path / "a", 0), resumed=True)
    assert "bytes was" in caplog.text
    assert "number of images" not in caplog.text


def test_images_that_were_renamed_are_reported(tmp_path, workdir, caplog):
    """They come in another order, as do the test images."""
    data_record.update(workdir, folder_of(tmp_path / "a", 2), resumed=False)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "2.png")
    data_record.update(workdir, folder_of(tmp_path / "a", 0), resumed=True)
    assert "digest of names was" in caplog.text
    assert "bytes was" not in caplog.text


def test_other_data_in_another_place_are_refused_unless_they_may_differ(
    tmp_path, workdir, caplog
):
    data_record.update(workdir, folder_of(tmp_path / "cats", 2), resumed=False)
    dogs = folder_of(tmp_path / "dogs", 3)
    with pytest.raises(UserError) as error:
        data_record.update(workdir, dogs, resumed=True)
    for words in ("cats", "dogs", "was 2, now 3", "--workdir", "--resume_with_changes"):
        assert words in one_line(error)
    data_record.update(workdir, dogs, resumed=True, may_differ=True)
    assert "have changed" in caplog.text
    assert data_record.differences(data_record.read(workdir), dogs) == []


def test_data_are_not_compared_with_those_of_a_run_that_was_never_trained(
    tmp_path, workdir, caplog
):
    data_record.update(workdir, folder_of(tmp_path / "cats", 2), resumed=False)
    data_record.update(workdir, folder_of(tmp_path / "dogs", 3), resumed=False)
    assert not caplog.records


def test_the_parts_of_a_data_set_have_its_fingerprint(tmp_path, workdir, caplog):
    folder_of(tmp_path / "a", 4)
    config = make_config(f"folder:{tmp_path}/a", test_fraction=0.5)
    data_record.update(workdir, sources.open_source(config), resumed=False)
    data_record.warn_if_changed(workdir, sources.open_held_out(config))
    assert not caplog.records


def test_a_bucket_does_not_tell_sizes_which_are_then_not_compared(tmp_path, workdir):
    source = folder_of(tmp_path / "a", 2)
    record = {"folder": "gs://bucket/a", **source.fingerprint}
    del record["bytes"]
    assert data_record.differences(record, source) == []


@pytest.mark.parametrize("name", ["digits", "digits/model.npz"])
def test_a_model_without_a_record_has_no_data_to_compare(tmp_path, caplog, name):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "model.npz").write_bytes(b"")
    data_record.warn_if_changed(tmp_path / name, sources.open_source(make_config()))
    assert not caplog.records


def test_a_damaged_record_is_one_line(workdir):
    (workdir / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"^cannot read \S*data\.json: [^\n]*$"):
        data_record.read(workdir)


@pytest.mark.slow
def test_a_run_resumes_where_its_data_have_moved_to_and_reports_what_changed(tmp_path, caplog):
    """Fails if the path is compared, or if the data are not."""
    caplog.set_level(logging.INFO, logger="drl_jax")
    workdir = tmp_path / "run"
    folder_of(tmp_path / "a", 30)

    def train(path, num_steps):
        changes = {"data__name": f"folder:{path}", "train__num_steps": num_steps}
        return tiny.main(*tiny.training(workdir, **changes))

    assert train(tmp_path / "a", 2) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert train(f"{tmp_path}/b/", 3) == 0
    assert "resuming from step 2 of 3" in caplog.text
    assert "have changed" not in caplog.text
    for i in range(21, 30):
        (tmp_path / "b" / f"{i}.png").unlink()
    evaluate = (
        "--mode=evaluate",
        f"--workdir={workdir}",
        f"--config.data.name=folder:{tmp_path}/b",
    )
    assert tiny.main(*evaluate) == 0
    assert "not the data that the model was trained on" in caplog.text
    assert train(tmp_path / "b", 4) == 0
    assert "have changed since this run was trained" in caplog.text
