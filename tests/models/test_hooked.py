import sys
import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial
from threading import Thread

import pytest
import tiny
import torch
from families import made

from resae import HookedLM, replacement
from resae.assets import TINY_PYTHIA
from resae.models.points import SITES, HookPoint


@pytest.fixture(params=tiny.FAMILIES)
def lm(request):
    return tiny.FAMILIES[request.param]()


def all_points(lm: HookedLM) -> list[HookPoint]:
    sites = lm.sites()
    return [lm.hook_point(f"blocks.{i}.hook_{s}") for i in range(lm.n_layers) for s in sites]


def test_stream_is_what_the_block_adds_to_what_it_reads(lm):
    captured = lm.capture(tiny.ids(), all_points(lm))
    for layer in range(lm.n_layers):
        at = {s: captured[lm.hook_point(f"blocks.{layer}.hook_{s}")] for s in lm.sites()}
        rebuilt = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        torch.testing.assert_close(at["resid_post"], rebuilt)
        assert not torch.allclose(at["resid_post"], at["resid_pre"])
        if "resid_mid" in at:
            torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + at["attn_out"])


def test_resid_post_is_the_next_blocks_resid_pre(lm):
    captured = lm.capture(tiny.ids(), all_points(lm))
    for layer in range(lm.n_layers - 1):
        left = captured[lm.hook_point(f"blocks.{layer}.hook_resid_post")]
        assert torch.equal(left, captured[lm.hook_point(f"blocks.{layer + 1}.hook_resid_pre")])


def test_capture_agrees_with_hidden_states_of_the_model(lm):
    hidden = lm.model(tiny.ids(), output_hidden_states=True).hidden_states
    captured = lm.capture(tiny.ids(), lm.hook_points([0, 1, 2]))
    for layer, activation in enumerate(captured.values()):
        torch.testing.assert_close(activation, hidden[layer + 1])


def test_sequential_pythia_has_resid_mid_and_parallel_has_not():
    assert "resid_mid" in tiny.pythia(parallel=False).sites()
    assert "resid_mid" not in tiny.pythia(parallel=True).sites()
    captured = tiny.pythia(parallel=False).capture
    lm = tiny.pythia(parallel=False)
    points = [lm.hook_point(f"blocks.2.hook_{s}") for s in SITES]
    pre, attention, mid, _, _ = (captured(tiny.ids(), points)[p] for p in points)
    torch.testing.assert_close(mid, pre + attention)


@pytest.mark.parametrize("site", SITES)
def test_replacing_by_what_is_there_changes_nothing(site):
    lm = tiny.gemma2()
    point = lm.hook_point(f"blocks.1.hook_{site}")
    same = lm.replace(tiny.ids(), {point: lambda x: x.clone()})
    if site == "resid_mid":  # goes in as resid_mid − resid_pre, which rounds
        torch.testing.assert_close(same, lm.logits(tiny.ids()))
    else:
        assert torch.equal(same, lm.logits(tiny.ids()))


@pytest.mark.parametrize("site", SITES)
def test_a_replaced_activation_is_what_the_rest_of_the_pass_sees(site):
    lm = tiny.gemma2()
    point = lm.hook_point(f"blocks.1.hook_{site}")
    clean = lm.capture(tiny.ids(), [point])[point]
    moved = clean + 1.0
    after = lm.hook_point("blocks.1.hook_resid_post")
    seen = {}
    hooks = {point: lambda _: moved, after: lambda x: seen.update(x=x)}
    if site == "resid_post":
        assert not torch.allclose(lm.replace(tiny.ids(), {point: moved}), lm.logits(tiny.ids()))
        return
    with lm.hooked(hooks):
        lm.logits(tiny.ids())
    if site in ("attn_out", "resid_mid", "resid_pre"):
        normal = lm.capture(tiny.ids(), [after])[after]
        assert not torch.allclose(seen["x"], normal)
    else:
        normal = lm.capture(tiny.ids(), [after])[after]
        torch.testing.assert_close(seen["x"], normal + 1.0)


def test_replacing_resid_mid_equals_shifting_attn_out():
    lm = tiny.gemma2()
    mid, attention = (lm.hook_point(f"blocks.2.hook_{s}") for s in ("resid_mid", "attn_out"))
    by_mid = lm.replace(tiny.ids(), {mid: lambda x: x + 0.5})
    by_attention = lm.replace(tiny.ids(), {attention: lambda x: x + 0.5})
    torch.testing.assert_close(by_mid, by_attention)


