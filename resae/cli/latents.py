"""Show each latent: the text it fires on, its effects, its nearest relatives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from resae.arguments import filled, whole, whole_numbers, writable
from resae.choices import Loop
from resae.cli.terminal import TerminalConsole
from resae.data.config import TEXT_SETTINGS, Machine, Source, source_defaults
from resae.environment import describe_device, find_device
from resae.settings import Shown

if TYPE_CHECKING:
    import torch

    from resae.latents.index import LatentIndex
    from resae.latents.prompt import PromptLatents
    from resae.latents.records import LatentCard, LatentReport
    from resae.models.hooked import HookedLM
    from resae.stack.stack import ReSAE

TEXT = source_defaults(*TEXT_SETTINGS)
"""Defaults of the settings of the text that neither the command nor the run gives."""
TOKENS = 1_000_000
SAVE_SECONDS = 60.0
"""Seconds of work that a kill can lose."""
BATCH_SECONDS = 2.0
"""Batches grow while they take less: after each progress is reported, and a Ctrl-C heard."""


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Latents."""

    run_directory: Annotated[str, filled, Shown("RUN", positional=True)]
    """A run directory, or a stack on the hub, owner/name or owner/name@revision."""
    layer: Annotated[str | None, filled] = None
    """Block number or hook point of the latents to show; needs --latent."""
    latent: Annotated[tuple[int, ...] | None, whole_numbers, Shown("J,…")] = None
    """Numbers of the latents to show, for example 17,40; None: a selection from rare to
    frequent."""
    prompt: str | None = None
    """Show the strongest latents of each token of this text."""
    strongest: Annotated[int, whole(1)] = 3
    """Latents per token and layer of the prompt."""
    page_latents: Annotated[int, whole(1)] = 1500
    """Most latents on the page; a selection is spread from rare to frequent."""
    ablate: bool = False
    """Measure what ablating each latent on the page costs; always done for those that --latent
    names."""
    neuronpedia: bool = False
    """Also write the cards as SAEDashboard writes them for Neuronpedia."""
    json: bool = False
    """Print the cards as JSON; progress goes to standard error."""
    out: Annotated[str | None, writable] = None
    """Folder to write into; None: `latents` in the run."""
    tokens: Annotated[int | None, whole(1)] = None
    """Tokens of text to read; None: as many as were read before, otherwise 1,000,000. An index of
    fewer is continued."""
    again: bool = False
    """Read the text anew, whatever was read before."""
    passages: Annotated[int, whole(1)] = 8
    """Strongest passages kept per latent."""
    samples: Annotated[int, whole(0)] = 4
    """Random passages kept per latent."""
    window: Annotated[int, whole(1)] = 32
    """Tokens of a passage; at most those of a row."""
    loop: Annotated[str | None, Loop] = None
    """Residuals are taken against predictions from true activations (open, as in training) or from
    reconstructions (closed); None: open."""
    model: Annotated[str | None, filled] = None
    """Another path of the same model."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: the commit that the run was trained
    on."""
    data: Annotated[str | None, filled] = None
    """Text to read; None: that of the training."""
    data_revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of a hub dataset; None: as in the run."""
    split: Annotated[str | None, filled] = None
    """Split of the data; None: as in the run."""
    encoding: Annotated[str | None, filled] = None
    """Encoding of local text files; None: as in the run."""
    text_column: Annotated[str | None, filled] = None
    """Column of the data that holds the text; None: as in the run."""
    streaming: bool | None = None
    """Read the data while it downloads."""
    context_tokens: Annotated[int | None, whole(2)] = None
    """Tokens per row; None: as in the run."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.models.hooked import HookedLM
    from resae.storage import locked
    from resae.training.pipeline import load_model
    from resae.training.runs import folder_beside, model_of, open_run

    if options.json:
        console.report_to_stderr()
    if options.latent is not None and options.layer is None:
        raise ValueError("--latent needs --layer: a block number or hook point of the run")
    if options.layer is not None and options.latent is None:
        raise ValueError("--layer needs --latent: numbers of latents, for example 17,40")
    if options.prompt is not None and not options.prompt.strip():
        raise ValueError("--prompt is empty; give some text")
    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    out = folder_beside(options.run_directory, options.out, "latents")
    record, stack = open_run(options.run_directory, device)
    quiet_libraries()
    name, revision = model_of(record, stack, options.model, options.revision)
    shapes = HookedLM.described(name, tokenizer=None, revision=revision)
    stack.require_model(shapes)
    named = _named(options, stack, shapes)
    ids = _prompt_ids(options, shapes)
    with locked(out):
        index = _index_so_far(options, record, stack, out / "index.safetensors")
        lm = load_model(name, options.dtype, device, revision)
        if not _read_text(options, lm, stack, index, out / "index.safetensors", console):
            console.log("stopped; what was read is kept, the same command continues it")
            return 130
        report, prompt = _described(options, lm, stack, index, named, ids, console)
        _write(options, lm, out, report, prompt, console)
    return 0


