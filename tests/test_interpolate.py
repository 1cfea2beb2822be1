"""The task interpolate, as run from the command line."""

import json
import re

import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax.model import Model
from drl_jax.storage import runs
from drl_jax.tasks import interpolate


def save_grey(path, value, size=(8, 8)):
    Image.new("L", size, value).save(path)
    return path


@pytest.mark.slow
def test_between_samples_there_is_one_strip_and_one_number_per_pair(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    command = ["--mode=interpolate", f"--workdir={workdir}", "--pairs=3", "--frames=5"]
    assert tiny.main(*command, "--seed=4") == 0
    folder = workdir / "interpolations" / f"step_{tiny.STEPS}_seed_4_samples_level_5"
    assert sorted(path.name for path in folder.iterdir()) == [
        "000.png",
        "001.png",
        "002.png",
        "grid.png",
        "metrics.json",
        "settings.json",
        "strips.npz",
    ]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.pop("step") == tiny.STEPS
    assert {name: len(values) for name, values in metrics.items()} == {
        "smoothness": 3,
        "length": 3,
        "distance": 3,
    }
    assert all(1 < s < 4 for s in metrics["smoothness"])
    assert np.all(np.greater_equal(metrics["length"], metrics["distance"]))
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == ((3 * 9 + 1) * 8, (5 * 9 + 1) * 8)
    strip = np.asarray(Image.open(folder / "001.png"))
    np.testing.assert_array_equal(grid[9 * 8 : (2 * 9 + 1) * 8], strip)


@pytest.mark.slow
def test_given_images_are_shown_at_the_ends_of_their_strip(tmp_path):
    workdir = tiny.trained(copy=tmp_path / "run")
    # Of another size than the model's images, so that they must be prepared.
    files = [save_grey(tmp_path / f"{v}.png", v, (16, 20)) for v in (0, 255, 102, 153)]
    command = ["--mode=interpolate", f"--workdir={workdir}", "--frames=3"]
    assert tiny.main(*command, f"--images={','.join(map(str, files))}", "--level=1") == 0
    folder = workdir / "interpolations" / f"step_{tiny.STEPS}_seed_0_images_level_1"
    corners = np.asarray(Image.open(folder / "grid.png"))[8::72, 8::72]
    assert corners.shape == (2, 5)
    np.testing.assert_array_equal(corners[:, [0, -1]], [[0, 255], [102, 153]])
    assert len(json.loads((folder / "metrics.json").read_text())["smoothness"]) == 2


def test_the_metrics_are_those_of_the_recovered_frames(tmp_path, monkeypatch):
    """Also checks the default level of given images, a third of T = 6."""
    steps = np.array([[0.0, 0.1, 0.5, 0.4]])
    strips = np.broadcast_to(steps[..., None, None, None], (1, 4, 8, 8, 1))
    monkeypatch.setattr(Model, "interpolate_images", lambda *_: strips)
    files = [str(save_grey(tmp_path / f"{v}.png", v)) for v in (0, 255)]
    interpolate.run(
        run=runs.load("digits_t6"),
        workdir=epath.Path(tmp_path),
        images=files,
        pairs=1,
        frames=4,
        level=None,
        label=None,
        guidance=0.0,
        seed=0,
    )
    (folder,) = (tmp_path / "interpolations").iterdir()
    assert folder.name.endswith("_seed_0_images_level_2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["length"] == pytest.approx([8 * 0.6])
    assert metrics["distance"] == pytest.approx([8 * 0.4])
    assert metrics["smoothness"] == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--images=A.png"], "images.*1.*pairs"),
        (["--images=A.png,nonesuch.png"], "nonesuch.png"),
        (["--images=A.png,B.txt"], "B.txt"),
        (["--images=A.png,A.png", "--level=0"], "level is 0.*1.*6"),
        (["--images=A.png,A.png", "--level=7"], "level is 7.*1.*6"),
        (["--images=A.png,A.png", "--level=x"], "level.*x"),
        (["--images=A.png,A.png", "--pairs=2"], "--pairs.*--images"),
        (["--level=9"], "level is 9.*1.*6"),
        (["--frames=2"], "frames.*2"),
        (["--pairs=0"], "pairs.*0"),
        (["--num_samples=2"], "--num_samples.*sample"),
        (["--mask=left"], "--mask.*inpaint.*interpolate"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(tmp_path, monkeypatch, capsys, args, pattern):
    monkeypatch.chdir(tmp_path)
    save_grey("A.png", 0)
    epath.Path("B.txt").write_text("not an image")
    assert tiny.main("--mode=interpolate", f"--workdir={tiny.trained()}", *args) == 1
    errors = re.findall(r"^error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert len(errors) == 1
    assert re.search(pattern, errors[0])
    assert not (tiny.trained() / "interpolations").exists()
