import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resae.storage import (
    is_unused,
    load_json,
    load_tensors,
    locked,
    remove_partial,
    save_json,
    save_tensors,
    write_atomically,
)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"cannot write .*file .*disk full.*untouched"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_json_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors", "test")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    save_json(tmp_path / "j.json", {"x": [1, None]})
    assert load_json(tmp_path / "j.json", "test") == {"x": [1, None]}


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_json(tmp_path / "j.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"SAE.*t\.safetensors.*200 bytes.*truncated"):
        load_tensors(path, "SAE")
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_json(tmp_path / "j.json", "stack")
    with pytest.raises(FileNotFoundError, match="stack: no file"):
        load_json(tmp_path / "none.json", "stack")


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "folder").mkdir()
    kept = [tmp_path / "a.partial", tmp_path / "folder" / ".b", tmp_path / "folder" / "c"]
    for path in kept:
        path.write_text("")
    names = []
    write_atomically(tmp_path / "folder" / "d", lambda temporary: names.append(temporary.name))
    (tmp_path / "folder" / names[0]).write_text("half")
    remove_partial(tmp_path)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {*kept, tmp_path / "folder" / "d"}


def test_a_lock_leaves_nothing_behind_where_nothing_was_written(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        assert is_unused(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "file").write_text("")
        assert not is_unused(tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


def test_a_folder_is_locked_once(tmp_path):
    with locked(tmp_path):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .*, started 2"):
            locked(tmp_path).__enter__()
        assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_lock_file_of_an_earlier_boot_holds_nobody_up(tmp_path):
    """Its number is that of a living process now."""
    stale = {"pid": os.getppid(), "host": "here", "started": "2020-01-01"}
    (tmp_path / ".lock").write_text(json.dumps(stale))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


COUNTS = """import sys
from pathlib import Path
from resae.storage import locked
held = 0
while held < 100:
    try:
        with locked(Path(sys.argv[1])):
            (Path(sys.argv[1]) / "alone").open("x").close()
            (Path(sys.argv[1]) / "alone").unlink()
            held += 1
    except BlockingIOError:
        pass"""


def test_of_many_takers_one_at_a_time_has_the_lock(tmp_path):
    """Also in the moment in which the file is removed: two that hold it would meet at `alone`."""
    (tmp_path / "kept").touch()
    takers = [subprocess.Popen([sys.executable, "-c", COUNTS, str(tmp_path)]) for _ in range(3)]
    assert [taker.wait(120) for taker in takers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        assert "cannot be locked" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*file.below"):
        locked(Path(tmp_path / "file" / "below")).__enter__()
