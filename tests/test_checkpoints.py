import json
import logging
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from drl_jax import config
from drl_jax.errors import UserError
from drl_jax.runtime import sharding
from drl_jax.storage import checkpoints
from drl_jax.storage.checkpoints import CHECKSUMS, Checkpoints
from drl_jax.training.state import TrainState


def replicated(_):
    return sharding.replicated(sharding.make_mesh())


def make_state(step):
    w = jax.random.normal(jax.random.key(step), (64, 64))
    return TrainState(
        step=jnp.int32(step),
        params={"layer": {"w": w, "b": w[0]}},
        ema={"layer": {"w": w / 2, "b": w[1]}},
        vectors={"layer/w": w[2]},
        opt_state=(w[3], optax.EmptyState(), jnp.int32(step)),
    )


def make_config(**fields):
    made = config.default()
    made.checkpoint.update(fields)
    return made


def abstract(_):
    return jax.eval_shape(lambda: make_state(0))


def part(*names):
    """`abstract` of some fields of the state."""
    return lambda _: {name: getattr(abstract(_), name) for name in names}


def save(workdir, *steps, **fields):
    with Checkpoints(workdir, make_config(**fields)) as manager:
        for step in steps:
            manager.save(step, make_state(step))


def restored_step(workdir, config=None):
    """The step of the checkpoint that is restored, after comparing it with what was saved."""
    with Checkpoints(workdir, config) as manager:
        _, state = manager.restore(abstract, replicated)
    assert_same(state, make_state(int(state.step)))
    return int(state.step)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def files(folder):
    return sorted(
        (parent / file).relative_to(folder).as_posix()
        for parent, _, names in folder.walk()
        for file in names
    )


def steps(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def messages(caplog):
    """What users see: `main` silences absl, the logger of Orbax."""
    return [record.message for record in caplog.records if record.name != "absl"]


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def names_read(monkeypatch):
    """The names of all arrays that Orbax reads from disk."""
    names = []
    handler = ocp.type_handlers.ArrayHandler
    deserialize = handler.deserialize

    async def spy(self, infos, args=None):
        names.extend(info.name for info in infos)
        return await deserialize(self, infos, args)

    monkeypatch.setattr(handler, "deserialize", spy)
    return names


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def delete(file):
    file.unlink()


DAMAGES = [truncate, empty, flip_a_bit, delete]


def test_restore_inverts_save(workdir):
    save(workdir, 3)
    with Checkpoints(workdir) as manager:
        saved, state = manager.restore(abstract, replicated)
    assert_same(state, make_state(3))
    assert saved.to_dict() == make_config().to_dict()


@pytest.mark.parametrize("names", [("ema", "vectors", "step"), ("opt_state",)])
def test_a_part_of_the_state_is_restored_without_reading_the_rest(workdir, names_read, names):
    save(workdir, 3)
    with Checkpoints(workdir) as manager:
        _, state = manager.restore(part(*names), replicated)
    assert_same(state, {name: getattr(make_state(3), name) for name in names})
    assert {name.split(".")[0] for name in names_read} == set(names)
    assert len(names_read) == len(jax.tree.leaves(state))


def test_checkpoints_of_earlier_versions_are_restored(workdir):
    """They were written by another handler of Orbax's, under the same names."""
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(make_state(4)),
        config=ocp.args.JsonSave(config.to_json(make_config())),
    )
    with ocp.CheckpointManager(
        workdir / "checkpoints", item_names=checkpoints.ITEMS
    ) as manager:
        manager.save(4, args=args)
    folder = workdir / "checkpoints" / "4"
    (folder / CHECKSUMS).write_text(json.dumps(checkpoints.checksums(folder)))
    assert restored_step(workdir) == 4
    with Checkpoints(workdir) as manager:
        _, state = manager.restore(part("ema"), replicated)
    assert_same(state, {"ema": make_state(4).ema})


def test_checksums_do_not_depend_on_the_size_of_blocks(workdir, monkeypatch):
    save(workdir, 1)
    folder = workdir / "checkpoints" / "1"
    monkeypatch.setattr(checkpoints, "BLOCK", 10)
    assert checkpoints.checksums(folder) == json.loads((folder / CHECKSUMS).read_text())


