import pytest
import tiny
import torch

from resae.choices import PredictorKind
from resae.evaluation.predictors import r2_per_layer, routing_shares
from resae.stack.affine import MAP_TENSORS, AffinePredictor
from resae.stack.fit import Moments, fit_predictor


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


@pytest.mark.parametrize("kind", ["identity", "previous", "all_previous"])
def test_maps_on_reconstructions_are_their_least_squares(kind):
    """Beside torch's solver on the reconstructions, of which layers are predicted."""
    xs, _ = planted(noise=0.5)
    g = torch.Generator().manual_seed(1)
    x_hats = [0.8 * x + torch.randn(x.shape, generator=g, dtype=x.dtype) for x in xs]
    moments = Moments(3, 6, kind, on_reconstructions=True)
    for part in range(2):
        moments.add([x[part::2] for x in xs], [x[part::2] for x in x_hats])
    fitted = fit_predictor(kind, moments, ridge=0.0, dtype=torch.float64)
    expected = []
    for layer in (1, 2):
        sources = x_hats[:layer] if kind == "all_previous" else x_hats[layer - 1 : layer]
        centred = torch.cat([x - x.mean(0) for x in sources], dim=1)
        if kind != "identity":
            centred = centred @ torch.linalg.lstsq(centred, xs[layer] - xs[layer].mean(0)).solution
        expected.append(xs[layer].mean(0) + centred)
        torch.testing.assert_close(fitted(layer, x_hats), expected[-1])
    r2 = r2_per_layer(fitted, [xs], lambda _: x_hats)
    for x, prediction, found in zip(xs[1:], expected, r2, strict=True):
        unexplained = (x - prediction).square().sum() / (x - x.mean(0)).square().sum()
        assert found == pytest.approx(1 - float(unexplained), abs=1e-6)
    assert moments.scale() == pytest.approx([float(x.square().mean()) ** 0.5 for x in xs])
    shares = routing_shares(fitted, moments)
    assert [len(of_layer) for of_layer in shares] == [1, 2 if kind == "all_previous" else 1]
    if kind == "all_previous":
        parts = fitted.A[1].split(6)
        energy = [float(((x - x.mean(0)) @ A).square().sum())
                  for x, A in zip(x_hats, parts, strict=False)]  # fmt: skip
        assert shares[1] == pytest.approx([e / sum(energy) for e in energy])
    with pytest.raises(ValueError, match="3 activations and 0 reconstructions for 3 layers"):
        moments.add(xs)


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


@pytest.mark.parametrize("kind", tuple(PredictorKind))
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
    for kind in tuple(PredictorKind):
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


@pytest.mark.parametrize("kind", tuple(PredictorKind))
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
    with pytest.raises(ValueError, match="='linear', expected .*all_previous"):
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


# -- cheap forms -----------------------------------------------------------------------------------

CHEAP = [("scalar", None), ("diagonal", None), ("low_rank", 2)]


def three_layers(noise=1.0):
    """Streams that hold on to what came before, as those of a model do; uncentred."""
    (x0, x1, x2), _ = planted(noise=noise)
    return [x0, 0.8 * x0 + 0.3 * x1 + 1, 0.3 * x0 + 0.5 * x1 + 0.2 * x2 - 2]


def penalised(A, xs, layer, ridge):
    """Objective that a map [s·D, D] minimises, by its definition, on tokens in RMS units."""
    units = [x / x.square().mean().sqrt() for x in xs]
    centred = [x - x.mean(0) for x in units]
    sources = torch.cat(centred[:layer], 1)
    lam = ridge * sources.square().sum(0).mean() / len(sources)
    error = (centred[layer] - sources @ A).square().sum() / len(sources)
    return error + lam * A.square().sum()


def in_rms_units(predictor, xs, layer):
    rms = [float(x.square().mean().sqrt()) for x in xs]
    return predictor.rescaled([1 / r for r in rms]).A[layer - 1]


def brute_force(map_type, rank, xs, layer, ridge):
    """The same minimum from the tokens themselves: lstsq over the form's own parameters, with the
    penalty as further rows; low rank: the SVD (Eckart–Young) of what the scalar form leaves of the
    fitted values."""
    units = [x / x.square().mean().sqrt() for x in xs]
    centred = [x - x.mean(0) for x in units]
    N, D = centred[0].shape
    wide = torch.cat(centred[:layer], 1)
    lam = ridge * wide.square().sum(0).mean()
    rows = lam.sqrt() * torch.eye(layer * D, dtype=torch.float64)
    padded = torch.cat([wide, rows])
    target = torch.cat([centred[layer], torch.zeros(layer * D, D, dtype=torch.float64)])
    if map_type == "low_rank":
        scalar = brute_force("scalar", None, xs, layer, ridge)
        lacks = torch.linalg.lstsq(padded, target).solution - scalar
        _, _, Vh = torch.linalg.svd(padded @ lacks, full_matrices=False)
        return scalar + lacks @ Vh[:rank].T @ Vh[:rank]
    eye = torch.eye(D, dtype=torch.float64)
    patterns = []  # one dense map per parameter
    for j in range(layer):
        for part in [eye] if map_type == "scalar" else [torch.diag(row) for row in eye]:
            placed = torch.zeros(layer * D, D, dtype=torch.float64)
            placed[j * D : (j + 1) * D] = part
            patterns.append(placed)
    design = torch.stack([(padded @ p).flatten() for p in patterns], 1)
    weights = torch.linalg.lstsq(design, target.reshape(-1, 1)).solution
    return sum(w * p for w, p in zip(weights.flatten(), patterns, strict=True))


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize(("map_type", "rank"), CHEAP)
def test_a_map_type_is_the_least_squares_of_its_own_parameters(map_type, rank, ridge):
    xs = three_layers()
    fitted = fit_predictor(
        "all_previous",
        moments_of(xs),
        ridge=ridge,
        map_type=map_type,
        rank=rank,
        dtype=torch.float64,
    )
    for layer in (1, 2):
        expected = brute_force(map_type, rank, xs, layer, ridge)
        torch.testing.assert_close(in_rms_units(fitted, xs, layer), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("map_type", "rank"), CHEAP)
