"""Writes the bundled help-desk task: `python examples/helpdesk/make.py`; with --check only compares what is on disk."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from maker import documents, feedback, glossary, knowledge, lastyear, tickets  # noqa: E402
from maker.text import lines  # noqa: E402


def files() -> dict[str, str]:
    """Every file of the task by its path inside the folder."""
    texts, asked = documents.build()
    made = {
        "tickets/task.yaml": tickets.TASK.format(labels=", ".join(tickets.LABELS)),
        "answers/task.yaml": documents.TASK,
        "answers/documents.jsonl": lines(texts),
        "catalogue/task.yaml": knowledge.TASK,
        "catalogue/knowledge.tsv": "".join("\t".join(triple) + "\n" for triple in knowledge.triples()),
        "catalogue/glossary.tsv": "".join(f"{term}\t{definition}\n" for term, definition, *_ in glossary.GLOSSARY),
        "replies/task.yaml": feedback.TASK,
        "replies/feedback.jsonl": lines(feedback.rows("train")),
        "replies/test.jsonl": lines(feedback.rows("test")),
        "last-year/task.yaml": lastyear.TASK,
    }
    for split in ("train", "test"):
        made[f"tickets/{split}.jsonl"] = lines(tickets.rows(split))
        made[f"answers/{split}.jsonl"] = lines(asked[split])
        made[f"catalogue/{split}.jsonl"] = lines(knowledge.questions(split))
        made[f"last-year/{split}.jsonl"] = lines(lastyear.rows(split))
    return made


def write(path: Path, text: str) -> None:
    """Writes aside and renames, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)


def main() -> int:
    """Returns 1 when --check finds a file that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files on disk and write nothing")
    check = parser.parse_args().check
    made = files()
    if not check:
        for name, text in made.items():
            write(HERE / name, text)
        return 0
    there = {name: (HERE / name).read_bytes() for name in made if (HERE / name).is_file()}
    differing = ", ".join(name for name, text in made.items() if there.get(name) != text.encode())
    if differing:
        print(f"These files differ from what make.py makes: {differing}; run it without --check.", file=sys.stderr)
    return int(bool(differing))


if __name__ == "__main__":
    raise SystemExit(main())