def _named(options: Options, stack: ReSAE, shapes: HookedLM) -> list[tuple[int, int]] | None:
    """The latents that --layer and --latent name, as pairs (selected layer, latent)."""
    from resae.latents.cards import require_latent

    if options.layer is None or options.latent is None:
        return None
    point = shapes.hook_point(options.layer).name
    if point not in stack.hook_points:
        raise ValueError(
            f"--layer {options.layer}: the run has no autoencoder at {point}; it has "
            f"{', '.join(stack.hook_points)}"
        )
    layer = stack.hook_points.index(point)
    for latent in options.latent:
        require_latent(stack, layer, latent)
    return [(layer, latent) for latent in options.latent]


def _prompt_ids(options: Options, shapes: HookedLM) -> torch.Tensor | None:
    import torch

    from resae.replacements.generation import prompt_ids

    if options.prompt is None:
        return None
    return torch.tensor(prompt_ids(shapes, options.prompt, 0))


def _index_so_far(
    options: Options, record: dict[str, Any], stack: ReSAE, path: Path
) -> LatentIndex:
    """The index on disk, if it is of this stack and these settings, or an empty one."""
    from resae.latents.cards import require_index_of
    from resae.latents.index import IndexSizes, LatentIndex, fingerprint

    asked = {name: getattr(options, name) for name in (*TEXT, "loop")}
    stack_hash = fingerprint(stack)
    if path.exists() and not options.again:
        index = LatentIndex.load(path)
        require_index_of(stack, index)
        known = index.settings
        changed = [n for n, v in asked.items() if v is not None and v != known.get(n)]
        changed += ["stack"] if known.get("stack") != stack_hash else []
        if changed:
            raise ValueError(
                f"{path} was made with another {' and '.join(changed)}; make it anew with "
                f"--again, or choose another --out"
            )
        return index
    settings: dict[str, Any] = {}
    for name, default in TEXT.items():
        given = asked[name]
        settings[name] = record.get(name, default) if given is None else given
    if settings["data"] is None:
        raise ValueError(f"{options.run_directory} does not record a text; name one with --data")
    settings["loop"] = options.loop or "open"
    settings["seed"] = record.get("train", {}).get("seed", 0)
    settings["held_out_rows"] = record.get("held_out_rows", 0)
    settings["tokens"] = TOKENS
    settings["stack"] = stack_hash
    T = settings["context_tokens"]
    sizes = IndexSizes(options.passages, options.samples, min(options.window, T))
    return LatentIndex.empty(stack, T, sizes, settings)


