"""The report of `whet improve`: one HTML file that needs no network, and its verdict in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.errors import StoreError
from whet.report import figures, view
from whet.report.findings import findings
from whet.report.view import Arm, Record, Scale, line, number, record, records, sequence
from whet.store import write_text

TILES = 20  # labels up to which base and chosen stand side by side
CELLS = 40  # labels up to which a matrix can still be read


def verdict(result: Record) -> str:
    """What came of it, in one sentence: printed by the command line and the headline of the report."""
    confirm, scale = record(result.get("confirm")), Scale.of(result)
    said = _confirmed(result, confirm, scale) if record(confirm.get("base")) else _unconfirmed(result, scale)
    winner = view.winning_baseline(result)
    if winner:
        name, score, sure = winner
        better = "does better" if sure else "scores as much or more (no difference shown)"
        said += f"; yet the baseline {name} {better} without a language model: {scale.score(score)}"
    return said + "."


def read(folder: Path) -> dict[str, Any]:
    """The result in a run's folder. Raises StoreError where there is none, or none that can be read."""
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{folder} holds no result", expected="result.json", found=error.strerror or str(error),
                         do="run `whet improve`") from error  # fmt: skip
    except ValueError as error:
        raise StoreError(f"{file} cannot be read", expected="JSON as `whet improve` writes it", found=str(error),
                         do="run `whet improve` again") from error  # fmt: skip
    if not isinstance(result, dict) or not isinstance(result.get("trials"), list):
        raise StoreError(f"{file} is no result", expected="an object with trials", found="none",
                         do="run `whet improve` again")  # fmt: skip
    return result


def summary(result: Record) -> str:
    """The verdict; below it whether limits are met, what compression costs, how passages are read, and what select said
    of the finalist.
    """
    scale = Scale.of(result)
    return "\n".join(filter(None, (verdict(result), *_kept(result, scale), _shrunk(result, scale))))


def board(result: Record) -> list[str]:
    """The trials, a line each: name, score on select, status and why."""
    scale = Scale.of(result)
    return [f"{view.name_of(t):<44} {scale.score(view.score_of(t)):>6}  {line(t.get('status'))}  {line(t.get('why'))}"
            .rstrip() for t in records(result.get("trials"))]


def _confirmed(result: Record, confirm: Record, scale: Scale) -> str:
    base, chosen = (number(record(confirm.get(who)).get("score")) for who in ("base", "chosen"))
    difference, low, high = (number(confirm.get(key)) for key in ("difference", "low", "high"))
    handed = view.handed(result)
    span = scale.span(low, high, signed=True)
    change = f"{scale.gain(difference)}{scale.unit}{f', 95 % interval {span}' if span else ''}"
    sealed = f"{view.count(number(confirm.get('n')))} sealed examples" if confirm.get("n") else "the sealed examples"
    p = _decided(confirm)
    unsure = (low or 0) > 0 and p is not None and p >= view.LEVEL  # the interval alone would say that it is better
    but = f", but {view.p_value(p)} is not below {view.LEVEL:g}" if unsure else ""
    if handed and (confirm.get("improved") or (confirm.get("improved") is None and (low or 0) > 0)):
        verb = "rose" if scale.higher_is_better else "fell"
        change = change if scale.higher_is_better else f"better by {change.lstrip('+−')}"
        return (f"{scale.heading} {verb} from {scale.score(base)} to {scale.score(chosen)} ({change}), "
                f"confirmed on {sealed}")
    if handed:
        return (f"The chosen system was not shown to be better than the base: {scale.title} {scale.score(chosen)} "
                f"against {scale.score(base)} ({change}) on {sealed}{but}")
    tried = any(a.kind == "arm" and a.score is not None for a in view.arms(result))
    if failed := _failed(result):
        return f"{failed}; the base is handed over: {scale.title} {scale.score(base)} on {sealed}"
    if refused := _refused(result, base, scale):
        return f"{refused}; the base is handed over: {scale.title} {scale.score(base)} on {sealed}"
    if tried and not view.opened(confirm):
        return (f"No candidate beat the base model on the select split, so none was tried on {sealed}; "
                f"the base is handed over: {scale.title} {scale.score(base)}")
    if not tried and not (view.opened(confirm) and (difference or confirm.get("candidate"))):
        return f"Nothing was tried beside the base model, which is handed over: {scale.title} {scale.score(base)}"
    if difference is None:
        return f"Nothing was shown to beat the base model, which is handed over: {scale.title} {scale.score(base)}"
    return (f"Nothing was shown to beat the base model, which is handed over ({scale.title} {scale.score(base)}): "
            f"the best candidate differed by {change} on {sealed}{but}")


