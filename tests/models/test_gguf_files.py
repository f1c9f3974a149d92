import numpy as np
import pytest
import torch

from resae import HookedLM
from resae.models import gguf_files
from resae.models.gguf_files import gguf_file

D, V, BLOCKS = 32, 8, 2


def written(path):
    """A GGUF file with a Llama of random float32 weights and a vocabulary of a few tokens."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(2 * D)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "d", "ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
    for i in range(BLOCKS):
        shapes |= {f"blk.{i}.attn_{x}": (D, D) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{x}_norm": (D,) for x in ("attn", "ffn")}
        shapes |= {f"blk.{i}.ffn_{x}": (2 * D, D) for x in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (D, 2 * D)}
    tensors = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_model_opens_by_its_path_which_is_recorded(tmp_path, by):
    file = tmp_path / "model.gguf"
    tensors = written(file)
    name = str(file if by == "file" else tmp_path)
    lm = HookedLM.from_pretrained(name, dtype=torch.float64)
    assert (lm.name, lm.revision, lm.n_layers, lm.d_model) == (name, None, BLOCKS, D)
    assert lm.special_ids == (0, 1)
    down = lm.blocks[1].mlp.down_proj.weight
    assert down.dtype == torch.float64
    torch.testing.assert_close(down, torch.tensor(tensors["blk.1.ffn_down"]).double())
    assert HookedLM.described(lm.name).n_layers == BLOCKS


def test_missing_packages_are_named_with_their_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ModuleNotFoundError, match=r"gguf and accelerate; .*resae\[gguf\]"):
            HookedLM.from_pretrained(str(path))


def test_a_folder_with_several_files_or_another_format_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"text")
    with pytest.raises(ValueError, match="does not begin with 'GGUF'"):
        gguf_file(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        gguf_file(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert gguf_file(str(tmp_path)) is None
