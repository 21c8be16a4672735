"""The data set in bars, as HTML: tables that say the same to a screen reader. Everything that is not ours is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from html import escape

from biasdpo.dataset.counts import Counts
from biasdpo.ui.dataset_render import VERDICTS

_MOST_BARS = 10  # of one chart; the rest are one bar together
_MOST_DAYS = 30
_LENGTHS = ("under ½", "½ to ¾", "¾ to 1", "the same", "1 to 1⅓", "1⅓ to 2", "over 2")


def charts(counts: Counts) -> str:
    """All charts, or a line where there is nothing to draw."""
    if not counts.judgments:
        return '<div class="bd-note">Nothing to count yet: no judgment stands.</div>'
    verdicts = [(VERDICTS[name], number) for name, number in counts.by_verdict.most_common()]
    drawn = (
        _bars("Pairs by category", _most(counts.by_category, "no category")),
        _bars("Judgments by verdict", verdicts),
        _bars("Judgments by source", _most(counts.by_source, "no source")),
        _lengths(counts),
        _days(counts.by_day),
    )
    return f'<div class="bd-charts">{"".join(drawn)}</div>'


def _most(counted: Counter[str], unnamed: str) -> list[tuple[str, int]]:
    listed = [(name or unnamed, number) for name, number in counted.most_common(_MOST_BARS)]
    rest = sum(counted.values()) - sum(number for _, number in listed)
    return [*listed, (f"{len(counted) - len(listed):,} others", rest)] if rest else listed


def _bars(title: str, counted: Sequence[tuple[str, int]], note: str = "", kinds: Iterable[str] = ()) -> str:
    if not counted:
        return f'<figure class="bd-chart"><figcaption>{title}</figcaption><div class="bd-note">None yet.</div></figure>'
    most = max(max(number for _, number in counted), 1)
    classes = [*kinds] or [""] * len(counted)
    rows = "".join(
        f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th><td><span class="bd-bar {kind}">'
        f'<i style="width: {100 * number / most:.1f}%"></i></span></td><td>{number:,}</td></tr>'
        for (name, number), kind in zip(counted, classes, strict=True)
    )
    noted = f"<p>{note}</p>" if note else ""
    return f'<figure class="bd-chart"><figcaption>{title}</figcaption><table><tbody>{rows}</tbody></table>{noted}</figure>'


def _lengths(counts: Counts) -> str:
    pairs = sum(counts.by_length)
    note = ""
    if pairs:
        note = f"Chosen is the longer one in {counts.longer / pairs:.1%}, the shorter one in {counts.shorter / pairs:.1%}."
    middle = len(_LENGTHS) // 2
    kinds = ["bd-shorter"] * middle + [""] + ["bd-longer"] * middle
    return _bars("Length of chosen, in lengths of rejected", list(zip(_LENGTHS, counts.by_length, strict=True)), note, kinds)


def _days(by_day: Counter[date]) -> str:
    """A column a day, the latest right; days of the calendar, so that a pause is seen as one."""
    title = "<figcaption>Judgments a day (UTC)</figcaption>"
    if not by_day:
        return f'<figure class="bd-chart">{title}<div class="bd-note">None has a date.</div></figure>'
    last = max(by_day)
    days = [last - timedelta(days=back) for back in range(min((last - min(by_day)).days + 1, _MOST_DAYS) - 1, -1, -1)]
    most = max(by_day[day] for day in days)
    columns = "".join(
        f'<i style="height: {100 * by_day[day] / most:.1f}%" title="{day.isoformat()}: {by_day[day]:,}"></i>' for day in days
    )
    before = sum(by_day.values()) - sum(by_day[day] for day in days)
    earlier = f" {before:,} before that." if before else ""
    busiest = max(days, key=lambda day: by_day[day])
    told = f"Most on {busiest.isoformat()}: {most:,}.{earlier}"
    span = f"<span>{days[0].isoformat()}</span>" if len(days) > 1 else ""
    return (
        f'<figure class="bd-chart">{title}<div class="bd-days" role="img" aria-label="{days[0].isoformat()} to {last.isoformat()}'
        f'. {told}">{columns}</div><div class="bd-days-span">{span}<span>{last.isoformat()}</span></div><p>{told}</p></figure>'
    )
