import json
from dataclasses import replace

import pytest
import tiny
import torch

from resae import AffineOnly, replacement
from resae.evaluation.effects import edit_effects
from resae.replacements.edits import (
    ActiveEdits,
    Change,
    Edit,
    Interventions,
    PassTokens,
    StrongestLatents,
    predicted_effects,
)
from resae_kernels import SparseCode, transport

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
    return PassTokens.of_pass(torch.zeros(rows, length), kwargs)


def codes(stack, rows=2, length=6):
    """A code of the first selected layer, of random activations."""
    return stack.sae(0).encode(torch.randn(rows, length, stack.d_in))


def dense(code, d_sae=64):
    """`[..., k]` → `[..., M]`."""
    out = torch.zeros(*code.acts.shape[:-1], d_sae)
    return out.scatter_add(-1, code.indices, code.acts)


def edited(stack, code, *edits, tokens=None):
    active = ActiveEdits(Interventions.parse(list(edits)), stack, stack.hook_points)
    new, change = active.at(0, code, tokens or a_pass(*code.acts.shape[:2]))
    return dense(new), change.delta, active


# -- the description -------------------------------------------------------------------------------


def test_a_description_survives_the_way_through_json_and_a_file(tmp_path):
    parsed = Interventions.parse(EVERYTHING)
    assert parsed.to_dict() == EVERYTHING
    text = json.dumps(parsed.to_dict())
    (tmp_path / "edits.json").write_text(text)
    for source in (parsed, text, tmp_path / "edits.json", str(tmp_path / "edits.json")):
        assert Interventions.parse(source) == parsed
    alone = Interventions.parse([{"layer": 0, "action": "ablate", "latents": 3}])
    assert alone == Interventions(
        (Edit(0, "ablate", (3,)),), keep_error=False, effects="propagated"
    )
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
        pytest.param(
            {"edits": [], "effects": "gone"}, "expected 'propagated' or 'frozen'", id="effects"
        ),
        pytest.param({"edits": [], "keep_error": 1}, "expected true or false", id="keep-error"),
        pytest.param([3], "edit 1: got 3, expected keys", id="no-dict"),
        pytest.param(edit() + edit(latent=3), "edit 2: unknown key 'latent'", id="key"),
        pytest.param(edit(action=None), "edit 1: no 'action'", id="no-action"),
        pytest.param(edit(action="kill"), "action='kill', expected 'ablate'", id="action"),
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
        pytest.param(edit(at="here"), "at='here', expected 'all', 'prompt'", id="at"),
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
    code = SparseCode(torch.tensor([[[2.0, 0.0, 0.0]]]), torch.tensor([[[5, 0, 0]]]))
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
    """Positions come from the mask or from position_ids, which hold 1, or anything, for padding."""
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
    whole = PassTokens.of_pass(torch.zeros(1, 5), {"past_key_values": Cache(0)})
    tokens = replace(whole, left_alone=left)
    assert places(tokens)["all"] == [[0, 1, 1, 1, 0]]
    assert places(tokens)["last_prompt"] == [[0, 0, 0, 0, 0]]


