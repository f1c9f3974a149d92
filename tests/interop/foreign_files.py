"""Small autoencoders in the files of other libraries, written from tensors, and in plain PyTorch
what each of them computes."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

D, M, K = 16, 64, 6


class Plain(NamedTuple):
    """An autoencoder and its rule, densely."""

    W_enc: torch.Tensor  # [D, M]
    b_enc: torch.Tensor
    W_dec: torch.Tensor  # [M, D]
    b_dec: torch.Tensor
    threshold: torch.Tensor | None = None
    subtracts: bool = True

    def encode(self, x):
        scores = (x - self.b_dec * self.subtracts) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return scores.relu() * (scores > self.threshold)
        top = scores.topk(K, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, top.indices, top.values.relu())

    def decode(self, dense):
        return dense @ self.W_dec + self.b_dec


def plain(*, threshold=None, subtracts=True, seed=0) -> Plain:
    made = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=made)

    W_dec = draw(M, D)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if threshold == "each":
        threshold = draw(M).abs() * 2
    elif threshold is not None:
        threshold = torch.full((M,), float(threshold))
    return Plain(draw(D, M), 0.1 * draw(M), W_dec, 0.3 * draw(D), threshold, subtracts)


def activations(rows=32):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(9))


def write(folder: Path, name: str, tensors: dict, config: dict, config_name="cfg.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, folder / name)
    (folder / config_name).write_text(json.dumps(config))
    return folder


def saelens(folder: Path, sae: Plain, *, extra: dict | None = None, **settings) -> Path:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None and settings.get("architecture") != "standard":
        tensors["threshold"] = sae.threshold
    kind = {"architecture": "topk", "k": K} if sae.threshold is None else {}
    facts = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "prepend_bos": True}
    facts["hook_name"] = "blocks.6.hook_resid_post"
    cfg = {"architecture": "jumprelu", **kind, "d_in": D, "d_sae": M, "dtype": "float32"}
    cfg |= {"device": "cpu", "apply_b_dec_to_input": sae.subtracts, "metadata": facts}
    cfg |= {"normalize_activations": "none", "reshape_activations": "none"}
    return write(folder, "sae_weights.safetensors", {**tensors, **(extra or {})}, cfg | settings)


def saelens_5(folder: Path, sae: Plain, **settings) -> Path:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors["scaling_factor"] = torch.ones(M)
    cfg = {"d_in": D, "d_sae": M, "dtype": "torch.float32", "model_name": "gpt2", "hook_layer": 6}
    cfg |= {"hook_name": "blocks.6.hook_resid_pre", "normalize_activations": False}
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    return write(folder, "sae_weights.safetensors", tensors, cfg | settings)


def sparsify(folder: Path, sae: Plain, *, extra: dict | None = None, **settings) -> Path:
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc}
    tensors |= {"W_dec": sae.W_dec, "b_dec": sae.b_dec, **(extra or {})}
    cfg = {"activation": "topk", "expansion_factor": M // D, "normalize_decoder": True}
    cfg |= {"num_latents": 0, "k": K, "multi_topk": False, "skip_connection": False}
    cfg |= {"transcode": False, "d_in": D}
    cfg |= settings
    cfg = {name: value for name, value in cfg.items() if value is not None}
    return write(folder, "sae.safetensors", tensors, cfg)


def dictionary_learning(folder: Path, sae: Plain, cls: str, *, config: bool = True) -> Path:
    layout = {"JumpReluAutoEncoder": "W_enc", "MatryoshkaBatchTopKSAE": "W_enc"}
    state = {"encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc}
    state |= {"decoder.weight": sae.W_dec.T, "b_dec": sae.b_dec}
    if layout.get(cls):
        state = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if cls == "AutoEncoder":
        state["bias"] = state.pop("b_dec")
    elif cls == "AutoEncoderNew":
        state["decoder.bias"] = state.pop("b_dec")
    elif cls == "JumpReluAutoEncoder":
        state["threshold"] = sae.threshold
    else:
        threshold = -1.0 if sae.threshold is None else float(sae.threshold[0])
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
        if cls == "MatryoshkaBatchTopKSAE":
            state["group_sizes"] = torch.tensor([M // 4, 3 * M // 4])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if config:
        trainer = {"dict_class": cls, "k": K, "layer": 8, "lm_name": "gpt2"}
        trainer["submodule_name"] = "resid_post_layer_8"
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def mlsae(folder: Path, sae: Plain, **settings) -> Path:
    tensors = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    tensors |= {"pre_encoder_bias": sae.b_dec, "last_nonzero": torch.zeros(M, dtype=torch.long)}
    cfg = {"n_inputs": D, "n_latents": M, "k": K, "auxk": 8, "standardize": False}
    cfg |= {"dead_steps_threshold": 10, "layers": [0, 1, 2], **settings}
    return write(folder, "model.safetensors", tensors, cfg, "config.json")


def openai(file: Path, sae: Plain, *, activation="ReLU") -> Path:
    state = {"pre_bias": sae.b_dec, "latent_bias": sae.b_enc, "encoder.weight": sae.W_enc.T}
    state |= {"decoder.weight": sae.W_dec.T, "stats_last_nonzero": torch.zeros(M).long()}
    options = {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}
    torch.save(state | {"activation": activation, "activation_state_dict": options}, file)
    return file


def gemma_scope(folder: Path, sae: Plain) -> Path:
    folder = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_7"
    folder.mkdir(parents=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    arrays = {name: getattr(sae, name).numpy() for name in names}
    np.savez(folder / "params.npz", **arrays)
    return folder
