import os

import pytest
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax.runtime import cpu_devices


@pytest.mark.parametrize(
    ("cores", "changes", "expected"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (6, {}, 4),  # the batch size is 64
        (96, {}, 8),
        (6, {"train.batch_size": 30}, 6),
        (6, {"train.batch_size": 30, "train.accumulate": 10}, 3),
        (6, {"train.batch_size": 7}, 1),
        (6, {"mesh.fsdp": 2}, 4),
        (6, {"mesh.fsdp": 2, "mesh.data": 1}, 2),
        (6, {"mesh.fsdp": 3}, 1),  # no number works: make_mesh raises the error
        (6, None, 6),
    ],
)
def test_a_cpu_has_one_device_per_core_that_can_share_the_batch(
    cores, changes, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    if changes is None:
        assert cpu_devices.count() == expected
        return
    config = config_lib.load(str(tiny.DIGITS))
    config.update_from_flattened_dict(changes)
    assert cpu_devices.count(config) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"JAX_NUM_CPU_DEVICES": "3"}, True),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, True),
        ({"XLA_FLAGS": "--xla_dump_to=/tmp"}, False),
    ],
)
def test_the_environment_can_set_the_number_of_devices(variables, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", variables)
    assert cpu_devices.set_by_user() is expected
