"""What a run writes for TensorBoard, and what it waits for."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clu import asynclib, metric_writers
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax.plots.metric_writer import Curves


def test_training_loads_tensorflow_only_to_write(tmp_path):
    program = """
import sys
import drl_jax.tasks.train
from drl_jax.plots.metric_writer import Curves
from etils import epath

for scalars in ({}, {"loss": 0.0}):
    with Curves(epath.Path(sys.argv[1])) as curves:
        if scalars:
            curves.write_scalars(1, scalars)
    print("tensorflow" in sys.modules)
"""
    output = subprocess.check_output([sys.executable, "-c", program, tmp_path], text=True)
    assert output.split() == ["False", "True"]
    assert len(list(tmp_path.iterdir())) == 1


def test_all_is_written_in_order_when_it_closes(tmp_path):
    with Curves(epath.Path(tmp_path)) as curves:
        for step in range(200):
            curves.write_scalars(step, {"loss": float(step)})
        curves.write_images(200, {"samples": np.zeros((1, 4, 4, 1), np.uint8)})
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("loss")] == list(range(200))
    assert [event.step for event in events.Tensors("samples")] == [200]


def test_what_is_written_can_be_seen_before_it_closes(tmp_path):
    curves = Curves(epath.Path(tmp_path))
    curves.write_scalars(1, {"loss": 0.0})
    end = time.monotonic() + 60
    tags = []
    while not tags and time.monotonic() < end:
        tags = EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
    assert tags == ["loss"]
    curves.__exit__()


def test_only_one_process_has_a_file(tmp_path):
    with Curves(epath.Path(tmp_path), just_logging=True) as curves:
        curves.write_scalars(1, {"loss": 0.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["opened", "written"])
def test_no_step_waits_and_what_cannot_be_done_is_told(tmp_path, monkeypatch, broken):
    released = threading.Event()

    class Full:
        def write_scalars(self, *_):
            raise OSError("cannot be written")

    def create(*_, **__):
        assert released.wait(60)
        if broken == "opened":
            raise OSError("cannot be opened")
        return Full()

    monkeypatch.setattr(metric_writers, "create_default_writer", create)
    curves = Curves(epath.Path(tmp_path))
    curves.write_scalars(1, {"loss": 0.0})  # returns, though nothing is open yet
    released.set()
    with pytest.raises(asynclib.AsyncError, match=f"cannot be {broken}"):
        curves.__exit__()
