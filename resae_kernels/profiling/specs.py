"""Ops as they are profiled: one `Spec` each, with its least work, inputs, providers and check."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels import (
    OnlineStep,
    ScreenedEncoder,
    SparseCode,
    StepWorkspace,
    ThresholdCode,
    affine_chain,
    autoencoder_error,
    online_step,
    reference,
    sparse_decode,
    threshold_encode,
    topk_encode,
    transport,
)
from resae_kernels.step import FEW_TOKENS
from resae_kernels.types import Margin

GEMM = "encoder GEMM"
"""Name of the provider of the scores alone, `x @ weight.T + bias`: timed, without an answer to
check."""
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
"""Largest relative error of a tensor of a forward op, in the norm, by dtype."""
MARGINS: dict[str, Margin] = {"resae": "statistical", "resae certain": "certain"}
"""Margins of the screened encode, by the name of their provider."""
NEAR_TIE = 1e-5
"""Relative difference of scores below which float32 may confuse them."""


@dataclass(frozen=True)
class Case:
    """An op at one shape: N tokens, D width, M latents, k active, L layers (of the chain)."""

    op: str
    N: int
    D: int
    M: int
    k: int
    dtype: str = "float32"
    L: int = 1

    def __post_init__(self) -> None:
        if self.op not in SPECS:
            raise ValueError(f"profile: unknown op {self.op!r}; choose one of {', '.join(SPECS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"profile: unknown dtype {self.dtype!r}; choose {', '.join(DTYPES)}")
        for name in ("N", "D", "M", "k", "L"):
            if getattr(self, name) < 1:
                raise ValueError(f"profile: {name}={getattr(self, name)}, expected at least 1")
        if self.k > self.M:
            raise ValueError(f"profile: k={self.k} exceeds M={self.M}; lower k")
        if self.op == "step" and self.N > FEW_TOKENS:
            raise ValueError(f"profile: step takes at most {FEW_TOKENS} tokens, got N={self.N}")

    @property
    def name(self) -> str:
        layers = f" L={self.L}" if self.op == "chain" else ""
        return f"{self.op} N={self.N} D={self.D} M={self.M} k={self.k}{layers} {self.dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return getattr(torch, self.dtype).itemsize

    def work(self) -> tuple[float, float]:
        """`(bytes, FLOPs)` that any implementation must at least move and compute."""
        return SPECS[self.op].work(self)


Inputs = dict[str, Any]
Provider = Callable[[], Sequence[Tensor]]
"""A call of the op; returns the tensors that are compared with the reference's."""
Peer = Callable[[Case, Inputs], Provider | None]
"""Makes a provider of a case, or None where it has none."""
Pair = tuple[Tensor, Tensor]
"""An output and its true value."""


