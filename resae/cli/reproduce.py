"""Measure the paper's claims on a language model: a study that can be interrupted and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from resae.arguments import compared, filled, names, real, whole, writable
from resae.cli.terminal import TerminalConsole
from resae.data.config import Machine
from resae.reproduce.settings import MODELS, StudyConfig, model_path
from resae.settings import Shown

if TYPE_CHECKING:
    from resae.reproduce.jobs import Job
    from resae.reproduce.study import Study

EPILOG = (
    "Words that --only takes are the parts of a job's name: its kind (sweep, train, evaluate), "
    "spacing (far, near), method (raw, raw_equal_total, identity_closed, resae_closed, "
    "affine_only, resae, identity, all_previous_closed, mlsae), k32, seed0."
)


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Study."""

    name: Annotated[str, tuple(MODELS), Shown("NAME", positional=True)]
    """Model: tiny (the embedded one), smollm2-135m or gemma-3-270m."""
    model: Annotated[str | None, filled, Shown("PATH")] = None
    """Folder or GGUF file of the model; None: where bench/real_models.py fetch puts it."""
    out: Annotated[str | None, writable] = None
    """Folder of the study; None: reproduce-NAME."""
    plan: bool = False
    """Print jobs, tokens, disk, memory and expected time, and end."""
    only: Annotated[tuple[str, ...], names] = ()
    """Do only the jobs with all of these words in their names, and what they need."""
    until_minutes: Annotated[float | None, real(least=0)] = None
    """Stop after this time; the next call goes on there. 0: only write the results of what is
    done."""
    train_tokens: Annotated[int, whole(1)] = StudyConfig.train_tokens
    """Tokens that each stack is trained on."""
    k: Annotated[tuple[int, ...], compared] = StudyConfig.k
    """Active latents per layer, compared; the headline has the middle one."""
    expansion: Annotated[int, whole(1)] = StudyConfig.expansion
    """Latents per dimension of the model."""
    documents: Annotated[int, whole(2)] = StudyConfig.documents
    """Held-out documents to evaluate on, one row of 128 tokens each."""
    seeds: Annotated[int, whole(1)] = StudyConfig.seeds
    """Seeds of the headline."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.storage import locked, remove_partial

    config = StudyConfig(
        options.name,
        k=options.k,
        expansion=options.expansion,
        train_tokens=options.train_tokens,
        documents=options.documents,
        seeds=options.seeds,
    )
    path = model_path(options.name, options.model)
    out = Path(options.out or f"reproduce-{options.name}")
    with locked(out):
        remove_partial(out)
        return _run_in(out, config, path, options, console)


def _run_in(
    out: Path, config: StudyConfig, path: str, options: Options, console: TerminalConsole
) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.environment import describe_device, find_device
    from resae.reproduce.expected import expected_seconds, measure_rates, plan_table
    from resae.reproduce.jobs import Kind, jobs_of, selected
    from resae.reproduce.study import Study
    from resae.reproduce.summary import write_results
    from resae.training.pipeline import load_model

    quiet_libraries()
    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    jobs = selected(jobs_of(config), options.only, config)
    lm = load_model(path, options.dtype, device)
    study = Study(out, config, lm, device=device, console=console)
    if options.plan:
        console.result(plan_table(study, jobs, measure_rates(study)))
        return 0

    def write(job: Job | None = None) -> None:
        if job is None or job.kind is Kind.EVALUATE:
            write_results(out, config, study.result)

    if options.until_minutes == 0:
        jobs, seconds = [], {}
    else:
        seconds = expected_seconds(study, jobs, measure_rates(study))
        console.log(f"{len(jobs)} jobs; about {_left(study, seconds) / 60:.0f} minutes left")
    if not study.run(jobs, seconds, stop=_stop_after(options.until_minutes), on_result=write):
        console.log("stopped; the same command goes on")
    write()
    console.result((out / "results.md").read_text())
    return 0


def _left(study: Study, seconds: Mapping[Job, float]) -> float:
    return sum(expected for job, expected in seconds.items() if study.result(job) is None)


def _stop_after(minutes: float | None) -> Callable[[], bool]:
    began = time.monotonic()
    return lambda: minutes is not None and time.monotonic() - began > 60 * minutes
