"""The two chat prompts of BiCoT ask the model to plan the picture in words, and then to draw it.

Stage 1 (semantic CoT):  [system] + user(reasoning_prompt.format(prompt)) + assistant, the model writes a plan.
Stage 2 (token CoT):     user("{prompt}. {plan}") + assistant + <begin_of_image>, the model draws T image tokens.
Without a plan, stage 2 alone: user("{prompt}") + assistant + <begin_of_image>.

The unconditional sequence of classifier-free guidance is as long as the conditional one: every token but the first
(BOS) and the last (<begin_of_image>) becomes the pad token. Pad tokens are attended to.

The name of a special token in a prompt, an instruction or a plan is encoded as ordinary characters. Special tokens are
inserted by id, and the role tokens of the `janus` template by the template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

ChatTemplate = Literal["t2i_r1", "janus"]

# The names of the two roles in each template. `t2i_r1` is the template of the published trainer; `janus` has the role
# tokens that Janus-Pro itself was tuned with.
_ROLES: dict[str, tuple[str, str]] = {"t2i_r1": ("User", "Assistant"), "janus": ("<|User|>", "<|Assistant|>")}

DEFAULT_SYSTEM_PROMPT = "You turn a short request for a picture into a precise plan of that picture."
DEFAULT_REASONING_PROMPT = (
    'Plan the picture described by: "{}"\n'
    "Name every object of the description, and for each one its colour, shape, texture and number where the "
    "description gives them. State every relation between objects, such as left of, above or on. Add nothing that "
    "the description does not say. Use at most 50 words, and answer with the plan alone."
)


@dataclass(frozen=True)
class PromptFormat:
    """How a raw prompt becomes the text of each stage.

    Args:
        chat_template: `t2i_r1` (`User: … Assistant:`) or `janus` (`<|User|>: … <|Assistant|>:`).
        system_prompt: first line of stage 1; stage 2 has none.
        reasoning_prompt: instruction of stage 1 with exactly one `{}` for the raw prompt.

    Raises:
        ValueError: an unknown template, or a reasoning prompt without its `{}`.
    """

    chat_template: ChatTemplate = "t2i_r1"
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    reasoning_prompt: str = DEFAULT_REASONING_PROMPT

    def __post_init__(self) -> None:
        if self.chat_template not in _ROLES:
            raise ValueError(f"chat_template={self.chat_template!r} is unknown; use one of {sorted(_ROLES)}")
        if self.reasoning_prompt.count("{}") != 1:
            raise ValueError(
                "the reasoning prompt must contain the placeholder {} exactly once, where the raw prompt goes; "
                f"found it {self.reasoning_prompt.count('{}')} times in {self.reasoning_prompt[:80]!r}"
            )

    @classmethod
    def from_files(cls, chat_template: ChatTemplate, system_prompt: str | None, path: str | None) -> PromptFormat:
        """The defaults above, replaced by `system_prompt` and by the reasoning prompt in file `path` if given."""
        reasoning = DEFAULT_REASONING_PROMPT if path is None else read_reasoning_prompt(path)
        return cls(chat_template, DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt, reasoning)

    def _chat(self, content: str, system: str = "") -> list[str]:
        user, assistant = _ROLES[self.chat_template]
        parts = [f"{system}\n\n" if system else "", user, f": {content}\n\n", assistant, ":"]
        return parts if self.chat_template == "janus" else ["".join(parts)]

    def plan_parts(self, prompt: str) -> list[str]:
        """Stage 1, the request for a plan, as alternating texts and role tokens; without role tokens, one text."""
        # replace, not format: prompts and instructions may contain other braces
        return self._chat(self.reasoning_prompt.replace("{}", prompt), self.system_prompt)

    def image_parts(self, prompt: str, plan: str | None) -> list[str]:
        """Stage 2, the request for the picture, in the same form, without `<begin_of_image>`.

        If `plan` is None, the request is the raw prompt alone, as for the base model.
        """
        return self._chat(prompt if plan is None else f"{prompt}. {plan}")

    def plan_text(self, prompt: str) -> str:
        """Stage 1 as one text."""
        return "".join(self.plan_parts(prompt))

    def image_text(self, prompt: str, plan: str | None) -> str:
        """Stage 2 as one text."""
        return "".join(self.image_parts(prompt, plan))


def read_reasoning_prompt(path: str | Path) -> str:
    """Read the instruction from a file. Raises ValueError if that fails."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"reasoning_prompt_path={str(path)!r} is not a text file in UTF-8: {error}") from error


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes the prompts of both stages with one tokenizer.

    Args:
        tokenizer: a Janus tokenizer, which defines BOS, EOS, pad and `boi_token`. It is asked to add no tokens itself.
        format: the texts.
        max_context: maximum number of tokens in a sequence; a longer prompt is an error that names it.
    """

    tokenizer: Any  # a transformers tokenizer; its annotations are too loose to check against
    format: PromptFormat
    max_context: int

    @property
    def boi_token_id(self) -> int:
        return self.tokenizer.boi_token_id

    def plan_ids(self, prompt: str, room: int) -> list[int]:
        """Ids of the stage-1 prompt. ValueError if it leaves less than `room` tokens of the context for the plan."""
        return self._encode(self.format.plan_parts(prompt), prompt, room)

    def image_ids(self, prompt: str, plan: str | None, room: int) -> list[int]:
        """Ids of the stage-2 prompt, with `<begin_of_image>` last. ValueError if it leaves less than `room` tokens."""
        return [*self._encode(self.format.image_parts(prompt, plan), prompt, room + 1), self.boi_token_id]

    def unconditional_ids(self, length: int) -> list[int]:
        """The unconditional prompt of `length` tokens: BOS, pads, `<begin_of_image>`."""
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        return [bos, *[pad] * (length - 2), self.boi_token_id]

    def decode_plan(self, ids: list[int]) -> str:
        """The text of a plan, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    @cached_property
    def _control(self) -> set[int]:
        """Ids of special tokens and of role tokens, which text is never encoded as."""
        named = {*self.tokenizer.all_special_tokens, *_ROLES["janus"]}
        added = self.tokenizer.added_tokens_decoder.items()
        return {i for i, token in added if token.special or token.content in named} - {self.tokenizer.unk_token_id}

    def _text_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # a tokenizer may have control tokens as ordinary words, or as added tokens that are not marked special
        unk = self.tokenizer.unk_token_id
        known = [unk if i in self._control else i for i in ids]
        return [i for i in known if i is not None]

    def _encode(self, parts: list[str], prompt: str, room: int) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give every line a non-empty `prompt`")
        # BOS by id, as in the unconditional prompt: some tokenizers add none, or an EOS too
        ids = [self.tokenizer.bos_token_id]
        for i, part in enumerate(parts):
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"] if i % 2 else self._text_ids(part)
        if len(ids) + room > self.max_context:
            raise ValueError(
                f"prompt too long: {len(ids)} tokens and {room} to generate exceed the context of "
                f"{self.max_context}; shorten it or lower max_completion_length: {prompt[:120]!r}"
            )
        return ids
