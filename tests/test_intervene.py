import json

import pytest
import tiny
import torch

from resae.intervene import (
    ActiveEdits,
    Change,
    Edit,
    Interventions,
    PassTokens,
    StrongestLatents,
    predicted_effects,
)
from resae_kernels import TopK, transport

EVERYTHING = {
    "edits": [
        {"layer": 0, "action": "ablate", "latents": [3, 5], "at": "all"},
        {"layer": tiny.NAMES[1], "action": "clamp", "latents": [7], "value": 2.5, "at": "prompt"},
        {"layer": 1, "action": "scale", "latents": [9], "value": -1.0, "at": "last_prompt"},
        {"layer": 3, "action": "add", "latents": [0], "value": 4.0, "at": "generated"},
        {"layer": 3, "action": "add", "vector": [0.5] * 32, "at": [0, 4]},
    ],
    "keep_error": True,
    "effects": "frozen",
}


@pytest.fixture(scope="module")
def stack():
    return tiny.stack(tiny.pythia())


def a_pass(rows=2, length=6, **kwargs):
    return PassTokens.of_pass(torch.zeros(rows, length), kwargs, None)


def codes(stack, rows=2, length=6):
    """A code of the first selected layer, of random activations."""
    return stack.sae(0).encode(torch.randn(rows, length, stack.d_in))


def dense(code, d_sae=64):
    """`[..., k]` → `[..., M]`."""
    out = torch.zeros(*code.acts.shape[:-1], d_sae)
    return out.scatter_add(-1, code.indices, code.acts)


def edited(stack, code, *edits, tokens=None):
    active = ActiveEdits(Interventions.parse(list(edits)), stack, stack.hook_points)
    new, delta = active.at(0, code, tokens or a_pass(*code.acts.shape[:2]))
    return dense(new), delta, active


# -- the description -------------------------------------------------------------------------------


def test_a_description_survives_the_way_through_json_and_a_file(tmp_path):
    parsed = Interventions.parse(EVERYTHING)
    assert parsed.to_dict() == EVERYTHING
    text = json.dumps(parsed.to_dict())
    (tmp_path / "edits.json").write_text(text)
    for source in (parsed, text, tmp_path / "edits.json", str(tmp_path / "edits.json")):
        assert Interventions.parse(source) == parsed
    alone = Interventions.parse([{"layer": 0, "action": "ablate", "latents": 3}])
    assert alone == Interventions((Edit(0, "ablate", (3,)),), keep_error=False, effects="carried")
    assert Interventions.parse([]) == Interventions()


def edit(**changes):
    entry = {"layer": 0, "action": "clamp", "latents": 3, "value": 1.0, **changes}
    return [{key: value for key, value in entry.items() if value is not None}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param({"edit": []}, "unknown key 'edit'; there are edits, effects", id="top-key"),
        pytest.param({}, "no 'edits'", id="no-edits"),
        pytest.param({"edits": 3}, "edits=3, expected a list", id="edits-no-list"),
        pytest.param({"edits": [], "effects": "gone"}, "carried or frozen", id="effects"),
        pytest.param({"edits": [], "keep_error": 1}, "expected true or false", id="keep-error"),
        pytest.param([3], "edit 1: got 3, expected keys", id="no-dict"),
        pytest.param(edit() + edit(latent=3), "edit 2: unknown key 'latent'", id="key"),
        pytest.param(edit(action=None), "edit 1: no 'action'", id="no-action"),
        pytest.param(edit(action="kill"), "unknown action 'kill'; there are ablate", id="action"),
        pytest.param(edit(value=None), "clamp needs value, got None", id="no-value"),
        pytest.param(edit(action="ablate"), "ablate takes no value, got 1.0", id="value"),
        pytest.param(edit(value="1"), "value='1', expected a number", id="value-type"),
        pytest.param(edit(value=True), "value=True, expected a number", id="value-bool"),
        pytest.param(edit(value=float("nan")), "must be finite", id="nan"),
        pytest.param(edit(latents=None), "clamp without latents", id="no-latents"),
        pytest.param(edit(latents=[]), "clamp without latents", id="empty-latents"),
        pytest.param(edit(latents=[1.5]), "expected whole numbers", id="latent-type"),
        pytest.param(edit(latents=[3, 3]), "give each once", id="latent-twice"),
        pytest.param(edit(latents=-1), "counting from 0", id="latent-negative"),
        pytest.param(edit(layer=1.5), "layer=1.5; expected a block number", id="layer-type"),
        pytest.param(edit(at="here"), "at='here'; expected all, prompt", id="at"),
        pytest.param(edit(at=[]), "expected positions", id="no-positions"),
        pytest.param(edit(at=[-1]), "expected positions", id="position-negative"),
        pytest.param(edit(vector=[1.0]), "clamp with a vector", id="vector-clamped"),
        pytest.param(edit(action="add", vector=[1.0]), "in place of latents", id="both"),
        pytest.param(
            edit(action="add", latents=None, vector=[1.0]), "takes no value", id="vector-and-value"
        ),
        pytest.param("[{", "not valid JSON", id="json"),
    ],
)
def test_what_is_not_a_description_is_refused_with_the_place(source, message):
    with pytest.raises(ValueError, match="^interventions") as raised:
        Interventions.parse(source)
    assert message in str(raised.value)


