"""Runs with their work directory or their data in a bucket.

A stand-in for Google Cloud Storage answers the clients that access real buckets.
"""

import ast
import contextlib
import json
import re

import numpy as np
import pytest
from helpers import tiny
from helpers.bucket import Bucket
from helpers.examples import encoded, make_config

from drl_jax.data import arrays, sources
from drl_jax.errors import UserError
from drl_jax.tasks import likelihood, table

pytestmark = pytest.mark.infrastructure

PACKAGE = tiny.ROOT / "drl_jax"
SHORT = {
    "train__num_steps": 10,
    "log__sample_every_steps": 5,
    "checkpoint__every_steps": 5,
    "evaluation__num_samples": 20,
    "evaluation__num_data": 40,
}
CHEAP_LIKELIHOOD = [
    "--config.likelihood.chains=8",
    "--config.likelihood.distributions=12",
    "--config.likelihood.transitions=1",
    "--config.likelihood.burn_in=0",
    "--config.likelihood.warmup_steps=1",
]
# Flags of each task, and a pattern for one of the files that it writes.
TASKS = {
    "sample": (["--num_samples=10"], r"samples/.*/samples\.npy"),
    "evaluate": ([], r"metrics\.json"),
    "interpolate": (["--pairs=1", "--frames=3"], r"interpolations/.*/metrics\.json"),
    "inpaint": (["--completions=2", "--rounds=1"], r"inpaintings/.*/metrics\.json"),
    "restore": (
        ["--operator=blur:1", "--samples=8"],
        r"restorations/.*/metrics\.json",
    ),
    "compose": (
        ["--num_samples=8", "--weights=0.5", "--config.mcmc.warmup_steps=2"],
        r"compositions/.*/metrics\.json",
    ),
    "long_run": (
        ["--num_steps=2", "--num_chains=8", "--levels=0,3"],
        r"long_run/.*/long_run\.json",
    ),
    "likelihood": (CHEAP_LIKELIHOOD, r"likelihood/.*/likelihood\.json"),
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
    """The bucket, with a run in it."""
    assert tiny.main(*tiny.training("gs://bucket/run", **SHORT)) == 0
    return bucket


def names(bucket, pattern):
    """Returns the objects of the run whose names relative to it match a pattern."""
    return [name for name in bucket.objects if re.fullmatch(f"run/{pattern}", name)]


def assert_no_temporary_objects(bucket):
    assert not names(bucket, r"(.*/)?\.[^/]*")


@pytest.mark.slow
def test_training_writes_everything_to_the_bucket(trained):
    assert len(names(trained, r"checkpoints/(5|10)/crc32\.json")) == 2
    assert names(trained, r"grids/.*\.png") == ["run/grids/00000005.png"]
    (events,) = names(trained, "events.*")
    assert b"grad_norm" in trained.objects[events]
    assert trained.objects["run/samples.png"].startswith(b"\x89PNG")
    assert json.loads(trained.objects["run/metrics.json"])["step"] == 10
    assert_no_temporary_objects(trained)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_the_run_and_writes_to_the_bucket(trained, task, monkeypatch):
    # After ten steps of training, no bounds of log Z are usable.
    for check in ("require_consistent", "require_usable"):
        monkeypatch.setattr(likelihood, check, lambda *args, **kwargs: None)
    args, result = TASKS[task]
    for name in names(trained, result):
        del trained.objects[name]
    assert tiny.main(f"--mode={task}", "--workdir=gs://bucket/run", *args) == 0
    assert len(names(trained, result)) == 1
    assert_no_temporary_objects(trained)


def test_images_in_a_bucket_are_found_without_reading_them(bucket, caplog):
    images = {"a.png": 3, "x/b.png": 4, "._c.png": 5, "__MACOSX/a.png": 6}
    for folder in ("images", "others"):
        for name, value in images.items():
            bucket.put(f"{folder}/{name}", encoded(np.full((8, 8), value, np.uint8)))
        bucket.put(f"{folder}/z.png", b"no image")
    config = make_config("folder:gs://bucket/images")
    with caplog.at_level("INFO"):
        source = sources.open_source(config)
    assert caplog.messages == ["found 3 images in gs://bucket/images"]
    images = source.read(range(3))
    assert [image if image is None else image.max() for image in images] == [3, 4, None]
    assert "z.png" in caplog.messages[1]
    # Another folder in place of another time: TensorFlow caches what it knows about a file.
    bucket.put("others/x/b.png", encoded(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    others = sources.open_source(make_config("folder:gs://bucket/others"))
    assert others.version(3) != source.version(3)
    assert others.identity == source.identity  # each size would cost a request


@pytest.mark.parametrize("kind", ["npz", "npy", "csv"])
def test_arrays_in_a_bucket_are_those_on_disk(bucket, tmp_path, kind):
    x, file = np.float32([[1, 2, 5], [3, 4, 9]]), tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(file, x=x)
    elif kind == "npy":
        np.save(file, x)
    else:
        np.savetxt(file, x, delimiter=",", header="a,b,c", comments="")
    bucket.put(f"arrays/{file.name}", file.read_bytes())
    assert arrays.outline(f"{kind}:gs://bucket/arrays/{file.name}").shape == (2, 3)
    found, on_disk = (
        sources.Arrays(f"{kind}:{place}") for place in (f"gs://bucket/arrays/{file.name}", file)
    )
    np.testing.assert_array_equal(found.read([0, 1]), x)
    assert found.identity == on_disk.identity
    with pytest.raises(UserError, match="there is no such file"):
        arrays.read(f"{kind}:gs://bucket/arrays/none.{kind}")


def test_every_task_is_tested():
    """The others do not read a run; an import writes a checkpoint as training does."""
    others = "train", "import_original", "import_cdrl", "plan", "prepare"
    assert {*TASKS, *others} == {*table.TASKS}


@pytest.mark.slow
def test_training_resumes_from_the_newest_undamaged_checkpoint(trained, caplog):
    for name in names(trained, ".*"):
        trained.put(name.replace("run", "again", 1), trained.objects[name])
    damaged = "again/checkpoints/10/state/_METADATA"
    trained.put(damaged, trained.objects[damaged][:-1])
    changes = SHORT | {"train__num_steps": 15}
    assert tiny.main(*tiny.training("gs://bucket/again", **changes)) == 0
    assert "checkpoint of step 10 is damaged" in caplog.text
    assert "from step 5 of 15" in caplog.text
    for folder in ("10.damaged", "10", "15"):
        assert f"again/checkpoints/{folder}/crc32.json" in trained.objects


@pytest.mark.parametrize("args", [tiny.training("gs://others/run"), ["--mode=sample"]])
def test_a_bucket_without_access_is_an_error_of_one_line(bucket, capsys, args):
    assert tiny.main(*args, "--workdir=gs://others/run") == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: cannot (write to|read) gs://others/run: .* 403 .*", line)


@pytest.mark.parametrize(
    ("name", "words"), [("others", "cannot be accessed: .* 403 "), ("bucket", "no such folder")]
)
def test_images_in_a_bucket_without_access_are_not_called_missing(bucket, name, words):
    folder = f"folder:gs://{name}/nonesuch"
    with pytest.raises(UserError, match=f"'{folder}'[^\n]* {words}"):
        sources.open_source(make_config(folder))


# The following tests cover code that the tests above do not reach: files may be accessed only
# with epath, Orbax and clu, which know buckets.
FILE_MODULES = {"fileinput", "glob", "pathlib", "shutil", "tempfile"}
# Configurations are Python programs on this machine; the benchmark needs temporary folders. The
# command line replaces a standard output that nobody reads. On a disk, unlike in a bucket,
# folders can be links, and the sizes of files cost no request.
EXCEPTIONS = {
    "config.py": ["pathlib"],
    "data/image_files.py": ["os.stat", "os.path", "os.scandir"],
    "tools/benchmark.py": ["tempfile"],
    "tasks/command_line.py": ["os.dup2", "os.open", "os.devnull", "os.O_WRONLY"],
    "runtime/jax_setup.py": [
        "os.path",
        "os.makedirs",
        "os.access",
        "os.W_OK",
        *3 * ["os.path"],
    ],
}
# What `os` has besides files.
ALLOWED = {"PathLike", "_exit", "cpu_count", "environ", "fspath", "getpid"}


def local_file_access(source):
    """Returns the names in a module's source that access local files only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id="open"):
                found.append("open")
            case ast.Attribute(value=ast.Name(id="io"), attr="open"):
                found.append("io.open")
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name not in ALLOWED:
                found.append(f"os.{name}")
            case ast.Import(names=aliases):
                found += [alias.name for alias in aliases if alias.name in FILE_MODULES]
                found += [alias.name for alias in aliases if alias.name.startswith("os.")]
            case ast.ImportFrom(module=str(name)):
                found += [name] * (name.partition(".")[0] in {*FILE_MODULES, "os"})
    return found


@pytest.mark.parametrize(
    "module",
    sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")),
)
def test_no_module_accesses_only_local_files(module):
    assert local_file_access((PACKAGE / module).read_text()) == EXCEPTIONS.get(module, [])


@pytest.mark.parametrize(
    ("source", "name"),
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
def test_local_file_access_is_detected(source, name):
    assert local_file_access(source) == [name]
