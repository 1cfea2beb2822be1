import json
import logging
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from drl_jax import checkpoints, config, parallel
from drl_jax.checkpoints import SEAL, Checkpoints
from drl_jax.errors import UserError
from drl_jax.train_state import TrainState


def whole(_):
    return parallel.replicated(parallel.make_mesh())


def make_state(step):
    w = jax.random.normal(jax.random.key(step), (64, 64))
    return TrainState(
        step=jnp.int32(step),
        params={"layer": {"w": w, "b": w[0]}},
        ema={"layer": {"w": w / 2, "b": w[1]}},
        vectors={"layer/w": w[2]},
        opt_state=(w[3], jnp.int32(step)),
    )


def make_config(**fields):
    made = config.default()
    made.checkpoint.update(fields)
    return made


def abstract(_):
    return jax.eval_shape(lambda: make_state(0))


def save(workdir, *steps, **fields):
    with Checkpoints(workdir, make_config(**fields)) as manager:
        for step in steps:
            manager.save(make_state(step))


def restored_step(workdir, config=None):
    """The step of the checkpoint that is restored, which must be as it was saved."""
    with Checkpoints(workdir, config) as manager:
        _, state = manager.restore(abstract, whole)
    assert_same(state, make_state(int(state.step)))
    return int(state.step)


def assert_same(a, b):
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


def told(caplog):
    """What people are told: `main` silences absl, through which Orbax speaks."""
    return [record.message for record in caplog.records if record.name != "absl"]


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


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


def test_what_is_restored_is_what_was_saved(workdir):
    save(workdir, 3)
    with Checkpoints(workdir) as manager:
        saved, state = manager.restore(abstract, whole)
    assert_same(state, make_state(3))
    assert saved.to_dict() == make_config().to_dict()


