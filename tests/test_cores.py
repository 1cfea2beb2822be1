import os

import pytest
import tiny

from drl_jax import config as config_lib
from drl_jax import cores


@pytest.mark.parametrize(
    ("number", "changes", "devices"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (6, {}, 4),  # of 64 examples
        (96, {}, 8),
        (6, {"train.batch_size": 30}, 6),
        (6, {"train.batch_size": 30, "train.parts": 10}, 3),
        (6, {"train.batch_size": 7}, 1),
        (6, {"mesh.fsdp": 2}, 4),
        (6, {"mesh.fsdp": 2, "mesh.data": 1}, 2),
        (6, {"mesh.fsdp": 3}, 1),  # told by the mesh
        (6, None, 6),
    ],
)
def test_a_processor_is_a_device_a_core_where_they_share_a_batch(
    number, changes, devices, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))
    if changes is None:
        assert cores.devices() == devices
        return
    config = config_lib.load(str(tiny.DIGITS))
    config.update_from_flattened_dict(changes)
    assert cores.devices(config) == devices
