"""The report's figures, as Plotly's own data (traces and layout), ready for JSON.

Colours are names of the page's CSS variables ("--accent"), which the page resolves, so that one figure serves light
and dark. Plotly reads a little HTML in texts: every text from data goes through `literal` first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from whet.report.view import (
    Arm,
    Confusion,
    Record,
    Scale,
    furthest,
    line,
    name_of,
    number,
    record,
    records,
    sequence,
)
from whet.rows import short_line

Figure = dict[str, Any]

ROW = 46  # pixels of one row of the dot plot
MOST = 30  # rows of the dot plot
WRAP = 34  # characters of an arm's name in one line of a phone
SLANTED = 12  # labels whose names still fit above the columns on a phone
SERIES = tuple(f"--c{i}" for i in range(1, 7))


@functools.cache
def plotly_gzip() -> str:
    """Plotly's script (MIT), gzip in base64: 2 MB instead of 5. The page unpacks it with DecompressionStream."""
    import base64
    import gzip

    from plotly.offline import get_plotlyjs

    # The time in gzip's header is left out, so that one result gives one page.
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def literal(text: str) -> str:
    """Text that Plotly shows as it stands, whatever tags or entities it holds."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _layout(height: int, xaxis: dict[str, Any], yaxis: dict[str, Any], **more: Any) -> dict[str, Any]:
    axis = {"fixedrange": True, "gridcolor": "--line", "linecolor": "--line", "zeroline": False, "automargin": True,
            "tickfont": {"size": 12, "color": "--muted"}}
    return {
        "height": height, "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "dragmode": False, "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "--ink"},
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "align": "left",
                       "font": {"size": 13, "color": "--ink"}},
        "xaxis": axis | xaxis, "yaxis": axis | yaxis, **more}


def _title(text: str) -> dict[str, Any]:
    return {"text": literal(text), "standoff": 8, "font": {"size": 12, "color": "--muted"}}


def _note(text: str, **place: Any) -> dict[str, Any]:
    return {"text": text, "showarrow": False, "font": {"size": 12, "color": "--muted"}, **place}


# -- gains -------------------------------------------------------------------------------------------------------


def gains(arms: Sequence[Arm], scale: Scale) -> Figure | None:
    """Every arm's gain over base as a point with its 95 % interval, the best at the top; baselines as diamonds."""
    rows = [a for a in arms if a.gain is not None and a.kind != "base"][:MOST]
    if not rows:
        return None
    base = next((a.score for a in arms if a.kind == "base"), None)
    where = "base" if base is None else f"base {scale.score(base)}"
    notes = [_note(where, x=0, y=0.05, yref="y", yanchor="bottom", xanchor="center", bgcolor="--bg")]
    places = _places(rows)
    for arm, y in zip(rows, places, strict=True):
        bold = arm.kind == "chosen"
        weight = {"font": {"size": 13, "color": "--accent" if bold else "--ink", "weight": 600 if bold else 400}}
        place = {"y": y, "yref": "y", "xref": "paper", "yanchor": "bottom", "yshift": 6, "bgcolor": "--bg",
                 "borderpad": 0}
        notes += [_note(_name(arm), x=0, xanchor="left", align="left", **place) | weight,
                  _note(scale.gain(arm.gain), x=1, xanchor="right", **place) | weight]
    text = "points gained" if scale.points else f"gain in {short_line(scale.title, 30)}"
    ends = [scale.value(v) for a in rows for v in (a.gain, a.low, a.high) if v is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    pad = 0.06 * (high - low) or 1.0
    return {
        "data": [_dots(shown, kind, scale) for kind in ("arm", "baseline", "chosen")
                 if (shown := [(y, a) for y, a in zip(places, rows, strict=True) if a.kind == kind])],
        "layout": _layout(
            round(ROW * (1 - places[-1])) + 50,
            {"title": _title(text), "range": [low - pad, high + pad], "zeroline": True, "zerolinecolor": "--muted",
             "zerolinewidth": 1.5, "nticks": 7},
            {"showticklabels": False, "tickvals": places, "range": [places[-1] - 0.5, 0.5]}, annotations=notes)}


def _places(rows: Sequence[Arm]) -> list[float]:
    """Where rows stand, downwards in units of ROW: a name of two lines needs more room."""
    return [-y for y in accumulate(1.0 if len(a.name) <= WRAP else 1.35 for a in rows)]


def _name(arm: Arm) -> str:
    """An arm's name in at most two lines, broken after a plus or a comma."""
    text = arm.name
    if len(text) <= WRAP:
        return literal(text)
    cut = max((text.rfind(mark, 0, WRAP) + 1 for mark in "+, "), default=0) or WRAP
    return f"{literal(text[:cut].rstrip())}<br>{literal(short_line(text[cut:].lstrip(), WRAP))}"


def _dots(shown: Sequence[tuple[float, Arm]], kind: str, scale: Scale) -> dict[str, Any]:
    color = {"arm": "--ink", "baseline": "--amber", "chosen": "--accent"}[kind]
    up = [scale.value((a.high if a.high is not None else a.gain) - a.gain) for _, a in shown if a.gain is not None]
    down = [scale.value(a.gain - (a.low if a.low is not None else a.gain)) for _, a in shown if a.gain is not None]
    return {
        "type": "scatter", "mode": "markers", "x": [scale.value(a.gain or 0.0) for _, a in shown],
        "y": [y for y, _ in shown], "hoverinfo": "text", "hovertext": [_hover(a, scale) for _, a in shown],
        "marker": {"size": 11, "color": color, "symbol": "diamond" if kind == "baseline" else "circle"},
        "error_x": {"type": "data", "symmetric": False, "array": [max(0.0, x) for x in up],
                    "arrayminus": [max(0.0, x) for x in down], "color": color, "thickness": 2, "width": 0}}


def _hover(arm: Arm, scale: Scale) -> str:
    span = scale.span(arm.low, arm.high, signed=True)
    lines = [literal(short_line(arm.name, 60)), f"{scale.gain(arm.gain)}{f' ({span})' if span else ''}",
             f"{literal(scale.title)} {scale.score(arm.score)}"]
    return "<br>".join(lines)


# -- quality against cost ----------------------------------------------------------------------------------------


def frontier(arms: Sequence[Arm], scale: Scale) -> list[Arm]:
    """The arms that no cheaper arm matches, the cheapest first: from the base on, or a cheaper arm that beats it.

    Of arms that score as much as the chosen one, that one stands for all.
    """
    best: list[Arm] = []
    sign, priced = 1 if scale.higher_is_better else -1, _priced(arms)
    least = next((sign * (a.score or 0.0) for a in arms if a.kind == "base" and a.score is not None), -math.inf)
    tied = {a.score for a in priced if a.kind == "chosen"}
    able = [a for a in priced if a.kind in ("base", "chosen") or a.score not in tied]
    for arm in sorted(able, key=lambda a: (a.seconds or 0.0, -sign * (a.score or 0.0))):
        if arm.kind != "base" and sign * (arm.score or 0.0) <= least:
            continue
        if not best or sign * ((arm.score or 0.0) - (best[-1].score or 0.0)) > 0:
            best.append(arm)
    return best


def _priced(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with a score and a cost, of those scored on the most rows: others are cheap for want of rows."""
    found = [a for a in arms if a.kind != "baseline" and a.score is not None and (a.seconds or 0) > 0]
    rows = [number(record(a.trial).get("examples")) or 0.0 for a in found]
    return [a for a, n in zip(found, rows, strict=True) if n == max(rows)]


def quality_cost(arms: Sequence[Arm], scale: Scale) -> Figure | None:
    """Score on select against minutes; the arms that are best for their cost carry a number and are joined."""
    priced = _priced(arms)
    if all(a.kind == "base" for a in priced):
        return None
    best = frontier(arms, scale)
    minutes = [(a.seconds or 0.0) / 60 for a in priced]
    log = max(minutes) / min(minutes) > 20
    rest = [a for a in priced if a not in best]
    lines = [("base", next((a.score for a in arms if a.kind == "base"), None), "--muted", "dash"),
             ("best baseline", _best_baseline(arms, scale), "--amber", "dot")]
    drawn = [(what, scale.value(y), color, dash) for what, y, color, dash in lines if y is not None]
    title = short_line(scale.title, 30) + (
        ", points" if scale.points else "" if scale.higher_is_better else ", lower is better")
    yaxis = {"title": _title(title), "nticks": 7} | ({} if scale.higher_is_better else {"autorange": "reversed"})
    above = {"best baseline": "right", "base": "left"}
    return {
        "data": [_points(rest, scale, False), _points(best, scale, True)],
        "layout": _layout(
            380, {"title": _title("minutes" + (" (log scale)" if log else ""))} | _log_axis(log, minutes), yaxis,
            shapes=[{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "layer": "below",
                     "line": {"color": color, "width": 1.5, "dash": dash}} for _, y, color, dash in drawn],
            annotations=[_note(what, xref="paper", x=float(above[what] == "right"), xanchor=above[what], y=y,
                               yanchor="bottom", yref="y") | {"font": {"size": 12, "color": color}}
                         for what, y, color, _ in drawn])}


def _log_axis(log: bool, minutes: Sequence[float]) -> dict[str, Any]:
    if not log:
        return {"rangemode": "tozero", "nticks": 7}
    ticks = [m * 10**e for e in range(-3, 5) for m in (1, 3)]
    ends = math.log10(min(minutes)) - 0.2, math.log10(max(minutes)) + 0.2
    shown = [t for t in ticks if ends[0] <= math.log10(t) <= ends[1]]
    return {"type": "log", "range": list(ends), "tickvals": shown, "ticktext": [f"{t:g}" for t in shown]}


def _best_baseline(arms: Sequence[Arm], scale: Scale) -> float | None:
    scores = [a.score for a in arms if a.kind == "baseline" and a.score is not None]
    return (max if scale.higher_is_better else min)(scores, default=None)


def _points(arms: Sequence[Arm], scale: Scale, best: bool) -> dict[str, Any]:
    hover = [f"{_hover(a, scale)}<br>{(a.seconds or 0) / 60:.2g} min" for a in arms]
    trace = {"type": "scatter", "x": [(a.seconds or 0.0) / 60 for a in arms],
             "y": [scale.value(a.score or 0.0) for a in arms], "hoverinfo": "text", "hovertext": hover}
    if not best:
        return trace | {"mode": "markers", "marker": {"size": 9, "color": "--muted", "opacity": 0.6}}
    return trace | {
        "mode": "lines+markers+text", "text": [str(i) for i in range(1, len(arms) + 1)], "cliponaxis": False,
        "line": {"color": "--accent", "width": 1.5, "shape": "hv"}, "marker": {"size": 22, "color": "--accent"},
        "textfont": {"size": 12, "color": "--bg", "weight": 600}, "textposition": "middle center"}


# -- training curves ---------------------------------------------------------------------------------------------


def curves(details: Record) -> Figure | None:
    """Loss against training progress: a thin dotted line for train, a solid one for validation, a colour per trial."""
    data = []
    for i, curve in enumerate(drawn_curves(details)):
        color, name = SERIES[i % len(SERIES)], literal(short_line(line(curve.get("name")), 60))
        for part, style in (("train", {"width": 1.5, "dash": "dot"}), ("validation", {"width": 2.5})):
            points = _pairs(curve.get(part))
            if points:
                data.append({
                    "type": "scatter", "mode": "lines" if len(points) > 12 else "lines+markers",
                    "x": [x for x, _ in points], "y": [y for _, y in points], "line": {"color": color, **style},
                    "marker": {"size": 5, "color": color}, "hoverinfo": "text",
                    "hovertext": [f"{name}<br>{part} loss {y:.3f} at {x:,.0f}" for x, y in points]})
    unit = line(details.get("curve_unit")) or "training progress (steps or tokens)"
    return {"data": data, "layout": _layout(
        340, {"title": _title(unit), "nticks": 6}, {"title": _title("loss"), "nticks": 6})} if data else None


def drawn_curves(details: Record) -> list[Record]:
    """The curves that have points to draw."""
    return [c for c in records(details.get("curves")) if _pairs(c.get("train")) or _pairs(c.get("validation"))]


def _pairs(value: Any) -> list[tuple[float, float]]:
    pairs = [(number(p[0]), number(p[1])) for p in sequence(value) if len(sequence(p)) == 2]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


# -- confusion ---------------------------------------------------------------------------------------------------


def heatmap(matrix: Confusion) -> Figure:
    """A confusion matrix: rows are references, columns answers, the shade the share of the row's reference."""
    totals = [sum(row) or 1 for row in matrix.counts]
    shares = [[n / total for n in row] for row, total in zip(matrix.counts, totals, strict=True)]
    few, n = len(matrix.labels) <= 10, len(matrix.labels)
    hover = [[f"{literal(short_line(label, 60))} → {literal(short_line(column, 60))}<br>{times:,} of {total:,}"
              for column, times in zip(matrix.columns, row, strict=True)]
             for label, row, total in zip(matrix.labels, matrix.counts, totals, strict=True)]
    ticks = {"showgrid": False, "ticks": "", "type": "linear",
             "tickfont": {"size": 12 if n <= 20 else 10, "color": "--ink"}}
    return {
        "data": [{
            "type": "heatmap", "z": shares, "zmin": 0, "zmax": 1, "showscale": False, "xgap": 1, "ygap": 1,
            "colorscale": [[0, "--soft"], [1, "--accent"]], "hoverinfo": "text", "hovertext": hover,
            **({"text": [[f"{t:,}" for t in row] for row in matrix.counts], "texttemplate": "%{text}"} if few else {}),
            "textfont": {"size": 13}}],
        "layout": _layout(
            min(90 + 40 * n, 180 + 22 * n),
            ticks | {"title": _title("answered" if n <= SLANTED else "answered, in the same order"), "side": "top",
                     "showticklabels": n <= SLANTED, "tickvals": list(range(len(matrix.columns))),
                     "ticktext": [literal(_ends(c)) for c in matrix.columns], "tickangle": 0 if n <= 3 else -50,
                     "ticklabeloverflow": "allow"},  # else Plotly hides the last slanted one
            ticks | {"title": _title("reference"), "autorange": "reversed", "tickvals": list(range(n)),
                     "ticktext": [literal(_ends(c)) for c in matrix.labels]})}


def _ends(text: str, longest: int = 14) -> str:
    """A label cut in its middle: labels of one set often begin alike."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1].rstrip()}…{text[-half:].lstrip()}"


def fit_verdict(result: Record, name: str) -> str:
    """What the search said of a trial's fit at its highest rung; empty where it said nothing."""
    return next((line(t.get("verdict")) for t in furthest(result) if name_of(t) == name), "")
