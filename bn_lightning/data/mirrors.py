"""Mirrors of Fashion-MNIST: downloads that are checked before they are kept."""

import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from bn_lightning.data import files
from bn_lightning.data.files import DataError, File, NotThere

# Folders that hold the four .gz files. The first to answer is tried first.
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
REACH_SECONDS = (
    6.0  # for the first mirror to answer; without a network `auto` must not keep anybody waiting
)
STALL_SECONDS = 20.0  # for the next bytes of a download that has begun


def download(root: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Fetch what `root` lacks of the four files, in torchvision's layout.

    Each file is fetched into a folder of its own, checked there, and only then moved under its name: a download that is
    cut off leaves nothing that could be taken as good, and two processes at once do not disturb each other.

    Raises:
        NotThere: no mirror answers, or none has the right file; the message says what each of them gave.
    """
    missing = [file for file in files.WHOLE if not _is_good(root, file)]
    if not missing:
        return
    mirrors = _reachable(mirrors)
    target = root / files.LAYOUTS[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in missing:
            _fetch(file, target, mirrors)
    except OSError as error:
        raise DataError(f"Fashion-MNIST cannot be kept in {target}: {error}") from error


def _is_good(root: Path, file: File) -> bool:
    try:
        files.read(files.locate(root, file), file)
    except DataError:
        return False
    return True


def _fetch(file: File, target: Path, mirrors: Sequence[str]) -> None:
    import pooch  # here, since only a download needs it

    pooch.get_logger().setLevel(
        logging.WARNING
    )  # it would advise to add a checksum: there is one, of the content
    faults = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file.name}.gz"
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
            try:
                print(f"downloading {url}", file=sys.stderr)
                fetch = pooch.HTTPDownloader(
                    progressbar=sys.stderr.isatty(), timeout=(REACH_SECONDS, STALL_SECONDS)
                )
                path = Path(pooch.retrieve(url, None, f"{file.name}.gz", folder, downloader=fetch))
                files.read(path, file)
                path.chmod(0o644)  # a temporary file is for its owner alone
                (target / file.name).unlink(
                    missing_ok=True
                )  # a broken raw file would be found before the good .gz
                path.replace(target / path.name)
            except (OSError, DataError) as error:  # requests' errors are OSErrors
                # On Windows a file cannot be replaced while a faster process, which has put it there, reads it.
                if not _is_good(target, file):
                    faults.append(f"    {url}: {_reason(error)}")
                    continue
            return
    raise NotThere(f"{file.name}.gz could not be downloaded:\n" + "\n".join(faults))


def _reason(error: Exception) -> str:
    """What went wrong, without the connection pools that requests wraps around it."""
    text, *cause = str(error).rsplit("Caused by ", 1)
    return cause[0].rsplit(": ", 1)[-1].rstrip("\"')") if cause else text


def _reachable(mirrors: Sequence[str]) -> list[str]:
    """The mirrors that answer within `REACH_SECONDS`, the rest after them; all are asked at once.

    In threads of its own, because looking up a name has no time-out that a program could set.
    """
    import requests

    answered: list[str] = []
    faults: dict[str, str] = {}
    first = threading.Event()

    def ask(mirror: str) -> None:
        try:
            with requests.get(
                f"{mirror.rstrip('/')}/{files.TEST_LABELS}.gz", stream=True, timeout=REACH_SECONDS
            ) as reply:
                reply.raise_for_status()
            answered.append(mirror)
            first.set()
        except OSError as error:
            faults[mirror] = _reason(error)
        if len(faults) == len(mirrors):
            first.set()

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    first.wait(REACH_SECONDS)
    if not answered:
        said = (
            f"    {mirror}: {faults.get(mirror, f'no answer in {REACH_SECONDS:g} s')}"
            for mirror in mirrors
        )
        raise NotThere("No mirror of Fashion-MNIST can be reached:\n" + "\n".join(said))
    known = list(answered)
    return known + [mirror for mirror in mirrors if mirror not in known]
