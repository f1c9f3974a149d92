"""Training against its peers: tokens per second, memory, and FVU.

    python bench/train.py --out DIR          (a CPU: the embedded model; a GPU: the step at scale)
    python bench/train.py --out DIR --dry    (a few steps of everything)
    python bench/train.py --out DIR --whole-process [--peer-python PYTHON]

On a CPU every package trains TopK autoencoders on the embedded model at the sizes of `resae demo`,
one layer and three, in two ways:

    step   its own trainer, on activations that lie in memory: the same, in the same order, for all
    loop   its own whole program, from loading model and text to trained autoencoders

Each run is a fresh process; runs of different packages take turns, but what takes three times as
long as ours in the first round is not timed again. Time is the CPU time of the process, on one
thread, which other load on the machine disturbs less. Equal for all: text, tokens, layers, latents,
k, tokens per batch, Adam, 5 % warm-up, 20 % decay (sparsify: linear to 0, all it has), special
tokens left out; everything else is as each package has it. Learning rates are the best of `RATES`
for each package, by the FVU of one layer on text that neither training nor the final comparison
sees. Writes `train.md`, `train.csv` and `train.svg`. Peers are taken where installed (`pip install
"resae[peers]"`).

With `--whole-process` everything is on the clock, start-up included: `resae train` beside
`bench/train_sparsify.py`, each as its own process, in turns; wall time, CPU time and the peak of
resident memory. PYTHON is that of an environment with sparsify, which need not have resae. Writes
`train_whole.md`.

On a GPU: the step alone at D = 2048, M = 65536, k = 64, four layers, all in bfloat16, beside dense
PyTorch and sparsify; no allocation of ours may be as large as `[N, M]`.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ops import commit, peer_versions
from torch import Tensor, nn
from whole import Usage, run

from resae.assets import CORPUS, TINY_PYTHIA
from resae.data.activations import capture_tokens
from resae.data.rows import TokenRows, train_and_held_out
from resae.environment import environment
from resae.models.hooked import EMBEDDED, HookedLM
from resae.stack.affine import AffinePredictor
from resae.stack.stack import ReSAE
from resae.storage import load_tensors, save_tensors, write_atomically
from resae.training.calibration import Calibration
from resae.training.config import TrainConfig
from resae.training.start import initial_state
from resae.training.step import train_step

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
CONTEXT_TOKENS = 128
HELD_OUT_ROWS = 128
"""The first half chooses learning rates, the second is reported."""
CURVE_POINTS = 10
MODEL_CODE = "transformers.models.gpt_neox.modeling_gpt_neox"
"""Modules that loading the embedded model imports; some packages have imported them before."""


@dataclass(frozen=True)
class Setting:
    """Setting of a run, the same for all packages."""

    layers: tuple[int, ...]
    M: int
    k: int
    batch_tokens: int
    train_tokens: int

    @property
    def steps(self) -> int:
        return self.train_tokens // self.batch_tokens

    @property
    def warmup(self) -> int:
        return max(1, self.steps // 20)

    @property
    def decay(self) -> int:
        return max(1, self.steps // 5)


DEMO = Setting(layers=(1, 3, 5), M=512, k=8, batch_tokens=1024, train_tokens=100_352)
ONE_LAYER = (3,)


@dataclass(frozen=True)
class Scale:
    """The step alone, on random activations."""

    N: int
    D: int
    M: int
    k: int
    L: int
    steps: int


LARGE = Scale(N=8192, D=2048, M=65536, k=64, L=4, steps=20)
DRY = Scale(N=64, D=64, M=512, k=8, L=2, steps=2)


@dataclass(frozen=True)
class Task:
    """One run of one package, in a process of its own."""

    package: str
    part: str
    """`rates`, `step`, `loop`, or `scale`."""
    setting: Setting
    lr: float
    threads: int
    activations: str = ""
    """File with the activations of all layers: training, choosing, reported."""
    curve: bool = False
    """True: also measure FVU during training (outside the clock)."""


Reconstruct = Callable[[int, Tensor], Tensor]
"""Selected layer and raw activations `[N, D]` to x̂."""
Watch = Callable[[Reconstruct], None]
"""Called by a step after every batch."""


# -- packages: the step on activations in memory, and the whole program ----------------------------


def resae_step(s: Setting, lr: float, xs: list[Tensor], watch: Watch) -> Reconstruct:
    scale = [float(x.square().mean().sqrt()) for x in xs]
    calibration = Calibration(AffinePredictor("none"), scale, [x.mean(0) for x in xs])
    config = TrainConfig(
        layers=tuple(f"blocks.{layer}.hook_resid_post" for layer in s.layers),
        k=(s.k,) * len(s.layers),
        d_sae=s.M,
        predictor="none",
        train_tokens=s.train_tokens,
        batch_tokens=s.batch_tokens,
        buffer_tokens=s.batch_tokens,
        lr=lr,
    )
    state = initial_state(config, calibration, None, "cpu")

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        sae = state.stack.sae(layer)
        return sae(x / scale[layer]).x_hat * scale[layer]

    for batch in batches(xs, s.batch_tokens):
        train_step(state, config, [x / by for x, by in zip(batch, scale, strict=True)])
        watch(reconstruct)
    return reconstruct


def resae_loop(s: Setting, lr: float) -> Reconstruct:
    """`resae train`, raw autoencoders."""
    return _resae(s, lr, "none")


def resae_maps_loop(s: Setting, lr: float) -> Reconstruct:
    """`resae train` as it is by default: on what the affine maps leave."""
    return _resae(s, lr, "previous")


def _resae(s: Setting, lr: float, predictor: str) -> Reconstruct:
    from resae.cli import main

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        layers = ",".join(map(str, s.layers))
        code = main(
            f"train {EMBEDDED} {EMBEDDED} --layers {layers} --k {s.k} --d-sae {s.M} --lr {lr} "
            f"--train-tokens {s.train_tokens} --batch-tokens {s.batch_tokens} --out {out} "
            f"--predictor {predictor}".split()
        )
        if code:
            raise RuntimeError(f"resae train ended with {code}")
        stack = ReSAE.load(out)
    if predictor == "none":
        return lambda layer, x: stack.sae(layer)(x).x_hat
    return lambda _, xs: stack(xs, loop="open").x_hats  # type: ignore[arg-type, return-value]


def sparsify_step(s: Setting, lr: float, xs: list[Tensor], watch: Watch) -> Reconstruct:
    """Its `Trainer` cannot be had without a model: this is the body of its `fit`."""
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    config = SparseCoderConfig(num_latents=s.M, k=s.k)
    coders = [SparseCoder(x.shape[1], config, device="cpu") for x in xs]
    parameters = [p for coder in coders for p in coder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, s.warmup, s.steps)

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        return coders[layer](x).sae_out

    for step, batch in enumerate(batches(xs, s.batch_tokens)):
        for coder, x in zip(coders, batch, strict=True):
            if step == 0:
                coder.b_dec.data = x.mean(0)
            coder.set_decoder_norm_to_unit_norm()
            coder(x, dead_mask=None).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        watch(reconstruct)
    return reconstruct


def sparsify_loop(s: Setting, lr: float) -> Reconstruct:
    from sparsify import SparseCoderConfig, Trainer
    from sparsify import TrainConfig as SparsifyConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_PYTHIA, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            SparsifyConfig(
                SparseCoderConfig(num_latents=s.M, k=s.k),
                batch_size=s.batch_tokens // CONTEXT_TOKENS,
                optimizer="adam",
                lr=lr,
                lr_warmup_steps=s.warmup,
                exclude_tokens=[0],
                layers=list(s.layers),
                log_to_wandb=False,
                save_dir=folder,
            ),
            token_dataset(s),
            model,
        )
        trainer.fit()
    coders = list(trainer.saes.values())

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        return coders[layer](x).sae_out

    return reconstruct


def _saelens_config(s: Setting) -> Any:
    from sae_lens import TopKTrainingSAEConfig

    return TopKTrainingSAEConfig(d_in=128, d_sae=s.M, k=s.k)


def saelens_step(s: Setting, lr: float, xs: list[Tensor], watch: Watch) -> Reconstruct:
    """Its `MultiSAETrainer` (with one layer that is one `SAETrainer`)."""
    from sae_lens import TopKTrainingSAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    names = [str(layer) for layer in s.layers]
    saes = {name: TopKTrainingSAE(_saelens_config(s)) for name in names}

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        sae = saes[names[layer]]
        return sae.decode(sae.encode(x))

    def provider() -> Iterator[dict[str, Tensor]]:
        for batch in batches(xs, s.batch_tokens):
            yield dict(zip(names, batch, strict=True))
            watch(reconstruct)

    config = SAETrainerConfig(
        total_training_samples=s.steps * s.batch_tokens,
        train_batch_size_samples=s.batch_tokens,
        lr=lr,
        lr_end=0.0,
        lr_warm_up_steps=s.warmup,
        lr_decay_steps=s.decay,
    )
    MultiSAETrainer(config, saes, {name: name for name in names}, provider()).fit()
    return reconstruct


def saelens_loop(s: Setting, lr: float) -> Reconstruct:
    from sae_lens import LoggingConfig
    from sae_lens.load_model import load_model
    from sae_lens.multi_sae_training_runner import (
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
    )

    hooks = {str(layer): f"gpt_neox.layers.{layer}" for layer in s.layers}
    name = "AutoModelForCausalLM"  # its own HookedTransformer loads only models of the hub
    model = load_model(name, str(TINY_PYTHIA), hook_names=list(hooks.values()))
    with tempfile.TemporaryDirectory() as folder:
        config = MultiSAETrainingRunnerConfig(
            saes={layer: _saelens_config(s) for layer in hooks},
            hook_names=hooks,
            model_name=str(TINY_PYTHIA),
            model_class_name=name,
            training_tokens=s.steps * s.batch_tokens,
            train_batch_size_tokens=s.batch_tokens,
            context_size=CONTEXT_TOKENS,
            lr=lr,
            lr_end=0.0,
            lr_warm_up_steps=s.warmup,
            lr_decay_steps=s.decay,
            exclude_special_tokens=True,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=folder,
        )
        runner = MultiSAETrainingRunner(
            config, override_dataset=token_dataset(s), override_model=model
        )
        runner.run()
    saes = [runner.saes[layer] for layer in hooks]
    return lambda layer, x: saes[layer].decode(saes[layer].encode(x))


def dictionary_learning_step(s: Setting, lr: float, xs: list[Tensor], watch: Watch) -> Reconstruct:
    """Its trainSAE reads one layer at a time."""
    trained: list[nn.Module] = []

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        return trained[layer](x)

    for x in xs:

        def provider(x: Tensor = x) -> Iterator[Tensor]:
            for (batch,) in batches([x], s.batch_tokens):
                yield batch
                if len(xs) == 1:
                    watch(reconstruct)

        _train_dictionary(s, lr, provider(), trained)
    return reconstruct


def _train_dictionary(s: Setting, lr: float, data: Any, trained: list[nn.Module]) -> None:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    def autoencoder(*sizes: int) -> nn.Module:
        trained.append(AutoEncoderTopK(*sizes))
        return trained[-1]

    trainSAE(
        data,
        [
            {
                "trainer": TopKTrainer,
                "steps": s.steps,
                "activation_dim": 128,
                "dict_size": s.M,
                "k": s.k,
                "layer": 0,
                "lm_name": EMBEDDED,
                "dict_class": autoencoder,
                "lr": lr,
                "warmup_steps": s.warmup,
                "decay_start": s.steps - s.decay,
                "device": "cpu",
            }
        ],
        steps=s.steps,
        device="cpu",
    )


def dictionary_learning_loop(s: Setting, lr: float) -> Reconstruct:
    from dictionary_learning.buffer import ActivationBuffer
    from nnsight import LanguageModel

    trained: list[nn.Module] = []
    model = LanguageModel(str(TINY_PYTHIA), device_map="cpu", dispatch=True)
    # Its buffer wants text, tokenizes it again (without BOS), and leaves the first token out. It
    # fills itself anew whenever it is half read, so that it asks for more rows than are trained on.
    rows = [model.tokenizer.decode(row[1:]) for row in token_rows(s)]
    for layer in s.layers:
        buffer = ActivationBuffer(
            itertools.cycle(rows),
            model,
            model.gpt_neox.layers[layer],
            d_submodule=128,
            n_ctxs=512,
            ctx_len=CONTEXT_TOKENS,
            refresh_batch_size=32,
            out_batch_size=s.batch_tokens,
            remove_bos=True,
        )
        _train_dictionary(s, lr, buffer, trained)
    return lambda layer, x: trained[layer](x)


def dense_step(s: Setting, lr: float, xs: list[Tensor], watch: Watch) -> Reconstruct:
    """Plain PyTorch: all scores, topk, scatter, dense GEMMs."""
    saes = [Dense(x.shape[1], s.M, s.k) for x in xs]
    for sae, x in zip(saes, xs, strict=True):
        sae.b_dec.data = x[: s.batch_tokens].mean(0)
    optimizer = torch.optim.Adam([p for sae in saes for p in sae.parameters()], lr=lr, fused=True)

    @torch.no_grad()
    def reconstruct(layer: int, x: Tensor) -> Tensor:
        return saes[layer](x)

    for step, batch in enumerate(batches(xs, s.batch_tokens)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / s.warmup, (s.steps - step) / s.decay)
        dense_update(saes, optimizer, batch)
        watch(reconstruct)
    return reconstruct


class Dense(nn.Module):
    """A TopK autoencoder as one writes it first."""

    def __init__(self, D: int, M: int, k: int):
        super().__init__()
        self.k = k
        self.encoder = nn.Linear(D, M)
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(M, D), dim=1))
        self.encoder.weight.data.copy_(self.W_dec.data)
        self.encoder.bias.data.zero_()
        self.b_dec = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.encoder(x - self.b_dec).relu()
        acts, indices = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, indices, acts) @ self.W_dec + self.b_dec


def dense_update(
    saes: Sequence[Dense], optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]
) -> None:
    for sae, x in zip(saes, batch, strict=True):
        ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for sae in saes:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class Package:
    """Training functions of one package; `None`: it has no such part."""

    module: str
    step: Callable[[Setting, float, list[Tensor], Watch], Reconstruct] | None
    loop: Callable[[Setting, float], Reconstruct] | None
    color: str


PACKAGES = {
    "resae": Package("resae", resae_step, resae_loop, "#0072b2"),
    "resae, affine maps": Package("resae", None, resae_maps_loop, "#56b4e9"),
    "sparsify": Package("sparsify", sparsify_step, sparsify_loop, "#e69f00"),
    "SAELens": Package("sae_lens", saelens_step, saelens_loop, "#d55e00"),
    "dictionary_learning": Package(
        "dictionary_learning", dictionary_learning_step, dictionary_learning_loop, "#cc79a7"
    ),
    "dense PyTorch": Package("torch", dense_step, None, "#999999"),
}


# -- what all are given ----------------------------------------------------------------------------


def rows_of(lm: HookedLM) -> tuple[TokenRows, TokenRows]:
    return train_and_held_out(
        EMBEDDED, lm, context_tokens=CONTEXT_TOKENS, held_out_rows=HELD_OUT_ROWS
    )


def token_rows(s: Setting) -> list[Tensor]:
    """The rows that `resae train` reads, as many as the training needs."""
    from transformers import AutoTokenizer

    class Tokenizer:  # what train_and_held_out asks of a model
        name = EMBEDDED
        tokenizer = AutoTokenizer.from_pretrained(TINY_PYTHIA)

    rows: list[Tensor] = []
    tokens = 0
    for row in rows_of(Tokenizer)[0]:  # type: ignore[arg-type]
        rows.append(row)
        tokens += int((row != 0).sum())
        if tokens >= s.train_tokens:
            return rows
    raise ValueError(f"the corpus has {tokens} tokens, expected {s.train_tokens}")


def token_dataset(s: Setting) -> Any:
    """The same as a dataset, for packages that want one."""
    import datasets

    made = datasets.Dataset.from_dict({"input_ids": torch.stack(token_rows(s)).numpy()})
    return made.with_format("torch")


def save_activations(s: Setting, path: Path) -> None:
    """Save the activations of the demo's layers: for training, for the choice of learning rates,
    and for the reported numbers."""
    lm = HookedLM.from_pretrained(EMBEDDED)
    points = lm.hook_points(DEMO.layers)
    held_out = list(rows_of(lm)[1])
    half = len(held_out) // 2
    parts = {"train": token_rows(s), "choosing": held_out[:half], "reported": held_out[half:]}
    tensors: dict[str, Tensor] = {}
    for part, rows in parts.items():
        pieces = [
            capture_tokens(lm, torch.stack(rows[i : i + 16]), points)
            for i in range(0, len(rows), 16)
        ]
        for layer, piece in zip(DEMO.layers, zip(*pieces, strict=True), strict=True):
            whole = torch.cat(piece)
            tensors[f"{part}.{layer}"] = whole[: s.train_tokens] if part == "train" else whole
    save_tensors(path, tensors)


def batches(xs: list[Tensor], batch_tokens: int) -> Iterator[list[Tensor]]:
    order = torch.randperm(len(xs[0]), generator=torch.Generator().manual_seed(1))
    for i in range(len(order) // batch_tokens):
        picked = order[i * batch_tokens : (i + 1) * batch_tokens]
        yield [x[picked] for x in xs]


def fvu(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


# -- one run ---------------------------------------------------------------------------------------


class Watcher:
    """Measures FVU on the way, and keeps the time that this takes out of the account."""

    def __init__(self, s: Setting, unseen: list[Tensor]):
        self.s, self.unseen = s, unseen
        self.curve: list[tuple[int, list[float]]] = []
        self.seconds = 0.0
        self.step = 0

    def __call__(self, reconstruct: Reconstruct) -> None:
        self.step += 1
        if self.step % max(1, self.s.steps // CURVE_POINTS) == 0:
            began = time.process_time()
            found = [fvu(x, reconstruct(i, x)) for i, x in enumerate(self.unseen)]
            self.curve.append((self.step * self.s.batch_tokens, found))
            self.seconds += time.process_time() - began


def run_task(task: Task) -> dict[str, Any]:
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    if task.part == "scale":
        return step_at_scale(task.package, Scale(**json.loads(task.activations)))
    s = task.setting
    package = PACKAGES[task.package]
    for needed in (package.module, "datasets", MODEL_CODE, "resae.cli"):
        __import__(needed)  # importing is on nobody's clock
    if task.package == "dictionary_learning":
        import nnsight

        if task.part != "loop":  # what it replaces in torch as it is imported slows everything down
            nnsight.DEFAULT_PATCHER.__exit__(None, None, None)
    held = load_tensors(Path(task.activations), "activations")
    xs, choosing, reported = (
        [held[f"{part}.{layer}"] for layer in s.layers]
        for part in ("train", "choosing", "reported")
    )
    if task.part == "rates":
        assert package.step is not None
        found = {}
        for lr in RATES:
            torch.manual_seed(0)
            reconstruct = package.step(s, lr, xs, lambda _: None)
            found[lr] = fvu(choosing[0], reconstruct(0, choosing[0]))
        return {"rates": found}
    watcher = Watcher(s, reported)
    if task.part == "loop":
        del held, xs
    reset_peak()
    before, began = resident("VmRSS"), time.process_time()
    if task.part == "step":
        assert package.step is not None
        reconstruct = package.step(s, task.lr, xs, watcher if task.curve else lambda _: None)
    else:
        assert package.loop is not None
        reconstruct = package.loop(s, task.lr)
    spent = time.process_time() - began - watcher.seconds
    peak = resident("VmHWM")
    with torch.no_grad():
        if task.package == "resae, affine maps":  # its x̂ needs the other layers' activations
            found = [fvu(x, y) for x, y in zip(reported, reconstruct(-1, reported), strict=True)]  # type: ignore[arg-type]
        else:
            found = [fvu(x, reconstruct(i, x)) for i, x in enumerate(reported)]
    return {
        "tokens_per_s": s.train_tokens / spent,
        "peak_mib": peak / 2**10,
        "more_mib": (peak - before) / 2**10,
        "fvu": found,
        "curve": watcher.curve,
    }


def reset_peak() -> None:
    """The high-water mark of resident memory counts from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """KiB of resident memory: `VmRSS` now, `VmHWM` at most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def in_a_fresh_process(task: Task) -> dict[str, Any]:
    variables = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():  # sparsify takes Triton wherever installed, also on a CPU
        variables["SPARSIFY_DISABLE_TRITON"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        answer = f"{folder}/answer.json"
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--task", json.dumps(asdict(task)), "--answer", answer]
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, check=False, cwd=folder
        )
        if done.returncode:
            raise RuntimeError(f"{task.package}, {task.part}: {done.stderr[-3000:]}")
        return json.loads(Path(answer).read_text())


# -- whole processes -------------------------------------------------------------------------------

WHOLE_TOKENS = (100_352, 401_408)
WHOLE_RATES = {"resae": 1.6e-2, "sparsify": 3.2e-2}
"""The best of `RATES`, as measured by the rest of this file."""


def whole_command(package: str, s: Setting, out: Path, peer_python: str) -> list[str]:
    """The command line of one whole training."""
    layers, lr = ",".join(map(str, s.layers)), f"{WHOLE_RATES[package]:g}"
    if package == "resae":
        return (
            f"{sys.executable} -m resae train {EMBEDDED} {EMBEDDED} --layers {layers} --k {s.k} "
            f"--d-sae {s.M} --lr {lr} --train-tokens {s.train_tokens} --batch-tokens "
            f"{s.batch_tokens} --predictor none --out {out}"
        ).split()
    program = Path(__file__).parent / "train_sparsify.py"
    sizes = [s.M, s.k, lr, s.train_tokens, s.batch_tokens]
    places = [peer_python, program, TINY_PYTHIA, CORPUS, out, layers]
    return [str(word) for word in (*places, *sizes)]


def measure_whole(
    s: Setting, rounds: int, threads: int, peer_python: str, tokens: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per case and package; of each package the first run, which may fill caches, is not
    counted."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_HUB_OFFLINE": "1",
        "SPARSIFY_DISABLE_TRITON": "1",
    }
    cases = [
        replace(s, layers=layers, train_tokens=n)
        for n in tokens
        for layers in (ONE_LAYER, s.layers)
    ]
    usages: dict[tuple[int, str], list[Usage]] = {}
    for round_, (number, case), package in itertools.product(
        range(rounds + 1), enumerate(cases), WHOLE_RATES
    ):
        if round_ == 0 and number > 0:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            command = whole_command(package, case, out / "run", peer_python)
            usage = run(command, folder=out, variables=variables)
        if round_ > 0:
            usages.setdefault((number, package), []).append(usage)
        print(f"{case.train_tokens} tokens, {len(case.layers)} layers, {package}: {usage}")
    return [
        {"tokens": cases[number].train_tokens, "layers": len(cases[number].layers)}
        | {"package": package, "runs": several}
        for (number, package), several in sorted(usages.items())
    ]


def whole_table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, and how many times as long the peer takes: the median over the rounds."""
    lines = [
        "| tokens | layers | package | CPU s (least–most) | it ÷ ours, CPU | wall s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = next(
            r["runs"]
            for r in rows
            if r["package"] == "resae"
            and (r["tokens"], r["layers"]) == (row["tokens"], row["layers"])
        )
        cpu = [u.cpu for u in row["runs"]]
        ratio = statistics.median(a.cpu / b.cpu for a, b in zip(row["runs"], ours, strict=True))
        wall = statistics.median(u.wall for u in row["runs"])
        peak = statistics.median(u.peak_mib for u in row["runs"])
        lines.append(
            f"| {row['tokens']:,} | {row['layers']} | {row['package']} "
            f"| {statistics.median(cpu):.1f} ({min(cpu):.1f}–{max(cpu):.1f}) | {ratio:.2f} "
            f"| {wall:.1f} | {peak:.0f} |"
        )
    return "\n".join(lines)