class Spec(NamedTuple):
    """One op as it is profiled."""

    work: Callable[[Case], tuple[float, float]]
    """`(bytes, FLOPs)`, the least."""
    providers: Callable[[Case, Inputs], dict[str, Provider]]
    """Name → call, ours first."""
    check: Callable[[Case, Inputs, str, Sequence[Tensor]], None]
    """Raises ValueError if a provider's outputs are wrong."""
    more_inputs: Callable[[Case, Inputs], Inputs] = lambda _case, _inputs: {}
    """Inputs of this op alone, made from the common ones."""
    scores: bool = False
    """True: the op computes every score, so the encoder GEMM alone is timed too."""
    gradients: bool = False
    """True: providers are called with gradients enabled."""


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Gaussian activations and unit-norm dictionaries, the encoder tied to them."""
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def dictionary() -> Tensor:
        return F.normalize(normal(case.M, case.D), dim=1).to(dtype)

    def code() -> SparseCode:
        latents = torch.randint(case.M, (case.N, case.k), generator=generator, device=device)
        return SparseCode(normal(case.N, case.k).abs().to(dtype), latents)

    W_dec = [dictionary() for _ in range(case.L)]
    inputs: Inputs = {
        "x": normal(case.N, case.D).to(dtype),
        "weight": W_dec[0].clone(),
        "bias": (0.1 * normal(case.M)).to(dtype),
        "b_dec": [(0.1 * normal(case.D)).to(dtype) for _ in range(case.L)],
        "W_dec": W_dec,
        "codes": [code() for _ in range(case.L)],
        "A": [(normal(case.D, case.D) / case.D**0.5).to(dtype) for _ in range(case.L - 1)],
        "c": [normal(case.D).to(dtype) for _ in range(case.L - 1)],
        "prediction": (0.5 * normal(case.N, case.D)).to(dtype),
    }
    return inputs | SPECS[case.op].more_inputs(case, inputs)


def providers(case: Case, inputs: Inputs, peers: Mapping[str, Peer]) -> dict[str, Provider]:
    """Name → call, ours first; peers where they have something for the case."""
    spec = SPECS[case.op]
    named = spec.providers(case, inputs)
    if spec.scores:
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        scores = x.new_empty(case.N, case.M)
        named[GEMM] = lambda: [torch.addmm(bias, x, weight.T, out=scores)]
    for name, peer in peers.items():
        made = peer(case, inputs)
        if made is not None:
            named[name] = made
    if case.op == "train+adam":
        named = {name: _with_adam(call) for name, call in named.items()}
    if spec.gradients:
        return named
    return {name: torch.no_grad()(call) for name, call in named.items()}


def check(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """Raise ValueError unless a provider's outputs are those of the float64 reference up to
    rounding (forward ops: of the first 16 tokens)."""
    SPECS[case.op].check(case, inputs, name, outputs)


def _require_close(case: Case, name: str, pairs: Sequence[Pair], tolerance: float) -> None:
    for got, want in pairs:
        error = relative_error(got, want)
        if not error < tolerance:
            raise ValueError(
                f"profile: {name} is wrong on {case.name}: relative error {error:.2e}, expected "
                f"below {tolerance:g}; it is not timed"
            )


def relative_error(got: Tensor, want: Tensor) -> float:
    """`‖got − want‖ / ‖want‖` over the whole tensor, in float64."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def _first_tokens(case: Case) -> slice:
    """Tokens that are compared with the float64 reference."""
    return slice(0, min(case.N, 16))


# -- encode, forward, step -------------------------------------------------------------------------


def _encode_work(case: Case) -> tuple[float, float]:
    """The weight and x read once, the code written; every score computed."""
    N, D, M, s = case.N, case.D, case.M, case.itemsize
    return (M * D + N * D) * s + _code_bytes(case), 2.0 * N * D * M


def _forward_work(case: Case) -> tuple[float, float]:
    """Encode and decode; the code need not be written. A step also reads the prediction."""
    N, D, M, s = case.N, case.D, case.M, case.itemsize
    streams = 3 if case.op == "step" else 2
    return (M * D + streams * N * D) * s + _gather_bytes(case), 2.0 * N * D * (M + case.k)


def _code_bytes(case: Case) -> int:
    return case.N * case.k * (case.itemsize + 8)


def _gather_bytes(case: Case) -> int:
    """The rows of W_dec that the codes can name, each once: a cache may hold them meanwhile."""
    return min(case.N * case.k, case.M) * case.D * case.itemsize


def _encode(case: Case, inputs: Inputs, function: Callable[..., SparseCode]) -> Sequence[Tensor]:
    return function(
        inputs["x"], inputs["weight"], inputs["bias"], case.k, pre_bias=inputs["b_dec"][0]
    )


def _dense_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, pre_bias: Tensor) -> SparseCode:
    """Encode in plain PyTorch: the whole GEMM, then `torch.topk`."""
    acts, indices = F.linear(x - pre_bias, weight, bias).relu().topk(k, dim=-1)
    return SparseCode(acts, indices)


