"""The task inpaint, as run from the command line."""

import json
import re

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.storage import runs
from drl_jax.tasks import inpaint


@pytest.mark.slow
def test_the_grid_shows_known_pixels_mask_completions_and_original(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    hidden = np.zeros((8, 8), np.uint8)
    hidden[2:4, 5:] = 255
    Image.fromarray(hidden).save(tmp_path / "patch.PNG")
    command = ["--mode=inpaint", f"--workdir={workdir}", "--completions=2", "--rounds=1"]
    assert tiny.main(*command, f"--mask={tmp_path / 'patch.PNG'}", "--seed=3") == 0
    folder = workdir / "inpaintings" / f"step_{tiny.STEPS}_seed_3_patch"
    assert sorted(path.name for path in folder.iterdir()) == [
        "completed.npz",
        "grid.png",
        "metrics.json",
        "settings.json",
    ]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {
        "step",
        "completion_to_truth",
        "between_completions",
        "sample_to_truth",
        "coverage",
    }
    grid = np.asarray(Image.open(folder / "grid.png"))
    tiles = grid[8:, 8:].reshape(8, 72, 5, 72).swapaxes(1, 2)[..., :64:8, :64:8]
    original = tiles[:, -1]
    config = runs.load(workdir).config
    examples = pipeline.all_examples(config, sources.open_source(config), limit=8)
    np.testing.assert_allclose(
        original / 127.5 - 1, np.stack(list(examples))[..., 0], atol=0.5 / 127
    )
    checkerboard = np.where(np.indices((8, 8)).sum(0) % 2, 159, 96)
    np.testing.assert_array_equal(tiles[:, 0], np.where(hidden, checkerboard, original))
    np.testing.assert_array_equal(tiles[:, 1], np.broadcast_to(hidden, original.shape))
    for completion in (tiles[:, 2], tiles[:, 3]):
        np.testing.assert_array_equal(np.where(hidden, original, completion), original)
        assert np.mean(completion[:, hidden > 0] != original[:, hidden > 0]) > 0.5


@pytest.mark.slow
def test_given_files_are_completed(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    Image.new("RGB", (20, 30), (255, 255, 255)).save(tmp_path / "white.jpg")
    command = ["--mode=inpaint", f"--workdir={workdir}", "--completions=2", "--rounds=1"]
    assert tiny.main(*command, "--mask=random:0.3", f"--images={tmp_path / 'white.jpg'}") == 0
    folder = workdir / "inpaintings" / f"step_{tiny.STEPS}_seed_0_random_0.3"
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == (80, (5 * 9 + 1) * 8)
    assert np.all(grid[8:72, -72:-8] == 255)


@pytest.mark.slow
def test_changed_data_are_reported_if_their_images_are_completed(tmp_path, caplog):
    workdir = tiny.trained(copy=tmp_path / "run")
    record = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(record | {"data set": "other"}))
    command = ["--mode=inpaint", f"--workdir={workdir}", "--completions=2", "--rounds=1"]
    assert tiny.main(*command) == 0
    assert "not the data that the model was trained on (data set was" in caplog.text


def test_a_mask_file_hides_pixels_that_are_at_least_half_white(tmp_path):
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "mask.png")
    known, name = inpaint.load_mask(str(tmp_path / "mask.png"), (2, 2, 1), jax.random.key(0))
    np.testing.assert_array_equal(known[..., 0], [[True, True], [False, False]])
    assert name == "mask"
    for shape in ((4,), (4, 2), (2, 2, 2, 1)):
        with pytest.raises(UserError, match=r"mask\.png is an image, but .* are not"):
            inpaint.load_mask(str(tmp_path / "mask.png"), shape, jax.random.key(0))


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--mask=center"], "'center'.*'centre'"),
        (["--mask=random:1"], r"'random:1'.*in \(0, 1\)"),
        (["--mask=random:0.001"], "hides nothing"),
        (["--mask=small.png"], "4x8x1.*8x8"),
        (["--mask=black.png"], "hides nothing"),
        (["--mask=white.png"], "hides everything"),
        (["--mask=nonesuch.png"], "nonesuch.png"),
        (["--images=nonesuch.png"], "nonesuch.png"),
        (["--completions=1"], "completions.*1"),
        (["--rounds=0"], "rounds.*0"),
        (["--frames=4"], "--frames.*interpolate.*inpaint"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(tmp_path, monkeypatch, capsys, args, pattern):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 4), 255).save("small.png")
    Image.new("L", (8, 8), 0).save("black.png")
    Image.new("L", (8, 8), 255).save("white.png")
    workdir = epath.Path(tiny.trained())
    assert tiny.main("--mode=inpaint", f"--workdir={workdir}", *args) == 1
    errors = re.findall(r"^error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert len(errors) == 1
    assert re.search(pattern, errors[0])
    assert not (workdir / "inpaintings").exists()
