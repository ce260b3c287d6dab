"""The ids of prompts: what stands at their ends, and that text stays text."""

from __future__ import annotations

import pytest
from tiny import TOY, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bicot.model.prompts import PromptEncoder, PromptFormat

FORMAT = PromptFormat("t2i_r1", "", "plan {}")


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <eos>", "<bos> <bos> $A"])
def test_ends_do_not_depend_on_what_the_tokenizer_adds(template: str) -> None:
    """The unconditional row of guidance begins and ends as the conditional one does."""
    tokenizer = tiny_tokenizer(61)
    want = PromptEncoder(tokenizer, FORMAT, 128).plan_ids("a red circle", 0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    encoder = PromptEncoder(tokenizer, FORMAT, 128)
    ids = encoder.image_ids("a red circle", "two blue square", 16)
    row = encoder.unconditional_ids(len(ids))
    assert (ids[0], ids[-1]) == (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.boi_token_id)
    assert not {0, 1, 5} & set(ids[1:-1])
    assert encoder.plan_ids("a red circle", 0) == want


ROLES = ["<|User|>", "<|Assistant|>"]
SPECIALS = ["<bos>", "<eos>", "<pad>", "<image>", "<boi>", "<eoi>"]
SPELLED = f"a sign that says {' '.join(SPECIALS + ROLES)}<boi>!"


def byte_tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    """Of the kind that Janus-Pro has; `special`: whether it calls its role tokens and `<boi>` special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([SPELLED, "User: Plan a red circle\n\nAssistant: two <blue> squares"] * 9, trainer)
    core.add_special_tokens([token for token in SPECIALS if token != "<boi>"])
    (core.add_special_tokens if special else core.add_tokens)(["<boi>", *ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )  # fmt: skip


@pytest.mark.parametrize("template", ["t2i_r1", "janus"])
def test_special_tokens_spelled_in_a_text_stay_text(template: str) -> None:
    tokenizer = byte_tokenizer()
    texts = PromptFormat(template, f"system {SPELLED}", f"plan {SPELLED} for {{}}")  # type: ignore[arg-type]
    encoder = PromptEncoder(tokenizer, texts, 2000)
    control = set(tokenizer.added_tokens_decoder)
    roles = tokenizer.convert_tokens_to_ids(ROLES) if template == "janus" else []
    written = tokenizer(SPELLED, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not control & {*written}
    plan = encoder.decode_plan([*written, tokenizer.eos_token_id])
    assert plan == SPELLED, "a plan that spells them in plain tokens"
    asked, draw = encoder.plan_ids(SPELLED, 0), encoder.image_ids(SPELLED, plan, 0)
    assert [i for i in asked if i in control] == [tokenizer.bos_token_id, *roles]
    assert [i for i in draw if i in control] == [tokenizer.bos_token_id, *roles, tokenizer.boi_token_id]
    assert tokenizer.decode(asked) == "<bos>" + texts.plan_text(SPELLED)
    assert tokenizer.decode(draw) == "<bos>" + texts.image_text(SPELLED, SPELLED) + "<boi>"


@pytest.mark.parametrize("template", ["t2i_r1", "janus"])
def test_other_texts_are_encoded_as_a_whole(template: str) -> None:
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer, PromptFormat(template), 2000)  # type: ignore[arg-type]
    prompt, plan = "a red circle,  <blue> \n| squares", "Two: circles.\n\n a <b>"
    for ids, text in (
        (encoder.plan_ids(prompt, 0), encoder.format.plan_text(prompt)),
        (encoder.image_ids(prompt, plan, 0)[:-1], encoder.format.image_text(prompt, plan)),
    ):
        assert ids == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", ["word", "toy", "not called special"])
def test_a_tokenizer_that_cannot_spell_them_has_no_special_token_either(kind: str) -> None:
    """A word-level one has them as words, and split_special_tokens leaves added tokens that are not called special."""
    names = ["<begin_of_image>", "<|pad|>", "<|end_of_sentence|>"] if kind == "toy" else SPECIALS
    tokenizer = tiny_tokenizer(61)
    if kind != "word":
        tokenizer = AutoTokenizer.from_pretrained(TOY) if kind == "toy" else byte_tokenizer(special=False)
    spelled = " ".join(["a", *names, *ROLES, "circle"])
    encoder = PromptEncoder(tokenizer, FORMAT, 2000)
    ids = encoder.image_ids(spelled, spelled, 0)
    control = {*tokenizer.convert_tokens_to_ids([*names, *ROLES])} - {tokenizer.unk_token_id}
    assert [i for i in ids if i in control] == [ids[0], ids[-1]][kind == "toy" :], "the ends alone"
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.boi_token_id)
