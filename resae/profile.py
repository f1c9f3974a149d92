"""Measure the ops against what else there is, and against what the machine could do at best.

    case | provider | ms p50 (p20–p80) | rounds | × product | × peer | GB/s | TFLOP/s | % of roof

A *case* is an op at one shape and dtype. Every provider gets the same inputs and must give the
reference's answer before it is timed. Providers are timed in turns, one call each per round, so
that a slow phase of the machine hits all of them; where an op scores every latent, the encode's
bare product takes its turn too ("× product": how many times its time; "× peer": how many times that
of the fastest peer). Roofs are measured in the same process: copy bandwidth and the rate of a large
matrix product; the roof of a case is the slower of moving the bytes that must move and computing
the product that must be computed. "Cold" empties the last-level cache before each call, "hot" makes
the same call for 10 ms before.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resae.choices import DTYPES, OPS, TRAINING
from resae.storage import write_atomically
from resae_kernels import (
    OnlineStep,
    ScreenedEncoder,
    StepWorkspace,
    TopK,
    affine_chain,
    online_step,
    reconstruction_error,
    reference,
    sparse_decode,
    topk_encode,
    transport,
)
from resae_kernels.step import FEW_TOKENS

COLD_BYTES = 256 << 20
"""Written before each cold call: more than any last-level cache in use."""
WARM_SECONDS = 0.01
"""For so long a hot call is made, once at least, before it is timed."""
PRODUCT = "bare product"
"""Provider of the encode's scores alone, `x @ weight.T + bias`: timed, but no answer to check."""
CASE_SECONDS, LEAST_ROUNDS = 30.0, 5
"""A case that has taken so long gets no more rounds than so many."""


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
        if self.op not in OPS:
            raise ValueError(f"profile: unknown op {self.op!r}; choose one of {', '.join(OPS)}")
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

    def work(self) -> tuple[float, float]:
        """`(bytes, FLOPs)` that any implementation must at least move and compute.

        encode: the weight once, x once, the code; the dense product 2·N·D·M, since every score is
        looked at. decode: N·k gathered rows and the output. forward: encode and decode, whose code
        need not leave. step: forward, and the prediction read. train: encode, decode and their
        gradients: the product, four gathers of N·k rows, two weight gradients written once; with
        Adam, parameters and both moments read and written, and the gradients read.
        chain: the gathers of L layers, and 2·N·D² per map.
        """
        N, D, M, k, L = self.N, self.D, self.M, self.k, self.L
        s = getattr(torch, self.dtype).itemsize
        code = N * k * (s + 8)
        gather = N * k * D * s
        if self.op == "encode":
            return (M * D + N * D) * s + code, 2.0 * N * D * M
        if self.op == "decode":
            return gather + code + N * D * s, 2.0 * N * k * D
        if self.op in ("forward", "step"):
            streams = 3 if self.op == "step" else 2
            return (M * D + streams * N * D) * s + gather, 2.0 * N * D * (M + k)
        if self.op in TRAINING:
            weights = 4 if self.op == "train" else 4 + 14
            return 4 * gather + (
                weights * M * D + 4 * N * D
            ) * s + code, 2.0 * N * D * M + 8.0 * N * k * D
        return (
            L * (gather + code + N * D * s) + (L - 1) * D * D * s,
            2.0 * L * N * k * D + 2.0 * (L - 1) * N * D * D,
        )


class Roofs(NamedTuple):
    """What the machine does at best, measured."""

    copy: float
    """Bytes per second, read and written."""
    product: float
    """FLOPs per second of a large matrix product in the case's dtype."""

    def seconds(self, case: Case) -> float:
        """Lower bound of the case's time."""
        moved, computed = case.work()
        return max(moved / self.copy, computed / self.product)


