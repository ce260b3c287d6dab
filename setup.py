"""Installs bicot. The repository root is the package. The C++ kernels for CPUs are built if there is a compiler.

pip install -e .            # or: make setup
"""

import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
TEST = ["pytest", "pytest-xdist>=3.2,<4", "hypothesis", "tensorboard"]
VIEW = ["werkzeug>=3.1,<4"]  # the live view's server; TensorBoard has it too
TEST += ["triton; platform_system == 'Linux'"]  # for its interpreter
# examples/trl_grpo.py overrides a private method of TRL and divides as 1.16 does; 2.0 will remove options
TRL = ["trl>=1.16,<2"]
PEFT = ["peft>=0.18,<1"]
# grpo/zero.py uses ZeRO's internals (such as ds_id and _hp_mapping), so other minor versions must be tested first
DEEPSPEED = ["deepspeed>=0.19,<0.20; platform_system == 'Linux'"]
LINT = ["ruff", "mypy", "import-linter", "types-PyYAML", "types-tqdm"]


class BuildNative(build_ext):
    """Builds `kernels/csrc` with CMake. The extension is optional, so a failure is a warning, not a failed install."""

    def get_ext_filename(self, fullname: str) -> str:
        # it is a plain shared library for ctypes, so its name has no Python version
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # a new folder each time, since a CMake cache would remember the tools of a deleted build environment
        with tempfile.TemporaryDirectory() as build:
            configure = [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                build,
                *generator,
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            ]
            try:
                subprocess.run(configure, check=True)
                subprocess.run(["cmake", "--build", build], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(f"{error}; bicot runs without its C++ kernels, on PyTorch, slower") from error


setup(
    name="bicot",
    version=runpy.run_path(str(ROOT / "__init__.py"))["__version__"],
    description="Janus-Pro text-to-image training with BiCoT-GRPO, as fast as the hardware allows",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"bicot": "."},
    packages=["bicot", "bicot.kernels", "bicot.model", "bicot.grpo", "bicot.rewards", "bicot.toy", "bicot.bench"],
    package_data={"bicot": ["configs/*"], "bicot.kernels": ["csrc/*"], "bicot.toy": ["assets/*"]},
    include_package_data=False,
    ext_modules=[Extension("bicot.kernels._native", sources=[], depends=["CMakeLists.txt"], optional=True)],
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "numpy",
        "safetensors",
        "jsonargparse[signatures]>=4.49",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "pillow",
    ],
    entry_points={
        "console_scripts": [f"bicot-{name} = bicot.{name}:run" for name in ("train", "generate", "evaluate")],
    },
    extras_require={
        "view": VIEW,
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "bench": [*TRL, "liger-kernel>=0.8.2; platform_system == 'Linux'"],  # compared with; Liger needs Triton
        "peft": PEFT,  # LoRA
        "deepspeed": DEEPSPEED,  # ZeRO
        # for attn_implementation; flash-attn needs --no-build-isolation
        "flash-attn": ["flash-attn>=2.7,<3; platform_system == 'Linux'"],
        "xformers": ["xformers>=0.0.35,<0.1; platform_system == 'Linux'"],
        # for optim=adamw_8bit; not in dev, since transformers imports it and then prints warnings on a CPU in every run
        "torchao": ["torchao>=0.18,<0.19"],
        "dev": TEST + VIEW + TRL + PEFT + DEEPSPEED + LINT,
    },
)
