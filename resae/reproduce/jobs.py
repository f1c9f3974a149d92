"""The jobs of a study in the order in which they tell most: headline first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from resae.choices import Choice
from resae.demo.recipes import FAMILY_RECIPES, RECIPES, Recipe
from resae.reproduce.settings import Spacing, StudyConfig

_KNOWN = {recipe.name: recipe for recipe in (*RECIPES, *FAMILY_RECIPES)}
HEADLINE = (
    _KNOWN["raw"],
    _KNOWN["resae_closed"],
    replace(_KNOWN["identity"], name="identity_closed", loop="closed"),
    _KNOWN["raw_equal_total"],
)
FURTHER = (
    _KNOWN["resae"],
    replace(_KNOWN["all_previous"], name="all_previous_closed", loop="closed"),
    _KNOWN["mlsae"],
    _KNOWN["identity"],
)
METHODS: dict[str, Recipe] = {recipe.name: recipe for recipe in (*HEADLINE, *FURTHER)}
MAPS_ALONE = "affine_only"
"""Method without autoencoders, hence without k, seed and training."""


class Kind(Choice):
    """Kinds of jobs."""

    CAPTURE = "capture"
    MAPS = "maps"
    SWEEP = "sweep"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class Job:
    """One piece of work, whose result is one file."""

    kind: Kind
    spacing: str = ""
    k: int = 0
    method: str = ""
    seed: int = 0
    lr_factor: float = 0.0
    """Learning rate that a sweep tries, times the default."""

    @property
    def words(self) -> tuple[str, ...]:
        """Parts of the name, which `selected` compares."""
        words = [str(self.kind), self.spacing, self.method]
        if self.method not in ("", MAPS_ALONE):
            words += [f"k{self.k}", f"seed{self.seed}"]
        if self.kind is Kind.SWEEP:
            words.append(f"lr{self.lr_factor:g}")
        return tuple(word for word in words if word)

    @property
    def name(self) -> str:
        return "-".join(self.words)

    @property
    def training(self) -> "Job":
        """The job that trains what this one evaluates."""
        return replace(self, kind=Kind.TRAIN)


def jobs_of(config: StudyConfig) -> list[Job]:
    """All jobs of a study: each after those that it needs, and the most telling first."""
    return list(dict.fromkeys(_ordered(config)))


def _ordered(config: StudyConfig) -> Iterator[Job]:
    """The jobs, shared ones once per use."""
    for spacing, k, seed, recipe in _stacks(config):
        job = Job(Kind.EVALUATE, spacing, k, recipe.name, seed)
        for needed in (job.training, job):
            yield from needs(needed, config)
            yield needed
        maps_alone = Job(Kind.EVALUATE, spacing, method=MAPS_ALONE)
        if recipe.name == "resae_closed":
            yield from (*needs(maps_alone, config), maps_alone)


def _stacks(config: StudyConfig) -> Iterator[tuple[Spacing, int, int, Recipe]]:
    """Spacing, k, seed and method of every stack."""
    main = (config.headline_k,)
    other = tuple(k for k in config.k if k != config.headline_k)
    for seed in range(config.seeds):
        yield from product(Spacing, main, (seed,), HEADLINE)
    yield from product(Spacing, other, (0,), HEADLINE)
    yield from product(Spacing, main, (0,), FURTHER)
    yield from product(Spacing, other, (0,), FURTHER)


def needs(job: Job, config: StudyConfig) -> list[Job]:
    """The jobs that must be done before this one, and those that they need, in order."""
    capture, maps = Job(Kind.CAPTURE), Job(Kind.MAPS, job.spacing)
    match job.kind:
        case Kind.CAPTURE:
            return []
        case Kind.MAPS:
            return [capture]
        case Kind.SWEEP:
            return [capture, maps]
        case Kind.TRAIN:
            sweeps = sweeps_of(job.method, config)
            return [*needs(sweeps[0], config), *sweeps, *dict.fromkeys([capture, maps])]
        case Kind.EVALUATE if job.method == MAPS_ALONE:
            return [capture, maps]
        case Kind.EVALUATE:
            return [*needs(job.training, config), job.training]


def sweeps_of(method: str, config: StudyConfig) -> list[Job]:
    """The jobs that find the learning rate of a method: at the headline's k and spacing alone."""
    sweep = Job(Kind.SWEEP, Spacing.FAR, config.headline_k, method)
    return [replace(sweep, lr_factor=factor) for factor in config.lr_factors]


def selected(jobs: Sequence[Job], words: Sequence[str], config: StudyConfig) -> list[Job]:
    """The jobs that have all of `words` in their names, and those that they need.

    Raises:
        ValueError: there are none; the message has the words that there are.
    """
    asked = [job for job in jobs if set(words) <= set(job.words)]
    if not asked:
        known = dict.fromkeys(word for job in jobs for word in job.words)
        raise ValueError(
            f"--only: no job has {' and '.join(words)} in its name; words are {', '.join(known)}"
        )
    wanted = {needed for job in asked for needed in (*needs(job, config), job)}
    return [job for job in jobs if job in wanted]