def _read_text(
    options: Options,
    lm: HookedLM,
    stack: ReSAE,
    index: LatentIndex,
    path: Path,
    console: TerminalConsole,
) -> bool:
    """Read text until the index has as many tokens as are asked for; False: interrupted."""
    from resae.cli.train import Interruptible
    from resae.latents.collect import collect_latents
    from resae.latents.index import index_bytes

    wanted = options.tokens or index.settings["tokens"]
    rows = -(-wanted // index.row_tokens)
    if index.rows_done >= rows or (index.settings.get("whole_text") and index.rows_done):
        return True
    index.settings["tokens"] = wanted
    M = sum(len(layer.sums) for layer in index.layers)
    console.log(
        f"{wanted - index.rows_done * index.row_tokens:,} tokens of {index.settings['data']} to "
        f"read for {M:,} latents; index of at most "
        f"{index_bytes(stack, index.sizes, wanted) / 1e6:,.0f} MB in memory and on disk"
    )
    began, first, saved = time.perf_counter(), index.rows_done, time.perf_counter()
    with Interruptible() as asked_to_stop:

        def after_batch(index: LatentIndex) -> bool:
            nonlocal saved
            now = time.perf_counter()
            if now - saved > SAVE_SECONDS:
                index.save(path)
                saved = now
            rate = (index.rows_done - first) / (now - began)
            left = (rows - index.rows_done) / rate
            console.progress(
                f"{index.rows_done * index.row_tokens:,} tokens, "
                f"{rate * index.row_tokens:,.0f} per second, about {left:.0f} s left"
            )
            return asked_to_stop()

        batches = _batches(lm, index, rows)
        collect_latents(
            lm, stack, batches, loop=index.settings["loop"], index=index, on_batch=after_batch
        )
        stopped = asked_to_stop() and index.rows_done < rows
    index.settings["whole_text"] = not stopped and index.rows_done < rows
    index.save(path)
    return not stopped


def _batches(lm: HookedLM, index: LatentIndex, rows: int) -> Iterator[torch.Tensor]:
    """Batches `[B, T]` of the rows that the index does not have yet."""
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.data.activations import MODEL_ROWS
    from resae.data.rows import read_rows
    from resae.latents.collect import BATCH_ROWS

    quiet_libraries(index.settings["data"])
    names = (*TEXT, "seed", "held_out_rows")
    source = Source(model=lm.name, **{name: index.settings[name] for name in names})
    text = islice(read_rows(source, lm)[0].from_row(index.rows_done), rows - index.rows_done)
    size, began = MODEL_ROWS, time.perf_counter()
    while batch := list(islice(text, size)):
        yield torch.stack(batch)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        if seconds < BATCH_SECONDS:
            size = min(2 * size, BATCH_ROWS)


def _described(
    options: Options,
    lm: HookedLM,
    stack: ReSAE,
    index: LatentIndex,
    named: list[tuple[int, int]] | None,
    ids: torch.Tensor | None,
    console: TerminalConsole,
) -> tuple[LatentReport, PromptLatents | None]:
    from resae.latents.cards import describe_latents, spread_latents
    from resae.latents.prompt import prompt_latents

    prompt, latents = None, named or []
    if ids is not None:
        loop = index.settings["loop"]
        prompt = prompt_latents(lm, stack, ids, options.strongest, loop=loop)
        latents = [*latents, *prompt.latents()]
    if named is None and prompt is None:
        latents = spread_latents(index, options.page_latents)
    report = describe_latents(
        lm,
        stack,
        index,
        list(dict.fromkeys(latents)),
        name=Path(options.run_directory).resolve().name,
        measure_ablation=options.ablate or named is not None,
        progress=lambda done, of: console.progress(f"{done} of {of} latents described"),
    )
    return report, prompt


def _write(
    options: Options,
    lm: HookedLM,
    out: Path,
    report: LatentReport,
    prompt: PromptLatents | None,
    console: TerminalConsole,
) -> None:
    from resae.latents.cards import TokenTexts
    from resae.latents.neuronpedia import write_neuronpedia
    from resae.latents.page import write_json, write_page

    name = "latents" if options.latent is None and prompt is None else "chosen"
    name = name if prompt is None else "prompt"
    write_json(out / f"{name}.json", report, prompt)
    write_page(out / f"{name}.html", report, prompt, TokenTexts(lm.tokenizer))
    if options.neuronpedia:
        for path in write_neuronpedia(out / "neuronpedia", report):
            console.log(f"written to {path}")
    if options.json:
        console.json(report.to_dict())
    elif options.latent is not None:
        console.result("\n\n".join(_text(card) for card in report.latents))
    console.log(f"written to {out / f'{name}.html'} and {name}.json")


def _text(card: LatentCard) -> str:
    """A card in lines."""
    lines = [f"{card.name}: fires at {card.firings:,} tokens, density {card.density:.3%}"]
    for passage in card.passages[:5]:
        marked = [
            f"[{token}]" if act > 0 else token
            for token, act in zip(passage.tokens, passage.acts, strict=True)
        ]
        lines.append(f"  {max(passage.acts):8.2f}  {''.join(marked)!r}")
    for what, effects in (("more", card.raised), ("less", card.lowered)):
        if effects:
            tokens = "  ".join(f"{e.token!r} {e.logit:+.2f}" for e in effects[:6])
            lines.append(f"  {what} likely: {tokens}")
    for other in card.nearest:
        moved = other.transported_cosine
        after = "" if moved is None else f", transported {moved:.2f}"
        lines.append(f"  near {other.hook_point} #{other.latent}: cosine {other.cosine:.2f}{after}")
    if card.ablation is not None:
        found = card.ablation
        lines.append(
            f"  ablated on its passages: Δ CE {found.delta_ce:+.4f}, KL {found.kl:.4f} nats per "
            f"token over {found.tokens} tokens"
        )
    return "\n".join(lines)
