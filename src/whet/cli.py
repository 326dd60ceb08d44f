"""The command line: commands, no logic. Results go to stdout, progress to stderr; bad input exits 2 with one line."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from whet import __version__
from whet.errors import WhetError, nearest, printable

if TYPE_CHECKING:
    from whet.progress import Watch
    from whet.system import System

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_MODEL = "smollm2-135m"
SEED = click.IntRange(min=0)


class Commands(click.Group):
    """A group that suggests the nearest command, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as they stand here: the main job first."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command named first in args."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run; exits 0, 1 where a check failed, 2 on bad input (one line on stderr), 130 on Ctrl-C."""
        debug = "--debug" in sys.argv
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to stop
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        # peft loads the one, which complains about kernels that whet has no use for; of broken files whet says itself.
        for chatty in ("bitsandbytes", "pypdf"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        try:
            code = super().main(*args, **{**settings, "standalone_mode": False})
            sys.exit(code if isinstance(code, int) else 0)
        except WhetError as error:
            if debug:
                raise
            _fail(str(error), 2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except (click.Abort, KeyboardInterrupt):
            _fail("stopped; nothing finished is lost: the same command goes on from there", 130)
        except BrokenPipeError:
            sys.exit(141)
        except Exception as error:  # a bug of ours: still one line, unless the trace is asked for
            if debug:
                raise
            if isinstance(error, (OSError, sqlite3.Error)):  # a full disk, a folder that cannot be written
                _fail(f"{error} (expected: files that can be read and written; to do: free space, or see WHET_HOME)", 2)
            _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)", 1)


def _fail(line: str, code: int) -> None:
    # Of `whet` alone, its help.
    print(printable(line if line.startswith("Usage:") else f"whet: {line}"), file=sys.stderr)
    sys.exit(code)


def common(command: F) -> F:
    """The options that every command takes."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, nothing else.")(
        command
    )
    return click.option("--debug", is_flag=True, help="Show a traceback where something goes wrong.")(command)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  whet improve examples/helpdesk/tickets --budget 5m",
)
@click.version_option(__version__, prog_name="whet")
def main() -> None:
    """Make a language model measurably better at your task.

    whet tries the methods that could help, combines what earns its place, confirms it on sealed data and hands over
    one artifact that scores in service what it scored when measured.
    """


def example(*lines: str) -> str:
    """An epilog of examples, line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _print(body: Any) -> None:
    print(json.dumps(body, indent=1, ensure_ascii=False))


def _say(*lines: str) -> None:
    """Print lines for a person; escapes in what data brings along do not reach the terminal."""
    print(printable("\n".join(lines)), flush=True)


def _next(*commands: Sequence[object]) -> None:
    """Print the commands to type next, quoted for a shell: folders and tasks are called as people like."""
    _say("", "next:", *(f"  whet {shlex.join(map(str, words))}" for words in commands))


@contextmanager
def _watched(as_json: bool, work: str, notes: Sequence[str] = ()) -> Iterator[Watch]:
    """Who is told of a piece of work, first of the notes on it; closed at its end."""
    from whet.progress import watch

    told = watch(plain=as_json)
    try:
        for note in notes:
            told.say(note)
        told.arm(work)
        yield told
    finally:
        told.close()


@main.command(epilog=example(
    "whet improve examples/helpdesk/tickets --budget 5m",
    "whet improve TASK --model smollm2-135m --model ./my-model --budget 20m",
    'whet improve TASK --recipe "fewshot(k=8)+calibrate" --out runs/by-hand',
    "whet improve TASK --model openai:gpt-4o-mini@https://api.openai.com/v1",
))  # fmt: skip
@click.argument("task", type=click.Path())
@click.option("--model", "models", multiple=True, default=(DEFAULT_MODEL,), show_default=True,
              help="Alias, folder, .gguf file, Hub id, or openai:NAME@URL; several are raced.")  # fmt: skip
@click.option("--budget", default="10m", show_default=True, help="Time to spend: 90s, 10m, 2h.")
@click.option("--methods", default="", help="Only these methods, separated by commas.")
@click.option("--recipe", default=None, help='Only this recipe, like "fewshot(k=8)+calibrate".')
@click.option("--report-to", multiple=True, help="Also tell each step of trainings to tensorboard, wandb or mlflow.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder for the results [runs/NAME].")
@click.option("--seed", default=0, type=SEED, show_default=True, help="One seed gives one result.")
@click.option("--strict", is_flag=True, help="Refuse train rows that stand in held-out data instead of dropping them.")
@click.option("--trust", is_flag=True, help="Run code that the task brings along (a metric of its own).")
@click.option("--self-contained", is_flag=True, help="Put the base's weights into system/, too.")
@common
def improve(
    task: str, models: tuple[str, ...], budget: str, methods: str, recipe: str | None, report_to: tuple[str, ...],
    out: Path | None, seed: int, strict: bool, trust: bool, self_contained: bool, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Make a model better at TASK: the main job."""
    from whet import report
    from whet.progress import watch
    from whet.search import improve as run

    chosen = tuple(m.strip() for m in methods.split(",") if m.strip())
    made = run(task, model=models, budget=budget, methods=chosen, recipe=recipe, out=out, seed=seed, strict=strict,
               trust=trust, self_contained=self_contained, report_to=report_to,
               watch=watch(plain=as_json))  # fmt: skip
    if as_json:
        _print(made.result)
        return
    own, served = made.folder / "system", ["--trust"] * bool(made.system.servers)
    _say(report.summary(made.result), "", f"report   {made.folder / 'report.html'}",
         f"result   {made.folder / 'result.json'}", f"system   {own}")  # fmt: skip
    _next(["chat", own, *served], ["evaluate", own, task, *(["--trust"] if trust else served)])