def _unconfirmed(result: Record, scale: Scale) -> str:
    arms = view.arms(result)
    base = next((a.score for a in arms if a.kind == "base"), None)
    chosen = next((a for a in arms if a.kind == "chosen"), None)
    if chosen and chosen.score is not None and base is not None:
        verb = "went" if (chosen.gain or 0) <= 0 else "rose" if scale.higher_is_better else "fell"
        return (f"{scale.heading} {verb} from {scale.score(base)} to {scale.score(chosen.score)} on the select "
                "split; without a test split this is not confirmed")
    if chosen:
        return f"{chosen.name} was chosen, and nothing was confirmed"
    if base is None:
        return "Nothing was measured"
    if failed := _failed(result):
        return f"{failed}; the base is handed over: {scale.title} {scale.score(base)} on the select split"
    if refused := _refused(result, base, scale):
        return f"{refused}; the base is handed over: {scale.title} {scale.score(base)} on the select split"
    if any(a.kind == "arm" and a.score is not None for a in arms):
        return (f"Nothing beat the base model, which is handed over: {scale.title} {scale.score(base)} "
                "on the select split, not confirmed")
    return f"Only the base model was measured: {scale.title} {scale.score(base)} on the select split"


def _refused(result: Record, base: float | None, scale: Scale) -> str:
    """What scored more than the base on select and was refused, and why, where nothing else did; empty otherwise."""
    sign = 1 if scale.higher_is_better else -1
    plain = next((a.score for a in view.arms(result) if a.kind == "base"), base)
    better = [t for t in records(result.get("trials")) if not view.is_base(t, result) and plain is not None
              and (score := view.score_of(t)) is not None and sign * score > sign * plain]  # fmt: skip
    if not better or any(line(t.get("status")) != "refused" for t in better):
        return ""
    best = max(better, key=lambda t: sign * (view.score_of(t) or 0.0))
    return f"What did better than the base was refused ({view.name_of(best)}: {line(best.get('why')).rstrip('.')})"


def _failed(result: Record) -> str:
    """That nothing could be tried and why, where all arms failed; empty otherwise."""
    arms = [t for t in records(result.get("trials")) if not view.is_base(t, result)]
    whys = [f"{view.name_of(t)}: {line(t.get('why'))}" for t in arms if line(t.get("status")) == "failed"]
    return f"Nothing could be tried ({whys[0].rstrip('.')})" if whys and len(whys) == len(arms) else ""


