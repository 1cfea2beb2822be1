"""What is written for TensorBoard, and which calls wait for it."""

import io
import re
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
    def __init__(self):
        self.calls = 0

    def write_scalars(self, *_):
        self.calls += 1
        raise OSError(28, "No space left on device")

    def write_images(self, *_):
        self.calls += 1

    write_texts = close = write_images


@pytest.mark.parametrize("failing", ["opened", "written"])
def test_calls_do_not_wait_and_a_failure_is_one_warning(tmp_path, caplog, failing):
    """Training continues. Fails if a file is written after the failure."""
    released = threading.Event()
    writer = FailingWriter()

    def open_file(_):
        assert released.wait(60)
        if failing == "opened":
            raise OSError(28, "No space left on device")
        return writer

    with MetricWriter(epath.Path(tmp_path), open_file) as metric_writer:
        # This returns although no file has been opened.
        metric_writer.write_scalars(1, {"loss": 0.0})
        released.set()
        metric_writer.write_scalars(2, {"loss": 0.0})
        metric_writer.write_texts(2, {"config": "x"})
    assert writer.calls == (failing == "written")
    assert caplog.messages == [
        f"cannot write TensorBoard files to {tmp_path} (No space left on device): continuing "
        "without them"
    ]


def test_the_many_lines_of_an_error_of_tensorflow_become_one(tmp_path, caplog):
    def open_file(_):
        raise RuntimeError("{{node x}} /a/events; No space left on device\n\tFailed to flush 3")

    with MetricWriter(epath.Path(tmp_path), open_file) as writer:
        writer.write_scalars(1, {"loss": 0.0})
    assert "(No space left on device): " in caplog.text


@WRITERS
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, open_file, caplog):
    (tmp_path / "file").touch()
    with MetricWriter(epath.Path(tmp_path / "file" / "run"), open_file) as writer:
        writer.write_scalars(1, {"loss": 0.0})
    (message,) = caplog.messages
    assert re.match(r"cannot write TensorBoard files to \S+ \([^\n]+\): continuing", message)


@WRITERS
def test_texts_are_shown_by_tensorboard(tmp_path, open_file):
    with MetricWriter(epath.Path(tmp_path), open_file) as writer:
        writer.write_texts(3, {"config": "K = 30"})
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = events.Tags()["tensors"]
    (event,) = events.Tensors(tag)
    assert tag.startswith("config")
    assert event.step == 3
    assert make_ndarray(event.tensor_proto).reshape(-1).tolist() == [b"K = 30"]