def _forward(
    case: Case, inputs: Inputs, encode: Callable[..., SparseCode], decode: Callable[..., Tensor]
) -> Sequence[Tensor]:
    acts, indices = _encode(case, inputs, encode)
    return [decode(acts, indices, inputs["W_dec"][0], bias=inputs["b_dec"][0])]


def _step(case: Case, inputs: Inputs, function: Callable[..., OnlineStep]) -> Sequence[Tensor]:
    x_hat, code = function(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        case.k,
        inputs["W_dec"][0],
        b_dec=inputs["b_dec"][0],
        prediction=inputs["prediction"],
    )
    return [code.acts, x_hat]


def _dense_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    W_dec: Tensor,
    *,
    b_dec: Tensor,
    prediction: Tensor,
) -> OnlineStep:
    code = _dense_topk(x - prediction, weight, bias, k, pre_bias=b_dec)
    return OnlineStep(_dense_decode(*code, W_dec, bias=b_dec) + prediction, code)


def _margins(case: Case, inputs: Inputs) -> dict[str, Margin | None]:
    """Our ways to encode by name, first that of `TopKSAE`: screened with a margin, on a CPU where
    that pays, or (None) exact."""
    weight, bias = inputs["weight"].detach(), inputs["bias"].detach()
    weight = weight.requires_grad_(SPECS[case.op].gradients)
    found: dict[str, Margin | None] = {}
    for name, margin in MARGINS.items():
        held = ScreenedEncoder(weight, bias, margin=margin)
        if held.encode_with_info(inputs["x"], case.k).rows_screened:
            found[name] = margin
    return found | {"resae exact" if found else "resae": None}


def _encoders(case: Case, inputs: Inputs) -> dict[str, Callable[..., SparseCode]]:
    weight, bias = inputs["weight"], inputs["bias"]
    return {
        name: topk_encode
        if margin is None
        else partial(_screened, ScreenedEncoder(weight, bias, margin=margin))
        for name, margin in _margins(case, inputs).items()
    }


def _screened(
    held: ScreenedEncoder, x: Tensor, _weight: object, _bias: object, k: int, *, pre_bias: Tensor
) -> SparseCode:
    return held.encode(x, k, pre_bias=pre_bias)


def _encode_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:
    return {
        **{n: partial(_encode, case, inputs, e) for n, e in _encoders(case, inputs).items()},
        "reference": partial(_encode, case, inputs, reference.topk_encode),
        "GEMM + torch.topk": partial(_encode, case, inputs, _dense_topk),
    }


def _forward_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:
    plain = (reference.topk_encode, reference.sparse_decode)
    return {
        **{
            name: partial(_forward, case, inputs, encode, sparse_decode)
            for name, encode in _encoders(case, inputs).items()
        },
        "reference": partial(_forward, case, inputs, *plain),
        "dense PyTorch": partial(_forward, case, inputs, _dense_topk, _dense_decode),
    }


def _step_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:
    x = inputs["x"]
    space = StepWorkspace.allocate(case.N, case.M, case.k, case.D, dtype=x.dtype, device=x.device)
    return {
        "resae": partial(_step, case, inputs, partial(online_step, out=space)),
        "reference": partial(_step, case, inputs, reference.online_step),
        "dense PyTorch": partial(_step, case, inputs, _dense_step),
    }


