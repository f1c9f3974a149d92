"""Cost of ablating a latent on its own strongest passages: ΔCE and KL, measured.

The plain model runs over each passage's row up to the window's end, once as it is and once with the
latent's contribution taken out of the stream of its layer at every token, `h − z_j W_dec_j`: the
error of the reconstruction is kept, and later blocks react as they will. Averaged are the tokens of
the window from the latent's first firing on, whose predictions can change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resae.choices import Loop
from resae.data.activations import MODEL_ROWS
from resae.evaluation.next_token import next_token_losses
from resae.latents.collect import clean_codes
from resae.latents.passages import Passages, window_starts
from resae.models.hooked import HookedLM
from resae.models.unembedding import unembedding_of
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode


@dataclass(frozen=True)
class Ablation:
    """Effect of ablating one latent on its strongest passages, mean over tokens."""

    delta_ce: float
    """Cross-entropy with the latent ablated minus that of the plain model, nats per token."""
    kl: float
    """KL(plain ‖ ablated) of the next token, nats per token."""
    delta_ce_at_firings: float | None
    """The same of the tokens alone at which the latent fires; None: all are the last of a row."""
    kl_at_firings: float | None
    tokens: int
    """Tokens that the means are taken over."""


@torch.no_grad()
def ablate(
    lm: HookedLM,
    stack: ReSAE,
    layer: int,
    latent: int,
    passages: Passages,
    token_ids: Tensor,
    *,
    loop: Loop | str = "open",
) -> Ablation | None:
    """Ablate one latent on its strongest passages.

    Args:
        layer: selected layer.
        passages: of that layer.
        token_ids: `[R, T]`, the rows that the passages are in.

    Returns:
        None for a latent without passages, or that fires only where no next token is known.
    """
    T, window = token_ids.shape[1], passages.shares.shape[2]
    places = passages.places[latent]
    places = places[places >= 0]
    point = lm.hook_points(stack.hook_points)[layer]
    direction = stack.sae(layer).W_dec[latent]
    sums = torch.zeros(2, 2, dtype=torch.float64)  # window or firings × ΔCE or KL
    counts = [0, 0]
    for places_here in places.split(MODEL_ROWS):
        rows = token_ids[places_here // T].long()
        acts = _acts_of(clean_codes(lm, stack, rows, loop), layer, latent, rows.shape)
        starts = window_starts(places_here % T, window, T).unsqueeze(1)
        within = torch.arange(T)
        counted = (within >= starts) & (within < starts + window) & (within < T - 1)
        counted &= (acts > 0).cumsum(1) > 0
        change = acts.unsqueeze(2).to(direction) * direction.cpu()
        unembedding = unembedding_of(lm, rows.to(lm.device))
        plain = unembedding.final(rows.to(lm.device))

        def without(stream: Tensor, change: Tensor = change) -> Tensor:
            return stream - change.to(stream)

        with lm.replacing({point: without}):
            ablated = unembedding.final(rows.to(lm.device))
        places_kept = counted.flatten().nonzero().squeeze(1)
        finals = [f.flatten(0, 1)[places_kept.to(f.device)] for f in (plain, ablated)]
        targets = rows.roll(-1, 1).flatten()[places_kept].to(finals[0].device)
        losses = next_token_losses(unembedding, finals, targets)
        changes = torch.stack([losses.ce[1] - losses.ce[0], losses.kl[1]]).cpu()
        fires = acts.flatten()[places_kept] > 0
        sums += torch.stack([changes.sum(1), changes[:, fires].sum(1)])
        counts = [counts[0] + len(places_kept), counts[1] + int(fires.sum())]
    if not counts[0]:
        return None
    whole = (sums[0] / counts[0]).tolist()
    at_firings = (sums[1] / counts[1]).tolist() if counts[1] else [None, None]
    return Ablation(*whole, *at_firings, tokens=counts[0])


def _acts_of(
    codes: tuple[Tensor, Sequence[SparseCode]], layer: int, latent: int, shape: Sequence[int]
) -> Tensor:
    """`[B, T]`: acts of one latent, 0 at tokens that are not encoded."""
    tokens, of_layers = codes
    acts, indices = of_layers[layer]
    own = (acts * (indices == latent)).sum(1)
    found = torch.zeros(shape[0] * shape[1])
    found[tokens] = own
    return found.view(*shape)
