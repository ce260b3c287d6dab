"""Power, clocks, utilisation and memory of the current GPU, sampled in a thread through nvidia-ml-py."""

from __future__ import annotations

import statistics
import threading
from typing import Any

import torch

PERIOD = 0.02  # seconds; the driver's own averages are not much finer


class Sampler:
    """Samples for as long as it lasts; `summary` tells what it saw, `missing` why it saw nothing."""

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self.samples: list[tuple[float, float, float, float]] = []
        self.joules = 0.0
        if device.type != "cuda":
            self.missing = "power, clocks, utilisation and memory of a device: there is no GPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml: Any = pynvml
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._energy()
        except ImportError:
            self.missing = "power, clocks, utilisation and memory of the GPU: nvidia-ml-py is not installed"
        except pynvml.NVMLError as error:
            self.missing = f"power, clocks, utilisation and memory of the GPU: {error}"

    def _energy(self) -> float:
        """Joules since the driver was loaded."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def __enter__(self) -> Sampler:
        if not self.missing:
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.joules = -self._energy()
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.missing:
            self.joules += self._energy()
            self.done.set()
            self.thread.join()

    def _sample(self) -> None:
        nvml, handle = self.nvml, self.handle
        while True:
            self.samples.append(
                (
                    nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                    nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                    nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                    nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
                )
            )
            if self.done.wait(PERIOD):
                return

    def summary(self, images: int) -> dict[str, float]:
        """Empty where nothing could be sampled. Images a second per watt are images per joule."""
        if self.missing:
            return {}
        watts, clocks, utilisation, memory = zip(*self.samples, strict=True)
        return {
            "watts": round(statistics.mean(watts), 1),
            "watts_max": round(max(watts), 1),
            "sm_mhz": round(statistics.mean(clocks)),
            "sm_mhz_min": round(min(clocks)),
            "utilisation_pct": round(statistics.mean(utilisation), 1),
            "memory_mib_max": round(max(memory)),
            "joules_per_image": float(f"{self.joules / images:.4g}"),
            "images_per_second_per_watt": float(f"{images / self.joules:.4g}"),
        }
