"""Measure what latents tell about labelled texts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from resae.arguments import compared, filled, names, whole, writable
from resae.arguments import seed as seed_number
from resae.choices import Loop
from resae.cli.opened_runs import OpenRun, methods_of, open_runs, require_comparable
from resae.cli.terminal import TerminalConsole
from resae.data.config import Machine
from resae.environment import describe_device, environment, find_device
from resae.settings import Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resae.data.labelled import LabelledTexts
    from resae.evaluation.pooling import CodeSource
    from resae.evaluation.scores import Score, ScoreRow
    from resae.models.hooked import HookedLM


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Probing."""

    run_directories: Annotated[tuple[str, ...], filled, Shown("RUN", True, several=True)]
    """Run directories, or stacks on the hub (owner/name, owner/name@revision), of the same layers;
    differences are from the first."""
    data: Annotated[tuple[str, ...], names] = ("embedded",)
    """Labelled texts, separated by commas: embedded (its seven domains), local files or folders,
    hub datasets, saebench (its eight datasets); scores are averaged over them."""
    text_column: Annotated[str, filled] = "text"
    """Column that holds the texts."""
    label_column: Annotated[str | None, filled] = None
    """Column that holds the classes; None: label, of the embedded corpus domain."""
    attribute_column: Annotated[str | None, filled] = None
    """Column of a second label with two values, for scr; None: none, of the embedded corpus the
    project, Python or SQLite, that code and prose are of."""
    measures: Annotated[tuple[str, ...] | None, names] = None
    """Scores to compute: probing (accuracy of probes on the k best latents), tpp (targeted probe
    perturbation), scr (spurious correlation removal); None: all that the data allows."""
    loop: Annotated[str | None, Loop] = None
    """Predictions of stacks with maps: from activations (open) or reconstructions (closed); None:
    both."""
    k: Annotated[tuple[int, ...], compared] = (1, 2, 5)
    """Numbers of latents that a probe may use."""
    ablated: Annotated[tuple[int, ...], compared] = (2, 5, 10, 20, 50, 100, 500)
    """Numbers of latents that tpp and scr ablate."""
    train_documents: Annotated[int, whole(2)] = 2000
    """Documents of each class to fit probes on, at most."""
    test_documents: Annotated[int, whole(2)] = 500
    """Documents of each class to score probes on, at most."""
    context_tokens: Annotated[int, whole(2)] = 128
    """Tokens of a document that are read."""
    seed: Annotated[int, seed_number] = 42
    """Fixes which documents are drawn."""
    out: Annotated[str | None, writable] = None
    """Folder that probe.json goes into; None: the first run."""
    model: Annotated[str | None, filled] = None
    """Another path of the same model."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: the commit that the run was trained
    on."""
    json: bool = False
    """Print the rows of the table as JSON; progress goes to standard error."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.data.labelled import load_labelled
    from resae.data.public_labelled import PUBLIC
    from resae.evaluation.scores import Measure, mean_scores, score_rows
    from resae.models.hooked import EMBEDDED, HookedLM
    from resae.storage import require_writable, save_json
    from resae.training.pipeline import load_model
    from resae.training.runs import folder_beside, model_of

    for measure in options.measures or ():
        Measure.check(measure, "--measures")
    if options.json:
        console.report_to_stderr()
    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    out = folder_beside(options.run_directories[0], options.out)
    runs = open_runs([Path(folder) for folder in options.run_directories], device)
    require_writable(out)
    quiet_libraries(next((data for data in options.data if data != EMBEDDED), None))
    stack = runs[0].stack
    name, revision = model_of(runs[0].record, stack, options.model, options.revision)
    require_comparable(runs, HookedLM.described(name, tokenizer=None, revision=revision))
    texts = [
        load_labelled(
            data,
            text_column=options.text_column,
            label_column=options.label_column,
            attribute_column=options.attribute_column,
            train_documents=options.train_documents,
            test_documents=options.test_documents,
            seed=options.seed,
        )
        for given in options.data
        for data in (PUBLIC if given == "saebench" else [given])
    ]
    lm = load_model(name, options.dtype, device, revision)
    sources = _sources(runs, options.loop)
    scores = [_scores(lm, sources, data, i, options, console) for i, data in enumerate(texts)]
    rows = [
        row
        for data, of_data in zip(texts, scores, strict=True)
        for row in score_rows(data.name, of_data)
    ]
    if len(texts) > 1:
        rows += score_rows("mean", mean_scores(scores))
    report = {
        "schema_version": 1,
        "config": asdict(options) | {"model": lm.name, "layers": stack.hook_points},
        "environment": environment(),
        "scores": [asdict(row) for row in rows],
    }
    save_json(out / "probe.json", report)
    if options.json:
        console.json(report["scores"])
    else:
        console.result(_table(rows))
    console.log(f"written to {out / 'probe.json'}")
    return 0


def _sources(runs: Sequence[OpenRun], wanted: str | None) -> list[CodeSource]:
    """Every run in each of its loops, or in the wanted one."""
    from resae.evaluation.pooling import CodeSource
    from resae.stack.stack import ReSAE

    return [
        CodeSource(method, loop)
        for method in methods_of(runs, None)
        if isinstance(method.stack, ReSAE)
        for loop in method.loops
        if loop is None or wanted in (None, loop)
    ]


def _scores(
    lm: HookedLM,
    sources: Sequence[CodeSource],
    texts: LabelledTexts,
    seed: int,
    options: Options,
    console: TerminalConsole,
) -> list[Score]:
    """Scores of every source and of the channels on one dataset."""
    from resae.data.labelled import document_ids
    from resae.evaluation.perturbation import (
        ablated_latents,
        biased_tasks,
        correlation_removal,
        probe_perturbation,
    )
    from resae.evaluation.pooling import most_bytes, pool_documents
    from resae.evaluation.probing import one_against_rest, sparse_probing
    from resae.evaluation.scores import Measure, ScoredDocuments, units_of

    layers = sources[0].stack.hook_points
    pairs = texts.train.pairs, texts.test.pairs
    measures = options.measures or tuple(Measure)
    biased = []
    if Measure.SCR in measures and pairs[0] is not None and pairs[1] is not None:
        biased = biased_tasks(pairs[0], pairs[1])
    elif Measure.SCR in (options.measures or ()):
        raise ValueError(
            f"dataset {texts.name!r}: scr needs a second label; name its column with "
            f"--attribute-column, or leave scr out of --measures"
        )
    ids = document_ids(lm, [*texts.train.texts, *texts.test.texts], options.context_tokens)
    memory = most_bytes(sources, len(ids), options.context_tokens) / 1e6
    console.log(
        f"{texts.name}: {len(texts.classes)} classes, {len(texts.train.texts):,} documents to fit "
        f"probes on and {len(texts.test.texts):,} to score them on; "
        f"{sum(map(len, ids)):,} tokens through the model once and {len(sources)} times through "
        f"the autoencoders of {len(layers)} layers; means take at most {memory:,.2f} MB"
    )
    began = time.perf_counter()

    def read(done: int) -> None:
        left = (time.perf_counter() - began) * (len(ids) - done) / done
        console.progress(f"{done:,}/{len(ids):,} documents, about {left:.0f} s left")

    pooled = pool_documents(lm, sources, ids, on_batch=read)
    tasks = one_against_rest(texts, options.seed)
    documents = ScoredDocuments(texts.test.labels, first=len(texts.train.labels), seed=seed)

    def progress(measure: Measure) -> Callable[[int], None]:
        return lambda done: console.progress(f"{measure}: {done} sets of latents scored")

    scores: list[Score] = []
    if Measure.PROBING in measures:
        units = units_of(sources, pooled, layers)
        on_units = progress(Measure.PROBING)
        scores += sparse_probing(units, tasks, documents, ks=options.k, on_units=on_units)
    if Measure.TPP in measures:
        scores += probe_perturbation(
            ablated_latents(sources, pooled, layers),
            pooled.channels,
            tasks,
            documents,
            sizes=options.ablated,
            on_units=progress(Measure.TPP),
        )
    if biased:
        scores += correlation_removal(
            ablated_latents(sources, pooled, layers),
            pooled.channels,
            biased,
            documents,
            sizes=options.ablated,
            on_units=progress(Measure.SCR),
        )
    return scores


def _table(rows: Sequence[ScoreRow]) -> str:
    """A table per dataset and measure: the sizes side by side."""
    tables: list[str] = []
    for data, measure in dict.fromkeys((row.data, row.measure) for row in rows):
        these = [row for row in rows if (row.data, row.measure) == (data, measure)]
        sizes = list(dict.fromkeys(row.size for row in these))
        found = {(row.method, row.loop, row.layer, row.size): row for row in these}
        title = f"{TITLES[measure]}, {data}, 95 % intervals; columns: "
        lines = [title + ("units of a probe" if measure == "probing" else "latents ablated")]
        shown = ["all" if size is None else str(size) for size in sizes]
        head = f"{'layer':<28}{'method':<20}{'loop':<8}{'active':>7}"
        lines.append(head + "".join(f"{size:>25}" for size in shown))
        for layer, method, loop in sorted(
            dict.fromkeys((row.layer, row.method, row.loop) for row in these),
            key=lambda of: [row.layer for row in these].index(of[0]),
        ):
            cells = [found.get((method, loop, layer, size)) for size in sizes]
            active = next(row.active for row in cells if row is not None)
            line = f"{layer:<28}{method:<20}{loop or '–':<8}"
            line += f"{'–' if active is None else f'{active:.1f}':>7}"
            lines.append(line + "".join(f"{_cell(row):>25}" for row in cells))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(row: ScoreRow | None) -> str:
    return "" if row is None else f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


TITLES = {
    "probing": "sparse probing (accuracy)",
    "tpp": "targeted probe perturbation",
    "scr": "spurious correlation removal",
}
