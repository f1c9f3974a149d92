"""Replace layers on held-out text and measure the cost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from resae.arguments import compared, filled, layer_sets, names, whole, writable
from resae.cli.opened_runs import OpenRun, methods_of, open_runs, require_comparable
from resae.cli.terminal import TerminalConsole
from resae.data.config import TEXT_SETTINGS, Machine, Source, source_defaults
from resae.environment import describe_device, environment, find_device
from resae.settings import Shown

if TYPE_CHECKING:
    import torch

    from resae.data.text_record import Overlap, RunText
    from resae.evaluation.methods import Method
    from resae.evaluation.rows import AblationRow, Evaluation, GenerationRow, TaskRow
    from resae.models.hooked import HookedLM
    from resae.stack.stack import ReSAE

HELD_OUT_DEFAULTS = source_defaults(*TEXT_SETTINGS, "held_out_rows")
"""Defaults for settings that neither the command nor the run gives."""
PARTIAL_SUMS = "evaluation.partial.safetensors"
"""Sums of an evaluation that has not ended, in the folder of its report."""
ROW_SHAPE = ("context_tokens", "held_out_rows")


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Evaluation."""

    run_directories: Annotated[tuple[str, ...], filled, Shown("RUN", True, several=True)]
    """Run directories, or stacks on the hub (owner/name, owner/name@revision), of the same
    layers."""
    k: Annotated[tuple[int, ...] | None, compared] = None
    """Compare the runs with these numbers of active latents; None: all that they were trained
    with."""
    subsets: Annotated[
        tuple[tuple[str, ...], ...] | str, layer_sets, Shown("each|prefixes|all|none|LAYERS;…")
    ] = "each"
    """Further sets of layers to replace, in addition to all of them: each alone, the first ones,
    all subsets, none, or sets such as '5,15;15,25'."""
    reference: Annotated[str | None, filled, Shown("METHOD")] = None
    """Method of the table that the others are compared with; None: the first."""
    generation: Annotated[int | None, whole(1), Shown("N")] = None
    """Continue N of the rows from their middle, greedily, and measure the text."""
    generation_tokens: Annotated[int, whole(1)] = 64
    """Most tokens to write for each, at most half a row."""
    tasks: Annotated[tuple[str, ...] | None, names, Shown("TASK,…")] = None
    """Score tasks of lm-eval, from the package lm-eval[hf], with all layers replaced online."""
    task_folder: Annotated[str | None, filled, Shown("FOLDER")] = None
    """Folder with YAML files of further tasks, such as ones on local data."""
    task_documents: Annotated[int | None, whole(1), Shown("N")] = None
    """The first documents of each task; None: all."""
    out: Annotated[str | None, writable] = None
    """Folder that report.json goes into; None: the first run."""
    model: Annotated[str | None, filled] = None
    """Another path of the same model."""
    data: Annotated[str | None, filled] = None
    """Other text; None: the held-out part of the training's."""
    text_column: Annotated[str | None, filled] = None
    """Column of the data that holds the text; None: as in the run."""
    split: Annotated[str | None, filled] = None
    """Split of the data to evaluate on; None: validation where there is one, otherwise rows that
    the run held out."""
    data_revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of a hub dataset; None: as in the run."""
    encoding: Annotated[str | None, filled] = None
    """Encoding of local text files; None: as in the run."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: the commit that the run was trained
    on."""
    streaming: bool | None = None
    """Read the data while it downloads."""
    context_tokens: Annotated[int | None, whole(2)] = None
    """Tokens per row; None: as in the run."""
    held_out_rows: Annotated[int | None, whole(1)] = None
    """Rows to evaluate on; None: as in the run."""
    allow_trained_text: bool = False
    """Evaluate even where a run was trained on the text, or where that is not known; otherwise an
    error."""
    baselines: bool = False
    """Compare with raw and identity-residual autoencoders too: those that are not among the runs
    are trained like the first of them, into a folder beside it; interrupted, the same command goes
    on."""
    json: bool = False
    """Print the rows of the table as JSON; progress goes to standard error."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.evaluation.labels import whole_selection
    from resae.evaluation.methods import known_reference
    from resae.evaluation.tasks import find_tasks
    from resae.models.hooked import HookedLM
    from resae.storage import require_writable, save_json
    from resae.training.pipeline import load_model
    from resae.training.runs import folder_beside, model_of

    if options.json:
        console.report_to_stderr()
    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    out = folder_beside(options.run_directories[0], options.out)
    runs = open_runs([Path(folder) for folder in options.run_directories], device)
    require_writable(out)
    quiet_libraries()
    first = runs[0]
    name, revision = model_of(first.record, first.stack, options.model, options.revision)
    shapes = HookedLM.described(name, tokenizer=None, revision=revision)
    require_comparable(runs, shapes)
    _require_tokenizer(options, shapes)
    if options.baselines:
        baselines = _baselines(runs, device, console)
        if baselines is None:
            return 130
        runs += baselines
    ids, data, overlaps = _unseen(
        options, [(run.folder, run.record) for run in runs], shapes, console
    )
    methods = methods_of(runs, options.k, _subsets(options.subsets, shapes, first.stack))
    reference = known_reference(methods, options.reference)
    if options.tasks is not None:
        find_tasks(options.tasks, _task_folder(options))  # raises before anything is measured
    lm = load_model(name, options.dtype, device, revision)
    evaluation = _evaluated(lm, methods, ids, data, reference, out / PARTIAL_SUMS, console)
    config = {
        "model": lm.name,
        "data": data,
        "held_out_rows": len(ids),
        "context_tokens": ids.shape[1],
        "trained_on": overlaps,
        "resampled": evaluation.resampled,
    }
    report = _report(runs, evaluation, config, _training(runs, methods, options.k))
    texts = _continued(lm, methods, ids, reference, options, console)
    if texts:
        report["generation"] = [asdict(row) for row in texts]
        report["samples"] = _samples(lm, methods, ids[: options.generation], options)
    scores = _scored(lm, methods, options, console)
    if scores:
        report["tasks"] = [asdict(row) for row in scores]
    save_json(out / "report.json", report)
    rows = [asdict(row) for row in whole_selection(evaluation.replacement)]
    if options.json:
        console.json(rows)
    else:
        console.result(_table(rows, evaluation.ablation, reference))
        if texts:
            console.result(_table_of_texts(texts))
        if scores:
            console.result(_table_of_tasks(scores))
    console.log(f"written to {out / 'report.json'}; next: resae report {out}")
    return 0


