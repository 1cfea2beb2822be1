import pytest

from drl_jax.tools.plan import chips, hlo, report
from drl_jax.tools.plan.programs import Compiled, Memory

TEXT = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"3000000"}
}
"""
MEMORY = Memory(arguments=3 * 2**30, outputs=2**30, aliased=2**30, temporaries=2**30, code=0)
FITS = Compiled(1.0, MEMORY.total, MEMORY, hlo.parse(TEXT))
REFUSED = Compiled(1.0, None, None, None)


@pytest.fixture
def plan():
    """Returns a function that builds the plan of one program on a topology."""

    def make(compiled, name):
        topology = chips.parse(name)
        program = report.Program("training step", 64, compiled, flops=197e9, runs=86400)
        return {
            "topology": name,
            "chip": topology.chip.title,
            "devices": topology.devices,
            "memory": topology.chip.memory,
            "peak": topology.chip.peak,
            "clock": topology.chip.clock,
            "jax": "0",
            "programs": [report.values(program, topology)],
            "config": {"data": {"name": "digits"}},
        }

    return make


def test_memory_needed_excludes_aliased_outputs(plan):
    [program] = plan(FITS, "v5e:2x2")["programs"]
    assert program["bytes_needed"] == 4 * 2**30
    assert program["fits"]


def test_time_mfu_and_days_follow_from_cycles_and_clock_rate(plan):
    [program] = plan(FITS, "v5e:2x2")["programs"]
    seconds = 3e6 * 2 * 4 * 128**2 / 197e12  # 131072 FLOPs per cycle
    assert program["estimated_seconds"] == pytest.approx(seconds)
    assert program["estimated_mfu"] == pytest.approx(1e-3 / seconds)
    assert program["estimated_days"] == pytest.approx(seconds)  # 86400 steps


def test_gpus_have_a_lower_bound_but_no_estimate_of_the_time(plan):
    gpus = plan(FITS, "h100:8")
    [program] = gpus["programs"]
    assert not any(name.startswith("estimated") for name in program)
    assert program["seconds_at_peak"] == pytest.approx(197e9 / 989e12)
    assert report.GPU_NOTE in report.markdown(gpus)


def test_a_program_that_compiles_can_exceed_the_memory(plan):
    large = MEMORY._replace(temporaries=60 * 2**30)
    too_large = plan(FITS._replace(memory=large, needed=large.total), "a100:8")
    assert "| verdict | **does not fit** |" in report.markdown(too_large)


def test_unknown_memory_is_reported_as_unknown(plan):
    text = report.markdown(plan(REFUSED, "v5e:2x2"))
    assert "| verdict | **does not fit** |" in text
    assert "| memory per device | ? |" in text


def test_the_largest_batch_size_is_reported_with_its_memory():
    tried = [
        {"batch_size": 64, "bytes_needed": 9 * 2**30, "fits": True},
        {"batch_size": 128, "bytes_needed": 18 * 2**30, "fits": False},
    ]
    plan = {"memory": 16 * 2**30, "tried": tried}
    assert report.largest_batch(plan | {"largest_batch_size": 64}) == (
        "Largest global batch size that was compiled and fits: 64 (9.00 GiB per device)."
    )
    assert "No batch size was found" in report.largest_batch(plan | {"largest_batch_size": 0})
    smaller = plan | {"largest_batch_size": 64, "tried": tried[:1]}
    assert report.largest_batch(smaller).endswith("which would also fit, were not tried.")
