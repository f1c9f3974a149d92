"""The whole method on the embedded model and corpus: fit, train, replace, measure, and check the
claims.

Raw SAEs, raw SAEs with the total latents of a ReSAE reconstruction, identity residuals and ReSAE
are trained on the same activations in the same order with the same seeds, and evaluated on the same
held-out tokens. The activations are captured once and kept in memory. Further methods are trained
beside these when asked for (`DemoConfig.methods`): other members of the family, rows that take an
advantage away from ReSAE (`FAIR_METHODS`), and the comparison at other hook points (`ELSEWHERE`).
What is trained, and in which stages, is in `stages.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resae.console import ProgressEstimate
from resae.data.activations import capture_tokens
from resae.data.batches import RowBatches, StoredActivations
from resae.data.rows import TokenRows, train_and_held_out
from resae.data.text_record import TrainedText, save_held_out
from resae.data.texts import load_texts
from resae.demo.recipes import FAIR_RECIPES, LR_RECIPES, RECIPES, Recipe
from resae.demo.stages import (
    BOOST_BASE,
    BOOST_DATA,
    BOOST_TRAIN,
    CAPTURE,
    EVALUATE,
    FIT,
    GENERATE,
    Comparison,
    DemoConfig,
    Run,
    comparisons,
    expected_seconds,
    log_plan,
    settings_of,
    stage_name,
    training_stage,
    tuning_stage,
    tunings,
)
from resae.environment import environment
from resae.evaluation.comparison import collapse_difference, evaluate
from resae.evaluation.methods import Method
from resae.evaluation.predictors import r2_per_layer, routing_shares
from resae.evaluation.rows import Evaluation, LayerPairRow, ReconstructionRow, ReplacementRow
from resae.models.hooked import EMBEDDED, HookedLM
from resae.models.identity import ModelIdentity
from resae.models.points import HookPoint
from resae.replacements.generation import generate
from resae.report.content import Report
from resae.report.findings import extra_findings, findings
from resae.report.rows import (
    BoostRow,
    ElsewhereRow,
    FairRow,
    FvuRow,
    LayerFvu,
    LogEntry,
    NestedFvuRow,
    RoutingRow,
    Sample,
    TrainingRow,
)
from resae.stack.fit import Moments
from resae.stack.stack import AffineOnly, ReSAE
from resae.storage import save_json
from resae.training.calibration import Calibration, boost_calibration, calibrate, sum_moments
from resae.training.config import FinetuneConfig, TrainConfig
from resae.training.loop import Progress, train
from resae.training.online import layer_scales, train_online

HOP_HELD_OUT_ROWS = 64
PROMPTS = ("And it came to pass", "def __init__(self,", "The function returns")


BOOST_DOMAIN = "csrc"
BOOST_K = 4


class _Text(NamedTuple):
    """Trained text and held-out rows of a stack, which `resae eval` reads."""

    trained: TrainedText
    held_out: torch.Tensor
    context_tokens: int

    def save(self, folder: Path) -> None:
        self.trained.save(folder)
        save_held_out(folder, self.held_out, self.context_tokens)


def run_demo(
    out: Path, config: DemoConfig, *, log: Callable[[str], None], progress: Callable[[str], None]
) -> Report:
    """Run everything into `out`; returns what is written to `out/report.json`.

    Args:
        log: for lines that stay. progress: for progress that may overwrite itself.
    """
    lm = HookedLM.from_pretrained(EMBEDDED)
    main, *others = comparisons(config, lm)
    stages = expected_seconds(config, [main, *others])
    log_plan(config, lm, [main, *others], sum(stages.values()) / 60, log)
    plan = ProgressEstimate(stages, progress)

    plan.stage(CAPTURE)
    rows, held_out = train_and_held_out(
        EMBEDDED,
        lm,
        context_tokens=config.context_tokens,
        held_out_rows=config.held_out_rows + HOP_HELD_OUT_ROWS,
        seed=config.seed,
    )
    trained_text = TrainedText()
    rows = rows.noted(trained_text.add)
    xs = _capture(lm, rows, main.points, main.tokens, plan)
    unseen = torch.cat(list(held_out.batches(16)))
    eval_rows, hop_rows = unseen.split([config.held_out_rows, HOP_HELD_OUT_ROWS])
    batches = list(eval_rows.split(16))

    plan.stage(FIT)
    moments = _moments(xs, config)
    affine, routing = _hop_rows(lm, main.points, moments, main.runs, hop_rows)
    text = _Text(trained_text, eval_rows, config.context_tokens)
    stacks = out / "stacks"
    methods, training = _train_all(main, moments, xs, config, stacks, lm, plan, text)
    del xs
    methods += _tuned(methods, config, rows, text, stacks, lm, plan)
    further, boost = _further_methods(methods, main, config, out, lm, plan)
    methods += further
    elsewhere: list[ElsewhereRow] = []
    for other in others:
        elsewhere += _elsewhere(other, rows, batches, config, stacks, lm, plan, text)

    plan.stage(EVALUATE)
    evaluation = evaluate(lm, methods, batches, on_batch=lambda done: plan.at(done / len(batches)))
    resae = _stack_of(methods, "resae", config.k[-1])
    collapse = collapse_difference(lm, resae, batches[0])

    plan.stage(GENERATE)
    samples = _samples(lm, methods, config)
    report = replace(
        _report(config, main, evaluation, collapse),
        affine=affine,
        training=training,
        samples=samples,
        routing=routing,
        boost=boost,
        elsewhere=elsewhere,
    )
    told = [*findings(evaluation, collapse), *extra_findings(report, BOOST_K)]
    report = replace(report, findings=told)
    save_json(out / "report.json", report.to_dict())
    return report


def _further_methods(
    methods: Sequence[Method],
    main: Comparison,
    config: DemoConfig,
    out: Path,
    lm: HookedLM,
    plan: ProgressEstimate,
) -> tuple[list[Method], list[BoostRow]]:
    """Methods made of the trained ones: truncated, boosted, the maps alone; rows of the boost."""
    further: list[Method] = []
    boost: list[BoostRow] = []
    if "hierarchical" in config.methods:
        ordinary = _stack_of(methods, "raw", config.k[-1])
        further += [Method("raw_truncated", ordinary.at_k(k), k) for k in config.k[:-1]]
    if "boost" in config.methods:
        boosted, boost = _boost(lm, main.points, config, out, plan)
        further += boosted
    return [*further, _affine_only(methods)], boost


def _report(
    config: DemoConfig, main: Comparison, evaluation: Evaluation, collapse: float
) -> Report:
    """The report of an evaluation, with the tables that are made of its rows."""
    names = [point.name for point in main.points]
    return Report(
        title="ReSAE on the embedded model",
        config={**asdict(config), "model": EMBEDDED, "data": EMBEDDED, "layers": names},
        environment=environment(),
        replacement=evaluation.replacement,
        reconstruction=evaluation.reconstruction,
        redundancy=evaluation.redundancy,
        redundancy_histogram=evaluation.redundancy_histogram,
        ablation=evaluation.ablation,
        density=evaluation.density,
        shared_latents=evaluation.shared_latents,
        teacher_forced_collapse=collapse,
        fair=_fair_table(evaluation.replacement, main.runs),
        mlsae=_fvu_table(evaluation.reconstruction, "mlsae"),
        hierarchical=_nested_fvu_table(evaluation.reconstruction),
    )


def _capture(
    lm: HookedLM, rows: TokenRows, points: Sequence[HookPoint], tokens: int, plan: ProgressEstimate
) -> list[torch.Tensor]:
    pieces: list[list[torch.Tensor]] = []
    held = 0
    for ids in rows.batches(32):
        pieces.append(capture_tokens(lm, ids, points))
        held += len(pieces[-1][0])
        plan.at(min(1.0, held / tokens))
        if held >= tokens:
            break
    return [torch.cat(layer)[:tokens] for layer in zip(*pieces, strict=True)]


def _moments(xs: Sequence[torch.Tensor], config: DemoConfig) -> Moments:
    """Moments of the calibration tokens, for every predictor."""
    return sum_moments(
        "all_previous",
        zip(*(x[: config.train_tokens].split(8_192) for x in xs), strict=True),
        tokens=config.calibration_tokens,
        d_in=xs[0].shape[1],
        n_layers=len(xs),
    )


def _train_all(
    comparison: Comparison,
    moments: Moments,
    xs: Sequence[torch.Tensor],
    config: DemoConfig,
    folder: Path,
    lm: HookedLM,
    plan: ProgressEstimate,
    text: _Text,
) -> tuple[list[Method], list[TrainingRow]]:
    """Train every stack of a comparison; returns the methods to evaluate and the curves."""
    methods: list[Method] = []
    training: list[TrainingRow] = []
    last = (comparison.points[-1].name,)
    for run in comparison.runs:
        recipe, k, settings = run
        plan.stage(stage_name(training_stage(run), comparison.where))
        stored = [x[: settings.train_tokens] for x in xs]
        source = StoredActivations(stored, batch_tokens=config.batch_tokens, seed=config.seed)
        calibration = _calibration(recipe, moments, settings)
        stack, log = _train(settings, calibration, source, folder / run.name, lm, plan)
        text.save(folder / run.name)
        # The last layer alone, beside all of them, shows what teacher-forcing hides.
        alone = recipe.name in ("raw", "resae") and not comparison.where
        for lower in config.k if recipe.nested else ():
            methods.append(Method(recipe.name, stack.at_k(lower), lower))
        if not recipe.nested:
            methods.append(Method(recipe.name, stack, k, (last,) if alone else ()))
        rank = config.k.index(k)
        training.append(TrainingRow(method=recipe.name, k=k, rank=rank, log=log))
    return methods, training


def _tuned(
    methods: Sequence[Method],
    config: DemoConfig,
    rows: TokenRows,
    text: _Text,
    folder: Path,
    lm: HookedLM,
    plan: ProgressEstimate,
) -> list[Method]:
    """Tune trained stacks online, on the rows that they were trained on."""
    source = RowBatches(rows, config.batch_tokens // config.context_tokens)
    (ids,), _ = next(source.batches())
    made = []
    for tuning, k in tunings(config):
        plan.stage(tuning_stage(tuning, k))
        stack = _stack_of(methods, tuning.of, k)
        out = folder / f"{tuning.name}_k{k}"
        asked = FinetuneConfig(
            run=str(folder / f"{tuning.of}_k{k}"),
            out=str(out),
            objective=tuning.objective,
            train_tokens=config.tune_tokens or config.train_tokens,
            batch_tokens=source.batch_rows * config.context_tokens,
            seed=config.seed,
        )
        trained = train_online(
            asked.for_stack(stack, config.context_tokens),
            source,
            lm,
            stack,
            layer_scales(lm, stack, ids),
            out,
            keep_checkpoints=1,
            log_steps=5,
            on_progress=lambda p: plan.at(p.step / p.steps, f"loss {p.loss:.3f}"),
        )
        assert trained is not None  # nothing asks it to stop
        text.save(out)
        made.append(Method(tuning.name, trained, k))
    return made


def _elsewhere(
    comparison: Comparison,
    rows: TokenRows,
    batches: Sequence[torch.Tensor],
    config: DemoConfig,
    folder: Path,
    lm: HookedLM,
    plan: ProgressEstimate,
    text: _Text,
) -> list[ElsewhereRow]:
    """The comparison at other hook points: rows of Δ CE, and of its ratio to that of raw SAEs."""
    where, points, _ = comparison
    plan.stage(stage_name(CAPTURE, where))
    xs = _capture(lm, rows, points, comparison.tokens, plan)
    moments, folder = _moments(xs, config), folder / where
    methods, _ = _train_all(comparison, moments, xs, config, folder, lm, plan, text)
    plan.stage(stage_name(EVALUATE, where))
    evaluation = evaluate(lm, methods, batches, on_batch=lambda done: plan.at(done / len(batches)))
    measured = evaluation.replacement
    raw = {row.mode: row.delta_ce for row in measured if row.method == "raw"}
    return [
        ElsewhereRow(
            where=where,
            method=row.method,
            loop=row.loop,
            mode=row.mode,
            layers=row.layers,
            k=row.k,
            active_total=row.active_total,
            delta_ce=row.delta_ce,
            of_raw=row.delta_ce / raw[row.mode],
        )
        for row in measured
    ]


def _calibration(recipe: Recipe, moments: Moments, settings: TrainConfig) -> Calibration:
    map_type, rank = settings.map_type, settings.rank
    return calibrate(recipe.predictor, moments, ridge=settings.ridge, map_type=map_type, rank=rank)


def _train(
    settings: TrainConfig,
    calibration: Calibration,
    source: StoredActivations,
    folder: Path,
    lm: HookedLM,
    plan: ProgressEstimate,
) -> tuple[ReSAE, list[LogEntry]]:
    """One stack and its training curve."""
    log: list[LogEntry] = []

    def record(p: Progress) -> None:
        plan.at(p.step / p.steps, f"fvu {' '.join(f'{m.fvu:.3f}' for m in p.layers)}")
        log.append(LogEntry(p.step, p.tokens, [LayerFvu(m.fvu) for m in p.layers]))

    stack = train(
        settings,
        source,
        calibration,
        folder,
        identity=ModelIdentity.of(lm),
        keep_checkpoints=1,
        log_steps=10,
        on_progress=record,
    )
    assert stack is not None  # nothing asks it to stop
    return stack, log


def _hop_rows(
    lm: HookedLM,
    points: Sequence[HookPoint],
    moments: Moments,
    runs: Sequence[Run],
    rows: torch.Tensor,
) -> tuple[list[LayerPairRow], list[RoutingRow]]:
    """R² on held-out tokens per method and pair of layers, and the shares of several sources."""
    unseen = [capture_tokens(lm, ids, points) for ids in rows.split(16)]
    names = [point.name for point in points]
    table: list[LayerPairRow] = []
    routing: list[RoutingRow] = []
    first_with: dict[Any, Run] = {}  # many methods have the maps of an earlier one
    for run in runs:
        if run.recipe.predictor != "none":
            first_with.setdefault((run.recipe.predictor, run.recipe.map_type), run)
    for recipe, _, settings in first_with.values():
        method, maps = recipe.name, _calibration(recipe, moments, settings).predictor
        shares = routing_shares(maps, moments)
        for i, r2 in enumerate(r2_per_layer(maps, unseen)):
            table.append(LayerPairRow(method, f"{names[i]} → {names[i + 1]}", r2))
            for source, share in zip(names, shares[i], strict=False):
                if len(shares[i]) > 1:
                    routing.append(RoutingRow(method, names[i + 1], source, share))
    return table, routing


def _boost(
    lm: HookedLM, points: Sequence[HookPoint], config: DemoConfig, out: Path, plan: ProgressEstimate
) -> tuple[list[Method], list[BoostRow]]:
    """SAE Boost where it is meant for: raw SAEs that never saw one domain of the corpus, and beside
    them small ones trained on that domain alone.

    Returns:
        The stack before and after; and rows of FVU and online Δ CE on held-out text of the domain
        and of the rest, before, after, and with the boost's TopK alone, without its threshold.
    """
    plan.stage(BOOST_DATA)
    names = tuple(point.name for point in points)
    captured = []
    for inside in (False, True):
        rows = TokenRows(_texts(inside, config.seed), lm.tokenizer, config.context_tokens)
        captured.append(_capture(lm, rows, points, config.train_tokens, plan))
    rest, domain = (
        StoredActivations(xs, batch_tokens=config.batch_tokens, seed=config.seed) for xs in captured
    )

    plan.stage(BOOST_BASE)
    k = config.k[-1]
    recipe = Recipe("boost_base", "none")
    moments = [
        sum_moments(
            "none",
            [[x[: config.calibration_tokens] for x in xs]],
            tokens=config.calibration_tokens,
            d_in=lm.d_model,
            n_layers=len(points),
        )
        for xs in captured
    ]
    settings = settings_of(recipe, k, config, names, lm)
    folder = out / "stacks" / f"boost_base_k{k}"
    calibration = _calibration(recipe, moments[0], settings)
    base_stack, _ = _train(settings, calibration, rest, folder, lm, plan)

    plan.stage(BOOST_TRAIN)
    settings = settings_of(recipe, BOOST_K, config, names, lm, boost=str(folder))
    calibration = boost_calibration(base_stack, moments[1])
    target = out / "stacks" / f"boost_k{k}"
    boosted, _ = _train(settings, calibration, domain, target, lm, plan)
    topk = ReSAE.load(target)
    for layer in range(topk.n_layers):
        topk.sae(layer).get_buffer("threshold").zero_()
    table = _boost_rows(lm, base_stack, {"after": boosted, "after, TopK alone": topk}, config)
    return [Method("boost_base", base_stack, k), Method("boost", boosted, k)], table


def _boost_rows(
    lm: HookedLM, before: ReSAE, after: dict[str, ReSAE], config: DemoConfig
) -> list[BoostRow]:
    """FVU and online Δ CE of the stack before and those after, by their names, on held-out text of
    the rest and of the domain."""
    methods = [
        Method(name, stack, config.k[-1]) for name, stack in [("before", before), *after.items()]
    ]
    table: list[BoostRow] = []
    for text, inside in (("rest", False), (BOOST_DOMAIN, True)):
        texts = _texts(inside, config.seed, split="validation")
        unseen = TokenRows(texts, lm.tokenizer, config.context_tokens, take=config.held_out_rows)
        result = evaluate(lm, methods, unseen.batches(16))
        online = {r.method: r.delta_ce for r in result.replacement if r.mode == "online"}
        fvu = {(r.method, r.layer): r.fvu_stream for r in result.reconstruction}
        table += [
            BoostRow(
                text=text,
                which=row.method,
                layer=row.layer,
                fvu=row.fvu_stream,
                l0=row.l0,
                delta_ce=online[row.method],
                change=row.fvu_stream / fvu["before", row.layer] - 1,
            )
            for row in result.reconstruction
        ]
    return table


def _texts(inside: bool, seed: int, split: str = "train") -> list[str]:
    """Texts of the embedded corpus of `BOOST_DOMAIN`, or of all other domains."""
    columns = (load_texts(EMBEDDED, split=split, text_column=c, seed=seed) for c in _COLUMNS)
    return [text for text, name in zip(*columns, strict=True) if (name == BOOST_DOMAIN) == inside]


_COLUMNS = ("text", "domain")


def _affine_only(methods: Sequence[Method]) -> Method:
    resae = next(m for m in methods if m.name == "resae")
    assert isinstance(resae.stack, ReSAE)
    return Method("affine_only", AffineOnly(resae.stack), None)


def _fair_table(rows: Sequence[ReplacementRow], runs: Sequence[Run]) -> list[FairRow]:
    """Sizes of the stacks compared, and Δ CE of replacing all layers (in closed loop, where there
    is a choice); empty if none of `FAIR_METHODS` and `LR_METHODS` was asked for."""
    further = (*FAIR_RECIPES, *LR_RECIPES)
    if not any(run.recipe in further for run in runs):
        return []
    delta = {
        (r.method, r.k, r.mode): r.delta_ce
        for r in rows
        if r.loop != "open" and len(r.layers) == len(runs[0].settings.layers)
    }
    return [
        FairRow(
            method=recipe.name,
            k=k,
            k_per_layer=list(settings.k),
            d_sae=list(settings.d_saes),
            train_tokens=settings.train_tokens,
            lr=list(settings.peak_lrs),
            online=delta[recipe.name, k, "online"],
            teacher_forced=delta[recipe.name, k, "teacher_forced"],
        )
        for recipe, k, settings in runs
        if recipe in (*RECIPES, *further)
    ]


def _stack_of(methods: Sequence[Method], name: str, k: int) -> ReSAE:
    stack = next(m.stack for m in methods if (m.name, m.k) == (name, k))
    assert isinstance(stack, ReSAE)
    return stack


def _samples(lm: HookedLM, methods: Sequence[Method], config: DemoConfig) -> list[Sample]:
    k = config.k[-1]
    writers: list[tuple[str, ReSAE | None]] = [("nothing replaced", None)]
    for name in ("raw", "resae"):
        stack = _stack_of(methods, name, k)
        writers.append((f"{name}, k = {k}, {stack.n_layers} layers replaced online", stack))
    samples: list[Sample] = []
    for prompt in PROMPTS:
        for how, stack in writers:
            written = generate(lm, prompt, stack, max_new_tokens=48, seed=config.seed)
            replaced = sum(c.replaced for c in written.counts)
            detail = f" ({replaced} activations)" if stack is not None else ""
            samples.append(Sample(how + detail, prompt, written.text, replaced))
    return samples


def _fvu_table(rows: Sequence[ReconstructionRow], method: str) -> list[FvuRow]:
    """FVU of a method per layer and k, with that of raw SAEs of the same k."""
    single = _fvu_of("raw", rows)
    return [
        FvuRow(k, layer, fvu, single[k, layer], fvu / single[k, layer] - 1)
        for (k, layer), fvu in _fvu_of(method, rows).items()
    ]


def _nested_fvu_table(rows: Sequence[ReconstructionRow]) -> list[NestedFvuRow]:
    """The same for HierarchicalTopK, with that of truncated raw SAEs."""
    truncated = _fvu_of("raw_truncated", rows)
    return [
        NestedFvuRow(**asdict(row), truncated=truncated.get((row.k, row.layer)))
        for row in _fvu_table(rows, "hierarchical")
    ]


def _fvu_of(method: str, rows: Sequence[ReconstructionRow]) -> dict[tuple[int, str], float]:
    """FVU by k and layer."""
    return {(r.k, r.layer): r.fvu_stream for r in rows if r.method == method and r.k is not None}
