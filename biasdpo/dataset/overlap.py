"""Whether a text shares eight words in a row with a benchmark: training must never eat its test.

Benchmark files are read as plain text, whatever their format: the values of JSON, the cells of CSV, else lines; no run of words
goes on from one field into the next. A field of fewer than eight words is in nobody's way.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from biasdpo.dataset.words import Counts, Hashes, distinct, mix, normalise_all, ramp, word_hashes
from biasdpo.errors import DatasetError

GRAM_WORDS = 8  # as in GPT-3's and Llama 2's contamination checks, which take 8 to 13
_ABOUT = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "CITATION", "CHANGELOG")  # files about a benchmark, no items
_BLOCK_CHARACTERS = 500_000  # of text at once, to bound memory
_SIEVE_SLOTS = 16  # a gram, so that one gram in 16 that is none of the benchmarks' has to be looked up
_FACTORS: Hashes = np.random.default_rng(8).integers(0, 2**64, size=GRAM_WORDS, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True, eq=False)
class Overlap:
    """The word 8-grams of a folder's benchmark files.

    files     what was read, relative to the folder
    skipped   what is no UTF-8 text: nothing is known of it
    """

    files: tuple[str, ...]
    skipped: tuple[str, ...]
    _grams: Hashes  # (G,) sorted; a gram once a file
    _file_of: NDArray[np.int32]  # (G,) index in `files`
    _sieve: NDArray[np.bool_]  # whether any gram has these low bits

    def overlaps(self, text: str) -> bool:
        """Whether a text shares eight words in a row with any file."""
        return bool(self.flags([text])[0])

    def flags(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """`overlaps` of N texts (N,), a million words a second or so."""
        flags = np.zeros(len(texts), np.bool_)
        for grams, text in _grams_of(texts):
            flags[text[self._known(grams)]] = True
        return flags

    def files_of(self, text: str) -> tuple[str, ...]:
        """The files with which a text shares eight words in a row."""
        found: set[int] = set()
        for grams, _text in _grams_of([text]):
            for gram in grams[self._known(grams)]:
                begin, end = np.searchsorted(self._grams, gram), np.searchsorted(self._grams, gram, side="right")
                found |= set(self._file_of[begin:end].tolist())
        return tuple(self.files[i] for i in sorted(found))

    def _known(self, grams: Hashes) -> NDArray[np.int64]:
        """Which of the grams are in some file: their places."""
        places = np.flatnonzero(self._sieve[grams & np.uint64(len(self._sieve) - 1)])
        at = np.minimum(np.searchsorted(self._grams, grams[places]), max(0, len(self._grams) - 1))
        return places[self._grams[at] == grams[places]] if len(self._grams) else places


def load_overlap(folder: Path) -> Overlap:
    """Read every benchmark file below a folder. A folder that is not there is a DatasetError."""
    if not folder.is_dir():
        raise DatasetError(f"No folder {folder} to read benchmark files from: name one with --data-dir")
    files: list[str] = []
    skipped: list[str] = []
    grams: list[Hashes] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or path.name.upper().startswith(_ABOUT) or not path.is_file():
            continue
        try:
            fields = _fields(path)
        except OSError as exc:
            raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; make it readable, or take it out") from exc
        except UnicodeDecodeError:
            skipped.append("/".join(parts))
            continue
        files.append("/".join(parts))
        found = [grams_of_block for grams_of_block, _text in _grams_of(fields)]
        grams.append(distinct(np.concatenate([np.empty(0, np.uint64), *found])))
    return _build(tuple(files), tuple(skipped), grams)


def _build(files: tuple[str, ...], skipped: tuple[str, ...], grams: list[Hashes]) -> Overlap:
    """`grams`: those of each file, each once."""
    all_grams = np.concatenate([np.empty(0, np.uint64), *grams])
    file_of = np.repeat(np.arange(len(files)), [len(own) for own in grams]).astype(np.int32)
    order = np.argsort(all_grams, kind="stable")
    sieve = np.zeros(1 << (_SIEVE_SLOTS * len(all_grams)).bit_length(), np.bool_)
    sieve[all_grams & np.uint64(len(sieve) - 1)] = True
    return Overlap(files, skipped, all_grams[order], file_of[order], sieve)


def _fields(path: Path) -> list[str]:
    """The texts of a file that belong together: JSON values, CSV cells, else lines. Raises UnicodeDecodeError."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            return [cell for row in rows for cell in row]
        except csv.Error:  # a cell past the module's limit, a NUL: then it is read as lines
            return text.splitlines()
    try:
        return list(_strings(orjson.loads(text)))
    except ValueError:
        return [field for line in text.splitlines() for field in _line_fields(line)]


def _line_fields(line: str) -> Iterable[str]:
    if line.lstrip()[:1] in ("{", "["):
        try:
            return _strings(orjson.loads(line))
        except ValueError:  # a line of text that begins with a bracket
            pass
    return [line]


def _strings(value: Any) -> Iterator[str]:
    """All strings among the values of JSON, not the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _grams_of(texts: Sequence[str]) -> Iterator[tuple[Hashes, Counts]]:
    """Block by block, the hashes of the texts' 8-grams, and the number of each one's text."""
    begin = 0
    while begin < len(texts):
        end, characters = begin, 0
        while end < len(texts) and (end == begin or characters + len(texts[end]) <= _BLOCK_CHARACTERS):
            characters += len(texts[end])
            end += 1
        normalised = normalise_all(texts[begin:end])
        long = [i for i, text in enumerate(normalised) if text.count(" ") >= GRAM_WORDS - 1]
        if long:
            yield _grams_of_block([normalised[i] for i in long], [begin + i for i in long])
        begin = end


def _grams_of_block(normalised: list[str], numbers: list[int]) -> tuple[Hashes, Counts]:
    words, counts = word_hashes(normalised)
    grams = counts - (GRAM_WORDS - 1)
    start = ramp(grams) + np.repeat(np.cumsum(counts) - counts, grams)
    total = np.zeros(len(start), np.uint64)
    for k in range(GRAM_WORDS):
        total += words[start + k] * _FACTORS[k]
    return mix(total), np.repeat(np.array(numbers, np.int64), grams)