def _require_tokenizer(options: Options, shapes: HookedLM) -> None:
    """Raise ValueError where text is to be written or scored by a model without tokenizer."""
    asked = {"--generation": options.generation, "--tasks": options.tasks}
    for option, value in asked.items():
        if value is not None and shapes.tokenizer is None:
            raise ValueError(
                f"{option} needs a tokenizer, which model {shapes.name} does not have; save its "
                f"tokenizer into its folder, or leave the option out"
            )


def _baselines(
    runs: Sequence[OpenRun], device: str, console: TerminalConsole
) -> list[OpenRun] | None:
    """The baselines of the first run that are not among the runs, trained if need be; None:
    interrupted."""
    from resae.cli.train import Interruptible
    from resae.evaluation.methods import method_name
    from resae.training.baselines import baselines_of, train_baselines

    baselines = baselines_of(runs[0].folder, {method_name(run.stack) for run in runs})
    for baseline in baselines:
        text = "trained already"
        if not baseline.done:
            text = f"{baseline.config.train_tokens:,} training tokens to go through"
            text += ", continued from its newest checkpoint" if baseline.config.resume else ""
        console.log(f"baseline {baseline.name}: {text}; {baseline.folder}")
    whole = train_baselines(
        baselines,
        device=device,
        console=console,
        command=console.command_line,
        stopping=Interruptible,
    )
    if not whole:
        console.log("stopped; the same command goes on from the newest checkpoint")
        return None
    return open_runs([baseline.folder for baseline in baselines], device)


