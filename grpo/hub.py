"""Writes the model card of a trained model, and uploads the model to the Hugging Face Hub (--push_to_hub)."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import HfApi, ModelCard

from ..model.settings import RolloutSettings
from .config import Config
from .files import METRICS, whole
from .output import read_metrics

# files that a resumed run needs but the model does not
LEFT_OUT = ("trainer_state.pt", "manifest.json", "heldout.*", "reference/*")
# metrics of the last step that the card shows
_SHOWN = ("reward", "kl", "entropy", "image_diversity", "plan_diversity")
# metrics whose curves the card shows, and how many steps a run must have for them
_CURVES, _FEWEST = ("reward", "kl", "entropy"), 10
# settings that the table of settings leaves out: the card shows them elsewhere, or they are private paths
_SEEN = {
    "model_name_or_path",
    "train_file",
    "eval_file",
    "rewards",
    "reward_weights",
    "reasoning_prompt_path",
    "deepspeed",
}
_CARD = """---
{head}---

# {name}

{base} trained by bicot with BiCoT-GRPO, the algorithm of [T2I-R1](https://huggingface.co/papers/2505.00703): it plans a
picture in words, then draws it token by token.

- base model: {base}
- prompts: `{prompts}`
- rewards: {rewards}
- steps: {steps}, each of {batch} prompts × {group} samples{pictures}

## Results

| metric | value |
| --- | --- |
{results}{curves}

## Settings that differ from the published ones

| setting | here | published |
| --- | --- | --- |
{settings}

## Use

With bicot, which plans and draws with the settings in `bicot.json`:

    python generate.py "a red circle" --model {name_or_path}

With transformers alone (5.18 or newer, as 5.17 cannot draw with Janus):

```python
{code}```
"""
_LOAD = """model = JanusForConditionalGeneration.from_pretrained({path!r}, dtype="auto")
"""
_LOAD_ADAPTERS = """model = JanusForConditionalGeneration.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(model, {path!r}).merge_and_unload()
model.generation_config = GenerationConfig.from_pretrained({path!r})
"""
_CODE = """{imports}from PIL import Image
from transformers import GenerationConfig, JanusForConditionalGeneration, JanusProcessor

{load}processor = JanusProcessor.from_pretrained({path!r})
prompt = "a red circle"
inputs = processor(text=[{ask!r}.replace("<prompt>", prompt)], return_tensors="pt")
tokens = model.generate(**inputs, {how})
plan = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
text = {draw!r}.replace("<prompt>", prompt).replace("<plan>", plan)
inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
tokens = model.generate(**inputs, generation_mode="image")
pixels = model.decode_image_tokens(tokens)[0].detach().float()  # height x width x 3, in [-1, 1]
Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy()).save("picture.png")
"""


def require_hub(config: Config) -> str | None:
    """The repository that the run will push to, created if needed; None without push_to_hub.

    Raises:
        OSError: the hub does not answer, or this user may not write to the repository.
    """
    if not config.push_to_hub:
        return None
    api = HfApi()
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        api.whoami()
        repo = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(repo, write=True)
    except Exception as error:  # including those of the HTTP library, which depends on the version of huggingface_hub
        raise OSError(
            f"push_to_hub: {api.endpoint} does not let this run write to {name!r}: {_line(error)}; log in with "
            "`hf auth login` (a token with write access), give another hub_model_id, or leave out push_to_hub"
        ) from error
    return repo


def push(folder: Path, repo: str, step: int) -> None:
    """Upload a checkpoint. If that fails, print the command that uploads it later."""
    try:
        done = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(LEFT_OUT),
            commit_message=f"Model after step {step}",
        )
        print(f"pushed {folder} to {done.repo_url}")
    except Exception as error:
        without = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in LEFT_OUT)
        print(f"push_to_hub failed: {_line(error)}; push {folder} later with:")
        print(f"hf upload {repo} {shlex.quote(str(folder))} {without}")


def write_card(
    folder: Path, config: Config, run: Mapping[str, Any], summary: Mapping[str, Any], repo: str | None
) -> None:
    """Write the model card README.md into a checkpoint, with the run's held-out pictures if it has any.

    Args:
        folder: the checkpoint.
        run: the settings that a checkpoint remembers.
        summary: the summary of the run.
        repo: the repository that the checkpoint will be pushed to.
    """
    base, adapters = config.model_name_or_path, (folder / "adapter_config.json").is_file()
    on_hub = not Path(base).exists()
    head = {
        "base_model": base if on_hub else None,
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-to-image",
        "tags": ["bicot", "grpo", "t2i-r1", "janus"],
        **_license(base),
    }
    pictures = Path(config.output_dir) / "before_after.png"
    if pictures.is_file():
        shutil.copyfile(pictures, folder / pictures.name)
    rows = [row for _, row in read_metrics(Path(config.output_dir) / METRICS)[0]]
    curves = [name for name in _CURVES if any(name in row for row in rows)] if len(rows) >= _FEWEST else []
    if curves:
        _draw_curves(rows, curves, folder / "curves.png")
    weights = cast(list[float] | None, config.reward_weights) or [1.0] * len(config.rewards.names)
    published = asdict(Config(rewards=config.rewards))
    changed = [(k, v, published[k]) for k, v in run.items() if k in published.keys() - _SEEN and v != published[k]]
    path = repo or str(folder)
    text = _CARD.format(
        head=yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False),
        name=(repo or Path(config.output_dir).resolve().name).rpartition("/")[2],
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`",
        prompts=Path(config.train_file).name,
        rewards=", ".join(f"{n} (weight {w:g})" for n, w in zip(config.rewards.names, weights, strict=True)),
        steps=summary["steps"],
        batch=run["prompts_per_step"],
        group=config.num_generations,
        pictures=f"\n\n![held-out prompts before and after training]({pictures.name})" if pictures.is_file() else "",
        results=_rows(_results(rows, summary)),
        curves="\n\n![reward, KL and entropy, step by step](curves.png)" if curves else "",
        settings=_rows(changed),
        name_or_path=path,
        code=_code(path, base, adapters, RolloutSettings.load(folder)),
    )
    with whole(folder / "README.md") as part:
        part.write_text(text, encoding="utf-8")


def _code(path: str, base: str, adapters: bool, settings: RolloutSettings) -> str:
    """Python code that plans and draws a picture with transformers."""
    sampling = settings.sampling
    how = f"max_new_tokens={sampling.max_completion_length}, do_sample={sampling.temperature > 0}"
    if sampling.temperature:
        how += f", temperature={sampling.temperature}, top_k={sampling.top_k}, top_p={sampling.top_p}"
    return _CODE.format(
        imports="from peft import PeftModel\n" if adapters else "",
        load=(_LOAD_ADAPTERS if adapters else _LOAD).format(path=path, base=base),
        path=path,
        ask=settings.prompts.plan_text("<prompt>"),
        draw=settings.prompts.image_text("<prompt>", "<plan>"),
        how=how,
    )


def _draw_curves(rows: Sequence[Mapping[str, float]], names: Sequence[str], path: Path) -> None:
    """Draw these metrics side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True))
        axes.set(title=name, xlabel="step")
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _results(rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The held-out rewards, and metrics of the last step."""
    metrics = rows[-1] if rows else {}
    names = [*_SHOWN, *(key for key in metrics if key.startswith("rewards/") and key.endswith("/mean"))]
    heldout = [(f"held-out reward {when}", summary[f"heldout_reward_{when}"]) for when in ("before", "after")]
    last_step = [(f"{name}, last step", metrics[name]) for name in names if name in metrics]
    return [(name, value) for name, value in heldout + last_step if value is not None]


def _rows(cells: list[Any]) -> str:
    """The rows of a Markdown table."""

    def show(cell: Any) -> str:
        text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
        return " ".join(text.split()).replace("|", "\\|")

    return "\n".join(f"| {' | '.join(map(show, row))} |" for row in cells)


def _license(base: str) -> dict[str, str]:
    """The license that the base model's card names."""
    card = Path(base) / "README.md"
    try:
        data = ModelCard.load(card if card.parent.is_dir() else base).data.to_dict()
    except Exception:  # there is no card, or the hub does not answer: leave the license out
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
