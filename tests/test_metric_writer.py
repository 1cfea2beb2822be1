"""What is written for TensorBoard, and which calls wait for it."""

import io
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from drl_jax.errors import UserError
from drl_jax.plots.metric_writer import MetricWriter, TensorboardX, open_writer


@pytest.mark.slow
def test_training_imports_tensorflow_only_to_write(tmp_path):
    program = """
import sys
import drl_jax.tasks.train
from drl_jax.plots.metric_writer import MetricWriter
from etils import epath

for scalars in ({}, {"loss": 0.0}):
    with MetricWriter(epath.Path(sys.argv[1])) as writer:
        if scalars:
            writer.write_scalars(1, scalars)
    print("tensorflow" in sys.modules)
"""
    output = subprocess.check_output([sys.executable, "-c", program, tmp_path], text=True)
    assert output.split() == ["False", "True"]
    assert len(list(tmp_path.iterdir())) == 1


WRITERS = pytest.mark.parametrize("open_file", [open_writer, TensorboardX])


def read(folder):
    """Returns the steps and values of the loss, and the steps of the samples."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    if tags["tensors"]:  # as CLU writes them
        loss = [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors("loss")]
        images = events.Tensors("samples") if "samples" in tags["tensors"] else []
    else:
        loss = [(e.step, e.value) for e in events.Scalars("loss")] if tags["scalars"] else []
        images = events.Images("samples") if tags["images"] else []
    return loss, [image.step for image in images]


@WRITERS
def test_everything_is_written_in_order_by_the_end(tmp_path, open_file):
    with MetricWriter(epath.Path(tmp_path), open_file) as writer:
        for step in range(200):
            writer.write_scalars(step, {"loss": np.float32(step / 2)})
        writer.write_images(200, {"samples": np.zeros((1, 4, 4, 1), np.uint8)})
    assert read(tmp_path) == ([(step, step / 2) for step in range(200)], [200])


def test_images_without_tensorflow_are_those_that_were_written(tmp_path):
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(1, 4, 5, 3)
    with MetricWriter(epath.Path(tmp_path), TensorboardX) as writer:
        writer.write_images(1, {"samples": image})
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("samples")
    assert np.array_equal(PIL.Image.open(io.BytesIO(event.encoded_image_string)), image[0])


@WRITERS
def test_summaries_can_be_read_before_the_end(tmp_path, open_file):
    writer = MetricWriter(epath.Path(tmp_path), open_file)
    writer.write_scalars(1, {"loss": 0.0})
    end = time.monotonic() + 60
    while read(tmp_path) != ([(1, 0.0)], []) and time.monotonic() < end:
        pass
    assert read(tmp_path) == ([(1, 0.0)], [])
    writer.__exit__()


def test_a_writer_without_a_folder_writes_nothing():
    def fail(_):
        raise AssertionError("opened")

    with MetricWriter(None, fail) as writer:
        writer.write_scalars(1, {"loss": 0.0})


class FailingWriter:
    def write_scalars(self, *_):
        raise OSError("cannot be written")

    def write_images(self, *_):
        raise AssertionError("not called")

    def close(self):
        raise OSError("cannot be closed")


@pytest.mark.parametrize("failing", ["opened", "written"])
def test_calls_do_not_wait_and_errors_are_raised_at_the_end(tmp_path, failing):
    released = threading.Event()

    def open_file(_):
        assert released.wait(60)
        if failing == "opened":
            raise OSError("cannot be opened")
        return FailingWriter()

    writer = MetricWriter(epath.Path(tmp_path), open_file)
    writer.write_scalars(1, {"loss": 0.0})  # returns although no file has been opened
    released.set()
    with pytest.raises(UserError, match=f"^cannot write TensorBoard .*: cannot be {failing}$"):
        writer.__exit__()


def test_a_folder_that_cannot_be_written_is_a_user_error_without_tensorflow(tmp_path):
    (tmp_path / "file").touch()
    writer = MetricWriter(epath.Path(tmp_path / "file" / "run"), TensorboardX)
    writer.write_scalars(1, {"loss": 0.0})
    with pytest.raises(UserError, match=r"^cannot write TensorBoard files to "):
        writer.__exit__()
