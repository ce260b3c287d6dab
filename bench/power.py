"""Energy of the current GPU, and its clock when it was last busy, through nvidia-ml-py."""

from __future__ import annotations

import time
from typing import Any

import torch


class Energy:
    """Of the GPU, as long as this lasts; `missing` says why nothing was measured."""

    def __init__(self, device: torch.device) -> None:
        self.missing = "" if device.type == "cuda" else "energy and clock of a device: there is no GPU"
        self.joules = self.seconds = self.sm_mhz = 0.0
        if self.missing:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml: Any = pynvml
            self.gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._now()
        except ImportError:
            self.missing = "energy and clock of the GPU: nvidia-ml-py is not installed"
        except pynvml.NVMLError as error:
            self.missing = f"energy and clock of the GPU: {error}"

    def _now(self) -> tuple[float, float]:
        """Joules since the driver was loaded, and seconds."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu) / 1e3, time.perf_counter()

    def __enter__(self) -> Energy:
        if not self.missing:
            self.start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.missing:
            self.sm_mhz = self.nvml.nvmlDeviceGetClockInfo(self.gpu, self.nvml.NVML_CLOCK_SM)
            self.joules, self.seconds = (now - start for now, start in zip(self._now(), self.start, strict=True))

    def summary(self, images: int) -> dict[str, float]:
        """Empty where nothing was measured. Images a second per watt are images per joule."""
        if self.missing:
            return {}
        return {
            "watts": round(self.joules / self.seconds, 1),
            "sm_mhz": round(self.sm_mhz),
            "joules_per_image": float(f"{self.joules / images:.4g}"),
            "images_per_second_per_watt": float(f"{images / self.joules:.4g}"),
        }
