"""What is written for TensorBoard, and which calls wait for it."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clu import metric_writers
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax.errors import UserError
from drl_jax.plots.metric_writer import MetricWriter


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


def test_everything_is_written_in_order_by_the_end(tmp_path):
    with MetricWriter(epath.Path(tmp_path)) as writer:
        for step in range(200):
            writer.write_scalars(step, {"loss": float(step)})
        writer.write_images(200, {"samples": np.zeros((1, 4, 4, 1), np.uint8)})
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("loss")] == list(range(200))
    assert [event.step for event in events.Tensors("samples")] == [200]


def test_summaries_can_be_read_before_the_end(tmp_path):
    writer = MetricWriter(epath.Path(tmp_path))
    writer.write_scalars(1, {"loss": 0.0})
    end = time.monotonic() + 60
    tags = []
    while not tags and time.monotonic() < end:
        tags = EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
    assert tags == ["loss"]
    writer.__exit__()


def test_a_writer_without_a_folder_writes_nothing(monkeypatch):
    monkeypatch.delattr(metric_writers, "create_default_writer")
    with MetricWriter(None) as writer:
        writer.write_scalars(1, {"loss": 0.0})


@pytest.mark.parametrize("failing", ["opened", "written"])
def test_calls_do_not_wait_and_errors_are_raised_at_the_end(tmp_path, monkeypatch, failing):
    released = threading.Event()

    class FailingWriter:
        def write_scalars(self, *_):
            raise OSError("cannot be written")

    def create(*_, **__):
        assert released.wait(60)
        if failing == "opened":
            raise OSError("cannot be opened")
        return FailingWriter()

    monkeypatch.setattr(metric_writers, "create_default_writer", create)
    writer = MetricWriter(epath.Path(tmp_path))
    writer.write_scalars(1, {"loss": 0.0})  # returns although no file has been opened
    released.set()
    with pytest.raises(UserError, match=f"^cannot write TensorBoard .*: cannot be {failing}$"):
        writer.__exit__()
