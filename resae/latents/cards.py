"""From an index of firings to cards: text, effects and relatives of each latent asked for."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resae.latents.ablation import ablate
from resae.latents.directions import Readout, nearest, transported
from resae.latents.index import BINS, LatentIndex
from resae.latents.passages import Passages, window_starts
from resae.latents.records import LatentCard, LatentReport, Neighbour, Passage, TokenEffect
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE

LOGITS = 10
"""Tokens raised most, and lowered most, on a card."""
NEIGHBOURS = 3
"""Nearest latents per other layer and cosine."""
DESCRIBED = 512
"""Latents whose directions are worked on at once."""


INCOMPLETE = "\ufffd"
"""Decoded in place of bytes that are no whole character."""


class TokenTexts:
    """Token ids as text, each decoded once; part of a character as its name in ⟨⟩."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = self._text(token_id)
        return self._known[token_id]

    def _text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token_id}⟩"
        text = self._tokenizer.decode([token_id])
        if INCOMPLETE in text or not text:
            return f"⟨{self._tokenizer.convert_ids_to_tokens(token_id)}⟩"
        return text

    def row(self, token_ids: Sequence[int]) -> list[str]:
        """Texts of tokens that follow each other: one that completes a character is that
        character."""
        texts = [self(token_id) for token_id in token_ids]
        begin = 0  # of a run of parts of characters
        for i, token_id in enumerate(token_ids):
            if self._tokenizer is None or INCOMPLETE not in self._tokenizer.decode([token_id]):
                begin = i + 1
            elif i > begin:
                run = self._tokenizer.decode(token_ids[begin : i + 1])
                if INCOMPLETE not in run:
                    texts[i], begin = run, i + 1
        return texts


