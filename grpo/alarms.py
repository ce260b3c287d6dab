"""Alarms say in plain words what goes wrong in a run. They read only its metrics, the lines of metrics.jsonl.

An alarm is raised once, at the first step that shows the problem. It ends the run only if `stop_on_alarm` is set.
Below, W is 20 steps, m is a mean over the last W steps, and m' is the mean over the W steps before them:

    constant    the mean of a trained reward has had the same value for W steps, and its std was 0
    gradient    grad_norm is 0 although rewards differ within a group (reward_std > 0)
    ratio       the largest ratio (`…/ratio_max`) is above 1.001, although with one update per rollout it must be 1
    sampling    `…/sampling_ratio`, the mean ratio of probabilities in training and in sampling, is not within 0.1 of 1
    hacking     the reward rises, m > m' + 3·s, while a monitored reward falls, m < m' - 3·s, where s is the standard
                error of the difference of both means
    entropy     the entropy of a stream, averaged over W steps, is below a tenth of its mean over the first W steps
    diversity   the same for image_diversity or plan_diversity
    truncated   more than half of the plans of W steps were cut off at max_completion_length
    no reward   no trained reward applied to any sample for W steps
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

WINDOW = 20
Row = Mapping[str, float]


class Alarms:
    """Watches the metrics of a run. `said` holds the alarms so far.

    Args:
        trained: names of the rewards that are trained on.
        monitored: names of the rewards that are only logged.
        num_iterations: number of updates on each rollout.
        rows: metrics of the steps before a resumed run. Their alarms are not raised again.
    """

    def __init__(
        self, trained: Sequence[str], monitored: Sequence[str], num_iterations: int, rows: Iterable[Row] = ()
    ) -> None:
        self.trained, self.monitored, self.num_iterations = trained, monitored, num_iterations
        self.rows: list[Row] = []
        self.said: list[str] = []
        self._raised: set[str] = set()
        for row in rows:
            self.look(row)

    def look(self, row: Row) -> list[str]:
        """Add the metrics of the next step -> the alarms that it raises."""
        self.rows.append(row)
        before = len(self.said)
        for name, text in self._found():
            if name not in self._raised:
                self._raised.add(name)
                self.said.append(f"alarm after step {row.get('step', len(self.rows)):.0f}: {text}")
        return self.said[before:]

    def _found(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each problem that the last step shows."""
        row = self.rows[-1]
        if row.get("grad_norm") == 0 and row.get("reward_std", 0) > 0:
            yield "gradient", "the gradient is 0 although rewards differ within a group: nothing is being trained"
        for key, value in row.items():
            if key.endswith("/ratio_max") and self.num_iterations == 1 and value > 1.001:
                yield key, f"{key} is {value:.3g}, but with one update per rollout it must be 1"
            if key.endswith("/sampling_ratio") and self.num_iterations == 1 and abs(value - 1) > 0.1:
                yield key, f"{key} is {value:.3g}: sampling and training have different weights, prompts or settings"
        if len(self.rows) < WINDOW:
            return
        for name in self.trained:
            means, stds = self._last(f"rewards/{name}/mean"), self._last(f"rewards/{name}/std")
            if len(means) == WINDOW and len(set(means)) == 1 and not any(stds):
                score = f"reward {name} has been {means[0]:.4g} for every sample of {WINDOW} steps"
                yield f"constant {name}", f"{score}: it does not affect training"
        if self.trained and not self._last("reward"):
            yield "no reward", f"no reward has applied to any sample of {WINDOW} steps: nothing is being trained"
        if statistics.mean(self._last("plan_truncated") or [0.0]) > 0.5:
            text = "over half of the plans are cut off: raise max_completion_length, or check why plans do not end"
            yield "truncated", text
        of = {f"{stream}/entropy": f"the entropy of {stream} tokens" for stream in ("text", "image")}
        of |= {f"{what}_diversity": f"the difference of {what}s in a group" for what in ("image", "plan")}
        for key, name in of.items():
            first = [r[key] for r in self.rows[:WINDOW] if key in r]
            now = self._last(key)
            if first and now and statistics.mean(now) < 0.1 * statistics.mean(first):
                text = f"{name} fell from {statistics.mean(first):.3g} to "
                yield key, text + f"{statistics.mean(now):.3g}: samples become alike, and so do the rewards of a group"
        for name in self.monitored if self._moved("reward", 1) else ():
            if self._moved(f"rewards/{name}/mean", -1):
                text = f"the reward rises while {name}, which is not trained on, falls: the model may be exploiting "
                yield f"hacking {name}", text + "the reward; look at the samples"

    def _last(self, key: str, skip: int = 0) -> list[float]:
        """The values of a metric in WINDOW steps, without the last `skip` steps."""
        rows = self.rows[max(0, len(self.rows) - WINDOW - skip) : len(self.rows) - skip]
        return [row[key] for row in rows if key in row]

    def _moved(self, key: str, sign: int) -> bool:
        """Whether the mean moved by more than 3 standard errors from the window before; `sign` -1 asks for a fall."""
        if len(self.rows) < 2 * WINDOW:
            return False
        now, before = self._last(key), self._last(key, WINDOW)
        if min(len(now), len(before)) < 2:
            return False
        error = math.sqrt(statistics.variance(now) / len(now) + statistics.variance(before) / len(before))
        return sign * (statistics.mean(now) - statistics.mean(before)) > 3 * error
