"""Autoencoders of other libraries, as they are and accelerated: encode, and the whole forward.

    python bench/dropin.py --out DIR [--threads 1] [--rounds 5]

Random weights of the sizes in `CASES`; inputs from a low-rank Gaussian, so that scores differ as
those of trained autoencoders do. `as it is` and `accelerated` take turns within each round, on the
same input, after a comparison of their results; the table has the median of the rounds' ratios. Of
the libraries those are measured that are installed (`pip install "resae[peers]"`). Writes
`dropin.md`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from resae.environment import environment  # noqa: E402
from resae_kernels import accelerate  # noqa: E402
from resae_kernels.files import write_atomically  # noqa: E402
from resae_kernels.profiling.clock import Clock  # noqa: E402

CASES = [(128, 4096, 16), (768, 24576, 32), (2048, 32768, 64)]
"""D, M, k."""
GEMMA_SCOPE = (2304, 16384, 70)
"""D, M and the mean number of active latents of an autoencoder of Gemma Scope."""
TOKENS = (1, 16, 256, 2048)
JUMPRELU = "sae_lens, JumpReLU"
DISTRIBUTIONS = {
    "sae_lens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
}


class Row(NamedTuple):
    """One comparison; times in milliseconds."""

    library: str
    D: int
    M: int
    k: int
    N: int
    call: str
    as_it_is: float
    accelerated: float
    ratio: float
    """Median over the rounds of accelerated / as it is."""


def new_sae(library: str, D: int, M: int, k: int) -> nn.Module:
    """An autoencoder of this library with random weights."""
    if library == "sae_lens":
        from sae_lens import TopKSAE, TopKSAEConfig

        sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=k))
    elif library == "sparsify":
        from sparsify import SparseCoder, SparseCoderConfig

        sae = SparseCoder(D, SparseCoderConfig(num_latents=M, k=k))
    else:
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        sae = AutoEncoderTopK(D, M, k)
    return sae.requires_grad_(False).eval()


def new_jumprelu(D: int, M: int, active: int) -> nn.Module:
    """SAELens' JumpReLU autoencoder with random weights, and one threshold for all latents above
    which there are this many on average."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=M)).requires_grad_(False).eval()
    scores = activations(256, D) @ sae.W_enc
    sae.threshold.fill_(float(scores.flatten().topk(256 * active).values[-1]))
    return sae


def activations(N: int, D: int) -> Tensor:
    """`[N, D]` of rank D / 8 and a little noise."""
    rank = max(1, D // 8)
    return torch.randn(N, rank) @ torch.randn(rank, D) / rank**0.5 + 0.1 * torch.randn(N, D)


def check(sae: nn.Module, fast: nn.Module, x: Tensor) -> None:
    """Raise RuntimeError where both do not reconstruct the same."""
    ours, theirs = (getattr(y, "sae_out", y) for y in (fast(x), sae(x)))
    error = float((ours - theirs).norm() / theirs.norm())
    if error > 1e-5:
        raise RuntimeError(f"accelerated and plain differ by {error:.1e} of the norm")


def measured(clock: Clock, library: str, D: int, M: int, k: int, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    thresholds = library == JUMPRELU
    sae = new_jumprelu(D, M, k) if thresholds else new_sae(library, D, M, k)
    fast = accelerate(sae)
    for N in TOKENS:
        x = activations(N, D)
        check(sae, fast, x)
        for name in ("encode", "forward"):
            calls: list[Callable[[], object]] = [
                partial(getattr(which, name), x) for which in (sae, fast)
            ]
            times = [[clock.seconds(call, cold=False) for call in calls] for _ in range(rounds)]
            plain, ours = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
            ratio = statistics.median(fast / plain for plain, fast in times)
            yield Row(library, D, M, k, N, name, plain, ours, ratio)


def table(rows: list[Row]) -> str:
    head = "| library | D | M | k | tokens | call | as it is, ms | accelerated, ms | × its time |"
    lines = [
        f"| {r.library} | {r.D} | {r.M:,} | {r.k} | {r.N} | {r.call} | {r.as_it_is:.3f} | "
        f"{r.accelerated:.3f} | {r.ratio:.2f} |"
        for r in rows
    ]
    return "\n".join([head, "|---" * 9 + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for dropin.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.set_grad_enabled(False)
    libraries = [name for name in DISTRIBUTIONS if find_spec(name)]
    if not libraries:
        parser.error('no library is installed; pip install "resae[peers]"')
    clock = Clock(torch.device("cpu"))
    rows: list[Row] = []
    cases = [(library, sizes) for library in libraries for sizes in CASES]
    if "sae_lens" in libraries:
        cases.append((JUMPRELU, GEMMA_SCOPE))
    o.out.mkdir(parents=True, exist_ok=True)
    for library, sizes in cases:
        for row in measured(clock, library, *sizes, o.rounds):
            rows.append(row)
            print(row, flush=True)
        write_page(o.out, rows, o.rounds)


def write_page(out: Path, rows: list[Row], rounds: int) -> None:
    """Write the page of the cases measured so far."""
    libraries = {row.library.split(",")[0] for row in rows}
    about = environment() | {
        "peers": {DISTRIBUTIONS[name]: version(DISTRIBUTIONS[name]) for name in libraries},
        "rounds": rounds,
    }
    heading = "\n".join(f"- {name}: {value}" for name, value in about.items())
    page = f"# Drop-in acceleration\n\n{heading}\n\n{table(rows)}\n"
    write_atomically(out / "dropin.md", lambda temporary: temporary.write_text(page))


if __name__ == "__main__":
    main()