Inputs = dict[str, Any]
Provider = Callable[[], Sequence[Tensor]]
"""A call of the op; returns the tensors that are compared with the reference's."""
Peer = Callable[[Case, Inputs], Provider | None]
"""Makes a provider of a case, or None where it has none."""


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Gaussian activations and unit-norm dictionaries, the encoder tied to them."""
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def dictionary() -> Tensor:
        return F.normalize(normal(case.M, case.D), dim=1).to(dtype)

    def code() -> TopK:
        latents = torch.randint(case.M, (case.N, case.k), generator=generator, device=device)
        return TopK(normal(case.N, case.k).abs().to(dtype), latents)

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
    }
    if case.op == "step":
        inputs["base"] = (0.5 * normal(case.N, case.D)).to(dtype)
    if case.op == "chain":
        inputs["transported"] = transport(W_dec, inputs["A"], inputs["c"], b_dec=inputs["b_dec"])
    return inputs


# -- providers -------------------------------------------------------------------------------------


def _encode(case: Case, inputs: Inputs, function: Callable[..., TopK]) -> Sequence[Tensor]:
    return function(
        inputs["x"], inputs["weight"], inputs["bias"], case.k, pre_bias=inputs["b_dec"][0]
    )


def _dense_topk(x, weight, bias, k, *, pre_bias):
    """What a few lines of PyTorch do: the whole product, then `torch.topk`."""
    acts, indices = F.linear(x - pre_bias, weight, bias).relu().topk(k, dim=-1)
    return TopK(acts, indices)


def _decode(inputs: Inputs, function: Callable[..., Tensor]) -> Sequence[Tensor]:
    acts, indices = inputs["codes"][0]
    return [function(acts, indices, inputs["W_dec"][0], bias=inputs["b_dec"][0])]


def _dense_decode(acts, indices, W_dec, *, bias):
    """The code scattered into `[N, M]`, times the dictionary."""
    dense = acts.new_zeros(len(acts), len(W_dec)).scatter_add_(1, indices, acts)
    return dense @ W_dec + bias


def _forward(
    case: Case, inputs: Inputs, encode: Callable[..., TopK], decode: Callable[..., Tensor]
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
        base=inputs["base"],
    )
    return [code.acts, x_hat]


def _dense_step(x, weight, bias, k, W_dec, *, b_dec, base):
    code = _dense_topk(x - base, weight, bias, k, pre_bias=b_dec)
    return OnlineStep(_dense_decode(*code, W_dec, bias=b_dec) + base, code)


def train_step(
    inputs: Inputs, case: Case, encode: Callable, decode: Callable | None = None
) -> Sequence[Tensor]:
    """Forward and backward of one autoencoder's squared error; the gradients, no optimiser.

    Without a decode the error comes from `reconstruction_error`.
    """
    x = inputs["x"]
    leaves = [inputs["weight"], inputs["bias"], inputs["W_dec"][0], inputs["b_dec"][0]]
    weight, bias, W_dec, b_dec = (t.detach().requires_grad_() for t in leaves)
    code = encode(x, weight, bias, case.k, pre_bias=b_dec)
    if decode is None:
        squared = reconstruction_error(code[0], code[1], W_dec, x, bias=b_dec).squared
    else:
        squared = (decode(code[0], code[1], W_dec, bias=b_dec) - x).float().square()
    loss = squared.sum() / x.numel()
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


def _chain(inputs: Inputs, function: Callable, **options: Any) -> Sequence[Tensor]:
    return function(
        inputs["codes"],
        inputs["W_dec"],
        inputs["A"],
        inputs["c"],
        b_dec=inputs["b_dec"],
        **options,
    )


def _encoders(case: Case, inputs: Inputs) -> dict[str, Callable[..., TopK]]:
    """Our ways to encode, first that of `TopKSAE`: screened on a CPU, where that pays."""
    x, weight, bias = inputs["x"], inputs["weight"].detach(), inputs["bias"].detach()
    weight = weight.requires_grad_(case.op in TRAINING)
    found: dict[str, Callable[..., TopK]] = {}
    for name, margin in (("resae", "statistical"), ("resae certain", "certain")):
        held = ScreenedEncoder(weight, bias, margin=margin)
        if held.explain(x, case.k).rows_screened:
            found[name] = partial(_screened, held)
    return found | {"resae exact" if found else "resae": topk_encode}


def _screened(held: ScreenedEncoder, x, weight, bias, k, *, pre_bias) -> TopK:
    if weight.requires_grad:  # in training it is another one every time
        held = ScreenedEncoder(weight, bias, margin=held.margin)
    return held.encode(x, k, pre_bias=pre_bias)


def providers(case: Case, inputs: Inputs, peers: Mapping[str, Peer]) -> dict[str, Provider]:
    """Name → call, ours first; peers where they have something for the case. Without gradients but
    in training."""
    encodes = case.op in ("encode", "forward", *TRAINING)
    ours = _encoders(case, inputs) if encodes else {}
    if case.op == "encode":
        named: dict[str, Provider] = {
            **{name: partial(_encode, case, inputs, encode) for name, encode in ours.items()},
            "reference": partial(_encode, case, inputs, reference.topk_encode),
            "product + torch.topk": partial(_encode, case, inputs, _dense_topk),
        }
    elif case.op == "decode":
        named = {
            "resae": partial(_decode, inputs, sparse_decode),
            "reference": partial(_decode, inputs, reference.sparse_decode),
            "dense product": partial(_decode, inputs, _dense_decode),
        }
    elif case.op == "forward":
        plain = (reference.topk_encode, reference.sparse_decode)
        named = {
            **{
                name: partial(_forward, case, inputs, encode, sparse_decode)
                for name, encode in ours.items()
            },
            "reference": partial(_forward, case, inputs, *plain),
            "dense PyTorch": partial(_forward, case, inputs, _dense_topk, _dense_decode),
        }
    elif case.op == "step":
        x = inputs["x"]
        space = StepWorkspace.allocate(
            case.N, case.M, case.k, case.D, dtype=x.dtype, device=x.device
        )
        named = {
            "resae": partial(_step, case, inputs, partial(online_step, out=space)),
            "reference": partial(_step, case, inputs, reference.online_step),
            "dense PyTorch": partial(_step, case, inputs, _dense_step),
        }
    elif case.op in TRAINING:
        named = {
            **{name: partial(train_step, inputs, case, encode) for name, encode in ours.items()},
            "dense PyTorch": partial(train_step, inputs, case, _dense_topk, _dense_decode),
        }
    else:
        whole = inputs["transported"]
        named = {
            "resae sequential": partial(_chain, inputs, affine_chain),
            "resae transported": partial(_chain, inputs, affine_chain, transported=whole),
            "reference": partial(_chain, inputs, reference.affine_chain),
        }
    if case.op in ("encode", "forward", "step"):
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        scores = x.new_empty(case.N, case.M)
        named[PRODUCT] = lambda: [torch.addmm(bias, x, weight.T, out=scores)]
    for name, peer in peers.items():
        made = peer(case, inputs)
        if made is not None:
            named[name] = made
    if case.op == "train":
        return named
    if case.op == "train+adam":
        return {name: _with_adam(call) for name, call in named.items()}
    return {name: torch.no_grad()(call) for name, call in named.items()}


# -- correctness before speed ----------------------------------------------------------------------


def check(case: Case, inputs: Inputs, name: str, outputs: Sequence[Tensor]) -> None:
    """Raise ValueError unless `outputs` are the reference's up to rounding (float64 reference on a
    few tokens for forward ops, float32 dense gradients for training)."""
    rows = slice(0, min(case.N, 16))
    tolerance = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}[case.dtype]
    if case.op in TRAINING:
        wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        wide |= {key: [t.float() for t in inputs[key]] for key in ("W_dec", "b_dec")}
        expected = train_step(wide, case, _dense_topk, _dense_decode)
        # Near-ties at the threshold may be selected differently: compare as a whole, not by entry.
        pairs = list(zip(outputs, expected, strict=True))
        tolerance *= 10
    elif case.op in ("encode", "forward", "step"):
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        W_dec, b_dec = inputs["W_dec"][0].double(), inputs["b_dec"][0].double()
        base = inputs["base"][rows].double() if case.op == "step" else None
        exact = reference.online_step(x[rows], weight, bias, case.k, W_dec, b_dec=b_dec, base=base)
        pairs = []
        if case.op != "forward":
            # As a set: in any order, also as `[N, M]` with the other latents zero, also sparse.
            acts = outputs[0].to_dense()[rows].topk(case.k).values
            pairs.append((acts, exact.code.acts.sort(descending=True).values))
        if case.op != "encode":
            pairs.append((outputs[-1][rows], exact.x_hat))
            # Another latent of a near-tie moves the reconstruction more than the acts.
            tolerance *= 5
    else:
        codes = [TopK(a[rows].double(), i[rows]) for a, i in inputs["codes"]]
        exact = reference.affine_chain(
            codes,
            [W.double() for W in inputs["W_dec"]],
            [A.double() for A in inputs["A"]],
            [c.double() for c in inputs["c"]],
            b_dec=[b.double() for b in inputs["b_dec"]],
        )
        pairs = [(got[rows], want) for got, want in zip(outputs, exact, strict=True)]
    for got, want in pairs:
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
        if not float(error) < tolerance:
            raise ValueError(
                f"profile: {name} is wrong on {case.name}: relative error {float(error):.2e}, "
                f"expected below {tolerance:g}; it is not timed"
            )


# -- timing ----------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device: CUDA events, or on a CPU the wall clock, and with one thread its
    CPU time, which other load on the machine disturbs less."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = torch.empty(COLD_BYTES // 4, dtype=torch.float32, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], *, cold: bool) -> float:
        """Time of one call; on a CPU with a hot cache the mean of about a millisecond of calls."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        now = time.thread_time if alone else time.perf_counter
        warmed = 0
        if cold:
            self._flush.zero_()
        else:  # in the cache is then what the call leaves there itself, not what another one did
            began = now()
            while warmed == 0 or now() - began < WARM_SECONDS:
                call()
                self.synchronize()
                warmed += 1
        if self.device.type != "cuda":
            calls = max(1, warmed // 10)
            began = now()
            for _ in range(calls):
                call()
            return (now() - began) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Memory allocated beyond the inputs; None where the device does not count it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def measure_roofs(clock: Clock, dtype: str) -> Roofs:
    """Copy bandwidth and product rate: best of a few, as bounds should be."""
    source = torch.empty(COLD_BYTES // 4, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    size = 8192 if clock.device.type == "cuda" else 1024
    a, b = (
        torch.randn(size, size, device=clock.device).to(getattr(torch, dtype)) for _ in range(2)
    )
    out = torch.empty_like(a)
    for _ in range(2):
        target.copy_(source)
        torch.mm(a, b, out=out)
    copies = [clock.seconds(lambda: target.copy_(source), cold=False) for _ in range(10)]
    products = [clock.seconds(lambda: torch.mm(a, b, out=out), cold=False) for _ in range(10)]
    return Roofs(copy=2 * COLD_BYTES / min(copies), product=2 * size**3 / min(products))


def profile(
    case: Case,
    *,
    device: torch.device,
    roofs: Roofs,
    clock: Clock,
    rounds: int = 20,
    peers: Mapping[str, Peer] | None = None,
    only: Sequence[str] | None = None,
    hot_only: bool = False,
    inputs: Inputs | None = None,
) -> list[dict[str, Any]]:
    """Check and time every provider of a case; one flat row per provider and cache state.

    Args:
        rounds: calls per provider and cache state; fewer, but `LEAST_ROUNDS`, once the case has
            taken `CASE_SECONDS`.
        only: names of providers beside "resae"; None: all.
        hot_only: no calls with a cold cache.
        inputs: in place of those of `make_inputs`.

    Raises:
        ValueError: a provider's answer is wrong.
    """
    inputs = inputs or make_inputs(case, device)
    calls = providers(case, inputs, peers or {})
    if only is not None:
        calls = {name: call for name, call in calls.items() if name in ("resae", *only)}
    for name, call in calls.items():
        if name != PRODUCT:
            check(case, inputs, name, call())
    peaks = {name: clock.peak_bytes(call) for name, call in calls.items()}
    times: dict[tuple[str, bool], list[float]] = {
        (name, cold): [] for name in calls for cold in ((False,) if hot_only else (False, True))
    }
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > CASE_SECONDS:
            break
        for (name, cold), taken in times.items():
            taken.append(clock.seconds(calls[name], cold=cold))
    moved, computed = case.work()
    bound = roofs.seconds(case)
    rows = []
    for (name, cold), taken in times.items():
        p20, p50, p80 = _quantiles(taken)
        peak = peaks[name]
        product = times.get((PRODUCT, cold))
        rivals = [statistics.median(times[n, cold]) for n in peers or () if n in calls]
        rows.append(
            {
                **asdict(case),
                "provider": name,
                "cache": "cold" if cold else "hot",
                "ms_p50": p50 * 1e3,
                "ms_p20": p20 * 1e3,
                "ms_p80": p80 * 1e3,
                "rounds": len(taken),
                "x_product": p50 / statistics.median(product) if product else None,
                "x_peer": p50 / min(rivals) if rivals else None,
                "gb_per_s": moved / p50 / 1e9,
                "tflop_per_s": computed / p50 / 1e12,
                "percent_of_roof": 100 * bound / p50,
                "peak_mib": None if peak is None else peak / 2**20,
            }
        )
    return rows


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def trace(case: Case, *, device: torch.device, path: Path) -> list[dict[str, Any]]:
    """Run our provider under torch's profiler, write a Chrome trace, and list what ran.

    Returns:
        Per kernel (on a GPU: with registers per thread, shared bytes and estimated occupancy, as
        the driver reports them) or CPU op: name, calls and microseconds, slowest first.
    """
    call = next(iter(providers(case, make_inputs(case, device), {}).values()))
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    write_atomically(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))
    wanted = "kernel" if device.type == "cuda" else "cpu_op"
    ran: dict[str, dict[str, Any]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") != wanted:
            continue
        facts = event.get("args", {})
        row = ran.setdefault(
            event["name"],
            {
                "name": event["name"],
                "calls": 0,
                "us": 0.0,
                "registers": facts.get("registers per thread"),
                "shared_bytes": facts.get("shared memory"),
                "occupancy_percent": facts.get("est. achieved occupancy %"),
            },
        )
        row["calls"] += 1
        row["us"] += event.get("dur", 0.0)
    return sorted(ran.values(), key=lambda row: -row["us"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per row."""
    lines = [
        "| case | provider | cache | ms p50 (p20–p80) | rounds | × product | × peer | GB/s | "
        "TFLOP/s | % of roof | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = Case(**{name: row[name] for name in ("op", "N", "D", "M", "k", "dtype", "L")})
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        product, peer = (
            "–" if row[ratio] is None else f"{row[ratio]:.2f}" for ratio in ("x_product", "x_peer")
        )
        lines.append(
            f"| {case.name} | {row['provider']} | {row['cache']} | {row['ms_p50']:.3f} "
            f"({row['ms_p20']:.3f}–{row['ms_p80']:.3f}) | {row['rounds']} | {product} | {peer} | "
            f"{row['gb_per_s']:.1f} | {row['tflop_per_s']:.3f} | "
            f"{row['percent_of_roof']:.0f} | {peak} |"
        )
    return "\n".join(lines)
