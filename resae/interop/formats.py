"""The file formats of autoencoders: a new one is one file and one entry of `FORMATS`."""

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from resae.interop import (
    dictionary_learning,
    gemma_scope,
    mlsae,
    openai,
    own,
    saelens,
    sparsify,
)
from resae.interop.files import has
from resae.interop.hub import locate
from resae.sae.base import Autoencoder
from resae.sae.record import SAERecord
from resae.sae.registry import sae_from_record
from resae.storage import is_unused, load_json, require_writable
from resae.strict_json import brief
from resae_kernels.files import PARTIAL

MOST_FOLDERS = 100_000
"""Folders below a path that are looked into for autoencoders."""


class Format(NamedTuple):
    """A file format of one autoencoder."""

    detect: Callable[[Path], bool]
    """True for a path (a folder or a file) of this format."""
    read: Callable[[Path], SAERecord]
    """Raises FileNotFoundError, and ValueError for what is damaged or has no form here."""
    files: tuple[str, ...]
    """Names of its files."""
    write: Callable[[SAERecord, Path], None] | None = None
    """Writes into a folder; None: no export."""
    pickled: bool = False
    """Read only where its name is given: its files are pickles."""


FORMATS = {
    "resae": Format(own.detect, own.read, own.FILES, own.write),
    "saelens": Format(saelens.detect, saelens.read, saelens.FILES, saelens.write),
    "sparsify": Format(sparsify.detect, sparsify.read, sparsify.FILES, sparsify.write),
    "gemma_scope": Format(gemma_scope.detect, gemma_scope.read, gemma_scope.FILES),
    "mlsae": Format(mlsae.detect, mlsae.read, mlsae.FILES),
    "dictionary_learning": Format(
        dictionary_learning.detect,
        dictionary_learning.read,
        dictionary_learning.FILES,
        pickled=True,
    ),
    "openai": Format(openai.detect, openai.read, openai.FILES, pickled=True),
}
"""In the order in which they are tried."""


class Found(NamedTuple):
    """An autoencoder of a file format, where it lies."""

    record: SAERecord
    format: str
    path: Path

    def autoencoder(self) -> Autoencoder:
        """As one of ours; a folder of ours with all its settings."""
        return own.load(self.path) if self.format == "resae" else sae_from_record(self.record)


class Converted(NamedTuple):
    """An autoencoder that was written in another format."""

    source: Path
    format: str
    """Format of the source."""
    folder: Path
    """Destination."""
    input_kind: str
    folded: tuple[str, ...] = ()
    """As `SAERecord.folded`."""


def import_sae(
    source: str | Path,
    *,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
    max_active: int | None = None,
) -> Autoencoder:
    """Read an autoencoder of another library (or of this one) as one of ours, in eval mode.

    Args:
        source: a folder, a file, or a repository of the hub, owner/name.
        format: one of `FORMATS`; None: found out. `dictionary_learning` and `openai`, whose files
            are pickles, have to be named.
        hook_point: the folder in `source`, where it has several.
        revision: branch, tag or commit of a repository.
        max_active: slots of a code, for kinds with a threshold (`ThresholdSAE`).

    Raises:
        TypeError: `source` is neither a path nor a name.
        FileNotFoundError: there is nothing of that name.
        ValueError: a file is damaged or holds NaN or infinite weights, a setting has no form here
            (the message names it), or the format is unknown.
    """
    return import_placed(source, format, hook_point, revision, max_active)[0]


def import_placed(
    source: str | Path,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
    max_active: int | None = None,
) -> tuple[Autoencoder, str | None]:
    """As `import_sae`, and the hook point that the file names."""
    name, path = find_format(source, format, hook_point, revision)
    if name == "resae":  # kinds that no record holds, too
        return own.load(path, max_active=max_active), own.hook_point_in(path)
    record = _finite(Found(FORMATS[name].read(path), name, path)).record
    return sae_from_record(record, max_active=max_active), record.hook_point