def write(path: Path, result: dict[str, Any], details: dict[str, Any]) -> None:
    """Write the report as one HTML file, aside and then renamed; missing folders are made.

    `result` is result.json, `details` the examples of the confirm split, training curves and labels; any part may be
    missing, empty or null. All text is escaped. Raises StoreError where the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("whet", "report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    html = environment.get_template("page.html").render(_page(result, details))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the report {path} cannot be written: {error.strerror}", do="choose another --out") from error
    write_text(path, html)


# -- the page's parts --------------------------------------------------------------------------------------------


def _page(result: Record, details: Record) -> dict[str, Any]:
    """All that the template shows, as strings, numbers and tuples of them."""
    scale, arms = Scale.of(result), view.arms(result)
    drawn, confused = _figures(result, details, arms, scale)
    shown = view.examples(details, scale)
    data = {"figures": drawn, "examples": {"rows": shown.rows, "binary": shown.binary}}
    return {
        "css": _own("page.css"), "js": _own("page.js"), "data": _json(data),
        "plotly": figures.plotly_gzip() if drawn else "",
        "task": line(result.get("task")) or "task", "seed": line(result.get("seed")),
        "model": ", ".join(_lines(result.get("model"))) or line(result.get("model")),
        "verdict": verdict(result).replace(" %", "\u00a0%"), "headline": _headline(result, scale),
        "kept": _kept(result, scale),
        "notes": _lines(result.get("notes")),
        "scale": scale, "second": view.second(result), "figures": drawn, "arms": [_arm_row(a, scale) for a in arms],
        "trials": _trial_rows(result, scale) if len(records(result.get("trials"))) > 1 else [],
        "findings": findings(result), "steps": _steps(result, scale), "frontier": [
            (a.name, scale.score(a.score), view.duration(a.seconds)) for a in figures.frontier(arms, scale)],
        "curves": [(line(c.get("name")), figures.SERIES[i % len(figures.SERIES)],
                    figures.fit_verdict(result, line(c.get("name"))))
                   for i, c in enumerate(figures.drawn_curves(details))],
        "diagnosis": _diagnosis(result), "confused": confused, "examples": shown,
        "sealed": bool(record(result.get("confirm"))),
        "spent": _spent(result), "handed": _handed(arms),
        "plan": [(line(p.get("arm")), view.duration(_minutes(p))) for p in records(result.get("plan"))],
        "left_out": [(line(p.get("method")), line(p.get("why"))) for p in records(result.get("left_out"))],
        "words": _words(result, scale), "protocol": _pairs(result.get("protocol")),
        "versions": _pairs(result.get("versions")), "dropped": _dropped(result),
    }


def _own(name: str) -> Any:
    """A file of this package, for inlining as it stands."""
    from importlib.resources import files

    from markupsafe import Markup

    return Markup(files("whet.report").joinpath(name).read_text(encoding="utf-8"))


def _breakable(text: str) -> Any:
    """A recipe's name that breaks between its methods and settings, escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub("([+,])", r"\1<wbr>", str(escape(text))))


