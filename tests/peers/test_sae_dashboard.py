"""SAEDashboard with accelerated autoencoders of SAELens. Skipped where `sae-dashboard` is not
installed: it needs numpy below 2 and TransformerLens 2, hence an environment of its own
(`pip install sae-dashboard sae-lens "pyarrow<22"`)."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

lens = pytest.importorskip("sae_lens")
dashboard = pytest.importorskip("sae_dashboard")
import transformer_lens  # noqa: E402
from sae_dashboard.sae_vis_data import SaeVisConfig  # noqa: E402
from sae_dashboard.sae_vis_runner import SaeVisRunner  # noqa: E402

from resae_kernels import accelerate  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

D, M, V = 32, 512, 50
HOOK_POINT = "blocks.0.hook_resid_post"
FEATURES = [0, 3, 4, 17, 200, 511]


@pytest.fixture(scope="module")
def model():
    config = transformer_lens.HookedTransformerConfig(
        n_layers=1, d_model=D, n_ctx=32, d_head=16, n_heads=2, d_vocab=V, act_fn="gelu", seed=0
    )
    return lens.HookedSAETransformer(config)


@torch.no_grad()
def autoencoder(kind):
    options = {
        "TopKSAE": {"k": 12, "rescale_acts_by_decoder_norm": True},
        "JumpReLUSAE": {},
        "StandardSAE": {},
    }[kind]
    sae = getattr(lens, kind)(getattr(lens, f"{kind}Config")(d_in=D, d_sae=M, **options))
    sae.cfg.metadata.hook_name = HOOK_POINT
    for name, parameter in sae.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else 1.0
        parameter.copy_(torch.randn_like(parameter) * scale)
        if name == "threshold":
            parameter.copy_(2 + torch.rand_like(parameter))
    return sae.eval()


def page_of(sae, model):
    """The data of a dashboard, as it is saved."""
    tokens = torch.randint(V, (24, 24), generator=torch.Generator().manual_seed(2))
    config = SaeVisConfig(HOOK_POINT, FEATURES, minibatch_size_features=4, minibatch_size_tokens=8)
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    features = {f: asdict(one) for f, one in data.feature_data_dict.items()}
    everything = {"features": features, "stats": asdict(data.feature_stats)}
    return json.loads(json.dumps(everything, default=lambda tensor: tensor.tolist()))


def assert_same(found, expected, where="page"):
    """The same names, texts and whole numbers; numbers up to rounding."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("kind", ["TopKSAE", "JumpReLUSAE", "StandardSAE"])
def test_a_dashboard_of_an_accelerated_autoencoder_is_the_librarys(kind, model, monkeypatch):
    """SAEDashboard folds the norms of the decoder, and, but for TopK, puts a few latents in the
    place of all while it encodes."""
    sae = autoencoder(kind)
    expected = page_of(copy.deepcopy(sae), model)
    fast = accelerate(sae)
    encoded = []
    ours = type(fast).code

    def counted(self, x):
        encoded.append(len(x))
        return ours(self, x)

    monkeypatch.setattr(type(fast), "code", counted)
    found = page_of(fast, model)
    assert sum(encoded) > 0  # by our operations
    assert_same(found, expected)
    assert any(f > 0 for f in expected["stats"]["frac_nonzero"])
    x = torch.randn(7, D)
    with torch.inference_mode():  # the latents are all back
        torch.testing.assert_close(fast(x), sae(x), rtol=1e-4, atol=1e-3)
