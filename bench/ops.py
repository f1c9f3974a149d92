"""Every op at the shapes that matter, against alternatives and peers.

    python bench/ops.py --out DIR

Writes `ops.csv`, `ops.md` and `ops.svg` (time as a multiple of ours, per case) with versions and
hardware. The measuring is `resae.profile`; this file holds the shapes and the peers, which are
taken if they are installed: `eai-sparsify` (its encoder and decoder).
"""

import argparse
import csv
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resae.environment import environment
from resae.profile import (
    Case,
    Clock,
    Inputs,
    Peer,
    Provider,
    measure_roofs,
    profile,
    table,
    train_step,
)
from resae.storage import save_json, write_atomically

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
    Case("train", 8192, 2048, 65536, 64, "bfloat16"),
    Case("chain", 1, 2048, 65536, 64, "bfloat16", 4),
    Case("chain", 8192, 2048, 16384, 64, "bfloat16", 4),
]
CPU_CASES = [
    Case("encode", 1, 768, 24576, 32),
    Case("encode", 16, 768, 24576, 32),
    Case("encode", 256, 768, 24576, 32),
    Case("decode", 1, 768, 24576, 32),
    Case("decode", 256, 768, 24576, 32),
    Case("train", 2048, 512, 8192, 32),
    Case("chain", 1, 768, 8192, 32, L=3),
    Case("chain", 256, 768, 8192, 32, L=3),
]
DRY_CASES = [Case(op, 4, 64, 256, 8, L=2 if op == "chain" else 1) for op in
             ("encode", "decode", "train", "chain")]  # fmt: skip


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


def sparsify(case: Case, inputs: Inputs) -> Provider | None:
    """EleutherAI's encoder, decoder, and both in a training step."""
    if not importlib.util.find_spec("sparsify") or case.op == "chain":
        return None
    from sparsify.fused_encoder import fused_encoder
    from sparsify.utils import eager_decode, triton_decode

    # By itself it takes Triton wherever that is installed, also for tensors on a CPU.
    decoder = triton_decode if inputs["x"].is_cuda else eager_decode

    def encode(x: Any, weight: Any, bias: Any, k: int, *, pre_bias: Any) -> tuple[Any, Any]:
        acts, indices, _ = fused_encoder(x - pre_bias, weight, bias, k, "topk")
        return acts, indices

    def decode(acts: Any, indices: Any, W_dec: Any, *, bias: Any) -> Any:
        return decoder(indices, acts.to(W_dec.dtype), W_dec.mT) + bias

    if case.op == "encode":
        return lambda: encode(
            inputs["x"], inputs["weight"], inputs["bias"], case.k, pre_bias=inputs["b_dec"][0]
        )
    if case.op == "decode":
        acts, indices = inputs["codes"][0]
        return lambda: [decode(acts, indices, inputs["W_dec"][0], bias=inputs["b_dec"][0])]
    return lambda: train_step(inputs, case, encode, decode)


PEERS: dict[str, Peer] = {"sparsify": sparsify}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: time of each provider, hot, as a multiple of ours."""
    from matplotlib.figure import Figure

    hot = [row for row in rows if row["cache"] == "hot"]
    cases = list(dict.fromkeys(_name(row) for row in hot))
    names = list(dict.fromkeys(row["provider"] for row in hot))
    colors = dict(
        zip(names, ("#0072b2", "#bbbbbb", "#e69f00", "#009e73", "#d55e00") * 3, strict=False)
    )
    figure = Figure(figsize=(9, 0.9 * len(cases) + 1), layout="constrained")
    axis = figure.subplots()
    for y, case in enumerate(cases):
        mine = [row for row in hot if _name(row) == case]
        ours = mine[0]["ms_p50"]
        height = 0.8 / len(mine)
        for i, row in enumerate(mine):
            color = colors[row["provider"]]
            bar = axis.barh(y + i * height, row["ms_p50"] / ours, height * 0.9, color=color)
            axis.bar_label(bar, [f" {row['provider']}  {row['ms_p50']:.3g} ms"], fontsize=7)
    axis.set_yticks([y + 0.3 for y in range(len(cases))], cases, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("time as a multiple of ours (hot cache)")
    axis.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg"))


def _name(row: dict[str, Any]) -> str:
    fields = ("op", "N", "D", "M", "k", "dtype", "L")
    return Case(**{name: row[name] for name in fields}).name


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="calls per provider")
    parser.add_argument("--compile", action="store_true", help="also the compiled reference")
    parser.add_argument("--dry", action="store_true", help="tiny shapes: does everything run?")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = DRY_CASES if options.dry else GPU_CASES if device.type == "cuda" else CPU_CASES
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
        )
    facts = {
        **environment(),
        "commit": commit(),
        "roofs": {d: {"copy_gb_per_s": r.copy / 1e9, "tflop_per_s": r.product / 1e12}
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
