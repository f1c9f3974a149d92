"""Sizes of the demonstration, the stacks that it trains, and the stages in which it runs, with the
seconds that each takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.training.config import TrainConfig


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


class Run(NamedTuple):
    """One stack to train."""

    recipe: Recipe
    k: int
    settings: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.recipe.name}_k{self.k}"


class Comparison(NamedTuple):
    """Stacks of the same hook points, trained on the same activations."""

    where: str
    """Its name in `ELSEWHERE`; empty for the hook points of the configuration."""
    points: list[HookPoint]
    runs: list[Run]

    @property
    def tokens(self) -> int:
        """Activations that the longest training needs."""
        return max(run.settings.train_tokens for run in self.runs)


CAPTURE, FIT = "capture activations", "fit affine maps"
EVALUATE, GENERATE = "replace layers and measure", "write text with the layers replaced"
BOOST_DATA = "capture activations of one domain and the rest"
BOOST_BASE, BOOST_TRAIN = "train on the rest", "boost on the domain"
"""Names of stages."""


def stage_name(stage: str, where: str) -> str:
    """Name of a stage of a comparison at other hook points."""
    return f"{where}: {stage}" if where else stage


def training_stage(run: Run) -> str:
    return f"train {run.recipe.name}, k = {run.k}"


def tuning_stage(tuning: Tuning, k: int) -> str:
    how = "tune {} online" if tuning.objective == "kl" else "train {} further"
    return f"{how.format(tuning.of)}, k = {k}"


def comparisons(config: DemoConfig, lm: HookedLM) -> list[Comparison]:
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
    made: list[Comparison] = []
    for where, points, planned in selections:
        names = tuple(point.name for point in points)
        runs = [Run(recipe, k, settings_of(recipe, k, config, names, lm)) for recipe, k in planned]
        made.append(Comparison(where, points, runs))
    return made


def _planned(config: DemoConfig) -> list[tuple[Recipe, int]]:
    """Recipes to train at the configured hook points and their k, in order."""
    planned = [(recipe, k) for k in config.k for recipe in RECIPES]
    for recipe in (*FAMILY_RECIPES, *FAIR_RECIPES, *LR_RECIPES):
        if recipe.name in config.methods:
            middle = _middle_k(config)
            ks = (middle,) if recipe.one_k else config.k[-1:] if recipe.nested else config.k
            planned += [(recipe, k) for k in ks]
    return planned


def tunings(config: DemoConfig) -> list[tuple[Tuning, int]]:
    """Stacks to tune online, and their k."""
    asked = [(tuning, k) for k in config.k for tuning in TUNINGS if tuning.name in config.methods]
    shown = (SHOWN_TUNING, _middle_k(config))
    return asked if shown in asked else [shown, *asked]


def _middle_k(config: DemoConfig) -> int:
    return config.k[len(config.k) // 2]


def settings_of(
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


def expected_seconds(config: DemoConfig, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Stages in their order, and their seconds as measured on one core, which the display corrects
    by the speed that it meets."""
    tokens = config.train_tokens / 200_000
    held_out_rows = 0.0126 * config.held_out_rows
    stages: dict[str, float] = {}
    for where, _, runs in comparisons[1:]:
        layers = len(runs[0].settings.layers) / 3
        stages[stage_name(CAPTURE, where)] = 6.0 * tokens
        stages |= {stage_name(training_stage(run), where): _training_seconds(run) for run in runs}
        stages[stage_name(EVALUATE, where)] = 18 * layers * held_out_rows
    main = comparisons[0]
    ways = 18 * len(config.k) + 3
    training: dict[str, float] = {}
    for run in main.runs:
        training[training_stage(run)] = _training_seconds(run)
        if run.recipe not in RECIPES:
            ways += 3 if run.recipe.predictor == "none" else 6
    for tuning, k in tunings(config):
        share = (config.tune_tokens or config.train_tokens) / 200_000
        seconds = 50.0 if tuning.objective == "kl" else 12.0
        training[tuning_stage(tuning, k)] = seconds * share
        ways += 3 if tuning.of.startswith("raw") else 6
    if "hierarchical" in config.methods:
        ways += 6 * (len(config.k) - 1)
    if "boost" in config.methods:
        training[BOOST_DATA] = 7.0 * tokens + 1.0
        training[BOOST_BASE] = (3.3 + 0.04 * config.k[-1]) * tokens
        training[BOOST_TRAIN] = 14.0 * tokens + 0.1 * config.held_out_rows
        ways += 9
    capture = {CAPTURE: 6.0 * main.tokens / 200_000, FIT: 2.0}
    measure = {EVALUATE: ways * held_out_rows, GENERATE: 3.0}
    return {**capture, **training, **stages, **measure}


def _training_seconds(run: Run) -> float:
    passes = 1.6 if run.recipe.nested else 1.0
    layers = (0.69 + 0.0008 * M + 0.013 * run.k for M in run.settings.d_saes)
    return passes * sum(layers) * run.settings.train_tokens / 200_000


def log_plan(
    config: DemoConfig,
    lm: HookedLM,
    comparisons: Sequence[Comparison],
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
        f"what comes: {CAPTURE}, {FIT}, train each stack, {EVALUATE}, {GENERATE}; then a page "
        f"with figures"
    )
