"""Host cost of an eager call on the Triton path, without a device: launches are stubbed.

    python bench/host.py --out DIR

An op's Python, its checks, the dispatcher and the preparation of every launch run as on a GPU; the
launch itself does nothing. Not counted: what Triton's own launcher takes, 5 to 10 µs. Tensors are
small and on the CPU. Writes `host.md`: the least of many means, on one thread.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from resae.environment import environment  # noqa: E402
from resae_kernels import (  # noqa: E402
    StepWorkspace,
    affine_chain,
    online_step,
    sparse_decode,
    topk_encode,
    transport,
)
from resae_kernels.files import write_atomically  # noqa: E402
from resae_kernels.triton import runtime  # noqa: E402

TARGET_US = 25.0


def stub_launches() -> None:
    """Replace every kernel's launch by nothing, and let kernels take CPU tensors."""
    runtime.is_interpreted = lambda: True

    def launch(*_arguments, **_options) -> None:
        return None

    runtime.Kernel.__getitem__ = lambda _kernel, _grid: launch  # type: ignore[method-assign]


def calls() -> dict[str, Callable[[], object]]:
    """The ops at one small shape each, inference."""
    N, D, M, k = 1, 64, 512, 8
    x, prediction, b_dec = torch.zeros(N, D), torch.zeros(N, D), torch.zeros(D)
    weight, W_dec, bias = torch.zeros(M, D), torch.zeros(M, D), torch.zeros(M)
    acts, indices = torch.zeros(N, k), torch.zeros(N, k, dtype=torch.int64)
    space = StepWorkspace.allocate(N, M, k, D, dtype=x.dtype, device=x.device)
    chain = [(acts, indices)] * 2, [W_dec] * 2, [torch.zeros(D, D)], [b_dec]
    whole = transport(*chain[1:], b_dec=[b_dec] * 2)
    t: dict[str, Any] = {"implementation": "triton"}
    return {
        "torch.addmm": lambda: torch.addmm(bias, x, weight.T),
        "topk_encode": lambda: topk_encode(x, weight, bias, k, pre_bias=b_dec, **t),
        "topk_encode unsorted": lambda: topk_encode(
            x, weight, bias, k, pre_bias=b_dec, sorted=False, **t
        ),
        "sparse_decode": lambda: sparse_decode(acts, indices, W_dec, bias=b_dec, **t),
        "online_step": lambda: online_step(
            x, weight, bias, k, W_dec, b_dec=b_dec, prediction=prediction, out=space, **t
        ),
        "online_step, no workspace": lambda: online_step(
            x, weight, bias, k, W_dec, b_dec=b_dec, prediction=prediction, **t
        ),
        "online_step, transported": lambda: online_step(
            x, weight, bias, k, W_dec, codes=chain[0][:1], transported=whole, out=space, **t
        ),
        "affine_chain, 2 layers": lambda: affine_chain(*chain, b_dec=[b_dec] * 2, **t),
        "affine_chain transported, 2 layers": lambda: affine_chain(
            *chain, b_dec=[b_dec] * 2, transported=whole, **t
        ),
    }


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """Least of the means of 20 calls."""
    for _ in range(50):
        call()
    means = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(20):
            call()
        means.append((time.perf_counter() - began) / 20)
    return 1e6 * min(means)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of the results; default: only print")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stub_launches()
    lines = [f"- {key}: {value}" for key, value in environment().items()]
    lines += ["", f"| eager call, launches stubbed | µs (target {TARGET_US:.0f}) |", "|---|---|"]
    with torch.no_grad():
        lines += [
            f"| {name} | {microseconds(call, options.rounds):.1f} |"
            for name, call in calls().items()
        ]
    text = "# Host cost\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.out:
        write_atomically(options.out / "host.md", lambda temporary: temporary.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