def _json(data: Any) -> Any:
    """JSON that stays inert inside a script element."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII, so U+2028 is escaped already
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _lines(value: Any) -> list[str]:
    return [text for item in sequence(value) if (text := line(item))]


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [(line(str(key)), line(item)) for key, item in record(value).items()]


def _figures(result: Record, details: Record, arms: Sequence[Arm], scale: Scale) -> tuple[dict[str, Any], list[Any]]:
    """The figures by name, and the table of most confused pairs where there are too many labels for a matrix."""
    base, chosen = view.confusion(details, "base"), view.confusion(details, "chosen")
    labels = max(len(m.labels) if m else 0 for m in (base, chosen))
    matrices = {"chosen": chosen} if chosen and labels > TILES else {"base": base, "chosen": chosen}
    found = {
        "gains": figures.gains(arms, scale), "cost": figures.quality_cost(arms, scale),
        "training": figures.curves(details),
        **({f"confusion-{who}": figures.heatmap(m) for who, m in matrices.items() if m} if labels <= CELLS else {})}
    return {name: f for name, f in found.items() if f}, view.most_confused(details) if labels > TILES else []


def _headline(result: Record, scale: Scale) -> dict[str, Any]:
    """The figures under the verdict: (label, figure, interval) each, and comparisons in words."""
    confirm, handed = record(result.get("confirm")), view.handed(result)
    paired = handed or view.opened(confirm)
    sides = [("Base", "base"), (view.second(result), "chosen")][: 2 if paired else 1]
    tiles = [(label, scale.score(number(card.get("score"))),
              scale.span(number(card.get("low")), number(card.get("high"))))
             for label, who in sides if number((card := record(confirm.get(who))).get("score")) is not None]
    difference = number(confirm.get("difference")) if paired else None
    if difference is not None:
        low, high = number(confirm.get("low")), number(confirm.get("high"))
        tiles.append(("Gain", scale.gain(difference), scale.span(low, high, signed=True)))
    winner = view.winning_baseline(result)
    return {"tiles": tiles, "name": _chosen(result), "good": bool(confirm.get("improved")),
            "p": view.p_value(_decided(confirm)) if difference is not None else "", "single": _single(confirm, scale),
            "winner": (winner[0], scale.score(winner[1]), winner[2]) if winner else None}


def _kept(result: Record, scale: Scale) -> list[str]:
    """Whether the limits are met, what compression costs and how passages are read: a sentence each, where there is
    something to say.
    """
    return [said for said in (_limits(result), _cost(result, scale), _reading(result, scale)) if said]


def _cost(result: Record, scale: Scale) -> str:
    """What the System that is handed over loses by being compressed, on the sealed rows; empty where it is not."""
    whole = record(record(result.get("confirm")).get("uncompressed"))
    cost = record(whole.get("cost"))
    loss, low, high, bound = (number(cost.get(key)) for key in ("loss", "low", "high", "bound"))
    if loss is None or not view.handed(result):
        return ""
    span = "" if low is None or high is None else f" [{scale.score(low)}, {scale.score(high)}]"
    most = "" if bound is None else f" (at most {scale.score(bound)} by a one-sided bound)"
    return (f"Compression costs {scale.score(loss)}{scale.unit}{span} on the sealed rows{most}; "
            f"{line(whole.get('name'))} scores {scale.score(number(whole.get('score')))} there.")


def _reading(result: Record, scale: Scale) -> str:
    """How the System reads the passages that it looks up, on a part of the sealed rows; empty where it does not."""
    body = record(result.get("reading"))
    recall, faithful, declined = (number(body.get(key)) for key in ("recall", "faithful", "declined"))
    if recall is None:
        return ""
    unit = 100 if scale.points else 1  # scores are written as they are read
    ways = (("found", "with it"), ("missed", "without"), ("oracle", "with the right passages alone"),
            ("distracted", "with wrong ones only"))
    parts = [f"{scale.score(value / unit)} {words}" for key, words in ways
             if (value := number(body.get(key))) is not None]
    shares = (("of the answers stand in the passages", faithful), ("say that there is none", declined))
    said = [f"{share:.0f} % {words}" for words, share in shares if share is not None]
    return (f"The passages hold the answer for {recall:.0f} % of {view.count(number(body.get('n')))} sealed questions; "
            f"{scale.title} {', '.join(parts)}. {', '.join(said)}.")


def _limits(result: Record) -> str:
    """Whether what is handed over keeps within the task's limits, in a sentence; empty where it has none."""
    body = record(result.get("limits"))
    used, base = record(body.get("used")), record(body.get("base")) if view.handed(result) else {}
    parts = [_limit(line(name), number(most), number(used.get(name)), number(base.get(name)))
             for name, most in record(body.get("allowed")).items()]
    if not parts:
        return ""
    met, name = body.get("met"), _chosen(result) or "the base"
    said = "Within the limits" if met else "Whether it keeps within the limits is not known"
    if met is False:
        nearest = any(a.kind == "chosen" and a.status == "refused" for a in view.arms(result))
        said = (f"Nothing keeps within the limits; the nearest, {name}, is handed over" if nearest
                else f"Beyond the limits; {name} is handed over")
    return f"{said}: {', '.join(parts)}."


def _limit(name: str, most: float | None, used: float | None, before: float | None) -> str:
    """What is used of a limit, such as "size 88 MB of 100 MB (269 MB before)"."""
    write = _ms if name == "latency" else view.size
    said = "not known" if used is None else write(used)
    if used is not None and most is not None and used > most and said == write(most):  # by less than is written
        said = f"{used:,.1f} ms" if name == "latency" else f"{used:,.0f} B"
    was = "" if before is None else f" ({write(before)} before)"
    return f"{name} {said} of {write(most)}{was}"


