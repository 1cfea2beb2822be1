import re

import jax
import jax.numpy as jnp
import pytest

from drl_jax.tools.plan import hlo

# In the format of XLA:TPU: a loop of 3 trips around a loop of 4 trips (from 0 to 8 in steps of
# 2), a fusion whose inner cycles must not be counted twice, a conditional, and collectives.
NESTED = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0:T(128)} parameter(0)
  ROOT %inner = f32[8]{0:T(128)} negate(%p.0), backend_config={"estimated_cycles":"7"}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%bump (p.1: s32[]) -> s32[] {
  %p.1 = s32[]{:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  ROOT %more = s32[]{:T(128)} add(%p.1, %two)
}

%small.cond (s.0: (s32[], f32[8])) -> pred[] {
  %s.0 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%s.0), index=0
  %eight = s32[]{:T(128)} constant(8)
  ROOT %gt = pred[]{:T(512)} compare(%eight, %i.0), direction=GT
}

%small.body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %x.1 = f32[8]{0:T(128)} get-tuple-element(%s.1), index=1
  %fusion.1 = f32[8]{0:T(128)} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="a(b)c"}, backend_config={"window_config":{"estimated_cycles":"100","x":["1"]}}
  %permute = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%fusion.1), source_target_pairs={{0,1},{1,0}}
  %done.1 = f32[8]{0:T(128)} collective-permute-done(%permute)
  %next.1 = s32[]{:T(128)} fusion(%i.1), kind=kLoop, calls=%bump, backend_config={"estimated_cycles":"10"}
  ROOT %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next.1, %done.1)
}

%big.cond (s.2: (f32[8], s32[], s32[])) -> pred[] {
  %s.2 = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=1
  %n.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=2
  ROOT %le = pred[]{:T(512)} compare(%i.2, %n.2), direction=LE
}

%big.body (s.3: (f32[8], s32[], s32[])) -> (f32[8], s32[], s32[]) {
  %s.3 = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %x.3 = f32[8]{0:T(128)} get-tuple-element(%s.3), index=0
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=1
  %n.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=2
  %one = s32[]{:T(128)} constant(1)
  %zero.3 = s32[]{:T(128)} constant(0)
  %tuple.3 = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) tuple(%zero.3, %x.3)
  %small = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%tuple.3), condition=%small.cond, body=%small.body
  %y.3 = f32[8]{0:T(128)} get-tuple-element(%small), index=1
  %next.3 = s32[]{:T(128)} add(%i.3, %one), backend_config={"estimated_cycles":"1"}
  ROOT %state.3 = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%y.3, %next.3, %n.3)
}

%gathering (p.4: f32[8]) -> f32[16] {
  %p.4 = f32[8]{0:T(128)} parameter(0)
  ROOT %gather = f32[16]{0:T(128)} all-gather(%p.4), replica_groups={{0,1}}, dimensions={0}
}

%left (p.5: f32[16]) -> f32[8] {
  %p.5 = f32[16]{0:T(128)} parameter(0)
  ROOT %scatter = f32[8]{0:T(128)} reduce-scatter(%p.5), dimensions={0}, to_apply=%add, backend_config={"estimated_cycles":"1000"}
}

%right (p.6: f32[16]) -> f32[8] {
  %p.6 = f32[16]{0:T(128)} parameter(0)
  ROOT %slice = f32[8]{0:T(128)} slice(%p.6), slice={[0:8]}, backend_config={"estimated_cycles":"2000"}
}

