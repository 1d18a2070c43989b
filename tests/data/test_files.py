"""Verification of the idx files."""

import gzip

import pytest

from bn_lightning.data import files, sources
from tests.support.mirror import content, header, write_files

pytestmark = pytest.mark.usefixtures("small")


LABELS = files.SAMPLE[1]
CORRUPT = {
    "half a raw file": (lambda b: b[:3_000], "3,000 bytes"),
    "one byte too many": (lambda b: b + b"\0", "more bytes"),
    "magic number": (lambda b: b"\0\0\x08\x03" + b[4:], "0x00000803"),
    "dimensions": (lambda b: header(6_001) + b[8:], r"\(6001,\)"),
    "a label of 10": (lambda b: b[:-1] + b"\x0a", "label 10 at index 5999"),
    "another order": (lambda b: b[:8] + b[8:][::-1], "sha256"),
    "empty": (lambda b: b"", "magic number 0x"),
}


@pytest.mark.parametrize("fault", CORRUPT)
@pytest.mark.parametrize("raw", [True, False])
def test_a_corrupt_file_is_named_and_refused(tmp_path, fault, raw):
    corrupt, found = CORRUPT[fault]
    target = write_files(tmp_path, "", raw)
    path = target / (LABELS.name if raw else f"{LABELS.name}.gz")
    corrupted = corrupt(content(LABELS))
    path.write_bytes(corrupted if raw else gzip.compress(corrupted))
    with pytest.raises(files.DataError, match=rf"(?s){path.name}.*found: .*{found}.*expected: "):
        sources.load(str(tmp_path))


def test_a_truncated_gz_file_is_refused(tmp_path):
    path = write_files(tmp_path, "", raw=False) / f"{LABELS.name}.gz"
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(files.DataError, match="truncated or damaged"):
        sources.load(str(tmp_path))
