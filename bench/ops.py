"""Every op at the shapes that matter, against alternatives and peers.

    python bench/ops.py --out DIR                      (--only "encode N=1 ": some of the cases)
    python bench/ops.py --out DIR --data embedded      (a real model's activations)
    python bench/ops.py --out DIR --data FOLDER        (autoencoders that bench/real.py has trained)

Writes `ops.csv`, `ops.md` and `ops.svg` (time as a multiple of ours, per case) with versions and
hardware. `resae_kernels.profiling` measures; this file holds the shapes and the peers, each taken
if it is installed (`pip install "resae[peers]"`): eai-sparsify, sae-lens, dictionary-learning. On a
CPU "oneDNN" is the fastest plain PyTorch: oneDNN's GEMM, `torch.topk` (thresholds: JumpReLU in
place), `embedding_bag`.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resae.data.activations import capture_tokens
from resae.data.batches import ActivationBatches, Position
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.models.hooked import EMBEDDED, HookedLM
from resae.sae.topk import TopKSAE
from resae.stack.affine import AffinePredictor
from resae.storage import load_tensors, save_json, write_atomically
from resae.training.calibration import Calibration, sum_moments
from resae.training.config import TrainConfig
from resae.training.loop import train
from resae_kernels.profiling import (
    Case,
    Clock,
    Inputs,
    Peer,
    Provider,
    make_inputs,
    measure_roofs,
    profile,
    table,
)
from resae_kernels.profiling.measuring import CASE_SECONDS, LEAST_ROUNDS, device_ms
from resae_kernels.profiling.specs import DTYPES, GEMM, OPS

GPU_CASES = [
    # Pythia-1.4B (D = 2048) and Gemma-2-9B (D = 3584); training or prefill, then generation.
    Case("encode", 8192, 2048, 65536, 64, "bfloat16"),
    Case("encode", 8192, 2048, 16384, 64, "bfloat16"),
    Case("encode", 8192, 3584, 131072, 64, "bfloat16"),
    Case("encode", 1, 2048, 65536, 64, "bfloat16"),
    Case("encode", 16, 2048, 65536, 64, "bfloat16"),
    Case("encode", 1, 2048, 16384, 64, "bfloat16"),
    Case("decode", 8192, 2048, 65536, 64, "bfloat16"),
    Case("decode", 8192, 2048, 16384, 128, "bfloat16"),
    Case("decode", 1, 2048, 65536, 64, "bfloat16"),
    Case("forward", 8192, 2048, 65536, 64, "bfloat16"),
    Case("forward", 16, 2048, 65536, 64, "bfloat16"),
    Case("forward", 1, 2048, 65536, 64, "bfloat16"),
    Case("train", 8192, 2048, 65536, 64, "bfloat16"),
    Case("train+adam", 8192, 2048, 65536, 64, "bfloat16"),
    Case("step", 1, 2048, 65536, 64, "bfloat16"),
    Case("step", 16, 2048, 65536, 64, "bfloat16"),
    Case("chain", 1, 2048, 65536, 64, "bfloat16", 4),
    Case("chain", 8192, 2048, 16384, 64, "bfloat16", 4),
    *(Case("threshold", N, 2304, M, 70, "bfloat16") for M in (16384, 65536) for N in (1, 16, 8192)),
]
CPU_CASES = [
    *(
        Case(op, N, D, M, 32)
        for op in ("encode", "forward")
        for D, M in ((768, 24576), (2048, 16384))
        for N in (1, 16, 256, 2048)
    ),
    Case("decode", 1, 768, 24576, 32),
    Case("decode", 256, 768, 24576, 32),
    Case("train", 2048, 512, 8192, 32),
    Case("train+adam", 2048, 512, 8192, 32),
    Case("step", 1, 768, 24576, 32),
    Case("chain", 1, 768, 8192, 32, L=3),
    Case("chain", 256, 768, 8192, 32, L=3),
    # Gemma Scope: autoencoders of Gemma-2-2B with some 70 active latents.
    *(
        Case("threshold", N, 2304, M, 70, dtype)
        for M in (16384, 65536)
        for dtype in ("float32", "bfloat16")
        for N in (1, 16, 256, 2048)
    ),
    *(Case("threshold", N, D, 16384, 70) for D in (576, 640) for N in (1, 16, 256, 2048)),
]
DRY_CASES = [Case(op, 4, 64, 256, 8, L=2 if op == "chain" else 1) for op in OPS]

EMBEDDED_CASES = [
    Case(op, N, D, M, 32)
    for op in ("encode", "forward")
    for D, M in ((128, 4096), (1024, 8192))
    for N in (1, 16, 256, 2048)
]

REAL_TOKENS = (1, 16, 256, 2048)


class SideBySide:
    """The streams of several layers as one wide activation, each divided by its RMS."""

    def __init__(self, source: ActivationBatches, scale: Sequence[float]):
        self.source, self.scale = source, scale

    def batches(self, start: Position) -> Iterator[tuple[list[Tensor], Position]]:
        for xs, position in self.source.batches(start):
            yield [self.join(xs)], position

    def join(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat([x / s for x, s in zip(xs, self.scale, strict=True)], dim=1)


def trained_on_embedded(
    D: int, M: int, k: int, *, train_tokens: int, held_out_rows: int
) -> tuple[TopKSAE, Tensor]:
    """A TopK autoencoder of the embedded model, and activations `[N, D]` of text it has not seen.

    D = 128 is the stream after block 4; D = 128·n those after the first n blocks, side by side.
    """
    lm = HookedLM.from_pretrained(EMBEDDED)
    points = lm.hook_points([4] if lm.d_model == D else range(D // lm.d_model))
    rows, held_out = train_and_held_out(
        EMBEDDED, lm, context_tokens=128, held_out_rows=held_out_rows
    )
    captured = (capture_tokens(lm, ids, points) for ids in rows.batches(16))
    tokens = min(20_000, train_tokens)
    moments = sum_moments("none", captured, tokens=tokens, d_in=lm.d_model, n_layers=len(points))
    config = TrainConfig(
        layers=(points[-1].name,),
        k=(k,),
        d_sae=M,
        predictor="none",
        train_tokens=train_tokens,
        buffer_tokens=min(32_768, train_tokens),
    )
    source = SideBySide(
        ActivationBatches(
            lm, rows, points, batch_tokens=config.batch_tokens, buffer_tokens=config.buffer_tokens
        ),
        moments.scale(),
    )
    mean = source.join([moments.mean(i).float().unsqueeze(0) for i in range(len(points))])
    calibration = Calibration(AffinePredictor("none"), [1.0], [mean.squeeze(0)])
    with tempfile.TemporaryDirectory() as folder:
        stack = train(config, source, calibration, Path(folder))
    assert stack is not None  # nothing asks it to stop
    unseen = [source.join(capture_tokens(lm, ids, points)) for ids in held_out.batches(16)]
    sae = stack.sae(0).requires_grad_(False)
    assert isinstance(sae, TopKSAE)
    return sae, torch.cat(unseen)


def embedded(train_tokens: int) -> Callable[[Case, torch.device], Inputs]:
    """Replacement of `make_inputs`: activations of the embedded model, and an autoencoder trained
    on `train_tokens` other tokens."""

    @cache
    def trained(D: int, M: int, k: int) -> tuple[TopKSAE, Tensor]:
        return trained_on_embedded(D, M, k, train_tokens=train_tokens, held_out_rows=32)

    def inputs(case: Case, device: torch.device) -> Inputs:
        sae, unseen = trained(case.D, case.M, case.k)
        x = unseen[: case.N].to(device)
        sae.to(device)
        return {
            "x": x,
            "weight": sae.encoder.weight,
            "bias": sae.encoder.bias,
            "W_dec": [sae.W_dec],
            "b_dec": [sae.b_dec],
            "codes": [sae.encode(x)],
        }

    return inputs


def real(folder: Path) -> tuple[list[Case], Callable[[Case, torch.device], Inputs]]:
    """Cases of the autoencoders in a folder that `bench/real.py` has written, in float32, and their
    inputs in place of `make_inputs`."""
    sizes: dict[tuple[int, int, int], Path] = {}
    for cfg in sorted(folder.glob("*/cfg.json")):
        config = TopKSAE.load(cfg.parent).config
        sizes[config.d_in, config.d_sae, config.k] = cfg.parent
    cases = [
        Case(op, N, *size)
        for size in sizes
        for op in ("encode", "decode", "forward")
        for N in REAL_TOKENS
    ]

    def inputs(case: Case, device: torch.device) -> Inputs:
        one = sizes[case.D, case.M, case.k]
        dtype: torch.dtype = getattr(torch, case.dtype)
        sae = TopKSAE.load(one).requires_grad_(False).to(device, dtype)
        unseen = load_tensors(one / "activations.safetensors", "activations")["x"]
        x = unseen[: case.N].to(device, dtype)
        return {
            "x": x,
            "weight": sae.encoder.weight,
            "bias": sae.encoder.bias,
            "W_dec": [sae.W_dec],
            "b_dec": [sae.b_dec],
            "codes": [sae.encode(x)],
            "A": [],
            "c": [],
        }

    return cases, inputs


def compiled_reference(case: Case, inputs: Inputs) -> Provider | None:
    """The reference through torch.compile, for the two ops people would compile."""
    from resae_kernels import reference

    if case.op == "encode":
        function = torch.compile(reference.topk_encode)
        return lambda: function(
            inputs["x"], inputs["weight"], inputs["bias"], case.k, pre_bias=inputs["b_dec"][0]
        )
    if case.op == "decode":
        function = torch.compile(reference.sparse_decode)
        acts, indices = inputs["codes"][0]
        return lambda: [function(acts, indices, inputs["W_dec"][0], bias=inputs["b_dec"][0])]
    return None


# -- peers: their autoencoders as their users call them, with our weights --------------------------


def usable(package: str, case: Case) -> bool:
    """True if a peer is installed and has the case's op."""
    return case.op not in ("step", "chain", "threshold") and bool(find_spec(package))


