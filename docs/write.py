"""Writes configuration.md and kernels.md of this folder, and the chart of imports in CONTRIBUTING.md.

python -m bicot.docs.write
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from docstring_parser import parse

from bicot.grpo.config import Config
from bicot.rewards.config import RewardConfig

ROOT = Path(__file__).resolve().parents[1]
# One title for each block of fields in Config. Blank lines separate the blocks.
SECTIONS = ("The model", "Prompts", "Sampling", "Rewards and advantages", "Loss", "Optimizer", "The run")
FOLDERS = ("docs", "examples", "bench", "grpo", "toy", "rewards", "model", "kernels")
CONFIGURATION = """# Settings

Generated from the dataclasses by `python -m bicot.docs.write`.

Every setting is a key of the YAML file and an option of `train.py`: `beta: 0.04` in the file is `--beta 0.04` on the
command line. Options override the file, wherever they stand, and a later `--config FILE` overrides an earlier one.
`--print_config` prints what a command line means. An unknown name is an error, which names the nearest known one.

The defaults below are the published ones of T2I-R1 where it has the setting. Without `--config`, `train.py` reads
[configs/toy.yaml](../configs/toy.yaml) over them.
"""
KERNELS = """# Kernels

Generated from the docstrings and from bench/results by `python -m bicot.docs.write`.

Each op has its own file in [kernels/](../kernels), and does not depend on the trainer. `impl="auto"` takes the Triton
kernel on a GPU, the C++ kernel on a CPU, and plain PyTorch for tensors that neither supports. Asking for an
implementation that cannot run is an error. The floor of an op is the least time that its bytes or its FLOPs need.

"Measured" says how many times as long plain PyTorch and `torch.compile` take, in the least and the most favourable case
of our bench on a CPU. All cases, other libraries and GPUs are in [bench/RESULTS.md](../bench/RESULTS.md).
"""


def blocks(cls: type) -> list[list[str]]:
    """Names of the fields of a dataclass, one list for each block between blank lines."""
    found: list[list[str]] = []
    last = 0
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not found or node.lineno > last + 1:
                found.append([])
            found[-1].append(node.target.id)
            last = node.end_lineno or node.lineno
    return found


def default(field: dataclasses.Field[Any]) -> str:
    """The default as one writes it in YAML."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(value).replace('"', "")


def table(cls: type, names: list[str], prefix: str = "") -> str:
    """A line of Markdown for each of the fields."""
    meaning = {item.arg_name: " ".join((item.description or "").split()) for item in parse(cls.__doc__ or "").params}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{prefix}{name}` | `{default(fields[name])}` | {meaning[name]} |" for name in names]
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """The text of configuration.md."""
    page = [CONFIGURATION]
    for title, names in zip(SECTIONS, blocks(Config), strict=True):
        page += [f"## {title}\n", table(Config, [name for name in names if name != "rewards"])]
        if "rewards" in names:
            page.append(table(RewardConfig, [field.name for field in dataclasses.fields(RewardConfig)], "rewards."))
    return "\n".join(page)


def measured(op: str) -> str:
    """What the committed CPU result says of an op; empty if there is none."""
    file = ROOT / "bench" / "results" / f"{op}_cpu.json"
    if not file.is_file():
        return ""
    result = json.loads(file.read_text(encoding="utf-8"))
    cases: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["ms"]:
            cases.setdefault(json.dumps(row["case"]), {})[row["provider"]] = row["ms"][1]
    said = []
    for provider, name in (("eager", "plain PyTorch"), ("torch.compile", "`torch.compile`")):
        ratios = [ms[provider] / ms["ours"] for ms in cases.values() if provider in ms and "ours" in ms]
        if ratios:
            said.append(f"{name} takes {min(ratios):.2g} to {max(ratios):.2g} times as long")
    return f"Measured on an {result['cpu']}, {result['threads']} threads: {', '.join(said)}.\n" if said else ""


def kernels() -> str:
    """The text of kernels.md."""
    page = [KERNELS]
    for file in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"bicot.kernels.{file.stem}")
        ops = {
            name: inspect.signature(op).parameters
            for name, op in vars(module).items()
            if inspect.isfunction(op) and op.__module__ == module.__name__ and not name.startswith("_")
        }
        ops = {name: given for name, given in ops.items() if "impl" in given and given["impl"].default == "auto"}
        if ops:
            page.append(f"## {', '.join(ops)}\n\n[kernels/{file.name}](../kernels/{file.name}):")
            page += [f"`{name}({', '.join(given)})`\n" for name, given in ops.items()]
            page += [f"```text\n{(module.__doc__ or '').strip()}\n```\n", *map(measured, ops)]
    return "\n".join(part for part in page if part)


def imports(file: Path) -> set[str]:
    """The folders of bicot that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if node.level == 2 or (node.level == 0 and parts[0] == "bicot" and len(parts) > 1):
                names.add(parts[0] if node.level else parts[1])
    return names


def imports_chart() -> str:
    """Which folder imports from which, as a Mermaid chart."""
    scripts = [file for file in sorted(ROOT.glob("*.py")) if file.name not in ("setup.py", "__init__.py")]
    files = {script.stem: [script] for script in scripts} | {name: (ROOT / name).rglob("*.py") for name in FOLDERS}
    lines = ["```mermaid", "flowchart TD"]
    for name, sources in files.items():
        found = set().union(*map(imports, sources)) - {name}
        lines += [f"    {name} --> {other}" for other in FOLDERS if other in found]
    return "\n".join([*lines, "```"])


def contributing() -> str:
    """CONTRIBUTING.md with the current chart."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    before, _, rest = page.partition("```mermaid")
    return before + imports_chart() + rest.partition("```")[2]


def main() -> None:
    pages = {"docs/configuration.md": configuration(), "docs/kernels.md": kernels(), "CONTRIBUTING.md": contributing()}
    for name, page in pages.items():
        (ROOT / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
