import pytest
import tiny
import torch

from resae import replacement
from resae.evaluation.metrics import cross_entropy, kl_divergence
from resae.latents.ablation import ablate
from resae.latents.cards import TokenTexts, describe_latents, spread_latents
from resae.latents.collect import clean_codes, collect_latents
from resae.latents.directions import Readout, nearest, transported
from resae.latents.index import IndexSizes
from resae.latents.passages import window_starts
from resae.latents.prompt import prompt_latents
from resae.models.final_norm import REFERENCE_TOKENS, final_norm
from resae.models.unembedding import unembedding_of

T, WINDOW = 12, 6


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def stack(lm):
    return tiny.stack(lm)


@pytest.fixture(scope="module")
def rows():
    ids = tiny.ids(20, T)
    ids[:, 0] = 0
    return ids


@pytest.fixture(scope="module")
def index(lm, stack, rows):
    return collect_latents(lm, stack, [rows], sizes=IndexSizes(4, 2, WINDOW))


@pytest.mark.parametrize("family", ["pythia", "llama", "gpt2"])
def test_logit_effects_are_those_of_the_model_itself(family):
    """The mean change of the logits when a small step is added to the stream after the last block
    of the model."""
    lm, ids = tiny.FAMILIES[family](), tiny.ids(8, T)
    directions = torch.randn(3, lm.d_model)
    readout = Readout.of(lm, ids)
    assert readout is not None
    n = 7
    effects = readout.effects(directions, n)
    point = lm.hook_point(lm.n_layers - 1)
    step = 1e-3
    for row, direction in enumerate(directions):
        ends = [
            lm.replace(ids, {point: lambda x, s=sign, d=direction: x + s * step * d}).double()
            for sign in (1, -1)
        ]
        change = ((ends[0] - ends[1]) / (2 * step)).flatten(0, 1)[:REFERENCE_TOKENS].mean(0)
        change = change - change.mean()
        found = (effects.top[row], effects.bottom[row])
        for sign, tokens, values in (
            (1, effects.top_tokens[row], found[0]),
            (-1, effects.bottom_tokens[row], found[1]),
        ):
            expected = (sign * change).topk(n)
            torch.testing.assert_close(
                sign * values.double(), expected.values, rtol=2e-2, atol=1e-2
            )
            assert len(set(tokens.tolist()) & set(expected.indices.tolist())) >= n - 1


def test_the_final_norm_is_found_by_what_it_reads_and_returns(lm):
    ids = tiny.ids(2, T)
    assert final_norm(unembedding_of(lm, ids), ids) is lm.model.gpt_neox.final_layer_norm


def test_directions_are_transported_as_the_tables_of_the_chain(stack):
    tables = stack.transported(1 << 30).dictionaries
    for layer in range(stack.n_layers):
        found = transported(stack, layer, stack.sae(layer).W_dec)
        assert found[:layer] == [None] * layer
        for m in range(layer, stack.n_layers):
            torch.testing.assert_close(found[m], tables[m][layer])


@pytest.mark.parametrize(("layer", "other"), [(0, 2), (2, 0), (1, 2)])
def test_nearest_latents_are_those_of_the_whole_matrix_of_cosines(stack, layer, other, monkeypatch):
    monkeypatch.setattr("resae.latents.directions.BLOCK", 10)
    tables = stack.transported(1 << 30).dictionaries
    later, earlier = max(layer, other), min(layer, other)
    rows = {earlier: tables[later][earlier], later: stack.sae(later).W_dec}

    def cosines(one, two):
        return torch.cosine_similarity(one.unsqueeze(1), two.unsqueeze(0), dim=2)

    raw = cosines(stack.sae(layer).W_dec, stack.sae(other).W_dec)
    moved = cosines(rows[layer], rows[other])
    latents = torch.tensor([3, 60])
    for ranked, by_transported in ((raw, False), (moved, True)):
        found = nearest(stack, layer, latents, other, 5, by_transported=by_transported)
        assert torch.equal(found.latents, ranked[latents].topk(5).indices)
        torch.testing.assert_close(found.raw, raw[latents].gather(1, found.latents))
        torch.testing.assert_close(found.transported, moved[latents].gather(1, found.latents))


def test_an_ablation_costs_what_the_edited_model_loses(lm, stack, index, rows):
    """Against `replacement` with the error kept and the latent ablated."""
    layer, point = 1, stack.hook_points[1]
    latent = int(index.layers[layer].firings.argmax())
    kept = index.layers[layer].strongest
    found = ablate(lm, stack, layer, latent, kept, index.token_ids())
    edits = {"edits": [{"layer": point, "action": "ablate", "latents": latent}]}
    with (
        torch.no_grad(),
        replacement(lm, stack, interventions=edits | {"keep_error": True}, loop="open"),
    ):
        edited = lm.model(rows).logits
    plain = lm.logits(rows)
    ce = cross_entropy(edited, rows) - cross_entropy(plain, rows)
    kl = kl_divergence(plain, edited)
    tokens, codes = clean_codes(lm, stack, rows)
    acts = torch.zeros(rows.numel())
    acts[tokens] = (codes[layer].acts * (codes[layer].indices == latent)).sum(1)
    fires = acts.view(rows.shape) > 0
    chosen, at_firings = [], []
    for place in kept.places[latent].tolist():
        row, position = divmod(place, T)
        start = int(window_starts(torch.tensor(position), WINDOW, T))
        window = range(start, min(start + WINDOW, T - 1))
        places = [(row, t) for t in window if fires[row, : t + 1].any()]
        chosen += places
        at_firings += [place for place in places if fires[place]]
    assert found.tokens == len(chosen) > len(at_firings) > 0
    for values, mean, mean_at_firings in (
        (ce, found.delta_ce, found.delta_ce_at_firings),
        (kl, found.kl, found.kl_at_firings),
    ):
        assert mean == pytest.approx(float(torch.stack([values[p] for p in chosen]).mean()), 1e-3)
        of_firings = torch.stack([values[p] for p in at_firings])
        assert mean_at_firings == pytest.approx(float(of_firings.mean()), 1e-3)
    assert found.kl > 1e-4


