"""Other libraries on the command line: their progress bars and log lines are left out."""

import logging


def quiet_libraries(data: str | None = None) -> None:
    """Show only our own progress; downloads keep theirs. `datasets` is imported only for `data`
    that needs it."""
    from transformers.utils import logging as transformers_logging

    from resae.models.hooked import EMBEDDED

    transformers_logging.disable_progress_bar()
    if data not in (None, EMBEDDED):
        import datasets

        datasets.disable_progress_bars()
        # It logs what it then raises, as an error that takes one line.
        datasets.logging.set_verbosity(logging.CRITICAL)