def _check_code(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """Acts as a set (in any order, also as `[N, M]` with the other latents zero, also sparse), and
    the reconstruction."""
    rows = _first_tokens(case)
    x, weight, bias = (inputs[key].double() for key in ("x", "weight", "bias"))
    W_dec, b_dec = inputs["W_dec"][0].double(), inputs["b_dec"][0].double()
    prediction = inputs["prediction"][rows].double() if case.op == "step" else None
    exact = reference.online_step(
        x[rows], weight, bias, case.k, W_dec, b_dec=b_dec, prediction=prediction
    )
    pairs, tolerance = [], TOLERANCE[case.dtype]
    if case.op != "forward":
        acts = outputs[0].to_dense()[rows].topk(case.k).values
        pairs.append((acts, exact.code.acts.sort(descending=True).values))
    if case.op != "encode":
        pairs.append((outputs[-1][rows], exact.x_hat))
        tolerance *= 5  # another latent of a near-tie moves x̂ more than the acts
    _require_close(case, name, pairs, tolerance)


# -- decode, chain ---------------------------------------------------------------------------------


def _decode_work(case: Case) -> tuple[float, float]:
    """The rows of the code's latents and the code read, the output written."""
    written = case.N * case.D * case.itemsize
    return _gather_bytes(case) + _code_bytes(case) + written, 2.0 * case.N * case.k * case.D


def _chain_work(case: Case) -> tuple[float, float]:
    """The decodes of L layers, and L − 1 maps of 2·N·D² FLOPs."""
    moved, computed = _decode_work(case)
    maps = case.L - 1
    return (
        case.L * moved + maps * case.D**2 * case.itemsize,
        case.L * computed + 2.0 * maps * case.N * case.D**2,
    )


def _decode(inputs: Inputs, function: Callable[..., Tensor]) -> Sequence[Tensor]:
    acts, indices = inputs["codes"][0]
    return [function(acts, indices, inputs["W_dec"][0], bias=inputs["b_dec"][0])]


def _dense_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, *, bias: Tensor) -> Tensor:
    """The code scattered into `[N, M]`, times the dictionary."""
    dense = acts.new_zeros(len(acts), len(W_dec)).scatter_add_(1, indices, acts)
    return dense @ W_dec + bias


def _chain(inputs: Inputs, function: Callable[..., Any], **options: Any) -> Sequence[Tensor]:
    return function(
        inputs["codes"],
        inputs["W_dec"],
        inputs["A"],
        inputs["c"],
        b_dec=inputs["b_dec"],
        **options,
    )


def _decode_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:  # noqa: ARG001
    return {
        "resae": partial(_decode, inputs, sparse_decode),
        "reference": partial(_decode, inputs, reference.sparse_decode),
        "dense GEMM": partial(_decode, inputs, _dense_decode),
    }


def _chain_inputs(case: Case, inputs: Inputs) -> Inputs:  # noqa: ARG001
    maps = inputs["A"], inputs["c"]
    return {"transported": transport(inputs["W_dec"], *maps, b_dec=inputs["b_dec"])}


def _chain_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:  # noqa: ARG001
    whole = inputs["transported"]
    return {
        "resae sequential": partial(_chain, inputs, affine_chain),
        "resae transported": partial(_chain, inputs, affine_chain, transported=whole),
        "reference": partial(_chain, inputs, reference.affine_chain),
    }