def test_what_the_stack_has_not_is_refused(stack):
    for entry, message in (
        (edit(layer=2), "not a replaced layer; these are blocks.0.hook_resid_post"),
        (edit(layer="blocks.3.hook_mlp_out"), "not a replaced layer"),
        (edit(latents=64), "latents 0..63"),
        (edit(action="add", latents=None, value=None, vector=[1.0]), "1 entries, the stream 32"),
    ):
        with pytest.raises(ValueError, match="^interventions: ") as raised:
            ActiveEdits(Interventions.parse(entry), stack, stack.hook_points)
        assert message in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        Interventions.parse("nowhere.json")


# -- the edit of a code ----------------------------------------------------------------------------


def test_each_action_does_to_the_code_what_its_formula_says(stack):
    code = codes(stack)
    z = dense(code)
    active, idle = int(code.indices[0, 0, 0]), int((z == 0).all((0, 1)).nonzero()[0])
    for action, value, formula in (
        ("ablate", None, lambda old: 0 * old),
        ("clamp", 1.5, lambda old: 0 * old + 1.5),
        ("scale", -2.0, lambda old: -2.0 * old),
        ("add", 0.5, lambda old: old + 0.5),
    ):
        (entry,) = edit(action=action, value=value, latents=[active, idle])
        new, delta, _ = edited(stack, code, entry)
        expected = z.clone()
        expected[..., [active, idle]] = formula(z[..., [active, idle]])
        assert torch.equal(new, expected)
        torch.testing.assert_close(delta, (expected - z) @ stack.sae(0).W_dec)
    vector = torch.randn(stack.d_in)
    entry = {"layer": 0, "action": "add", "vector": vector.tolist()}
    new, delta, _ = edited(stack, code, entry)
    assert torch.equal(new, z)
    assert torch.equal(delta, vector.expand_as(delta))


def test_edits_act_in_their_order(stack):
    code = codes(stack)
    latents = list(range(64))
    scale, add = edit(action="scale", value=3.0) + edit(action="add", value=1.0)
    for entry in (scale, add):
        entry["latents"] = latents
    torch.testing.assert_close(edited(stack, code, scale, add)[0], 3 * dense(code) + 1)
    torch.testing.assert_close(edited(stack, code, add, scale)[0], 3 * (dense(code) + 1))


def test_ablating_is_clamping_to_zero_and_scaling_by_one_is_nothing(stack):
    code = codes(stack)
    latents = code.indices.unique().tolist()
    ablated = edited(stack, code, *edit(action="ablate", value=None, latents=latents))
    clamped = edited(stack, code, *edit(value=0.0, latents=latents))
    assert torch.equal(ablated[0], clamped[0])
    assert torch.equal(ablated[1], clamped[1])
    assert not ablated[0].any()
    same, delta, active = edited(stack, code, *edit(action="scale", value=1.0, latents=latents))
    assert torch.equal(same, dense(code))
    assert not delta.any()
    assert not any(active.counts[0].changed.values())


def test_latent_zero_is_told_from_padding(stack):
    """Padding slots hold act 0 and index 0: they must neither count as latent 0 nor lose it."""
    code = TopK(torch.tensor([[[2.0, 0.0, 0.0]]]), torch.tensor([[[5, 0, 0]]]))
    new, _, active = edited(stack, code, *edit(latents=0, value=1.0))
    assert new[0, 0, [0, 5]].tolist() == [1.0, 2.0]
    assert active.counts[0].changed == {0: 1}


def test_an_edit_of_some_positions_leaves_the_others_alone(stack):
    code = codes(stack)
    new, delta, _ = edited(stack, code, *edit(latents=[3, 4], value=9.0, at=[1, 4]))
    changed = (new != dense(code)).any(-1)
    assert torch.equal(changed, torch.tensor([[0, 1, 0, 0, 1, 0]] * 2).bool())
    assert torch.equal(delta.any(-1), changed)


def test_counts_name_what_fired_and_what_did_not(stack):
    code = codes(stack)
    z = dense(code)
    often, never = int(code.indices[0, 0, 0]), int((z == 0).all((0, 1)).nonzero()[0])
    *_, active = edited(
        stack,
        code,
        {"layer": 0, "action": "ablate", "latents": [often, never]},
        {"layer": 0, "action": "add", "vector": [1.0] * 32, "at": [2]},
        {"layer": 0, "action": "clamp", "latents": never, "value": 1.0, "at": "generated"},
    )
    changed = [count.changed for count in active.counts]
    assert changed == [{often: int((z[..., often] > 0).sum()), never: 0}, {None: 2}, {never: 0}]
    with pytest.raises(AssertionError) as raised:
        active.assert_fired()
    message = str(raised.value)
    assert f"ablate latents {often}, {never} of layer 0, all (only {never})" in message
    assert f"clamp latents {never} value 1 of layer 0, generated" in message
    assert "vector" not in message