def test_capture_stops_after_the_last_point_it_needs():
    lm = tiny.pythia()
    ran = []
    for i, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    lm.capture(tiny.ids(), lm.hook_points([0, 1]))
    assert 2 not in ran
    assert 3 not in ran


def spliced(lm):
    """Functions that change something, at every site and at two blocks."""
    points = [p for p in all_points(lm) if p.layer in (1, 2)]
    return {p: (lambda x, p=p: x * (1 + 0.1 * (p.order + p.layer))) for p in points}


def test_the_very_modules_are_back_after_use_and_after_an_error(lm):
    before = lm.logits(tiny.ids())
    modules, blocks = list(lm.model.modules()), list(lm.blocks)

    def fail(_):
        raise ArithmeticError("planted")

    with lm.hooked(spliced(lm)):
        assert not torch.equal(lm.logits(tiny.ids()), before)
        assert all(a is not b for a, b in zip(blocks[1:3], lm.blocks[1:3], strict=True))
    with (
        pytest.raises(ArithmeticError),
        lm.hooked(spliced(lm), around=lambda forward, *args, **kwargs: forward(*args, **kwargs)),
    ):
        lm.replace(tiny.ids(), {lm.hook_point(2): fail})
    assert all(a is b for a, b in zip(modules, lm.model.modules(), strict=True))
    assert not any("forward" in vars(m) or m._forward_hooks for m in modules)
    assert torch.equal(lm.logits(tiny.ids()), before)


def test_set_up_that_fails_half_way_leaves_the_model_as_it_was(lm):
    modules, names = list(lm.model.modules()), list(lm.model.state_dict())
    lm.family = replace(lm.family, attn_out="nowhere")
    hooks = {lm.hook_point(1): lambda x: x, HookPoint(2, SITES.index("resid_mid"), "resid_mid"): id}
    with pytest.raises(AttributeError, match="nowhere"), lm.hooked(hooks):
        pass
    assert all(a is b for a, b in zip(modules, lm.model.modules(), strict=True))
    assert list(lm.model.state_dict()) == names
    assert not any("forward" in vars(module) for module in modules)


class Wrapper(torch.nn.Module):
    """As PEFT has two of: it holds the model under a name and hands on its attributes."""

    def __init__(self, name, inner):
        super().__init__()
        self.inner_name = name
        self.add_module(name, inner)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.inner_name), name)

    def forward(self, *args, **kwargs):
        return self.get_submodule(self.inner_name)(*args, **kwargs)


