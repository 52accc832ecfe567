import os
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from delve_ray.errors import OptionError
from delve_ray.storage import Storage


@pytest.fixture(params=["path", "file-uri", "mock-uri"])
def storage(request, tmp_path):
    text = {"path": str(tmp_path / "run"), "file-uri": f"file://{tmp_path}/run", "mock-uri": "mock:///bucket/run"}
    return Storage(text[request.param])


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_what_is_written_is_read(storage):
    storage.prepare()
    storage.write_atomic("spectra/1.parquet", b"one")
    storage.write_atomic("spectra/2.parquet", pa.py_buffer(b"two"))
    storage.write_atomic("run.json", b"{}")

    assert storage.read_bytes("spectra/1.parquet") == b"one"
    assert storage.read_bytes("spectra/2.parquet") == b"two"
    assert storage.read_bytes("run.json") == b"{}"


def test_writing_again_replaces_the_whole_file(storage):
    storage.write_atomic("a/b/c", b"a long first version")
    storage.write_atomic("a/b/c", b"short")

    assert storage.read_bytes("a/b/c") == b"short"
    assert storage.list_files("a/b", "") == ["a/b/c"]


def test_names_do_not_choose_a_compression(storage):
    storage.write_atomic("blob.gz", b"plain")

    assert storage.read_bytes("blob.gz") == b"plain"


def test_lists_are_sorted_and_leave_out_hidden_and_other_files(storage):
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "_SUCCESS.parquet", "c.txt", "deep/d.parquet"):
        storage.write_atomic(f"spectra/{name}", b"")

    assert storage.list_files("spectra", ".parquet") == ["spectra/a.parquet", "spectra/b.parquet"]
    assert storage.list_files("nowhere", ".parquet") == []
    assert storage.list_directories("spectra") == ["spectra/deep"]
    assert storage.list_directories() == ["spectra"]


def test_exists_and_delete(storage):
    assert not storage.exists()
    storage.write_atomic("x/y", b"1")
    assert storage.exists()
    assert storage.exists("x")
    assert storage.exists("x/y")

    storage.delete("x/y")
    storage.delete("x/y")
    storage.delete("no/such/file")

    assert not storage.exists("x/y")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("x/y")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "a/", "./a", "a\0b", ".."])
def test_names_stay_inside(storage, name):
    for call in (storage.read_bytes, storage.exists, storage.delete, storage.child):
        with pytest.raises(ValueError, match="not a relative name inside"):
            call(name)
    with pytest.raises(ValueError, match="not a relative name inside"):
        storage.write_atomic(name, b"")


def test_prepare_creates_the_directory_and_leaves_it_empty(tmp_path):
    storage = Storage(tmp_path / "a" / "b")
    storage.prepare()
    storage.prepare()

    assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []


def test_prepare_names_option_path_reason_and_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(OptionError, match=r"savefile='.*/file/run': cannot write there.*Not a directory.*choose"):
        Storage(tmp_path / "file" / "run").prepare()


def test_prepare_notices_a_directory_that_takes_no_files(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match="No space left on device"):
        Storage(tmp_path).prepare()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    storage = Storage(tmp_path)
    storage.write_atomic("a/kept", b"old")
    seen = []

    def fail(*args):
        seen.extend(os.listdir(tmp_path / "a"))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, failing, fail)
    for name in ("a/kept", "a/new"):
        with pytest.raises(OSError, match="Input/output error"):
            storage.write_atomic(name, b"new")
    monkeypatch.undo()

    assert any(name.startswith(".kept.") for name in seen)  # it did get as far as a temporary file
    assert files_below(tmp_path) == ["a/kept"]
    assert storage.read_bytes("a/kept") == b"old"


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Storage(tmp_path).write_atomic("x", b"1")
    assert files_below(tmp_path) == []


def test_a_file_is_never_visible_in_part(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write_atomic("x", b"old")
    replace, seen = os.replace, []

    def look(source, target):
        seen.append((storage.read_bytes("x"), storage.list_files("", ""), Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    storage.write_atomic("x", b"new")

    assert seen == [(b"old", ["x"], b"new")]


def test_the_longest_names_can_be_written(tmp_path):
    name = "n" * 255
    Storage(tmp_path).write_atomic(name, b"1")
    assert os.listdir(tmp_path) == [name]


def test_a_relative_path_is_made_absolute_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/../a")
    monkeypatch.chdir("/")

    assert storage.is_local
    assert storage.local_path == storage.uri == str(tmp_path / "a")
    assert storage.path("spectra/x") == str(tmp_path / "a" / "spectra" / "x")


def test_a_filesystem_of_the_callers_own(tmp_path):
    storage = Storage("below", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    storage.prepare()
    storage.write_atomic("spectra/x", b"1")

    assert (tmp_path / "below" / "spectra" / "x").read_bytes() == b"1"
    assert not storage.is_local
    with pytest.raises(ValueError, match="not a local directory"):
        _ = storage.local_path


def test_a_child_is_the_storage_below(storage):
    child = storage.child("a/b")
    child.write_atomic("c", b"1")

    assert storage.read_bytes("a/b/c") == b"1"
    assert child.uri == f"{storage.uri}/a/b"


def test_passwords_stay_out_of_messages():
    with pytest.raises(OptionError, match="nosuch") as raised:
        Storage("nosuch://user:secret@bucket/run")
    assert "secret" not in str(raised.value)
    assert "user:***@bucket" in str(raised.value)


@pytest.mark.parametrize("savefile", ["", None, 3])
def test_what_is_no_path_is_refused(savefile):
    with pytest.raises(OptionError, match="savefile="):
        Storage(savefile)


def test_a_storage_travels_to_another_process(tmp_path):
    storage = pickle.loads(pickle.dumps(Storage(tmp_path)))
    storage.write_atomic("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_temporary_names_do_not_depend_on_the_temporary_directory(tmp_path, monkeypatch):
    # A rename across filesystems is a copy, and no longer atomic.
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    Storage(tmp_path).write_atomic("x", b"1")
    assert os.listdir(tmp_path) == ["x"]


def test_of_many_who_write_a_new_file_one_succeeds(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    storage = Storage(tmp_path / "run")
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda who: storage.write_new("run.json", str(who).encode()), range(32)))
    assert sum(written) == 1
    assert storage.read_bytes("run.json") == str(written.index(True)).encode()
    assert os.listdir(tmp_path / "run") == ["run.json"], "no temporary file is left"


def test_a_new_file_on_another_filesystem() -> None:
    storage = Storage("mock://bucket/run")
    assert storage.write_new("run.json", b"one")
    assert not storage.write_new("run.json", b"two")
    assert storage.read_bytes("run.json") == b"one"
