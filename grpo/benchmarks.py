"""Reads the prompts of benchmarks, and writes pictures into folders as their scorers expect them.

    format          prompt files                         pictures in the output folder
    geneval         evaluation_metadata.jsonl            00000/samples/0000.png …; the line in 00000/metadata.jsonl
    t2i_compbench   a text file, a prompt a line         samples/{prompt}_000000.png …, numbered through
    wise            JSON files, each a list of objects   {prompt_id}.png
    dpg             text files, each a prompt            images/{name of the file}.png, four pictures as 2 × 2
    bicot           T2I-R1's JSONL schema                images/00000_00.png …

These files of each scorer's code say what it opens:

    geneval         djghosh13/geneval af4902f: README.md, evaluation/evaluate_images.py
    t2i_compbench   Karine-Huang/T2I-CompBench 1b70949: Readme.md, BLIPvqa_eval/BLIP_vqa.py,
                    UniDet_eval/experts/obj_detection/generate_dataset.py, 3_in_1_eval/3_in_1.py
    wise            PKU-YuanGroup/WISE eb51174: vllm_eval.py, WISE_legacy/gpt_eval.py
    dpg             TencentQQGYLab/ELLA 3c228f1: dpg_bench/compute_dpg_bench.py, dpg_bench/dist_eval.sh
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..model.adapters import adapter_base
from ..model.engine import RolloutEngine
from ..model.generation import to_pixels
from ..model.settings import Sampling
from ..rewards.base import Example
from .data import parse_line
from .files import whole

SETTINGS = "settings.json"
_PLANS = "plans"  # name of the PNG text chunk with the plans of a picture
_LONGEST_NAME = 255 - len("..part")  # bytes; `whole` writes to a longer name first


@dataclass(frozen=True)
class Prompt:
    """A prompt, its place in the files, the name of its pictures if it gives one, and metadata for the scorer."""

    text: str
    where: str
    name: str = ""
    metadata: str = ""
    example: Example | None = None


@dataclass(frozen=True)
class Picture:
    """A picture file, relative to the output folder, with the index of its prompt and the numbers of its samples."""

    file: str
    prompt: int
    samples: range


@dataclass(frozen=True)
class Benchmark:
    """How the prompts of a benchmark are read, and where its pictures are written.

    Args:
        read: yields the prompts of one file.
        suffix: suffix of the files in a folder of prompts; None = the prompts are always in one file.
        file: path of a picture in the output folder.
        num_generations: published number of samples for each prompt.
        most: maximum number of samples that the scorer reads for each prompt; None = no maximum.
        grid: whether one file shows all samples of a prompt.
    """

    read: Callable[[Path], Iterator[Prompt]]
    suffix: str | None
    file: str
    num_generations: int
    most: int | None = None
    grid: bool = False

    def load(self, paths: Sequence[Path]) -> list[Prompt]:
        """Read the prompts of all files.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file or a line does not have this format (`file:line: what is wrong`).
        """
        prompts: list[Prompt] = []
        for path in paths:
            if path.is_dir() and self.suffix:
                files = sorted(path.glob(f"*{self.suffix}"))
            elif path.is_file():
                files = [path]
            else:
                raise FileNotFoundError(f"no prompts at {path}: give a file" + " or a folder" * bool(self.suffix))
            for file in files:
                prompts += self.read(file)
        if not prompts:
            raise ValueError(f"no prompts in {', '.join(map(str, paths))}")
        return prompts

    def pictures(self, prompts: Sequence[Prompt], num_generations: int) -> list[Picture]:
        """All pictures of the output folder, in order.

        Raises:
            ValueError: there are more samples than the scorer reads, or a file name is too long or not unique.
        """
        if self.most and num_generations > self.most:
            raise ValueError(f"--num_generations {num_generations}: the scorer reads {self.most} of a prompt at most")
        pictures: dict[str, Picture] = {}
        for index, prompt in enumerate(prompts):
            first = index * num_generations
            for g in range(1 if self.grid else num_generations):
                file = self.file.format(index=index, name=prompt.name, sample=g, number=first + g)
                if (size := len(Path(file).name.encode())) > _LONGEST_NAME:
                    over = size - _LONGEST_NAME
                    raise ValueError(f"{prompt.where}: the name of its picture would be {over} bytes too long")
                if file in pictures:
                    other = prompts[pictures[file].prompt].where
                    raise ValueError(f"{prompt.where}: {file} is the picture of {other} too")
                samples = range(first, first + num_generations) if self.grid else range(first + g, first + g + 1)
                pictures[file] = Picture(file, index, samples)
        return list(pictures.values())


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each with its place (`file:line`)."""
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _require(where: str, row: Any, keys: Mapping[str, type]) -> None:
    """Raises ValueError if the row is no object, or a key is missing or has another type."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key, kind in keys.items():
        if key not in row:
            raise ValueError(f"{where}: the key {key!r} is missing")
        if type(row[key]) is not kind or (kind is str and not row[key].strip()):
            expected = "text" if kind is str else "a whole number"
            raise ValueError(f"{where}: {key!r} must be {expected}, got {row[key]!r:.200}")


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _geneval(path: Path) -> Iterator[Prompt]:
    for where, line in _lines(path):
        row = _json(where, line)
        _require(where, row, {"prompt": str, "tag": str})
        yield Prompt(row["prompt"], where, metadata=json.dumps(row))


def _t2i_compbench(path: Path) -> Iterator[Prompt]:
    """The scorers read the prompt from the file name, up to the first "_"."""
    for where, line in _lines(path):
        prompt = line.split("\t")[0]  # as the published inference does
        for character in "/_\0":
            if character in prompt:
                raise ValueError(f"{where}: {character!r} cannot be in a prompt that is read from a file name")
        yield Prompt(prompt, where, prompt)


def _wise(path: Path) -> Iterator[Prompt]:
    rows = _json(str(path), _text_of(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        _require(where, row, {"Prompt": str, "Explanation": str, "Subcategory": str, "prompt_id": int})
        yield Prompt(row["Prompt"], where, str(row["prompt_id"]))


def _dpg(path: Path) -> Iterator[Prompt]:
    text = _text_of(path).strip()
    if not text:
        raise ValueError(f"{path}: the file is empty")
    if "." in path.stem:
        raise ValueError(f"{path}: the scorer reads the name up to the first dot; remove the other dots")
    yield Prompt(text, str(path), path.stem)


def _bicot(path: Path) -> Iterator[Prompt]:
    for where, line in _lines(path):
        try:
            example = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield Prompt(example.prompt, where, example=example)


BENCHMARKS = {
    "geneval": Benchmark(_geneval, None, "{index:05}/samples/{sample:04}.png", 4),
    "t2i_compbench": Benchmark(_t2i_compbench, None, "samples/{name}_{number:06}.png", 10),
    "wise": Benchmark(_wise, ".json", "{name}.png", 1, most=1),
    "dpg": Benchmark(_dpg, ".txt", "images/{name}.png", 4, most=4, grid=True),
    "bicot": Benchmark(_bicot, None, "images/{index:05}_{sample:02}.png", 4),
}


def check(prompts: Sequence[Prompt], use: Callable[[Prompt], None]) -> None:
    """Call `use` for each prompt. If it raises ValueError, add the place of the prompt to the message."""
    for prompt in prompts:
        try:
            use(prompt)
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error


def require_room(engine: RolloutEngine, sampling: Sampling, plan: bool, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if the context has no room for a prompt, the longest plan (if `plan`) and the picture."""
    longest, encoder = sampling.max_completion_length if plan else 0, engine.encoder

    def fits(prompt: Prompt) -> None:
        if plan:
            encoder.plan_ids(prompt.text, longest)
        encoder.image_ids(prompt.text, "" if plan else None, longest + engine.policy.num_image_tokens)

    check(prompts, fits)