# -- the step at scale -----------------------------------------------------------------------------


def step_at_scale(package: str, c: Scale) -> dict[str, Any]:
    """Milliseconds of a step of all layers in bfloat16, and on a GPU its memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(2)
    shape = (c.N, c.D)
    xs = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(c.L)]
    step = SCALE[package](c, xs, device)
    for _ in range(3):
        step()
    result: dict[str, Any] = {"peak_mib": None, "largest_mib": None}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        largest = largest_allocation(step)
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        result["largest_mib"] = largest / 2**20
        if package == "resae" and largest >= 2 * c.N * c.M:
            raise AssertionError(f"resae allocated {largest:,} bytes at once: as large as [N, M]")
    times = []
    for _ in range(c.steps):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"ms": 1e3 * statistics.median(times), **result}


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest single request for device memory during a call."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, context=None)
    try:
        call()
        torch.cuda.synchronize()
        traces: Any = torch.cuda.memory._snapshot()
        events = traces["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return max((event["size"] for event in events if event["action"] == "alloc"), default=0)


def resae_at_scale(c: Scale, xs: list[Tensor], device: str) -> Callable[[], object]:
    config = TrainConfig(
        layers=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(c.L)),
        k=(c.k,) * c.L,
        d_sae=c.M,
        predictor="none",
        train_tokens=c.N * 10**6,  # so that no latent is dead, as it is for the others
        batch_tokens=c.N,
        buffer_tokens=c.N,
        lr=1e-4,
    )
    means = [x.float().mean(0).cpu() for x in xs]
    calibration = Calibration(AffinePredictor("none"), [1.0] * c.L, means)
    state = initial_state(config, calibration, None, device)
    state.stack.to(torch.bfloat16)
    return lambda: train_step(state, config, xs)


def sparsify_at_scale(c: Scale, xs: list[Tensor], device: str) -> Callable[[], object]:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=c.M, k=c.k)
    coders = [SparseCoder(c.D, config, device=device, dtype=torch.bfloat16) for _ in xs]
    parameters = [p for coder in coders for p in coder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        for coder, x in zip(coders, xs, strict=True):
            coder.set_decoder_norm_to_unit_norm()
            coder(x).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense_at_scale(c: Scale, xs: list[Tensor], device: str) -> Callable[[], object]:
    with torch.device(device):
        saes = [Dense(c.D, c.M, c.k).to(torch.bfloat16) for _ in xs]
    optimizer = torch.optim.Adam([p for sae in saes for p in sae.parameters()], lr=1e-4, fused=True)
    return lambda: dense_update(saes, optimizer, xs)


SCALE = {"resae": resae_at_scale, "sparsify": sparsify_at_scale, "dense PyTorch": dense_at_scale}


# -- all runs --------------------------------------------------------------------------------------


def installed(package: str) -> bool:
    return bool(find_spec(PACKAGES[package].module))


def measure(
    s: Setting, rounds: int, threads: int, *, dry: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, and the learning rate of each package; dry: one rate, one case."""
    names = [name for name in PACKAGES if installed(name)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.safetensors"
        save_activations(s, path)
        given = {"threads": threads, "activations": str(path)}
        one = replace(s, layers=ONE_LAYER)
        rates: dict[str, float] = {}
        for name in names:
            if dry:
                rates[name] = RATES[0]
            elif PACKAGES[name].step is not None:
                found = in_a_fresh_process(Task(name, "rates", one, 0.0, **given))["rates"]
                rates[name] = float(min(found, key=found.get))
                print(f"{name}: FVU by learning rate {found}", flush=True)
        rates["resae, affine maps"] = rates["resae"]
        runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for round_ in range(rounds):
            for part, setting in itertools.product(("step", "loop"), (one,) if dry else (one, s)):
                for name in names:
                    package = PACKAGES[name]
                    if (package.step if part == "step" else package.loop) is None:
                        continue
                    if name == "resae, affine maps" and len(setting.layers) == 1:
                        continue
                    ours = runs.get((part, "resae", len(setting.layers)))
                    its = runs.get((part, name, len(setting.layers)))
                    if ours and its and 3 * its[0]["tokens_per_s"] < ours[0]["tokens_per_s"]:
                        continue
                    task = Task(name, part, setting, rates[name], **given, curve=round_ == 0)
                    began = time.perf_counter()
                    result = in_a_fresh_process(task)
                    runs.setdefault((part, name, len(setting.layers)), []).append(result)
                    print(
                        f"round {round_ + 1}/{rounds} {part} {name}, {len(setting.layers)} layers: "
                        f"{result['tokens_per_s']:.0f} tokens/s, FVU "
                        f"{_several(result['fvu'])}; {time.perf_counter() - began:.0f} s",
                        flush=True,
                    )
    rows = []
    for (part, name, layers), results in sorted(runs.items(), key=_order):
        speed = [r["tokens_per_s"] for r in results]
        rows.append(
            {
                "part": part,
                "layers": layers,
                "package": name,
                "lr": rates[name],
                "tokens_per_s": statistics.median(speed),
                "runs": len(results),
                "slowest": min(speed),
                "fastest": max(speed),
                "peak_mib": statistics.median(r["peak_mib"] for r in results),
                "more_mib": statistics.median(r["more_mib"] for r in results),
                "fvu": _several(results[0]["fvu"]),
                "curve": json.dumps(results[0]["curve"]),
            }
        )
    for row in rows:
        ours = next(r for r in rows if _case(r) == _case(row) and r["package"] == "resae")
        row["ours_over_it"] = ours["tokens_per_s"] / row["tokens_per_s"]
    return rows, rates


def _several(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _case(row: dict[str, Any]) -> tuple[str, int]:
    return row["part"], row["layers"]


def _order(item: tuple[tuple[str, str, int], Any]) -> tuple[str, int, int]:
    part, name, layers = item[0]
    return part, layers, list(PACKAGES).index(name)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Per case: ours against the fastest peer."""
    said = []
    for part, layers in dict.fromkeys(_case(row) for row in rows):
        case = [row for row in rows if _case(row) == (part, layers)]
        peers = [r for r in case if not r["package"].startswith(("resae", "dense"))]
        if peers:
            best = min(peers, key=lambda r: r["ours_over_it"])
            said.append(
                f"{part}, {layers} layer{'s' * (layers > 1)}: {best['ours_over_it']:.2f} times the "
                f"tokens/s of the fastest peer ({best['package']}); FVU {case[0]['fvu']} against "
                f"{best['fvu']}"
            )
    return said


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| part | layers | package | lr | tokens/s (slowest–fastest; runs) | ours ÷ it | peak MiB "
        "| of it in training | FVU per layer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        speed = f"{r['tokens_per_s']:,.0f} ({r['slowest']:,.0f}–{r['fastest']:,.0f}; {r['runs']})"
        lines.append(
            f"| {r['part']} | {r['layers']} | {r['package']} | {r['lr']:g} | {speed} "
            f"| {r['ours_over_it']:.2f} | {r['peak_mib']:.0f} | {r['more_mib']:.0f} | {r['fvu']} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """FVU against tokens (the step, one layer), and tokens per second of the whole loop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        curve = json.loads(row["curve"])
        if curve and _case(row) == ("step", 1):
            tokens, found = zip(*((t / 1e3, values[0]) for t, values in curve), strict=True)
            name, package = row["package"], PACKAGES[row["package"]]
            left.plot(tokens, found, color=package.color, marker=".", label=name)
    left.set(xlabel="thousand tokens", ylabel="FVU on held-out text")
    left.set_title("the same activations, block 3", fontsize=10)
    left.legend(fontsize=7, frameon=False)
    bars = [r for r in rows if r["part"] == "loop"]
    for y, row in enumerate(bars):
        color = PACKAGES[row["package"]].color
        bar = right.barh(y, row["tokens_per_s"], 0.8, color=color)
        right.bar_label(bar, [f" {row['tokens_per_s']:,.0f}"], fontsize=7)
    names = [f"{r['package']}, {r['layers']} layer{'s' * (r['layers'] > 1)}" for r in bars]
    right.set_yticks(range(len(bars)), names, fontsize=7)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.locator_params(axis="x", nbins=4)
    right.set_xlabel("tokens per second, one core")
    right.set_title("the whole loop", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg"))


def measure_scale(c: Scale, rounds: int, threads: int) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name in SCALE:
            if installed(name):
                task = Task(name, "scale", DEMO, 0.0, threads, json.dumps(asdict(c)))
                runs.setdefault(name, []).append(in_a_fresh_process(task))
                print(f"scale {name}: {runs[name][-1]}", flush=True)
    ours = statistics.median(r["ms"] for r in runs["resae"])
    rows = []
    for name, results in runs.items():
        ms = statistics.median(r["ms"] for r in results)
        rest = {key: results[0][key] for key in ("peak_mib", "largest_mib")}
        rows.append({"package": name, **asdict(c), "ms": ms, "it_over_ours": ms / ours, **rest})
    return rows


def scale_table(rows: Sequence[dict[str, Any]]) -> str:
    c = rows[0]
    lines = [
        f"The step alone, bfloat16, N = {c['N']}, D = {c['D']}, M = {c['M']}, k = {c['k']}, "
        f"{c['L']} layers:\n",
        "| package | ms per step | ÷ ours | peak MiB | largest allocation, MiB |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        memory = [f"{r[key]:.0f}" if r[key] else "–" for key in ("peak_mib", "largest_mib")]
        lines.append(
            f"| {r['package']} | {r['ms']:.1f} | {r['it_over_ours']:.2f} | {' | '.join(memory)} |"
        )
    return "\n".join(lines)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="a few steps: does everything run?")
    parser.add_argument(
        "--whole-process", action="store_true", help="only whole processes, start-up included"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="with sparsify installed")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.task:
        given = json.loads(o.task)
        given["setting"]["layers"] = tuple(given["setting"]["layers"])
        given["setting"] = Setting(**given["setting"])
        o.answer.write_text(json.dumps(run_task(Task(**given))))
        return 0
    if o.out is None:
        parser.error("--out: a directory for the results")
    on_gpu = torch.cuda.is_available()
    rounds = 1 if o.dry else o.rounds
    facts: dict[str, Any] = environment() | {"commit": commit(), "peers": peer_versions()}
    text: list[str] = []
    if o.whole_process:
        tokens = (2_048,) if o.dry else WHOLE_TOKENS
        whole = whole_table(measure_whole(DEMO, rounds, o.threads, o.peer_python, tokens))
        facts |= {"setting": asdict(DEMO), "threads": o.threads, "rounds": rounds}
        facts |= {"lr": WHOLE_RATES}
        heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        page = f"# Training, whole processes\n\n{heading}\n\n{whole}\n"
        write_atomically(o.out / "train_whole.md", lambda temporary: temporary.write_text(page))
        print(whole)
        return 0
    if o.dry or not on_gpu:
        s = replace(DEMO, train_tokens=2_048) if o.dry else DEMO
        rows, rates = measure(s, rounds, o.threads, dry=o.dry)
        facts |= {"setting": asdict(s), "threads": o.threads, "rounds": rounds, "lr": rates}
        text += ["", *(f"- {line}" for line in verdicts(rows)), "", table(rows)]
        write_csv(rows, o.out / "train.csv")
        if find_spec("matplotlib"):
            draw(rows, o.out / "train.svg")
    if o.dry or on_gpu:
        large = measure_scale(DRY if o.dry else LARGE, rounds, o.threads)
        text += ["", scale_table(large)]
        write_csv(large, o.out / "train_scale.csv")
    heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    page = f"# Training\n\n{heading}\n" + "\n".join(text) + "\n"
    write_atomically(o.out / "train.md", lambda temporary: temporary.write_text(page))
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