# -- effects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["previous", "all_previous", "identity"])
def test_predicted_effects_are_those_of_transported_dictionaries_and_exact_for_the_chain(kind):
    """Codes held, a code changed at two layers: every later x̂ moves by what is predicted."""
    stack = tiny.stack(tiny.pythia(), kind).double()
    saes = [stack.sae(layer) for layer in range(3)]
    zeros = torch.zeros(4, 32, dtype=torch.float64)  # residuals are given: nothing to subtract
    held = [sae.encode(torch.randn_like(zeros), prediction=zeros) for sae in saes]
    latents, dz = torch.tensor([5, 40]), torch.randn(2, 4, 2, dtype=torch.float64)
    changes = [Change(dz[i], saes[i].W_dec[latents]) for i in range(2)]
    moved = [
        SparseCode(
            torch.cat([code.acts, dz[i]], -1), torch.cat([code.indices, latents.expand(4, 2)], -1)
        )
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
    first = SparseCode(torch.tensor([[[1.0, -5.0, 3.0]]]), torch.tensor([[[10, 11, 12]]]))
    keep("a", first)
    keep("a", SparseCode(first.acts * 2, first.indices))
    acts, indices = keep.codes["a"]
    assert acts.tolist() == [[[-5.0, 3.0], [-10.0, 6.0]]]
    assert indices.tolist() == [[[11, 12]] * 2]
    keep.clear()
    assert keep.codes == {}
    with pytest.raises(ValueError, match="n=0"):
        StrongestLatents(0)


# -- in a running model ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pythia", "gemma2"])
def lm(request):
    return tiny.FAMILIES[request.param]()


def strong(effects="propagated", keep_error=False, at="all"):
    """Edits at two layers that are felt: latents by force, so that they fire everywhere."""
    return {
        "edits": [
            {"layer": 0, "action": "clamp", "latents": [3, 8], "value": 6.0, "at": at},
            {"layer": 1, "action": "add", "latents": 11, "value": -5.0, "at": at},
            {"layer": 1, "action": "add", "vector": [0.7] * 32, "at": at},
        ],
        "keep_error": keep_error,
        "effects": effects,
    }


def logits(lm, stack, ids, **options):
    with replacement(lm, stack, **options) as active:
        out = lm.logits(ids)
    if active.edits is not None:
        active.edits.assert_fired()
    return out


def greedy(lm, ids, new_tokens, mask=None, **options):
    return lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def test_no_edits_change_no_bit_and_with_the_error_kept_the_model_is_itself(lm):
    stack, ids = tiny.stack(lm), tiny.ids()
    replaced = logits(lm, stack, ids)
    assert torch.equal(logits(lm, stack, ids, interventions=[]), replaced)
    nothing = [{"layer": 1, "action": "scale", "latents": list(range(64)), "value": 1.0}]
    with replacement(lm, stack, interventions=nothing):
        assert torch.equal(lm.logits(ids), replaced)
    kept = logits(lm, stack, ids, interventions={"edits": [], "keep_error": True})
    torch.testing.assert_close(kept, lm.logits(ids), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(lm, stack, ids, interventions=strong()), replaced, atol=0.1)


@pytest.mark.parametrize("effects", ["propagated", "frozen"])
@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("loop", ["closed", "open"])
def test_what_goes_in_is_the_formula_by_hand(lm, loop, effects, keep_error):
    stack, ids = tiny.stack(lm), tiny.ids()
    chain, streams, codes = [], [], []
    shift = {0: torch.zeros(32), 1: 0.7 * torch.ones(32), 2: torch.zeros(32)}

    def at(layer):
        sae = stack.sae(layer)

        def function(h):
            seen = chain if loop == "closed" else streams
            code = sae.encode(h, prediction=stack.predictor(layer, seen))
            x_hat, z = sae.decode(*code, prediction=stack.predictor(layer, chain)), dense(code)
            new = z.clone()
            if layer == 0:
                new[..., [3, 8]] = 6.0
            if layer == 1:
                new[..., 11] -= 5.0
            codes.append(new)
            streams.append(h)
            delta = (new - z) @ sae.W_dec + shift[layer]
            chain.append(x_hat + delta if effects == "propagated" else x_hat)
            return (h if keep_error else x_hat) + delta

        return function

    hooks = {p: at(i) for i, p in enumerate(lm.hook_points(tiny.LAYERS))}
    by_hand = lm.replace(ids, hooks)
    read = []
    options = {"interventions": strong(effects, keep_error), "loop": loop}
    out = logits(lm, stack, ids, on_codes=lambda _, code: read.append(dense(code)), **options)
    torch.testing.assert_close(out, by_hand, atol=1e-3, rtol=1e-3)
    for mine, expected in zip(read, codes, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)
    other = "frozen" if effects == "propagated" else "propagated"
    options["interventions"] = strong(other, keep_error)
    different = logits(lm, stack, ids, **options)
    assert torch.allclose(different, by_hand, atol=1e-3) == keep_error


@pytest.mark.parametrize("effects", ["propagated", "frozen"])
@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("kind", ["previous", "all_previous"])
def test_carried_dictionaries_predict_edits_as_the_maps_do(
    lm, kind, effects, keep_error, monkeypatch
):
    """By the codes that are transported: edited ones, vectors too, or, frozen, those before the
    edit; to the logits of six tokens at once, and to those of single ones with a cache."""
    stack, ids = tiny.stack(lm, kind), tiny.ids(1, 6)
    asked = strong(effects, keep_error)
    asked["edits"] += [
        {"layer": 0, "action": "add", "vector": [0.3] * 32},
        {"layer": 0, "action": "add", "vector": [-0.4, 0.9] * 16, "at": [1, 7]},
        {"layer": 0, "action": "ablate", "latents": list(range(20, 40)), "at": [2, 3, 8]},
    ]
    by_maps, by_tables, read = {}, {}, {}
    steps = tiny.carried_steps(monkeypatch)
    monkeypatch.setattr("resae.stack.stack._maps_are_faster", lambda *_: False)
    for transport_bytes, out in ((0, by_maps), (1 << 20, by_tables)):
        codes = read[transport_bytes] = []
        with replacement(
            lm,
            stack,
            interventions=asked,
            transport_bytes=transport_bytes,
            on_codes=lambda _, code, codes=codes: codes.append(dense(code)),
        ) as active:
            out["pass"] = lm.logits(ids)
            written = greedy(lm, ids, 6)
        out["logits"] = torch.stack(written.logits, 1)
        out["ids"] = written.sequences
        assert len(steps) == (0 if not transport_bytes else 3 * (1 + 6))
        assert all(sum(count.changed.values()) for count in active.edits.counts)
    assert torch.equal(by_tables["ids"], by_maps["ids"])
    for name in ("pass", "logits"):
        torch.testing.assert_close(by_tables[name], by_maps[name], atol=2e-3, rtol=2e-3)
    for mine, expected in zip(read[1 << 20], read[0], strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)
    other = asked | {"effects": "frozen" if effects == "propagated" else "propagated"}
    codes = []
    with replacement(
        lm,
        stack,
        interventions=other,
        transport_bytes=1 << 20,
        on_codes=lambda _, code: codes.append(dense(code)),
    ):
        lm.logits(ids)
    assert not torch.allclose(codes[-1], read[0][2], atol=1e-1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("at", ["all", "prompt", "last_prompt", "generated", (2, 7)])
def test_cached_generation_is_the_full_forward_with_edits_and_read_codes(lm, at, cache):
    """In a full pass there is no generated token: its places are said by position."""
    stack, ids = tiny.stack(lm), tiny.ids(2, 6)
    places = {"prompt": range(6), "last_prompt": [5], "generated": range(6, 13)}
    keep, keep_full = StrongestLatents(3), StrongestLatents(3)
    with replacement(lm, stack, interventions=strong(at=at), on_codes=keep) as active:
        out = greedy(lm, ids, 8, cache_implementation=cache, disable_compile=True)
    active.edits.assert_fired()
    options = {"interventions": strong(at=list(places.get(at, ())) or at), "on_codes": keep_full}
    whole = logits(lm, stack, out.sequences[:, :-1], **options)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 5:], atol=1e-3, rtol=1e-3)
    for name in tiny.NAMES:
        torch.testing.assert_close(
            keep.codes[name].acts, keep_full.codes[name].acts, atol=1e-3, rtol=1e-3
        )
        assert torch.equal(keep.codes[name].indices, keep_full.codes[name].indices)


