"""A GRPO loop of your own: the engine draws, a function scores, grpo_loss trains. No trainer, no settings file.

    python examples/custom_loop.py     # the toy learns to draw red: 0.02 becomes 0.12 in 20 steps, 14 s of one CPU core

It makes one update per rollout, so the ratio is 1 and nothing is clipped. For several updates give the streams
`old_logprob`, and for a KL `ref_logprob`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bicot import Policy, RolloutEngine, TokenStream, grpo_loss
from bicot.grpo.files import ROOT
from bicot.model.chunk import RolloutChunk

PROMPTS = ["a red circle", "two blue squares", "a green triangle left of a red square", "a yellow circle"]
GROUP = 8  # samples of each prompt


def redness(images: Tensor) -> Tensor:
    """The reward: images [S, 3, H, W] in [0, 1] -> [S]."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def token_streams(policy: Policy, rollout: RolloutChunk) -> list[TokenStream]:
    """Run the forward pass over plans and pictures -> their tokens, with the hidden states that predict them."""
    prompts, plans, image_prompts, tokens = rollout.ids
    text, image = policy.hidden((prompts, plans), (image_prompts, policy.image_ids(tokens)))
    streams = []
    for name, completions, hidden, head in (
        ("text", plans, text, policy.text_head),
        ("image", tokens, policy.image_features(image), policy.image_head),
    ):
        targets = torch.tensor([token for ids in completions for token in ids], device=policy.device)
        sample = torch.tensor([number for number, ids in enumerate(completions) for _ in ids], device=policy.device)
        stream = TokenStream(
            targets=targets, sample=sample, hidden=hidden, weight=head.weight, bias=head.bias, name=name
        )
        streams.append(stream)
    return streams


def train(policy: Policy, steps: int) -> Iterator[tuple[float, float]]:
    """Train, and yield the mean reward and the loss of each step."""
    engine = RolloutEngine(policy, policy.prompt_encoder(policy.settings.prompts))
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=4e-4, weight_decay=0.0)
    for step in range(steps):
        rollout = RolloutChunk.cat(list(engine.generate(PROMPTS, GROUP, policy.settings.sampling, seed=step)))
        rewards = redness(rollout.images)
        loss = grpo_loss(token_streams(policy, rollout), rewards, group_size=GROUP).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), 1.0)
        optimizer.step()
        yield rewards.mean().item(), loss.item()


if __name__ == "__main__":
    toy = Policy.from_pretrained(ROOT / "toy" / "assets", dtype=torch.float32)
    for number, (reward, loss) in enumerate(train(toy, 20), 1):
        print(f"step {number}: reward {reward:.4f}, loss {loss:.4f}")
