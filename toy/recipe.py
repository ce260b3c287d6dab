"""Makes the toy's model from scratch: a Janus of 1.3 million parameters that draws the scenes of `world.py`.

    python -m bicot.toy.recipe                # rewrites toy/assets; 4 to 6 minutes on two cores

A VQ-VAE learns the pictures. Then the policy learns (prompt -> plan) and (prompt + plan -> image tokens) from scenes
that contain mistakes, so that reinforcement learning has something to improve. The checkpoint is an ordinary
`JanusForConditionalGeneration` folder, with the prompts (`train.jsonl`, `heldout.jsonl`) and the instruction of the
text stage (`reasoning_prompt.txt`) in it.
Shapes: B pictures of a batch, T = 64 image tokens (8x8), E = 8 code dimensions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ..model.convert import IMAGE_TOKENS
from ..model.prompts import PromptEncoder, PromptFormat
from ..model.settings import RolloutSettings, Sampling
from . import world

HIDDEN, CODES, MAX_CONTEXT = 128, 64, 256
GRID = world.IMAGE_SIZE // world.PATCH_SIZE
BOS, EOS, PAD, UNK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<|unk|>"
SETTINGS = RolloutSettings(
    PromptFormat("t2i_r1", system_prompt="", reasoning_prompt="plan : {}"),
    Sampling(max_completion_length=40, top_k=0, cfg_weight=2.0),
)
IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of both models. `…_mistakes` and `no_prompt` are probabilities for each example."""

    vq_steps: int = 400
    vq_batch: int = 16
    vq_lr: float = 2e-3
    policy_steps: int = 450
    plan_batch: int = 96
    image_batch: int = 32
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    plan_mistakes: float = 0.3
    image_mistakes: float = 0.2
    no_prompt: float = 0.1  # trains the unconditional sequences of classifier-free guidance


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and punctuation mark of the world and of both chat templates."""
    specials = [PAD, BOS, EOS, UNK, *IMAGE_TOKENS.values(), "<|User|>", "<|Assistant|>"]
    sources = [*world.TEMPLATES, *world.NUMBERS[1:], *world.POSITIONS, *world.COLOURS, *world.SHAPES]
    sources += [shape + "s" for shape in world.SHAPES] + [w for words, _ in world.RELATIONS.values() for w in words]
    words = sorted({word for text in sources for word in text.replace("{}", " ").split()})
    vocabulary = [*specials, "User", "Assistant", ":", ".", ",", "plan", "at", "and", "another", *words]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, unk_token=UNK))
    marks = pre_tokenizers.Split(Regex("[.,:]"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    backend.add_special_tokens(specials)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, specials.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens=IMAGE_TOKENS,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> JanusForConditionalGeneration:
    """The untrained model, float32."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_CONTEXT,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        # the usual 0.02 suits a width of thousands; at 128 the model would learn to copy colours and shapes too late
        initializer_range=0.08,
        **ids,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=world.IMAGE_SIZE,
        patch_size=world.PATCH_SIZE,
        mlp_ratio=2.0,
        projection_dim=HIDDEN,
        num_image_tokens=GRID**2,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=32,
        base_channels=32,  # GroupNorm has 32 groups, so channels come in multiples of 32
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=HIDDEN,
        image_token_embed_dim=HIDDEN,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKENS["image_token"]],
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    boi = tokenizer.get_vocab()[IMAGE_TOKENS["boi_token"]]
    model.generation_config = GenerationConfig(do_sample=True, generation_kwargs={"boi_token_id": boi}, **ids)
    return model