def test_a_left_padded_row_is_edited_as_it_is_alone(lm):
    stack, ids = tiny.stack(lm), tiny.ids(2, 6)
    ids[0, :2], mask = 0, torch.ones_like(ids)
    mask[0, :2] = 0
    edits = strong(at=[1, 5])
    with replacement(lm, stack, interventions=edits) as both:
        padded = greedy(lm, ids, 4, mask)
    with replacement(lm, stack, interventions=edits) as alone:
        first = greedy(lm, ids[:1, 2:], 4)
        second = greedy(lm, ids[1:], 4)
    assert torch.equal(padded.sequences[0, 2:], first.sequences[0])
    assert torch.equal(padded.sequences[1], second.sequences[0])
    assert both.edits.counts == alone.edits.counts
    assert both.edits.changed == {tiny.NAMES[0]: 8, tiny.NAMES[1]: 8}


def test_edits_of_chosen_positions_touch_no_other_stream_at_that_layer(lm):
    stack, ids = tiny.stack(lm), tiny.ids()
    seen = []
    for edits in ([], strong(at=[4])["edits"][:1]):
        point = lm.hook_point(0)
        with (
            replacement(lm, stack, interventions=edits),
            lm.hooked({point: lambda h: seen.append(h)}),
        ):
            lm.logits(ids)
    changed = (seen[0] != seen[1]).any(-1)
    assert torch.equal(changed, (torch.arange(12) == 4).expand(3, 12))


