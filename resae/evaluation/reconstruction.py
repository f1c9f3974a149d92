"""Quality of reconstructions from clean activations, and firing rates of latents: sums per document
of one method and loop. Definitions: `resae.evaluation.metrics`.

Every mean over the stream is taken around the mean activation x̄ of all evaluated tokens, which is
known before (a first pass over the text); it stays the same in resamples of the documents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resae.choices import Loop
from resae.evaluation.intervals import Bootstrap, Quantity, divided
from resae.evaluation.methods import Method
from resae.evaluation.rows import DENSITY_EDGES, DensityRow, ReconstructionRow, SharedLatentsRow
from resae.evaluation.sums import Sums, per_row
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode

_TINY = 1e-300


class StreamMeans:
    """Mean activations of the selected layers: sums of the first pass over the text."""

    def __init__(self) -> None:
        self.sums = Sums(0)

    def add(self, xs: Sequence[Tensor], kept: Tensor) -> None:
        """Add L streams `[N, D]`, of which the tokens `kept [N]` are no sinks."""
        self.sums.add("tokens", torch.tensor([int(kept.sum()), len(kept)]))
        for layer, x in enumerate(xs):
            of_kept = x[kept.to(x.device)].double().sum(0)
            self.sums.add(str(layer), torch.stack([of_kept, x.double().sum(0)]))

    def without_sinks(self, layer: int) -> Tensor:
        """`[D]` float64."""
        return self.sums[str(layer)][0] / max(1, int(self.sums["tokens"][0]))

    def with_sinks(self, layer: int) -> Tensor:
        """`[D]` float64."""
        return self.sums[str(layer)][1] / max(1, int(self.sums["tokens"][1]))


class Reconstruction:
    """Reconstructions of one method in one loop, layer by layer.

    Args:
        documents: number of documents.
    """

    def __init__(self, method: Method, loop: Loop | None, means: StreamMeans, documents: int):
        self.method = method
        self.loop = loop
        self._means = means
        self.sums = [Sums(documents) for _ in range(method.stack.n_layers)]
        """Sums of documents, per layer."""
        self.latents = [Sums(documents) for _ in range(method.stack.n_layers)]
        """Per layer: `fired [M]` tokens, `strength [M]` sum of acts; `target_origin [D]`."""

    def add(
        self, xs: Sequence[Tensor], sinks: Tensor, documents: Tensor, tokens: Sequence[int]
    ) -> None:
        """Add L streams `[N, D]` of B rows, of which the tokens `sinks [N]` are sinks.

        Args:
            documents: `[B]` number of the document of every row.
            tokens: number of tokens of every row.
        """
        stack = self.method.stack
        x_hats, codes = stack(xs, loop=self.loop or Loop.OPEN)
        kept = ~sinks
        for layer, (x, x_hat, sums) in enumerate(zip(xs, x_hats, self.sums, strict=True)):
            of_tokens = self._of_stream(layer, x.double(), x_hat.double(), kept.to(x.device))
            if isinstance(stack, ReSAE):
                sae, code = stack.sae(layer), codes[layer]
                of_tokens["active"] = (code.acts > 0).sum(-1) * kept.to(code.acts.device)
                prediction = stack.predictor(layer, x_hats if self.loop == "closed" else xs)
                if prediction is not None:
                    target = (x - prediction).double()
                    error = target - sae.decode(*code).double()
                    of_tokens["target_error"] = error.square().sum(-1) * kept.to(x.device)
                    self._add_target(layer, target, kept, documents, tokens)
                _add_latents(self.latents[layer], code, kept, sae.config.d_sae)
            sums.add_rows(documents, **{name: per_row(v, tokens) for name, v in of_tokens.items()})
        if isinstance(stack, ReSAE) and stack.shared:
            within = variance_within(codes, kept, stack.sae(0).config.d_sae)
            self.latents[0].add("variance_of_token", within)

    def _of_stream(self, layer: int, x: Tensor, x_hat: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Terms of the sums over tokens, `[N]` each; only those `with_sinks` count sinks."""
        mean = self._means.without_sinks(layer).to(x.device)
        mean_with_sinks = self._means.with_sinks(layer).to(x.device)
        error = (x - x_hat).square().sum(-1)
        spread = (x - mean).square().sum(-1)
        xx, hh, xh = x.square().sum(-1), x_hat.square().sum(-1), (x * x_hat).sum(-1)
        of_kept = {
            "tokens": torch.ones_like(error),
            "error": error,
            "spread": spread,
            "explained": 1 - error / spread.clamp_min(_TINY),
            "cosine": xh / (xx * hh).sqrt().clamp_min(_TINY),
            "norm_ratio": (hh / xx.clamp_min(_TINY)).sqrt(),
            "squared_norm": hh,
            "product": xh,
        }
        return {name: torch.where(kept, value, 0.0) for name, value in of_kept.items()} | {
            "error_with_sinks": error,
            "spread_with_sinks": (x - mean_with_sinks).square().sum(-1),
            "sinks": ~kept,
        }

    def _add_target(
        self, layer: int, target: Tensor, kept: Tensor, documents: Tensor, tokens: Sequence[int]
    ) -> None:
        """Add an autoencoder's targets `[N, D]`. Their mean is not known before, so they are summed
        around that of the first tokens: a large offset would eat the digits."""
        kept, origins = kept.to(target.device), self.latents[layer].columns
        if "target_origin" not in origins:
            origins["target_origin"] = target[kept].mean(0).cpu()
        centred = (target - origins["target_origin"].to(target.device)) * kept.unsqueeze(-1)
        self.sums[layer].add_rows(
            documents,
            target_sum=per_row(centred, tokens),
            target_squares=per_row(centred.square().sum(-1), tokens),
        )

    def quantities(self, layer: int, bootstrap: Bootstrap) -> dict[str, Quantity | None]:
        """Columns of `ReconstructionRow` that have intervals.

        Raises:
            ValueError: no tokens, or a stream that never varied.
        """
        sums = self.sums[layer]
        tokens = sums.total("tokens")
        if not tokens:
            raise ValueError("fvu: no tokens were added; the evaluation set is empty")
        if not sums.total("spread"):
            raise ValueError(f"fvu: x does not vary over the {tokens:.0f} tokens")
        total = {
            n: bootstrap.total(column) for n, column in sums.columns.items() if column.ndim == 1
        }
        count = total["tokens"]
        fvu = divided(total["error"], total["spread"])
        of_target = fvu if "active" in total else None
        if "target_error" in total:
            of_target = divided(total["target_error"], bootstrap.total(_target_spread(sums)))
        return {
            "fvu_stream": fvu,
            "fvu_target": of_target,
            "l0": total.get("active", np.zeros_like(count)) / count,
            "fvu_with_sinks": divided(total["error_with_sinks"], total["spread_with_sinks"]),
            "explained_variance": 1 - fvu,
            "explained_variance_legacy": total["explained"] / count,
            "cosine": total["cosine"] / count,
            "norm_ratio": total["norm_ratio"] / count,
            "reconstruction_bias": divided(total["squared_norm"], total["product"]),
        }

    def row(
        self, layer: int, bootstrap: Bootstrap, reference: "Reconstruction | None"
    ) -> ReconstructionRow:
        """The row of one layer; `reference`: what its explained variance is compared with."""
        quantities = self.quantities(layer, bootstrap)
        difference = None
        if reference is not None:
            theirs = reference.quantities(layer, bootstrap)["explained_variance"]
            difference = quantities["explained_variance"] - theirs  # type: ignore[operator]
        fired = self.latents[layer].columns.get("fired")
        columns: dict[str, Any] = {}
        for name, quantity in {**quantities, "difference": difference}.items():
            columns |= bootstrap.columns(name, quantity)
        return ReconstructionRow(
            method=self.method.name,
            loop=None if self.loop is None else str(self.loop),
            k=self.method.k,
            layer=self.method.stack.hook_points[layer],
            dead_fraction=None if fired is None else float((fired == 0).double().mean()),
            sinks=round(self.sums[layer].total("sinks")),
            reference=None if reference is None else reference.method.name,
            **columns,
        )

    def density_row(self, layer: int) -> DensityRow:
        """The row of firing rates of one layer."""
        tokens = round(self.sums[layer].total("tokens"))
        density = self.latents[layer]["fired"].double() / tokens
        activity = max(float(density.sum()), _TINY)
        over = {bound: density > bound for bound in (0.01, 0.1)}
        logs = density[density > 0].log10().clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
        counts = torch.histogram(logs, torch.tensor(DENSITY_EDGES, dtype=torch.float64)).hist
        return DensityRow(
            method=self.method.name,
            loop=None if self.loop is None else str(self.loop),
            k=self.method.k,
            layer=self.method.stack.hook_points[layer],
            tokens=tokens,
            alive_fraction=float((density > 0).double().mean()),
            over_1_percent=float(over[0.01].double().mean()),
            over_10_percent=float(over[0.1].double().mean()),
            activity_over_1_percent=float(density[over[0.01]].sum()) / activity,
            activity_over_10_percent=float(density[over[0.1]].sum()) / activity,
            edges=DENSITY_EDGES,
            counts=counts.long().tolist(),
        )

    def shared_latents_row(self) -> SharedLatentsRow:
        """The row of a dictionary that all layers share: which layers its latents are active at."""
        fired = torch.stack([latents["fired"] for latents in self.latents])
        acts = torch.stack([latents["strength"] for latents in self.latents])
        alive = acts.sum(0) > 0
        fired, acts = fired[:, alive], acts[:, alive]
        shares = acts / acts.sum(0)
        entropy = -torch.special.xlogy(shares, shares).sum(0)
        total = float(acts.sum())
        return SharedLatentsRow(
            method=self.method.name,
            k=self.method.k,
            layers_per_latent=float((fired > 0).sum(0).double().mean()),
            effective_layers=float(entropy.exp().mean()),
            variance=float(_spread_over_layers(acts.sum(1, keepdim=True))) / total,
            variance_of_latent=float(_spread_over_layers(acts)) / total,
            variance_of_token=float(self.latents[0]["variance_of_token"]) / total,
        )