def export_sae(
    sae: Autoencoder,
    folder: str | Path,
    format: str,
    *,
    hook_point: str | None = None,
    model: str | None = None,
) -> None:
    """Write an autoencoder for another library into a folder that is absent or empty.

    Args:
        format: `saelens`, `sparsify` or `resae`.
        hook_point: such as `blocks.6.hook_resid_post`; SAELens reads it as `hook_name`. An
            autoencoder of affine residuals gets none there.
        model: name of the language model.

    Raises:
        TypeError: no autoencoder of ours, or names that are no text.
        ValueError: the format cannot hold this autoencoder, or its weights are not finite.
        FileExistsError: the folder has content.
        OSError: it cannot be written.
    """
    if not isinstance(sae, Autoencoder):
        raise TypeError(
            f"export_sae: got {type(sae).__module__}.{type(sae).__qualname__}, expected an "
            f"autoencoder of resae; import_sae reads those of other libraries from their files"
        )
    for name, text in (("hook_point", hook_point), ("model", model)):
        if not isinstance(text, str | None):
            raise TypeError(f"export_sae: {name} is {type(text).__name__}, expected its name")
    write = _writer(format)
    sae.require_finite(f"export_sae to {folder}")
    if format == "resae":  # every kind, with all its settings
        write_folder(Path(folder), lambda new: sae.save(new, hook_point=hook_point, model=model))
        return
    record = replace(sae.record(), hook_point=hook_point, model=model).check(folder)
    write_folder(Path(folder), lambda new: write(record, new))


def read_sae(
    source: str | Path,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
) -> Found:
    """The record of an autoencoder; arguments and errors as of `import_sae`, but that NaN is left
    to the caller."""
    name, path = find_format(source, format, hook_point, revision)
    return Found(FORMATS[name].read(path), name, path)


def find_format(
    source: str | Path,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
) -> tuple[str, Path]:
    """Format and local path of an autoencoder; of a repository its files are downloaded."""
    _require_known(format)
    for name, given in (("source", source), ("hook_point", hook_point or "")):
        if not isinstance(given, str | Path):
            raise TypeError(
                f"import_sae: {name} is {type(given).__module__}.{type(given).__qualname__}, "
                f"expected a path or a repository owner/name"
            )
    tried = [format] if format else [n for n, known in FORMATS.items() if not known.pickled]
    files = tuple(dict.fromkeys(file for name in tried for file in FORMATS[name].files))
    path = locate(source, hook_point, revision, files, _refuse_language_model)
    if format is not None:
        return format, path
    for name, known in FORMATS.items():
        if known.detect(path) or (path.suffix == ".safetensors" and known.detect(path.parent)):
            if known.pickled:
                break
            return name, path if known.detect(path) else path.parent
    raise _refusal(path)


def _refuse_language_model(folder: Path) -> None:
    """Raise ValueError for the folder of a language model, whose weights have a name that those of
    mlsae have too."""
    if has(folder, "config.json") and not has(folder, "cfg.json"):
        cfg = load_json(folder / "config.json", "SAE")
        if isinstance(cfg, dict) and {"model_type", "architectures"} & cfg.keys():
            raise ValueError(
                f"SAE {folder}: config.json is that of a language model "
                f"({brief(cfg.get('model_type') or cfg['architectures'])}), and no autoencoder is "
                f"beside it; name a repository or folder of autoencoders"
            )


def _refusal(path: Path) -> Exception:
    if path.suffix in (".pt", ".pth") or dictionary_learning.detect(path):
        return ValueError(
            f"SAE {path}: a pickle, which is only read if its format is named: "
            f"format='dictionary_learning' or 'openai' (--format)"
        )
    if not path.exists():
        return FileNotFoundError(f"SAE {path}: there is no such file or folder")
    inside = [str(folder.relative_to(path)) for folder in folders_in(path)]
    if inside:
        return ValueError(
            f"SAE {path}: {len(inside)} autoencoders below it; name one as hook_point "
            f"(--hook-point): {', '.join(inside[:8])}"
        )
    return ValueError(
        f"SAE {path}: no format that is known here; expected one of {', '.join(FORMATS)}"
    )


def folders_in(path: Path, format: str | None = None) -> list[Path]:
    """Folders below a folder that hold an autoencoder, damaged ones included, by name; links to
    folders are not followed, nor is what a conversion that was killed left behind; of a run of
    resae, those of its stack and not of its checkpoints.

    Raises:
        OSError: a folder cannot be read.
        ValueError: there are more than `MOST_FOLDERS` folders.
    """
    found: list[Path] = []
    waiting = [path] if path.is_dir() else []
    visited = 0
    while waiting:
        folder = waiting.pop()
        is_stack = (folder / "resae.json").is_file()
        for inner in _folders_of(folder):
            visited += 1
            if _holds_one(inner, format):
                found.append(inner)
            elif not is_stack:
                waiting.append(inner)
        if visited > MOST_FOLDERS:
            raise ValueError(
                f"{path} has more than {MOST_FOLDERS:,} folders; name one that holds autoencoders"
            )
    return sorted(found)