def test_no_perturbation_of_a_map_type_is_better(map_type, rank):
    xs = three_layers()
    fitted = fit_predictor(
        "all_previous",
        moments_of(xs),
        ridge=0.05,
        map_type=map_type,
        rank=rank,
        dtype=torch.float64,
    )
    best = penalised(in_rms_units(fitted, xs, 2), xs, 2, 0.05)
    for _ in range(10):
        moved = AffinePredictor(
            "all_previous",
            [
                tuple(  # the skip is the scalar form's: fixed before the low rank is fitted
                    part + (0.01 * torch.randn_like(part) if name != "skip" else 0)
                    for name, part in zip(MAP_TENSORS[map_type], fitted._parts(layer), strict=True)
                )
                for layer in (1, 2)
            ],
            fitted.c,
            map_type=map_type,
        )
        assert penalised(in_rms_units(moved, xs, 2), xs, 2, 0.05) > best


def test_low_rank_of_the_whole_rank_is_the_full_map():
    xs = three_layers()
    moments = moments_of(xs)
    full = fit_predictor("all_previous", moments, dtype=torch.float64)
    whole = fit_predictor("all_previous", moments, map_type="low_rank", rank=6, dtype=torch.float64)
    for a, b in zip(full.A + full.c, whole.A + whole.c, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["previous", "all_previous"])
@pytest.mark.parametrize(("map_type", "rank"), CHEAP)
def test_cheap_maps_are_applied_rescaled_and_stored_as_their_dense_ones(
    tmp_path, kind, map_type, rank
):
    xs = three_layers()
    moments = moments_of(xs, kind)
    fitted = fit_predictor(kind, moments, map_type=map_type, rank=rank, dtype=torch.float64)
    dense = AffinePredictor(kind, fitted.A, fitted.c)
    factors = [2.0, 0.5, 3.0]
    moved = [f * x for f, x in zip(factors, xs, strict=True)]
    for layer in (1, 2):
        torch.testing.assert_close(fitted(layer, xs), dense(layer, xs))
        scaled = fitted.rescaled(factors)(layer, moved)
        torch.testing.assert_close(scaled, factors[layer] * dense(layer, xs))
    half = fitted.to(torch.bfloat16)(2, [x.bfloat16() for x in xs])
    assert half.dtype == torch.bfloat16  # what an encode of such a stack needs
    error = float((half.double() - dense(2, xs)).norm() / dense(2, xs).norm())
    assert error < 0.02
    fitted = fit_predictor(kind, moments, map_type=map_type, rank=rank, dtype=torch.float64)
    fitted.save(tmp_path / "affine.safetensors")
    loaded = AffinePredictor.load(tmp_path / "affine.safetensors", kind)
    assert loaded.map_type == map_type
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in fitted.tensors().items())
    stored = sum(t.numel() for t in loaded.tensors().values()) - 2 * 6  # without c
    n_sources = 3 if kind == "all_previous" else 2
    expected = {"scalar": n_sources, "diagonal": 6 * n_sources, "low_rank": 13 * n_sources + 24}
    assert stored == expected[map_type]


def test_every_form_leaves_no_mean_and_a_richer_one_explains_more():
    xs = three_layers()
    moments = moments_of(xs)
    r2 = {}
    for map_type, rank in [*CHEAP, ("low_rank", 5), ("full", None)]:
        fitted = fit_predictor(
            "all_previous", moments, ridge=0.0, map_type=map_type, rank=rank, dtype=torch.float64
        )
        rest = xs[2] - fitted(2, xs)
        assert float(rest.mean(0).abs().max()) < 1e-8
        r2[map_type, rank] = r2_per_layer(fitted, [xs])[1]
    assert r2["scalar", None] < r2["diagonal", None] < r2["full", None]
    assert r2["scalar", None] < r2["low_rank", 2] < r2["low_rank", 5] < r2["full", None]


def test_routing_shares_are_the_energies_of_what_each_source_contributes():
    xs = three_layers()
    moments = moments_of(xs)
    for map_type, rank in [("full", None), *CHEAP]:
        fitted = fit_predictor(
            "all_previous", moments, map_type=map_type, rank=rank, dtype=torch.float64
        )
        first, second = routing_shares(fitted, moments)
        assert first == [1.0]
        parts = [
            ((x - x.mean(0)) @ A).square().sum()
            for x, A in zip(xs[:2], fitted.A[1].split(6), strict=True)
        ]
        expected = [float(p / sum(parts)) for p in parts]
        assert second == pytest.approx(expected, rel=1e-6)
    assert routing_shares(fit_predictor("previous", moments), moments) == [[1.0], [1.0]]


def test_forms_that_do_not_fit_are_named():
    moments = moments_of(three_layers())
    for kind, map_type, rank, message in [
        ("previous", "sparse", None, "map_type='sparse', expected .*low_rank"),
        ("identity", "scalar", None, "only 'previous' and 'all_previous'"),
        ("previous", "low_rank", None, "rank=None; expected a rank"),
        ("previous", "scalar", 3, "none for the others"),
        ("previous", "low_rank", 7, "rank=7 exceeds the width 6"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_predictor(kind, moments, map_type=map_type, rank=rank)
    assert set(MAP_TENSORS) == {"full", *(map_type for map_type, _ in CHEAP)}


# -- half precision --------------------------------------------------------------------------------


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
