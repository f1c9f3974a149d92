"""The classes of other libraries that `accelerate` takes, as small as their interfaces allow: what
runs where the libraries are not installed. Parameters, methods and formulas are named as theirs.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn


class HookPoint(nn.Identity):
    """A place where hooks are registered."""


class TopK(nn.Module):
    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, scores):
        values, indices = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, indices, values.relu())


class TopKSAE(nn.Module):
    """SAELens: hook points around each stage, `W_enc [D, M]`, dense acts."""

    def __init__(self, D: int, M: int, k: int, **config: object):
        super().__init__()
        config = {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": True} | config
        self.cfg = SimpleNamespace(k=k, **config)
        self.W_enc, self.W_dec = nn.Parameter(torch.empty(D, M)), nn.Parameter(torch.empty(M, D))
        self.b_enc, self.b_dec = nn.Parameter(torch.empty(M)), nn.Parameter(torch.empty(D))
        for name in ("input", "acts_pre", "acts_post", "output", "recons"):
            setattr(self, f"hook_sae_{name}", HookPoint())
        self.activation_fn = self.get_activation_fn()
        self.use_error_term = self.hook_z_reshaping_mode = False
        self.d_head = None
        self.reshape_fn_out = lambda x, d_head: x  # noqa: ARG005
        self._setup_activation_normalization()

    def get_activation_fn(self) -> nn.Module:
        return TopK(self.cfg.k)

    def _setup_activation_normalization(self) -> None:
        def norm_in(x):
            self.x_norm_coeff = self.cfg.normalize / x.norm(dim=-1, keepdim=True)
            return x * self.x_norm_coeff

        normalize = getattr(self.cfg, "normalize", None)
        self.run_time_activation_norm_fn_in = norm_in if normalize else lambda x: x
        self.run_time_activation_norm_fn_out = (
            (lambda x: x / self.x_norm_coeff) if normalize else lambda x: x
        )

    def process_sae_in(self, x):
        x = self.run_time_activation_norm_fn_in(self.hook_sae_input(x))
        return x - self.b_dec * self.cfg.apply_b_dec_to_input

    def encode(self, x):
        scores = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            scores = scores * self.W_dec.norm(dim=-1)
        return self.hook_sae_acts_post(self.activation_fn(scores))

    def decode(self, feature_acts):
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self.W_dec.norm(dim=-1)
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def fold_W_dec_norm(self):
        norm = self.W_dec.norm(dim=-1)
        self.W_dec.data.div_(norm[:, None])
        for parameter in (self.W_enc, self.b_enc, *([self.threshold] * hasattr(self, "threshold"))):
            parameter.data.mul_(norm)

    def fold_activation_norm_scaling_factor(self, factor):
        self.W_enc.data *= factor
        self.W_dec.data /= factor
        self.b_dec.data /= factor

    def forward(self, x):
        x_hat = self.decode(self.encode(x))
        return self.hook_sae_output(x_hat + (x - x_hat).detach() if self.use_error_term else x_hat)


class StandardSAE(TopKSAE):
    """SAELens: ReLU in place of the selection."""

    def get_activation_fn(self) -> nn.Module:
        return nn.ReLU()

    def encode(self, x):
        scores = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.gate(scores, self.activation_fn(scores)))

    def gate(self, scores, acts):  # noqa: ARG002
        return acts


class JumpReLUSAE(StandardSAE):
    """SAELens: a threshold for each latent."""

    def __init__(self, D: int, M: int, k: int, **config: object):
        super().__init__(D, M, k, **config)
        self.threshold = nn.Parameter(torch.empty(M))

    def gate(self, scores, acts):
        return acts * (scores > self.threshold)


class EncoderOutput(NamedTuple):
    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor


class ForwardOutput(NamedTuple):
    sae_out: Tensor
    latent_acts: Tensor
    latent_indices: Tensor
    fvu: Tensor
    auxk_loss: Tensor
    multi_topk_fvu: Tensor


class SparseCoder(nn.Module):
    """sparsify: a code of k, all scores beside it."""

    def __init__(self, D: int, M: int, k: int, **config: object):
        super().__init__()
        config = {"activation": "topk", "transcode": False, "multi_topk": False} | config
        self.cfg = SimpleNamespace(k=k, **config)
        self.encoder, self.W_dec = nn.Linear(D, M), nn.Parameter(torch.empty(M, D))
        self.b_dec, self.W_skip = nn.Parameter(torch.empty(D)), None
        if config.get("skip_connection"):
            self.W_skip = nn.Parameter(torch.empty(D, D))

    def encode(self, x):
        scores = self.encoder(x if self.cfg.transcode else x - self.b_dec).relu()
        return EncoderOutput(*scores.topk(self.cfg.k, dim=-1, sorted=False), scores)

    def decode(self, top_acts, top_indices):
        rows = nn.functional.embedding(top_indices, self.W_dec)
        return (top_acts.unsqueeze(-1) * rows).sum(-2) + self.b_dec

    def forward(self, x, y=None, *, dead_mask=None, total_variance=None):
        acts, indices, scores = self.encode(x)
        y = x if y is None else y
        x_hat = self.decode(acts, indices)
        if self.W_skip is not None:
            x_hat = x_hat + x @ self.W_skip.mT
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        aux = x_hat.new_tensor(0.0)
        if dead_mask is not None:
            aux = scores[:, dead_mask].sum()
        fvu = (y - x_hat).pow(2).sum() / total_variance
        return ForwardOutput(x_hat, acts, indices, fvu, aux, x_hat.new_tensor(0.0))


class AutoEncoderTopK(nn.Module):
    """dictionary_learning: k in a buffer, the dictionary as `decoder.weight [D, M]`."""

    def __init__(self, D: int, M: int, k: int):
        super().__init__()
        self.activation_dim, self.dict_size = D, M
        self.register_buffer("k", torch.tensor(k))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.encoder, self.decoder = nn.Linear(D, M), nn.Linear(M, D, bias=False)
        self.b_dec = nn.Parameter(torch.empty(D))

    def encode(self, x, return_topk=False, use_threshold=False):
        scores = self.encoder(x - self.b_dec).relu()
        values, indices = scores.topk(int(self.k), sorted=False, dim=-1)
        dense = torch.zeros_like(scores).scatter_(-1, indices, values)
        if use_threshold:
            dense = scores * (scores > self.threshold)
        return (dense, values, indices, scores) if return_topk else dense

    def decode(self, x):
        return self.decoder(x) + self.b_dec

    def forward(self, x, output_features=False):
        dense = self.encode(x)
        return (self.decode(dense), dense) if output_features else self.decode(dense)


class BatchTopKSAE(AutoEncoderTopK):
    """dictionary_learning: one threshold at inference."""

    def scale_biases(self, scale):
        self.encoder.bias.data *= scale
        self.b_dec.data *= scale
        self.threshold.data *= scale

    def encode(self, x, return_active=False, use_threshold=True):
        scores = self.encoder(x - self.b_dec).relu()
        if use_threshold:
            acts = scores * (scores > self.threshold)
        else:
            values, indices = scores.flatten().topk(int(self.k) * len(x))
            acts = torch.zeros_like(scores).flatten().scatter(-1, indices, values).view_as(scores)
        return (acts, acts.sum(0) > 0, scores) if return_active else acts


class MatryoshkaBatchTopKSAE(nn.Module):
    """dictionary_learning: groups of latents, of which the last may be switched off."""

    def __init__(self, D: int, M: int, k: int):
        super().__init__()
        self.activation_dim, self.dict_size = D, M
        self.group_indices, self.active_groups = [0, M // 4, M], 2
        self.register_buffer("k", torch.tensor(k))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.W_enc, self.b_enc = nn.Parameter(torch.empty(D, M)), nn.Parameter(torch.empty(M))
        self.W_dec, self.b_dec = nn.Parameter(torch.empty(M, D)), nn.Parameter(torch.empty(D))

    def encode(self, x, return_active=False, use_threshold=True):
        scores = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        acts = scores * (scores > self.threshold) if use_threshold else scores
        acts[:, self.group_indices[self.active_groups] :] = 0
        return (acts, acts.sum(0) > 0, scores) if return_active else acts

    def decode(self, x):
        return x @ self.W_dec + self.b_dec

    def forward(self, x, output_features=False):
        acts = self.encode(x)
        return (self.decode(acts), acts) if output_features else self.decode(acts)


class JumpReluAutoEncoder(nn.Module):
    """dictionary_learning: a threshold for each latent."""

    def __init__(self, D: int, M: int):
        super().__init__()
        self.activation_dim, self.dict_size = D, M
        self.W_enc, self.b_enc = nn.Parameter(torch.empty(D, M)), nn.Parameter(torch.empty(M))
        self.W_dec, self.b_dec = nn.Parameter(torch.empty(M, D)), nn.Parameter(torch.empty(D))
        self.threshold = nn.Parameter(torch.empty(M))
        self.apply_b_dec_to_input = False

    def encode(self, x, output_pre_jump=False):
        scores = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        acts = (scores * (scores > self.threshold)).relu()
        return (acts, scores) if output_pre_jump else acts

    def decode(self, f):
        return f @ self.W_dec + self.b_dec

    def forward(self, x, output_features=False):
        acts = self.encode(x)
        return (self.decode(acts), acts) if output_features else self.decode(acts)


class AutoEncoder(nn.Module):
    """dictionary_learning: ReLU, and one bias on both sides."""

    def __init__(self, D: int, M: int):
        super().__init__()
        self.activation_dim, self.dict_size = D, M
        self.bias = nn.Parameter(torch.empty(D))
        self.encoder, self.decoder = nn.Linear(D, M), nn.Linear(M, D, bias=False)

    def encode(self, x):
        return self.encoder(x - self.bias).relu()

    def decode(self, f):
        return self.decoder(f) + self.bias

    def forward(self, x, output_features=False, ghost_mask=None):  # noqa: ARG002
        acts = self.encode(x)
        return (self.decode(acts), acts) if output_features else self.decode(acts)


LIBRARIES = {
    "sae_lens": (TopKSAE, StandardSAE, JumpReLUSAE),
    "sparsify": (SparseCoder,),
    "dictionary_learning": (
        AutoEncoderTopK,
        BatchTopKSAE,
        MatryoshkaBatchTopKSAE,
        JumpReluAutoEncoder,
        AutoEncoder,
    ),
}
for library, classes in LIBRARIES.items():
    module = sys.modules.setdefault(f"{library}.foreign", ModuleType(f"{library}.foreign"))
    vars(module).update(EncoderOutput=EncoderOutput, ForwardOutput=ForwardOutput)
    for cls in classes:
        cls.__module__ = module.__name__
        setattr(module, cls.__name__, cls)