def _check_decode(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """A decode is a chain of one layer."""
    rows = _first_tokens(case)
    exact = reference.affine_chain(
        [SparseCode(a[rows].double(), i[rows]) for a, i in inputs["codes"]],
        *([t.double() for t in inputs[key]] for key in ("W_dec", "A", "c")),
        b_dec=[b.double() for b in inputs["b_dec"]],
    )
    pairs = [(got[rows], want) for got, want in zip(outputs, exact, strict=True)]
    _require_close(case, name, pairs, TOLERANCE[case.dtype])


# -- threshold -------------------------------------------------------------------------------------

ROOM = 4
"""Room for active latents, in multiples of their mean."""


def _threshold_inputs(case: Case, inputs: Inputs) -> Inputs:
    """Thresholds above which k latents per token are on average, from the scores of a few tokens;
    around one value, as those of a trained JumpReLU."""
    x, weight = inputs["x"][:64], inputs["weight"]
    scores = F.linear(x - inputs["b_dec"][0], weight, inputs["bias"]).float()
    level = scores.flatten().topk(len(x) * case.k).values[-1]
    generator = torch.Generator(x.device).manual_seed(1)
    spread = torch.rand(case.M, generator=generator, device=x.device)
    threshold = level * (0.98 + 0.04 * spread)
    return {"threshold": threshold.to(x.dtype), "max_active": min(case.M, ROOM * case.k)}


def _threshold(inputs: Inputs, function: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
    names = ("x", "weight", "bias", "threshold", "max_active")
    return function(*(inputs[name] for name in names), pre_bias=inputs["b_dec"][0])


def _dense_jumprelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: Tensor,
    _max_active: int,
    *,
    pre_bias: Tensor,
) -> Sequence[Tensor]:
    """JumpReLU in plain PyTorch, `[N, M]`."""
    scores = F.linear(x - pre_bias, weight, bias)
    return [scores.relu() * (scores > threshold)]


def _screened_threshold(
    held: ScreenedEncoder,
    x: Tensor,
    _weight: object,
    _bias: object,
    threshold: Tensor,
    max_active: int,
    *,
    pre_bias: Tensor,
) -> ThresholdCode:
    return held.threshold_encode(x, threshold, max_active, pre_bias=pre_bias)


def _threshold_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:  # noqa: ARG001
    x, weight, bias = inputs["x"], inputs["weight"].detach(), inputs["bias"].detach()
    found: dict[str, Callable[..., Sequence[Tensor]]] = {}
    for name, margin in MARGINS.items():
        held = ScreenedEncoder(weight, bias, margin=margin)
        limits = inputs["threshold"], inputs["max_active"]
        if held.threshold_encode_with_info(x, *limits).rows_screened:
            found[name] = partial(_screened_threshold, held)
    found |= {"resae exact" if found else "resae": threshold_encode}
    found |= {"reference": reference.threshold_encode, "dense PyTorch": _dense_jumprelu}
    return {name: partial(_threshold, inputs, encode) for name, encode in found.items()}


def _check_threshold(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """A code (acts, indices, count), or `[N, M]`: as float64 has it, but for scores within rounding
    of their threshold."""
    rows = _first_tokens(case)
    names = ("x", "weight", "bias", "threshold")
    x, weight, bias, threshold = (inputs[key].double() for key in names)
    scores = F.linear(x[rows] - inputs["b_dec"][0].double(), weight, bias)
    acts = outputs[0][rows].double()
    if len(outputs) > 1:
        acts = torch.zeros_like(scores).scatter_add_(1, outputs[1][rows], acts)
    rounding = TOLERANCE[case.dtype] / 2 * threshold.abs()
    clear = (scores - threshold).abs() > rounding
    truth = scores.relu() * (scores > threshold)
    _require_close(case, name, [(acts * clear, truth * clear)], TOLERANCE[case.dtype])
    if len(outputs) > 1 and not torch.equal(outputs[2][rows], (acts > 0).sum(1).int()):
        raise ValueError(f"profile: {name} is wrong on {case.name}: the number of active latents")


# -- training --------------------------------------------------------------------------------------


def _train_work(case: Case, per_weight: int = 4) -> tuple[float, float]:
    """Encode, decode and their gradients: the GEMM, W_dec gathered twice, x and the gradient of x̂
    twice, both weights read and two weight gradients written once.

    Args:
        case: the shape.
        per_weight: reads and writes of `[M, D]`. Adam reads and writes parameters and both moments,
            and reads the gradients: 14 more.
    """
    N, D, M, k, s = case.N, case.D, case.M, case.k, case.itemsize
    moved = 2 * _gather_bytes(case) + (per_weight * M * D + 4 * N * D) * s + _code_bytes(case)
    return moved, 2.0 * N * D * M + 8.0 * N * k * D


def squared_error(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    margin: Margin | None = None,
) -> Tensor:
    """Squares of an autoencoder's error; with a margin its encode is screened, by an encoder that
    serves one call, as in training."""
    encoder = None if margin is None else ScreenedEncoder(weight, bias, margin=margin)
    error, _ = autoencoder_error(x, weight, bias, k, W_dec, b_dec=b_dec, encoder=encoder)
    return error.squared


def _dense_squared_error(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    """The same in plain PyTorch."""
    code = _dense_topk(x, weight, bias, k, pre_bias=b_dec)
    return (_dense_decode(*code, W_dec, bias=b_dec) - x).float().square()


def train_step(
    inputs: Inputs, case: Case, squares: Callable[..., Tensor] = squared_error
) -> Sequence[Tensor]:
    """Forward and backward of one autoencoder's squared error; the gradients, no optimiser."""
    x = inputs["x"]
    leaves = [inputs["weight"], inputs["bias"], inputs["W_dec"][0], inputs["b_dec"][0]]
    weight, bias, W_dec, b_dec = (t.detach().requires_grad_() for t in leaves)
    loss = squares(x, weight, bias, case.k, W_dec, b_dec).sum() / x.numel()
    return torch.autograd.grad(loss, (weight, bias, W_dec, b_dec))


def _with_adam(gradients: Provider) -> Provider:
    """The gradients, and a step of Adam with them; on other tensors than the parameters, so that
    every call computes the same."""
    parameters = [gradient.clone() for gradient in gradients()]  # laid out as theirs are
    optimizer = torch.optim.Adam(parameters, fused=True)

    def step() -> Sequence[Tensor]:
        optimizer.zero_grad()
        found = gradients()
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return found

    return step


def _train_providers(case: Case, inputs: Inputs) -> dict[str, Provider]:
    steps: dict[str, Callable[..., Tensor]] = {
        name: partial(squared_error, margin=margin)
        for name, margin in _margins(case, inputs).items()
    }
    steps["dense PyTorch"] = _dense_squared_error
    return {name: partial(train_step, inputs, case, squares) for name, squares in steps.items()}


def _train_inputs(case: Case, inputs: Inputs) -> Inputs:
    """Tokens whose k-th and next score are so close that float32 may take either are replaced by
    others: one such token would move a gradient by more than all rounding."""
    if case.k == case.M:
        return {}
    weight, bias, b_dec = (
        t.double() for t in (inputs["weight"], inputs["bias"], inputs["b_dec"][0])
    )
    x = inputs["x"].clone()
    chunks = x.split(1024)
    top = [((c.double() - b_dec) @ weight.T + bias).topk(case.k + 1).values for c in chunks]
    kth, following = torch.cat(top)[:, -2:].unbind(1)
    clear = kth - following > NEAR_TIE * kth.abs()
    if clear.any():
        x[~clear] = x[clear][0]
    return {"x": x}


def _check_gradients(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """Require gradients at most twice as far from the float64 ones as those of plain PyTorch in the
    same dtype, in the norm; half a unit in the last place is always allowed."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    wide |= {key: [t.double() for t in inputs[key]] for key in ("W_dec", "b_dec")}
    exact = train_step(wide, case, _dense_squared_error)
    plain = train_step(inputs, case, _dense_squared_error)
    rounding = torch.finfo(getattr(torch, case.dtype)).eps / 2
    for got, rival, want in zip(outputs, plain, exact, strict=True):
        allowed = 2 * relative_error(rival, want) + rounding
        _require_close(case, name, [(got, want)], allowed)


SPECS: Mapping[str, Spec] = {
    "encode": Spec(_encode_work, _encode_providers, _check_code, scores=True),
    "decode": Spec(_decode_work, _decode_providers, _check_decode),
    "forward": Spec(_forward_work, _forward_providers, _check_code, scores=True),
    "train": Spec(_train_work, _train_providers, _check_gradients, _train_inputs, gradients=True),
    "train+adam": Spec(
        partial(_train_work, per_weight=4 + 14),
        _train_providers,
        _check_gradients,
        _train_inputs,
        gradients=True,
    ),
    "step": Spec(_forward_work, _step_providers, _check_code, scores=True),
    "chain": Spec(_chain_work, _chain_providers, _check_decode, _chain_inputs),
    "threshold": Spec(
        _encode_work, _threshold_providers, _check_threshold, _threshold_inputs, scores=True
    ),
}
OPS = tuple(SPECS)