def _chosen(result: Record) -> str:
    """The name of the chosen recipe; empty where there is none."""
    recipe = records(record(result.get("chosen")).get("recipe"))
    return next((a.name for a in view.arms(result) if a.kind == "chosen"), "") or (
        "+".join(line(s.get("method")) for s in recipe))


def _decided(comparison: Record) -> float | None:
    """The p-value that was decided on: adjusted where there were two comparisons."""
    adjusted = number(comparison.get("p_adjusted"))
    return number(comparison.get("p_value")) if adjusted is None else adjusted


def _single(confirm: Record, scale: Scale) -> str:
    best = record(confirm.get("best_single"))
    if number(best.get("difference")) is None:
        return ""
    span = scale.span(number(best.get("low")), number(best.get("high")), signed=True)
    inside = ", ".join(x for x in (span, view.p_value(_decided(best))) if x)
    return (f"Against the best single method, {line(best.get('name')) or 'unnamed'}: "
            f"{scale.gain(number(best.get('difference')))}{scale.unit}{f' ({inside})' if inside else ''}.")


def _arm_row(arm: Arm, scale: Scale) -> dict[str, str]:
    trial = record(arm.trial)
    status = "" if arm.status in ("", "done") else arm.status
    return {"name": arm.name, "kind": arm.kind, "n": view.count(number(trial.get("examples"))),
            "score": scale.score(arm.score),
            "gain": "–" if arm.kind == "base" else scale.gain(arm.gain), "span": scale.span(arm.low, arm.high, True),
            "cost": view.duration(arm.seconds), "why": ": ".join(x for x in (status, arm.why) if x),
            "latency": _latency(trial), "size": view.size(number(trial.get("size_bytes")))}


def _latency(trial: Record) -> str:
    return _ms(number(trial.get("latency_ms")))


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} ms"


def _trial_rows(result: Record, scale: Scale) -> list[tuple[str, ...]]:
    return [(view.name_of(t), line(t.get("rung")), line(t.get("seed")), line(t.get("status")),
             view.count(number(t.get("examples"))), scale.score(view.score_of(t)),
             view.count(number(record(t.get("spent")).get("trained_tokens"))), view.lost(number(t.get("forgetting"))),
             "; ".join(_step(s) for s in records(t.get("recipe"))), line(t.get("why")))
            for t in records(result.get("trials"))]


def _step(step: Record) -> str:
    settings = ", ".join(f"{line(str(k))}={line(v)}" for k, v in step.items() if k != "method")
    return f"{line(step.get('method'))}({settings})"


def _steps(result: Record, scale: Scale) -> list[tuple[str, str]]:
    """What each step of the chosen recipe added, from numbers or from records with a name and a gain."""
    chosen = record(result.get("chosen"))
    names = [line(s.get("method")) for s in records(chosen.get("recipe"))]
    rows = []
    for i, step in enumerate(sequence(chosen.get("gain_by_step"))):
        given = record(step)
        value = next((x for key in ("gain", "difference") if (x := number(given.get(key))) is not None), number(step))
        name = next((line(given[key]) for key in ("name", "method", "step") if given.get(key)), "")
        rows.append((name or (names[i] if i < len(names) else f"step {i + 1}"), scale.gain(value)))
    return rows


def _diagnosis(result: Record) -> list[dict[str, Any]]:
    rows = []
    for gap in records(result.get("diagnosis")):
        share, low, high = (number(gap.get(key)) for key in ("share", "low", "high"))
        percent = "–" if share is None else f"{100 * share:.0f} %"
        span = "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f} %"
        remedies = gap.get("remedies")
        rows.append({"gap": line(gap.get("gap")), "share": percent, "span": span, "order": share or 0.0,
                     "width": round(100 * min(max(share or 0.0, 0.0), 1.0), 1), "detected": bool(gap.get("detected")),
                     "remedies": ", ".join(_lines(remedies)) if sequence(remedies) else line(remedies or "")})
    return sorted(rows, key=lambda row: -row["order"])


