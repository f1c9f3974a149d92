import pytest
import tiny
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from resae import DecodeLoop, StrongestLatents, replacement
from resae.replacements.decode_loop import DEFERRED


@pytest.fixture(scope="module", params=[tiny.pythia, tiny.gemma2], ids=lambda f: f.__name__)
def lm(request):
    """Of two blocks, of which Gemma 2 has one of each kind: most time here is that of compiling
    blocks."""
    return request.param(blocks=2)


def both_layers(lm):
    return tiny.stack(lm, layers=(0, 1))


def plain(lm, ids, new, **options):
    """`model.generate`, greedy, not stopped."""
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": None} | options
    out = lm.model.generate(
        ids, max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0, **options
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_text_is_that_of_generate(lm, replaced, compiled):
    """Beyond Gemma-2's window of 8 tokens, twice with one loop, at two batch sizes."""
    torch._dynamo.reset()
    active = replacement(lm, both_layers(lm)) if replaced else None
    try:
        write = DecodeLoop(lm, max_length=30, compile=compiled, backend="eager")
        for rows, seed in ((2, 3), (2, 4), (1, 5)):
            ids = tiny.ids(rows, 10, seed=seed)
            assert torch.equal(write(ids, max_new_tokens=16), plain(lm, ids, 16))
    finally:
        if active is not None:
            active.assert_replaced(decode_steps=3 * 2 * 15)
            active.remove()


def test_replaced_text_differs_and_plain_text_is_back(lm):
    ids = tiny.ids(1, 10)
    before = DecodeLoop(lm, max_length=24)(ids, max_new_tokens=14)
    with replacement(lm, both_layers(lm)):
        assert not torch.equal(DecodeLoop(lm, max_length=24)(ids, max_new_tokens=14), before)
    assert torch.equal(DecodeLoop(lm, max_length=24)(ids, max_new_tokens=14), before)


def test_one_graph_serves_every_step_and_call(lm):
    """Also for Gemma 2, before and beyond its window of 8 tokens."""
    torch._dynamo.reset()
    counters.clear()
    with replacement(lm, both_layers(lm)):
        write = DecodeLoop(lm, max_length=40, compile=True, backend="eager")
        for seed in range(3):
            write(tiny.ids(2, 5 + seed, seed=seed), max_new_tokens=12)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="maps"),
        pytest.param({"transport_bytes": 1 << 20}, id="propagated"),
        pytest.param(
            {"interventions": [{"layer": 0, "action": "add", "latents": 3, "value": 2.0}]},
            id="edited",
        ),
        pytest.param({"on_codes": StrongestLatents(2)}, id="read"),
    ],
)
def test_a_compiled_step_can_be_a_cuda_graph(lm, options):
    """It writes to no input but those whose address `torch.compile` holds for fixed (otherwise it
    makes no graph and says nothing), and the inputs that it copies at each replay are the tokens
    and their places: no dictionary, no number of Python's, for each value of which it would make
    another graph."""
    torch._dynamo.reset()
    steps = []

    def see(graph, _inputs):
        inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        steps.append((torch._guards.TracingContext.get().fw_metadata, inputs))
        return make_boxed_func(graph.forward)

    with replacement(lm, both_layers(lm), **options) as active:
        write = DecodeLoop(lm, max_length=20, compile=True, backend=aot_autograd(fw_compiler=see))
        written = [write(tiny.ids(2, 5), max_new_tokens=12) for _ in range(2)]
        assert torch.equal(*written)
        active.assert_replaced(decode_steps=22)
    ((metadata, inputs),) = steps
    fixed = set(metadata.static_input_indices)
    written_to = set(metadata.mutated_inp_runtime_indices)
    assert len(written_to) >= 3 + 2 * lm.n_layers  # counts, keys, values
    assert written_to <= fixed
    copied = [value for i, value in enumerate(inputs) if i not in fixed]
    assert [(tuple(x.shape), x.dtype) for x in copied] == [((2, 1), torch.int64)] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_padded_on_the_left_are_the_single_rows(lm, compiled):
    torch._dynamo.reset()
    short, long = tiny.ids(1, 5, seed=8), tiny.ids(1, 9, seed=9)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with replacement(lm, both_layers(lm)):
        write = DecodeLoop(lm, max_length=25, compile=compiled, backend="eager")
        together = write(ids, attention_mask=mask, max_new_tokens=12)
        assert torch.equal(together[:1], plain(lm, short, 12))
        assert torch.equal(together[1:], plain(lm, long, 12))


