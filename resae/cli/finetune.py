"""Train a finished run further, with all its layers replaced in the running model."""

from dataclasses import dataclass, fields
from pathlib import Path

from resae.cli.terminal import TerminalConsole
from resae.cli.train import Interruptible, Planning
from resae.training.config import FinetuneConfig

EPILOG = (
    "The loss is what `resae eval` measures online: how far the next-token distributions of the "
    "replaced model are from the plain model's. The run that it begins with stays as it is."
)


@dataclass(frozen=True, kw_only=True)
class Options(FinetuneConfig, Planning):
    """Train."""


def run(options: Options, console: TerminalConsole) -> int:
    if options.plan:
        return _plan(options, console)
    from resae.cli.libraries import quiet_libraries
    from resae.training import finetune

    quiet_libraries(options.data or "")
    config = FinetuneConfig(**{f.name: getattr(options, f.name) for f in fields(FinetuneConfig)})
    command = console.command_line
    done = finetune(config, console=console, command=command, stopping=Interruptible())
    if done.stack is None:
        console.log(
            f"stopped; a checkpoint is in {done.folder / 'checkpoints'}, continue with --resume"
        )
        return 130
    console.log(f"written to {done.folder}; next: resae eval {options.run} {done.folder}")
    return 0


def _plan(options: Options, console: TerminalConsole) -> int:
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.models.hooked import HookedLM
    from resae.training.estimate import estimate_online
    from resae.training.finetuning import source_of
    from resae.training.online import require_topk
    from resae.training.runs import model_of, open_run

    quiet_libraries()
    earlier, stack = open_run(Path(options.run), "cpu")
    require_topk(stack)
    name, revision = model_of(earlier, stack)
    lm = HookedLM.described(name, tokenizer=None, revision=revision)
    stack.require_model(lm)
    context_tokens = source_of(options, earlier, name).context_tokens
    estimate = estimate_online(
        options.for_stack(stack, context_tokens),
        lm,
        context_tokens,
        device=options.planned_device(),
        model_dtype=getattr(torch, options.dtype),
        keep_checkpoints=options.keep_checkpoints,
        checkpoint_steps=options.checkpoint_steps,
    )
    options.print_plan(estimate, console)
    return 0