def test_the_work_directory_may_be_a_relative_path(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    save(epath.Path("here"), 1)
    assert restored_step(epath.Path("here")) == 1
    assert steps(workdir / "here") == [1]


def test_there_is_nothing_to_restore_in_a_new_directory(workdir):
    with Checkpoints(workdir, make_config()) as manager:
        assert manager.restore(abstract, whole) is None


def test_a_step_that_donates_the_state_does_not_change_what_is_being_written(workdir):
    double = jax.jit(lambda s: jax.tree.map(lambda a: a * 2, s), donate_argnums=0)
    state = jax.tree.map(jnp.copy, make_state(1))
    with Checkpoints(workdir, make_config()) as manager:
        manager.save(state)
        for _ in range(5):
            state = double(state)
        jax.block_until_ready(state)
    assert restored_step(workdir) == 1


def test_the_last_k_and_every_nth_are_kept(workdir):
    save(workdir, *range(2, 24, 2), keep_last=3, keep_every_steps=8)
    assert steps(workdir) == [8, 16, 18, 20, 22]


def test_a_checkpoint_is_written_once(workdir):
    save(workdir, 1)
    before = (workdir / "checkpoints" / "1" / SEAL).stat().mtime
    save(workdir, 1)
    assert (workdir / "checkpoints" / "1" / SEAL).stat().mtime == before


def test_any_damage_to_any_file_is_passed_over_in_one_line(workdir, tmp_path, caplog):
    save(workdir / "whole", 1, 2)
    newest = workdir / "whole" / "checkpoints" / "2"
    sealed = [*json.loads((newest / SEAL).read_text()), SEAL]
    assert {name.split("/")[0] for name in sealed} == {"state", "config", SEAL}
    victims = [[name] for name in sealed] + [sealed]
    for victim in victims:
        for damage in DAMAGES:
            run = workdir / "run"
            shutil.copytree(workdir / "whole", run)
            for name in victim:
                damage(run / "checkpoints" / "2" / name)
            caplog.clear()
            assert restored_step(run) == 1, (damage.__name__, victim)
            (line,) = told(caplog)
            assert line.startswith("checkpoint of step 2 is damaged (")
            assert line.endswith("): using that of step 1")
            assert "\n" not in line
            shutil.rmtree(run)


@pytest.mark.parametrize("item", checkpoints.ITEMS)
def test_a_missing_item_is_damage(workdir, item):
    save(workdir, 1, 2)
    (workdir / "checkpoints" / "2" / item).rmtree()
    assert restored_step(workdir) == 1


def test_what_orbax_keeps_for_itself_may_be_damaged(workdir, capfd, caplog):
    save(workdir, 1)
    folder = workdir / "checkpoints" / "1"
    others = [name for name in files(folder) if "/" not in name and name != SEAL]
    assert others
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # as `main` does
    for name in others:
        empty(folder / name)
    assert restored_step(workdir) == 1
    assert capfd.readouterr().err == ""
    assert not told(caplog)


def test_reading_changes_nothing_even_where_there_is_damage(workdir):
    save(workdir, 1, 2)
    empty(workdir / "checkpoints" / "2" / SEAL)
    before = files(workdir)
    assert restored_step(workdir) == 1
    assert files(workdir) == before


def test_the_step_of_a_damaged_checkpoint_is_written_again(workdir):
    save(workdir, 1, 2)
    for _ in range(2):  # the second time, one has been set aside already
        empty(workdir / "checkpoints" / "2" / SEAL)
        assert restored_step(workdir, make_config()) == 1
        assert steps(workdir) == [1]
        assert (workdir / "checkpoints" / "2.damaged").is_dir()
        save(workdir, 2, keep_last=2)
        assert steps(workdir) == [1, 2]
        assert restored_step(workdir) == 2


@pytest.mark.parametrize("writing", [False, True])
def test_where_all_are_damaged_one_line_says_so_and_nothing_changes(workdir, writing, caplog):
    save(workdir, 1, 2)
    for step in (1, 2):
        truncate(workdir / "checkpoints" / str(step) / "config" / "metadata")
    before = files(workdir)
    with pytest.raises(UserError, match=r"^every checkpoint .*step 2: config/metadata.*$"):
        restored_step(workdir, make_config() if writing else None)
    assert files(workdir) == before
    assert not told(caplog)


def test_a_refused_configuration_leaves_everything_as_it_was(workdir):
    save(workdir, 1, 2)
    empty(workdir / "checkpoints" / "2" / SEAL)
    before = files(workdir)

    def refuse(saved):
        raise UserError("no")

    with (
        Checkpoints(workdir, make_config()) as manager,
        pytest.raises(UserError, match="no"),
    ):
        manager.restore(refuse, whole)
    assert files(workdir) == before


def test_another_network_than_the_checkpoint_is_of_is_told_from_damage(workdir):
    save(workdir, 1, 2)

    def wider(_):
        return abstract(_).replace(ema={"layer": {"w": jax.ShapeDtypeStruct((65, 64), "f4")}})

    with (
        Checkpoints(workdir, make_config()) as manager,
        pytest.raises(UserError, match=r"step 2 .* another version"),
    ):
        manager.restore(wider, whole)
    assert steps(workdir) == [1, 2]


def test_a_write_that_was_cut_short_is_not_a_checkpoint(workdir, caplog):
    save(workdir, 1, 2)
    folder = workdir / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert restored_step(workdir, make_config()) == 1
    assert not told(caplog)
    save(workdir, 2)
    assert [path.name for path in sorted(folder.iterdir())] == ["1", "2"]
    assert restored_step(workdir) == 2


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(workdir):
    threads = threading.enumerate()
    with (  # noqa: PT012  (where the error arrives is Orbax's business)
        pytest.raises(UserError, match=r"^cannot write checkpoints to .*: .*$"),
        Checkpoints(workdir, make_config()) as manager,
    ):
        (workdir / "checkpoints").rmtree()
        (workdir / "checkpoints").write_text("in the way")
        manager.save(make_state(1))
    end = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in threads and not t.daemon]:
        assert time.monotonic() < end, left  # the program could not end
        time.sleep(0.01)
