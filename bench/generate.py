"""Cost of replacing layers during generation: tokens per second against plain generation.

    python bench/generate.py --out DIR [--setting NAME …] [--batch B …] [--compile]

Models have the real architectures with random weights (their speed does not depend on what they
know): `tiny` (the embedded one), `pythia-160m`, `pythia-1.4b`, `gemma-2-9b`. The weights of
`smollm2-135m` and `gemma-3-270m` are the real ones, fetched by `bench/real_models.py`. Greedy, with
a cache, every provider in turns (or those of `--provider`):

    plain                   `model.generate`
    resae                   `model.generate` inside `replacement`, with maps between the layers
    plain compiled          `resae.DecodeLoop`: static cache, compiled step
    resae compiled          the same inside `replacement`
    hooks, dense PyTorch    `model.generate` with forward hooks written by hand, `[N, M]` codes
    hooks, sparsify         the same hooks around eai-sparsify's autoencoders
    hooks, SAELens          the same hooks around SAELens' autoencoders
    SAELens' model          Pythia: its HookedSAETransformer with the same weights, its `generate`

The last four replace by raw autoencoders of the same sizes; they have no maps. Before any timing,
their logits must be those of `replacement` with the same raw autoencoders, in float32 with the
embedded model: in bfloat16 scores tie, and each takes other latents of equal score. Columns: time
to the first token, tokens per second after it, the ratio to the plain one of the same kind, peak
memory on a GPU (SAELens' model is a second copy, made and freed each round). Medians of interleaved
rounds. Writes `generate.md`, `generate.csv` and, of the ratios, `generate.svg`.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ops import commit, peer_versions
from real_models import SOURCES, find
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

from resae import DecodeLoop, HookedLM, ReSAE, replacement
from resae.environment import environment
from resae.models.hooked import EMBEDDED
from resae.sae.topk import TopKSAE as OurTopKSAE
from resae.stack.affine import AffinePredictor
from resae.stack.stack import new_stack
from resae.storage import save_json, write_atomically


@dataclass(frozen=True)
class Setting:
    """A model, and what is replaced in it."""

    model: str
    layers: tuple[int, ...]
    M: int
    k: int


SETTINGS = {
    "tiny": Setting("tiny", (1, 3, 5), 512, 8),
    "pythia-160m": Setting("pythia-160m", (3, 6, 9), 24576, 32),
    "pythia-1.4b": Setting("pythia-1.4b", (5, 10, 15, 20), 16384, 64),
    "pythia-1.4b 64k": Setting("pythia-1.4b", (5, 10, 15, 20), 65536, 64),
    "gemma-2-9b": Setting("gemma-2-9b", (9, 18, 27, 36), 16384, 64),
    "gemma-2-9b 128k": Setting("gemma-2-9b", (9, 18, 27, 36), 131072, 64),
    "smollm2-135m": Setting("smollm2-135m", (7, 15, 23), 4608, 32),
    "gemma-3-270m": Setting("gemma-3-270m", (5, 9, 13), 5120, 32),
}
REAL_SETTINGS = tuple(SOURCES)
CPU_SETTINGS = ("tiny", "pythia-160m")
GPU_SETTINGS = tuple(n for n in SETTINGS if n not in (*CPU_SETTINGS, *REAL_SETTINGS))


def pythia(width: int, layers: int) -> GPTNeoXConfig:
    """Config of https://huggingface.co/EleutherAI/pythia-160m and -1.4b."""
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width < 2048 else 16,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        rotary_pct=0.25,  # pyright: ignore[reportCallIssue]  (a base class takes it)
    )


def language_model(name: str, device: torch.device, dtype: torch.dtype) -> HookedLM:
    if name == "tiny":
        return HookedLM.from_pretrained(EMBEDDED, device=device, dtype=dtype)
    if name in SOURCES:
        lm = HookedLM.from_pretrained(str(find(name)), device=device, dtype=dtype)
        return HookedLM(lm.model, lm.tokenizer, name)
    # Gemma2Config's defaults are those of the 9B model.
    config = {
        "pythia-160m": lambda: pythia(768, 12),
        "pythia-1.4b": lambda: pythia(2048, 24),
        "gemma-2-9b": Gemma2Config,
    }[name]()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return HookedLM(model.eval(), None, name)


