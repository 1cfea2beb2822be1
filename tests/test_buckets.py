"""A run that lives in a bucket, through the clients that it has on a TPU, to a stand-in."""

import ast
import contextlib
import json
import re

import pytest
from helpers import tiny
from helpers.bucket import Bucket

from drl_jax import main

SHORT = {
    "train__num_steps": 10,
    "log__sample_every_steps": 5,
    "checkpoint__every_steps": 5,
    "evaluation__num_samples": 20,
    "evaluation__num_data": 40,
}
BRIEFLY = [
    "chains=8",
    "rungs=12",
    "transitions=1",
    "burn_in=0",
    "warmup_steps=1",
    "max_gap=1e9",
]
MODES = {
    "sample": (["--num_samples=10"], r"samples/.*/samples\.npy"),
    "evaluate": ([], r"metrics\.json"),
    "interpolate": (["--pairs=1", "--frames=3"], r"interpolations/.*/metrics\.json"),
    "inpaint": (["--completions=2", "--rounds=1"], r"inpaintings/.*/metrics\.json"),
    "long_run": (
        ["--num_steps=2", "--num_chains=8", "--levels=0,3"],
        r"long_run/.*/long_run\.json",
    ),
    "likelihood": (
        [f"--config.likelihood.{change}" for change in BRIEFLY],
        r"likelihood/.*/likelihood\.json",
    ),
    "ood": (["--against=inverted"], r"ood/.*/ood\.json"),
    "export": ([], r"model\.npz"),
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(Bucket(tmp_path_factory.mktemp("bucket"))) as bucket,
    ):
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        yield bucket
    assert not (tiny.ROOT / "gs:").exists()


@pytest.fixture(scope="module")
def trained(bucket):
    """The bucket with a run in it."""
    assert tiny.main(*tiny.training("gs://bucket/run", **SHORT)) == 0
    return bucket


def names(bucket, pattern):
    """Of the run's objects, those whose names below it match."""
    return [name for name in bucket.objects if re.fullmatch(f"run/{pattern}", name)]


def assert_nothing_half_written(bucket):
    assert not names(bucket, r"(.*/)?\.[^/]*")


@pytest.mark.slow
def test_a_run_is_in_the_bucket(trained):
    assert len(names(trained, r"checkpoints/(5|10)/crc32\.json")) == 2
    assert names(trained, r"grids/.*\.png") == ["run/grids/00000005.png"]
    (events,) = names(trained, "events.*")
    assert b"grad_norm" in trained.objects[events]
    assert trained.objects["run/samples.png"].startswith(b"\x89PNG")
    assert json.loads(trained.objects["run/metrics.json"])["step"] == 10
    assert_nothing_half_written(trained)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_the_run_and_writes_beside_it(trained, mode):
    args, result = MODES[mode]
    for name in names(trained, result):
        del trained.objects[name]
    assert tiny.main(f"--mode={mode}", "--workdir=gs://bucket/run", *args) == 0
    assert len(names(trained, result)) == 1
    assert_nothing_half_written(trained)


def test_every_mode_is_among_them():
    """An import makes a checkpoint, as training does; a plan reads no run."""
    assert {*MODES, "train", "import_original", "plan"} == {*main.MODES}


@pytest.mark.slow
def test_training_goes_on_there_past_a_damaged_checkpoint(trained, caplog):
    for name in names(trained, ".*"):
        trained.put(name.replace("run", "again", 1), trained.objects[name])
    hurt = "again/checkpoints/10/state/_METADATA"
    trained.put(hurt, trained.objects[hurt][:-1])
    changes = SHORT | {"train__num_steps": 15}
    assert tiny.main(*tiny.training("gs://bucket/again", **changes)) == 0
    assert "checkpoint of step 10 is damaged" in caplog.text
    assert "going on from step 5 of 15" in caplog.text
    for folder in ("10.damaged", "10", "15"):
        assert f"again/checkpoints/{folder}/crc32.json" in trained.objects


@pytest.mark.parametrize("args", [tiny.training("gs://others/run"), ["--mode=sample"]])
def test_a_bucket_of_others_is_told_in_a_line(bucket, capsys, args):
    assert tiny.main(*args, "--workdir=gs://others/run") == 1
    *_, told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: cannot (write to|read) gs://others/run: .* 403 .*", told)


# And what those cases do not come to: nothing but epath, Orbax and clu may reach a file.
FILE_MODULES = {"fileinput", "glob", "pathlib", "shutil", "tempfile"}
# Folders of this machine, for processes that are timed on it, and gone with them.
SCRATCH = {"benchmark.py": ["tempfile"]}
OF_PROCESSES = {
    "_exit",
    "close",
    "cpu_count",
    "environ",
    "fork",
    "getpid",
    "pipe",
    "read",
    "waitpid",
    "write",
}


def reaches(source):
    """What a module has that reaches files by itself, which in a bucket are not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id="open"):
                found.append("open")
            case ast.Attribute(value=ast.Name(id="io"), attr="open"):
                found.append("io.open")
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name not in OF_PROCESSES:
                found.append(f"os.{name}")
            case ast.Import(names=aliases):
                found += [alias.name for alias in aliases if alias.name in FILE_MODULES]
                found += [alias.name for alias in aliases if alias.name.startswith("os.")]
            case ast.ImportFrom(module=str(name)):
                found += [name] * (name.partition(".")[0] in {*FILE_MODULES, "os"})
    return found


@pytest.mark.parametrize(
    "module",
    sorted((tiny.ROOT / "drl_jax").rglob("*.py")),
    ids=lambda path: path.relative_to(tiny.ROOT / "drl_jax").as_posix(),
)
def test_no_module_reaches_files_by_itself(module):
    assert reaches(module.read_text()) == SCRATCH.get(module.name, [])


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("with open(workdir / 'a') as f: pass", "open"),
        ("map(open, paths)", "open"),
        ("io.open(path)", "io.open"),
        ("os.makedirs(workdir)", "os.makedirs"),
        ("os.path.exists(workdir)", "os.path"),
        ("import os.path", "os.path"),
        ("from os import path", "os"),
        ("def f():\n  import shutil", "shutil"),
        ("from pathlib import Path", "pathlib"),
    ],
)
def test_what_reaches_files_is_seen(source, what):
    assert reaches(source) == [what]
