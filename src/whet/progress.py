"""What a person sees while whet works: a live leader board on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from whet.errors import printable
from whet.metrics import in_points

if TYPE_CHECKING:
    from whet.engine import Spent


@dataclass(frozen=True)
class Standing:
    """A line of the leader board."""

    name: str
    metric: str
    status: str
    score: float | None
    low: float | None
    high: float | None
    examples: int
    cost: float  # seconds at the calibrated rates
    merit: float = 0.0  # what the board is ordered by, greater is better


class Watch:
    """Is told what happens; never changes it. This one shows nothing."""

    def say(self, text: str) -> None:
        """A line worth keeping on the screen."""

    def arm(self, name: str, left: float | None = None) -> None:
        """An arm starts, or other work; `left` is what remains of a search's budget by then, in seconds."""

    def tell(self, what: str, done: int, of: int) -> None:
        """How far the arm now running is."""

    def board(self, standings: Sequence[Standing]) -> None:
        """The leader board has changed."""

    def close(self) -> None:
        """Nothing more will be said."""


Silent = Watch  # its name where nothing is to be shown


SHOWN = 3  # rows or settings that are named
# Told in a line of their own, or for --json alone: figures of how the work went.
ELSEWHERE = {"dropped", "raced", "trainings", "fit", "verdict", "rows", "batch", "steps", "epochs", "row_tokens"}


def applied(notes: Mapping[str, Any], spent: Spent) -> list[str]:
    """What a Method did, as lines for a person: training, how it fitted, rows left out and why, and its own notes."""
    from whet.report.findings import sentences

    lines, dropped, raced = [], notes.get("dropped", ()), notes.get("raced", ())
    if spent.trained_tokens:
        rows = f"on {notes['rows']:,} rows, " if isinstance(notes.get("rows"), int) else ""
        lines.append(f"trained  {rows}{spent.trained_tokens:,} tokens in {spent.training_seconds:.0f} s")
    if verdict := notes.get("verdict"):
        short = f"{verdict}: fewer than three validations or four steps"  # what the sentence leaves out
        lines.append(f"fit      {''.join(sentences({'fit': notes.get('fit')})) or short}")
    if raced:
        arms = (f"{one['arm']} {'–' if one['loss'] is None else format(one['loss'], '.3f')}" for one in raced)
        lines.append(f"raced    validation losses: {', '.join(arms)}")
    if dropped:
        some = ", ".join(f"{one['id']} {one['why']}" for one in dropped[:SHOWN])
        lines.append(f"dropped  {_rows(len(dropped))} of train: {some}{', …' if len(dropped) > SHOWN else ''}")
    rest = {key: value for key, value in notes.items() if key not in ELSEWHERE}
    return [*lines, *(f"note     {text}" for text in sentences(rest))]


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 1:02:03."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def figure(value: float | None, metric: str) -> str:
    """A score as people read it: 71.2 for 0.712 where the metric is read in points, else as it is."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if in_points(metric) else f"{value:.2f}"


def apart(difference: float, low: float, high: float, metric: str) -> str:
    """A difference of two scores with its interval: in points where the metric is read in them, else as it is."""
    many, form, unit = (100, "+.1f", " points") if in_points(metric) else (1, "+.3g", "")
    return f"{many * difference:{form}}{unit}, 95 % [{many * low:{form}}, {many * high:{form}}]"


@dataclass
class Plain(Watch):
    """Lines on stderr, at most one progress line every few seconds."""

    every: float = 10.0
    _last: float = field(default=0.0, init=False)
    _arm: str = field(default="", init=False)
    _said: set[tuple[str, str, int]] = field(default_factory=set, init=False)

    def say(self, text: str) -> None:
        """Print the line."""
        print(printable(text), file=sys.stderr, flush=True)

    def arm(self, name: str, left: float | None = None) -> None:
        """Print that the arm starts."""
        self._arm, self._last = name, time.monotonic()
        self.say(f"> {name}" + ("" if left is None else f"  (budget left {clock(left)})"))

    def tell(self, what: str, done: int, of: int) -> None:
        """Print progress where the last line is old enough."""
        if time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self.say(f"  {self._arm}: {what} {done}/{of}")

    def board(self, standings: Sequence[Standing]) -> None:
        """Print every standing that is new or has changed."""
        for new in standings:
            mark = (new.name, new.status, new.examples)
            if mark not in self._said:
                self._said.add(mark)
                score, low, high = (figure(one, new.metric) for one in (new.score, new.low, new.high))
                between = f" [{low}, {high}]" if new.low is not None else ""
                self.say(f"  {new.name}: {score}{between} on {new.examples} examples, {new.status}")

class Live(Watch):
    """A leader board that stays in place, with the arm now running, its progress, and the budget left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(stderr=True)
        self._standings: Sequence[Standing] = ()
        self._now, self._what, self._done, self._of = "", "", 0, 0
        self._begun, self._left = 0.0, ""
        self._live = RichLive(console=self._console, refresh_per_second=4, transient=False, get_renderable=self._show)
        self._live.start()

    def _show(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for title, side in (("arm", "left"), ("select", "right"), ("95 %", "right"), ("n", "right"), ("cost", "right"),
                            ("", "left")):  # fmt: skip
            table.add_column(title, justify=side, no_wrap=title != "arm")  # type: ignore[arg-type]
        ranked = sorted(self._standings, key=lambda s: (s.score is None, s.status == "dropped", -s.merit))
        for n, s in enumerate(ranked):
            score, low, high = (figure(one, s.metric) for one in (s.score, s.low, s.high))
            between = f"{low} – {high}" if s.low is not None else ""
            style = "bold green" if n == 0 else ("dim" if s.status != "done" else "")
            table.add_row(Text(s.name, style), score, between, str(s.examples), clock(s.cost), s.status)
        lines: list[Any] = [table]
        if self._now:
            passed = clock(time.monotonic() - self._begun)
            lines.append(Text(f"\n{self._now}: {self._what}  {self._done}/{self._of}  {passed}{self._left}", "cyan"))
            lines.append(ProgressBar(total=max(1, self._of), completed=self._done, width=40))
        return Group(*lines)

    def say(self, text: str) -> None:
        """Print the line above the board."""
        self._console.print(printable(text), highlight=False, markup=False)

    def arm(self, name: str, left: float | None = None) -> None:
        """Show the arm that starts."""
        self._now, self._what, self._done, self._of = name, "starting", 0, 1
        # The budget goes by tokens, not by the clock: counted down, it would rise when the next arm starts.
        self._begun, self._left = time.monotonic(), "" if left is None else f"  (budget left {clock(left)})"

    def tell(self, what: str, done: int, of: int) -> None:
        """Show its progress."""
        self._what, self._done, self._of = what, done, of

    def board(self, standings: Sequence[Standing]) -> None:
        """Show the standings."""
        self._standings = tuple(standings)

    def close(self) -> None:
        """Leave the last board on the screen."""
        self._now = ""
        self._live.stop()


def watch(plain: bool = False) -> Watch:
    """A live board where stderr is a terminal, plain lines where it is not or they are asked for."""
    return Live() if sys.stderr.isatty() and not plain else Plain()
