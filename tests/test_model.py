from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from resae import HookedLM
from resae.assets import TINY_PYTHIA
from resae.model import SITES, HookPoint


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


def test_hooks_are_gone_after_use_and_after_an_error():
    lm = tiny.pythia()
    before = lm.logits(tiny.ids())

    def fail(_):
        raise ArithmeticError("planted")

    with pytest.raises(ArithmeticError):
        lm.replace(tiny.ids(), {lm.hook_point(1): fail})
    assert torch.equal(lm.logits(tiny.ids()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


class _StateBlock(nn.Module):
    """A block that returns a tuple and hands further state on, as LIMe's do."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, stream, state):
        return stream + self.attention(stream) + self.mlp(stream), [*state, stream]


class _StateModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            model_type="gpt_neox", hidden_size=8, vocab_size=16, use_parallel_residual=True
        )
        self.embed = nn.Embedding(16, 8)
        self.gpt_neox = nn.Module()
        self.gpt_neox.layers = nn.ModuleList(_StateBlock() for _ in range(3))

    def forward(self, input_ids, use_cache):
        del use_cache
        stream, self.state = self.embed(input_ids), []
        for block in self.gpt_neox.layers:
            output = block(stream, self.state)
            assert isinstance(output, tuple)
            stream, self.state = output
        return SimpleNamespace(logits=stream)


def test_tuple_output_is_given_back_as_a_tuple_with_its_other_elements():
    lm = HookedLM(_StateModel())
    ids = torch.arange(6).view(2, 3)
    clean = lm.logits(ids)
    point = lm.hook_point(2)
    assert torch.equal(lm.capture(ids, [point])[point], clean)
    replaced = lm.replace(ids, {point: lambda x: x * 2})
    assert torch.equal(replaced, clean * 2)
    assert len(lm.model.state) == 3


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
    with pytest.raises(ValueError, match="bert.*FAMILIES"):
        HookedLM.from_pretrained(str(tmp_path))
