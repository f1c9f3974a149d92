"""Location of an autoencoder: a local path, or a repository of the hub, of which only the named
files of one folder are downloaded."""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError

from resae.strict_json import first_line

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate(
    source: str | Path,
    hook_point: str | None,
    revision: str | None,
    files: Sequence[str],
    check: Callable[[Path], None],
) -> Path:
    """A local path to the autoencoder at `hook_point` of `source`.

    Args:
        source: a path, or a repository owner/name, of which files with these names are downloaded.
        check: called with the folder of a repository while it has its JSON files only; raises
            ValueError where the weights, which may be large, are not wanted.

    Raises:
        FileNotFoundError: neither such a path nor such a repository, or nothing at that hook point.
        ValueError: `hook_point` leads out of the folder or is a pattern, or a local path with a
            revision; or as of `check`.
    """
    if hook_point is not None and (
        ".." in Path(hook_point).parts or Path(hook_point).is_absolute()
    ):
        raise ValueError(
            f"hook_point={hook_point!r} leads out of {source}; expected a folder in it"
        )
    if Path(source).exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} for {source}, which is a local path")
        return Path(source) / (hook_point or "")
    name = str(source)
    if hook_point is not None and set("*?[") & set(hook_point):
        raise ValueError(f"hook_point={hook_point!r} is a pattern; name one folder of {name}")
    if not REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"SAE {name!r}: there is no such path; give a folder, a file or a repository owner/name"
        )
    with _named_errors(name):
        there = [PurePosixPath(file) for file in list_repo_files(name, revision=revision)]
    weights = [f for f in there if f.name in files and f.suffix != ".json"]
    parents = {f.parent for f in weights}
    outermost = {str(f) for f in parents if f.parent not in parents or f == f.parent}
    folder = hook_point or _only_folder(name, outermost)
    prefix = "" if folder == "." else f"{folder}/"
    patterns = [prefix + file for file in files]  # without wildcards: no other file can come
    settings = [pattern for pattern in patterns if pattern.endswith(".json")]
    with _named_errors(name):
        root = snapshot_download(name, revision=revision, allow_patterns=settings)
    check(Path(root) / folder)
    with _named_errors(name):
        root = snapshot_download(name, revision=revision, allow_patterns=patterns)
    return Path(root) / folder


@contextmanager
def _named_errors(name: str) -> Generator[None]:
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"SAE {name!r}: there is no such path, and no such repository could be read from the "
            f"hub ({first_line(error)})"
        ) from None


def _only_folder(name: str, folders: set[str]) -> str:
    if "." in folders:
        return "."
    if len(folders) != 1:
        shown = ", ".join(sorted(folders)[:8]) + (", …" if len(folders) > 8 else "")
        raise FileNotFoundError(
            f"{len(folders)} autoencoders in {name}"
            + (f": {shown}; name one as hook_point" if folders else " in a format known here")
        )
    return folders.pop()