def _minutes(step: Record) -> float | None:
    minutes = number(step.get("minutes"))
    return None if minutes is None else 60 * minutes


def _spent(result: Record) -> list[tuple[str, str]]:
    spent = record(result.get("spent"))
    wall, training = number(spent.get("wall_seconds", spent.get("seconds"))), number(spent.get("training_seconds"))
    again = wall is not None and training is not None and training > wall  # trials of an earlier run were taken over
    rows = [("Budget", view.duration(number(result.get("budget_s")))),
            ("Time taken this time" if again else "Time taken", view.duration(wall)),
            ("Training, earlier runs included" if again else "of which training", view.duration(training)),
            *((f"Tokens {kind}", view.count(number(spent.get(f"{kind}_tokens"))))
              for kind in ("trained", "prefilled", "generated"))]
    return [row for row in rows if row[1] != "–"]


def _handed(arms: Sequence[Arm]) -> list[tuple[str, str, str]]:
    """What serving costs: (what, base, chosen), for what was measured of either."""
    base, chosen = (record(next((a.trial for a in arms if a.kind == kind), None)) for kind in ("base", "chosen"))
    rows = [("Latency", _latency(base), _latency(chosen)),
            *((what, view.size(number(base.get(key))), view.size(number(chosen.get(key))))
              for what, key in (("Size on disk", "size_bytes"), ("Memory", "memory_bytes")))]
    return [row for row in rows if row[1:] != ("–", "–")]


def _words(result: Record, scale: Scale) -> list[str]:
    """The protocol's consequences in sentences: what n could show, and how far selection flattered."""
    confirm = record(result.get("confirm"))
    smallest, n = number(confirm.get("smallest_detectable")), number(confirm.get("n"))
    said = []
    if smallest is not None:
        examples = f"{view.count(n)} examples" if n else "this many examples"
        said.append(f"With {examples}, a true difference under {scale.score(smallest)}{scale.unit} "
                    "could not reliably have been shown (80 % power, 5 % level, two-sided).")
    said += filter(None, [_shrunk(result, scale)])
    if record(confirm.get("base")) and not view.handed(result) and not view.opened(confirm):
        said.append("The base alone answered the sealed examples; no method saw these examples before.")
    elif record(confirm.get("base")):
        said.append(f"Base and {view.second(result).lower()} answered the same examples; intervals and tests are "
                    "paired, and no method saw these examples before.")
    else:
        said.append("There was no test split, so no figure here is confirmed on data that nobody tuned on.")
    return said


def _shrunk(result: Record, scale: Scale) -> str:
    """How far selection flattered, in a sentence; empty where nothing was tried on sealed data."""
    selection = record(result.get("selection"))
    select, confirmed, shrinkage = (number(selection.get(key)) for key in ("select", "confirm", "shrinkage"))
    if select is None or confirmed is None:
        return ""
    name = _chosen(result)
    who = (name or "it") if view.handed(result) else f"the best candidate{f', {name}' if name else ''}"
    less = shrinkage is not None and shrinkage > 0
    moved = f": a shrinkage of {scale.score(shrinkage)}{scale.unit}" if less else ": no shrinkage"
    # Rows of one split may be easier than those of the other, or have more references: gains tell that apart.
    over = [number(selection.get(key)) for key in ("select_gain", "confirm_gain")]
    first, second = (f" ({scale.gain(one)} over the base)" if None not in over else "" for one in over)
    return (f"Select said {scale.score(select)}{first} of {who}, sealed data says {scale.score(confirmed)}"
            f"{second.replace(' over the base', '')}{moved}.")


def _dropped(result: Record) -> dict[str, Any]:
    dropped = record(result.get("dropped"))
    rows = [(line(x[0]), line(x[1])) for x in sequence(dropped.get("examples")) if len(sequence(x)) == 2]
    return {"count": view.count(number(dropped.get("count")) or 0), "rows": rows[:200],
            "some": bool(number(dropped.get("count")) or rows)}
