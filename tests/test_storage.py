import pytest
import torch

from resae.storage import (
    load_json,
    load_tensors,
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
