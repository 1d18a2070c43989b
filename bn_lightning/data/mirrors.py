"""Download from mirrors; each file is verified before it is stored."""

import http.client
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from bn_lightning.data import files
from bn_lightning.data.files import File
from bn_lightning.data.labelled_images import DataError, DataNotFound

# Base URLs of the four .gz files. The first one that answers is tried first.
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
# Time for the first mirror to answer. It is short, because `auto` also runs without a
# network.
REACH_SECONDS = 6.0
STALL_SECONDS = 20.0  # until the next bytes of a download
# urllib raises ValueError for a text that is no URL. A DataError is a ValueError too.
UNREACHABLE = (OSError, ValueError, http.client.HTTPException)


def download(root: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Download the files that are missing in `root`, into torchvision's layout.

    Each file is downloaded into a temporary folder, verified, and then moved to its
    final path. So an interrupted download leaves no partial file, and two processes can
    download in parallel.

    Raises:
        DataNotFound: no mirror answers, or none has the right file.
        DataError: the files cannot be stored in `root`.
    """
    missing = [file for file in files.FULL if not _is_valid(root, file)]
    if not missing:
        return
    mirrors = _reachable_first(mirrors)
    target = root / files.LAYOUTS[0]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in missing:
            _download_file(file, target, mirrors)
    except OSError as error:
        raise DataError(
            f"Fashion-MNIST cannot be stored in {target}: {error}.\n"
            "Choose another folder: --data.root FOLDER"
        ) from error


def _is_valid(root: Path, file: File) -> bool:
    try:
        files.read(files.locate(root, file), file)
    except DataError:
        return False
    return True


def _download_file(file: File, target: Path, mirrors: Sequence[str]) -> None:
    name = f"{file.name}.gz"
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
            try:
                print(f"downloading {url}", file=sys.stderr)
                path = Path(folder, name)
                reply = urllib.request.urlopen(url, timeout=STALL_SECONDS)
                with reply, path.open("wb") as stream:
                    shutil.copyfileobj(reply, stream)
                files.read(path, file)
                _store(path, target, file)
            except UNREACHABLE as error:
                # On Windows a file cannot be replaced while another process reads it.
                # In that case the other process has already stored a valid file.
                if not _is_valid(target, file):
                    failures.append(f"\n    {url}: {error}")
                    continue
            return
    raise DataNotFound(f"{name} could not be downloaded:{''.join(failures)}")


def _store(path: Path, target: Path, file: File) -> None:
    # A temporary file is readable by its owner only.
    path.chmod(0o644)
    # A corrupt raw file would take precedence over the valid .gz file.
    (target / file.name).unlink(missing_ok=True)
    path.replace(target / path.name)


def _reachable_first(mirrors: Sequence[str]) -> list[str]:
    """Return the mirrors that answer within `REACH_SECONDS`, followed by the others.

    All mirrors are contacted in parallel. The function returns when the first one
    answers. It uses daemon threads, because a program cannot set a timeout for a DNS
    lookup.

    Raises:
        DataNotFound: no mirror answers.
    """
    answered: list[str] = []
    failures: dict[str, str] = {}
    is_decided = threading.Event()

    def contact(mirror: str) -> None:
        url = f"{mirror.rstrip('/')}/{files.TEST_LABELS}.gz"
        try:
            urllib.request.urlopen(url, timeout=REACH_SECONDS).close()
            answered.append(mirror)
            is_decided.set()
        except UNREACHABLE as error:
            failures[mirror] = str(error)
        if len(failures) == len(mirrors):
            is_decided.set()

    for mirror in mirrors:
        threading.Thread(target=contact, args=(mirror,), daemon=True).start()
    is_decided.wait(REACH_SECONDS)
    if not answered:
        no_answer = f"no answer in {REACH_SECONDS:g} s"
        lines = (f"\n    {mirror}: {failures.get(mirror, no_answer)}" for mirror in mirrors)
        raise DataNotFound(f"No mirror of Fashion-MNIST can be reached:{''.join(lines)}")
    reachable = list(answered)
    return reachable + [mirror for mirror in mirrors if mirror not in reachable]
