import gc
import io
import itertools
import pickle
import sys
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from threading import Barrier, Thread
from typing import Any
from weakref import ref

import pytest
import tiny
import torch
from transformers import CompileConfig, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from resae import (
    AffineOnly,
    DecodeLoop,
    HookedLM,
    ReSAE,
    SAEConfig,
    StrongestLatents,
    TopKSAE,
    generate,
    replacement,
)
from resae.choices import Mode
from resae.sae.boosted import BoostedSAE


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def lm(request):
    return tiny.FAMILIES[request.param]()


@pytest.fixture(scope="module")
def neox():
    return tiny.pythia()


@pytest.fixture(scope="module", params=["pythia", "gemma2"])
def either(request):
    return tiny.FAMILIES[request.param]()


EDITS = [
    {"layer": 0, "action": "clamp", "latents": [3, 8], "value": 6.0},
    {"layer": 0, "action": "add", "vector": [0.5] * 32, "at": "prompt"},
]


class Identity(AffineOnly):
    """A stack whose reconstruction is what it reads, bit for bit."""

    def step(self, layer, x, predictor_inputs, reconstructions):  # noqa: ARG002
        return x, None


def with_special(lm, rows=2, length=10):
    """Ids whose first token, and one in the middle, are special."""
    ids = tiny.ids(rows, length)
    ids[:, 0] = ids[-1, 5] = lm.special_ids[-1]
    return ids


def greedy(lm, ids, new_tokens, **options):
    """Plain `model.generate`, cached, not stopped by EOS; nothing in `ids` is padding."""
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return lm.model.generate(ids, max_new_tokens=new_tokens, **settings | options)


def logits(lm, stack, ids, **options):
    with replacement(lm, stack, **options):
        return lm.logits(ids)


@pytest.mark.parametrize("mode", tuple(Mode))
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_perfect_stack_changes_nothing(lm, mode, loop):
    ids = with_special(lm)
    replaced = logits(lm, tiny.exact_stack(lm), ids, mode=mode, loop=loop)
    clean = lm.logits(ids)
    assert float((replaced - clean).norm() / clean.norm()) < 1e-3


@pytest.mark.parametrize("mode", tuple(Mode))
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
            prediction = stack.predictor(layer, seen)
            code = stack.sae(layer).encode(running, prediction=prediction)
            x_hat = stack.sae(layer).decode(*code, prediction=stack.predictor(layer, put))
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
    assert (count.calls, count.skipped, count.replaced) == (1, 5, 15)
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
        assert count.replaced + count.skipped == 6 + 6
        assert count.skipped == special


def test_cached_generation_is_the_full_forward_token_by_token(lm):
    stack = tiny.stack(lm)
    ids = with_special(lm, rows=1, length=6)
    with replacement(lm, stack):
        out = greedy(lm, ids, 8, output_logits=True, return_dict_in_generate=True)
        whole = lm.logits(out.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(whole.argmax(-1), out.sequences[:, 6:])
    assert not torch.equal(greedy(lm, ids, 8), out.sequences)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"do_sample": True}, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="return-sequences"),
        pytest.param({"num_beams": 4}, id="beams"),
        pytest.param({"num_beams": 4, "num_return_sequences": 3}, id="beams-returned"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"cache_implementation": "static", "num_beams": 3}, id="static-beams"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt-lookup"),
    ],
)
def test_generation_with_any_cache_is_generation_without(either, options):
    """Beyond Gemma 2's sliding window of 8. Without a cache every step is a full forward pass, so
    that nothing of an earlier step, beam or rejected guess can have leaked in."""
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = with_special(either, rows=rows, length=10)
    ids[:, 7:] = ids[:, 2:5]  # something to look up
    plain = {k: v for k, v in options.items() if "cache" not in k and "lookup" not in k}
    with replacement(either, tiny.stack(either)) as active:
        torch.manual_seed(1)
        whole = greedy(either, ids, 9, use_cache=False, **plain)
        active.assert_replaced(decode_steps=0)
        torch.manual_seed(1)
        assert torch.equal(greedy(either, ids, 9, **options), whole)
        if "prompt_lookup_num_tokens" not in options:
            active.assert_replaced(decode_steps=8)
    torch.manual_seed(1)
    assert not torch.equal(greedy(either, ids, 9, **options), whole)


def test_an_assistant_changes_nothing_whichever_of_the_two_is_replaced(either):
    """It proposes, the model checks several tokens in one pass, and cuts its cache back."""
    stack, ids = tiny.stack(either), with_special(either, rows=1, length=10)
    # Nearly the same model, so that some of what it proposes is taken and some is not.
    assistant = HookedLM(deepcopy(either.model), None, "assistant")
    with torch.no_grad():
        assistant.model.get_output_embeddings().weight.add_(
            0.05 * torch.randn_like(assistant.model.get_output_embeddings().weight)
        )
    clean = greedy(either, ids, 12)
    with replacement(either, stack) as active:
        whole = greedy(either, ids, 12, use_cache=False)
        active.assert_replaced(decode_steps=0)
        for replaced_too in (False, True):
            with replacement(assistant, stack) if replaced_too else nullcontext() as helping:
                out = greedy(either, ids, 12, assistant_model=assistant.model)
            assert torch.equal(out, whole)
        helping.assert_replaced()
        assert helping.counts[0].calls > 3
    checked = active.counts[0].prefill.calls - 12
    assert 2 < checked + active.counts[0].decode.calls < 2 * 12  # several tokens a pass
    with replacement(assistant, stack) as helping:
        assert torch.equal(greedy(either, ids, 12, assistant_model=assistant.model), clean)
    helping.assert_replaced()
    assert not torch.equal(whole, clean)


