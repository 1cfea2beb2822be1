"""What a run writes for TensorBoard, and what it waits for."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from clu import asynclib, metric_writers
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax.curves import Curves


def test_training_loads_tensorflow_only_to_write(tmp_path):
    program = """
import sys
import drl_jax.modes.train
from drl_jax.curves import Curves
from etils import epath

with Curves(epath.Path(sys.argv[1])) as curves:
    pass
print("tensorflow" in sys.modules)
with Curves(epath.Path(sys.argv[1])) as curves:
    curves.write_scalars(1, {"loss": 0.0})
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


def test_only_one_process_has_a_file(tmp_path):
    with Curves(epath.Path(tmp_path), just_logging=True) as curves:
        curves.write_scalars(1, {"loss": 0.0})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_and_no_step_waits(tmp_path, monkeypatch):
    released = threading.Event()

    class Full:
        def write_scalars(self, *_):
            assert released.wait(60)
            raise OSError("no space left")

        def close(self):
            pass

    monkeypatch.setattr(metric_writers, "create_default_writer", lambda *_, **__: Full())
    curves = Curves(epath.Path(tmp_path))
    curves.write_scalars(1, {"loss": 0.0})  # returns, though nothing is written yet
    released.set()
    with pytest.raises(asynclib.AsyncError, match="no space left"):
        curves.__exit__()