# -- which tokens ----------------------------------------------------------------------------------


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def places(tokens):
    found = {at: tokens.chosen(at) for at in ("all", "prompt", "last_prompt", "generated")}
    found["2,3"] = tokens.chosen(torch.tensor([2, 3]))
    return {at: chosen[..., 0].int().tolist() for at, chosen in found.items()}


PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_positions_count_real_tokens_with_left_padding():
    """Whether from the mask or from position_ids, which say 1, or anything, for padding."""
    ids = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    for kwargs in ({}, {"position_ids": ids}):
        tokens = a_pass(2, 5, attention_mask=PADDED, **kwargs)
        assert places(tokens) == {
            "all": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
            "prompt": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
            "last_prompt": [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],
            "generated": [[0] * 5] * 2,
            "2,3": [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]],
        }


def test_the_last_prompt_token_is_before_padding_on_the_right():
    tokens = a_pass(2, 5, attention_mask=PADDED.flip(1))
    assert places(tokens)["last_prompt"] == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("length", [5, torch.tensor(5)], ids=["dynamic", "static"])
def test_a_decode_step_is_placed_by_cache_mask_or_position_ids(length):
    """A static cache keeps its length on the device."""
    cache = Cache(length)
    tokens = a_pass(2, 1, past_key_values=cache)
    assert tokens.positions.tolist() == [[5], [5]]
    mask = torch.cat([PADDED, torch.ones(2, 1, dtype=torch.int64)], 1)
    for kwargs in ({"attention_mask": mask}, {"position_ids": torch.tensor([[3], [5]])}):
        tokens = a_pass(2, 1, past_key_values=cache, **kwargs)
        assert tokens.positions.tolist() == [[3], [5]]
        assert places(tokens) == {
            "all": [[1], [1]],
            "prompt": [[0], [0]],
            "last_prompt": [[0], [0]],
            "generated": [[1], [1]],
            "2,3": [[1], [0]],
        }


def test_tokens_left_alone_are_never_edited():
    left = torch.tensor([[True, False, False, False, True]])
    tokens = PassTokens.of_pass(torch.zeros(1, 5), {"past_key_values": Cache(0)}, left)
    assert places(tokens)["all"] == [[0, 1, 1, 1, 0]]
    assert places(tokens)["last_prompt"] == [[0, 0, 0, 0, 0]]


# -- effects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["previous", "all_previous", "identity"])
def test_predicted_effects_are_those_of_transported_dictionaries_and_exact_for_the_chain(kind):
    """Codes held, a code changed at two layers: every later x̂ moves by what is predicted."""
    stack = tiny.stack(tiny.pythia(), kind).double()
    saes = [stack.sae(layer) for layer in range(3)]
    held = [sae.encode(torch.randn(4, 32, dtype=torch.float64)) for sae in saes]
    latents, dz = torch.tensor([5, 40]), torch.randn(2, 4, 2, dtype=torch.float64)
    changes = [Change(dz[i], saes[i].W_dec[latents]) for i in range(2)]
    moved = [
        TopK(torch.cat([code.acts, dz[i]], -1), torch.cat([code.indices, latents.expand(4, 2)], -1))
        for i, code in enumerate(held[:2])
    ]
    after, before = stack.decode([*moved, held[2]]), stack.decode(held)
    predicted = predicted_effects(stack, [*changes, None])
    for m in range(3):
        torch.testing.assert_close(after[m] - before[m], predicted[m])
    maps = stack.predictor
    tables = transport(
        [sae.W_dec for sae in saes], maps.A, maps.c, b_dec=[sae.b_dec for sae in saes]
    ).dictionaries
    by_rows = sum(dz[i] @ tables[2][i][latents] for i in range(2))
    torch.testing.assert_close(predicted[2], by_rows)


def test_nothing_is_predicted_before_the_first_edit_nor_without_maps(stack):
    change = Change(torch.ones(3, 1), stack.sae(1).W_dec[:1].detach())
    first, second, third = predicted_effects(stack, [None, change, None])
    assert first is None
    assert torch.equal(second, change.delta)
    assert third.shape == (3, 32)
    raw = tiny.stack(tiny.pythia(), "none")
    assert predicted_effects(raw, [None, change, None])[2] is None
    with pytest.raises(ValueError, match="1 changes for 3 selected layers"):
        predicted_effects(stack, [change])


# -- reading ---------------------------------------------------------------------------------------


def test_the_strongest_latents_of_all_passes_are_kept_in_order():
    keep = StrongestLatents(2)
    first = TopK(torch.tensor([[[1.0, -5.0, 3.0]]]), torch.tensor([[[10, 11, 12]]]))
    keep("a", first)
    keep("a", TopK(first.acts * 2, first.indices))
    acts, indices = keep.codes["a"]
    assert acts.tolist() == [[[-5.0, 3.0], [-10.0, 6.0]]]
    assert indices.tolist() == [[[11, 12]] * 2]
    keep.clear()
    assert keep.codes == {}
    with pytest.raises(ValueError, match="n=0"):
        StrongestLatents(0)
