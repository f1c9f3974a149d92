import pytest
import tiny
import torch

from resae import AffineOnly, generate, replacement
from resae.replace import MODES


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def lm(request):
    return tiny.FAMILIES[request.param]()


@pytest.fixture(scope="module")
def neox():
    return tiny.pythia()


def with_special(lm, rows=2, length=10):
    """Ids whose first token, and one in the middle, are special."""
    ids = tiny.ids(rows, length)
    ids[:, 0] = ids[-1, 5] = lm.special_ids[-1]
    return ids


def greedy(lm, ids, new_tokens):
    """Plain `model.generate`, cached, not stopped by EOS; nothing in `ids` is padding."""
    return lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def logits(lm, stack, ids, **options):
    with replacement(lm, stack, **options):
        return lm.logits(ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_perfect_stack_changes_nothing(lm, mode, loop):
    ids = with_special(lm)
    replaced = logits(lm, tiny.exact_stack(lm), ids, mode=mode, loop=loop)
    clean = lm.logits(ids)
    assert float((replaced - clean).norm() / clean.norm()) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_an_imperfect_stack_changes_something(lm, mode):
    ids = with_special(lm)
    assert not torch.allclose(logits(lm, tiny.stack(lm), ids, mode=mode), lm.logits(ids), atol=0.1)


def test_teacher_forced_all_layers_are_exactly_the_last_one_alone(lm):
    stack, ids = tiny.stack(lm), with_special(lm)
    for loop in ("open", "closed"):
        options = {"mode": "teacher_forced", "loop": loop, "replace_special": True}
        everything = logits(lm, stack, ids, **options)
        assert torch.equal(everything, logits(lm, stack, ids, layers=[3], **options))
        assert not torch.equal(everything, logits(lm, stack, ids, layers=[1], **options))


@pytest.mark.parametrize("mode", ["online", "error_added"])
def test_online_and_error_added_see_every_layer(lm, mode):
    stack, ids = tiny.stack(lm), with_special(lm)
    everything = logits(lm, stack, ids, mode=mode)
    for fewer in ([3], [1, 3], [0, 1]):
        assert not torch.allclose(everything, logits(lm, stack, ids, mode=mode, layers=fewer))


def test_teacher_forced_puts_in_what_the_stack_makes_of_the_clean_pass(neox):
    stack, ids = tiny.stack(neox), tiny.ids()
    points = neox.hook_points(tiny.LAYERS)
    captured = neox.capture(ids, points)
    x_hats = stack([captured[p] for p in points], loop="open").x_hats
    by_hand = neox.replace(ids, dict(zip(points, x_hats, strict=True)))
    assert torch.equal(logits(neox, stack, ids, mode="teacher_forced", loop="open"), by_hand)
    given = logits(
        neox, stack, ids, mode="teacher_forced", loop="open", clean=[captured[p] for p in points]
    )
    assert torch.equal(given, by_hand)


def test_error_added_adds_the_clean_error_to_the_running_stream(neox):
    stack, ids = tiny.stack(neox), tiny.ids()
    points = neox.hook_points(tiny.LAYERS)
    captured = neox.capture(ids, points)
    x_hats = stack([captured[p] for p in points], loop="open").x_hats
    put = {
        p: (lambda running, e=x_hat - captured[p]: running + e)
        for p, x_hat in zip(points, x_hats, strict=True)
    }
    replaced = logits(neox, stack, ids, mode="error_added", loop="open")
    torch.testing.assert_close(replaced, neox.replace(ids, put), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_online_takes_the_residual_against_what_was_put_in_or_by_name_what_was_there(neox, loop):
    """The chain by hand: closed from reconstructions, open from the stream before replacement."""
    stack, ids = tiny.stack(neox), tiny.ids()
    before, put = [], []

    def at(layer):
        def function(running):
            seen = put if loop == "closed" else before
            base = stack.predictor(layer, seen)
            code = stack.sae(layer).encode(running, base=base)
            x_hat = stack.sae(layer).decode(*code, base=stack.predictor(layer, put))
            before.append(running)
            put.append(x_hat)
            return x_hat

        return function

    hooks = {p: at(i) for i, p in enumerate(neox.hook_points(tiny.LAYERS))}
    by_hand = neox.replace(ids, hooks)
    torch.testing.assert_close(logits(neox, stack, ids, loop=loop), by_hand)
    other = "open" if loop == "closed" else "closed"
    assert not torch.allclose(logits(neox, stack, ids, loop=other), by_hand, atol=1e-2)


def test_the_chain_runs_through_layers_that_are_not_replaced(neox):
    """With only the last layer replaced, its reconstruction is still made of all codes."""
    stack, ids = tiny.stack(neox), tiny.ids()
    points = neox.hook_points(tiny.LAYERS)
    captured = [neox.capture(ids, points)[p] for p in points]
    expected = stack(captured, loop="closed").x_hats[2]
    seen = {}
    after = neox.hook_point("blocks.3.hook_resid_post")
    with replacement(neox, stack, layers=[3]), neox.hooked({after: lambda x: seen.update(x=x)}):
        neox.logits(ids)
    torch.testing.assert_close(seen["x"], expected, atol=1e-4, rtol=1e-4)


def test_special_tokens_and_padding_are_left_alone_unless_asked(neox):
    stack = tiny.stack(neox)
    ids = with_special(neox)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen = {}
    point = neox.hook_point(0)
    clean = neox.capture(ids, [point], attention_mask=mask)[point]
    with (
        replacement(neox, stack, layers=[0]) as active,
        neox.hooked({point: lambda x: seen.update(x=x)}),
    ):
        neox.logits(ids, attention_mask=mask)
    untouched = (seen["x"] == clean).all(-1)
    expected = (ids == 0) | (mask == 0)
    assert torch.equal(untouched, expected)
    (count,) = active.counts
    assert (count.calls, count.left, count.replaced) == (1, 5, 15)
    with replacement(neox, stack, layers=[0], replace_special=True) as active:
        neox.logits(ids)
    assert active.counts[0].replaced == 20


def test_every_decode_step_is_replaced_prefill_and_single_tokens(lm):
    stack = tiny.stack(lm)
    ids = with_special(lm, rows=1, length=6)
    lengths = []
    point = lm.hook_point(0)
    with (
        replacement(lm, stack) as active,
        lm.hooked({point: lambda x: lengths.append(x.shape[1])}),
    ):
        out = greedy(lm, ids, 7)
    assert lengths == [6] + [1] * 6
    special = int(lm.is_special(out[:, :-1]).sum())
    for count in active.counts:
        assert count.calls == 7
        assert count.replaced + count.left == 6 + 6
        assert count.left == special


def test_cached_generation_is_the_full_forward_token_by_token(lm):
    stack = tiny.stack(lm)
    ids = with_special(lm, rows=1, length=6)
    with replacement(lm, stack):
        out = greedy(lm, ids, 8)
        whole = lm.logits(out)
    assert torch.equal(whole[:, 5:-1].argmax(-1), out[:, 6:])
    assert not torch.equal(greedy(lm, ids, 8), out)


def test_the_model_is_as_before_afterwards_also_after_an_error(lm):
    ids = with_special(lm)
    before, modules = lm.logits(ids), list(lm.model.modules())

    def fail(_):
        raise ArithmeticError("planted")

    hooks = {lm.hook_point(2): fail}
    with replacement(lm, tiny.stack(lm)), lm.hooked(hooks), pytest.raises(ArithmeticError):
        lm.logits(ids)
    assert torch.equal(lm.logits(ids), before)
    assert all(a is b for a, b in zip(modules, lm.model.modules(), strict=True))


def test_a_pass_that_broke_off_does_not_leak_into_the_next(neox):
    stack, ids = tiny.stack(neox), tiny.ids()
    expected = logits(neox, stack, ids)
    with replacement(neox, stack):
        neox.capture(ids, neox.hook_points([1]))  # stops between the first and the last layer
        assert torch.equal(neox.logits(ids), expected)


def test_affine_only_leaves_the_first_layer_and_maps_the_rest(neox):
    stack, ids = tiny.stack(neox), tiny.ids()
    points = neox.hook_points(tiny.LAYERS)
    first = neox.capture(ids, points)[points[0]]
    maps = stack.predictor
    second = first @ maps.A[0] + maps.c[0]
    third = second @ maps.A[1] + maps.c[1]
    by_hand = neox.replace(ids, {points[1]: second, points[2]: third})
    torch.testing.assert_close(logits(neox, AffineOnly(stack), ids), by_hand)


def test_generate_writes_the_same_text_for_the_same_seed_and_counts(neox):
    stack = tiny.stack(neox)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = generate(neox, "In the beginning", stack, max_new_tokens=9, seed=1)
    assert torch.equal(torch.rand(1), expected)
    again = generate(neox, "In the beginning", stack, max_new_tokens=9, seed=1)
    other = generate(neox, "In the beginning", stack, max_new_tokens=9, seed=2)
    plain = generate(neox, "In the beginning", max_new_tokens=9, seed=1)
    assert first == again
    assert first.text != other.text
    assert first.text != plain.text
    assert plain.counts == []
    prompt = len(neox.tokenizer("In the beginning")["input_ids"]) + 1
    for count in first.counts:
        assert count.calls == first.tokens
        assert count.replaced + count.left == prompt + first.tokens - 1
        assert count.left >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"mode": "sideways"}, "mode='sideways'.*online", id="mode"),
        pytest.param({"loop": "half"}, "loop='half'", id="loop"),
        pytest.param({"layers": [2]}, r"no blocks\.2.*blocks\.0", id="layer-not-in-stack"),
        pytest.param({"layers": [3, 1]}, "out of order", id="order"),
        pytest.param({"layers": []}, "no layers selected", id="none"),
    ],
)
def test_impossible_replacements_are_refused(neox, options, message):
    with pytest.raises(ValueError, match=message), replacement(neox, tiny.stack(neox), **options):
        pass


def test_what_cannot_be_done_while_running_is_refused(neox):
    stack = tiny.stack(neox)
    with pytest.raises(ValueError, match="different models"), replacement(tiny.gemma2(), stack):
        pass
    elsewhere = tiny.stack(neox).to("meta")
    with pytest.raises(ValueError, match="on meta, the model on cpu"), replacement(neox, elsewhere):
        pass
    embedded = neox.model.get_input_embeddings()(tiny.ids())
    with (
        pytest.raises(ValueError, match="inputs_embeds.*replace_special"),
        replacement(neox, stack),
    ):
        neox.model(inputs_embeds=embedded)
    with replacement(neox, stack), pytest.raises(RuntimeError, match="call the model, not its"):
        neox.blocks[1](torch.zeros(1, 3, 32), position_embeddings=(torch.zeros(1, 3, 2),) * 2)
    with (
        replacement(neox, stack, mode="teacher_forced"),
        pytest.raises(ValueError, match="mode='online' for cached"),
    ):
        neox.model.generate(tiny.ids(1), max_new_tokens=3, use_cache=True, pad_token_id=0)
    with pytest.raises(ValueError, match="exceed the context of 64"):
        generate(neox, "word " * 60, stack)