def test_the_work_directory_may_be_a_relative_path(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    save(epath.Path("here"), 1)
    assert restored_step(epath.Path("here")) == 1
    assert steps(workdir / "here") == [1]


@pytest.mark.parametrize("name", ["lr[1e-4]", "[exp]/x", "a\\b", "**", "s*", "q?", "\udcff"])
def test_a_path_from_which_orbax_cannot_restore_is_refused(workdir, name):
    save(workdir / "ss", 1)
    before = files(workdir)
    for settings in (make_config(), None):
        with pytest.raises(UserError, match=r"^checkpoints cannot be kept in [^\n]*rename"):
            Checkpoints(workdir / name, settings)
    assert files(workdir) == before


def test_a_relative_path_is_refused_if_the_folder_around_it_is(workdir, monkeypatch):
    (workdir / "[exp]").mkdir()
    monkeypatch.chdir(workdir / "[exp]")
    with pytest.raises(UserError, match=r"contains '\[' and '\]': "):
        Checkpoints(epath.Path("here"), make_config())


@pytest.mark.parametrize("name", ["a b", "{a,b}", "a%5B#&$!@+=;:'\"|<>~-", "日本"])
def test_other_paths_can_be_used(workdir, name):
    save(workdir / name, 1)
    assert restored_step(workdir / name) == 1


def test_only_the_checkpoint_that_was_written_gets_checksums(workdir):
    """Fails if checksums are written for the files of other steps or runs."""
    for name in ("2", "19", "20.damaged"):
        (workdir / "checkpoints" / name).mkdir(parents=True)
    save(workdir, 20)
    assert [f for f in files(workdir) if f.endswith(CHECKSUMS)] == ["checkpoints/20/crc32.json"]


def test_there_is_nothing_to_restore_in_a_new_directory(workdir):
    with Checkpoints(workdir, make_config()) as manager:
        assert manager.restore(abstract, replicated) is None


def test_a_step_that_donates_the_state_does_not_change_what_is_being_written(workdir):
    double = jax.jit(lambda s: jax.tree.map(lambda a: a * 2, s), donate_argnums=0)
    state = jax.tree.map(jnp.copy, make_state(1))
    with Checkpoints(workdir, make_config()) as manager:
        manager.save(1, state)
        for _ in range(5):
            state = double(state)
        jax.block_until_ready(state)
    assert restored_step(workdir) == 1


def test_the_work_directory_has_the_configuration_of_the_newest_checkpoint(workdir):
    for step, every_steps in ((1, 7), (2, 8)):
        save(workdir, step, every_steps=every_steps)
        with Checkpoints(workdir) as manager:
            saved, _ = manager.restore(abstract, replicated)
        assert saved.checkpoint.every_steps == every_steps
        assert json.loads((workdir / "config.json").read_text()) == config.to_json(saved)


def test_a_checkpoint_is_complete_even_if_that_file_cannot_be_written(workdir, caplog):
    (workdir / "config.json" / "folder").mkdir(parents=True)
    save(workdir, 1)
    assert restored_step(workdir) == 1
    (message,) = (line for line in caplog.messages if "config.json" in line)
    assert message.startswith(f"cannot write to {workdir / 'config.json'}: ")


def test_opening_the_checkpoints_does_not_change_the_configuration(workdir):
    save(workdir, 1, every_steps=7)
    before = (workdir / "config.json").read_text()
    with Checkpoints(workdir, make_config(every_steps=8)):
        pass
    assert (workdir / "config.json").read_text() == before


def test_the_last_k_and_every_nth_are_kept(workdir):
    save(workdir, *range(2, 24, 2), keep_last=3, keep_every_steps=8)
    assert steps(workdir) == [8, 16, 18, 20, 22]


def test_a_checkpoint_is_written_once(workdir):
    save(workdir, 1)
    before = (workdir / "checkpoints" / "1" / CHECKSUMS).stat().mtime
    save(workdir, 1)
    assert (workdir / "checkpoints" / "1" / CHECKSUMS).stat().mtime == before


@pytest.mark.slow
def test_a_checkpoint_with_any_damage_to_any_file_is_skipped_with_one_line(workdir, caplog):
    save(workdir / "whole", 1, 2)
    newest = workdir / "whole" / "checkpoints" / "2"
    protected = [*json.loads((newest / CHECKSUMS).read_text()), CHECKSUMS]
    assert {name.split("/")[0] for name in protected} == {"state", "config", CHECKSUMS}
    victims = [[name] for name in protected] + [protected]
    for victim in victims:
        for damage in DAMAGES:
            run = workdir / "run"
            shutil.copytree(workdir / "whole", run)
            for name in victim:
                damage(run / "checkpoints" / "2" / name)
            caplog.clear()
            assert restored_step(run) == 1, (damage.__name__, victim)
            (line,) = messages(caplog)
            assert line.startswith("checkpoint of step 2 is damaged (")
            assert line.endswith("): using that of step 1")
            assert "\n" not in line
            shutil.rmtree(run)


@pytest.mark.parametrize("item", checkpoints.ITEMS)
def test_a_missing_item_is_damage(workdir, item):
    save(workdir, 1, 2)
    (workdir / "checkpoints" / "2" / item).rmtree()
    assert restored_step(workdir) == 1


@pytest.mark.parametrize("wanted", [abstract, part("ema")])
def test_damage_to_files_that_only_orbax_uses_does_not_matter(workdir, capfd, caplog, wanted):
    save(workdir, 1)
    folder = workdir / "checkpoints" / "1"
    others = [name for name in files(folder) if "/" not in name and name != CHECKSUMS]
    assert others
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # as `main` does
    for name in others:
        empty(folder / name)
    with Checkpoints(workdir) as manager:
        _, state = manager.restore(wanted, replicated)
    ema = state["ema"] if isinstance(state, dict) else state.ema
    assert_same(ema, make_state(1).ema)
    assert capfd.readouterr().err == ""
    assert not messages(caplog)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3"])
def test_a_file_of_checksums_without_checksums_is_damage(workdir, content):
    """Otherwise an empty one would vouch for any files."""
    save(workdir, 1, 2)
    (workdir / "checkpoints" / "2" / CHECKSUMS).write_text(content)
    assert restored_step(workdir) == 1


def test_reading_changes_no_file_even_if_there_is_damage(workdir):
    save(workdir, 1, 2)
    empty(workdir / "checkpoints" / "2" / CHECKSUMS)
    before = files(workdir)
    assert restored_step(workdir) == 1
    assert files(workdir) == before


def test_the_step_of_a_damaged_checkpoint_is_written_again(workdir):
    save(workdir, 1, 2)
    for _ in range(2):  # the second time, one has been set aside already
        empty(workdir / "checkpoints" / "2" / CHECKSUMS)
        assert restored_step(workdir, make_config()) == 1
        assert steps(workdir) == [1]
        assert (workdir / "checkpoints" / "2.damaged").is_dir()
        save(workdir, 2, keep_last=2)
        assert steps(workdir) == [1, 2]
        assert restored_step(workdir) == 2


@pytest.mark.parametrize("writing", [False, True])
def test_if_all_are_damaged_one_line_says_so_and_no_file_changes(workdir, writing, caplog):
    save(workdir, 1, 2)
    for step in (1, 2):
        truncate(workdir / "checkpoints" / str(step) / "config" / "metadata")
    before = files(workdir)
    with pytest.raises(UserError, match=r"^every checkpoint .*step 2: config/metadata.*$"):
        restored_step(workdir, make_config() if writing else None)
    assert files(workdir) == before
    assert not messages(caplog)


def test_a_rejected_configuration_leaves_all_files_as_they_were(workdir):
    save(workdir, 1, 2)
    empty(workdir / "checkpoints" / "2" / CHECKSUMS)
    before = files(workdir)

    def reject(saved):
        raise UserError("no")

    with (
        Checkpoints(workdir, make_config()) as manager,
        pytest.raises(UserError, match="no"),
    ):
        manager.restore(reject, replicated)
    assert files(workdir) == before


W = jax.ShapeDtypeStruct((64, 64), "f4")
B = jax.ShapeDtypeStruct((64,), "f4")


@pytest.mark.parametrize(
    "ema",
    [
        {"layer": {"w": jax.ShapeDtypeStruct((65, 64), "f4"), "b": B}},
        {"layer": {"w": W}},
        {"layer": {"w": W, "b": B, "g": B}},
    ],
    ids=["another shape", "too few arrays", "too many arrays"],
)
@pytest.mark.parametrize("partial", [False, True])
def test_a_checkpoint_of_another_network_is_not_called_damaged(workdir, ema, partial):
    save(workdir, 1, 2)

    def other(_):
        return {"ema": ema} if partial else abstract(_).replace(ema=ema)

    with (
        Checkpoints(workdir, make_config()) as manager,
        pytest.raises(UserError, match=r"step 2 .* does not fit the network"),
    ):
        manager.restore(other, replicated)
    assert steps(workdir) == [1, 2]


def test_an_interrupted_write_is_not_a_checkpoint(workdir, caplog):
    save(workdir, 1, 2)
    folder = workdir / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert restored_step(workdir, make_config()) == 1
    assert not messages(caplog)
    save(workdir, 2)
    assert [path.name for path in sorted(folder.iterdir())] == ["1", "2"]
    assert restored_step(workdir) == 2


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(workdir):
    threads = threading.enumerate()
    with (  # noqa: PT012  (Orbax decides which of these lines raises)
        pytest.raises(UserError, match=r"^cannot write checkpoints to .*: .*$"),
        Checkpoints(workdir, make_config()) as manager,
    ):
        (workdir / "checkpoints").rmtree()
        (workdir / "checkpoints").write_text("in the way")
        manager.save(1, make_state(1))
    end = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in threads and not t.daemon]:
        assert time.monotonic() < end, left  # such a thread would keep the program running
        time.sleep(0.01)