def as_provider(
    case: Case,
    inputs: Inputs,
    *,
    encode: Callable[[Tensor], Sequence[Tensor]],
    decode: Callable[..., Tensor],
    code: Sequence[Tensor],
    loss: Callable[[], Tensor] | None = None,
    parameters: Sequence[Tensor] = (),
    transposed: Sequence[int] = (),
) -> Provider:
    """A peer's call for the case.

    Args:
        encode, decode: x `[N, D]` to a code in the peer's form, and that code to `[N, D]`.
        code: in that form, what the case decodes.
        loss: of a training step, on the scale of ours (mean squared error); None: not trained.
        parameters: encoder's weight and bias, W_dec, b_dec.
        transposed: which of them the peer stores the other way round.
    """
    x = inputs["x"]
    inference: dict[str, Provider] = {
        "encode": lambda: encode(x),
        "decode": lambda: [decode(*code)],
        "forward": lambda: [decode(*encode(x))],
    }
    if case.op in inference:
        return inference[case.op]

    assert loss is not None

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(loss(), parameters)
        return [g.mT if i in transposed else g for i, g in enumerate(found)]

    return gradients


def plain_onednn(case: Case, inputs: Inputs) -> Provider | None:
    """A few lines of PyTorch with its fastest GEMM on a CPU."""
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    b_dec, W_dec = inputs["b_dec"][0], inputs["W_dec"][0]
    if x.is_cuda or case.op not in ("encode", "decode", "forward", "threshold"):
        return None

    def scores_of(x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x - b_dec, weight, bias, "none", [], "")
        return F.linear(x - b_dec, weight, bias)

    def jumprelu() -> Sequence[Tensor]:
        scores = scores_of(x)
        return [scores.relu_().mul_(scores > inputs["threshold"])]

    def encode(x: Tensor) -> Sequence[Tensor]:
        acts, indices = scores_of(x).topk(case.k, dim=-1, sorted=False)
        return acts.relu_(), indices

    def decode(acts: Tensor, indices: Tensor) -> Tensor:
        return F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec

    if case.op == "threshold":
        return jumprelu
    return as_provider(case, inputs, encode=encode, decode=decode, code=inputs["codes"][0])