def _made(name: str, task: Any, trust: bool) -> System | None:
    """A System from a folder, as it is asked for a task (or None); None where the name is that of a model or server."""
    from whet.memory import for_task
    from whet.system import load

    is_system = (Path(name) / "system.json").exists()
    if is_system or (Path(name).is_dir() and not (Path(name) / "config.json").exists()):
        # Raises where the folder is no System, saying what one holds.
        made = load(name, trust=trust)
        made = for_task(made, task) if task else made
        if task and task.labels and made.decoding.labels and not {*task.labels} & {*made.decoding.labels}:
            label = printable(repr(made.decoding.labels[0]))
            print(f"note: {name} answers {label} and the like, never what {task.name} asks for", file=sys.stderr)
        return made
    return None


def _base(name: str, task: Any, seed: int) -> System:
    """The base System of a model or server, for a task that is split by this seed."""
    from whet.engine import open_session
    from whet.model import resolve
    from whet.search import base_system
    from whet.store import home_folder

    ref, home = resolve(name), home_folder()
    return base_system(ref, task, task.split(seed).learnable, open_session(ref, home), home)


def _metric(system: System, task: Any, run: Any) -> Any:
    """A task's metric; a win rate is one over the untouched base of the System."""
    from whet.methods.reward import metric_of

    base = _base(system.model.base, task, run.seed) if task.metric == "win_rate" else system
    return metric_of(task, base, run)


def _settings(words: tuple[str, ...]) -> dict[str, str]:
    """Settings written as key=value."""
    from whet.errors import MethodError

    for word in words:
        if "=" not in word:
            raise MethodError(f"cannot read the setting {word!r}", expected="key=value", do="like --set k=16")
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


@main.command(epilog=example("whet evaluate runs/sst2/system TASK", "whet evaluate smollm2-135m TASK --split dev"))
@click.argument("system")
@click.argument("task", type=click.Path())
@click.option("--split", default="test", show_default=True, help="train, dev, select or test.")
@click.option("--seed", default=0, type=SEED, show_default=True, help="Of the interval's bootstrap; and of the cut "
              "between train and select, where SYSTEM does not say by which it was made.")  # fmt: skip
