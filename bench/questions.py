"""The single numbers behind the kernel designs, one line each.

    python bench/questions.py --out DIR

Rate of the library's GEMM at these shapes; cost of a pass over the scores, of a selection, of a
gather from the L2 cache and of a GEMV; the M/k from which on gathering is faster than a dense GEMM;
cost of an edge of a CUDA graph, of a latent that half of all tokens activate, and of a call from
Python. Writes `questions.md`. A CPU measures only those that make sense there, at smaller sizes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from resae.environment import environment
from resae.storage import write_atomically
from resae_kernels import sparse_decode, topk_encode
from resae_kernels.decode import decode_rows
from resae_kernels.encode import encode_rows
from resae_kernels.profiling import Case, Clock, make_inputs, trace
from resae_kernels.profiling.specs import train_step
from resae_kernels.triton.screening import quantise

Answer = tuple[str, str]
"""The question, and the measured answer with its unit."""


def median(clock: Clock, call: Callable[[], object], rounds: int = 20) -> float:
    """Seconds, hot."""
    call()
    return sorted(clock.seconds(call, cold=False) for _ in range(rounds))[rounds // 2]


def gemms(clock: Clock, shrink: int) -> Iterator[Answer]:
    D, M = 2048 // shrink, 65536 // shrink
    weight = torch.randn(M, D, device=clock.device).bfloat16()
    bias = torch.zeros(M, device=clock.device).bfloat16()
    for N in (8192 // shrink, 2048 // shrink):
        x = torch.randn(N, D, device=clock.device).bfloat16()
        out = torch.empty(N, M, device=clock.device).bfloat16()
        seconds = median(clock, lambda x=x, out=out: torch.addmm(bias, x, weight.T, out=out))
        rate = 2 * N * D * M / seconds / 1e12
        yield f"GEMM with bias, {N}×{D}×{M} bf16", f"{rate:.1f} TFLOP/s"
        for dtype in (torch.bfloat16, torch.float32):
            scores = out.to(dtype)
            seconds = median(clock, lambda s=scores: s.topk(64, dim=-1), rounds=5)
            yield f"torch.topk, k = 64, {N}×{M} {dtype}", f"{seconds * 1e3:.3f} ms"


def kernels_of_encode(clock: Clock, shrink: int) -> Iterator[Answer]:
    """Time of each kernel in an encode of many tokens, and of one."""
    for N in (8192 // shrink, 1):
        case = Case("encode", N, 2048 // shrink, 65536 // shrink, 64 // shrink, "bfloat16")
        with tempfile.TemporaryDirectory() as folder:
            ran = trace(case, device=clock.device, path=Path(folder) / "trace.json")
        for row in ran[:5]:
            microseconds = row["us"] / row["calls"]
            yield (
                f"{case.name}: {row['name'][:60]}",
                (
                    f"{microseconds:.1f} µs a call, registers {row['registers']}, "
                    f"shared {row['shared_bytes']}, occupancy {row['occupancy_percent']}"
                ),
            )


def screening(clock: Clock, shrink: int) -> Iterator[Answer]:
    """Encode of few tokens screened by the 8-bit copy, against the exact path, both replayed from a
    CUDA graph with a cold cache; and how many latents had to be scored exactly."""
    if clock.device.type != "cuda":
        return
    for (D, M), N in product(((2048, 65536), (3584, 131072), (2048, 16384)), (1, 16)):
        case = Case("encode", N, D // shrink, M // shrink, 64 // shrink, "bfloat16")
        inputs = make_inputs(case, clock.device)
        x, weight, bias, b_dec = *(inputs[n] for n in ("x", "weight", "bias")), inputs["b_dec"][0]
        exact_path = partial(topk_encode, x, weight, bias, case.k, pre_bias=b_dec)
        calls: dict[str, Callable[[], object]] = {"exact": exact_path}
        for margin in ("statistical", "certain"):
            copy = quantise(weight, bias, margin, seed=0)
            assert copy is not None
            rows = copy.encode(x, case.k, b_dec, None, True).candidates
            assert isinstance(rows, Tensor)
            exact, scored = int((rows < 0).sum()), int(rows.clamp_min(0).sum())
            yield (
                f"screened encode, N = {N}, {D}×{M}, {margin}",
                f"{scored} candidates, {exact} rows exact",
            )
            calls[margin] = partial(copy.encode, x, case.k, b_dec, None, True)
        for name, call in calls.items():
            timer = clock.timer(call, cold=True)
            timed = timer.graph or timer.eager
            seconds = sorted(timed() for _ in range(20))[10]
            how = "graph" if timer.graph else f"eager, {timer.not_captured}"
            yield f"encode, N = {N}, {D}×{M}, {name} ({how})", f"{seconds * 1e6:.1f} µs"


def gathers(clock: Clock, shrink: int) -> Iterator[Answer]:
    """Rows of a table that fits the L2 cache, and of one that does not."""
    for M in (2560, 65536):
        case = Case("decode", 8192 // shrink, 4096 // shrink, M // shrink, 64 // shrink, "bfloat16")
        inputs = make_inputs(case, clock.device)
        acts, indices = inputs["codes"][0]
        W = inputs["W_dec"][0]
        gather = partial(sparse_decode, acts, indices, W, algorithm="gather")
        seconds = median(clock, gather)
        moved, table = case.N * case.k * case.D * 2, case.M * case.D * 2
        yield (
            f"gather of {case.k} rows a token from a table of {table / 2**20:.3g} MiB",
            f"{moved / seconds / 1e9:.0f} GB/s",
        )


def algorithms(clock: Clock, shrink: int) -> Iterator[Answer]:
    """Cost of the gather algorithm against the dense one: equal at the right DENSE_RATIO."""
    M = 16384 // shrink
    for dtype in ("bfloat16", "float32"):
        for ratio in (2, 4, 8) if clock.device.type == "cpu" else (16, 32, 64, 128, 256):
            case = Case("decode", 8192 // shrink, 2048 // shrink, M, M // ratio, dtype)
            inputs = make_inputs(case, clock.device)
            acts, indices = inputs["codes"][0]
            W, x, ops = inputs["W_dec"][0], inputs["x"], torch.ops.resae
            calls = {
                "sum": partial(sparse_decode, acts, indices, W),
                "gradient of W_dec": partial(ops.scatter_outer, acts, indices, x, len(W)),
                "gradient of the acts": partial(ops.sddmm, x, indices, W),
            }
            for name, call in calls.items():
                gather, dense = (
                    median(clock, partial(call, algorithm=name), 5) for name in ("gather", "dense")
                )
                yield f"{name} gathered / dense, M/k = {ratio}, {dtype}", f"{gather / dense:.2f} ×"


def dense_latent(clock: Clock, shrink: int) -> Iterator[Answer]:
    """A training step where half of all tokens activate latent 0, against an ordinary one."""
    case = Case("train", 8192 // shrink, 2048 // shrink, 16384 // shrink, 32 // shrink, "bfloat16")
    inputs = make_inputs(case, clock.device)
    ordinary = median(clock, lambda: train_step(inputs, case), 5)
    inputs["x"][::2] += 50.0 * inputs["weight"][0]
    dense = median(clock, lambda: train_step(inputs, case), 5)
    yield "training step with a latent active on half of all tokens", f"{dense / ordinary:.2f} ×"


def graph_edge(clock: Clock, shrink: int) -> Iterator[Answer]:
    del shrink
    if clock.device.type != "cuda":
        return
    value = torch.zeros(1, device=clock.device)
    value.add_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            value.add_(1.0)
    yield "edge of a CUDA graph", f"{median(clock, graph.replay) / 200 * 1e6:.2f} µs"


def host_cost(clock: Clock, shrink: int) -> Iterator[Answer]:
    """Host cost of a call in Python and the dispatcher: tiny launches, without synchronisation.

    An op's own cost is the difference between its line and that of its implementation alone.
    """
    del shrink
    chosen = "triton" if clock.device.type == "cuda" else "torch"
    x = torch.randn(1, 16, device=clock.device)
    weight = torch.randn(32, 16, device=clock.device)
    bias = torch.zeros(32, device=clock.device)
    code = topk_encode(x, weight, bias, 4, sorted=False)
    acts, indices = code

    def embedding_bag() -> Tensor:
        return torch.nn.functional.embedding_bag(
            indices, weight, per_sample_weights=acts, mode="sum"
        )

    for name, call in (
        ("torch.addmm", lambda: torch.addmm(bias, x, weight.T)),
        ("torch embedding_bag", embedding_bag),
        ("topk_encode", lambda: topk_encode(x, weight, bias, 4, sorted=False)),
        (
            "topk_encode, implementation alone",
            lambda: encode_rows(x, weight, bias, 4, None, None, False, 1 << 25, chosen),
        ),
        ("sparse_decode", lambda: sparse_decode(acts, indices, weight)),
        (
            "sparse_decode, implementation alone",
            lambda: decode_rows([acts], [indices], [weight], None, None, implementation=chosen),
        ),
    ):
        for _ in range(50):
            call()
        clock.synchronize()
        began = time.perf_counter()
        for _ in range(1000):
            call()
        spent = (time.perf_counter() - began) / 1000
        clock.synchronize()
        yield f"host time of one eager call of {name}", f"{spent * 1e6:.1f} µs"


QUESTIONS = (
    gemms,
    kernels_of_encode,
    screening,
    gathers,
    algorithms,
    dense_latent,
    graph_edge,
    host_cost,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="tiny shapes: does everything run?")
    options = parser.parse_args()
    clock = Clock(torch.device(options.device))
    shrink = 16 if options.dry or clock.device.type == "cpu" else 1
    lines = [f"- {key}: {value}" for key, value in environment().items()]
    lines += [f"- sizes divided by {shrink}" if shrink > 1 else "- full sizes", ""]
    lines += ["| question | measured |", "|---|---|"]
    for ask in QUESTIONS:
        for question, answer in ask(clock, shrink):
            lines.append(f"| {question} | {answer} |")
            print(lines[-1], flush=True)
    text = "# Questions\n\n" + "\n".join(lines) + "\n"
    write_atomically(options.out / "questions.md", lambda temporary: temporary.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