def sparsify(case: Case, inputs: Inputs) -> Provider | None:
    """EleutherAI's SparseCoder; its loss is the squared error over the batch's variance."""
    if not usable("sparsify", case):
        return None
    x = inputs["x"]
    if not x.is_cuda:  # by itself it takes Triton wherever that is installed, also on a CPU
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=case.M, k=case.k)
    sae = SparseCoder(case.D, config, device=x.device, dtype=x.dtype)
    weights = {
        "encoder.weight": inputs["weight"],
        "encoder.bias": inputs["bias"],
        "W_dec": inputs["W_dec"][0],
        "b_dec": inputs["b_dec"][0],
    }
    sae.load_state_dict(weights)
    variance = (x.float() - x.float().mean(0)).square().sum() / x.numel()
    return as_provider(
        case,
        inputs,
        encode=lambda x: sae.encode(x)[:2],
        decode=sae.decode,
        code=inputs["codes"][0],
        loss=lambda: sae(x).fvu * variance,
        parameters=[sae.get_parameter(name) for name in weights],
    )


def dense_code(case: Case, inputs: Inputs) -> Tensor:
    """The code as `[N, M]`, which is what most libraries hand from encoder to decoder."""
    acts, indices = inputs["codes"][0]
    return acts.new_zeros(case.N, case.M).scatter_add_(1, indices, acts)


