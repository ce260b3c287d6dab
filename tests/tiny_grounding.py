"""A small random GroundingDINO in the published folder format, and its reward once more in plain Python."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from bicot.rewards.base import Example

SIZE = 96  # pixels of the shortest edge; the published model has 800
WORDS = ("cat", "dog", "car", "stop", "sign", "sports", "ball", "a", "red")
MAX_TOKENS = 40

Box = list[float]


def make_grounding(folder: Path, seed: int = 7) -> Path:
    """Write config, weights, tokenizer and image settings to `folder`.

    The weights are such that boxes and scores differ between pictures and between captions, and scores lie on both
    sides of 0.3: freshly initialised, every box is a fixed cell and the picture hardly sees the text.
    """
    tokenizer = tiny_bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIZE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=MAX_TOKENS,
        ),
        num_queries=20, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, max_text_len=MAX_TOKENS,
    )  # fmt: skip
    model = GroundingDinoForObjectDetection(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):  # releases of transformers initialise differently
            if name.endswith(("norm.weight", "_param", "layer_norm_before.weight", "layer_norm_after.weight")):
                weight.fill_(1.0)
            elif name.endswith(("embeddings.weight", "level_embed")):
                weight.normal_(generator=generator)
            elif weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(std=0.1, generator=generator)
            if name.endswith("bbox_embed.layers.2.bias"):
                weight[2:] = 1.0  # boxes wide enough to overlap
        # logits are queries · tokens: opposite biases lower them all, so that most queries see nothing
        model.model.decoder.layer_norm.weight.fill_(0.5)
        model.model.decoder.layer_norm.bias.fill_(0.3)
        model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.bias.fill_(-0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "GroundingDinoImageProcessor", "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "resample": 2, "size": {"shortest_edge": SIZE, "longest_edge": 160},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def tiny_bert_tokenizer() -> BertTokenizer:
    """BERT's own pipeline over a few words and all letters; special tokens have the ids that the model is built on."""
    names = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), "-", "'", *WORDS])
    names |= dict(enumerate(pieces, 200))
    return BertTokenizer(vocab={names.get(i, f"[unused{i}]"): i for i in range(1030)})


def span_map(tokenizer: BertTokenizer, phrases: list[str]) -> torch.Tensor:
    """[P, MAX_TOKENS]: the published create_positive_map_from_span, over each phrase's first and last word."""
    caption = " . ".join(phrases) + "."
    encoded = tokenizer(caption)
    rows, begin = torch.zeros(len(phrases), MAX_TOKENS), 0
    for row, phrase in zip(rows, phrases, strict=True):
        first, last = encoded.char_to_token(begin), encoded.char_to_token(begin + len(phrase) - 1)
        row[first : last + 1] = 1
        begin += len(phrase) + 3
    return rows / (rows.sum(1, keepdim=True) + 1e-6)


def published_masks(input_ids: torch.Tensor, **_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published generate_masks_with_special_tokens: who sees whom [S, L, L], and positions [S, L]."""
    samples, length = input_ids.shape
    sees = torch.eye(length, dtype=torch.bool).repeat(samples, 1, 1)
    positions = torch.zeros(samples, length, dtype=torch.long)
    for row in range(samples):
        previous = 0
        for column in range(length):
            if input_ids[row, column].item() not in (101, 102, 1012, 1029):
                continue
            if column not in (0, length - 1):
                block = slice(previous + 1, column + 1)
                sees[row, block, block] = True
                positions[row, block] = torch.arange(column - previous)
            previous = column
    return sees, positions


def greedy(boxes: list[Box], scores: list[float], limit: float = 0.5) -> list[int]:
    """Textbook suppression: indices that stay, most confident first; equal scores in the order of the list."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= limit for j in kept):
            kept.append(i)
    return kept


def iou(one: Box, two: Box) -> float:
    width = max(0.0, min(one[2], two[2]) - max(one[0], two[0]))
    height = max(0.0, min(one[3], two[3]) - max(one[1], two[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)) - width * height
    return width * height / union if width * height else 0.0


def plain_score(example: Example, corners: list[Box], scores: list[list[float]], compat: bool) -> float:
    """One picture's score in plain Python. scores: a row for each noun (more names follow only if not compat).

    With `compat`, a transcription of the published rules, whose boxes are centres and sizes; without, of the paper's.
    """
    names = list(example.nouns)
    if compat and not names:
        return 1.0
    if not compat:
        names += [example.spatial_info.obj1, example.spatial_info.obj2] if example.spatial_info else []
        names = list(dict.fromkeys(name.lower() for name in names + [e.obj_name for e in example.numeracy_info]))
    centres = [[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0] for x0, y0, x1, y1 in corners]
    seen: list[tuple[str, int, float]] = []  # label, box, score
    for name, row in zip(names, scores, strict=True):
        words = name.split()
        label = f"{words[0]} {words[-1]}" if compat and len(words) > 1 else name
        seen += [(label, box, score) for box, score in enumerate(row) if score > 0.3]

    def of(name: str) -> list[tuple[int, float]]:
        return [(box, score) for label, box, score in seen if label == (name if compat else name.lower())]

    def best(name: str) -> Box:
        return corners[max(of(name), key=lambda item: item[1])[0]]

    info = example.spatial_info
    if info is not None and (example.task_type == "spatial" or not compat):
        there = [name for name in (info.obj1, info.obj2) if of(name)]
        if len(there) < 2:
            return 0.2 * len(there)
        held = plain_relation(info.locality, best(info.obj1), best(info.obj2), compat)
        return 0.4 + (held / 2 if compat else 0.6 * held)
    if example.numeracy_info and (example.task_type == "numeracy" or not compat):
        total = 0.0
        for entry in example.numeracy_info:
            mine = of(entry.obj_name)
            count = len(greedy([(centres if compat else corners)[box] for box, _ in mine], [s for _, s in mine]))
            total += 1.0 if count == entry.num else 0.2 if compat and count else 0.0
        return total / len(example.numeracy_info)
    return sum(bool(of(noun)) for noun in example.nouns) / len(example.nouns)


def plain_relation(locality: str, box1: Box, box2: Box, compat: bool) -> float:
    x = (box2[0] + box2[2]) / 2 - (box1[0] + box1[2]) / 2
    y = (box2[1] + box2[3]) / 2 - (box1[1] + box1[3]) / 2
    if locality in ("next to", "on side of", "near"):
        reach = 150 if compat else 0.29
        return 1.0 if abs(x) < reach or abs(y) < reach else reach / max(abs(x), abs(y))
    overlap = iou(box1, box2)
    soft = 1.0 if overlap < 0.1 else 0.1 / overlap
    if locality in ("right of", "on the right of"):
        return soft if x < 0 and abs(x) > abs(y) else 0.0
    if locality in ("left of", "on the left of"):
        return soft if x > 0 and abs(x) > abs(y) else 0.0
    if locality in ("below", "on the bottom of"):
        return soft if y < 0 and abs(y) > abs(x) else 0.0
    if locality in ("top of", "on the top of") or (locality in ("above", "on top of") and not compat):
        return soft if y > 0 and abs(y) > abs(x) else 0.0
    return 0.0
