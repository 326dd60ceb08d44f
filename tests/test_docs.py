"""The written docs against what they speak of: pages, links, commands, settings, keys and code."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from whet.cli import main
from whet.methods import Method, Run, table
from whet.search.budget import seconds
from whet.search.recipe import parse
from whet.store import Store
from whet.system import Decoding, System
from whet.task import KEYS, METRICS, Example, Learnable

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(p for d in ("docs", "examples", "benchmarks") for p in (ROOT / d).rglob("*.md"))])
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = {name: kind for name, kind in table().items() if kind.__module__.startswith("whet.")}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for kind, body in FENCE.findall(read(name)) if kind == language]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def commands(name: str) -> Iterator[list[str]]:
    """Every whet command line of a page, as words: lines of shell blocks, and inline code."""
    text = read(name)
    lines = [line for kind, body in FENCE.findall(text) if kind == "sh" for line in body.splitlines()]
    for line in [*lines, *re.findall(r"`(whet [^`\n]+)`", FENCE.sub("", text))]:
        words = shlex.split(line.rpartition("| ")[2] if "| whet " in line else line, comments=True)
        if words[:1] == ["whet"]:
            yield words


def generator() -> Any:
    """docs/cli.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_cli", ROOT / "docs" / "cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = generator()
    assert made.main(["--check"]) == 0, "run `python docs/cli.py`"
    monkeypatch.setattr(made, "PAGE", tmp_path / "cli.md")
    assert made.main(["--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert made.main([]) == 0 and made.main(["--check"]) == 0
    assert made.main(["--chek"]) == 2


def test_cli_page_names_every_command_and_option() -> None:
    text = read("docs/cli.md")
    for name, command in main.commands.items():
        part = text.split(f"## whet {name}\n")[1].split("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in (text if option.opts[0] in ("--json", "--debug") else part)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall(FENCE.sub("", read(name))):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.exists(), f"{name} links to {target}"
        assert place.resolve().is_relative_to(ROOT), f"{name} links out of the project: {target}"
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_method_has_a_page_with_its_settings(name: str) -> None:
    pages = [p for p in sorted((ROOT / "docs").glob("*.md")) if f"\n## `{name}`\n" in p.read_text(encoding="utf-8")]
    assert len(pages) == 1
    part = pages[0].read_text(encoding="utf-8").split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    written = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", part, re.MULTILINE))
    kind: Any = OURS[name]
    assert written == {f.name: repr(f.default) for f in fields(kind) if f.default is not MISSING}
    for page in ("README.md", "README.ko.md"):
        assert f"[`{name}`](docs/{pages[0].name}#{name})" in read(page)


def test_methods_that_are_not_there_are_not_promised() -> None:
    rows = re.findall(r"^\| (.+?) \|.*\| (yes|not in this version) \|$", read("README.md"), re.MULTILINE)
    stated = {name: told == "yes" for cell, told in rows for name in re.findall(r"`(\w+)`", cell)}
    assert {name for name, here in stated.items() if here} == set(OURS)
    assert len(stated) == len(OURS)


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist_with_their_options(name: str) -> None:
    for words in commands(name):
        if len(words) == 1 or words[1].startswith("-"):
            assert words[1:] in ([], ["--help"]), words
            continue
        assert words[1] in main.commands, f"{name}: {' '.join(words)}"
        command = main.commands[words[1]]
        known = {opt for p in command.params for opt in p.opts} | {"--help"}
        assert {w for w in words[2:] if w.startswith("--")} <= known, f"{name}: {' '.join(words)}"
        for option, value in zip(words, words[1:], strict=False):
            if option == "--budget":
                seconds(value)
            if option == "--recipe" and "reminder" not in value:  # CONTRIBUTING's own plugin
                parse(value)


def test_readme_names_commands_and_targets_that_exist() -> None:
    assert {words[1] for words in commands("README.md") if len(words) > 1} == set(main.commands)
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    for name in ("README.md", "README.ko.md", "CONTRIBUTING.md"):
        named = {w for b in blocks(name, "sh") for w in re.findall(r"^make (\S+)", b, re.MULTILINE)}
        assert named and named <= targets
    pinned = re.search(r"^torch==(\S+)$", read("constraints.txt"), re.MULTILINE)
    assert pinned and f"pip install torch=={pinned[1]} --index-url" in read("README.md")
    assert f"pip install torch=={pinned[1]} --index-url" in read("README.ko.md")
    demo = next(b for b in blocks("README.md", "sh") if "--out runs/helpdesk" in b and "improve" in b)
    assert demo.strip() in read("Makefile"), "the README shows what `make demo` runs"


def test_the_map_of_the_tree_is_whole() -> None:
    shown = next(b for b in blocks("README.md", "") if "src/whet/" in b)
    code = ROOT / "src" / "whet"
    named = set(re.findall(r"\b(\w+\.py|\w+/)(?=\s|$)", shown.partition("src/whet/\n")[2].partition("\ndocs/")[0]))
    there = {p.name for p in code.glob("*.py") if not p.name.startswith("__")}
    there |= {f"{p.name}/" for p in code.iterdir() if (p / "__init__.py").exists()}
    assert named == there


def test_task_page_names_every_key_and_metric() -> None:
    text = read("docs/tasks.md")
    assert set(re.findall(r"^\| `(\w+)` \|", text.split("## task.yaml")[1].split("###")[0], re.MULTILINE)) == set(KEYS)
    told = set(re.findall(r"`([\w@]+)`", text.split("### Metrics")[1].split("\n## ")[0]))
    assert {*METRICS, "recall@K", "ndcg@K"} <= told


def test_dependencies_have_a_reason() -> None:
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    text = read("CONTRIBUTING.md").split("## Dependencies")[1].split("\n## ")[0]
    for extra, wanted in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in wanted:
            package = re.split(r"[<>=\[;]", requirement)[0]
            assert re.search(rf"\b{re.escape(package)}\b", text), f"{package} of {extra or 'the core'}"


@pytest.mark.parametrize("name", NAMES)
def test_code_blocks_can_be_read(name: str) -> None:
    for body in blocks(name, "python"):
        compile(body, name, "exec")
    for body in blocks(name, "yaml"):
        assert set(yaml.safe_load(body)) <= set(KEYS)
    for body in blocks(name, "json"):
        yaml.safe_load(body)


def test_the_plugin_of_contributing_keeps_the_contract(tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "my_package"}
    exec(compile("\n".join(blocks("CONTRIBUTING.md", "python")), "CONTRIBUTING.md", "exec", dont_inherit=True), space)
    made = space["Reminder"]()
    assert isinstance(made, Method)
    from whet.model import resolve

    base = System(resolve("fake:hash"), "Say which.", decoding=Decoding(("a", "b"), closed=True, prior=(0.0, 1.0)))
    data = Learnable("toy", "Say which.", "accuracy", ("a", "b"), (Example("1", "p", "a"),))
    new = made.apply(base, data, Run(Store(tmp_path)))
    assert new.instruction == "Say which. Answer with one of: a, b." and new.decoding.prior == ()
    assert base.decoding.prior == (0.0, 1.0) and new.fingerprint != base.fingerprint
    assert space["Brevity"]().score("two words", data.train[0]) == 0.5 and space["Brevity"]().points


def test_readmes_code_by_hand_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second example of the library, with the fake engine in place of a model."""
    monkeypatch.setenv("WHET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    body = next(b for b in blocks("README.md", "python") if "Recipe(" in b)
    space: dict[str, Any] = {"__name__": "by_hand"}
    exec(compile(body.replace("smollm2-135m", "fake:keyword"), "README.md", "exec", dont_inherit=True), space)
    assert 0 < space["card"].score <= 1 and space["card"].n > 100 and space["better"].decoding.prior