@pytest.mark.parametrize("kind", ["previous", "none"])
def test_cards_hold_what_the_index_holds(lm, kind, rows):
    stack = tiny.stack(lm, kind)
    index = collect_latents(lm, stack, [rows], sizes=IndexSizes(4, 2, WINDOW))
    pairs = [(2, int(index.layers[2].firings.argmax())), (0, 5)]
    report = describe_latents(lm, stack, index, pairs, name="tiny", measure_ablation=True)
    assert [(card.layer, card.latent) for card in report.latents] == pairs
    card = report.latents[0]
    assert card.firings == sum(card.histogram) == int(index.layers[2].firings.max())
    assert card.density == card.firings / index.tokens
    assert card.largest_act == max(max(p.acts) for p in card.passages)
    for passage in card.passages + card.samples:
        ids = rows[passage.row, passage.start : passage.start + WINDOW].tolist()
        assert passage.token_ids == ids
        assert max(passage.acts) == passage.acts[passage.peak] > 0
        for token_id, token in zip(ids, passage.tokens, strict=True):
            text = lm.tokenizer.decode([token_id])
            assert token == text or "\ufffd" in text  # part of a character
    assert [e.logit for e in card.raised] == sorted((e.logit for e in card.raised), reverse=True)
    assert {n.hook_point for n in card.nearest} == set(stack.hook_points[:2])
    assert all((n.transported_cosine is None) == (kind == "none") for n in card.nearest)
    assert card.ablation is not None
    assert ("affine maps" in report.logits_through) == (kind == "previous")
    content = report.to_dict()
    assert content["schema_version"] == 1
    assert content["latents"][0]["passages"][0]["peak"] == card.passages[0].peak


def test_a_token_that_completes_a_character_is_shown_as_it(lm):
    texts = TokenTexts(lm.tokenizer)
    ids = lm.tokenizer("a 中é b", add_special_tokens=False)["input_ids"]
    shown = texts.row(ids)
    assert len(shown) == len(ids) > 6  # characters in parts
    whole = [text for text in shown if not text.startswith("⟨")]
    assert "".join(whole).replace(" ", "") == "a中éb"
    assert TokenTexts(None).row([5, 6]) == ["⟨5⟩", "⟨6⟩"]


def test_latents_and_layers_that_there_are_not_are_refused(lm, stack, index):
    with pytest.raises(ValueError, match=r"hook_resid_post has no latent 64; expected 0 to 63"):
        describe_latents(lm, stack, index, [(0, 64)])
    with pytest.raises(ValueError, match="layer 3, expected 0 to 2"):
        describe_latents(lm, stack, index, [(3, 0)])
    with pytest.raises(ValueError, match="make the index anew"):
        describe_latents(lm, tiny.stack(lm, d_sae=32), index, [(0, 0)])


def test_a_selection_goes_from_rare_to_frequent_in_every_layer(index):
    pairs = spread_latents(index, 30)
    assert [layer for layer, _ in pairs] == [0] * 10 + [1] * 10 + [2] * 10
    for number, layer in enumerate(index.layers):
        firings = sorted(int(layer.firings[j]) for n, j in pairs if n == number)
        assert firings[0] > 0
        assert firings[0] == int(layer.firings[layer.firings > 0].min())
        assert firings[5] < firings[-1]


def test_a_prompt_shows_the_strongest_latents_of_each_token(lm, stack):
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), tiny.ids(1, 6)[0]])
    found = prompt_latents(lm, stack, ids, 2)
    assert found.token_ids == ids.tolist()
    assert found.strongest[0] == [[], [], []]  # BOS
    _, codes = clean_codes(lm, stack, ids.unsqueeze(0))
    for layer, (acts, indices) in enumerate(codes):
        for token in range(6):
            best = acts[token].argsort(descending=True)[:2]
            expected = [(int(indices[token, i]), float(acts[token, i])) for i in best]
            assert found.strongest[token + 1][layer] == expected
    assert (0, found.strongest[1][0][0][0]) in found.latents()
    with pytest.raises(ValueError, match="only special tokens"):
        prompt_latents(lm, stack, ids[:1])
    with pytest.raises(ValueError, match="no tokens"):
        prompt_latents(lm, stack, ids[:0])
