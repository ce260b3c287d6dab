"""compare: has ours become slower? Two results of one bench, each by its own baseline: never by absolute times.

python -m bicot.bench.compare OLD.json NEW.json

Of each case and each provider of ours: how many times faster than the baseline of the same run (eager, or the published
algorithm) it was and is. The exit status is 1 if that fell so far that ours takes over 10 % more of the baseline's time
than it took, or if ours or the baseline of a case has no time any more. Whether the two lie within each
other's noise (p20 to p80 of ours and of the baseline) is said, and changes nothing: measure again to find out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .report import label

WORSE = 1.1  # times the old share of the baseline's time
BASELINES = ("eager", "baseline")
NO_MACHINE = ("bench", "about", "command", "commit", "picture")  # of what a result says beside its rows

Times = dict[str, list[float]]  # of a provider: p20, p50 and p80


class Share(NamedTuple):
    """Of the baseline's time that ours takes: at the medians, and at the ends of both spreads."""

    low: float
    middle: float
    high: float


def load(path: Path) -> dict[str, Any]:
    """A result with rows that can be compared.

    Raises:
        ValueError: it is none.
    """
    result = json.loads(path.read_text())
    rows = result.get("rows", []) if isinstance(result, dict) else []
    if not any(row.get("provider") in BASELINES for row in rows):
        raise ValueError(f"{path}: no result with a provider called {' or '.join(BASELINES)}")
    return result


def by_case(result: Mapping[str, Any]) -> dict[str, Times]:
    """Whole steps by the image: those of two providers can differ in size."""
    cases: dict[str, Times] = {}
    for row in result["rows"]:
        times = row["ms"] if "ms" in row else [seconds / row.get("images", 1) for seconds in row["seconds"]]
        cases.setdefault(label(row["case"]), {})[row["provider"]] = times
    return cases


def shares(times: Times) -> dict[str, Share]:
    """Of each provider of ours; none where there is no baseline."""
    base = next((times[name] for name in BASELINES if name in times), None)
    ours = {name: spread for name, spread in times.items() if name.startswith("ours")} if base else {}
    return {name: Share(t[0] / base[2], t[1] / base[1], t[2] / base[0]) for name, t in ours.items() if base}


def verdict(old: Share, new: Share) -> str:
    change = new.middle / old.middle
    if 1 / WORSE <= change <= WORSE:
        return "the same"
    noisy = new.low <= old.high and old.low <= new.high
    return ("WORSE" if change > WORSE else "better") + (", within noise" if noisy else "")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The lines to print, and whether nothing got worse and nothing vanished."""
    before, after = by_case(old), by_case(new)
    lines = [f"{old['bench']}: {old.get('commit')} → {new.get('commit')}"]
    names = [key for key in {**old, **new} if key not in NO_MACHINE and old.get(key) != new.get(key)]
    told = [key for key in names if not any(isinstance(result.get(key), (list, dict)) for result in (old, new))]
    if told:
        lines += ["", "Not the same machine or settings, which can change ratios:"]
        lines += [f"  {key}: {old.get(key)} → {new.get(key)}" for key in told]
    lines += [
        "",
        "Times faster than the baseline of the same run, and the change of the share of its time that ours takes:",
    ]

    table, bad = [("case", "provider", "old", "new", "takes", "")], []
    reasons = {
        (label(e["case"]), e["provider"]): f": {kind}: {e['reason']}"
        for kind in ("skipped", "failed")
        for e in new.get(kind, [])
        if isinstance(e, dict)
    }
    for case, times in before.items():
        was, now = shares(times), shares(after.get(case, {}))
        for name in times:
            if (name.startswith("ours") or name in BASELINES) and name not in after.get(case, {}):
                bad.append(f"VANISHED: {case}, {name}{reasons.get((case, name), '')}")
            elif name in was and name in now:
                said, change = verdict(was[name], now[name]), now[name].middle / was[name].middle - 1
                ratios = (f"{1 / share.middle:.2f}×" for share in (was[name], now[name]))
                table.append((case, name, *ratios, f"{change:+.1%}", said))  # type: ignore[arg-type]
                bad += [f"WORSE: {case}, {name}"] if said.startswith("WORSE") else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for case, name, *cells, said in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[2:5], strict=True)]
        lines.append("  ".join([case.ljust(widths[0]), name.ljust(widths[1]), *padded, said]).rstrip())
    lines += [f"not compared, no baseline: {case}" for case, times in before.items() if not shares(times)]
    lines += [
        f"new: {case}, {name}" for case, times in after.items() for name in times if name not in before.get(case, {})
    ]
    return [*lines, "", *(bad or ["nothing got worse"])], not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    arguments = parser.parse_args()
    try:
        old, new = load(arguments.old), load(arguments.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if old["bench"] != new["bench"]:
        parser.error(f"results of two benches: {old['bench']} and {new['bench']}")
    lines, good = compare(old, new)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