def train_vq(model: JanusForConditionalGeneration, prompts: list[world.ToyPrompt], recipe: Recipe, seed: int) -> None:
    """Train `model.model.vqmodel` on pictures of random scenes.

    The world has a few dozen kinds of patches, so a code is simply the mean latent of all patches with the same pixels.
    This needs no initialisation, and every kind of patch gets a code. Latents and codes have length 1, because `decode`
    normalises codes and `encode` does not. The group norms normalise each picture by its own statistics, so equal
    patches get unequal latents. The contrastive term pulls these to their mean, and away from other means.
    """
    vq = model.model.vqmodel
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # 0.02 is too small for 32 channels
    rng = random.Random(seed)

    def draw(count: int) -> Tensor:
        scenes = [world.random_scene(rng.choice(prompts).content, rng) for _ in range(count)]
        return (world.render(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def encode(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = F.normalize(vq.quant_conv(vq.encoder(images)), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        kinds = _patch_kinds(images)
        index = kinds[:, None].expand_as(latents)
        sums = latents.new_zeros(int(kinds.max()) + 1, latents.shape[1]).scatter_add(0, index, latents)
        return latents, kinds, F.normalize(sums, dim=1)

    def next_loss() -> tuple[Tensor, str]:
        images = draw(recipe.vq_batch)
        latents, kinds, codes = encode(images)
        straight = latents + (codes[kinds] - latents).detach()
        grid = straight.view(len(images), GRID, GRID, -1).permute(0, 3, 1, 2)
        drawn = vq.decoder(vq.post_quant_conv(grid))
        error = (_pixel_weights(images) * (drawn - images).abs()).mean()
        apart = F.cross_entropy(latents @ codes.T / 0.1, kinds)
        return error + 0.3 * apart, f"pixels {error:.3f}, codes {apart:.3f}"

    vq.train().to(memory_format=torch.channels_last)  # half the time of a step
    _fit("vq", recipe.vq_steps, [torch.optim.AdamW(vq.parameters(), lr=recipe.vq_lr, weight_decay=0.0)], next_loss)
    vq.eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        codes = encode(draw(256))[2]
        vq.quantize.embedding.weight.copy_(F.normalize(torch.randn(CODES, codes.shape[1]), dim=1))
        vq.quantize.embedding.weight[: len(codes)] = codes


def _pixel_weights(images: Tensor) -> Tensor:
    """[B, 1, H, W]: 6 on shapes and their outlines, which cover a fifth of a picture, and 1 on the background."""
    background = images.new_tensor(world.BACKGROUND).view(1, 3, 1, 1) * 2 - 1
    painted = (images - background).abs().amax(1, keepdim=True) > 0.1
    return 1 + 5 * F.max_pool2d(painted.float(), 3, stride=1, padding=1)


def _patch_kinds(images: Tensor) -> Tensor:
    """Number the kinds of patches: images [B, 3, H, W] -> [B*T] int64, equal for patches with the same pixels."""
    patches = F.unfold(images, world.PATCH_SIZE, stride=world.PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    # compare weighted sums of patches: sorting numbers is far cheaper than sorting whole patches
    weights = torch.linspace(1, 2, patches.shape[1]).sqrt()
    return (patches @ weights).mul(1e3).round().unique(return_inverse=True)[1]


def train_policy(
    model: JanusForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[world.ToyPrompt],
    recipe: Recipe,
    seed: int,
) -> None:
    """Train the language model, and the modules that embed and predict image tokens, on examples.

    The texts are made by the classes of the trainer, so that the two cannot differ. A plan may differ from its prompt,
    and a picture from its plan. The policy learns to make such mistakes, and reinforcement learning can remove them.
    """
    encoder = PromptEncoder(tokenizer, SETTINGS.prompts, MAX_CONTEXT)
    rng = random.Random(seed)
    core = model.model
    # Muon trains the matrices between hidden states; AdamW trains embeddings, norms, biases and everything else
    layers = [core.language_model.layers, core.generation_aligner.hidden_layers, core.generation_head.proj_out]
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    trained = (core.language_model, core.generation_embeddings, core.generation_aligner, core.generation_head)
    others = [p for module in (*trained, model.lm_head) for p in module.parameters()]
    others = [p for p in others if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.other_lr, weight_decay=0.0),
    ]

    def next_loss() -> tuple[Tensor, str]:
        examples = [_example(rng.choice(prompts), recipe, rng) for _ in range(recipe.plan_batch)]
        plan = _plan_loss(model, encoder, examples)
        image = _image_loss(model, encoder, examples[: recipe.image_batch], recipe, rng)
        # images weigh more: most of their tokens are easy background, and most of a plan's loss is its choice of cells
        return plan + 4 * image, f"plan {plan:.3f}, image {image:.3f} nats a token"

    _fit("policy", recipe.policy_steps, optimizers, next_loss)


def _example(prompt: world.ToyPrompt, recipe: Recipe, rng: random.Random) -> tuple[str, str, world.Scene]:
    """A random example: prompt, plan, and the scene to draw."""
    scene = world.random_scene(prompt.content, rng)
    if rng.random() < recipe.plan_mistakes:
        scene = world.mistaken(scene, rng)
    plan = world.plan_of(scene)
    if scene and rng.random() < recipe.image_mistakes:
        scene = world.mistaken(scene, rng)
    return prompt.line["prompt"], plan, scene


def _plan_loss(model: JanusForConditionalGeneration, encoder: PromptEncoder, examples: list) -> Tensor:
    sequences, labels = [], []
    for prompt, plan, _ in examples:
        asked = encoder.plan_ids(prompt, 0)
        answer = [*encoder.tokenizer(plan, add_special_tokens=False)["input_ids"], encoder.tokenizer.eos_token_id]
        sequences.append(torch.tensor(asked + answer))
        labels.append(torch.tensor([IGNORE] * (len(asked) - 1) + answer + [IGNORE]))
    # padding on the right changes nothing in a causal model
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=encoder.tokenizer.pad_token_id)
    target = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    kept = target != IGNORE
    return F.cross_entropy(model.lm_head(hidden[kept]), target[kept])


def _image_loss(
    model: JanusForConditionalGeneration, encoder: PromptEncoder, examples: list, recipe: Recipe, rng: random.Random
) -> Tensor:
    core = model.model
    with torch.no_grad():
        images = world.render([scene for *_, scene in examples]) * 2 - 1
        tokens = core.vqmodel.encode(images).image_tokens.view(len(examples), -1)
    drawn = model.prepare_embeddings_for_image_generation(tokens)
    sequences, starts = [], []
    for (prompt, plan, _), embeddings in zip(examples, drawn, strict=True):
        ids = encoder.image_ids(prompt, plan, 0)
        if rng.random() < recipe.no_prompt:
            ids = encoder.unconditional_ids(len(ids))
        sequences.append(torch.cat([core.language_model.embed_tokens(torch.tensor(ids)), embeddings[:-1]]))
        starts.append(len(ids) - 1)  # <begin_of_image> predicts the first image token
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    hidden = core.language_model(inputs_embeds=padded, use_cache=False).last_hidden_state
    picked = torch.stack([h[start : start + GRID**2] for h, start in zip(hidden, starts, strict=True)])
    return F.cross_entropy(core.generation_head(picked).flatten(0, 1), tokens.flatten())


def _fit(
    name: str, steps: int, optimizers: Sequence[torch.optim.Optimizer], next_loss: Callable[[], tuple[Tensor, str]]
) -> None:
    """Take `steps` optimizer steps; `next_loss` returns the loss and a text to print. Warm-up, then a cosine to 0."""

    def rate(step: int) -> float:
        return min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, report = next_loss()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps}: {report}", flush=True)


def make_toy(output_dir: str | Path, seed: int = 0, recipe: Recipe | None = None) -> None:
    """Write checkpoint, prompts and instruction to `output_dir`. The same seed writes the same bytes."""
    recipe = recipe or Recipe()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    train, heldout = world.make_prompts(seed)
    for name, prompts in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        (output / name).write_text("".join(json.dumps(p.line) + "\n" for p in prompts), encoding="utf-8")
    (output / "reasoning_prompt.txt").write_text(SETTINGS.prompts.reasoning_prompt + "\n", encoding="utf-8")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        train_vq(model, train, recipe, seed)
        train_policy(model, tokenizer, train, recipe, seed)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    SETTINGS.save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_toy(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