def _folders_of(folder: Path) -> list[Path]:
    try:
        inner = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()]
        return [p for p in inner if not p.name.endswith(PARTIAL)]
    except OSError as error:
        raise OSError(
            f"cannot read the folder {folder} ({error.strerror}), in which autoencoders are looked "
            f"for"
        ) from None


def _holds_one(folder: Path, format: str | None) -> bool:
    """True for a folder of this or any format, and for one whose settings are damaged."""
    try:
        return any(f.detect(folder) for n, f in FORMATS.items() if format in (None, n))
    except ValueError:
        return True
    except OSError:  # it may not be entered, which the search in it will tell
        return False


def convert(
    source: str | Path,
    destination: Path,
    to: str,
    *,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
    max_active: int | None = None,
    on_skip: Callable[[Path, Exception], None] | None = None,
) -> list[Converted]:
    """Read an autoencoder, or all below a local folder, and write each in format `to`.

    Args:
        on_skip: called with the folder of each of several that cannot be converted, and why; it is
            left out. None: the first of these is an error.

    Returns:
        An entry for each that was written: into `destination`, or into a folder in it.

    Raises:
        as of `import_sae` and `export_sae`, or if none can be converted; then nothing is written.
    """
    write = _writer(to)
    _require_known(format)
    alone = hook_point or any(known.detect(Path(source)) for known in FORMATS.values())
    inside = [] if alone else folders_in(Path(source), format)
    _require_outside(destination, inside or [Path(source) / (hook_point or "")])
    written: list[Converted] = []

    def write_one(folder: str | Path, new: Path, final: Path) -> Converted:
        name, path = find_format(folder, format, None if inside else hook_point, revision)
        if name == to == "resae":
            sae = own.rewrite(path, new, max_active=max_active)
            return Converted(path, name, final, str(sae.config.input_kind))
        record = _finite(Found(FORMATS[name].read(path), name, path)).record
        if to == "resae":
            own.write(record, new, max_active=max_active)
        else:
            write(record, new)
        return Converted(path, name, final, str(record.input_kind), record.folded)

    def write_all(new: Path) -> None:
        for folder in inside:
            name = folder.relative_to(source)
            try:
                written.append(write_one(folder, new / name, destination / name))
            except (ValueError, FileNotFoundError) as error:
                if on_skip is None:
                    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
                    raise kind(
                        f"{error} (one of {len(inside)} autoencoders; nothing is written, unless "
                        f"--skip-unsupported leaves it out)"
                    ) from None
                shutil.rmtree(new / name, ignore_errors=True)
                on_skip(folder, error)
        if inside and not written:
            raise ValueError(f"{source}: none of its {len(inside)} autoencoders can be converted")
        if not inside:
            written.append(write_one(source, new, destination))

    write_folder(destination, write_all)
    return written


def _finite(found: Found) -> Found:
    """Return what was found; raise ValueError for weights that are NaN or infinite."""
    if bad := found.record.non_finite():
        raise ValueError(f"SAE {found.path}: NaN or infinite entries in {', '.join(bad)}")
    return found


def _require_outside(destination: Path, sources: Sequence[Path]) -> None:
    """Raise ValueError for a destination within the folder of an autoencoder to be converted."""
    with _named_destination(destination):
        above = destination.resolve().parents
    for source in sources:
        if source.is_dir() and source.resolve() in above:
            raise ValueError(f"{destination} lies within {source}; choose a folder outside")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the result to `folder`, which has to be absent or empty.

    Raises:
        FileExistsError: it has content.
        OSError: it cannot be written; then no folder is left behind.
    """
    made: list[Path] = []
    with _named_destination(folder):
        if not is_unused(folder):
            raise FileExistsError(f"{folder} is there and not empty; choose another, or remove it")
        made = [parent for parent in folder.absolute().parents if not parent.exists()]
        require_writable(folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}."
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=PARTIAL))
    try:
        write(temporary)
        with _named_destination(folder):
            temporary.chmod(0o755)
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


@contextmanager
def _named_destination(folder: Path) -> Generator[None]:
    """Errors of the operating system in words that name the folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is None:  # in words already
            raise
        reason = getattr(error, "strerror", error)  # ValueError: a NUL in the name
        raise OSError(
            f"cannot write the folder {folder} ({reason}); choose another destination"
        ) from None


def _require_known(format: str | None) -> None:
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r}, expected one of {', '.join(FORMATS)}")


def _writer(format: str) -> Callable[[SAERecord, Path], None]:
    write = FORMATS[format].write if format in FORMATS else None
    if write is None:
        able = [name for name, known in FORMATS.items() if known.write is not None]
        raise ValueError(
            f"format={format!r}, expected one of those that are written: {', '.join(able)}"
        )
    return write
