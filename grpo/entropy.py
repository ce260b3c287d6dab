"""Adapts the entropy bonus, so that the entropy of each stream does not fall below a target.

The rule is that of Skywork-OR1 (arXiv 2505.22312) and of TRL's `use_adaptive_entropy`. H_k is the mean entropy of a
stream's tokens in step k, in nats; target is `entropy_target`; and coef_0 = `entropy_coef`:

    coef_k+1 = min(coef_k + entropy_coef_delta, entropy_coef_max)    if H_k <= target
               max(coef_k - entropy_coef_delta, entropy_coef_min)    otherwise
    step k+1 trains with coef_k+1 if H_k <= target, otherwise with 0; step 0 trains with 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .config import STREAMS, Config


class EntropyTarget:
    """Adapts the entropy coefficients from step to step. Without a target they stay as the settings say.

    `state` holds coef_k and H_k-1 for each stream. A checkpoint saves it.
    """

    def __init__(self, config: Config) -> None:
        self.config, target = config, config.entropy_target
        self.targets = {s: target[s] if isinstance(target, dict) else target for s in STREAMS if target is not None}
        self.state = {s: (float(config.of_stream(s)["entropy_coef"]), math.inf) for s in self.targets}

    def applied(self, config: Config) -> Config:
        """The settings with the coefficients of the next step."""
        return replace(config, entropy_coef=self._coefficients()) if self.targets else config

    def look(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt the coefficients to the metrics of a step -> the coefficients that the step had."""
        had = {f"{stream}/entropy_coef": value for stream, value in self._coefficients().items()}
        delta, least, most = (getattr(self.config, f"entropy_coef_{name}") for name in ("delta", "min", "max"))
        for stream, target in self.targets.items():
            if (entropy := metrics.get(f"{stream}/entropy")) is not None:  # there is none if the update was skipped
                coef, _ = self.state[stream]
                coef = min(coef + delta, most) if entropy <= target else max(coef - delta, least)
                self.state[stream] = coef, entropy
        return had

    def _coefficients(self) -> dict[str, float]:
        return {s: self.state[s][0] if self.state[s][1] <= target else 0.0 for s, target in self.targets.items()}
