"""A code that `on_codes` returns replaces the code."""

import pytest
import tiny
import torch

from resae import DecodeLoop, replacement
from resae_kernels import SparseCode

NAME = tiny.NAMES[0]


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


def logits(lm, stack, ids, **options):
    with replacement(lm, stack, **options):
        return lm.logits(ids)


def without(latent, strongest=None):
    """A function that takes a latent out of the code of the first layer."""

    def change(name, code):
        if name != NAME:
            return None
        acts = code.acts.masked_fill(code.indices == latent, 0)
        slots = acts.topk(strongest or acts.shape[-1], dim=-1).indices  # codes come in any order
        return SparseCode(acts.gather(-1, slots), code.indices.gather(-1, slots))

    return change


def common_latent(lm, stack, ids):
    codes = {}
    logits(lm, stack, ids, on_codes=codes.__setitem__)
    return int(codes[NAME].indices.flatten().mode().values)


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("effects", ["propagated", "frozen"])
def test_a_returned_code_does_what_the_edit_does(lm, loop, keep_error, effects):
    stack, ids = tiny.stack(lm), tiny.ids()
    latent = common_latent(lm, stack, ids)
    edits = [{"layer": 0, "action": "ablate", "latents": latent}]
    asked = {"keep_error": keep_error, "effects": effects}
    by_edit = logits(lm, stack, ids, loop=loop, interventions={"edits": edits, **asked})
    returned = logits(
        lm, stack, ids, loop=loop, on_codes=without(latent), interventions={"edits": [], **asked}
    )
    torch.testing.assert_close(returned, by_edit, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(returned, logits(lm, stack, ids, loop=loop), atol=1e-2)


@pytest.mark.parametrize("effects", ["propagated", "frozen"])
def test_it_comes_after_edits_and_reaches_predictions_by_transported_dictionaries(lm, effects):
    stack, ids = tiny.stack(lm), tiny.ids(1, 1)
    options = {
        "interventions": {
            "edits": [
                {"layer": 0, "action": "clamp", "latents": 3, "value": 2.0},
                {"layer": 0, "action": "add", "vector": [0.5] * 32},
            ],
            "effects": effects,
        },
        "on_codes": without(3, strongest=2),
    }
    plain = logits(lm, stack, ids, **options)
    carried = logits(lm, stack, ids, transport_bytes=10**9, **options)
    torch.testing.assert_close(carried, plain, rtol=1e-4, atol=1e-3)
    read_only = options | {"on_codes": without(3)}
    assert not torch.allclose(logits(lm, stack, ids, **read_only), plain, atol=1e-2)


def test_a_returned_code_of_its_own_is_no_change_and_bits_stay(lm):
    stack, ids = tiny.stack(lm), tiny.ids()
    assert torch.equal(
        logits(lm, stack, ids, on_codes=lambda _, code: code), logits(lm, stack, ids)
    )


def test_generation_writes_with_the_returned_codes(lm):
    stack, ids = tiny.stack(lm), tiny.ids(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)

    def written(**options):
        with replacement(lm, stack, **options):
            return lm.model.generate(ids, use_cache=True, **settings)

    half = written(on_codes=lambda _, code: SparseCode(code.acts / 2, code.indices))
    edits = [
        {"layer": layer, "action": "scale", "latents": list(range(64)), "value": 0.5}
        for layer in tiny.LAYERS
    ]
    assert torch.equal(half, written(interventions=edits))
    assert not torch.equal(half, written())


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda _, code: code.acts, TypeError, "on_codes returned Tensor at .* or None"),
        (
            lambda _, code: SparseCode(code.acts[..., :2], code.indices),
            ValueError,
            r"acts \[3, 12, 2\] and indices \[3, 12, 4\] .* expected both \[3, 12, 'k'\]",
        ),
        (lambda _, code: SparseCode(code.acts[:1], code.indices[:1]), ValueError, "on_codes"),
        (
            lambda _, code: SparseCode(code.acts, code.indices + 64),
            ValueError,
            r"on_codes returned the latent \d+ at blocks\..*expected 0 to 63",
        ),
    ],
)
def test_what_is_no_code_of_these_tokens_is_refused(lm, function, error, message):
    with pytest.raises(error, match=message):
        logits(lm, tiny.stack(lm), tiny.ids(), on_codes=function)


def test_in_a_decode_loop_codes_are_only_read(lm):
    write = DecodeLoop(lm, max_length=16)
    with (
        replacement(lm, tiny.stack(lm), on_codes=lambda _, code: code),
        pytest.raises(ValueError, match="DecodeLoop: on_codes returned .*lm.model.generate"),
    ):
        write(tiny.ids(1, 4), max_new_tokens=4)