def saelens(case: Case, inputs: Inputs, *, sparse: bool) -> Provider | None:
    """SAELens' TopKTrainingSAE, with dense activations (its default) or sparse ones.

    Its rescaling by the decoder's norms is off: the rows of W_dec have norm 1 here, so it would
    cost time and change nothing. Its sparse products are in float32 only.
    """
    if not usable("sae_lens", case) or (sparse and case.dtype != "float32"):
        return None
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    x = inputs["x"]
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=case.D,
            d_sae=case.M,
            k=case.k,
            dtype=case.dtype,
            device=str(x.device),
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=False,
        )
    )
    weights = {
        "W_enc": inputs["weight"].mT,
        "b_enc": inputs["bias"],
        "W_dec": inputs["W_dec"][0],
        "b_dec": inputs["b_dec"][0],
    }
    sae.load_state_dict(weights)
    code = dense_code(case, inputs)
    batch = TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    return as_provider(
        case,
        inputs,
        encode=lambda x: [sae.encode(x)],
        decode=sae.decode,
        code=[code.to_sparse() if sparse else code],
        loss=lambda: sae.training_forward_pass(batch).loss / case.D,
        parameters=[sae.get_parameter(name) for name in weights],
        transposed=[0],
    )


def saelens_jumprelu(case: Case, inputs: Inputs) -> Provider | None:
    """SAELens' JumpReLUSAE, which hands on the dense activations."""
    if case.op != "threshold" or not find_spec("sae_lens"):
        return None
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    x = inputs["x"]
    config = JumpReLUSAEConfig(
        d_in=case.D,
        d_sae=case.M,
        dtype=case.dtype,
        device=str(x.device),
        apply_b_dec_to_input=True,
    )
    sae = JumpReLUSAE(config)
    weights = {"W_enc": inputs["weight"].mT, "b_enc": inputs["bias"], "W_dec": inputs["W_dec"][0]}
    sae.load_state_dict(weights | {"b_dec": inputs["b_dec"][0], "threshold": inputs["threshold"]})
    return lambda: [sae.encode(x)]


def dictionary_learning(case: Case, inputs: Inputs) -> Provider | None:
    """dictionary_learning's AutoEncoderTopK, trained by its TopKTrainer."""
    if not usable("dictionary_learning", case):
        return None
    import nnsight
    from dictionary_learning.trainers.top_k import TopKTrainer

    # Its dependency nnsight replaces functions of `math` and torch as it is imported: that would
    # slow the other providers down, and breaks torch.compile.
    nnsight.DEFAULT_PATCHER.__exit__(None, None, None)
    x = inputs["x"]
    with x.device:  # its weights are drawn where tensors are made by default
        trainer = TopKTrainer(
            steps=10_000,
            activation_dim=case.D,
            dict_size=case.M,
            k=case.k,
            layer=0,
            lm_name="none",
            device=str(x.device),
        )
    sae = trainer.ae.to(x.dtype)
    weights = {
        "encoder.weight": inputs["weight"],
        "encoder.bias": inputs["bias"],
        "decoder.weight": inputs["W_dec"][0].mT,
        "b_dec": inputs["b_dec"][0],
    }
    sae.load_state_dict(sae.state_dict() | weights)
    return as_provider(
        case,
        inputs,
        encode=lambda x: [sae.encode(x)],
        decode=sae.decode,
        code=[dense_code(case, inputs)],
        loss=lambda: trainer.loss(x, step=0) / case.D,
        parameters=[sae.get_parameter(name) for name in weights],
        transposed=[2],
    )


