import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax.tools.plan import bars


def values(**changes):
    """Values of a job that meets every bar, with changes to those of its training step."""
    reduction = {
        "kind": "all-reduce",
        "name": "all-reduce.1",
        "size": 10**6,
        "runs": 1,
        "loop": "",
    }
    step = {
        "estimated_mfu": 0.8,
        "estimated_cycles": 100,
        "compile_seconds": 50.0,
        "bytes": {"code": 10**8},
        "bytes_needed": 10**9,
        "fits": True,
        "collectives": [reduction, reduction | {"size": 100}],
    }
    return {"training step": step | changes, "sampler": step | {"collectives": []}}


def missed(checked):
    return [bar.name for bar in checked if not bar.holds]


def every_bar(job):
    for check in (bars.speed, bars.communication, bars.memory):
        yield from check(job)
    yield from bars.scaling(few=values(), many=job)


REDUCTION = values()["training step"]["collectives"][0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ()),
        ({"estimated_mfu": 0.74}, ("estimated MFU",)),
        ({"compile_seconds": 61.0}, ("compilation",)),
        ({"bytes": {"code": 121 * 10**6}}, ("code",)),
        ({"fits": False, "bytes_needed": None}, ("the training step fits",)),
        ({"estimated_cycles": 103}, ("cycles per chip",)),
        ({"collectives": []}, ("reductions",)),
        ({"collectives": 2 * [REDUCTION]}, ("reductions", "bytes reduced")),
        ({"collectives": [REDUCTION | {"runs": 2}]}, ("reductions",)),
        ({"collectives": [REDUCTION | {"kind": "all-gather"}]}, ("reductions",)),
        (
            {"collectives": [REDUCTION, REDUCTION | {"size": 4, "loop": "while.1"}]},
            ("collectives in the chain",),
        ),
    ],
)
def test_exactly_the_bars_that_a_step_misses_are_reported(changes, names):
    missed_names = missed(every_bar(values(**changes)))
    assert len(missed_names) == len(names)
    for missed_name, name in zip(missed_names, names, strict=True):
        assert missed_name.startswith(name)


def test_a_sampler_that_communicates_misses_a_bar():
    job = values()
    job["sampler"]["collectives"] = [REDUCTION]
    assert missed(every_bar(job)) == ["collectives in the sampler"]


@pytest.mark.slow
def test_a_small_job_meets_every_bar_that_does_not_depend_on_size():
    command = [sys.executable, "-m", "drl_jax.tools.plan.bars", "--small"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("holds") for line in lines)


def test_an_unknown_option_is_reported_in_one_line(capsys):
    assert bars.main(["bars", "--large"]) == 1
    error = capsys.readouterr().err
    assert "--large" in error
    assert "--small" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