def _subsets(
    asked: tuple[tuple[str, ...], ...] | str, lm: HookedLM, stack: ReSAE
) -> tuple[tuple[str, ...], ...]:
    """The sets of layers that an option asks for, by names of hook points.

    Raises:
        ValueError: a layer that the runs do not have.
    """
    from resae.evaluation.methods import subsets_of

    if isinstance(asked, str):
        return subsets_of(stack.hook_points, asked)
    sets = []
    for layers in asked:
        points = lm.hook_points([int(n) if n.isdecimal() else n for n in layers])
        for point in points:
            if point.name not in stack.hook_points:
                raise ValueError(
                    f"--subsets: {point.name} is no layer of the runs, which have "
                    f"{', '.join(stack.hook_points)}"
                )
        sets.append(tuple(point.name for point in points))
    return tuple(s for s in sets if len(s) < stack.n_layers)


def _evaluated(
    lm: HookedLM,
    methods: Sequence[Method],
    ids: torch.Tensor,
    data: str,
    reference: str,
    checkpoint: Path,
    console: TerminalConsole,
) -> Evaluation:
    """The methods on rows `ids [R, T]` of a text of this name."""
    from resae.data.activations import MODEL_ROWS
    from resae.evaluation.comparison import evaluate, forward_passes

    batches = list(ids.split(MODEL_ROWS))
    console.log(f"{forward_passes(methods)} passes over {ids.numel():,} held-out tokens of {data}")
    began: list[tuple[float, int]] = []

    def progress(done: int) -> None:
        if not began:
            began.append((time.perf_counter(), done))
            if done > 1:
                console.log(f"{done - 1} of {len(batches)} batches were done already")
        start, first = began[0]
        pace = (time.perf_counter() - start) / max(1, done - first)
        left = f", about {pace * (len(batches) - done):.0f} s left" if done > first else ""
        console.progress(f"{done}/{len(batches)} batches{left}")

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    return evaluate(
        lm,
        methods,
        batches,
        reference=reference,
        on_means=lambda done: console.progress(f"mean activations: {done}/{len(batches)} batches"),
        on_batch=progress,
        checkpoint=checkpoint,
    )