def variance_within(codes: Sequence[SparseCode], kept: Tensor, M: int) -> Tensor:
    """Σ over tokens and latents of Σ_ℓ act (ℓ − ℓ̄)², ℓ̄ the mean layer of a latent at a token, of
    codes `[N, k]` of one dictionary at L layers; tokens that are not `kept [N]` left out."""
    N = len(kept)
    token = torch.arange(N).unsqueeze(1)
    keys, acts, layers = [], [], []
    for layer, code in enumerate(codes):
        here = code.acts.detach().cpu().double() * kept.cpu().unsqueeze(1)
        active = here > 0
        keys.append((token * M + code.indices.cpu())[active])
        acts.append(here[active])
        layers.append(torch.full((int(active.sum()),), layer))
    groups, of_group = torch.unique(torch.cat(keys), return_inverse=True)
    table = torch.zeros(len(codes), len(groups), dtype=torch.float64)
    table.index_put_((torch.cat(layers), of_group), torch.cat(acts), accumulate=True)
    return _spread_over_layers(table)


def _spread_over_layers(acts: Tensor) -> Tensor:
    """Σ_j Σ_ℓ act_ℓj (ℓ − ℓ̄_j)² of acts `[L, n]`, ℓ̄_j the mean layer of column j."""
    layers = torch.arange(len(acts), dtype=torch.float64).unsqueeze(1)
    mean = (acts * layers).sum(0) / acts.sum(0)
    return (acts * (layers - mean).square()).sum()


def _add_latents(latents: Sums, code: SparseCode, kept: Tensor, M: int) -> None:
    """Add the tokens `[N]` that are kept: how often each latent fires, and its acts."""
    acts, indices = (part[kept.to(part.device)].cpu().flatten() for part in code)
    indices, acts = indices[acts > 0], acts[acts > 0].double()
    latents.add("fired", torch.bincount(indices, minlength=M))
    latents.add("strength", torch.bincount(indices, acts, minlength=M))


def _target_spread(sums: Sums) -> Tensor:
    """`[documents]` Σ‖t − t̄‖² of targets summed around another point, t̄ the mean of all."""
    shift = sums["target_sum"].sum(0) / sums.total("tokens")
    around = sums["target_squares"] - 2 * sums["target_sum"] @ shift
    return around + sums["tokens"] * shift.square().sum()
