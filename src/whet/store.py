"""What is kept between processes: trials, per-example outcomes, rates, and artifacts by fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from whet.errors import StoreError
from whet.metrics import Outcome

LOCKED = 30.0  # seconds to wait for another process to be done with the file
SCHEMA = """
create table if not exists outcomes (key text primary key, body text not null);
create table if not exists trials (
    run text not null, trial text not null, body text not null, primary key (run, trial)
);
create table if not exists rates (key text primary key, body text not null);
create table if not exists scores (
    key text not null, row text not null, body text not null, primary key (key, row)
);
"""


Scores = tuple[str, dict[str, tuple[float, ...]]]  # their key, and by the hash of the row its uncalibrated scores


@cache
def code() -> str:
    """The hash of this package's source, by which results are kept: while a version is made, its number tells less.

    In a release, whose source does not change, it says as much as the number.
    """
    package = Path(__file__).parent
    found = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package).as_posix()} {file.stat().st_size} ".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def home_folder() -> Path:
    """Where things are kept: `WHET_HOME`, else `.whet` in the working folder."""
    return Path(os.environ.get("WHET_HOME") or ".whet").absolute()


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place; half a surrogate pair, which UTF-8 cannot hold, becomes "?".

    Raises StoreError where that fails; the old file stays.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        found = error.strerror or str(error)
        raise StoreError(f"cannot write {path}", found=found, do="free space, or choose another place") from error


def place_for_file(path: Path) -> None:
    """Raise StoreError where `write_text` could not write a file, as far as that can be told before the work."""
    above = path.absolute().parent
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        found = f"{path} is a folder" if path.is_dir() else f"no folder {above} to write into"
        raise StoreError(f"cannot write {path}", expected="a file in a folder that can be written", found=found,
                         do="make the folder, or name another file")  # fmt: skip


def place_for(folder: Path, mark: str) -> None:
    """Raise StoreError where `anew` could not write a folder there, as far as that can be told before the work."""
    ours = folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))
    if folder.exists() and not ours:
        raise StoreError(f"{folder} holds something else", expected="an empty or new folder", do="name another")
    if folder.is_dir() and (folder.is_mount() or folder.samefile(Path.cwd())):  # neither can be renamed away
        found = "a mount" if folder.is_mount() else "where you are"
        raise StoreError(f"{folder} cannot be put in place whole", expected="a folder that can be renamed", found=found,
                         do="name one within it")  # fmt: skip
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(f"cannot write {folder}", found=f"{above}, which nothing can be put into", do="choose --out")


@contextmanager
def anew(folder: Path, mark: str) -> Iterator[Path]:
    """Write a folder aside and put it in the place of an older one of its kind, which holds the file `mark`.

    Raises StoreError where the folder holds something else or cannot be written; the old one stays then.
    """
    place_for(folder, mark)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        old, work = place / "old", place / "new"  # within: what mkdtemp makes is for its owner's eyes alone
        work.mkdir()
    except OSError as error:
        raise StoreError(f"cannot write {folder}", found=error.strerror or str(error), do="choose --out") from error
    try:
        yield work
        if folder.exists():
            os.replace(folder, old)
        os.replace(work, folder)
    except OSError as error:
        raise StoreError(f"cannot write {folder}", found=error.strerror or str(error), do="free space") from error
    finally:
        if old.exists() and not folder.exists():  # cut off between the two
            os.replace(old, folder)
        shutil.rmtree(place, ignore_errors=True)


def _outcome(body: dict[str, Any]) -> Outcome:
    return Outcome(**{**body, "others": tuple(body["others"])})


class Store:
    """A folder with a SQLite file; every write is one transaction, so a killed process leaves whole rows or none."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or home_folder()
        self.file = self.home / "whet.sqlite"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as base:
                base.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"cannot use the store {self.home}",
                expected="a folder that can be written", found=str(error), do="set WHET_HOME to another folder",
            ) from error  # fmt: skip

    def _open(self) -> sqlite3.Connection:
        base = sqlite3.connect(self.file, timeout=LOCKED)
        given_up = time.monotonic() + LOCKED
        while True:
            try:
                base.execute("pragma journal_mode=wal")
                return base
            except sqlite3.OperationalError as error:
                # Two processes make a new file at once: this change does not wait for the other's lock by itself.
                if "locked" not in str(error) or time.monotonic() > given_up:
                    base.close()
                    raise
                time.sleep(0.01)

    def _put(self, sql: str, values: Sequence[str]) -> None:
        self._write(lambda base: base.execute(sql, values))

    def _write(self, change: Callable[[sqlite3.Connection], object]) -> None:
        try:
            with closing(self._open()) as base, base:
                change(base)
        except sqlite3.Error as error:
            raise StoreError(f"cannot write {self.file}", found=str(error), do="free space, then run again") from error

    def _get(self, sql: str, values: Sequence[str]) -> Any:
        rows = self._read(sql, values)
        return json.loads(rows[0][0]) if rows else None

    def _read(self, sql: str, values: Sequence[str]) -> list[tuple[str, ...]]:
        try:
            with closing(self._open()) as base:
                return base.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            do = "wait for the other run" if "locked" in str(error) else "move it away"
            raise StoreError(f"cannot read {self.file}", found=str(error), do=f"{do}, then run again") from error

    def outcomes(self, key: str) -> tuple[tuple[Outcome, ...], dict[str, Any]] | None:
        """Per-example outcomes of one System on one set of rows under one protocol, with what they cost."""
        body = self._get("select body from outcomes where key = ?", [key])
        return None if body is None else (tuple(_outcome(o) for o in body["outcomes"]), body["extra"])

    def keep_outcomes(
        self, key: str, outcomes: Sequence[Outcome], extra: dict[str, Any], scores: Scores | None = None
    ) -> None:
        """Keep outcomes under their key, and the scores they were read off; kept ones are never replaced.

        Both in one transaction: what was spent on the scores stands with the outcomes.
        """
        # ASCII JSON, so that even lone surrogates in answers can be kept.
        body = json.dumps({"outcomes": [asdict(o) for o in outcomes], "extra": extra})
        rows = [(scores[0], row, json.dumps(values)) for row, values in scores[1].items()] if scores else []

        def change(base: sqlite3.Connection) -> None:
            base.execute("insert or ignore into outcomes values (?, ?)", [key, body])
            base.executemany("insert or ignore into scores values (?, ?, ?)", rows)

        self._write(change)

    def scores(self, key: str) -> dict[str, tuple[float, ...]]:
        """Uncalibrated scores of closed sets, by the hash of the row."""
        found = self._read("select row, body from scores where key = ?", [key])
        return {row: tuple(json.loads(body)) for row, body in found}

    def trial(self, run: str, trial: str) -> dict[str, Any] | None:
        """A finished trial of a run."""
        body: dict[str, Any] | None = self._get("select body from trials where run = ? and trial = ?", [run, trial])
        return body

    def keep_trial(self, run: str, trial: str, body: dict[str, Any]) -> None:
        """Keep a finished trial."""
        self._put("insert or replace into trials values (?, ?, ?)", [run, trial, json.dumps(body)])

    def rates(self, key: str) -> dict[str, float] | None:
        """Calibrated rates of a model on this machine."""
        body: dict[str, float] | None = self._get("select body from rates where key = ?", [key])
        return body

    def keep_rates(self, key: str, rates: dict[str, float]) -> None:
        """Keep calibrated rates."""
        self._put("insert or replace into rates values (?, ?)", [key, json.dumps(rates)])

    def artifact(self, fingerprint: str) -> Path:
        """Where the artifact of a fingerprint lies (or is to lie)."""
        return self.home / "artifacts" / fingerprint