def check_wrapped(lm, wrapped):
    """Check that replacing `lm` also replaces the model inside the wrapper, until it ends."""
    hooks = spliced(lm)
    clean, expected = lm.logits(tiny.ids()), lm.replace(tiny.ids(), hooks)
    modules, names = list(wrapped.modules()), list(wrapped.state_dict())
    outer = HookedLM(wrapped, lm.tokenizer)
    with outer.hooked(hooks, around=lambda forward, *args, **kwargs: forward(*args, **kwargs)):
        assert torch.equal(outer.logits(tiny.ids()), expected)
        assert list(wrapped.state_dict()) == names
    assert torch.equal(outer.logits(tiny.ids()), clean)
    assert all(a is b for a, b in zip(modules, wrapped.modules(), strict=True))
    assert list(wrapped.state_dict()) == names
    stack = tiny.stack(lm)
    with replacement(outer, stack) as active:
        replaced = outer.logits(tiny.ids())
        written = wrapped.generate(
            tiny.ids(1),
            attention_mask=torch.ones_like(tiny.ids(1)),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert written.shape == (1, 15)
        active.assert_replaced(decode_steps=2)
        with pytest.raises(ValueError, match="being replaced already"):
            replacement(lm, stack)
    with replacement(lm, stack):
        assert torch.equal(lm.logits(tiny.ids()), replaced)
    assert list(wrapped.state_dict()) == names
    assert not torch.equal(replaced, clean)


def test_a_model_without_the_blocks_of_its_family_is_refused():
    lm = tiny.pythia()
    del lm.model.gpt_neox.layers
    with pytest.raises(ValueError, match="it has no gpt_neox.layers, which .* names for it"):
        HookedLM(lm.model)


def test_a_model_in_a_wrapper_that_hands_on_attributes_is_hooked_and_left_as_it_was(lm):
    check_wrapped(lm, Wrapper("base_model", Wrapper("model", lm.model)))


@pytest.mark.parametrize("kind", ["bloom", "exaone", "falcon", "opt"])
def test_a_wrapped_model_of_an_architecture_of_its_own_kind_is_hooked(kind):
    sizes = {"n_layer" if kind == "bloom" else "num_hidden_layers": 4}
    lm = made(kind, **sizes)
    check_wrapped(lm, Wrapper("base_model", Wrapper("model", lm.model)))


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("kind", ["bloom", "exaone", "opt"])
def test_peft_layers_where_a_hook_point_is_are_hooked(kind):
    """LoRA on the very products whose outputs are attn_out or mlp_out."""
    peft = pytest.importorskip("peft")
    targets = {"bloom": ["dense", "dense_4h_to_h"], "exaone": ["o_proj"], "opt": ["fc2"]}
    sizes = {"n_layer" if kind == "bloom" else "num_hidden_layers": 4}
    lm = made(kind, **sizes)
    plain = lm.logits(tiny.ids())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets[kind], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(lm.model, config).eval()
    assert not torch.equal(lm.logits(tiny.ids()), plain)
    check_wrapped(lm, wrapped)
    lm = HookedLM(wrapped)
    at = {p: lm.capture(tiny.ids(), [p])[p] for p in all_points(lm) if p.layer == 1}
    by_site = {p.site: activation for p, activation in at.items()}
    total = by_site["resid_pre"] + by_site["attn_out"] + by_site["mlp_out"]
    torch.testing.assert_close(by_site["resid_post"], total)


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("family", ["pythia", "llama", "gpt2"])
def test_a_peft_model_is_hooked_and_left_as_it_was(family):
    peft = pytest.importorskip("peft")
    lm = tiny.FAMILIES[family]()
    targets = {"pythia": ["query_key_value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets[family], init_lora_weights=False
    )
    plain = lm.logits(tiny.ids())
    wrapped = peft.get_peft_model(lm.model, config).eval()
    assert not torch.equal(lm.logits(tiny.ids()), plain)
    check_wrapped(lm, wrapped)
    stack, ids = tiny.stack(lm), tiny.ids()
    with replacement(HookedLM(wrapped), stack, mode="teacher_forced"):
        copied = deepcopy(wrapped)
    assert torch.equal(copied(ids).logits, wrapped(ids).logits)


def test_captures_of_several_threads_are_each_its_own_and_compilation_is_on_again():
    """Also at resid_mid, which one function hands on to another; and passes beside run through."""
    lm = tiny.gemma2()
    points = lm.hook_points(["blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"])
    batches = [tiny.ids(2, 5 + i, seed=i) for i in range(3)]
    expected = [lm.capture(ids, points) for ids in batches]
    clean = lm.logits(batches[0])
    wrong = []

    def capture(ids, right):
        for _ in range(10):
            got = lm.capture(ids, points)
            wrong.extend(p for p in points if not torch.equal(got[p], right[p]))

    def run():
        for _ in range(10):
            wrong.extend([] if torch.equal(lm.logits(batches[0]), clean) else ["logits"])

    threads = [
        Thread(target=capture, args=each) for each in zip(batches, expected, strict=True)
    ] + [Thread(target=run)]
    failed, hook = [], threading.excepthook
    interval = sys.getswitchinterval()
    threading.excepthook = failed.append
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
        sys.setswitchinterval(interval)
    assert not failed
    assert not wrong
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not any("forward" in vars(module) for module in lm.model.modules())


@pytest.mark.parametrize("first", [0, 1], ids=["outer-first", "inner-first"])
def test_splices_at_one_layer_end_in_any_order(first):
    lm = tiny.gemma2()
    clean, block = lm.logits(tiny.ids()), lm.blocks[1]
    point = lm.hook_point("blocks.1.hook_mlp_out")
    hooks = [{point: lambda x: x * 2}, {point: lambda x: x + 1, lm.hook_point(1): lambda x: x * 3}]
    alone = [lm.replace(tiny.ids(), h) for h in hooks]
    both = [lm.hooked(h) for h in hooks]
    for splice in both:
        splice.__enter__()
    both.pop(first).__exit__(None, None, None)
    assert torch.equal(lm.logits(tiny.ids()), alone[1 - first])
    both.pop().__exit__(None, None, None)
    assert torch.equal(lm.logits(tiny.ids()), clean)
    assert lm.blocks[1] is block


def test_a_stand_in_looks_like_the_layer(lm):
    """Model code reads attributes of its layers, and checkpoints their names."""
    block, names = lm.blocks[1], lm.model.state_dict().keys()
    with lm.hooked(spliced(lm)):
        assert lm.blocks[1] is not block
        assert isinstance(lm.blocks[1], type(block))
        assert lm.model.state_dict().keys() == names
        lm.model.train()
    assert all(m.training for m in lm.model.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_are_the_same_with_gradient_checkpointing(lm):
    # All sites but resid_mid, which a block that is run again in the backward pass has not.
    hooks = {p: f for p, f in spliced(lm).items() if p.site != "resid_mid"}

    def gradients():
        lm.model.zero_grad()
        with lm.hooked(hooks):
            lm.model(tiny.ids(), labels=tiny.ids(), use_cache=False).loss.backward()
        return [p.grad.clone() for p in lm.model.parameters()]

    lm.model.train()
    plain = gradients()
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("asked_before", [True, False])
def test_hidden_states_of_a_spliced_model_are_what_flows_on(lm, asked_before):
    """Transformers records them by hooks that it installs when first asked, maybe while inside."""
    if asked_before:
        lm.model(tiny.ids(), output_hidden_states=True)
    seen = {}
    record = {p: (lambda x, p=p: seen.update({p: x})) for p in lm.hook_points([0, 1, 2])}
    with (
        lm.hooked(spliced(lm), around=lambda forward, *args, **kwargs: forward(*args, **kwargs)),
        lm.hooked(record),
    ):
        hidden = lm.model(tiny.ids(), output_hidden_states=True).hidden_states
    clean = lm.model(tiny.ids(), output_hidden_states=True).hidden_states
    assert len(hidden) == len(clean) == lm.n_layers + 1
    for point, activation in seen.items():
        assert torch.equal(hidden[point.layer + 1], activation)
        assert torch.equal(hidden[point.layer + 1], clean[point.layer + 1]) == (point.layer == 0)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("family", ["pythia", "gemma2", "gpt2"])
def test_a_compiled_model_is_replaced_in_one_graph(family, when):
    torch.compiler.reset()
    lm = tiny.FAMILIES[family]()
    hooks = spliced(lm)
    clean, expected = lm.logits(tiny.ids()), lm.replace(tiny.ids(), hooks)
    lm.model.compile(fullgraph=True, backend="eager")
    if when == "before":
        assert torch.equal(lm.logits(tiny.ids()), clean)
    assert torch.equal(lm.replace(tiny.ids(), hooks), expected)
    assert torch.equal(lm.logits(tiny.ids()), clean)
    assert len(lm.capture(tiny.ids(), lm.hook_points([0, 1]))) == 2  # which no graph can hold


def test_layers_compiled_one_by_one_are_replaced():
    torch.compiler.reset()
    lm = tiny.pythia()
    clean, expected = lm.logits(tiny.ids()), lm.replace(tiny.ids(), spliced(lm))
    for block in lm.blocks:
        block.compile(backend="eager")
    assert torch.equal(lm.logits(tiny.ids()), clean)
    assert torch.equal(lm.replace(tiny.ids(), spliced(lm)), expected)


def test_resid_mid_is_what_functions_at_resid_pre_and_attn_out_leave():
    lm = tiny.gemma2()
    pre, attention, mid = (
        lm.hook_point(f"blocks.1.hook_{s}") for s in ("resid_pre", "attn_out", "resid_mid")
    )
    seen = {}
    hooks = {
        mid: lambda x: seen.update(x=x),
        attention: lambda x: torch.full_like(x, 2),
        pre: lambda x: x + 1,
    }
    with lm.hooked(hooks):
        lm.logits(tiny.ids())
    torch.testing.assert_close(seen["x"], lm.capture(tiny.ids(), [pre])[pre] + 3)


def test_tuple_output_is_given_back_as_a_tuple_with_its_other_elements():
    lm = tiny.lime()
    clean = lm.logits(tiny.ids())
    clean_states = lm.model.gpt_neox.states
    last = lm.hook_point(3)
    assert torch.equal(lm.capture(tiny.ids(), [last])[last], clean)
    assert torch.equal(lm.replace(tiny.ids(), {last: lambda x: x * 2}), clean * 2)
    states = lm.model.gpt_neox.states
    assert all(torch.equal(a, b) for a, b in zip(states, clean_states, strict=True))
    for name in ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"):  # by keyword, in a tuple
        assert not torch.equal(
            lm.replace(tiny.ids(), {lm.hook_point(name): lambda x: x + 1}), clean
        )
        states = lm.model.gpt_neox.states
        assert len(states) == 4
        assert torch.equal(states[0], clean_states[0])
        assert torch.equal(states[1], clean_states[1] + 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("blocks.9.hook_resid_post", r"out of range.*0\.\.3", id="layer"),
        pytest.param("9", r"out of range.*0\.\.3", id="bare-number"),
        pytest.param("blocks.1.hook_nonsense", "unknown hook point.*resid_pre, attn", id="site"),
        pytest.param("transformer.h.1", "unknown hook point.*blocks", id="path"),
        pytest.param("-1", "unknown hook point", id="negative"),
        pytest.param("blocks.1.hook_resid_mid", "in parallel.*resid_mid.*choose", id="parallel"),
    ],
)
def test_unknown_hook_points_are_errors_that_list_the_valid_ones(name, message):
    with pytest.raises(ValueError, match=message):
        tiny.pythia().hook_point(name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param([1, 1], "selected twice", id="twice"),
        pytest.param([1, "layers.1"], "selected twice", id="twice-by-other-name"),
        pytest.param([3, 1], r"out of order.*blocks.1.*blocks.3", id="order"),
        pytest.param([], "no layers selected", id="none"),
    ],
)
def test_a_selection_names_each_layer_once_and_in_order(names, message):
    with pytest.raises(ValueError, match=message):
        tiny.pythia().hook_points(names)


def test_names_of_one_point_are_one_point():
    lm = tiny.pythia()
    assert lm.hook_point(2) == lm.hook_point("layers.2") == lm.hook_point("2")
    assert lm.hook_point(2).name == "blocks.2.hook_resid_post"


def test_special_ids_come_from_tokenizer_and_config():
    assert tiny.gemma2().special_ids == (0, 1, 2)
    lm = tiny.pythia()
    assert lm.is_special(torch.tensor([[0, 5, 0]])).tolist() == [[True, False, True]]


def test_from_pretrained_loads_a_local_path_as_the_embedded_model():
    by_path = HookedLM.from_pretrained(str(TINY_PYTHIA))
    embedded = HookedLM.from_pretrained("embedded")
    assert torch.equal(by_path.logits(tiny.ids()), embedded.logits(tiny.ids()))
    assert by_path.tokenizer.bos_token_id == 0


def test_a_missing_model_and_an_unknown_architecture_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found.*local folder"):
        HookedLM.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert.*is an encoder.*decoder-only"):
        HookedLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("family", ["pythia", "gpt2", "llama", "qwen2", "gemma2"])
def test_a_model_without_tokenizer_is_an_error_and_no_empty_tokenizer(family, tmp_path):
    lm = tiny.FAMILIES[family]()
    lm.model.save_pretrained(tmp_path)
    for load in (HookedLM.from_pretrained, partial(HookedLM.described, tokenizer=True)):
        with pytest.raises(ValueError, match=r"has no tokenizer.*save_pretrained"):
            load(str(tmp_path))
    assert HookedLM.described(str(tmp_path)).n_layers == lm.n_layers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_longer_than_the_context_are_an_error_in_every_family(family):
    lm = tiny.FAMILIES[family]()
    points = lm.hook_points([1])
    longest, too_long = tiny.ids(1, 64), tiny.ids(1, 65)
    lm.capture(longest, points)
    lm.logits(longest)
    for run in (lambda ids: lm.capture(ids, points), lm.logits, lambda ids: lm.replace(ids, {})):
        with pytest.raises(ValueError, match="rows of 65 tokens .* context of 64 tokens"):
            run(too_long)