def _continued(
    lm: HookedLM,
    methods: Sequence[Method],
    ids: torch.Tensor,
    reference: str,
    options: Options,
    console: TerminalConsole,
) -> list[GenerationRow]:
    """Rows of the text that prompts are continued with, where that is asked for."""
    from resae.evaluation.continuations import continuation_rows

    if options.generation is None:
        return []
    prompts = ids[: options.generation, : ids.shape[1] // 2]
    new_tokens = min(options.generation_tokens, ids.shape[1] - prompts.shape[1])
    console.log(
        f"{len(prompts)} prompts of {prompts.shape[1]} tokens, each continued by {new_tokens}"
    )
    return continuation_rows(
        lm,
        methods,
        prompts,
        new_tokens=new_tokens,
        reference=reference,
        on_batch=lambda done: console.progress(f"{done}/{len(prompts)} prompts"),
    )


SHOWN_TEXTS = 3
"""Prompts whose continuations are in the report as text."""


def _samples(
    lm: HookedLM, methods: Sequence[Method], prompts: torch.Tensor, options: Options
) -> list[dict[str, Any]]:
    """The first of the prompts `[R, T]`, cut at their middle, continued as text: by the unchanged
    model, and with the layers replaced by each stack."""
    from resae.evaluation.labels import label
    from resae.replacements.generation import generate
    from resae.report.rows import Sample
    from resae.stack.stack import ReSAE

    assert lm.tokenizer is not None
    writers: list[tuple[str, ReSAE | None]] = [("nothing replaced", None)]
    for method in methods:
        if isinstance(method.stack, ReSAE):
            how = f"{label(method.name)}, k = {method.k}, all layers replaced online"
            writers.append((how, method.stack))
    new_tokens = min(options.generation_tokens, prompts.shape[1] - prompts.shape[1] // 2)
    samples: list[dict[str, Any]] = []
    for row in prompts[:SHOWN_TEXTS, : prompts.shape[1] // 2]:
        prompt = lm.tokenizer.decode(row, skip_special_tokens=True)
        for how, stack in writers:
            written = generate(lm, prompt, stack, max_new_tokens=new_tokens, temperature=0)
            replaced = sum(count.replaced for count in written.counts)
            samples.append(asdict(Sample(how, prompt, written.text, replaced)))
    return samples


def _task_folder(options: Options) -> Path | None:
    return None if options.task_folder is None else Path(options.task_folder)


def _scored(
    lm: HookedLM, methods: Sequence[Method], options: Options, console: TerminalConsole
) -> list[TaskRow]:
    """Rows of the tasks that are asked for."""
    from resae.evaluation.tasks import task_rows

    if options.tasks is None:
        return []
    return task_rows(
        lm,
        methods,
        options.tasks,
        folder=_task_folder(options),
        documents=options.task_documents,
        on_run=lambda done: console.progress(f"tasks: {done} ways of running the model scored"),
    )


def _report(
    runs: Sequence[OpenRun],
    evaluation: Evaluation,
    config: dict[str, Any],
    training: list[dict[str, Any]],
) -> dict[str, Any]:
    """Content of report.json; `config` names what was evaluated on."""
    from resae.report.content import SCHEMA_VERSION

    first = runs[0]
    of_runs = {
        "layers": first.stack.hook_points,
        "d_sae": first.stack.d_sae,
        "train_tokens": first.record.get("train", {}).get("train_tokens", 0),
        "runs": [str(run.folder) for run in runs],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "title": f"Evaluation of {', '.join(run.folder.name for run in runs)}",
        "config": config | of_runs,
        "environment": environment(),
        **evaluation.to_dict(),
        "affine": _affine([run.record for run in runs]),
        "training": training,
    }


def _training(
    runs: Sequence[OpenRun], methods: Sequence[Method], ks: Sequence[int] | None
) -> list[dict[str, Any]]:
    """The logs of the runs that have one."""
    return [
        {"method": m.name, "k": m.k, "log": _log(run.folder)}
        for m, run in zip(methods[:: len(ks or (0,))], runs, strict=False)
        if (run.folder / "log.jsonl").exists()
    ]


def _unseen(
    options: Options,
    runs: Sequence[tuple[Path, dict[str, Any]]],
    lm: HookedLM,
    console: TerminalConsole,
) -> tuple[torch.Tensor, str, list[dict[str, Any]]]:
    """Rows `[R, T]` to evaluate on, the name of their text, and per run how much of them it was
    trained on.

    Raises:
        ValueError: text that a run was trained on, or may have been, unless that is allowed.
    """
    from resae.data.text_record import RunText

    texts = [RunText.load(folder) for folder, _ in runs]
    unknown = [str(folder) for (folder, _), text in zip(runs, texts, strict=True) if text is None]
    if unknown and not options.allow_trained_text:
        raise ValueError(
            f"{unknown[0]} has no record of the text that it was trained on (a run of an earlier "
            f"version, or a stack without its run), so that no text is known to be new to it; "
            f"evaluate all the same with --allow-trained-text"
        )
    ids, data = _rows_to_evaluate(options, runs, [text for text in texts if text is not None], lm)
    overlaps = []
    for (folder, _), text in zip(runs, texts, strict=True):
        known = None if text is None else text.overlap(ids)
        row = {"run": str(folder), "held_out": text is not None and known is None}
        overlaps.append(row if known is None else row | known._asdict())
        if text is not None and known is None and (again := text.trained.overlap(ids)).new is False:
            console.log(
                f"{folder}: {again.known:,} of {again.compared:,} compared pieces of its held-out "
                f"text occur in its training text too: the data repeats itself, so losses here are "
                f"lower than on new text"
            )
        if text is None:
            console.log(f"{folder}: not known whether it was trained on this text")
        elif known is not None:
            _require_new(options, folder, known, console)
    return ids, data, overlaps


def _require_new(options: Options, folder: Path, known: Overlap, console: TerminalConsole) -> None:
    """Say how much of the text a run was trained on; refuse more than chance unless allowed."""
    share = f"{known.known:,} of {known.compared:,} compared pieces of 16 tokens"
    if known.new or options.allow_trained_text:
        console.log(f"{folder} was trained on {share} of this text")
        return
    if known.new is None:
        raise ValueError(
            f"too little of this text can be compared with what {folder} was trained on "
            f"({known.compared} pieces of 16 tokens) to tell whether it is new; give more rows, "
            f"longer ones, or --allow-trained-text"
        )
    raise ValueError(
        f"{folder} was trained on this text ({share} are in its training text); evaluate runs "
        f"apart, or on other text with --data, or take this with --allow-trained-text"
    )


def _rows_to_evaluate(
    options: Options,
    runs: Sequence[tuple[Path, dict[str, Any]]],
    texts: Sequence[RunText],
    lm: HookedLM,
) -> tuple[torch.Tensor, str]:
    """Rows `[R, T]`, and the name of their text: those that the runs held out, as recorded; or any
    rows of the text that is given, or of a validation split, which is never trained on."""
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.data.rows import has_heads, read_rows, rows_of_split
    from resae.data.text_record import held_out_by_all, in_rows_of

    folder, record = runs[0]
    given = options.data is not None or options.split is not None
    chosen = {name: getattr(options, name) for name in HELD_OUT_DEFAULTS}
    for name, default in HELD_OUT_DEFAULTS.items():
        if chosen[name] is None and (given or name not in ROW_SHAPE):
            chosen[name] = record.get(name, default)
    if chosen["data"] is None:
        raise ValueError(f"{folder} does not record a text to evaluate on; name it with --data")
    kept = None if given or len(texts) < len(runs) else held_out_by_all(texts)
    if kept is not None:
        lm.require_vocabulary(kept, f"rows that {folder} held out")
        context = chosen["context_tokens"] or kept.shape[1]
        lm.require_context(context)
        kept = in_rows_of(kept, context, has_heads(lm))
        kept = kept[: chosen["held_out_rows"]]
        if len(kept) and len(kept) >= (chosen["held_out_rows"] or 0):
            return kept, chosen["data"]
        if record.get("held_out_split") != "validation":
            raise ValueError(
                f"{folder} held out {len(kept)} rows of {kept.shape[1]} tokens and trained on the "
                f"rest of {chosen['data']}; ask for fewer, or give other text with --data"
            )
    for name in ROW_SHAPE:
        if chosen[name] is None:
            chosen[name] = record.get(name, HELD_OUT_DEFAULTS[name])
    seed = record.get("train", {}).get("seed", 0)
    quiet_libraries(chosen["data"])
    source = Source(model=lm.name, seed=seed, **chosen)
    of_split = options.split is not None
    rows = rows_of_split(source, lm) if of_split else read_rows(source, lm)[1]
    return torch.stack(list(rows)), chosen["data"]


def _affine(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """R² per method and pair of layers, of the first run that has it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chain.from_iterable(record.get("affine", []) for record in records):
        rows.setdefault((row["method"], row["hop"]), row)
    return list(rows.values())


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _table(rows: Sequence[dict[str, Any]], ablations: Sequence[AblationRow], reference: str) -> str:
    """Cost of replacing all layers, with 95 % intervals, for a terminal."""
    width = max(16, *(len(row["method"]) + 2 for row in rows))
    head = f"{'method':<{width}}{'loop':<8}{'mode':<16}{'k':>5}  {'Δ CE':<25}"
    lines = [f"{head}{'from reference':<27}{'recovered':>9}{'KL':>9}"]
    for row in rows:
        loop, k = row["loop"] or "–", row["k"] or "–"
        lines.append(
            f"{row['method']:<{width}}{loop:<8}{row['mode']:<16}{k:>5}  "
            f"{_with_interval(row, 'delta_ce'):<25}{_with_interval(row, 'difference', '+'):<27}"
            f"{row['ce_recovered_mean']:>9.4f}{row['kl']:>9.4f}"
        )
    for row in (r for r in ablations if r.layers == rows[0]["layers"]):
        name = f"{row.ablation} ablation"
        cost = _with_interval(asdict(row), "delta_ce")
        lines.append(f"{name:<{width}}{'–':<8}{'–':<16}{'–':>5}  {cost:<52}{'–':>9}{row.kl:>9.4f}")
    for row in rows:
        if row["sum_of_single"] is not None and row["mode"] == "online":
            of = f"{row['method']}, {row['loop']} loop" if row["loop"] else row["method"]
            of += f", k = {row['k']}" if row["k"] else ""
            lines.append(
                f"{of}: the layers one by one lose "
                f"{_with_interval(row, 'sum_of_single')} in sum, all at once online "
                f"{_with_interval(row, 'delta_ce')}"
            )
    clean = _with_interval(rows[0], "ce_clean")
    lines.append(
        f"CE of the unchanged model: {clean} nats per token; reference: {reference}; "
        f"brackets: 95 % intervals"
    )
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], name: str, sign: str = "") -> str:
    """A number of a row, and its interval where there is one."""
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "–"
    bounds = "" if low is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{value:{sign}.4f}{bounds}"


def _table_of_texts(rows: Sequence[GenerationRow]) -> str:
    """Quality of continuations, for a terminal."""
    width = max(16, *(len(row.method) + 2 for row in rows))
    first = rows[0]
    head = f"{'continuations':<{width}}{'loop':<8}{'k':>5}  {'agreement (tokens)':<28}"
    lines = [f"{head}{'perplexity':<30}{'KL':<26}{'repeated':>8}"]
    for row in rows:
        cells = asdict(row)
        lines.append(
            f"{row.method:<{width}}{row.loop or '–':<8}{row.k or '–':>5}  "
            f"{_with_interval(cells, 'agreement_tokens'):<28}"
            f"{_with_interval(cells, 'perplexity'):<30}{_with_interval(cells, 'kl'):<26}"
            f"{row.repetition:>8.1%}"
        )
    plain = f"perplexity {_with_interval(asdict(first), 'perplexity_plain')}"
    lines.append(
        f"the unchanged model's own text: {plain}, repeated {first.repetition_plain:.1%}; "
        f"{first.prompts} prompts of {first.prompt_tokens} tokens, {first.new_tokens} written"
    )
    return "\n".join(lines)


def _table_of_tasks(rows: Sequence[TaskRow]) -> str:
    """Scores on tasks, for a terminal."""
    width = max(16, *(len(row.method or "") + 2 for row in rows))
    head = f"{'tasks':<{width}}{'loop':<8}{'k':>5}  {'task':<24}{'metric':<16}"
    lines = [f"{head}{'score':<26}from the unchanged model"]
    for row in rows:
        cells = asdict(row)
        lines.append(
            f"{row.method or 'unchanged':<{width}}{row.loop or '–':<8}{row.k or '–':>5}  "
            f"{row.task:<24}{row.metric:<16}{_with_interval(cells, 'value'):<26}"
            f"{_with_interval(cells, 'difference', '+')}"
        )
    return "\n".join(lines)
