"""compare: has ours become slower? It compares two results of one bench, each by its own baseline.

python -m bicot.bench.compare OLD.json NEW.json

For each case and each provider of ours it prints how many times faster than the baseline of the same run (eager, or the
published algorithm) ours was and is. The exit status is 1 if ours takes over 10 % more of the baseline's time than
before, or if ours or the baseline has no time any more. "within noise" means that the old and the new share lie within
each other's p20 to p80. It does not change the exit status: measure again to find out.
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
NO_MACHINE = ("bench", "about", "command", "commit")  # entries of a result that may differ on one machine


class Share(NamedTuple):
    """The share of the baseline's time that ours takes: at the medians, and at the ends of both spreads."""

    low: float
    middle: float
    high: float


def load(path: Path) -> dict[str, Any]:
    """Read a result whose rows can be compared. Raises ValueError if it is not one."""
    result = json.loads(path.read_text())
    rows = result.get("rows", []) if isinstance(result, dict) else []
    if not any(row.get("provider") in BASELINES for row in rows):
        raise ValueError(f"{path}: no result with a provider called {' or '.join(BASELINES)}")
    return result


def by_case(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Case -> provider -> p20, p50 and p80. Steps count by the image: those of two providers can differ in size."""
    cases: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        times = row["ms"] if "ms" in row else [seconds / row.get("images", 1) for seconds in row["seconds"]]
        cases.setdefault(label(row["case"]), {})[row["provider"]] = times
    return cases


def shares(times: Mapping[str, list[float]]) -> dict[str, Share]:
    """The share of each provider of ours; empty without a baseline."""
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
    """Return the lines to print, and whether nothing got worse and nothing vanished."""
    before, after, bad = by_case(old), by_case(new), []
    lines = [f"{old['bench']}: {old.get('commit')} → {new.get('commit')}"]
    for key in {**old, **new}:
        pair = old.get(key), new.get(key)
        if key not in NO_MACHINE and pair[0] != pair[1] and not any(isinstance(value, (list, dict)) for value in pair):
            lines.append(f"not the same machine or settings, which can change ratios: {key}: {pair[0]} → {pair[1]}")
    reasons = {
        (label(entry["case"]), entry["provider"]): f": {kind}: {entry['reason']}"
        for kind in ("skipped", "failed")
        for entry in new.get(kind, [])
    }
    lines.append("times faster than the baseline of the same run; change of the share of its time that ours takes")
    for case, times in before.items():
        was, now = shares(times), shares(after.get(case, {}))
        for name in times:
            if (name.startswith("ours") or name in BASELINES) and name not in after.get(case, {}):
                bad.append(f"VANISHED: {case}, {name}{reasons.get((case, name), '')}")
            elif name in was and name in now:
                said, change = verdict(was[name], now[name]), now[name].middle / was[name].middle - 1
                ratios = " → ".join(f"{1 / share.middle:.2f}×" for share in (was[name], now[name]))
                lines.append(f"{case}, {name}: {ratios}, takes {change:+.1%}: {said}")
                bad += [f"WORSE: {case}, {name}"] if said.startswith("WORSE") else []
        lines += [] if was else [f"not compared, no baseline: {case}"]
    lines += [f"new: {case}, {name}" for case in after for name in after[case] if name not in before.get(case, {})]
    return [*lines, *(bad or ["nothing got worse"])], not bad


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
