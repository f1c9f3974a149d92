"""The whole method on the embedded model and corpus: fit, train, replace, measure, and check the
claims.

Raw SAEs, raw SAEs with the total latents of a ReSAE reconstruction, identity residuals and ReSAE
are trained on the same activations in the same order with the same seeds, and evaluated on the same
held-out tokens. The activations are captured once and kept in memory. Further methods are trained
beside these when asked for (`DemoConfig.methods`): other members of the family, rows that take an
advantage away from ReSAE (`FAIR_METHODS`), and the comparison at other hook points (`ELSEWHERE`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resae.console import ProgressEstimate
from resae.data.activations import capture_tokens
from resae.data.batches import RowBatches, StoredActivations
from resae.data.rows import TokenRows, train_and_held_out
from resae.data.text_record import TrainedText, save_held_out
from resae.data.texts import load_texts
from resae.demo.recipes import (
    ELSEWHERE,
    EXTRA_METHODS,
    FAIR_RECIPES,
    FAMILY_RECIPES,
    LR_METHODS,
    LR_RECIPES,
    METHOD_GROUPS,
    RECIPES,
    SHOWN_TUNING,
    TUNINGS,
    Recipe,
    Tuning,
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


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demonstration; the defaults fit in five minutes and 3 GB on one CPU core."""

    layers: tuple[str, ...] = ("1", "3", "5")
    k: tuple[int, ...] = (4, 8, 32)
    d_sae: int = 512
    train_tokens: int = 200_000
    calibration_tokens: int = 60_000
    batch_tokens: int = 1_024
    held_out_rows: int = 64
    context_tokens: int = 128
    seed: int = 0
    tune_tokens: int | None = None
    """Tokens that a stack is tuned on online; None: as many as it is trained on."""
    methods: tuple[str, ...] = ()
    """Further methods: names from `EXTRA_METHODS` and `LR_METHODS`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - {*EXTRA_METHODS, *LR_METHODS})
        if unknown:
            raise ValueError(
                f"demo: unknown method {', '.join(unknown)}; choose of {', '.join(EXTRA_METHODS)}, "
                f"or a group: {', '.join(METHOD_GROUPS)}"
            )
        if len(self.layers) < 2:
            raise ValueError("demo: it compares layers; name at least two, for example 1,3,5")
        if not self.k or list(self.k) != sorted(set(self.k)) or self.k[0] < 1:
            raise ValueError(
                f"demo: k={self.k}, expected rising numbers from 1 on, for example 4,8,32"
            )
        if self.train_tokens < self.batch_tokens or self.held_out_rows < 1:
            raise ValueError(
                f"demo: train_tokens={self.train_tokens}, held_out_rows={self.held_out_rows}; "
                f"expected at least a batch of {self.batch_tokens} tokens, and 1 row"
            )
        if self.k[-1] * len(self.layers) > self.d_sae:
            raise ValueError(
                f"demo: k={self.k[-1]} on {len(self.layers)} layers means raw SAEs with "
                f"{self.k[-1] * len(self.layers)} active latents, more than d_sae={self.d_sae}; "
                f"lower k"
            )


BOOST_DOMAIN = "csrc"
BOOST_K = 4


class _Run(NamedTuple):
    """One stack to train."""

    recipe: Recipe
    k: int
    settings: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.recipe.name}_k{self.k}"


class _Text(NamedTuple):
    """Trained text and held-out rows of a stack, which `resae eval` reads."""

    trained: TrainedText
    held_out: torch.Tensor
    context_tokens: int

    def save(self, folder: Path) -> None:
        self.trained.save(folder)
        save_held_out(folder, self.held_out, self.context_tokens)


class _Comparison(NamedTuple):
    """Stacks of the same hook points, trained on the same activations."""

    where: str
    """Its name in `ELSEWHERE`; empty for the hook points of the configuration."""
    points: list[HookPoint]
    runs: list[_Run]

    @property
    def tokens(self) -> int:
        """Activations that the longest training needs."""
        return max(run.settings.train_tokens for run in self.runs)


def run_demo(
    out: Path, config: DemoConfig, *, log: Callable[[str], None], progress: Callable[[str], None]
) -> Report:
    """Run everything into `out`; returns what is written to `out/report.json`.

    Args:
        log: for lines that stay. progress: for progress that may overwrite itself.
    """
    lm = HookedLM.from_pretrained(EMBEDDED)
    main, *others = _comparisons(config, lm)
    stages = _stages(config, [main, *others])
    _announce(config, lm, [main, *others], sum(stages.values()) / 60, log)
    plan = ProgressEstimate(stages, progress)

    plan.stage(_CAPTURE)
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

    plan.stage(_FIT)
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

    plan.stage(_EVALUATE)
    evaluation = evaluate(lm, methods, batches, on_batch=lambda done: plan.at(done / len(batches)))
    resae = _stack_of(methods, "resae", config.k[-1])
    collapse = collapse_difference(lm, resae, batches[0])

    plan.stage(_GENERATE)
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


def _announce(
    config: DemoConfig,
    lm: HookedLM,
    comparisons: Sequence[_Comparison],
    minutes: float,
    log: Callable[[str], None],
) -> None:
    """Log what is trained, on how much, and how long it takes."""
    main, *others = comparisons
    log(
        f"{len(main.runs) + 2 * ('boost' in config.methods)} stacks of {len(main.points)} "
        f"autoencoders ({config.d_sae} latents; k = {', '.join(map(str, config.k))}) for "
        f"{', '.join(point.name for point in main.points)} of a {lm.n_layers}-layer Pythia of "
        f"width {lm.d_model}"
    )
    for other in others:
        log(f"{len(other.runs)} stacks for {', '.join(point.name for point in other.points)}")
    longer = f" ({main.tokens:,} where long)" if main.tokens > config.train_tokens else ""
    log(
        f"{config.train_tokens:,} training tokens{longer}, "
        f"{config.held_out_rows * config.context_tokens:,} held out; about {minutes:.0f} minutes"
    )
    log(
        f"what comes: {_CAPTURE}, {_FIT}, train each stack, {_EVALUATE}, {_GENERATE}; then a page "
        f"with figures"
    )


def _further_methods(
    methods: Sequence[Method],
    main: _Comparison,
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
    config: DemoConfig, main: _Comparison, evaluation: Evaluation, collapse: float
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


# Seconds per stage, measured on one core; the display corrects them by the speed it meets.
_CAPTURE, _FIT = "capture activations", "fit affine maps"
_EVALUATE, _GENERATE = "replace layers and measure", "write text with the layers replaced"


_BOOST_DATA = "capture activations of one domain and the rest"
_BOOST_BASE, _BOOST_TRAIN = "train on the rest", "boost on the domain"


def _stage_name(stage: str, where: str) -> str:
    """Name of a stage of a comparison at other hook points."""
    return f"{where}: {stage}" if where else stage


def _training_stage(run: _Run) -> str:
    return f"train {run.recipe.name}, k = {run.k}"


def _planned(config: DemoConfig) -> list[tuple[Recipe, int]]:
    """Recipes to train at the configured hook points and their k, in order."""
    planned = [(recipe, k) for k in config.k for recipe in RECIPES]
    for recipe in (*FAMILY_RECIPES, *FAIR_RECIPES, *LR_RECIPES):
        if recipe.name in config.methods:
            middle = _middle_k(config)
            ks = (middle,) if recipe.one_k else config.k[-1:] if recipe.nested else config.k
            planned += [(recipe, k) for k in ks]
    return planned


def _middle_k(config: DemoConfig) -> int:
    return config.k[len(config.k) // 2]


def _comparisons(config: DemoConfig, lm: HookedLM) -> list[_Comparison]:
    """Everything to train, settings checked: first at the configured hook points, then elsewhere.

    Raises:
        ValueError: unknown hook points, or impossible settings for one of the methods.
    """
    chosen = lm.hook_points(config.layers)
    selections = [("", chosen, _planned(config))]
    for where, site in ELSEWHERE.items():
        if where in config.methods:
            planned = [(recipe, _middle_k(config)) for recipe in RECIPES]
            blocks = [f"blocks.{point.layer}.{site}" for point in chosen]
            names = list(map(str, range(lm.n_layers))) if site is None else blocks
            selections.append((where, lm.hook_points(names), planned))
    comparisons = []
    for where, points, planned in selections:
        names = tuple(point.name for point in points)
        runs = [_Run(recipe, k, _settings(recipe, k, config, names, lm)) for recipe, k in planned]
        comparisons.append(_Comparison(where, points, runs))
    return comparisons


def _stages(config: DemoConfig, comparisons: Sequence[_Comparison]) -> dict[str, float]:
    tokens = config.train_tokens / 200_000
    held_out_rows = 0.0126 * config.held_out_rows
    stages: dict[str, float] = {}
    for where, _, runs in comparisons[1:]:
        layers = len(runs[0].settings.layers) / 3
        stages[_stage_name(_CAPTURE, where)] = 6.0 * tokens
        stages |= {_stage_name(_training_stage(run), where): _training_seconds(run) for run in runs}
        stages[_stage_name(_EVALUATE, where)] = 18 * layers * held_out_rows
    main = comparisons[0]
    ways = 18 * len(config.k) + 3
    training: dict[str, float] = {}
    for run in main.runs:
        training[_training_stage(run)] = _training_seconds(run)
        if run.recipe not in RECIPES:
            ways += 3 if run.recipe.predictor == "none" else 6
    for tuning, k in _tunings(config):
        share = (config.tune_tokens or config.train_tokens) / 200_000
        seconds = 50.0 if tuning.objective == "kl" else 12.0
        training[_tuning_stage(tuning, k)] = seconds * share
        ways += 3 if tuning.of.startswith("raw") else 6
    if "hierarchical" in config.methods:
        ways += 6 * (len(config.k) - 1)
    if "boost" in config.methods:
        training[_BOOST_DATA] = 7.0 * tokens + 1.0
        training[_BOOST_BASE] = (3.3 + 0.04 * config.k[-1]) * tokens
        training[_BOOST_TRAIN] = 14.0 * tokens + 0.1 * config.held_out_rows
        ways += 9
    capture = {_CAPTURE: 6.0 * main.tokens / 200_000, _FIT: 2.0}
    measure = {_EVALUATE: ways * held_out_rows, _GENERATE: 3.0}
    return {**capture, **training, **stages, **measure}


def _training_seconds(run: _Run) -> float:
    passes = 1.6 if run.recipe.nested else 1.0
    layers = (0.69 + 0.0008 * M + 0.013 * run.k for M in run.settings.d_saes)
    return passes * sum(layers) * run.settings.train_tokens / 200_000


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


def _settings(
    recipe: Recipe,
    k: int,
    config: DemoConfig,
    names: tuple[str, ...],
    lm: HookedLM,
    **further: Any,
) -> TrainConfig:
    return recipe.settings(
        names,
        k,
        config.d_sae,
        d_model=lm.d_model,
        ks=config.k,
        train_tokens=config.train_tokens * recipe.length,
        calibration_tokens=config.calibration_tokens,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        **further,
    )


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
    comparison: _Comparison,
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
        plan.stage(_stage_name(_training_stage(run), comparison.where))
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


def _tunings(config: DemoConfig) -> list[tuple[Tuning, int]]:
    """Stacks to tune online, and their k."""
    asked = [(tuning, k) for k in config.k for tuning in TUNINGS if tuning.name in config.methods]
    shown = (SHOWN_TUNING, _middle_k(config))
    return asked if shown in asked else [shown, *asked]


def _tuning_stage(tuning: Tuning, k: int) -> str:
    how = "tune {} online" if tuning.objective == "kl" else "train {} further"
    return f"{how.format(tuning.of)}, k = {k}"


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
    for tuning, k in _tunings(config):
        plan.stage(_tuning_stage(tuning, k))
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
    comparison: _Comparison,
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
    plan.stage(_stage_name(_CAPTURE, where))
    xs = _capture(lm, rows, points, comparison.tokens, plan)
    moments, folder = _moments(xs, config), folder / where
    methods, _ = _train_all(comparison, moments, xs, config, folder, lm, plan, text)
    plan.stage(_stage_name(_EVALUATE, where))
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
    runs: Sequence[_Run],
    rows: torch.Tensor,
) -> tuple[list[LayerPairRow], list[RoutingRow]]:
    """R² on held-out tokens per method and pair of layers, and the shares of several sources."""
    unseen = [capture_tokens(lm, ids, points) for ids in rows.split(16)]
    names = [point.name for point in points]
    table: list[LayerPairRow] = []
    routing: list[RoutingRow] = []
    first_with: dict[Any, _Run] = {}  # many methods have the maps of an earlier one
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
    plan.stage(_BOOST_DATA)
    names = tuple(point.name for point in points)
    captured = []
    for inside in (False, True):
        rows = TokenRows(_texts(inside, config.seed), lm.tokenizer, config.context_tokens)
        captured.append(_capture(lm, rows, points, config.train_tokens, plan))
    rest, domain = (
        StoredActivations(xs, batch_tokens=config.batch_tokens, seed=config.seed) for xs in captured
    )

    plan.stage(_BOOST_BASE)
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
    settings = _settings(recipe, k, config, names, lm)
    folder = out / "stacks" / f"boost_base_k{k}"
    calibration = _calibration(recipe, moments[0], settings)
    base_stack, _ = _train(settings, calibration, rest, folder, lm, plan)

    plan.stage(_BOOST_TRAIN)
    settings = _settings(recipe, BOOST_K, config, names, lm, boost=str(folder))
    calibration = boost_calibration(base_stack, moments[1])
    target = out / "stacks" / f"boost_k{k}"
    boosted, _ = _train(settings, calibration, domain, target, lm, plan)
    topk = ReSAE.load(target)
    for layer in range(topk.n_layers):
        topk.sae(layer).get_buffer("threshold").zero_()
    compared = [("before", base_stack), ("after", boosted), ("after, TopK alone", topk)]
    table: list[BoostRow] = []
    for text, inside in (("rest", False), (BOOST_DOMAIN, True)):
        texts = _texts(inside, config.seed, split="validation")
        unseen = TokenRows(texts, lm.tokenizer, config.context_tokens, take=config.held_out_rows)
        result = evaluate(lm, [Method(w, s, k) for w, s in compared], unseen.batches(16))
        before: dict[str, float] = {}
        for which, _ in compared:
            online = next(
                row.delta_ce
                for row in result.replacement
                if (row.method, row.mode) == (which, "online")
            )
            for row in result.reconstruction:
                if row.method == "before":
                    before[row.layer] = row.fvu_stream
                if row.method == which:
                    table.append(
                        BoostRow(
                            text=text,
                            which=which,
                            layer=row.layer,
                            fvu=row.fvu_stream,
                            l0=row.l0,
                            delta_ce=online,
                            change=row.fvu_stream / before[row.layer] - 1,
                        )
                    )
    return [Method("boost_base", base_stack, k), Method("boost", boosted, k)], table


def _texts(inside: bool, seed: int, split: str = "train") -> list[str]:
    """Texts of the embedded corpus of `BOOST_DOMAIN`, or of all other domains."""
    columns = (load_texts(EMBEDDED, split=split, text_column=c, seed=seed) for c in _COLUMNS)
    return [text for text, name in zip(*columns, strict=True) if (name == BOOST_DOMAIN) == inside]


_COLUMNS = ("text", "domain")


def _affine_only(methods: Sequence[Method]) -> Method:
    resae = next(m for m in methods if m.name == "resae")
    assert isinstance(resae.stack, ReSAE)
    return Method("affine_only", AffineOnly(resae.stack), None)


def _fair_table(rows: Sequence[ReplacementRow], runs: Sequence[_Run]) -> list[FairRow]:
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