def test_scores_of_beams_are_those_of_a_full_forward(either):
    ids = with_special(either, rows=2, length=10)
    with replacement(either, tiny.stack(either)):
        out = greedy(
            either,
            ids,
            6,
            num_beams=4,
            num_return_sequences=4,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logits = either.logits(out.sequences)[:, 9:-1]
    chosen = out.sequences[:, 10:].unsqueeze(-1)
    score = logits.log_softmax(-1).gather(-1, chosen).sum((1, 2)) / chosen.shape[1]
    torch.testing.assert_close(out.sequences_scores, score)


def test_single_tokens_are_told_special_or_padding_as_in_longer_passes(neox):
    special = neox.special_ids[0]
    with replacement(neox, tiny.stack(neox)) as active:
        for ids, mask in itertools.product(
            ([[9]], [[9], [10]], [[special]], [[9], [special]], [[9]] * 20),
            (None, [0, 1], [0, 0], [1, 0]),
        ):
            one = torch.tensor(ids)
            seen = None if mask is None else torch.tensor([mask] * len(ids))
            kept = active._skip_mask(one, seen)
            expected = torch.tensor([[token == special] for [token] in ids])
            if mask is not None:
                expected |= mask[1] == 0
            if not expected.any():
                assert kept is None
            else:
                assert kept is not None
                assert torch.equal(kept.squeeze(-1), expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_rows_are_generated_as_they_are_alone(either, cache):
    """Token by token; the padding is told by the mask alone, its id is an ordinary one."""
    lengths, new_tokens = (4, 7, 12), 7
    ids, mask = tiny.ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : 12 - length], mask[row, : 12 - length] = 9, 0
    options = {
        "output_scores": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
    }
    with replacement(either, tiny.stack(either)) as active:
        batch = greedy(either, ids, new_tokens, attention_mask=mask, **options)
        for count in active.counts:
            assert count.prefill == (1, sum(lengths), 3 * 12 - sum(lengths), 0)
            assert count.decode.calls == new_tokens - 1
        for row, length in enumerate(lengths):
            alone = greedy(either, ids[row : row + 1, 12 - length :], new_tokens, **options)
            assert torch.equal(alone.sequences[0, length:], batch.sequences[row, 12:])
            for a, b in zip(alone.scores, batch.scores, strict=True):
                torch.testing.assert_close(a[0], b[row], atol=1e-4, rtol=1e-4)


def test_streamed_text_is_the_generated_text(either):
    tokenizer, ids = tiny.tokenizer(), tiny.ids(1, 6)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    with replacement(either, tiny.stack(either)) as active:
        expected = tokenizer.decode(greedy(either, ids, 8)[0, 6:])
        thread = Thread(target=greedy, args=(either, ids, 8), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == expected
    active.assert_replaced(decode_steps=14)


@pytest.mark.filterwarnings("ignore")  # of what lm-eval imports
def test_lm_eval_sees_the_replaced_model(neox):
    """Its batches, padded on the right to score and on the left to write, are each request alone
    run through the replaced model."""
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]")
    from lm_eval.api.instance import Instance

    texts = [("In the beginning", " was the word"), ("And it came", " to pass"), ("The", " cat")]
    lm = HookedLM(neox.model, tiny.tokenizer())
    stack = tiny.stack(lm)
    wrapped = harness.HFLM(
        pretrained=lm.model, tokenizer=tiny.tokenizer(), batch_size=3, device="cpu"
    )

    def ask(kind, arguments):
        asked = [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]
        return getattr(wrapped, kind)(asked, disable_tqdm=True)

    def score(prompt, text):
        before, after = (lm.tokenizer(part)["input_ids"] for part in (prompt, text))
        ids = torch.tensor([before + after])
        of_next = lm.logits(ids)[0, len(before) - 1 : -1].log_softmax(-1)
        return float(of_next.gather(-1, torch.tensor(after)[:, None]).sum())

    writing = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [(prompt + end, writing) for prompt, end in texts]
    clean = ask("loglikelihood", texts), ask("generate_until", prompts)
    with replacement(lm, stack) as active:
        scores = [value for value, _ in ask("loglikelihood", texts)]
        active.assert_replaced(decode_steps=0)
        written = ask("generate_until", prompts)
        active.assert_replaced(decode_steps=5)
        assert scores == pytest.approx([score(*text) for text in texts], abs=1e-3)
        for (prompt, _), text in zip(prompts, written, strict=True):
            ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
            out = greedy(lm, ids, 6)[0, ids.shape[1] :]
            assert text == lm.tokenizer.decode(out, skip_special_tokens=True)
    assert (ask("loglikelihood", texts), ask("generate_until", prompts)) == clean
    assert scores != pytest.approx([value for value, _ in clean[0]], abs=0.1)
    assert written != clean[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacing_by_the_identity_gives_the_models_bits(lm, dtype):
    ids = with_special(lm)
    identity = Identity(tiny.stack(lm))
    model = HookedLM(type(lm.model)(lm.config).to(dtype).eval(), lm.tokenizer)
    clean, written = model.logits(ids), greedy(model, ids, 5)
    for mode in ("online", "teacher_forced"):
        with replacement(model, identity, mode=mode, replace_special=True) as active:
            assert torch.equal(model.logits(ids), clean)
            active.assert_replaced(decode_steps=0)
    with replacement(model, identity) as active:
        assert torch.equal(greedy(model, ids, 5), written)
        active.assert_replaced(decode_steps=4)


@pytest.mark.parametrize("kind", ["previous", "all_previous"])
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_model_and_stack_in_bfloat16(either, kind, loop):
    """All latents active, so that no code hangs on rounding: the logits are the model's."""
    model = HookedLM(deepcopy(either.model).bfloat16(), either.tokenizer)
    ids, stack = with_special(model), tiny.exact_stack(either, kind).bfloat16()
    clean = model.logits(ids).float()
    with replacement(model, stack, loop=loop) as active:
        replaced = model.logits(ids).float()
        greedy(model, ids, 4)
        active.assert_replaced(decode_steps=3)
    assert 0 < float((replaced - clean).norm() / clean.norm()) < 0.1
    with replacement(model, tiny.stack(either, kind).bfloat16(), loop=loop):
        assert float((model.logits(ids) - clean).norm() / clean.norm()) > 0.2


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_with_the_error_kept_the_logits_are_the_models_up_to_rounding(lm, loop):
    ids, stack = with_special(lm), tiny.stack(lm)
    with replacement(lm, stack, loop=loop, keep_error=True) as active:
        kept = lm.logits(ids)
        written = greedy(lm, ids, 6)
    active.assert_replaced(decode_steps=5)
    clean = lm.logits(ids)
    assert float((kept - clean).norm() / clean.norm()) < 1e-5
    assert torch.equal(written, greedy(lm, ids, 6))
    assert not torch.allclose(logits(lm, stack, ids, loop=loop), clean, atol=0.1)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_with_the_error_kept_latents_get_the_gradient_of_their_directions(neox, loop):
    """At the last layer that of the model's own stream there; before it, what goes through x̂ and
    the codes: as a hand-written x̂ + (h − x̂).detach()."""
    lm = HookedLM(deepcopy(neox.model).double().requires_grad_(False))
    stack, ids = tiny.stack(neox).double(), tiny.ids()
    points = lm.hook_points(tiny.LAYERS)
    codes = []

    def gradients(replaced):
        acts = []
        with replaced(acts):
            loss = lm.model(ids, use_cache=False).logits.logsumexp(-1).mean()
        return torch.autograd.grad(loss, acts)

    @contextmanager
    def ours(acts):
        def read(_, code):
            acts.append(code.acts)
            codes.append(code)

        active = replacement(lm, stack, loop=loop, keep_error=True, on_codes=read)
        yield
        active.remove()

    @contextmanager
    def by_hand(acts):
        before, chain = [], []

        def at(layer):
            sae = stack.sae(layer)

            def function(h):
                seen = chain if loop == "closed" else before
                code = sae.encode(h, prediction=stack.predictor(layer, seen))
                x_hat = sae.decode(*code, prediction=stack.predictor(layer, chain))
                acts.append(code.acts)
                before.append(h)
                chain.append(x_hat)
                return x_hat + (h - x_hat).detach()

            return function

        with lm.hooked({p: at(i) for i, p in enumerate(points)}):
            yield

    @contextmanager
    def plain(streams):
        def keep(h):
            streams.append(h.detach().requires_grad_())
            return streams[-1]

        with lm.hooked({points[-1]: keep}):
            yield

    found = gradients(ours)
    for mine, by_formula in zip(found, gradients(by_hand), strict=True):
        assert float(mine.norm()) > 0
        torch.testing.assert_close(mine, by_formula)
    (of_stream,) = gradients(plain)
    directions = stack.sae(2).W_dec[codes[-1].indices]
    torch.testing.assert_close(found[2], (directions @ of_stream.unsqueeze(-1)).squeeze(-1))


def in_threads(functions):
    """Results or exceptions of functions, each in a thread of its own, all begun at once."""
    ready = Barrier(len(functions))
    results = [None] * len(functions)

    def work(i):
        ready.wait()
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def switching():
    """Threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def passes(run, batches, number) -> list[Any]:
    """Outputs of `number` passes over each batch, one thread per batch."""

    def many(ids):
        with torch.no_grad():
            return [run(ids, use_cache=False).logits for _ in range(number)]

    return in_threads([partial(many, ids) for ids in batches])


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="online"),
        pytest.param({"loop": "open"}, id="open"),
        pytest.param({"mode": "teacher_forced"}, id="teacher-forced"),
        pytest.param({"mode": "error_added"}, id="error-added"),
        pytest.param({"transport_bytes": 1 << 20, "interventions": EDITS}, id="transported-edits"),
        pytest.param({"interventions": {"edits": EDITS, "keep_error": True}}, id="edits"),
    ],
)
def test_threads_share_a_replaced_model(neox, options):
    """Every pass is that of its tokens, and every pass is counted and edited."""
    stack, number = tiny.stack(neox), 6
    batches = [tiny.ids(2, 5 + i, seed=i) for i in range(4)]
    expected = [logits(neox, stack, ids, **options) for ids in batches]
    with replacement(neox, stack, **options) as alone:
        for ids in batches:
            neox.logits(ids)
    with replacement(neox, stack, **options) as active:
        results = passes(neox.model, batches, number)
    for result, right in zip(results, expected, strict=True):
        assert not isinstance(result, Exception), result
        assert all(torch.equal(one, right) for one in result)
    for many, once in zip(active.counts, alone.counts, strict=True):
        assert many.prefill == tuple(number * n for n in once.prefill)
    if active.edits is not None:
        assert active.edits.changed == {k: number * n for k, n in alone.edits.changed.items()}


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("written", [False, True], ids=["passes", "decode-loops"])
def test_codes_read_in_several_threads_stay_together(neox, written):
    """The code of a token is in one place at all layers, be it read in the pass or after a step."""
    stack, batches = tiny.stack(neox), [tiny.ids(1, 7 - 3 * written, seed=i) for i in range(4)]

    def run(ids):
        if written:
            return DecodeLoop(neox, max_length=8)(ids, max_new_tokens=4)
        return neox.logits(ids)

    alone = []
    for ids in batches:
        keep = StrongestLatents(2)
        with replacement(neox, stack, on_codes=keep):
            run(ids)
        alone.append(keep.codes)
    keep = StrongestLatents(2)
    with replacement(neox, stack, on_codes=keep):
        assert not any(
            isinstance(result, Exception)
            for result in in_threads([partial(run, ids) for ids in batches])
        )
    parts = {name: code.acts.split(7, 1) for name, code in keep.codes.items()}
    first = tiny.NAMES[0]
    order = [
        next(i for i, codes in enumerate(alone) if torch.equal(codes[first].acts, part))
        for part in parts[first]
    ]
    assert sorted(order) == [0, 1, 2, 3]
    for name in tiny.NAMES:
        for i, part in zip(order, parts[name], strict=True):
            assert torch.equal(part, alone[i][name].acts)


@pytest.mark.usefixtures("switching")
def test_generation_captures_and_passes_go_on_beside_each_other(neox):
    """Captures stop half-way and failing passes anywhere: in their own thread alone."""
    stack, ids = tiny.stack(neox), [tiny.ids(1, 6, seed=i) for i in range(4)]
    points = neox.hook_points(tiny.LAYERS)

    class Failed(Exception):
        pass

    def fail(stream):
        if stream.shape[1] == 4:
            raise Failed

    def failing():
        for _ in range(6):
            with pytest.raises(Failed):
                neox.logits(tiny.ids(1, 4))

    point = neox.hook_point("blocks.1.hook_mlp_out")
    loops = [DecodeLoop(neox, max_length=20) for _ in range(2)]
    work = [
        lambda: greedy(neox, ids[0], 8),
        lambda: neox.logits(ids[1]),
        lambda: neox.capture(ids[2], points)[points[1]],
        lambda: neox.replace(ids[3], {point: torch.ones(1, 6, 32)}),
        *(partial(loop, ids[0], max_new_tokens=8) for loop in loops),
    ]
    with replacement(neox, stack), neox.hooked({neox.hook_point(1): fail}):
        alone = [function() for function in work]
        for _ in range(3):
            *together, failed = in_threads([*work, failing])
            assert failed is None
            for mine, right in zip(together, alone, strict=True):
                assert not isinstance(mine, Exception), mine
                assert torch.equal(mine, right)
    assert not torch.equal(neox.logits(ids[1]), alone[1])


def test_a_replacement_made_in_inference_mode_counts_outside_it(neox):
    """In a thread too that was in this mode when its counts began."""
    stack, ids = tiny.stack(neox), tiny.ids()

    def run():
        with torch.inference_mode():
            neox.logits(ids)
        neox.logits(ids)

    with torch.inference_mode():
        active = replacement(neox, stack, interventions=EDITS)
    results = [*in_threads([run]), run()]
    active.remove()
    assert results == [None, None]
    assert active.counts[0].prefill == (4, 4 * ids.numel(), 0, 0)
    assert active.edits.changed[tiny.NAMES[0]] == 4 * 3 * ids.numel()


@pytest.mark.usefixtures("switching")
def test_a_compiled_model_is_shared_by_threads(neox):
    torch.compiler.reset()
    stack, batches = tiny.stack(neox), [tiny.ids(2, 8, seed=i) for i in range(4)]
    expected = [logits(neox, stack, ids) for ids in batches]
    compiled = torch.compile(neox.model, fullgraph=True, backend="eager")
    with replacement(neox, stack) as active:
        results = passes(compiled, batches, 5)
    for result, right in zip(results, expected, strict=True):
        assert not isinstance(result, Exception), result
        for one in result:
            torch.testing.assert_close(one, right, atol=1e-4, rtol=1e-4)
    assert [count.prefill for count in active.counts] == [(20, 320, 0, 0)] * 3


def test_one_decode_loop_writes_one_text_at_a_time(neox):
    write, ids = DecodeLoop(neox, max_length=12), tiny.ids(1, 4)

    def again(*_):
        write(ids, max_new_tokens=2)

    with (
        replacement(neox, tiny.stack(neox), on_codes=again),
        pytest.raises(RuntimeError, match="writing another text.*a loop for each thread"),
    ):
        write(ids, max_new_tokens=2)
    write(ids, max_new_tokens=2)


def test_a_pass_that_is_replaced_in_part_is_an_error(neox):
    """Begun before the replacement, or still running when it is removed."""
    stack, ids = tiny.stack(neox), tiny.ids()
    clean, begun = neox.logits(ids), []

    def begin(_):
        begun.append(replacement(neox, stack))

    with (
        neox.hooked({neox.hook_point("blocks.0.hook_resid_pre"): begin}),
        pytest.raises(RuntimeError, match="a pass that began before the replacement"),
    ):
        neox.logits(ids)
    (active,) = begun
    with (
        neox.hooked({neox.hook_point(1): lambda _: active.remove()}),
        pytest.raises(RuntimeError, match="removed while a pass was running"),
    ):
        neox.logits(ids)
    assert torch.equal(neox.logits(ids), clean)


def test_a_replacement_removed_in_another_thread_leaves_gradients_as_they_are(neox):
    with replacement(neox, tiny.stack(neox)) as active:
        (enabled,) = in_threads([lambda: (active.remove(), torch.is_grad_enabled())[1]])
        assert enabled
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_failed_pass_keeps_nothing(neox):
    """Not its codes, and not its place in the chain."""
    stack, ids = tiny.stack(neox), tiny.ids()
    made = []

    def fail(_):
        raise ArithmeticError("planted")

    with replacement(neox, stack, on_codes=lambda _, code: made.append(ref(code.acts))):
        with neox.hooked({neox.hook_point(2): fail}), pytest.raises(ArithmeticError):
            neox.logits(ids)
        gc.collect()
        assert len(made) == 2
        assert not any(one() is not None for one in made)
        with pytest.raises(RuntimeError, match="outside a forward pass of the whole model"):
            neox.blocks[3](torch.zeros(1, 3, 32), position_embeddings=(torch.zeros(1, 3, 2),) * 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_made_of_a_replaced_model_is_a_plain_one(lm, how):
    """And may be replaced by itself, while the model is."""
    stack, ids = tiny.stack(lm), tiny.ids()
    clean, expected = lm.logits(ids), logits(lm, stack, ids)
    with replacement(lm, stack, interventions=EDITS):
        edited = lm.logits(ids)
        lm.model.train()
        if how == "deepcopy":
            copied = deepcopy(lm.model)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(lm.model))
        else:
            file = io.BytesIO()
            torch.save(lm.model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        lm.model.eval()
        assert all(module.training for module in copied.modules())
        other = HookedLM(copied.eval(), lm.tokenizer)
        assert torch.equal(other.logits(ids), clean)
        with replacement(other, stack):
            assert torch.equal(other.logits(ids), expected)
        assert torch.equal(lm.logits(ids), edited)
        assert torch.equal(deepcopy(lm).logits(ids), clean)
    assert torch.equal(other.logits(ids), clean)
    assert not any("forward" in vars(module) for module in copied.modules())
    assert torch.equal(lm.logits(ids), clean)


def test_wrong_types_are_told_what_to_pass(neox):
    stack = tiny.stack(neox)
    sae = TopKSAE(SAEConfig(32, 64, 4))
    for lm, given, message in (
        (neox, sae, r"got TopKSAE as the stack.*ReSAE\(\[hook_point\], AffinePredictor"),
        (neox, TopKSAE, "got TopKSAE as the stack"),
        (neox, "a folder", r"got str as the stack.*ReSAE.from_pretrained\(folder\)"),
        (neox, [stack], "got list as the stack"),
        ("embedded", stack, r"got str as the model.*HookedLM.from_pretrained\(name\)"),
        (torch.nn.Linear(2, 2), stack, "got Linear as the model"),
    ):
        with pytest.raises(TypeError, match=message):
            replacement(lm, given)


def test_reprs_say_what_is_replaced_where(neox):
    text = repr(neox)
    assert text.startswith("HookedLM('tiny-neox', gpt_neox, 4 blocks, d_model=32, hook points")
    with replacement(neox, tiny.stack(neox), layers=[0, 3], interventions=EDITS) as active:
        text = repr(active)
    assert text == (
        "Replacement(active at blocks.0.hook_resid_post, blocks.3.hook_resid_post of "
        "'tiny-neox', mode='online', loop='closed', keep_error=False, edits=2)"
    )
    assert repr(active).startswith("Replacement(removed at")


def test_a_replacement_compiles_into_one_graph_and_counts_in_it(either):
    """And is not compiled anew at every call, as a Python number that counts would have it."""
    torch.compiler.reset()
    stack, ids = tiny.stack(either), with_special(either)
    expected, clean = logits(either, stack, ids), either.logits(ids)
    compiled = torch.compile(either.model, fullgraph=True, backend="eager")
    with torch.no_grad(), replacement(either, stack) as active:
        for call in range(4):
            with torch._dynamo.config.patch(error_on_recompile=call > 1):
                out = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    left = int(either.is_special(ids).sum())
    assert [c.prefill for c in active.counts] == [(4, 4 * (ids.numel() - left), 4 * left, 0)] * 3
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, clean)


def test_modes_of_two_passes_run_beside_compiled_graphs_but_not_in_one(neox):
    torch.compiler.reset()
    stack, ids = tiny.stack(neox), with_special(neox)
    expected = logits(neox, stack, ids, mode="teacher_forced")
    with torch.no_grad(), replacement(neox, stack, mode="teacher_forced"):
        compiled = torch.compile(neox.model, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
        torch.compiler.reset()
        compiled = torch.compile(neox.model, fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match="stops the pass half-way, which no graph can"):
            compiled(ids, use_cache=False)


def test_generate_with_a_static_cache_compiles_the_replaced_model(either):
    """As it does by itself on a GPU."""
    torch.compiler.reset()
    ids = with_special(either, rows=2, length=10)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    plain = greedy(either, ids, 6, **options)
    with replacement(either, tiny.stack(either)) as active:
        out = greedy(either, ids, 6, **options)
        active.assert_replaced(decode_steps=5)
        assert torch.equal(out, greedy(either, ids, 6, use_cache=False))
    assert torch.equal(greedy(either, ids, 6, **options), plain)
    assert not torch.equal(out, plain)


def test_a_replacement_stays_in_force_until_it_is_removed(lm, tmp_path):
    """And the model is an ordinary Hugging Face model meanwhile: here without `HookedLM` around."""
    ids, model, stack = with_special(lm), lm.model, tiny.stack(lm)
    clean, modules = lm.logits(ids), list(model.modules())
    expected = logits(lm, stack, ids)
    active = replacement(model, stack)
    out = model(ids).logits
    assert out.requires_grad
    torch.testing.assert_close(out.detach(), expected)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks.3.hook_resid_post .* being replaced already"):
        replacement(lm, stack, layers=[3])
    active.remove()
    active.remove()
    with pytest.raises(RuntimeError, match="was removed"), active:
        pass
    assert torch.equal(lm.logits(ids), clean)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits.detach(), clean)
    assert torch.equal(logits(lm, stack, ids), expected)


def test_replacements_at_different_layers_end_in_any_order(neox):
    stack, ids = tiny.stack(neox), tiny.ids()
    clean, third = neox.logits(ids), logits(neox, stack, ids, layers=[3])
    first, second = (replacement(neox, stack, layers=[layer]) for layer in (0, 3))
    assert not torch.equal(neox.logits(ids), third)
    first.remove()
    assert torch.equal(neox.logits(ids), third)
    second.remove()
    assert torch.equal(neox.logits(ids), clean)


def test_blocks_that_hand_on_further_state_are_replaced():
    lm = tiny.lime()
    stack, ids = tiny.stack(lm), tiny.ids()
    replaced, clean = logits(lm, stack, ids), lm.logits(ids)
    assert not torch.allclose(replaced, clean, atol=0.1)
    torch.testing.assert_close(logits(lm, stack, ids, keep_error=True), clean)


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("kind", ["previous", "all_previous"])
def test_the_chain_follows_the_blocks_of_a_model_spread_over_devices(kind, loop):
    """The last two blocks, and the last layer of the stack, are on a device without values: what
    met a tensor of another device would raise."""
    lm = tiny.lime()
    stack = tiny.stack(lm, kind)
    lm.blocks[2:].to("meta")
    stack.sae(2).to("meta")
    for name in ("A_2", "c_2"):
        setattr(stack.predictor, name, stack.predictor.get_buffer(name).to("meta"))
    edits = [
        {"layer": 1, "action": "clamp", "latents": [3], "value": 2.0},
        {"layer": 3, "action": "add", "vector": [1.0] * 32, "at": "prompt"},
    ]
    read = []
    for keep_error, interventions in itertools.product((False, True), ([], edits)):
        out = logits(
            lm,
            stack,
            tiny.ids(),
            loop=loop,
            keep_error=keep_error,
            interventions=interventions,
            on_codes=lambda _, code: read.append(code.acts.abs()),
        )
        assert out.device.type == "meta"
        assert out.shape == (3, 12, 32)


@pytest.mark.filterwarnings("ignore")  # of accelerate
def test_a_model_that_accelerate_has_spread_is_replaced_to_the_bits(neox, tmp_path):
    """Blocks 2 and 3 wait on disk and are fetched when their turn comes."""
    accelerate = pytest.importorskip("accelerate")
    stack, ids = tiny.stack(neox), with_special(neox)
    with replacement(neox, stack):
        expected, written = neox.logits(ids), greedy(neox, ids, 6)
    lm = tiny.pythia()
    names = ("gpt_neox.embed_in", "gpt_neox.rotary_emb", "gpt_neox.emb_dropout")
    names += ("gpt_neox.layers.0", "gpt_neox.layers.1", "gpt_neox.final_layer_norm", "lm_head")
    places = dict.fromkeys(names, "cpu") | dict.fromkeys(
        ("gpt_neox.layers.2", "gpt_neox.layers.3"), "disk"
    )
    accelerate.dispatch_model(lm.model, places, main_device="cpu", offload_dir=tmp_path)
    assert {p.device.type for p in lm.model.parameters()} == {"cpu", "meta"}
    with replacement(lm, stack) as active:
        assert torch.equal(lm.logits(ids), expected)
        assert torch.equal(greedy(lm, ids, 6), written)
        active.assert_replaced(decode_steps=5)


def test_a_layer_whose_forward_was_changed_by_others_is_replaced_all_the_same(neox):
    """accelerate puts a forward of its own on each module of a model spread over devices."""
    stack, ids = tiny.stack(neox), tiny.ids()
    expected = logits(neox, stack, ids)
    changed = [neox.model.gpt_neox, *neox.blocks]
    forwards = [module.forward for module in changed]
    for module, forward in zip(changed, forwards, strict=True):
        module.forward = partial(lambda inner, *args, **kwargs: inner(*args, **kwargs), forward)
    own = [module.forward for module in changed]
    try:
        assert torch.equal(logits(neox, stack, ids), expected)
        assert [module.forward for module in changed] == own
    finally:
        for module in changed:
            del module.forward


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


@pytest.mark.parametrize("where", ["forward", "reader", "streamer"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_goes_on_after_one_that_an_exception_ended(either, where, cache):
    """In the middle of a pass or between two, with the replacement still in force."""
    stack, ids = tiny.stack(either), with_special(either, rows=1, length=6)
    calls = itertools.count()

    def fail_at(number):
        if next(calls) == number:
            raise ArithmeticError("planted")

    class Streamer(BaseStreamer):
        def put(self, value):  # noqa: ARG002
            fail_at(3)

        def end(self):
            pass

    def read(*_):
        if where == "reader":
            fail_at(3 * 3 + 1)

    hooks = {either.hook_point(2): lambda _: fail_at(3)} if where == "forward" else {}
    streamer = Streamer() if where == "streamer" else None
    options = {"cache_implementation": cache, "disable_compile": True}
    with replacement(either, stack, on_codes=read) as active:
        with either.hooked(hooks), pytest.raises(ArithmeticError):
            greedy(either, ids, 8, streamer=streamer, **options)
        steps = active.counts[0].decode.calls
        assert 0 < steps < 7
        out = greedy(either, ids, 8, **options)
        assert active.counts[0].decode.calls == steps + 7
        assert torch.equal(out, greedy(either, ids, 8, use_cache=False))
    assert not torch.equal(out, greedy(either, ids, 8))


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
        assert count.replaced + count.skipped == prompt + first.tokens - 1
        assert count.skipped >= 1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_fast_loop_writes_the_text_of_generate(either, temperature):
    """Token by token, plain, replaced and edited, with seeds; and a text that ends, ends."""
    lm = HookedLM(either.model, tiny.tokenizer())
    stack = tiny.stack(lm)
    edits = [{"layer": 1, "action": "clamp", "latents": 3, "value": 9.0, "at": "generated"}]
    asked = {"max_new_tokens": 24, "temperature": temperature}
    texts = []
    for seed, options in ((1, {}), (1, {"stack": stack}), (2, {"stack": stack, "loop": "open"})):
        expected = generate(lm, "In the beginning", seed=seed, **asked, **options)
        fast = generate(lm, "In the beginning", seed=seed, fast=True, **asked, **options)
        assert fast == expected
        assert fast.tokens == 24
        texts.append(fast.text)
    expected = generate(lm, "In the beginning", stack, interventions=edits, **asked)
    fast = generate(lm, "In the beginning", stack, interventions=edits, fast=True, **asked)
    assert fast == expected
    assert len({*texts, fast.text}) == 4
    stop = fast.ids[-5]
    lm.model.generation_config.eos_token_id, eos = stop, lm.model.generation_config.eos_token_id
    try:
        ended = generate(lm, "In the beginning", stack, interventions=edits, fast=True, **asked)
        short = generate(lm, "In the beginning", stack, interventions=edits, **asked)
    finally:
        lm.model.generation_config.eos_token_id = eos
    assert ended.ids == short.ids
    assert ended.ids[-1] == stop
    assert ended.tokens < 24


def test_what_the_fast_loop_cannot_do_is_refused(neox):
    stack, config = tiny.stack(neox), neox.model.generation_config
    with pytest.raises(ValueError, match="mode='teacher_forced' needs the whole text"):
        generate(neox, "word", stack, mode="teacher_forced")
    config.top_p = 0.9
    try:
        with pytest.raises(ValueError, match=r"of tiny-neox sets top_p=0.9; use fast=False"):
            generate(neox, "word", stack, fast=True)
        generate(neox, "word", stack, fast=True, temperature=0, max_new_tokens=2)
        config.top_p, config.repetition_penalty = None, 1.3
        with pytest.raises(ValueError, match=r"sets repetition_penalty=1.3"):
            generate(neox, "word", stack, fast=True, temperature=0)
    finally:
        config.top_p = config.repetition_penalty = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"mode": "sideways"}, "mode='sideways'.*online", id="mode"),
        pytest.param({"loop": "half"}, "loop='half'", id="loop"),
        pytest.param({"layers": [2]}, r"no blocks\.2.*blocks\.0", id="layer-not-in-stack"),
        pytest.param({"layers": [3, 1]}, "out of order", id="order"),
        pytest.param(
            {"keep_error": True, "mode": "error_added"}, "use mode='online'", id="keep-error"
        ),
        pytest.param({"layers": []}, "no layers selected", id="none"),
    ],
)
def test_impossible_replacements_are_refused(neox, options, message):
    with pytest.raises(ValueError, match=message), replacement(neox, tiny.stack(neox), **options):
        pass


def test_what_a_replacement_did_not_do_is_named(neox):
    """For users' tests: the complaint is an intervention that silently does nothing."""
    ids = with_special(neox, rows=1, length=6)
    with replacement(neox, tiny.stack(neox), layers=[0, 1]) as active:
        with pytest.raises(AssertionError, match="blocks.0.hook_resid_post was never reached"):
            active.assert_replaced()
        neox.capture(ids, neox.hook_points([0]))
        with pytest.raises(AssertionError, match="blocks.1.hook_resid_post was never reached"):
            active.assert_replaced()
        active.assert_replaced(layers=[0])
        with pytest.raises(AssertionError, match="blocks.0.* 0 decode steps, expected 3"):
            active.assert_replaced(decode_steps=3, layers=[0])
        with pytest.raises(AssertionError, match="blocks.3.*nothing is put in there"):
            active.assert_replaced(layers=[3])
    with replacement(neox, tiny.stack(neox)) as active:
        neox.logits(torch.zeros_like(ids))
        with pytest.raises(AssertionError, match="all 6 tokens were left alone"):
            active.assert_replaced()
        neox.logits(ids)
        neox.logits(torch.zeros_like(ids[:, :1]))
        with pytest.raises(AssertionError, match="no token of its 1 decode steps was replaced"):
            active.assert_replaced(decode_steps=1)
        neox.logits(ids[:, 1:2])
        active.assert_replaced(decode_steps=2)
    count = active.counts[0]
    assert count.prefill == (2, 4, 8, 0)
    assert count.decode == (2, 1, 1, 0)
    assert (count.calls, count.replaced, count.skipped) == (4, 5, 9)


def test_what_cannot_be_done_while_running_is_refused(neox):
    stack = tiny.stack(neox)
    offloaded = tiny.pythia()
    offloaded.model.to("meta")
    with pytest.raises(ValueError, match="are on no device but offloaded.*device_map"):
        replacement(offloaded, stack)
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


@pytest.mark.parametrize("kind", ["previous", "all_previous", "identity"])
def test_carried_dictionaries_predict_what_the_maps_do(lm, kind, monkeypatch):
    """By their rows for single tokens; by the maps above 16 tokens and, on a CPU, where a token's
    rows so far times the tokens are more than a map has."""
    stack, ids = tiny.stack(lm, kind), tiny.ids(1, 6)
    steps = tiny.carried_steps(monkeypatch)
    by_maps = logits(lm, stack, ids)
    assert not steps
    D, k = lm.d_model, stack.sae(0).config.k
    of_prompt = sum(6 * layer * k <= D for layer in range(3))
    assert 0 < of_prompt < 3
    with replacement(lm, stack, transport_bytes=1 << 20) as active:
        torch.testing.assert_close(lm.logits(ids), by_maps, atol=2e-4, rtol=2e-4)
        assert len(steps) == of_prompt
        out = greedy(lm, ids, 8)
        assert len(steps) == 2 * of_prompt + 3 * 7
        active.assert_replaced(decode_steps=7)
        many = lm.logits(tiny.ids(3, 12))
        assert len(steps) == 2 * of_prompt + 3 * 7
    torch.testing.assert_close(many, logits(lm, stack, tiny.ids(3, 12)))
    with replacement(lm, stack):
        assert torch.equal(greedy(lm, ids, 8), out)


def test_carried_dictionaries_that_exceed_the_bound_are_not_made(neox):
    stack = tiny.stack(neox)
    size = 3 * 64 * 32 * 4
    assert stack.transported(size) is not None
    assert stack.transported(size - 1) is None
    assert tiny.stack(neox, "none").transported(1 << 30) is None
    ids = tiny.ids()
    with replacement(neox, stack, transport_bytes=size - 1):
        replaced = neox.logits(ids)
    assert torch.equal(replaced, logits(neox, stack, ids))
    with pytest.raises(ValueError, match="transport_bytes with mode='online' and loop='open'"):
        replacement(neox, stack, loop="open", transport_bytes=size)


def test_a_boosted_stack_is_replaced_read_and_edited_like_any_other():
    lm = tiny.pythia()
    stack = tiny.stack(lm)
    saes = []
    for layer in range(3):
        second = TopKSAE(SAEConfig(lm.d_model, 16, 2), seed=50 + layer)
        saes.append(BoostedSAE(stack.sae(layer), second))
    stack = ReSAE(tiny.NAMES, stack.predictor, saes, stack.model_identity).eval()
    ids = tiny.ids(2, 9)
    points = lm.hook_points(tiny.LAYERS)
    with torch.no_grad():
        expected = stack(list(lm.capture(ids, points).values()), loop="closed").x_hats
    arrived = {}
    put = {p: (lambda _, value=v: value) for p, v in zip(points, expected, strict=True)}
    with replacement(lm, stack, mode="teacher_forced", loop="closed"):
        torch.testing.assert_close(lm.logits(ids), lm.replace(ids, put), atol=1e-4, rtol=1e-4)
    # One token at a time, where an ordinary stack may take the fused step, with transported tables
    # too.
    edits = [{"layer": tiny.LAYERS[1], "action": "clamp", "latents": [70], "value": 9.0}]
    for options in ({}, {"transport_bytes": 1 << 30}, {"interventions": edits}):
        with replacement(lm, stack, on_codes=arrived.__setitem__, **options):
            whole = lm.logits(ids)
            codes = dict(arrived)
            cache, parts = None, []
            for token in ids.split(1, 1):
                out = lm.model(token, use_cache=True, **{lm.cache_name: cache})
                cache = out[lm.cache_name]
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-3, rtol=1e-3)
        assert int(codes[tiny.NAMES[1]].indices.max()) >= 64
    assert (codes[tiny.NAMES[1]].acts == 9.0).any(-1).all()
    # Tables made for ordinary autoencoders know nothing of the boost: not made, and not used.
    assert stack.transported(1 << 30) is None
    with torch.no_grad():
        few = [x[0, :4] for x in expected]
        codes = stack.encode(few)
        transported = tiny.stack(lm).transported(1 << 30)
        past = few[:1]
        x_hat, code = stack.step(1, few[1], past, past, codes=codes[:1], transported=transported)
        plain = stack.sae(1)(few[1], prediction=stack.predictor(1, past))
    assert torch.equal(code.indices, plain.code.indices)
    assert torch.equal(x_hat, plain.x_hat)