def stack_of(lm: HookedLM, setting: Setting, *, chained: bool) -> ReSAE:
    """Untrained autoencoders; maps close to the identity, or none."""
    D, maps = lm.d_model, len(setting.layers) - 1
    predictor = AffinePredictor("none")
    if chained:
        predictor = AffinePredictor("previous", [torch.eye(D)] * maps, [torch.zeros(D)] * maps)
    stack = new_stack(
        [f"blocks.{layer}.hook_resid_post" for layer in setting.layers],
        predictor,
        d_in=D,
        d_sae=setting.M,
        k=(setting.k,) * len(setting.layers),
    )
    dtype = next(lm.model.parameters()).dtype
    return stack.to(lm.device, dtype).eval().requires_grad_(False)


# -- the same with hooks, as people write them -----------------------------------------------------

Autoencoder = Callable[[Tensor], Tensor]
"""Activations `[N, D]` to reconstructions."""


def dense(stack: ReSAE, layer: int) -> Autoencoder:
    sae = stack.sae(layer)
    assert isinstance(sae, OurTopKSAE)
    weight, bias, W_dec, b_dec = sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec

    def reconstruct(x: Tensor) -> Tensor:
        scores = torch.relu(nn.functional.linear(x - b_dec, weight, bias))
        acts, indices = scores.topk(sae.config.k, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, indices, acts) @ W_dec + b_dec

    return reconstruct


