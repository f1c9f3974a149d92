import logging

import families
import pytest
import tiny
import torch
from torch import nn

from resae.models.unembedding import unembedding_of


@pytest.mark.parametrize("kind", [*families.CONFIGS, *families.UNLISTED])
def test_parts_of_the_vocabulary_are_those_of_the_models_logits(kind):
    options = {"final_logit_softcapping": 5.0} if kind == "gemma3_text" else {}
    lm = families.made(kind, **options)
    unembedding = unembedding_of(lm, tiny.ids(1, 9))
    assert unembedding.path is not None
    final = unembedding.final(tiny.ids())
    assert final.shape == (3, 12, lm.d_model)
    expected = lm.logits(tiny.ids()).flatten(0, 1)
    part = unembedding.logits(final.flatten(0, 1), 100, 1100)
    torch.testing.assert_close(part, expected[:, 100:1100], rtol=1e-5, atol=1e-5)
    assert torch.equal(lm.logits(tiny.ids()).flatten(0, 1), expected)  # the head is back


@pytest.mark.parametrize("break_head", [True, False])
def test_a_head_of_unknown_form_gives_whole_logits_and_says_so(break_head, caplog):
    lm = tiny.llama()
    if break_head:  # a factor that no config names
        lm.model.lm_head.register_forward_hook(lambda _m, _a, logits: logits * 2)
    else:
        lm.model.lm_head = nn.Sequential(lm.model.lm_head)
    with caplog.at_level(logging.WARNING):
        unembedding = unembedding_of(lm, tiny.ids(1, 9))
    assert "its logits are computed whole" in caplog.text
    final = unembedding.final(tiny.ids())
    assert torch.equal(final, lm.logits(tiny.ids()))
    assert torch.equal(unembedding.logits(final[0], 5, 90), final[0, :, 5:90])
