import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import tiny

from resae.latents.cards import TokenTexts, describe_latents, spread_latents
from resae.latents.collect import collect_latents
from resae.latents.index import IndexSizes
from resae.latents.neuronpedia import write_neuronpedia
from resae.latents.page import latents_page, write_page
from resae.latents.prompt import prompt_latents

FEATURE_FIELDS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values"),
    *("neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1"),
    *("correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1"),
    *("correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values"),
    *("frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total"),
    *("n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector"),
}
ACTIVATION_FIELDS = {
    *("bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"),
}
HOSTILE = '</script><img src=x onerror="document.title=1"><!--\u2028&amp;'


@pytest.fixture(scope="module")
def lm():
    lm = tiny.pythia()
    lm.name = f"model {HOSTILE}"
    return lm


@pytest.fixture(scope="module")
def report(lm):
    stack, rows = tiny.stack(lm), tiny.ids(12, 12)
    index = collect_latents(lm, stack, [rows], sizes=IndexSizes(3, 1, 6))
    index.settings["data"] = HOSTILE
    report = describe_latents(
        lm, stack, index, spread_latents(index, 24), name=HOSTILE, measure_ablation=True
    )
    card = report.latents[0]
    passage = replace(card.passages[0], tokens=[HOSTILE] * 6)
    return replace(report, latents=[replace(card, passages=[passage]), *report.latents[1:]])


@pytest.fixture(scope="module")
def prompt(lm):
    return prompt_latents(lm, tiny.stack(lm), tiny.ids(1, 9)[0])


@pytest.fixture(scope="module")
def page(report, prompt, lm):
    return latents_page(report, prompt, TokenTexts(lm.tokenizer))


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_text_of_model_data_and_tokens_is_no_html(page):
    found = Tags(page)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert page.count("&lt;/script&gt;&lt;img") >= 3  # title, heading, model, data


def test_the_policy_allows_this_style_and_script_and_no_request(page):
    (policy,) = [v for k, v in Tags(page).attributes if k == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.findall(
            r"url\((?!#)|@import|fetch|https?:", text.replace("http://www.w3.org", "")
        )
    assert not {"src", "href"} & {name for name, _ in Tags(page).attributes}


def test_the_data_of_the_page_is_that_of_the_report(page, report, prompt):
    (text,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert data["layers"] == report.layers
    for shown, card in zip(data["latents"], report.latents, strict=True):
        assert (shown["layer"], shown["latent"]) == (card.layer, card.latent)
        for one, passage in zip(shown["passages"], card.passages, strict=True):
            assert [data["texts"][i] for i in one["tokens"]] == passage.tokens
            assert one["acts"] == [[i, a] for i, a in enumerate(passage.acts) if a]
    assert data["latents"][0]["passages"][0]["tokens"].count(data["texts"].index(HOSTILE)) == 6
    assert len(data["prompt"]["tokens"]) == len(prompt.token_ids)


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here")
    return found


def dom(chromium, path, fragment=""):
    """The document as the browser made it, and what it logged."""
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        + ["--virtual-time-budget=3000", "--dump-dom", f"file://{path}{fragment}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_draws_cards_and_prompt_without_an_error(chromium, report, prompt, lm, tmp_path):
    write_page(tmp_path / "page.html", report, prompt, TokenTexts(lm.tokenizer))
    layer, latent = report.latents[0].layer, report.latents[0].latent
    block = report.layers[layer].split(".")[1]
    drawn, errors = dom(chromium, tmp_path / "page.html", f"#{block}%2F{latent}")
    assert errors == []
    tags = Tags(drawn).tags
    assert "img" not in tags
    assert drawn.count('<details class="latent">') == len(report.latents)
    assert f"Block {block}, latent {latent}</h2>" in drawn  # the chosen card
    assert "Strongest passages" in drawn
    assert "&lt;/script&gt;&lt;img src=x" in drawn
    rows = re.search(r'<table id="prompt">.*?</table>', drawn, re.DOTALL).group()
    assert rows.count("<tr>") == 1 + len(prompt.token_ids)


def test_the_export_has_the_fields_of_saedashboard(report, tmp_path):
    """Names as of `NeuronpediaDashboardBatch.to_dict` of sae-dashboard 0.8.0, whose classes take
    the batch."""
    paths = write_neuronpedia(tmp_path, report)
    assert [path.parent.name for path in paths] == report.layers
    batch = json.loads(paths[1].read_text())
    assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert batch["layer"] == int(report.layers[1].split(".")[1])
    cards = [card for card in report.latents if card.layer == 1]
    for feature, card in zip(batch["features"], cards, strict=True):
        assert feature.keys() == FEATURE_FIELDS
        assert feature["feature_index"] == card.latent
        assert feature["pos_str"][0] == card.raised[0].token
        values, heights = (feature[f"freq_hist_data_bar_{n}"] for n in ("values", "heights"))
        assert len(values) == len(heights)
        assert sum(heights) == card.firings
        assert len(feature["activations"]) == len(card.passages) + len(card.samples)
        top = feature["activations"][0]
        assert top.keys() == ACTIVATION_FIELDS
        assert (top["bin_min"], top["bin_contains"]) == (-1, -1)
        assert top["values"][top["qualifying_token_index"]] == max(top["values"]) > 0


def test_a_page_without_latents_or_prompt_says_so(report):
    page = latents_page(replace(report, latents=[]))
    assert "0 are on this page" in page
    assert 'id="prompt"' not in page
