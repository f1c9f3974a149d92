import pytest
import tiny
import torch

from resae.affine import KINDS, AffinePredictor, Moments, fit_predictor, r2_per_layer


def planted(n=4000, D=6, noise=0.0, seed=0):
    """x_1 = x_0 A + c, x_2 = x_0 P + x_1 Q + d, with maps returned; uncentred, anisotropic x_0."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A, P, Q = r(D, D), r(D, D), r(D, D)
    c, d = r(D), r(D)
    x0 = r(n, D) * torch.linspace(0.5, 3, D, dtype=torch.float64) + 2
    x1 = x0 @ A + c + noise * r(n, D)
    x2 = x0 @ P + x1 @ Q + d + noise * r(n, D)
    return [x0, x1, x2], (A, c, P, Q, d)


def moments_of(xs, kind="all_previous", batches=1):
    moments = Moments(len(xs), xs[0].shape[1], kind)
    for parts in zip(*(x.chunk(batches) for x in xs), strict=True):
        moments.add(parts)
    return moments


def test_fit_recovers_a_planted_map():
    xs, (A, c, *_) = planted()
    fitted = fit_predictor("previous", moments_of(xs), ridge=0.0, dtype=torch.float64)
    torch.testing.assert_close(fitted.A[0], A)
    torch.testing.assert_close(fitted.c[0], c)


def test_all_previous_recovers_maps_from_two_sources():
    xs, (_, _, P, Q, d) = planted(n=40_000, noise=0.1)
    fitted = fit_predictor("all_previous", moments_of(xs), ridge=0.0, dtype=torch.float64)
    torch.testing.assert_close(fitted.A[1], torch.cat([P, Q]), atol=0.1, rtol=0)
    torch.testing.assert_close(fitted(2, xs), xs[0] @ P + xs[1] @ Q + d, atol=0.1, rtol=0.05)


def test_residual_is_uncorrelated_with_its_sources_and_has_zero_mean():
    xs, _ = planted(noise=1.0)
    fitted = fit_predictor("previous", moments_of(xs), ridge=0.0, dtype=torch.float64)
    rest = xs[1] - fitted(1, xs)
    assert float(rest.mean(0).abs().max()) < 1e-8
    assert float((rest.T @ xs[0]).abs().max()) / len(rest) < 1e-8


def test_streaming_in_any_batches_gives_the_same_fit():
    xs, _ = planted(noise=0.5)
    whole = fit_predictor("previous", moments_of(xs), dtype=torch.float64)
    parts = fit_predictor("previous", moments_of(xs, batches=13), dtype=torch.float64)
    torch.testing.assert_close(whole.A[0], parts.A[0])


@pytest.mark.parametrize("kind", KINDS)
def test_moments_for_one_kind_give_the_fit_of_all_moments(kind):
    xs, _ = planted(noise=0.5)
    full = fit_predictor(kind, moments_of(xs))
    own = fit_predictor(kind, moments_of(xs, kind))
    assert len(full.A) == len(own.A)
    for a, b in zip(full.A + full.c, own.A + own.c, strict=True):
        assert torch.equal(a, b)


def test_identity_adds_the_mean_difference():
    xs, _ = planted()
    fitted = fit_predictor("identity", moments_of(xs), dtype=torch.float64)
    shift = xs[1].mean(0) - xs[0].mean(0)
    torch.testing.assert_close(fitted(1, xs), xs[0] + shift)


def test_none_predicts_nothing():
    xs, _ = planted()
    assert fit_predictor("none", moments_of(xs))(1, xs) is None


def test_first_layer_is_never_predicted():
    xs, _ = planted()
    for kind in KINDS:
        assert fit_predictor(kind, moments_of(xs))(0, xs) is None


def test_ridge_is_relative_so_scale_does_not_matter():
    xs, _ = planted(noise=1.0)
    scaled = [1000 * x for x in xs]
    plain = fit_predictor("previous", moments_of(xs), ridge=0.1, dtype=torch.float64)
    large = fit_predictor("previous", moments_of(scaled), ridge=0.1, dtype=torch.float64)
    torch.testing.assert_close(plain.A[0], large.A[0])
    assert float(plain.A[0].norm()) < float(
        fit_predictor("previous", moments_of(xs), ridge=0.0, dtype=torch.float64).A[0].norm()
    )


def test_outlier_dimension_of_massive_activations_does_not_spoil_the_fit():
    xs, _ = planted(noise=0.1)
    xs = [x.clone() for x in xs]
    xs[0][:, 2] *= 1e4
    fitted = fit_predictor("previous", moments_of(xs), ridge=1e-10)
    (r2, _) = r2_per_layer(fitted, [xs])
    assert r2 > 0.99


def test_r2_of_a_planted_noise_level():
    xs, _ = planted(n=20000, noise=2.0)
    fitted = fit_predictor("previous", moments_of([x[:10000] for x in xs]))
    unseen = [x[10000:].float() for x in xs]
    (r2, _) = r2_per_layer(fitted, [[x[:5000] for x in unseen], [x[5000:] for x in unseen]])
    signal = (unseen[1] - unseen[1].mean(0)).square().sum()
    assert r2 == pytest.approx(1 - float(4.0 * unseen[1].numel() / signal), abs=0.01)


def test_rescaled_maps_predict_rescaled_activations():
    xs, _ = planted(noise=0.5)
    for kind in ("identity", "previous", "all_previous"):
        fitted = fit_predictor(kind, moments_of(xs), dtype=torch.float64)
        factors = [2.0, 0.5, 3.0]
        scaled = fitted.rescaled(factors)
        moved = [f * x for f, x in zip(factors, xs, strict=True)]
        for layer in (1, 2):
            torch.testing.assert_close(scaled(layer, moved), factors[layer] * fitted(layer, xs))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_maps_come_back(tmp_path, kind):
    xs, _ = planted()
    fitted = fit_predictor(kind, moments_of(xs))
    fitted.save(tmp_path / "affine.safetensors")
    loaded = AffinePredictor.load(tmp_path / "affine.safetensors", kind)
    assert loaded.kind == kind
    for a, b in zip(fitted.A + fitted.c, loaded.A + loaded.c, strict=True):
        assert torch.equal(a, b)


def test_scale_is_the_rms():
    xs = [torch.full((10, 4), 3.0), torch.full((10, 4), -0.5)]
    assert moments_of(xs).scale() == pytest.approx([3.0, 0.5])


def test_bad_input_is_named():
    xs, _ = planted()
    with pytest.raises(ValueError, match="unknown predictor 'linear'.*all_previous"):
        fit_predictor("linear", moments_of(xs))
    with pytest.raises(ValueError, match="ridge=-1"):
        fit_predictor("previous", moments_of(xs), ridge=-1)
    with pytest.raises(ValueError, match="empty or too short"):
        fit_predictor("previous", Moments(3, 6))
    with pytest.raises(ValueError, match="singular.*ridge > 0"):
        fit_predictor("previous", moments_of([x[:4] for x in xs]), ridge=0.0)
    xs[1][3, 2] = float("nan")
    with pytest.raises(ValueError, match="layer 1 hold NaN"):
        moments_of(xs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["previous", "all_previous"])
def test_maps_in_half_precision_predict_in_it_rounded_once(kind, dtype):
    lm = tiny.pythia()
    half = tiny.predictor(lm, kind).to(dtype)
    xs = [torch.randn(2, 5, 32).to(dtype) for _ in range(3)]
    for layer in (1, 2):
        got = half(layer, xs)
        A, c = (getattr(half, name)[layer - 1].double() for name in ("A", "c"))
        exact = torch.cat(xs[layer - len(A) // 32 : layer], -1).double() @ A + c
        assert got.dtype == dtype
        # Half a unit in the last place, and the sum in float32.
        allowed = exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-4
        assert ((got.double() - exact).abs() <= allowed).all()
