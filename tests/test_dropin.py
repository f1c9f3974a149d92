"""`accelerate`: autoencoders of other libraries, by themselves and with our ops inside. Runs on
stand-ins (`foreign.py`) and, where they are installed, on the libraries themselves."""

import copy
import pickle
import sys

import foreign
import pytest
import torch

from resae_kernels import accelerate

D, M, K, N = 64, 2048, 6, 40
LIBRARIES = ["sae_lens", "sparsify", "dictionary_learning"]
THRESHOLDS = [
    "JumpReLUSAE",
    "StandardSAE",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "AutoEncoder",
]
"""Kinds whose code has as many latents as are above thresholds."""


def library_sae(kind: str, **config):
    """An autoencoder of the installed library."""
    if kind in ("sae_lens", "JumpReLUSAE", "StandardSAE"):
        lens = pytest.importorskip("sae_lens")
        name = "TopKSAE" if kind == "sae_lens" else kind
        normalize = "constant_norm_rescale" if config.pop("normalize", None) else "none"
        config |= {"k": K} if kind == "sae_lens" else {}
        settings = getattr(lens, f"{name}Config")(
            d_in=D, d_sae=M, normalize_activations=normalize, **config
        )
        return getattr(lens, name)(settings)
    if kind == "sparsify":
        pytest.importorskip("sparsify")
        from sparsify import SparseCoder, SparseCoderConfig

        return SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, **config))
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    if kind == "dictionary_learning":
        return top_k.AutoEncoderTopK(D, M, K)
    if kind == "BatchTopKSAE":
        return batch_top_k.BatchTopKSAE(D, M, K)
    if kind == "MatryoshkaBatchTopKSAE":
        return matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, M, K, [M // 4, M - M // 4])
    return getattr(dictionary, kind)(D, M)


def stand_in(kind: str, **config):
    if config.pop("normalize", None):
        config["normalize"] = D**0.5
    names = {"sae_lens": "TopKSAE", "sparsify": "SparseCoder"}
    names["dictionary_learning"] = "AutoEncoderTopK"
    sizes = (D, M) if kind in ("JumpReluAutoEncoder", "AutoEncoder") else (D, M, K)
    return getattr(foreign, names.get(kind, kind))(*sizes, **config)


@pytest.fixture(params=["stand-in", "library"])
def make(request):
    """`make(library, **config)`: an autoencoder with weights of one seed."""

    def made(library, **config):
        sae = (stand_in if request.param == "stand-in" else library_sae)(library, **config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(torch.randn_like(parameter) / D**0.5)
                if name == "threshold":
                    parameter.copy_(2 + torch.rand_like(parameter))
            for name, buffer in sae.named_buffers():
                if name == "threshold":
                    buffer.fill_(2.0)
        return sae

    return made


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(N, D)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def dense_of(encoded):
    """Acts `[..., M]` of whatever `encode` returned."""
    if not hasattr(encoded, "top_acts"):
        return encoded
    zeros = torch.zeros(*encoded.top_acts.shape[:-1], M)
    return zeros.scatter_add(-1, encoded.top_indices, encoded.top_acts)


def decoded(sae, encoded):
    return sae.decode(*encoded[:2]) if hasattr(encoded, "top_acts") else sae.decode(encoded)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(N, D), (2, N // 2, D), (1, D)], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_encode_decode_and_forward_are_those_of_the_library(make, x, library, shape, grad):
    sae = make(library)
    x = x[: shape[:-1][0] * (shape[1] if len(shape) == 3 else 1)].reshape(shape)
    if library == "dictionary_learning":
        assert int(sae.k) == K
    ours = accelerate(sae)
    rows = x.reshape(-1, D)  # sparsify decodes no more dimensions
    with torch.set_grad_enabled(grad):
        encoded, expected = ours.encode(x), sae.encode(rows)
        close(dense_of(encoded).view(-1, M), dense_of(expected))
        close(decoded(ours, encoded).view(-1, D), decoded(sae, expected))
        close(_flat(ours(x))[0].view(-1, D), _flat(sae(rows))[0])
        for result, reference in zip(_flat(ours(rows)), _flat(sae(rows)), strict=True):
            close(result, reference)


def _flat(output):
    """Outputs to compare; of sparsify without the code, whose order differs."""
    if hasattr(output, "sae_out"):
        return output.sae_out, output.fvu, output.auxk_loss, output.multi_topk_fvu
    return (output,)


@pytest.mark.parametrize("library", LIBRARIES)
def test_gradients_of_every_parameter_and_the_input_are_those_of_the_library(make, x, library):
    sae = make(library)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(N, D)
    (_flat(sae(theirs))[0] * weights).sum().backward()
    expected = [theirs.grad, *(p.grad.clone() for p in sae.parameters() if p.grad is not None)]
    sae.zero_grad()
    (_flat(accelerate(sae)(ours))[0] * weights).sum().backward()
    found = [ours.grad, *(p.grad for p in sae.parameters() if p.grad is not None)]
    assert len(found) == len(expected) > 4
    for gradient, reference in zip(found, expected, strict=True):
        close(gradient, reference)


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_it_is_the_same_kind_of_object_and_the_original_stays(make, library):
    sae = make(library)
    ours = accelerate(sae)
    assert isinstance(ours, type(sae))
    assert type(ours) is not type(sae)
    assert accelerate(ours) is ours
    before, after = sae.state_dict(), ours.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in sae.named_modules()]
    assert "encode" not in vars(sae)


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_a_weight_that_changes_is_followed(make, x, library):
    sae = make(library)
    ours = accelerate(sae)
    ours(x)
    for parameter in sae.parameters():
        parameter.mul_(1.5).add_(0.01)
    close(_flat(ours(x))[0], _flat(sae(x))[0])
    ours.load_state_dict(
        {n: t / 2 for n, t in ours.state_dict().items() if t.is_floating_point()}, strict=False
    )
    close(_flat(ours(x))[0], _flat(sae(x))[0])


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_copies_are_accelerated_and_independent(make, x, library):
    ours = accelerate(make(library))
    expected = _flat(ours(x))[0].clone()
    twin = copy.deepcopy(ours)
    assert type(twin) is type(ours)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(_flat(ours(x))[0], expected)


@torch.no_grad()
def test_a_pickled_one_comes_back_accelerated(make, x):
    try:
        stored = pickle.dumps(ours := accelerate(make("dictionary_learning")))
    except (pickle.PicklingError, AttributeError) as error:  # the library's own class cannot
        pytest.skip(str(error))
    close(pickle.loads(stored)(x), ours(x))


@pytest.mark.parametrize("kind", ["sae_lens", "sparsify", "dictionary_learning", "BatchTopKSAE"])
@torch.no_grad()
def test_it_compiles_to_the_same_numbers(make, x, kind):
    if {"sae_lens", "dictionary_learning"} & sys.modules.keys():
        pytest.skip("with these imported torch fails to trace a tensor times True")
    ours = accelerate(make(kind))
    compiled = torch.compile(lambda x: _flat(ours(x))[0], backend="eager")
    close(compiled(x), _flat(ours(x))[0])


# -- dense acts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
@torch.no_grad()
def test_acts_that_were_edited_are_decoded_as_they_are(make, x, library):
    """Edits: by hand, in place, all zero, a few negative, and too many for a code."""
    sae = make(library)
    ours = accelerate(sae)
    acts = ours.encode(x)
    half = acts / 2
    acts[:, acts[0].argmax()] = 0
    steered = acts.clone()
    steered[3, 7] = -2.0
    full = torch.rand(N, M)
    for edited in (acts, half, steered, full, torch.zeros(N, M), full[:0], steered.view(2, -1, M)):
        close(ours.decode(edited), sae.decode(edited))


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
def test_edits_that_torch_does_not_count_are_decoded(make, x, library):
    """Through `.data`, and of tensors of the inference mode; parameters may be such tensors too."""
    sae = make(library)
    ours = accelerate(sae)
    with torch.no_grad():
        acts = ours.encode(x)
        acts.data[:, 0] = 9.0
        close(ours.decode(acts), sae.decode(acts))
    with torch.inference_mode():
        acts = ours.encode(x)
        close(ours.decode(acts), sae.decode(acts))
        acts[:, : M // 2] = 0
        close(ours.decode(acts), sae.decode(acts))
        inside = make(library)
        fast = accelerate(inside)
        for _ in range(2):
            close(fast(x), inside(x))
            for parameter in inside.parameters():
                parameter[..., 3] += 0.5


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_gradients_of_acts_are_those_of_the_library(make, x, library, frozen):
    """Of all M acts, active or not: those that encode returned, made leaves, and edited."""
    sae = make(library).requires_grad_(not frozen)

    def gradients(sae):
        leaf = torch.no_grad()(sae.encode)(x).requires_grad_()
        edited = leaf.detach().mul(2).requires_grad_()
        inside = sae.encode(x.clone().requires_grad_())
        inside.retain_grad()
        for acts in (leaf, edited, inside):
            sae.decode(acts).square().sum().backward()
        return leaf.grad, edited.grad, inside.grad

    for ours, theirs in zip(gradients(accelerate(sae)), gradients(sae), strict=True):
        close(ours, theirs)


def test_acts_detached_in_place_pass_no_gradient(make, x):
    ours = accelerate(make("sae_lens"))
    x.requires_grad_()
    ours.decode(ours.encode(x).detach_()).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
@torch.no_grad()
def test_acts_of_another_width_are_refused_as_by_the_library(make, library):
    sae = make(library)
    acts = torch.zeros(3, M - 8)
    acts[:, 5] = 1.0
    for one in (sae, accelerate(sae)):
        with pytest.raises(RuntimeError):
            one.decode(acts)


# -- SAELens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_acts_by_decoder_norm": True},
        {"apply_b_dec_to_input": False},
        {"normalize": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_configurations_of_saelens(make, x, config):
    sae = make("sae_lens", **config)
    ours = accelerate(sae)
    close(ours.encode(x), sae.encode(x))
    close(ours.decode(ours.encode(x)), sae.decode(sae.encode(x)))
    close(ours(x), sae(x))


@pytest.mark.parametrize("name", ["input", "acts_pre", "acts_post", "recons", "output"])
@torch.no_grad()
def test_hooks_of_saelens_see_and_change_the_same(make, x, name):
    """Each hook point is given the library's own tensor, and what it returns goes on."""
    sae = make("sae_lens")
    ours = accelerate(sae)
    seen = []

    def hook(_module, _inputs, output):
        seen.append(output.clone())
        return output * 0.5

    getattr(sae, f"hook_sae_{name}").register_forward_hook(hook)
    close(ours(x), sae(x))
    assert len(seen) == 2
    close(*seen)


def test_the_error_term_of_saelens_gives_the_input_back(make, x):
    ours = accelerate(make("sae_lens"))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        attribute = "_use_error_term" if hasattr(ours, "_use_error_term") else "use_error_term"
        patch.setattr(ours, attribute, True)
        close(ours(x), x)


# -- sparsify --------------------------------------------------------------------------------------


@torch.no_grad()
def test_all_scores_of_sparsify_are_there_when_they_are_read(make, x):
    sae = make("sparsify")
    output, expected = accelerate(sae).encode(x), sae.encode(x)
    assert isinstance(output, type(expected))
    _, _, scores = output
    close(scores, expected.pre_acts)
    close(output.pre_acts, expected.pre_acts)
    close(output[-1], expected.pre_acts)
    assert len(output[:2]) == 2
    assert len(output[1:]) == 2


@torch.no_grad()
def test_the_code_of_sparsify_can_be_replaced_and_its_scores_are_never_those_of_another_input(
    make, x
):
    sae = make("sparsify")
    expected = sae.encode(x)
    edited = accelerate(sae).encode(x)._replace(top_acts=expected.top_acts * 2)
    close(edited.top_acts, expected.top_acts * 2)
    close(edited.pre_acts, expected.pre_acts)
    encoded = accelerate(sae).encode(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="written to after encode; read pre_acts first"):
        encoded.pre_acts  # noqa: B018


@pytest.mark.parametrize("config", [{"transcode": True}, {"skip_connection": True}], ids=str)
@torch.no_grad()
def test_transcoders_and_skips_of_sparsify(make, x, config):
    sae = make("sparsify", **config)
    close(accelerate(sae)(x, x.flip(0)).sae_out, sae(x, x.flip(0)).sae_out)
    close(accelerate(sae)(x, x.flip(0)).fvu, sae(x, x.flip(0)).fvu)


@torch.no_grad()
def test_losses_of_sparsify_that_read_all_scores_are_its_own(make, x):
    sae = make("sparsify")
    dead = torch.arange(M) % 3 == 0
    ours, theirs = accelerate(sae)(x, dead_mask=dead), sae(x, dead_mask=dead)
    close(ours.auxk_loss, theirs.auxk_loss)
    assert float(theirs.auxk_loss) != 0


# -- dictionary_learning ---------------------------------------------------------------------------


@torch.no_grad()
def test_options_of_dictionary_learning(make, x):
    sae = make("dictionary_learning")
    ours = accelerate(sae)
    for option in ({"return_topk": True}, {"use_threshold": True}):
        for result, reference in zip(
            ours.encode(x, **option), sae.encode(x, **option), strict=True
        ):
            close(result, reference)
    for result, reference in zip(
        ours(x, output_features=True), sae(x, output_features=True), strict=True
    ):
        close(result, reference)


@torch.no_grad()
def test_k_of_dictionary_learning_may_change(make, x):
    sae = make("dictionary_learning")
    ours = accelerate(sae)
    ours(x)
    sae.k.fill_(2)
    close(ours(x), sae(x))


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", THRESHOLDS)
@torch.no_grad()
def test_kinds_with_thresholds_are_those_of_the_library(make, x, kind):
    """Those without thresholds, whose acts are half of all latents, run the library's code from the
    second call on."""
    sae = make(kind)
    ours = accelerate(sae)
    for _ in range(2):
        acts = sae.encode(x)
        close(ours.encode(x), acts)
        close(ours.decode(ours.encode(x)), sae.decode(acts))
        close(ours(x), sae(x))
    assert ours._is_dense == (kind in ("StandardSAE", "AutoEncoder"))


@torch.no_grad()
def test_the_room_of_a_code_grows_with_the_acts_and_loses_none(make, x):
    sae = make("JumpReLUSAE")
    ours = accelerate(sae)
    close(ours(x), sae(x))
    before = ours._room
    sae.threshold.fill_(1.8)
    most = int((sae.encode(x) != 0).sum(-1).max())
    assert before < most < M // 8
    close(ours.encode(x), sae.encode(x))
    assert ours._room >= most


def test_with_gradients_wanted_a_threshold_runs_the_librarys_own_code(make, x):
    sae = make("JumpReLUSAE")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    accelerate(sae)(ours).square().sum().backward()
    sae(theirs).square().sum().backward()
    close(ours.grad, theirs.grad)


@torch.no_grad()
def test_groups_of_a_matryoshka_are_switched_off(make, x):
    sae = make("MatryoshkaBatchTopKSAE")
    ours = accelerate(sae)
    ours(x)
    ours.active_groups = sae.active_groups = 1
    acts = ours.encode(x)
    close(acts, sae.encode(x))
    assert not acts[:, M // 4 :].any()
    assert acts.any()


@torch.no_grad()
def test_options_of_kinds_with_thresholds_are_the_librarys(make, x):
    for kind, options in (
        ("BatchTopKSAE", {"return_active": True}),
        ("BatchTopKSAE", {"use_threshold": False, "return_active": True}),
        ("JumpReluAutoEncoder", {"output_pre_jump": True}),
    ):
        sae = make(kind)
        for result, reference in zip(
            accelerate(sae).encode(x, **options), sae.encode(x, **options), strict=True
        ):
            close(result.float(), reference.float())


@torch.no_grad()
def test_a_change_through_data_is_seen(make, x):
    """The libraries fold norms and scales so."""
    for kind in ("sae_lens", "JumpReLUSAE", "BatchTopKSAE"):
        sae = make(kind)
        ours = accelerate(sae)
        ours(x)
        for parameter in sae.parameters():
            parameter.data *= 1.25
        close(ours(x), sae(x))


@pytest.mark.parametrize("kind", ["dictionary_learning", "BatchTopKSAE", "AutoEncoder"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.no_grad()
def test_hooks_and_adapters_of_its_linears_are_seen(make, x, kind, part):
    """A hook that changes the output, and a wrapper with the weight of the wrapped (as LoRA's)."""

    class Wrapped(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

        def forward(self, x):
            return self.linear(x) * 0.75

    for change in ("hook", "wrapper"):
        sae = make(kind)
        ours = accelerate(sae)
        if change == "hook":
            getattr(sae, part).register_forward_hook(lambda _module, _inputs, out: out * 0.75)
        else:
            setattr(sae, part, Wrapped(getattr(sae, part)))
            ours = accelerate(sae)
        close(ours.encode(x), sae.encode(x))
        close(ours.decode(ours.encode(x)), sae.decode(sae.encode(x)))
        close(ours(x), sae(x))


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_tensors_assigned_to_one_are_not_those_of_the_other(make, x, library):
    sae, other = make(library), make(library)
    for parameter in other.parameters():
        parameter *= 1.5
    ours, twin = accelerate(sae), accelerate(sae)
    expected = _flat(sae(x))[0]
    close(_flat(ours(x))[0], expected)
    ours.load_state_dict(other.state_dict(), assign=True)
    close(_flat(ours(x))[0], _flat(other(x))[0])
    for unchanged in (sae, twin):
        close(_flat(unchanged(x))[0], expected)


@torch.no_grad()
def test_a_ghost_mask_goes_to_the_library(make, x):
    sae = make("AutoEncoder")
    mask = torch.arange(M) % 2
    ours, theirs = accelerate(sae)(x, ghost_mask=mask), sae(x, ghost_mask=mask)
    for found, expected in zip(ours, theirs, strict=True):
        close(found, expected)


@pytest.mark.parametrize("kind", ["sparsify", "dictionary_learning", "BatchTopKSAE"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_activations_of_16_bit_go_into_an_autoencoder_of_32(make, x, kind, dtype):
    sae, x = make(kind), x.to(dtype)
    ours = accelerate(sae)
    close(dense_of(ours.encode(x)), dense_of(sae.encode(x)))
    close(_flat(ours(x))[0], _flat(sae(x))[0])


@pytest.mark.parametrize("kind", [*LIBRARIES, *THRESHOLDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_under_autocast_dtypes_and_values_are_those_of_the_library(make, x, kind, dtype):
    sae = make(kind)
    ours = accelerate(sae)
    for autocast in (True, False):  # the codes of one mode do not go into the other
        with torch.autocast("cpu", dtype, enabled=autocast):
            encoded, expected = ours.encode(x), sae.encode(x)
            pairs = [
                (decoded(ours, encoded), decoded(sae, expected)),
                (_flat(ours(x))[0], _flat(sae(x))[0]),
            ]
            if not hasattr(expected, "top_acts"):
                pairs.append((encoded, expected))
            elif autocast:
                pairs += zip(tuple(encoded), tuple(expected), strict=True)
        for found, reference in pairs:
            assert found.dtype == reference.dtype
            assert torch.equal(found, reference) if autocast else True
            close(found, reference)


@torch.no_grad()
def test_k_of_saelens_is_that_of_its_activation_function(make, x):
    """The configuration is read once, by the library."""
    sae = make("sae_lens")
    ours = accelerate(sae)
    for k in (K, 3):
        sae.activation_fn.k = k
        close(ours(x), sae(x))
    sae.activation_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="activation_fn is ReLU, expected TopK"):
        accelerate(sae)


@pytest.mark.parametrize("kind", ["sae_lens", "JumpReLUSAE", "dictionary_learning", "AutoEncoder"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch itself
@pytest.mark.filterwarnings("ignore:.*batching rule for aten..scatter_:UserWarning")
def test_transforms_of_torch_func_are_those_of_the_library(make, x, kind, frozen):
    sae = make(kind).requires_grad_(not frozen)
    ours = accelerate(sae)
    functions = (
        lambda sae: torch.func.jvp(sae, (x,), (x.flip(0),))[1],
        lambda sae: torch.no_grad()(torch.func.jvp)(sae.encode, (x,), (x.flip(0),))[1],
        lambda sae: torch.func.grad(lambda x: sae(x).square().sum())(x),
        lambda sae: torch.no_grad()(torch.func.vmap(sae))(x),
    )
    for function in functions:
        close(function(ours), function(sae))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.flip(0))
        tangents = (torch.autograd.forward_ad.unpack_dual(one(dual)).tangent for one in (ours, sae))
        close(*tangents)


@torch.no_grad()
def test_methods_of_the_libraries_that_scale_are_seen_without_a_sample(make, x, monkeypatch):
    """As on a GPU, where entries are not compared."""
    monkeypatch.setattr("resae_kernels.accelerated.sample", lambda _: torch.zeros(1).numpy())
    for kind, method, options in (
        ("JumpReLUSAE", "fold_W_dec_norm", ()),
        ("sae_lens", "fold_activation_norm_scaling_factor", (1.5,)),
        ("BatchTopKSAE", "scale_biases", (1.5,)),
    ):
        sae = make(kind)
        ours = accelerate(sae)
        ours(x)
        getattr(ours, method)(*options)
        close(ours(x), sae(x))


# -- refusals --------------------------------------------------------------------------------------


def test_unknown_classes_and_activations_are_refused(make):
    with pytest.raises(TypeError, match="got torch.nn.*Linear, expected one of: sae_lens TopKSAE"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="activation 'groupmax', expected 'topk'"):
        accelerate(make("sparsify", activation="groupmax"))
    with pytest.raises(ValueError, match="margin='no', expected"):
        accelerate(make("sparsify"), margin="no")


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@torch.no_grad()
def test_a_hooked_transformer_of_saelens_runs_with_it():
    """Spliced in, its activations in the cache, and taken out again."""
    lens = pytest.importorskip("sae_lens")
    transformer_lens = pytest.importorskip("transformer_lens")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=16, n_heads=4, d_vocab=50, act_fn="gelu", seed=0
    )
    model = lens.HookedSAETransformer(config)
    sae = library_sae("sae_lens")
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    for parameter in sae.parameters():
        parameter.copy_(torch.randn_like(parameter) / D**0.5)
    tokens = torch.arange(12).view(1, -1)
    plain = model(tokens)
    expected, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    found, same = model.run_with_cache_with_saes(tokens, saes=[accelerate(sae)])
    close(found, expected)
    assert list(same) == list(cache)
    for name in cache:
        close(same[name], cache[name])
    close(model.run_with_saes(tokens, saes=[accelerate(sae)], use_error_term=True), plain)
    assert torch.equal(model(tokens), plain)
