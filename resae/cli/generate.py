"""Continue a prompt with and without the layers replaced."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from resae.arguments import filled, real, whole
from resae.arguments import seed as seed_number
from resae.choices import Loop
from resae.cli.terminal import TerminalConsole
from resae.data.config import Machine
from resae.settings import Shown

if TYPE_CHECKING:
    from resae.models.hooked import HookedLM
    from resae.replacements.edits import Interventions, StrongestLatents
    from resae.replacements.generation import Generated
    from resae.stack.stack import ReSAE


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Text."""

    run_directory: Annotated[str, filled, Shown("RUN", positional=True)]
    """A run directory, or a stack on the hub, owner/name or owner/name@revision."""
    prompt: str
    """Text to continue."""
    max_new_tokens: Annotated[int, whole(1)] = 64
    """Number of tokens to write."""
    temperature: Annotated[float, real(least=0)] = 0.8
    """Sampling temperature; 0: the most likely token."""
    seed: Annotated[int, seed_number] = 0
    """Seed of the sampling."""
    loop: Annotated[str, Loop] = "closed"
    """Residuals are taken against predictions from reconstructions (closed) or from the activations
    that they replaced (open)."""
    intervene: Annotated[str | None, filled, Shown("FILE|JSON")] = None
    """Edit latents meanwhile: [{"layer": 3, "action": "ablate", "latents": [17, 40]}, …], actions
    ablate, clamp, scale, add; see resae.Interventions."""
    show_latents: Annotated[int | None, whole(1), Shown("N")] = None
    """Print the N strongest latents of each new token."""
    fast: bool = False
    """Write the same text with a static cache and, on a GPU, a compiled step."""
    model: Annotated[str | None, filled] = None
    """Another path of the same model."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: the commit that the run was trained
    on."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.environment import describe_device, find_device
    from resae.models.hooked import HookedLM
    from resae.replacements.edits import ActiveEdits, Interventions, StrongestLatents
    from resae.replacements.generation import generate, prompt_ids
    from resae.training.pipeline import load_model
    from resae.training.runs import model_of, open_run

    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    record, stack = open_run(options.run_directory, device)
    asked = None if options.intervene is None else Interventions.parse(options.intervene)
    if asked is not None:
        ActiveEdits(asked, stack, stack.hook_points)  # raises for latents that there are not
    quiet_libraries()
    name, revision = model_of(record, stack, options.model, options.revision)
    shapes = HookedLM.described(name, tokenizer=True, revision=revision)
    stack.require_model(shapes)
    prompt_ids(shapes, options.prompt, options.max_new_tokens)  # raises where they do not fit
    lm = load_model(name, options.dtype, device, revision)
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "fast": options.fast,
    }
    plain = generate(lm, options.prompt, **settings)
    console.log("— nothing replaced —")
    console.result(options.prompt + plain.text)
    settings["loop"] = options.loop
    keep = StrongestLatents(options.show_latents) if options.show_latents else None
    replaced = generate(
        lm, options.prompt, stack, on_codes=keep if asked is None else None, **settings
    )
    console.log(f"— {stack.n_layers} layers replaced online, {options.loop} loop —")
    console.result(options.prompt + replaced.text)
    if asked is not None:
        replaced = generate(
            lm, options.prompt, stack, interventions=asked, on_codes=keep, **settings
        )
        error = "error kept" if asked.keep_error else "error left out"
        console.log(f"— and latents edited, {error}, effects {asked.effects} —")
        console.result(options.prompt + replaced.text)
    for count in replaced.counts:
        console.log(
            f"{count.hook_point}: {count.calls} forward passes, {count.replaced} tokens replaced, "
            f"{count.skipped} special tokens and {count.sinks} sinks left alone"
        )
    for edit, name, changed in replaced.edits:
        console.log(f"{name}: {edit}: {sum(changed.values())} changes")
    if asked is not None:
        _print_effects(console, lm, stack, replaced, asked, options.loop)
    if keep is not None:
        _print_latents(console, lm, replaced, keep)
    return 0


def _print_effects(
    console: TerminalConsole,
    lm: "HookedLM",
    stack: "ReSAE",
    written: "Generated",
    asked: "Interventions",
    loop: str,
) -> None:
    """Print measured and predicted effects of the edits on later layers in the generated text."""
    import torch

    from resae.evaluation.effects import edit_effects

    ids = torch.tensor([written.ids])
    prompt = len(written.ids) - written.tokens
    for row in edit_effects(lm, stack, ids, asked, prompt_tokens=prompt, loop=loop):
        console.log(
            f"{row.hook_point}: change arriving here: cosine with prediction "
            f"{row.cosine:.3f}, predicted/actual norm {row.norm_ratio:.3f} "
            f"({row.tokens} tokens)"
        )


def _print_latents(
    console: TerminalConsole, lm: "HookedLM", written: "Generated", keep: "StrongestLatents"
) -> None:
    """A line per new token: its strongest latents, layer by layer."""
    first, codes = len(written.ids) - written.tokens, keep.codes
    console.log("latent:act of each new token (the last was written but not read)")
    for position, token in enumerate(written.ids[first:-1], start=first):
        layers = []
        for name, (acts, indices) in codes.items():
            pairs = zip(indices[0, position].tolist(), acts[0, position].tolist(), strict=True)
            block = name.removeprefix("blocks.").partition(".")[0]
            layers.append(f"{block}| " + " ".join(f"{j}:{act:.2f}" for j, act in pairs if act))
        console.log(f"{lm.tokenizer.decode([token])!r:<16}{'  '.join(layers)}")
