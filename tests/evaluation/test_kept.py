import pytest
import tiny
import torch

from resae.data.activations import capture_tokens
from resae.evaluation.kept import kept_latents
from resae.evaluation.redundancy import LargestCosines, redundancy


def test_kept_silent_and_redundant_latents_are_counted():
    lm = tiny.pythia()
    before, after = tiny.stack(lm), tiny.stack(lm)
    with torch.no_grad():
        after.sae(1).W_dec[:16] *= -1  # a quarter turns round
        after.sae(2).encoder.bias[:32] = -1e6  # half falls silent
    ids = tiny.ids(4, 12)
    ids[:, 0] = lm.special_ids[0]
    found = kept_latents(lm, before, after, ids.split(2))
    assert found.kept_directions == [1.0, 0.75, 1.0]
    assert found.tokens == 4 * 11
    assert found.silent[0][0] == found.silent[0][1]
    xs = capture_tokens(lm, ids, lm.hook_points(tiny.LAYERS))
    for which, stack in enumerate((before, after)):
        for layer, (acts, indices) in enumerate(stack.encode(xs, loop="closed")):
            active = len(indices[acts > 0].unique())
            assert found.silent[layer][which] == pytest.approx(1 - active / 64)
    assert found.silent[2][1] >= 0.5
    for value, stack in zip(found.redundancy, (before, after), strict=True):
        dictionaries = [stack.sae(i).W_dec for i in range(3)]
        assert value == pytest.approx(
            redundancy(LargestCosines(dictionaries, within=True)).mean_max_cos
        )
    assert any("100.0%, 75.0%, 100.0%" in line for line in found.lines())


def test_without_text_and_of_one_layer_the_rest_is_left_out():
    lm = tiny.pythia()
    stack = tiny.stack(lm, "none", layers=(1,))
    found = kept_latents(lm, stack, stack, [])
    assert (found.kept_directions, found.silent, found.redundancy) == ([1.0], [], None)
    assert len(found.lines()) == 1