def sparsify(stack: ReSAE, layer: int) -> Autoencoder:
    if not stack.sae(0).W_dec.is_cuda:  # by itself it takes Triton wherever that is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    sae = stack.sae(layer)
    config = SparseCoderConfig(num_latents=sae.config.d_sae, k=sae.config.k)
    coder = SparseCoder(sae.config.d_in, config, device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    coder.load_state_dict(sae.state_dict())

    def reconstruct(x: Tensor) -> Tensor:
        acts, indices, _ = coder.encode(x)
        return coder.decode(acts, indices)

    return reconstruct


def saelens(stack: ReSAE, layer: int) -> Autoencoder:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    peer = as_saelens(stack, layer, TopKTrainingSAE, TopKTrainingSAEConfig)
    return lambda x: peer.decode(peer.encode(x))


def as_saelens(stack: ReSAE, layer: int, kind: type, config: type, **options: Any) -> Any:
    """One of our autoencoders as one of SAELens' classes."""
    sae = stack.sae(layer)
    peer = kind(
        config(
            d_in=sae.config.d_in,
            d_sae=sae.config.d_sae,
            k=sae.config.k,
            dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            device=str(sae.W_dec.device),
            rescale_acts_by_decoder_norm=False,
            **options,
        )
    )
    peer.load_state_dict(
        {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    )
    return peer


@contextmanager
def saelens_model(lm: HookedLM, stack: ReSAE) -> Iterator[Any]:
    """SAELens' hooked model with our model's weights, and the autoencoders in place of the streams
    at its hook points."""
    from sae_lens import HookedSAETransformer, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformer_lens import HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading

    with TemporaryDirectory() as folder:  # it reads configurations from the hub or from one
        description = lm.config.to_dict() | {"architectures": [type(lm.model).__name__]}
        save_json(Path(folder) / "config.json", description)
        fields = loading.convert_hf_model_config(folder)
    fields |= {"tokenizer_name": None, "dtype": next(lm.model.parameters()).dtype}
    config = HookedTransformerConfig(**fields, device=str(lm.device), init_weights=False)
    with torch.no_grad():
        model = HookedSAETransformer(config)
        weights = loading.convert_neox_weights(lm.model, config)
        model.load_state_dict(model.fill_missing_keys(weights), strict=False)
    del weights
    saes = [
        as_saelens(stack, layer, TopKSAE, TopKSAEConfig, metadata=SAEMetadata(hook_name=name))
        for layer, name in enumerate(stack.hook_points)
    ]
    with model.saes(saes=saes, use_error_term=False):
        yield model


HOOKED: dict[str, tuple[str | None, Callable[[ReSAE, int], Autoencoder]]] = {
    "hooks, dense PyTorch": (None, dense),
    "hooks, sparsify": ("sparsify", sparsify),
    "hooks, SAELens": ("sae_lens", saelens),
}


@contextmanager
def hooks(lm: HookedLM, stack: ReSAE, make: Callable[[ReSAE, int], Autoencoder]) -> Iterator[None]:
    """Forward hooks on the blocks whose output is replaced."""
    with ExitStack() as handles:
        for layer, point in enumerate(lm.hook_points(stack.hook_points)):
            reconstruct = make(stack, layer)

            def hook(_module: nn.Module, _args: Any, output: Any, reconstruct=reconstruct) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                new = reconstruct(stream.flatten(0, 1)).view_as(stream)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handles.callback(lm.blocks[point.layer].register_forward_hook(hook).remove)
        yield


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """A way to generate: inside which context, and by what."""

    name: str
    context: Callable[[], AbstractContextManager]
    write: Callable[[Tensor, int], Tensor]
    """Prompt ids `[B, T]` and a number of new tokens to the new tokens."""
    plain: str
    """The provider whose speed its own is divided by."""
    logits: Callable[[Tensor], Tensor] | None = None
    """Inside its context, of ids `[B, T]`; None where there is nothing to check."""


def providers(lm: HookedLM, setting: Setting, *, length: int, compile: bool) -> list[Provider]:
    chained, raw = (stack_of(lm, setting, chained=c) for c in (True, False))

    def generate(ids: Tensor, new: int) -> Tensor:
        out = lm.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :]

    def replaced() -> AbstractContextManager:
        return replacement(lm, chained)

    made = [
        Provider("plain", nullcontext, generate, "plain"),
        Provider("resae", replaced, generate, "plain"),
    ]
    if compile:
        for name, context in (("plain compiled", nullcontext), ("resae compiled", replaced)):
            # A graph of its own for each: one is compiled replaced, the other is not.
            loop = DecodeLoop(lm, max_length=length, compile=True)
            write = lambda ids, new, loop=loop: loop(ids, max_new_tokens=new)  # noqa: E731
            made.append(Provider(name, context, write, "plain compiled"))
    for name, (package, make) in HOOKED.items():
        if package is None or find_spec(package):
            context = lambda make=make: hooks(lm, raw, make)  # noqa: E731
            made.append(Provider(name, context, generate, "plain", lm.logits))
    if find_spec("sae_lens") and lm.config.model_type == "gpt_neox":
        running: list[Any] = []  # SAELens' model, while there is one

        @contextmanager
        def converted() -> Iterator[None]:
            with saelens_model(lm, raw) as model:
                running.append(model)
                try:
                    yield
                finally:
                    running.clear()

        def write_hooked(ids: Tensor, new: int) -> Tensor:
            out = running[0].generate(
                ids,
                max_new_tokens=new,
                do_sample=False,
                stop_at_eos=False,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
            return out[:, ids.shape[1] :]

        own = Provider("SAELens' model", converted, write_hooked, "plain", lambda x: running[0](x))
        made.append(own)
    return made


def chosen(made: list[Provider], names: list[str] | None) -> list[Provider]:
    """The providers of these names and the plain ones that they are divided by; None: all."""
    if names is None:
        return made
    if unknown := set(names) - {provider.name for provider in made}:
        there = ", ".join(provider.name for provider in made)
        raise ValueError(f"--provider: no {', '.join(sorted(unknown))}; there are {there}")
    wanted = {*names, *(provider.plain for provider in made if provider.name in names)}
    return [provider for provider in made if provider.name in wanted]


def check(device: torch.device) -> None:
    """Raise ValueError unless every hooked provider gives the logits of `replacement`."""
    lm, setting = language_model("tiny", device, torch.float32), SETTINGS["tiny"]
    ids = torch.randint(10, lm.config.vocab_size, (2, 9), device=device)
    with replacement(lm, stack_of(lm, setting, chained=False), replace_special=True):
        expected = lm.logits(ids)
    for provider in providers(lm, setting, length=0, compile=False):
        if provider.logits is None:
            continue
        with provider.context(), torch.no_grad():
            error = float((provider.logits(ids) - expected).norm() / expected.norm())
        if not error < 1e-3:
            raise ValueError(f"generate: {provider.name} is off by {error:.2e}, expected 1e-3")


def measure(
    lm: HookedLM, made: list[Provider], *, batch: int, prompt: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    """Seconds to the first token and per later token of every provider, in turns."""
    ids = torch.randint(10, lm.config.vocab_size, (batch, prompt), device=lm.device)
    times: dict[str, list[tuple[float, float]]] = {provider.name: [] for provider in made}
    peaks: dict[str, float | None] = dict.fromkeys(times)
    on_gpu = lm.device.type == "cuda"
    for round_ in range(-1, rounds):  # the first one warms up: it compiles
        for provider in made:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with provider.context(), torch.no_grad():
                first = seconds(lambda p=provider: p.write(ids, 1), on_gpu)
                whole = seconds(lambda p=provider: p.write(ids, new), on_gpu)
            if round_ >= 0:
                times[provider.name].append((first, (whole - first) / (new - 1)))
                if on_gpu:
                    peaks[provider.name] = torch.cuda.max_memory_allocated() / 2**20
    per_token = {name: statistics.median(t for _, t in taken) for name, taken in times.items()}
    return [
        {
            "provider": provider.name,
            "first_token_ms": 1e3 * statistics.median(f for f, _ in times[provider.name]),
            "tokens_per_s": batch / per_token[provider.name],
            "ratio": per_token[provider.plain] / per_token[provider.name],
            "peak_mib": peaks[provider.name],
        }
        for provider in made
    ]


def seconds(call: Callable[[], Any], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | batch | provider | first token, ms | tokens/s | ÷ plain | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        speed = f"{row['first_token_ms']:.1f} | {row['tokens_per_s']:.1f} | {row['ratio']:.2f}"
        lines.append(
            f"| {row['setting']} | {row['batch']} | {row['provider']} | {speed} | {peak} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratios to plain generation: a panel per setting and batch, a bar per provider."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["provider"].startswith("plain"):
            panels.setdefault(f"{row['setting']}, batch {row['batch']}", []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    bars = max(map(len, panels.values()))
    figure = Figure(figsize=(4.4 * columns, lines * (0.8 + 0.3 * bars)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        names = [row["provider"] for row in panel]
        colors = ["#0072b2" if name.startswith("resae") else "#e69f00" for name in names]
        drawn = axis.barh(names, [row["ratio"] for row in panel], color=colors, height=0.7)
        axis.bar_label(drawn, fmt="%.2f", label_type="center", color="white", weight="bold")
        axis.axvline(1, color="#555555", linewidth=0.8)
        axis.set_xlim(0, 1.05 * max(1.0, *(row["ratio"] for row in rows)))
        axis.invert_yaxis()
        axis.set_title(title, fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens per second ÷ plain generation of the same kind", fontsize="medium")
    with matplotlib.rc_context({"svg.hashsalt": "generate"}):
        write_atomically(path, lambda to: figure.savefig(to, format="svg", metadata={"Date": None}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, help="default: by device")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=17, help="tokens written after the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also on a CPU; on a GPU always")
    parser.add_argument("--provider", nargs="+", help="only these, and those they are divided by")
    parser.add_argument("--dry", action="store_true", help="the tiny model, two rounds")
    options = parser.parse_args()
    if options.new < 2:
        parser.error("--new: at least 2, the first and one after it")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    names = options.setting or (GPU_SETTINGS if on_gpu else CPU_SETTINGS)
    if options.dry:
        names, options.rounds = ["tiny"], 2
    check(device)
    rows: list[dict[str, Any]] = []
    for name in names:
        setting = SETTINGS[name]
        print(f"{name}: layers {setting.layers}, M = {setting.M}, k = {setting.k}", flush=True)
        lm = language_model(setting.model, device, torch.bfloat16 if on_gpu else torch.float32)
        length = options.prompt + options.new
        for batch in options.batch:
            made = providers(lm, setting, length=length, compile=on_gpu or options.compile)
            made = chosen(made, options.provider)
            measured = measure(
                lm,
                made,
                batch=batch,
                prompt=options.prompt,
                new=options.new,
                rounds=options.rounds,
            )
            rows += [{"setting": name, "batch": batch, **row} for row in measured]
            print(table(rows[-len(measured) :]), flush=True)
        del lm
    facts = environment() | {
        "commit": commit(),
        "peers": peer_versions(),
        "prompt": options.prompt,
        "new tokens": options.new,
        "rounds": options.rounds,
    }
    heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    text = f"# Generation\n\n{heading}\n\n{table(rows)}\n"
    write_atomically(options.out / "generate.md", lambda temporary: temporary.write_text(text))

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(options.out / "generate.csv", write_csv)
    draw(rows, options.out / "generate.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