@torch.no_grad()
def describe_latents(
    lm: HookedLM,
    stack: ReSAE,
    index: LatentIndex,
    latents: Sequence[tuple[int, int]],
    *,
    name: str = "",
    measure_ablation: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LatentReport:
    """Describe latents by an index of what they fire on.

    Args:
        latents: pairs (selected layer, latent).
        name: of the stack.
        measure_ablation: whether to measure what ablating each changes; two passes per eight
            passages.
        progress: called with the number of latents described and of all.

    Returns:
        A report with one card per pair, in their order.

    Raises:
        ValueError: a layer or latent that there is not, or an index of another stack.
    """
    require_index_of(stack, index)
    lm.require_vocabulary(index.token_ids(), "latents: the index")
    for layer, latent in latents:
        require_latent(stack, layer, latent)
    readout = Readout.of(lm, index.token_ids())
    cards: dict[tuple[int, int], LatentCard] = {}
    texts = TokenTexts(lm.tokenizer)
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, latent in dict.fromkeys(latents):
        by_layer[layer].append(latent)
    for layer, all_here in by_layer.items():
        for start in range(0, len(all_here), DESCRIBED):
            here = all_here[start : start + DESCRIBED]
            for card in _cards(stack, index, readout, texts, layer, here):
                if measure_ablation:
                    card = _with_ablation(lm, stack, index, card)
                cards[layer, card.latent] = card
                if progress is not None:
                    progress(len(cards), len(latents))
    return LatentReport(
        model=lm.name,
        stack=name,
        layers=index.layer_names,
        d_sae=[len(layer.sums) for layer in index.layers],
        never_fired=[int((layer.firings == 0).sum()) for layer in index.layers],
        tokens=index.tokens,
        rows=index.rows_done,
        row_tokens=index.row_tokens,
        logits_through=_way(stack, readout),
        settings=index.settings,
        latents=[cards[pair] for pair in latents],
    )


def require_index_of(stack: ReSAE, index: LatentIndex) -> None:
    """Raise ValueError unless an index has the layers and sizes of a stack."""
    M = [stack.sae(layer).config.d_sae for layer in range(stack.n_layers)]
    of_index = [len(layer.sums) for layer in index.layers]
    if (stack.hook_points, M) != (index.layer_names, of_index):
        raise ValueError(
            f"latents: the index is of {', '.join(index.layer_names)} with {of_index} latents, the "
            f"stack has {', '.join(stack.hook_points)} with {M}; make the index anew"
        )


def require_latent(stack: ReSAE, layer: int, latent: int) -> None:
    """Raise ValueError for a layer or latent that a stack does not have."""
    if not 0 <= layer < stack.n_layers:
        raise ValueError(
            f"latents: layer {layer}, expected 0 to {stack.n_layers - 1}: a position among "
            f"{', '.join(stack.hook_points)}"
        )
    M = stack.sae(layer).config.d_sae
    if not 0 <= latent < M:
        raise ValueError(
            f"latents: {stack.hook_points[layer]} has no latent {latent}; expected 0 to {M - 1}"
        )


def spread_latents(index: LatentIndex, most: int) -> list[tuple[int, int]]:
    """At most this many pairs (layer, latent) that fired, as many of each layer, spread evenly over
    the range from rare to frequent."""
    pairs: list[tuple[int, int]] = []
    share = most // max(1, len(index.layers))
    for number, layer in enumerate(index.layers):
        firings = layer.firings
        alive = firings.argsort(stable=True)[int((firings == 0).sum()) :]
        count = min(share, len(alive))
        chosen = alive[(torch.arange(count) * len(alive)) // max(1, count)]
        pairs += [(number, latent) for latent in sorted(chosen.tolist())]
    return pairs


def _way(stack: ReSAE, readout: Readout | None) -> str:
    if readout is None:
        return "not known: the model's final norm or head has no known form"
    maps = f"affine maps to {stack.hook_points[-1]}, " if stack.chained else "directly to "
    return f"{maps}final norm (mean Jacobian over tokens of the text), unembedding"


def _cards(
    stack: ReSAE,
    index: LatentIndex,
    readout: Readout | None,
    texts: TokenTexts,
    layer: int,
    latents: Sequence[int],
) -> list[LatentCard]:
    here = torch.tensor(latents)
    raised, lowered = _logits(stack, readout, texts, layer, here)
    neighbours = _neighbours(stack, layer, here)
    of_layer, ids = index.layers[layer], index.token_ids()
    firings = of_layer.firings
    cards = []
    for number, latent in enumerate(latents):
        fired = int(firings[latent])
        counts = of_layer.histograms.counts[latent].tolist()
        while counts and counts[-1] == 0:
            counts.pop()
        cards.append(
            LatentCard(
                layer=layer,
                hook_point=index.layer_names[layer],
                latent=latent,
                firings=fired,
                density=fired / index.tokens,
                mean_act=_digits(float(of_layer.sums[latent]) / fired) if fired else None,
                largest_act=_digits(float(of_layer.strongest.values[latent].max()))
                if fired
                else None,
                bin_width=2.0 ** int(of_layer.histograms.exponents[latent]) / BINS if fired else 0,
                histogram=counts,
                passages=_passages(of_layer.strongest, latent, ids, texts),
                samples=_passages(of_layer.sampled, latent, ids, texts),
                raised=raised[number],
                lowered=lowered[number],
                nearest=neighbours[number],
            )
        )
    return cards


def _digits(number: float) -> float:
    """Rounded to four digits."""
    return float(f"{number:.4g}")


def _passages(kept: Passages, latent: int, ids: Tensor, texts: TokenTexts) -> list[Passage]:
    """Passages of a latent by falling act, each text once."""
    T, window = ids.shape[1], kept.shares.shape[2]
    found: dict[tuple[int, ...], Passage] = {}
    for slot in kept.values[latent].argsort(descending=True, stable=True).tolist():
        place, act = int(kept.places[latent, slot]), float(kept.values[latent, slot])
        if place < 0:
            continue
        row, position = divmod(place, T)
        start = int(window_starts(torch.tensor(position), window, T))
        token_ids = ids[row, start : start + window].tolist()
        acts = (kept.shares[latent, slot].float() * act).tolist()
        passage = Passage(
            row=row,
            start=start,
            token_ids=token_ids,
            tokens=texts.row(token_ids),
            acts=[_digits(act) for act in acts],
            peak=position - start,
        )
        found.setdefault(tuple(token_ids), passage)
    return list(found.values())


def _logits(
    stack: ReSAE, readout: Readout | None, texts: TokenTexts, layer: int, latents: Tensor
) -> tuple[list[list[TokenEffect]], list[list[TokenEffect]]]:
    if readout is None:
        return [[] for _ in latents], [[] for _ in latents]
    directions = stack.sae(layer).W_dec.detach().float()[latents]
    last = transported(stack, layer, directions)[-1]
    effects = readout.effects(directions if last is None else last, LOGITS)

    def listed(tokens: Tensor, logits: Tensor) -> list[list[TokenEffect]]:
        return [
            [TokenEffect(t, texts(t), _digits(v)) for t, v in zip(ts, vs, strict=True)]
            for ts, vs in zip(tokens.tolist(), logits.tolist(), strict=True)
        ]

    return listed(effects.top_tokens, effects.top), listed(effects.bottom_tokens, effects.bottom)


def _neighbours(stack: ReSAE, layer: int, latents: Tensor) -> list[list[Neighbour]]:
    found: list[dict[tuple[str, int], Neighbour]] = [{} for _ in latents]
    for other in range(stack.n_layers):
        if other == layer:
            continue
        for by_transported in (False, True)[: 1 + stack.chained]:
            best = nearest(stack, layer, latents, other, NEIGHBOURS, by_transported=by_transported)
            moved = None if best.transported is None else best.transported.tolist()
            for number, row in enumerate(best.latents.tolist()):
                for slot, latent in enumerate(row):
                    found[number][stack.hook_points[other], latent] = Neighbour(
                        stack.hook_points[other],
                        latent,
                        round(float(best.raw[number, slot]), 4),
                        None if moved is None else round(moved[number][slot], 4),
                    )
    return [list(of_latent.values()) for of_latent in found]


def _with_ablation(lm: HookedLM, stack: ReSAE, index: LatentIndex, card: LatentCard) -> LatentCard:
    passages = index.layers[card.layer].strongest
    loop = index.settings.get("loop", "open")
    found = ablate(lm, stack, card.layer, card.latent, passages, index.token_ids(), loop=loop)
    return replace(card, ablation=found)
