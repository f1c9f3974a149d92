"""Values of settings as text: what each must look like, checked before a command begins.

Every function here reads one value from text: it returns the value, or raises ArgumentTypeError
with what was given and what is expected. `resae.settings` assigns them to settings.
"""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

LARGEST_SEED = 2**32 - 1


def filled(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise ArgumentTypeError("is empty; expected a name or a text")
    return text


def writable(text: str) -> str:
    """A folder that can be written into, or made."""
    from resae.storage import require_writable  # loads torch, which --help does without

    try:
        require_writable(Path(filled(text)))
    except OSError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def writable_file(text: str) -> str:
    """A file that can be written or made."""
    if Path(filled(text)).is_dir():
        raise ArgumentTypeError(f"{text} is a folder, expected the name of a file")
    writable(str(Path(text).parent))
    return text


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ArgumentTypeError(f"{text!r}: expected names, for example 1,3,5")
    return parts


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    try:
        parts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected numbers, for example 4,8,32") from None
    if min(parts) < 1:
        raise ArgumentTypeError(f"{text!r}: expected numbers from 1 on")
    return parts


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from 0 on, separated by commas, each once."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        raise ArgumentTypeError(f"{text[:80]!r}: expected whole numbers, for example 17,40")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def compared(text: str) -> tuple[int, ...]:
    """Numbers to compare: rising, each once."""
    parts = numbers(text)
    if list(parts) != sorted(set(parts)):
        raise ArgumentTypeError(f"{text!r}: expected rising numbers, for example 4,8,32")
    return parts


def layer_sets(text: str) -> tuple[tuple[str, ...], ...] | str:
    """Sets of layers: `5,15;15,25`; or a word for some: `none`, `each`, `prefixes`, `all`."""
    if text in ("none", "each", "prefixes", "all"):
        return text
    try:
        return tuple(names(part) for part in text.split(";"))
    except ArgumentTypeError:
        raise ArgumentTypeError(
            f"{text!r}: expected none, each, prefixes, all, or sets of layers, for example "
            f"'5,15;15,25'"
        ) from None


def one_k(text: str) -> int:
    """The k of every layer: several are refused, since elsewhere they would be compared."""
    if "," in text:
        raise ArgumentTypeError(
            f"{text!r} is more than one number: a run has one k in every layer, or, with "
            f"--k-per-layer {text}, one for each; to compare several, train a run with each"
        )
    return whole(1)(text)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Makes the type of whole numbers from `least` to `most`."""
    expected = f"a whole number from {least}" + (" on" if most is None else f" to {most}")

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least or (most is not None and number > most):
            raise ArgumentTypeError(f"{text!r}: expected {expected}")
        return number

    return parse


seed = whole(0, LARGEST_SEED)


def real(*, least: float | None = None, above: float | None = None, most: float = math.inf):
    """Makes the type of finite numbers from `least`, or above `above`, to `most`."""
    expected = "a number" if least is None else f"a number from {least:g}"
    expected += "" if above is None else f" above {above:g}"
    expected += " on" if math.isinf(most) and least is not None else ""
    expected += "" if math.isinf(most) else f" to {most:g}"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        low = (least is not None and number < least) or (above is not None and number <= above)
        if not math.isfinite(number) or low or number > most:
            raise ArgumentTypeError(f"{text!r}: expected {expected}")
        return number

    return parse


def peaks(text: str) -> tuple[float, float]:
    """FLOP/s and bytes/s."""
    try:
        product, bandwidth = map(real(above=0), text.split(","))
    except (ValueError, ArgumentTypeError):
        raise ArgumentTypeError(
            f"{text!r}: expected FLOP/s and bytes/s, for example 312e12,2e12"
        ) from None
    return product, bandwidth


def device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:1`; `environment.find_device` checks whether it
    exists."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or cuda:1")
    return text