def test_a_row_ends_at_a_stop_id_and_all_rows_end_the_text(monkeypatch):
    monkeypatch.setattr("resae.replacements.decode_loop.LOOK_EVERY", 4)
    lm, ids = tiny.pythia(), tiny.ids(2, 6)
    whole = DecodeLoop(lm, max_length=40)(ids, max_new_tokens=30)
    stops = [int(whole[0, 2]), int(whole[1, 5])]
    text = DecodeLoop(lm, max_length=40)(ids, max_new_tokens=30, stop_ids=stops)
    ends = [next(i for i, t in enumerate(row.tolist()) if t in stops) for row in whole]
    assert text.shape[1] == max(ends) + 1
    for row, expected, end in zip(text, whole, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == stops[0]).all()


def test_sampling_follows_the_generator_and_the_temperature():
    lm, ids = tiny.pythia(), tiny.ids(1, 6)
    write = DecodeLoop(lm, max_length=40)

    def sample(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return write(ids, max_new_tokens=20, temperature=temperature, generator=generator).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, temperature=1e-6) == write(ids, max_new_tokens=20).tolist()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), {}, r"shape \[0, 3\]"),
        (torch.ones(5, dtype=torch.int64), {}, r"shape \[5\], expected \[B, T\]"),
        (tiny.ids(1, 15), {}, "15 prompt tokens and max_new_tokens=6.*max_length=20"),
        (tiny.ids(1, 5), {"max_new_tokens": 0}, "at least 1 new one"),
        (tiny.ids(1, 3), {"attention_mask": torch.tensor([[1, 1, 0]])}, "on the left"),
        (
            tiny.ids(1, 3),
            {"attention_mask": torch.ones(1, 4)},
            r"shape \[1, 4\], expected \[1, 3\]",
        ),
    ],
)
def test_bad_prompts(ids, options, message):
    with pytest.raises(ValueError, match=message):
        DecodeLoop(tiny.pythia(), max_length=20)(ids, **{"max_new_tokens": 6} | options)


def test_a_loop_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="max_length=65, expected 2 to 64"):
        DecodeLoop(tiny.pythia(), max_length=65)


@pytest.mark.parametrize("compiled", [False, True])
def test_codes_are_read_after_each_step_and_by_the_same_graph(lm, compiled):
    """As `model.generate` shows them, edited or not; by functions that no graph could hold."""
    torch._dynamo.reset()
    counters.clear()
    ids, stack = tiny.ids(2, 6), both_layers(lm)
    edits = [{"layer": 0, "action": "clamp", "latents": 3, "value": 9.0, "at": "generated"}]
    for interventions in (None, edits):
        expected, strongest, seen = StrongestLatents(2), StrongestLatents(2), []

        def read(name, code, strongest=strongest, seen=seen):
            seen.append((name, code.acts.shape[1], float(code.acts.sum())))
            strongest(name, code)

        with replacement(lm, stack, interventions=interventions, on_codes=expected):
            text = plain(lm, ids, 8)
        with replacement(lm, stack, interventions=interventions, on_codes=read):
            write = DecodeLoop(lm, max_length=16, compile=compiled, backend="eager")
            assert torch.equal(write(ids, max_new_tokens=8), text)
        assert [(name, tokens) for name, tokens, _ in seen] == [
            (name, tokens) for tokens in (6, *[1] * 7) for name in stack.hook_points
        ]
        for name, code in expected.codes.items():
            assert torch.equal(strongest.codes[name].indices, code.indices)
            torch.testing.assert_close(strongest.codes[name].acts, code.acts)
    assert counters["stats"]["unique_graphs"] == (2 if compiled else 0)


def test_a_failing_reader_leaves_nothing_deferred(lm):
    def fail(name, code):
        raise RuntimeError(f"{name} {tuple(code.acts.shape)}")

    with (
        replacement(lm, both_layers(lm), on_codes=fail),
        pytest.raises(RuntimeError, match=r"\(1, 4, 4\)"),
    ):
        DecodeLoop(lm, max_length=8)(tiny.ids(1, 4), max_new_tokens=2)
    assert DEFERRED.calls is None
    DecodeLoop(lm, max_length=8)(tiny.ids(1, 4), max_new_tokens=2)
