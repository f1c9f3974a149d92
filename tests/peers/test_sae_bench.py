"""Sparse probing and TPP against SAEBench's own code on local data, and the probe against
scikit-learn. Skipped where `sae-bench` is not installed (`pip install --no-deps sae-bench`: what it
pins is older than torch and transformers here; it needs beartype, jaxtyping and tabulate too)."""

import pytest
import tiny
import torch

pytest.importorskip("sae_bench")
import probing as bench  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from resae import HookedLM  # noqa: E402
from resae.data.labelled import LabelledTexts, load_labelled  # noqa: E402
from resae.evaluation.linear_probes import fit_probe  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

CLASSES = ("bible", "pysrc", "wordnet")
CONTEXT = 48


@pytest.fixture(scope="module")
def material():
    lm = HookedLM.from_pretrained("embedded")
    stack = tiny.stack(lm, "none", k=64, d_sae=512, layers=(3,))
    whole = load_labelled(train_documents=60, test_documents=30)
    parts = [
        part.take([i for i, label in enumerate(part.labels) if label in CLASSES])
        for part in (whole.train, whole.test)
    ]
    return bench.Material.of(lm, stack, LabelledTexts("embedded", *parts), CONTEXT)


def test_sparse_probing_is_sae_benchs(material):
    """At most one document of a class's 60 is told otherwise: scikit-learn stops a little before
    the minimum. The probe of all channels is another one, by AdamW, of which SAEBench keeps the
    epoch with the best test accuracy."""
    theirs, ours = bench.sae_bench(material), bench.ours(material)
    metrics = [f"{name}_top_{k}_test_accuracy" for name in ("sae", "llm") for k in bench.KS]
    assert set(ours) == {*metrics, "llm_all_held_out_accuracy"}
    for metric in metrics:
        assert theirs[metric].keys() == ours[metric].keys() == set(CLASSES)
        for name, accuracy in theirs[metric].items():
            assert ours[metric][name] == pytest.approx(accuracy, abs=1 / 60 + 1e-9), metric
        means = [sum(found[metric].values()) / 3 for found in (theirs, ours)]
        assert means[1] == pytest.approx(means[0], abs=1 / 120), metric
    assert max(ours["sae_top_5_test_accuracy"].values()) > 0.8
    assert sum(theirs["llm_test_accuracy"].values()) / 3 > 0.9
    assert sum(ours["llm_all_held_out_accuracy"].values()) / 3 > 0.9


def test_tpp_with_sae_benchs_probes_is_sae_benchs(material):
    full = bench.filling(material.lm, material.texts, CONTEXT)
    fitting = bench.Material.of(material.lm, material.stack, full, CONTEXT)
    own, ours, theirs = bench.tpp(fitting, (5, 30))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert own[30] == pytest.approx(theirs[30], abs=0.15)  # with our probes
    assert theirs[30] > 0.2


def test_a_probe_is_scikit_learns():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64) * torch.tensor(
        [0.1, 1, 2, 5, 0.5]
    )
    positive = x.sum(1) + 2 * torch.randn(400, generator=generator) > 1
    theirs = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-10).fit(x.numpy(), positive.numpy())
    probe = fit_probe(x, positive)
    torch.testing.assert_close(probe.weight, torch.tensor(theirs.coef_[0]), rtol=1e-4, atol=1e-5)
    assert float(probe.bias) == pytest.approx(theirs.intercept_[0], rel=1e-4, abs=1e-5)
