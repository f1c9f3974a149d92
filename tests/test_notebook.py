"""Objects in a notebook: small tables in which every text is escaped."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch

from resae.evaluation.rows import Evaluation, ReplacementRow
from resae.latents.records import LatentCard, LatentReport, Passage, TokenEffect
from resae.models.identity import ModelIdentity
from resae.report.content import Report
from resae_kernels import SparseCode, ThresholdCode

HOSTILE = "<img src=x onerror=alert(1)>&'\""


def test_a_code_shows_the_strongest_latents_of_its_first_tokens():
    acts = torch.zeros(2, 6, 8)
    acts[0, 0, :3] = torch.tensor([1.0, 4.5, 2.25])
    indices = torch.zeros(2, 6, 8, dtype=torch.int64)
    indices[0, 0, :3] = torch.tensor([7, 901, 30])
    page = SparseCode(acts, indices)._repr_html_()
    assert "2 × 6 tokens, k = 8, float32, the first 8 tokens" in page
    assert "<td>0</td><td>3</td><td>901: 4.5  30: 2.25  7: 1</td>" in page
    assert page.count("<tr>") == 1 + 8
    assert ThresholdCode(acts, indices, acts[..., 0].int())._repr_html_() == page
    long = SparseCode(torch.ones(1, 50), torch.arange(50).unsqueeze(0))._repr_html_()
    assert "… 44 more" in long
    assert len(long) < 1000
    empty = SparseCode(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))._repr_html_()
    assert empty.count("<tr>") == 1


@pytest.mark.parametrize("kind", ["previous", "none"])
def test_a_stack_shows_a_row_per_layer(kind):
    lm = tiny.pythia()
    stack = tiny.stack(lm, kind)
    stack.model_identity = replace(ModelIdentity.of(lm), name=HOSTILE)
    page = stack._repr_html_()
    assert "<img" not in page
    assert "&lt;img" in page
    source = tiny.NAMES[0] if kind == "previous" else "–"
    row = f"<td>{tiny.NAMES[1]}</td><td>{source}</td><td>topk</td><td>32</td><td>64</td><td>4</td>"
    assert row in page
    assert page.count("<tr>") == 1 + 3


def test_an_evaluation_shows_the_rows_with_all_layers_replaced():
    numbers = {"k": 4, "active_total": 8, "ce_clean": 2.0, "ce": 2.5, "delta_ce": 0.51234}
    numbers |= {"ce_recovered_zero": 0.9, "ce_recovered_mean": 0.8, "kl": 0.4, "tokens": 100}
    row = ReplacementRow(method=HOSTILE, loop=None, mode="online", layers=["a", "b"], **numbers)
    page = Evaluation([row, replace(row, layers=["a"])], [], [], [], [])._repr_html_()
    assert "<img" not in page
    assert page.count("<tr>") == 2
    assert "<td>–</td><td>online</td><td>4</td><td>0.5123</td>" in page
    rows = [row, replace(row, layers=["a"])]
    page = Report(title=HOSTILE, config={}, environment={}, replacement=rows)._repr_html_()
    assert "<img" not in page
    assert page.count("<tr>") == 2
    assert "&#x27;&quot;: all selected layers replaced; nats per token" in page


def test_cards_of_latents_mark_the_tokens_that_fire():
    passage = Passage(0, 3, [1, 2], [HOSTILE, "\n"], [1.5, 0.0], 0)
    card = LatentCard(
        layer=0,
        hook_point="blocks.1.hook_resid_post",
        latent=17,
        firings=12,
        density=0.01,
        mean_act=1.0,
        largest_act=1.5,
        bin_width=0.0625,
        histogram=[12],
        passages=[passage],
        samples=[],
        raised=[TokenEffect(5, HOSTILE, 0.25)],
        lowered=[],
        nearest=[],
    )
    page = card._repr_html_()
    assert "<img" not in page
    assert '<mark title="1.5">&lt;img' in page
    assert "#17: fires at 12 tokens, density 1.000%" in page
    sizes = {"d_sae": [64], "never_fired": [3], "tokens": 1200, "rows": 100, "row_tokens": 12}
    report = LatentReport(
        model="m", stack=HOSTILE, layers=["l"], logits_through="", settings={}, **sizes
    )
    page = replace(report, latents=[card] * 30)._repr_html_()
    assert "<img" not in page
    assert page.count("<tr>") == 1 + 20
    assert "30 latents of &lt;img" in page


def test_html_is_imported_by_what_is_shown():
    code = "import sys, resae_kernels, resae.stack.stack; assert not {m for m in sys.modules "
    code += "if m.startswith('resae') and m.endswith('notebook')}"
    subprocess.run([sys.executable, "-c", code], check=True)