ENTRY %main (x: f32[8], choice: pred[]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %choice = pred[]{:T(512)} parameter(1)
  %first = s32[]{:T(128)} constant(1)
  %last = s32[]{:T(128)} constant(3)
  %copied = s32[]{:T(128)} copy(%first)
  %tuple = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%x, %copied, %last)
  %big = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) while(%tuple), condition=%big.cond, body=%big.body
  %y = f32[8]{0:T(128)} get-tuple-element(%big), index=0
  %reduce-start = f32[8]{0:T(128)} all-reduce-start(%y), to_apply=%add
  %reduce = f32[8]{0:T(128)} all-reduce-done(%reduce-start)
  %all = (f32[8]{0:T(128)}, bf16[4,2]{1,0}) all-reduce(%reduce, %x), to_apply=%add
  %z = f32[8]{0:T(128)} get-tuple-element(%all), index=0
  %start = ((f32[8]{0:T(128)}), f32[16]{0:T(128)}, u32[]{:S(2)}) async-start(%z), calls=%gathering
  %done = f32[16]{0:T(128)} async-done(%start), calls=%gathering
  ROOT %end = f32[8]{0:T(128)} conditional(%choice, %done, %done), branch_computations={%left, %right}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def nested():
    return hlo.parse(NESTED)


@pytest.fixture(scope="module")
def scanned():
    """HLO text of XLA:CPU: 7 matrix products in each of 3 trips."""

    def outer(x, w):
        def trip(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[
                0
            ], None

        return jax.lax.scan(trip, x, None, length=3)[0]

    x = jnp.ones((64, 64))
    return jax.jit(outer).lower(x, x).compile().as_text()


def test_trip_counts_follow_from_counter_bound_and_step(nested):
    assert hlo.loops(nested) == [hlo.Loop("big", 3, 1), hlo.Loop("small", 4, 3)]


def test_cycles_are_multiplied_by_trip_counts_and_fusions_count_once(nested):
    # Both branches of the conditional count.
    assert hlo.cycles(nested) == 3 * (1 + 4 * (100 + 10)) + 1000 + 2000


def test_each_collective_is_listed_once_with_its_loop_and_runs(nested):
    assert hlo.collectives(nested) == [
        hlo.Collective("collective-permute", "permute", 32, 12, "small"),
        hlo.Collective("all-reduce", "reduce-start", 32, 1, ""),
        hlo.Collective("all-reduce", "all", 64, 1, ""),
        hlo.Collective("all-gather", "gather", 64, 1, ""),
        hlo.Collective("reduce-scatter", "scatter", 64, 1, ""),
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=GT", "direction=NE"),
        ("%eight = s32[]{:T(128)} constant(8)", "%eight = s32[]{:T(128)} negate(%i.0)"),
        ("ROOT %more = s32[]{:T(128)} add", "ROOT %more = s32[]{:T(128)} multiply"),
        ("tuple(%zero.3, %x.3)", "tuple(%i.3, %x.3)"),
    ],
)
def test_data_dependent_trip_counts_are_none_and_counted_as_requested(old, new):
    assert old in NESTED
    module = hlo.parse(NESTED.replace(old, new))
    assert hlo.loops(module)[1] == hlo.Loop("small", None, 3)
    assert hlo.cycles(module) == 3 * (1 + 110) + 3000
    assert hlo.cycles(module, unknown_trips=5) == 3 * (1 + 5 * 110) + 3000


@pytest.mark.parametrize("known", [True, False])
def test_nested_scans_are_recognised(scanned, known):
    assert '"known_trip_count"' in scanned
    text = scanned if known else re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", scanned)
    module = hlo.parse(text)
    assert [(loop.trips, loop.runs) for loop in hlo.loops(module)] == [(3, 1), (7, 3)]
    products = [visit.runs for visit in hlo.walk(module) if visit.instruction.opcode == "dot"]
    assert products == [21]
    assert hlo.cycles(module) is None
    assert hlo.collectives(module) == []


def test_a_loop_whose_bound_is_an_argument_has_no_trip_count():
    def program(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x) * i, x)

    text = jax.jit(program).lower(3, jnp.ones(8)).compile().as_text()
    [loop] = hlo.loops(hlo.parse(text))
    assert loop.trips is None


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,3]{1,0:T(8,128)}", 96),
        ("bf16[5]{0}", 10),
        ("pred[]", 1),
        ("(f32[2]{0}, s8[3]{0}, /*index=2*/u32[4]{0}, u32[]{:S(2)})", 27),
        ("c64[2]", 16),
        ("token[]", 0),
    ],
)
def test_sizes_of_shapes(shape, size):
    assert hlo.size(shape) == size
