import pytest
import tiny
import torch

from resae import AffineOnly, Method, replacement
from resae.evaluation.continuations import continuation_rows, greedy, repeated

P, G = 7, 6


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def prompts():
    return tiny.ids(5, P, seed=21)


@pytest.fixture(scope="module")
def methods(lm):
    stack = tiny.stack(lm)
    return [
        Method("resae", stack, 4),
        Method("exact", tiny.exact_stack(lm), 64),
        Method("affine_only", AffineOnly(stack), None),
    ]


@pytest.fixture(scope="module")
def rows(lm, prompts, methods):
    found = continuation_rows(lm, methods, prompts, new_tokens=G, batch_rows=2)
    return {(row.method, row.loop): row for row in found}


def written(lm, prompts, n):
    """Greedy text by whole passes, without a cache."""
    ids = prompts
    for _ in range(n):
        ids = torch.cat([ids, lm.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_numbers_are_those_of_whole_passes(lm, prompts, methods, rows):
    plain = written(lm, prompts, G)
    clean = lm.logits(plain)[:, P - 1 : -1].double().log_softmax(-1)
    for (name, loop), row in rows.items():
        stack = next(m.stack for m in methods if m.name == name)
        with replacement(lm, stack, loop=loop or "open"):
            text = written(lm, prompts, G)
            replaced = lm.logits(plain)[:, P - 1 : -1].double().log_softmax(-1)
        of_text = lm.logits(text)[:, P - 1 : -1].double().log_softmax(-1)
        ce = -of_text.gather(2, text[:, P:].unsqueeze(-1)).mean()
        kl = (clean.exp() * (clean - replaced)).sum(-1)
        first = [
            next((i for i in range(G) if a[P + i] != b[P + i]), G)
            for a, b in zip(text, plain, strict=True)
        ]
        assert row.perplexity == pytest.approx(float(ce.exp()), rel=1e-4)
        assert row.agreement_tokens == sum(first) / 5
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert row.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-3, abs=1e-6)
        assert row.perplexity_low <= row.perplexity <= row.perplexity_high
        assert (row.prompts, row.prompt_tokens, row.new_tokens) == (5, P, G)
    ce = -clean.gather(2, plain[:, P:].unsqueeze(-1)).mean()
    assert row.perplexity_plain == pytest.approx(float(ce.exp()), rel=1e-4)


def test_a_perfect_stack_writes_the_same_text(rows):
    for loop in ("open", "closed"):
        row = rows["exact", loop]
        assert row.agreement_tokens == G
        assert row.kl < 1e-4
        assert row.perplexity == pytest.approx(row.perplexity_plain)
    assert rows["resae", "closed"].agreement_tokens < G
    assert rows["resae", "closed"].reference is None
    maps, theirs = rows["affine_only", None], rows["resae", "closed"]
    assert maps.reference == "resae"
    assert maps.difference == pytest.approx(maps.kl - theirs.kl)
    assert rows["exact", "open"].reference is None  # of another k


def test_cached_text_is_that_of_whole_passes(lm, prompts):
    assert torch.equal(greedy(lm, prompts, G), written(lm, prompts, G)[:, P:])


def test_repeated_stretches_are_counted():
    text = torch.tensor(
        [[1, 2, 3, 4, 1, 2, 3, 4], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]]
    )
    assert repeated(text).tolist() == [1, 4, 0]
    assert repeated(text[:, :3]).tolist() == [0, 0, 0]


def test_bad_input_is_named(lm, prompts, methods):
    with pytest.raises(ValueError, match="0 prompts and new_tokens=4, expected at least one"):
        continuation_rows(lm, methods, prompts[:0], new_tokens=4)
    with pytest.raises(ValueError, match="different models"):
        continuation_rows(tiny.gemma2(), methods, prompts, new_tokens=4)
    with pytest.raises(ValueError, match="context"):
        continuation_rows(lm, methods, prompts, new_tokens=64)