PEERS: dict[str, Peer] = {
    "oneDNN": plain_onednn,
    "sparsify": sparsify,
    "SAELens": partial(saelens, sparse=False),
    "SAELens sparse": partial(saelens, sparse=True),
    "SAELens JumpReLU": saelens_jumprelu,
    "dictionary_learning": dictionary_learning,
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: time of each provider, hot, as a multiple of ours. Blue is ours, orange a peer, green
    the encoder GEMM, grey plain PyTorch."""
    from matplotlib.figure import Figure

    hot = [row for row in rows if row["cache"] == "hot"]
    cases = list(dict.fromkeys(_name(row) for row in hot))
    # Bars of one thickness, an empty place between cases.
    figure = Figure(figsize=(9, 0.14 * (len(hot) + len(cases)) + 1), layout="constrained")
    axis = figure.subplots()
    middles: list[float] = []
    y = 0
    for case in cases:
        mine = [row for row in hot if _name(row) == case]
        middles.append(y + (len(mine) - 1) / 2)
        for row in mine:
            color = _color(row["provider"])
            bar = axis.barh(y, device_ms(row) / device_ms(mine[0]), 0.9, color=color)
            axis.bar_label(bar, [f" {row['provider']}  {device_ms(row):.3g} ms"], fontsize=7)
            y += 1
        y += 1
    axis.set_yticks(middles, cases, fontsize=8)
    axis.set_ylim(-1, y - 1)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("time as a multiple of ours (hot cache)")
    axis.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg"))


def _color(provider: str) -> str:
    if provider.startswith("resae"):
        return "#0072b2"
    return "#e69f00" if provider in PEERS else "#009e73" if provider == GEMM else "#bbbbbb"


def _name(row: dict[str, Any]) -> str:
    fields = ("op", "N", "D", "M", "k", "dtype", "L")
    return Case(**{name: row[name] for name in fields}).name


def peer_versions() -> dict[str, str]:
    return {
        d.name: d.version
        for d in distributions()
        if d.name in ("eai-sparsify", "sae-lens", "dictionary-learning")
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help=f"calls per provider; fewer, but {LEAST_ROUNDS}, in a case that takes longer than "
        f"{CASE_SECONDS:.0f} s",
    )
    parser.add_argument(
        "--data",
        default="random",
        help="random: numbers at the shapes that matter; embedded: activations of the embedded "
        "model and an autoencoder trained on them; or a folder that bench/real.py has written",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the cases, in place of their own")
    parser.add_argument("--hot", action="store_true", help="no calls with a cold cache")
    parser.add_argument("--providers", nargs="+", help="these, and ours; default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compile", action="store_true", help="also the compiled reference")
    parser.add_argument("--dry", action="store_true", help="tiny shapes: does everything run?")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = DRY_CASES if options.dry else GPU_CASES if device.type == "cuda" else CPU_CASES
    make = make_inputs
    if options.data == EMBEDDED:
        cases = EMBEDDED_CASES
        make = embedded(train_tokens=4_096 if options.dry else 250_000)
    elif options.data != "random":
        cases, make = real(Path(options.data))
    if options.dtype:
        cases = [replace(case, dtype=options.dtype) for case in cases]
    cases = [case for case in cases if options.only in case.name]
    if not cases:
        parser.error(f"no case of {options.data} contains {options.only!r}")
    peers = {"compiled reference": compiled_reference, **PEERS} if options.compile else PEERS
    clock = Clock(device)
    roofs = {dtype: measure_roofs(clock, dtype) for dtype in {case.dtype for case in cases}}
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        rows += profile(
            case,
            device=device,
            roofs=roofs[case.dtype],
            clock=clock,
            rounds=options.rounds,
            peers=peers,
            only=options.providers,
            hot_only=options.hot,
            inputs=make(case, device),
        )
    facts = {
        **environment(),
        "commit": commit(),
        "data": Path(options.data).name,
        "peers": peer_versions(),
        "roofs": {d: {"copy_gb_per_s": r.copy / 1e9, "tflop_per_s": r.gemm / 1e12}
                  for d, r in roofs.items()},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    (options.out / "ops.md").write_text(f"# Ops\n\n{heading}\n\n{table(rows)}\n")
    save_json(options.out / "environment.json", facts)
    draw(rows, options.out / "ops.svg")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