def fingerprint(model: str) -> str:
    """A digest that tells models apart, and adapters also by their base model. It reads large files only at 64 places.
    A hub id is its own fingerprint."""
    if not Path(model).is_dir():
        return model
    digest = hashlib.sha256()
    folders = [Path(folder) for folder in (model, adapter_base(model)) if folder and Path(folder).is_dir()]
    for path in [path for folder in folders for path in sorted(folder.iterdir())]:
        if path.suffix in (".safetensors", ".bin", ".json"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for place in range(0, size, max(4096, size // 64)):
                    file.seek(place)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def missing(output: Path, pictures: Sequence[Picture], settings: Mapping[str, Any]) -> list[Picture]:
    """The pictures that do not exist yet.

    Raises:
        ValueError: the existing ones were drawn with other settings, or there is no record of their settings.
    """
    absent = [picture for picture in pictures if not (output / picture.file).is_file()]
    if len(absent) < len(pictures):
        saved = json.loads((output / SETTINGS).read_text()) if (output / SETTINGS).is_file() else {}
        other = [name for name, value in settings.items() if name != "model" and saved.get(name) != value]
        if other:
            here, now = saved.get(other[0]), settings[other[0]]
            why = f"{other[0]}: {here!r} in {SETTINGS}, {now!r} now" if saved else f"{SETTINGS} is missing"
            raise ValueError(f"{output} has pictures of another evaluation ({why}); choose another --output")
    return absent


def prepare(output: Path, prompts: Sequence[Prompt], pictures: Sequence[Picture], settings: Mapping[str, Any]) -> None:
    """Prepare the output folder. Half-written pictures of a killed process are deleted, so that they are not scored."""
    for part in output.rglob(".*.part.png"):
        part.unlink()
    with whole(output / SETTINGS) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n")
    for picture in pictures:
        (output / picture.file).parent.mkdir(parents=True, exist_ok=True)
        if metadata := prompts[picture.prompt].metadata:
            path = output / Path(picture.file).parts[0] / "metadata.jsonl"
            if not path.is_file():
                with whole(path) as file:
                    file.write_text(metadata + "\n")


def draw(
    engine: RolloutEngine,
    sampling: Sampling,
    seed: int,
    prompts: Sequence[Prompt],
    pictures: Sequence[Picture],
    num_generations: int,
    output: Path,
    plan: bool = True,
) -> Iterator[Picture]:
    """Draw the pictures, with plans or from the prompts alone, and write and yield each one.

    A sample does not depend on which other samples are drawn.
    """
    count: dict[int, int] = {}
    for picture in pictures:
        count[picture.prompt] = count.get(picture.prompt, 0) + len(picture.samples)
    groups = [picture for picture in pictures if count[picture.prompt] == num_generations]
    single = [picture for picture in pictures if count[picture.prompt] < num_generations]
    for size, part in ((num_generations, groups), (1, single)):  # groups share the prefill of their prompt
        starts = [(picture.prompt, picture.samples[0]) for picture in part if picture.samples[0] % size == 0]
        texts, firsts = [prompts[index].text for index, _ in starts], [first for _, first in starts]
        samples = (
            sample
            for chunk in engine.generate(texts, size, sampling, seed, firsts, None if plan else [None] * len(texts))
            for sample in zip(to_pixels(chunk.images), chunk.plan_texts, strict=True)
        )
        for picture in part:
            images, plans = zip(*islice(samples, len(picture.samples)), strict=True)
            info = PngInfo()
            info.add_itxt(_PLANS, json.dumps(plans))
            with whole(output / picture.file) as file:
                Image.fromarray(tile(images)).save(file, pnginfo=info)
            yield picture


def tile(images: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange pictures [H, W, 3] in two columns, row by row. A single picture is returned as it is."""
    height, width, _ = images[0].shape
    canvas = np.zeros((-(-len(images) // 2) * height, min(2, len(images)) * width, 3), np.uint8)
    for i, image in enumerate(images):
        canvas[i // 2 * height :, i % 2 * width :][:height, :width] = image
    return canvas


def load_picture(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a picture that `draw` wrote -> pixels [H, W, 3], and the plans."""
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.info[_PLANS])
