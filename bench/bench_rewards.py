"""rewards: the published scorers on a batch of pictures, ours against one picture at a time; and beside a decoding GPU.

python -m bicot.bench.bench_rewards [--device cpu|cuda] [--output FILE.json]
Random weights at true widths, of all layers on a GPU; eight pictures share a prompt and two phrases to look for.
Eager is what T2I-R1's code does, on transformers' modules: PIL, one picture, one question, and all logits. A run beside
the decoder is one of all its steps: ours scores in threads and streams of their own, eager after it. Floor: the FLOPs
of the models at their published sizes. Hidden is the share of the rewards' time after the decoder that ours does not
add to the decoder's. Checked: scores against eager's without PIL, as a share of their spread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble, RewardHandle
from ..rewards.orm import AFTER, BEFORE
from ..rewards.worker import Placement
from . import bench_rollout
from .harness import Case, Outputs, Provider, main, short
from .reward_models import CPU, TINY, TRUE, Made, Scale, git, grounding, hps, orm

# A score that belongs to another picture is off by one spread or so. PIL rounds to 8 bits, half precision everything.
TOLERANCE = 0.15
PUBLISHED_TEMPERATURE = 0.3  # of the ORM's answers
GROUP = 8
PROMPTS = [("a red apple and a blue bench", ("red apple", "blue bench")), ("a cat and two dogs", ("cat", "dog"))]


def hps_by_one(x: Made, pixels: Tensor, example: Example) -> Tensor:
    ids = x.reward.tokenizer([example.prompt], return_tensors="pt").input_ids.to(pixels.device)
    image = x.model.visual_projection(x.model.vision_model(pixels).pooler_output)
    text = x.model.text_projection(x.model.text_model(ids).pooler_output)
    return F.cosine_similarity(image.float(), text.float())[0]


def git_by_one(x: Made, pixels: Tensor, example: Example) -> Tensor:
    scores, words = [], x.reward.tokenizer
    for phrase in example.attr_nouns:
        ids = [words.cls_token_id, *words(f"{phrase}?", add_special_tokens=False).input_ids]
        logits = x.model(pixel_values=pixels, input_ids=torch.tensor([ids], device=pixels.device)).logits[0, -1]
        yes, no = logits.float().softmax(-1)[[x.reward.yes, x.reward.no]]
        scores.append(yes / (yes + no))
    return torch.stack(scores).mean()


def grounding_by_one(x: Made, pixels: Tensor, example: Example) -> Tensor:
    """The sum of the phrases' mean scores: with random weights the best are all 1."""
    text = x.reward.tokenizer(" . ".join(example.nouns) + ".", return_offsets_mapping=True, return_tensors="pt")
    chances = x.model(pixels, input_ids=text.input_ids.to(pixels.device)).logits[0].sigmoid()
    begin, means = 0, []
    for noun in example.nouns:
        end = begin + len(noun)
        tokens = [t for t, (left, right) in enumerate(text.offset_mapping[0].tolist()) if left < end and right > begin]
        means.append(chances[:, tokens].mean())
        begin = end + len(" . ")
    return torch.stack(means).sum()


def orm_by_one(x: Made, pixels: Tensor, example: Example) -> Tensor:
    """The answer is drawn at the published temperature, one word and its end; the score is of the first."""
    shapes = torch.tensor([pixels.shape[-2:]] * 2)  # as one of two pictures it is not cut into parts
    seen = x.model.get_image_features(pixels.expand(2, 1, -1, -1, -1), shapes, batch_num_images=[2]).pooler_output[0]
    ids = x.reward.tokenizer([BEFORE, AFTER.format(example.prompt)], add_special_tokens=False).input_ids
    before, after = (x.model.get_input_embeddings()(torch.tensor(row, device=pixels.device)) for row in ids)
    drawn = x.model.generate(
        inputs_embeds=torch.cat((before, seen, after))[None],
        do_sample=True,
        temperature=PUBLISHED_TEMPERATURE,
        top_k=0,
        max_new_tokens=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    chances = drawn.scores[0][0].float().mul(PUBLISHED_TEMPERATURE).softmax(-1)
    yes, no = chances[x.reward.tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return yes / (yes + no)


class Judging(NamedTuple):
    made: Made
    images: Tensor
    examples: list[Example]
    by_one: Callable[[Made, Tensor, Example], Tensor]


# name -> makes the reward, scores one picture as published, GFLOP of a picture at the published size
REWARDS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], int]] = {
    "hps": (hps, hps_by_one, 334),
    "git": (git, git_by_one, 716),
    "grounding": (grounding, grounding_by_one, 506),
    "orm": (orm, orm_by_one, 11100),
}