@click.option("--trust", is_flag=True, help="Run code that the task brings; let a System reach its server.")
@click.option("--answers", default=None, type=click.Path(path_type=Path), help="Write every answer to this JSONL file.")
@click.option("--reading", is_flag=True, help="Also: how it reads its passages, found or missed, right or wrong ones.")
@common
def evaluate(
    system: str, task: str, split: str, seed: int, trust: bool, answers: Path | None, reading: bool, as_json: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Score SYSTEM (a folder, model or endpoint) on TASK."""
    from dataclasses import asdict

    from whet import reading as passages
    from whet import scorecard
    from whet.methods import Run
    from whet.metrics import sound
    from whet.store import Store, place_for_file, write_text
    from whet.task import load

    if answers:
        place_for_file(answers)
    loaded = load(task, trust=trust)
    made = _made(system, loaded, trust)
    by = scorecard.split_seed(loaded, seed, *filter(None, [made]))
    rows = scorecard.rows_of(loaded, split, by)
    with _watched(as_json, f"{system} on {split}", loaded.notes) as watch:
        opened = made or _base(system, loaded, by)
        run = Run(Store(), by, tell=watch.tell)
        metric = _metric(opened, loaded, run)
        card = scorecard.evaluate(opened, rows, metric, split=split, seed=seed,
                                   store=scorecard.lasting(run.store, opened),
                                   progress=lambda done, of: watch.tell("answering", done, of))  # fmt: skip
        sound(metric, card.outcomes, rows)
        if not opened.model.remote:
            watch.tell("measuring latency and memory", 0, 1)
            card = scorecard.measure(card, opened, rows)
        if reading:
            watch.tell("reading with other passages", 0, 1)
        read = passages.measure(opened, rows, metric, opened.session) if reading else None
    if as_json:
        _print(card.record() | ({"reading": asdict(read)} if read else {}))
    else:
        _say(*scorecard.lines(card), *(passages.lines(read, card.metric) if read else ()))
    if answers:
        write_text(answers, "".join(json.dumps(asdict(o), ensure_ascii=False) + "\n" for o in card.outcomes))


@main.command(epilog=example("whet compare smollm2-135m runs/sst2/system TASK"))
@click.argument("first")
@click.argument("second")
@click.argument("task", type=click.Path())
@click.option("--split", default="test", show_default=True, help="train, dev, select or test.")
@click.option("--seed", default=0, type=SEED, show_default=True, help="Of the bootstrap; and of the cut between train "
              "and select, where neither System says by which it was made.")  # fmt: skip
@click.option("--trust", is_flag=True, help="Run code that the task brings; let a System reach its server.")
@common
def compare(first: str, second: str, task: str, split: str, seed: int, trust: bool, as_json: bool, debug: bool) -> None:
    """Compare FIRST and SECOND in pairs, on the same rows of TASK."""
    from dataclasses import asdict

    from whet.methods import Run
    from whet.progress import apart, figure
    from whet.scorecard import compare as compared
    from whet.scorecard import split_seed
    from whet.store import Store
    from whet.task import load

    loaded = load(task, trust=trust)
    with _watched(as_json, f"{first} against {second}", loaded.notes) as watch:
        made = [_made(name, loaded, trust) for name in (first, second)]
        by = split_seed(loaded, seed, *filter(None, made), split=split)
        opened = [one or _base(name, loaded, by) for name, one in zip((first, second), made, strict=True)]
        run = Run(Store(), by, tell=watch.tell)
        metric = _metric(opened[0], loaded, run)
        a, b, paired = compared(opened[0], opened[1], loaded, split=split, seed=seed, metric=metric, store=run.store,
                           progress=lambda done, of: watch.tell("answering", done, of))  # fmt: skip
    if as_json:
        _print({"first": a.record(), "second": b.record(), **asdict(paired)})
        return
    own, other = figure(a.score, a.metric), figure(b.score, a.metric)
    between, least = apart(paired.difference, paired.low, paired.high, a.metric), paired.smallest_detectable
    _say(f"{first}: {own}   {second}: {other}   ({a.metric}, {a.n} examples)",
         f"difference {between}, p = {paired.p_value:.2g} ({paired.test})",
         "the smallest difference this many examples could have shown: "
         f"{apart(least, least, least, a.metric).partition(',')[0].removeprefix('+')}")  # fmt: skip


@main.command(epilog=example(
    "whet apply fewshot TASK --set k=16 selection=random --out system/",
    "whet apply finetune TASK --set epochs=1 --out tuned/",
    "whet apply finetune TASK --budget 10m --report-to tensorboard --out tuned/",
    "whet apply finetune TASK --budget 2h --trials 12 --out tuned/",
    "whet apply calibrate TASK --system tuned/ --out tuned-calibrated/",
))  # fmt: skip
@click.argument("method")
@click.argument("task", type=click.Path())
@click.option("--system", "system", default=DEFAULT_MODEL, show_default=True, help="What it is applied to.")
@click.option("--set", "pairs", multiple=True, help="Settings: --set k=16 --set selection=random.")
@click.argument("more", nargs=-1)
@click.option("--budget", default=None, help="For a method that trains: race its settings within this time.")
@click.option("--trials", default=0, type=click.IntRange(0), help="Draw settings so often by Optuna, in the budget.")
@click.option("--report-to", multiple=True, help="Also tell each step to tensorboard, wandb or mlflow.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the new System.")
@click.option("--seed", default=0, type=SEED, show_default=True)
@click.option("--trust", is_flag=True, help="Run code that the task brings; let a System reach its server.")
@common
def apply(
    method: str, task: str, system: str, pairs: tuple[str, ...], more: tuple[str, ...], budget: str | None,
    trials: int, report_to: tuple[str, ...], out: Path, seed: int, trust: bool, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Apply one METHOD to a System by hand. Further key=value words after --set are settings, too.

    With --budget, a method that trains races its learning rates unless one is set: after 15 and 40 % of the training
    the better half goes on. In what time is left, its other numbers are raced around the winner.
    """
    if trials and budget is None:
        raise click.UsageError("--trials needs --budget, which says how long they may take")
    from dataclasses import asdict

    from whet.methods import Run, make
    from whet.progress import applied
    from whet.scorecard import split_seed
    from whet.search import tune
    from whet.search.budget import seconds
    from whet.search.out import changed, cleared, leave, unclaimed
    from whet.search.recipe import Recipe
    from whet.store import Store
    from whet.task import load
    from whet.train.team import team
    from whet.update import check

    unclaimed(out)
    settings = _settings((*pairs, *more))
    made = make(method, settings)
    if budget is not None:
        tune.able(made)
    loaded = load(task, trust=trust)
    with _watched(as_json, method, loaded.notes) as watch:
        run = Run(Store(), seed, tell=watch.tell, report_to=report_to)
        start = _made(system, loaded, trust) or _base(system, loaded, seed)
        splits = loaded.split(by := split_seed(loaded, seed, start))  # what it was selected by is not learnt from
        check(made, start, loaded, splits)
        data = splits.learnable
        Recipe((made,)).possible(start, data)  # before a model is opened and its speed measured
        session = run.session(start.model)
        if splits.dropped:
            run.notes["dropped"] = [{"id": name, "why": why} for name, why in splits.dropped]
        if budget is None:
            new = Recipe((made,)).run(start, data, run)
        else:
            new, made = tune.timed(made, start, data, run, seconds(budget), trials, settings, watch.say)
        crew = team()
        if crew.first:
            leave(changed(start, new, Recipe((made,)).name).split_by(loaded.name, by), out, loaded)
        crew.wait()
    if not crew.first:
        return
    spent = run.spent + session.spent
    notes = {k: v for k, v in run.notes.items() if k != "curves"} | cleared(start, new)
    body = {"system": str(out), "fingerprint": new.fingerprint, "spent": asdict(spent), "notes": notes}
    if as_json:
        _print(body)
        return
    also = ["--trust"] * trust
    _say(f"made     {method} on {system}, for {loaded.name}", *applied(notes, spent), f"system   {out}")
    _next(["evaluate", out, task, *also], ["compare", system, out, task, *also])


@main.command(epilog=example(
    "whet update runs/sst2/system TASK --out runs/both",
    "whet update runs/sst2/system TASK --set strategy=ewc --out runs/both",
    "whet update runs/replies/system TASK --feedback judged.jsonl --out runs/replies-2",
))  # fmt: skip
@click.argument("system", type=click.Path())
@click.argument("task", type=click.Path())
@click.option("--feedback", default=None, type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Learn from the judgements in this file instead of from TASK's train rows.")  # fmt: skip
@click.option("--set", "pairs", multiple=True, help="Settings of continual, or of dpo: --set strategy=replay.")
@click.argument("more", nargs=-1)
@click.option("--report-to", multiple=True, help="Also tell each step to tensorboard, wandb or mlflow.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the new System.")
@click.option("--seed", default=0, type=SEED, show_default=True)
@click.option("--trust", is_flag=True, help="Run code that the task brings along.")
@common
def update(
    system: str, task: str, feedback: Path | None, pairs: tuple[str, ...], more: tuple[str, ...],
    report_to: tuple[str, ...], out: Path, seed: int, trust: bool, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Teach SYSTEM more without losing what it knew.

    It learns from TASK's train rows, or from judgements. What it gained on TASK and what each earlier task lost is
    measured on held-out rows. Where one lost more than `limits: {forgetting: 1}` points, the new System is refused:
    nothing is written.
    """
    from whet import update as updating
    from whet.errors import MethodError
    from whet.methods import Run
    from whet.search.out import leave, unclaimed
    from whet.store import Store
    from whet.system import load
    from whet.task import load as load_task
    from whet.train.team import team

    unclaimed(out)
    opened = load(system, trust=trust)
    loaded, kept = updating.with_made(load_task(task, trust=trust), opened, Path(system))
    with _watched(as_json, "update", (*loaded.notes, *filter(None, [kept]))) as watch:
        run = Run(Store(), seed, tell=watch.tell, report_to=report_to)
        made = updating.update(opened, loaded, run, _settings((*pairs, *more)), feedback)
        crew = team()
        if crew.first and not made.refused:
            leave(made.system, out, loaded)
        crew.wait()
    if not crew.first:
        return
    if as_json:
        _print({"system": None if made.refused else str(out), **made.record()})
    else:
        _say(*updating.lines(made, loaded.name))
    if made.refused:
        mild = "set a lower learning_rate, or collect more" if feedback else "set strategy or share"
        raise MethodError(f"refused: {made.refused}", do=f"{mild}, or limits.forgetting in task.yaml")
    if not as_json:
        _say(*filter(None, [f"system   {out}", updating.asked(made, out)]))


@main.command(epilog=example("whet chat runs/sst2/system", "echo 'a fine film' | whet chat runs/sst2/system"))
@click.argument("system", type=click.Path())
@click.option("--trust", is_flag=True, help="Let a System reach the server it names.")
@common
def chat(system: str, trust: bool, as_json: bool, debug: bool) -> None:
    """Talk to a System, one prompt a line.

    An empty line or Ctrl-D ends. What an answer stands in is named, or that it stands nowhere."""
    from whet.reading import citations, origins, unsupported
    from whet.system import load

    opened = load(system, trust=trust)
    asked = sys.stdin.isatty()
    if asked:
        print("One prompt a line; an empty line ends.", file=sys.stderr)
        _ = opened.session
    while True:
        try:
            line = input("> ") if asked else sys.stdin.readline()
        except EOFError:
            return
        if not line.strip():
            return
        answer = opened.answers([line.strip()])[0]
        scores = dict(zip(opened.decoding.labels, answer.scores, strict=False))
        from_ = citations(answer.text, answer.passages)
        body = {"answer": answer.text, "scores": scores, **({"citations": from_} if from_ else {})}
        if as_json:
            print(json.dumps(body, ensure_ascii=False), flush=True)
        else:
            _say(answer.text, *origins(from_), *(f"  {said}" for said in [unsupported(opened, answer)] if said))


@main.command(epilog=example(
    "whet export runs/sst2/system --to gguf --task TASK",
    "whet export runs/sst2/system --to ollama --type q8_0 --out my-ollama/",
    "whet export runs/sst2/system --to vllm",
))  # fmt: skip
@click.argument("system")
@click.option("--to", "target", required=True, help="hf, gguf, ollama or vllm.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder for the export [SYSTEM-FORMAT].")
@click.option("--type", "kind", default="bf16", show_default=True,
              help="Of the weights: bf16, f16, f32; gguf and ollama: also q8_0, q4_0.")  # fmt: skip
@click.option("--task", default=None, type=click.Path(), help="Check it on this task's prompts, and score both on it "
              "[the task that SYSTEM was made for].")  # fmt: skip
@click.option("--check/--no-check", default=True, show_default=True, help="Read it back and compare its answers.")
@click.option("--trust", is_flag=True, help="Run code that the task brings along.")
@common
def export(
    system: str, target: str, out: Path | None, kind: str, task: str | None, check: bool, trust: bool, as_json: bool,
    debug: bool,
) -> int:  # fmt: skip
    """Write SYSTEM for another engine and check its answers there.

    SYSTEM is a folder or a model. What the format cannot carry is named. Where the export does not answer like SYSTEM,
    nothing is written; where it scores less on the task by more than a point, it is kept, the cause is named, and the
    exit code is 1.
    """
    from whet import export as exporting
    from whet.model import resolve
    from whet.search.out import made_for
    from whet.store import home_folder
    from whet.system import System
    from whet.task import load as load_task

    with _watched(as_json, f"export to {target}") as watch:
        loaded = load_task(task, trust=trust) if task else made_for(Path(system), trust)
        opened = _made(system, loaded, trust) or System(resolve(system), home=home_folder())
        folder = out or exporting.place(opened, Path(f"{Path(system).name}-{target}"))
        done = exporting.export(opened, target, folder, kind=kind, task=loaded, check=check, watch=watch)
    if as_json:
        _print(done.record())
        return int(done.kept is False)
    _say(*exporting.lines(done, target))
    return int(done.kept is False)


@main.command(epilog=example(
    "whet documents runs/answers/system",
    "whet documents runs/answers/system --put manuals/ --drop old-manual.md",
))  # fmt: skip
@click.argument("system", type=click.Path())
@click.option("--put", default=(), multiple=True, help="A file, folder, URL or query: its documents come in; a known "
              "id is replaced.")  # fmt: skip
@click.option("--drop", default=(), multiple=True, help="The id of a document to take out.")
@click.option("--trust", is_flag=True, help="Let a System reach the server it names, and a query run.")
@common
def documents(
    system: str, put: tuple[str, ...], drop: tuple[str, ...], trust: bool, as_json: bool, debug: bool
) -> None:
    """Show or change the documents of SYSTEM.

    Only what is new is embedded, and the next question sees it.
    """
    from whet.documents import incoming
    from whet.errors import ArtifactError
    from whet.retrieval import Source
    from whet.system import load

    made = load(system, trust=trust)
    source = next((s for s in made.sources if isinstance(s, Source)), None)
    if source is None:
        raise ArtifactError(f"{system} has no documents", expected="a System made with rag", do="whet apply rag TASK")
    known = source.corpus(made.home).ids() if put else []
    new, gone, notes = incoming(put, known, trust)
    embedded = source.change(made.home, new, [*drop, *gone])[1] if put or drop else 0
    ids = source.corpus(made.home).ids()
    if as_json:
        _print({"version": source.version, "documents": ids, "embedded": embedded, "left_out": notes, "gone": gone})
        return
    _say(f"{len(ids)} documents, version {source.version[:12]}"
         + (f"; {embedded} passages embedded" if put or drop else ""), *(f"  left out: {one}" for one in notes),
         *([f"  taken out, for their tables no longer have them: {', '.join(gone)}"] if gone else ()),
         *(f"  {name}" for name in ids if not (put or drop)))  # fmt: skip


@main.command(epilog=example(
    "whet feedback runs/replies/system prompts.txt",
    "whet feedback runs/replies/system TASK/train.jsonl --annotator ann --out TASK/feedback.jsonl",
))  # fmt: skip
@click.argument("system", type=click.Path())
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("--out", default="feedback.jsonl", show_default=True, type=click.Path(path_type=Path),
              help="File that judgements are appended to, one by one.")  # fmt: skip
@click.option("--annotator", default="", help="Who judges; kept with each judgement.")
@click.option("--temperature", default=0.8, type=click.FloatRange(0, min_open=True), show_default=True,
              help="Of the two answers that are drawn.")  # fmt: skip
@click.option("--seed", default=0, type=SEED, show_default=True, help="Of the answers, and of which is shown first.")
@click.option("--trust", is_flag=True, help="Let a System reach the server it names.")
@common
def feedback(
    system: str, prompts: Path, out: Path, annotator: str, temperature: float, seed: int, trust: bool, as_json: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Judge two answers of SYSTEM to each of PROMPTS, side by side.

    Ctrl-C loses nothing.
    """
    from whet.feedback import ask, collect, prompts_of
    from whet.model import resolve
    from whet.store import home_folder
    from whet.system import Decoding, System, load

    asked, made = prompts_of(prompts), (Path(system) / "system.json").exists()
    bare = Decoding(max_tokens=128)
    opened = load(system, trust=trust) if made else System(resolve(system), decoding=bare, home=home_folder())
    counts = collect(opened, asked, out, ask, annotator=annotator, temperature=temperature, seed=seed)
    if as_json:
        _print({"feedback": str(out), **counts})
        return
    print(f"{counts['judged']} judged into {out}, {counts['skipped']} skipped, {counts['same']} with equal answers, "
          f"{counts['before']} judged before")  # fmt: skip


@main.command(epilog=example("whet init reviews.csv --out reviews/", "whet init alpaca.json --name assistant"))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder of the new task [DATA's name].")
@click.option("--name", default=None, help="Name of the task.")
@click.option("--prompt", multiple=True, help="Column of the prompt; repeated, the columns stand one a line.")
@click.option("--completion", default=None, help="Column of the answer.")
@click.option("--group", default=None, help="Column of users, documents …: rows of one stay on one side of each split.")
@common
def init(
    data: Path, out: Path | None, name: str | None, prompt: tuple[str, ...], completion: str | None, group: str | None,
    as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Write a task folder from DATA, saying what was guessed.

    DATA is CSV, JSONL, Parquet, Alpaca, ShareGPT or messages.
    """
    from whet.init import init as run

    folder = out or Path(data.stem)
    guess = run(data, folder, name=name, prompt=prompt, completion=completion, group=group)
    if as_json:
        _print({"task": str(folder), "kind": guess.kind, "rows": guess.rows, "metric": guess.metric,
                "labels": list(guess.labels), "guessed": list(guess.lines)})  # fmt: skip
        return
    _say(f"task     {folder}", *(f"         {line}" for line in guess.lines))
    _next(["improve", folder])


@main.command("methods", epilog=example("whet methods", "whet methods finetune"))
@click.argument("name", required=False)
@common
def list_methods(name: str | None, as_json: bool, debug: bool) -> None:
    """What the registered methods are, need and take; of one, what its settings mean."""
    from dataclasses import MISSING, fields
    from textwrap import indent

    from whet.methods import about, choices, make, table

    if name:
        make(name)
    body: list[dict[str, Any]] = []
    for key, kind in table().items():
        if name in (None, key):
            settings = {f.name: f.default for f in fields(kind) if f.default is not MISSING}  # type: ignore[arg-type]
            words = {s: list(found) for s, default in settings.items() if default == str(default)
                     and (found := choices(kind, s))}  # fmt: skip
            body.append({"name": key, "family": kind.family, "needs": list(kind.needs), "writes": list(kind.writes),
                         "settings": settings, "choices": words, "about": about(kind, whole=name is not None)})
    if as_json:
        _print(body)
        return
    for item in body:
        said = indent(item["about"], "  ")
        print(f"{item['name']}  ({item['family']})\n{said}\n  needs: {', '.join(item['needs'])}")
        if name is None:
            print("  settings: " + ", ".join(f"{k}={v!r}" for k, v in item["settings"].items()) + "\n")
            continue
        print("  settings:")
        for key, default in item["settings"].items():
            words = item["choices"].get(key)
            print(f"    {key}={default!r}" + (f"  ({', '.join(words)})" if words else ""))


@main.command(epilog=example("whet doctor", "whet doctor --model ./my-model"))
@click.option("--model", "models", multiple=True, help="Open this model and say whether beginnings can be shared.")
@common
def doctor(models: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """What this machine has, what is missing, and what mends it."""
    from whet.doctor import examine, record

    found = examine(models)
    if as_json:
        _print(record(found))
        return
    for item in found:
        mend = f"   →  {item.mend}" if item.mend else ""
        print(f"{'ok ' if item.ok else 'NO '} {item.what:<26} {item.found}{mend}")


@main.command("report", epilog=example("whet report runs/sst2"))
@click.argument("folder", type=click.Path(path_type=Path))
@common
def show_report(folder: Path, as_json: bool, debug: bool) -> None:
    """What a run found: the verdict, the arms, and where they lie."""
    from whet import report

    result = report.read(folder)
    if as_json:
        _print(result)
        return
    board = (f"  {one}" for one in report.board(result))
    _say(report.summary(result), "", *board, "", f"report   {folder / 'report.html'}")