def test_special_tokens_left_alone_are_not_edited_even_by_position(lm):
    stack, ids = tiny.stack(lm), tiny.ids(2, 6)
    ids[:, 0] = lm.special_ids[-1]
    edits = [{"layer": 0, "action": "clamp", "latents": 3, "value": 5.0, "at": 0}]
    with replacement(lm, stack, interventions=edits) as active:
        lm.logits(ids)
    with pytest.raises(AssertionError, match="clamp latents 3 value 5 of layer 0, positions 0"):
        active.edits.assert_fired()
    with replacement(lm, stack, interventions=edits, replace_special=True) as active:
        lm.logits(ids)
    assert active.edits.changed == {tiny.NAMES[0]: 2}


def test_interventions_that_this_replacement_cannot_do_are_refused(stack):
    lm, edits = tiny.pythia(), strong()
    for options, message in (
        ({"mode": "teacher_forced"}, "mode='online'"),
        ({"layers": [0, 3]}, "not a replaced layer; these are blocks.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replacement(lm, stack, interventions=edits, **options)
    with pytest.raises(ValueError, match="a stack with autoencoders"):
        replacement(lm, AffineOnly(stack), on_codes=print)


def test_a_predicted_effect_is_exact_where_the_model_is_as_linear_as_the_map():
    """Blocks 2 and 3 made the identity, and the map between blocks 1 and 3 too."""
    lm = tiny.pythia()
    for block in lm.blocks[2:]:
        for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    stack = tiny.stack(lm)
    stack.predictor.get_buffer("A_2").copy_(torch.eye(32))
    edits = {"edits": strong()["edits"][1:], "keep_error": True}
    (row,) = edit_effects(lm, stack, tiny.ids(), edits)
    assert row.hook_point == tiny.NAMES[2]
    assert row.tokens == 36
    assert row.cosine == pytest.approx(1, abs=1e-4)
    assert row.norm_ratio == pytest.approx(1, abs=1e-4)
    assert row.relative_error < 1e-3


def test_edits_in_a_compiled_model_are_those_of_the_model():
    lm = tiny.pythia()
    stack, ids = tiny.stack(lm), tiny.ids()
    expected = logits(lm, stack, ids, interventions=strong(at=[2, 3]))
    with replacement(lm, stack, interventions=strong(at=[2, 3])) as active:
        compiled = torch.compile(lm.model, backend="eager", fullgraph=True)
        with torch.no_grad():
            out = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert active.edits.changed == {tiny.NAMES[0]: 12, tiny.NAMES[1]: 12}