def judging(name: str, scale: Scale, samples: int, device: str, dtype: torch.dtype) -> Judging:
    make, by_one, _ = REWARDS[name]
    return Judging(make(scale, device, dtype), pictures(samples, device), prompts(samples), by_one)


def pictures(samples: int, device: str) -> Tensor:
    """[S, 3, 384, 384] of soft colours, each picture with its tint."""
    generator = torch.Generator().manual_seed(1)
    tint, noise = torch.rand(samples, 3, 1, 1, generator=generator), torch.rand(samples, 3, 6, 6, generator=generator)
    return F.interpolate((tint * noise).to(device), (384, 384), mode="bilinear")


def prompts(samples: int) -> list[Example]:
    made = [Example(prompt, "color", nouns=phrases, attr_nouns=phrases) for prompt, phrases in PROMPTS]
    return [made[s // GROUP % len(made)] for s in range(samples)]


@torch.no_grad()
def ours(x: Judging) -> Outputs:
    return (x.made.reward.score(x.images, x.examples),)


@torch.no_grad()
def found(x: Judging) -> Outputs:
    """What grounding_by_one gives."""
    names = [list(example.nouns) for example in x.examples]
    return (
        torch.stack([scores.mean(1).sum() for _, scores in x.made.reward.detect(x.images, names)]).to(x.images.device),
    )


@torch.no_grad()
def one_at_a_time(x: Judging, through_pil: bool = True) -> Outputs:
    scores, dtype = [], x.made.model.dtype
    processor = x.made.processor() if through_pil else None
    for image, example in zip(x.images.split(1), x.examples, strict=True):
        if processor:
            from PIL import Image

            array = image[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
            pixels = processor(Image.fromarray(array), return_tensors="pt").pixel_values
        else:
            pixels = x.made.reward.preprocess(image)
        scores.append(x.by_one(x.made, pixels.to(image.device, dtype), example))
    return (torch.stack(scores),)


def with_pil(x: Judging) -> Judging:
    """ImportError where PIL is not installed, also if only what it would do is checked."""
    importlib.import_module("PIL.Image")
    return x


def truth(x: Judging) -> Callable[[Outputs], float]:
    (expected,) = one_at_a_time(x, through_pil=False)
    assert expected is not None
    return partial(of_spread, expected=expected)


def of_spread(outputs: Outputs, expected: Tensor) -> float:
    return float((outputs[0] - expected).abs().amax() / expected.std())  # type: ignore[operator]


def case(name: str, scale: Scale, samples: int, device: str, dtype: torch.dtype) -> Case:
    labels = {"reward": name, "pictures": samples, "dtype": short(dtype)}
    labels |= {"layers": "one layer in 24"} if scale is CPU else {}
    eager = "one picture at a time through PIL, as the published T2I-R1 code scores"
    providers = {"ours": Provider(ours), "eager": Provider(one_at_a_time, eager, with_pil)}
    if name == "grounding":  # selects proposals, which the rounding of PIL changes where weights are random
        providers["ours"] = Provider(ours, checked=found)
        providers["eager"] = Provider(one_at_a_time, eager, with_pil, partial(one_at_a_time, through_pil=False))
    return Case(
        labels,
        dtype,
        partial(judging, name, scale, samples, device, dtype),
        truth,
        providers,
        flops=samples * REWARDS[name][2] * 10**9 if scale is TRUE else 0,
        makes=("images", samples),
        tolerance=TOLERANCE,
        seconds=4 if device == "cuda" else 8,
    )


class Decoding(NamedTuple):
    """A stretch of the image stage, and pictures of the chunk before it to be scored."""

    decode: bench_rollout.Inputs
    images: Tensor
    examples: list[Example]
    threads: RewardEnsemble
    serial: RewardEnsemble
    running: list[RewardHandle]

    def settle(self) -> Decoding:
        """No reward is at work any more."""
        while self.running:
            self.running.pop().result()
        return self

    def draw(self) -> None:
        """The decoder's steps, on the engine's stream."""
        stream = self.decode.engine.decode_stream
        if stream is None:
            bench_rollout.ours(self.decode)
            return
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            bench_rollout.ours(self.decode)
        current.wait_stream(stream)


def decoding(
    scale: Scale, model: str, stage: Any, samples: int, steps: int, device: str, dtype: torch.dtype
) -> Decoding:
    rewards = [
        REWARDS[name][0](scale, device, torch.float32 if name == "grounding" else dtype)[0]
        for name in ("hps", "git", "grounding")
    ]
    drawn = (stage.length - steps) // 2
    rows = bench_rollout.inputs(model, dtype, device, "auto", stage, samples, drawn, steps)
    places = {reward.name: Placement(micro_batch=samples) for reward in rewards}
    threads = RewardEnsemble(rewards, placements=places, device=device, schedule="threads")
    serial = RewardEnsemble(rewards, placements=places, device=device, schedule="serial")
    return Decoding(rows, pictures(samples, device), prompts(samples), threads, serial, [])


def beside(x: Decoding) -> Outputs:
    handle = x.threads.submit(x.images, x.examples)
    x.draw()
    return (handle.result(),)


def after(x: Decoding) -> Outputs:
    x.draw()
    return (x.serial.submit(x.images, x.examples).result(),)


def alone(x: Decoding) -> Outputs:
    x.draw()
    return (None,)


def slowed(x: Decoding) -> Outputs:
    x.running.append(x.threads.submit(x.images, x.examples))
    x.draw()
    return (None,)


def hidden(ms: Mapping[str, float]) -> dict[str, float]:
    """The share of the rewards' time that the decoder's covers; nothing where a provider is missing."""
    if not {"ours", "eager", "the decoder alone"} <= ms.keys():
        return {}
    alone = ms["the decoder alone"]
    return {"hidden_pct": round(100 * (ms["eager"] - ms["ours"]) / (ms["eager"] - alone), 1)}


def overlap(scale: Scale, model: str, stage: Any, samples: int, steps: int, device: str, dtype: torch.dtype) -> Case:
    """What the rewards cost where they can hide: the time of ours beyond `the decoder alone`."""

    def expect(x: Decoding) -> Callable[[Outputs], float]:
        expected = x.serial.submit(x.images, x.examples).result()
        return lambda outputs: 0.0 if outputs[0] is None else float((outputs[0] - expected).abs().nan_to_num().amax())

    note = "of the decoder's steps, while the rewards work"
    return Case(
        {"reward": "hps, git and grounding beside the decoder", "model": model, "pictures": samples, "steps": steps},
        dtype,
        partial(decoding, scale, model, stage, samples, steps, device, dtype),
        expect,
        {
            "ours": Provider(beside, prepare=Decoding.settle),
            "eager": Provider(after, "rewards after the decoder", prepare=Decoding.settle),
            "the decoder alone": Provider(alone, prepare=Decoding.settle),
            "the decoder beside": Provider(slowed, note, prepare=Decoding.settle),
        },
        seconds=10,
        compared=hidden,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    """On a GPU the pictures of a published step; on a CPU fewer, and one layer in 24."""
    if tiny:
        small = [case(name, TINY, 3, device, torch.float32) for name in REWARDS]
        return [*small, overlap(TINY, "tiny", bench_rollout.TINY_IMAGE, 3, 4, device, torch.float32)]
    if device == "cpu":
        counts = {"hps": 8, "git": 4, "grounding": 2, "orm": 2}
        return [case(name, CPU, count, device, torch.float32) for name, count in counts.items()]
    true = [case(name, TRUE, 16, device, torch.float16) for name in ("hps", "git")]
    true += [case("grounding", TRUE, 16, device, torch.float32), case("orm", TRUE, 16, device, torch.bfloat16)]
    return [overlap(TRUE, "Janus-Pro-1B", bench_rollout.IMAGE, 32, 288, device, torch.bfloat16), *true]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
