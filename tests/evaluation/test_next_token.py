import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resae.evaluation.metrics import cross_entropy, kl_divergence
from resae.evaluation.next_token import largest_difference, next_token_losses
from resae.models.unembedding import unembedding_of

MOST = 1000
"""Entries of a block: parts of 2048 tokens for every number of rows here."""


@pytest.fixture(scope="module", params=["pythia", "gemma2", "llama", "gemma3"])
def passes(request):
    """A model's head, and what it reads at the end of three passes `[N, D]`."""
    lm = tiny.FAMILIES[request.param]()
    unembedding = unembedding_of(lm, tiny.ids(1))
    clean = unembedding.final(tiny.ids())
    finals = [clean, clean + 0.1 * torch.randn_like(clean), clean.flip(1)]
    return lm, unembedding, finals


def whole_logits(lm, final):
    """All logits in float64, by formulas of their own."""
    head = lm.model.get_output_embeddings()
    logits = final.double() @ head.weight.detach().double().T
    cap = getattr(lm.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def test_losses_are_those_of_whole_logits_in_float64(passes):
    lm, unembedding, finals = passes
    ids = tiny.ids()
    losses = next_token_losses(
        unembedding,
        [final[:, :-1].flatten(0, 1) for final in finals],
        ids[:, 1:].flatten(),
        most_logits=MOST,
    )
    log_p = [whole_logits(lm, final)[:, :-1].log_softmax(-1) for final in finals]
    for ce, kl, log_q in zip(losses.ce, losses.kl, log_p, strict=True):
        expected = -log_q.gather(2, ids[:, 1:, None]).flatten()
        torch.testing.assert_close(ce, expected, rtol=1e-5, atol=1e-5)
        expected = (log_p[0].exp() * (log_p[0] - log_q)).sum(-1).flatten()
        torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    assert not losses.kl[0].any()


def test_block_sizes_do_not_matter_and_agree_with_the_metrics(passes):
    lm, unembedding, finals = passes
    ids = tiny.ids()
    flat, targets = [f[:, :-1].flatten(0, 1) for f in finals], ids[:, 1:].flatten()
    blocks, one = (
        next_token_losses(unembedding, flat, targets, most_logits=n) for n in (MOST, 10**9)
    )
    torch.testing.assert_close(blocks.ce, one.ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blocks.kl, one.kl, rtol=1e-5, atol=1e-5)
    logits = [whole_logits(lm, final).float() for final in finals]
    for i, replaced in enumerate(logits):
        expected = cross_entropy(replaced, ids).flatten().double()
        torch.testing.assert_close(one.ce[i], expected, rtol=1e-4, atol=1e-4)
        expected = kl_divergence(logits[0], replaced).flatten().double()
        torch.testing.assert_close(one.kl[i], expected, rtol=1e-4, atol=1e-4)


def test_largest_difference_of_logits(passes):
    lm, unembedding, finals = passes
    one, other = (final.flatten(0, 1) for final in finals[:2])
    expected = (whole_logits(lm, one) - whole_logits(lm, other)).abs().max()
    assert largest_difference(unembedding, one, other, most_logits=MOST) == pytest.approx(
        float(expected), rel=1e-4
    )
    assert largest_difference(unembedding, one, one) == 0.0
    other[-1, -1] = torch.nan
    assert torch.isnan(torch.tensor(largest_difference(unembedding, one, other, most_logits=MOST)))


class Sizes(TorchDispatchMode):
    """Records the largest result with more columns than the model is wide."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        view = isinstance(result, torch.Tensor) and result._base is not None
        if isinstance(result, torch.Tensor) and not view and result.shape[-1:] > (640,):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_more_than_a_block_of_logits_is_ever_made(monkeypatch):
    from resae import Method, evaluate
    from resae.evaluation import next_token

    lm, rows = tiny.gemma2(), tiny.ids(6, 30)
    methods = [Method("resae", tiny.stack(lm), 4)]
    most = 6 * 29 * 700  # 700 of 2048 tokens, where all rows are together
    monkeypatch.setitem(next_token.MOST_LOGITS, "cpu", most)
    with Sizes() as sizes:
        evaluate(lm, methods, [rows])
    assert most / 2 < sizes.largest <= most
