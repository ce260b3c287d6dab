"""Checkpoints in DeepSeek's layout give the model of their twins in transformers' layout, or one line that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import image_hidden
from safetensors.torch import save_file
from tiny import tiny_policy
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from bicot.model import convert
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.policy import Policy, load_policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling

WORDS = ["User", "Assistant", ":", ".", "plan", "a", "red", "blue", "circle", "square", "and", "of", "two"]
VOCAB = 61


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json has a tower and a VQ model by name; the published ones are too large for a test."""
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2, "mlp_ratio": 4.0}
    monkeypatch.setitem(convert.TOWERS, "siglip_tiny", tower)
    vq = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 2, "latent_channels": 32}
    monkeypatch.setitem(convert.VQ_MODELS, "VQ-tiny", vq)


def published_files(folder: Path, pad: int) -> None:
    """A tokenizer with its files as DeepSeek publishes them, the pad token at `pad`."""
    folder.mkdir(exist_ok=True)
    special = [
        "<bos>", "<eos>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>",
    ]  # fmt: skip
    tokens = [*special, *WORDS, *(f"w{i}" for i in range(VOCAB))][: VOCAB - 1]
    tokens.insert(pad, convert.PAD)
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(token) for token in (*special, convert.PAD)])
    core.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": convert.PAD}
    (folder / "special_tokens_map.json").write_text(json.dumps(named | {"additional_special_tokens": special[2:]}))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": None, "unk_token": None}
    more = {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 128, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | more))


def published_config(model: Any, tower: str = "siglip_tiny", vq: str = "VQ-tiny") -> dict[str, Any]:
    text, vision, codes = model.config.text_config, model.config.vision_config, model.config.vq_config
    width = text.hidden_size
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    language = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "vocab_size")
    language += ("num_hidden_layers", "num_key_value_heads")
    picture = {"image_size": vision.image_size, "model_name": tower, "select_feature": "same", "select_layer": -1}
    head = {"image_token_embed": width, "image_token_size": codes.num_embeddings, "n_embed": width}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "language_config": {name: getattr(text, name) for name in language} | {"model_type": "llama"},
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": picture},
        "aligner_config": {"cls": "MlpProjector", "params": mlp | {"input_dim": vision.hidden_size}},
        "gen_vision_config": {"cls": vq, "params": {"image_token_size": codes.num_embeddings, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": mlp | {"input_dim": 8}},
        "gen_head_config": {"cls": "vision_head", "params": head},
    }


def published_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a Janus of transformers as DeepSeek names them, one module after the other."""
    state, out = model.state_dict(), {}

    def put(theirs: str, ours: str, *what: str) -> None:
        for end in what or ("weight", "bias"):
            out[f"{theirs}.{end}"] = state.pop(f"model.{ours}.{end}")

    put("language_model.model.embed_tokens", "language_model.embed_tokens", "weight")
    for i in range(model.config.text_config.num_hidden_layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"):
            put(f"language_model.model.layers.{i}.{name}", f"language_model.layers.{i}.{name}", "weight")
        for name in ("mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            put(f"language_model.model.layers.{i}.{name}", f"language_model.layers.{i}.{name}", "weight")
    put("language_model.model.norm", "language_model.norm", "weight")
    out["language_model.lm_head.weight"] = state.pop("lm_head.weight")

    tower, ours = "vision_model.vision_tower", "vision_model"
    out[f"{tower}.pos_embed"] = state.pop(f"model.{ours}.embeddings.position_embedding.weight")[None]
    put(f"{tower}.patch_embed.proj", f"{ours}.embeddings.patch_embedding")
    put(f"{tower}.norm", f"{ours}.post_layernorm")
    for i in range(model.config.vision_config.num_hidden_layers):
        block, layer = f"{tower}.blocks.{i}", f"{ours}.encoder.layers.{i}"
        for end in ("weight", "bias"):
            parts = [state.pop(f"model.{layer}.self_attn.{x}_proj.{end}") for x in ("q", "k", "v")]
            out[f"{block}.attn.qkv.{end}"] = torch.cat(parts)
        put(f"{block}.attn.proj", f"{layer}.self_attn.projection_layer")
        put(f"{block}.norm1", f"{layer}.layer_norm1")
        put(f"{block}.norm2", f"{layer}.layer_norm2")
        put(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
        put(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")
    width = model.config.vision_config.hidden_size
    for name in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"):  # SigLIP's head, unused
        out |= {f"{tower}.attn_pool.{name}.{end}": torch.zeros(width) for end in ("weight", "bias")}
    out[f"{tower}.attn_pool.latent"] = torch.zeros(1, 1, width)

    for theirs, ours in (("aligner", "aligner"), ("gen_aligner", "generation_aligner")):
        put(f"{theirs}.layers.0", f"{ours}.fc1")
        put(f"{theirs}.layers.2", f"{ours}.hidden_layers.0")
    put("gen_embed", "generation_embeddings", "weight")
    put("gen_head.output_mlp_projector", "generation_head.proj_out")
    put("gen_head.vision_head", "generation_head.vision_head")

    put("gen_vision_model.quantize.embedding", "vqmodel.quantize.embedding", "weight")
    out["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    put("gen_vision_model.quant_conv", "vqmodel.quant_conv")
    put("gen_vision_model.post_quant_conv", "vqmodel.post_quant_conv")
    config = model.config.vq_config
    levels = len(config.channel_multiplier)
    for half, ours, blocks in (("encoder", "down", 0), ("decoder", "up", 1)):
        name = f"gen_vision_model.{half}"
        for end in ("conv_in", "norm_out", "conv_out"):
            put(f"{name}.{end}", f"vqmodel.{half}.{end}")
        residual = [(f"{name}.mid.0", f"vqmodel.{half}.mid.block_1"), (f"{name}.mid.2", f"vqmodel.{half}.mid.block_2")]
        attention = [(f"{name}.mid.1", f"vqmodel.{half}.mid.attn_1")]
        for i in range(levels):
            level, mine = f"{name}.conv_blocks.{i}", f"vqmodel.{half}.{ours}.{i}"
            count = config.num_res_blocks + blocks
            residual += [(f"{level}.res.{j}", f"{mine}.block.{j}") for j in range(count)]
            if i == (0 if half == "decoder" else levels - 1):  # the smallest pictures
                attention += [(f"{level}.attn.{j}", f"{mine}.attn.{j}") for j in range(count)]
            if i < levels - 1:
                sample = "upsample" if half == "decoder" else "downsample"
                put(f"{level}.{sample}.conv", f"{mine}.{sample}.conv")
        for theirs, mine in residual:
            for part in ("norm1", "conv1", "norm2", "conv2"):
                put(f"{theirs}.{part}", f"{mine}.{part}")
            if f"model.{mine}.nin_shortcut.weight" in state:
                put(f"{theirs}.nin_shortcut", f"{mine}.nin_shortcut")
        for theirs, mine in attention:
            for part in ("norm", "q", "k", "v", "proj_out"):
                put(f"{theirs}.{part}", f"{mine}.{part}")
    assert not state, "every weight has been written"
    return out


def write_weights(folder: Path, weights: dict[str, Tensor], kind: str = "safetensors", shards: int = 1) -> None:
    name = "model" if kind == "safetensors" else "pytorch_model"
    index: dict[str, str] = {}
    for i in range(shards):
        part = {key: tensor.contiguous() for key, tensor in list(weights.items())[i::shards]}
        file = f"{name}.{kind}" if shards == 1 else f"{name}-{i + 1:05}-of-{shards:05}.{kind}"
        if kind == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{name}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture(scope="module")
def twin() -> Any:
    """A Janus of transformers, no two of whose weights are alike."""
    config = tiny_policy(vocab=VOCAB).config
    config.vision_config.num_hidden_layers = 2
    config.vq_config.channel_multiplier = [1, 2]
    config.vq_config.num_res_blocks = 2
    torch.manual_seed(1)
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def folder(twin: Any, tmp_path: Path) -> Path:
    """Its checkpoint in DeepSeek's layout."""
    published_files(tmp_path / "original", pad=9)
    (tmp_path / "original" / "config.json").write_text(json.dumps(published_config(twin)))
    write_weights(tmp_path / "original", published_weights(twin))
    return tmp_path / "original"


def assert_same_weights(model: Any, twin: Any) -> None:
    weights = model.state_dict()
    assert weights.keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_weights_of_all_formats(kind: str, shards: int, twin: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_weights(folder, published_weights(twin), kind, shards)
    policy = load_policy(folder, dtype=torch.float32)
    for file in folder.glob(f"*.{kind}"):
        file.write_bytes(bytes(file.stat().st_size))  # in place: the weights are no longer the file's
    assert_same_weights(policy.model, twin)
    trains = {n.split(".")[1] for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trains == {"language_model", "weight"}


def test_results_equal_those_of_the_twin(twin: Any, folder: Path, tmp_path: Path) -> None:
    """Logits, features of a picture, pictures of tokens, and whole rollouts; in the twin's layout too."""
    RolloutSettings(sampling=Sampling(7)).save(folder)
    loaded = load_policy(folder, dtype=torch.float32)
    assert loaded.settings.sampling == Sampling(7)
    loaded.save_pretrained(tmp_path / "saved")
    assert loaded.config.to_dict()["text_config"]["rms_norm_eps"] == 1e-6
    images = torch.rand(2, 3, 8, 8)
    ids, codes = torch.tensor([[0, 8, 12, 10], [0, 15, 13, 20]]), torch.randint(37, (2, 16))

    def results(policy: Policy) -> list[Tensor]:
        engine = RolloutEngine(policy, policy.prompt_encoder(PromptFormat("janus", "", "plan {}")))
        sampling = Sampling(max_completion_length=12, top_k=0, cfg_weight=3.0)
        chunk = RolloutChunk.cat(list(engine.generate(["a red circle", "two blue square"], 4, sampling, seed=0)))
        model: Any = policy.model
        with torch.no_grad():
            out = [model(input_ids=ids).logits, model.model.get_image_features(images).pooler_output]
            out += [model.model.vqmodel.decode(codes), model.model.vqmodel.encode(images).image_tokens]
            out += [image_hidden(policy, [[0, 8], [0, 9]], codes)]
        return [*out, chunk.plans.values, chunk.plan_logprobs.values, chunk.image_tokens, chunk.images]

    expected = results(Policy(twin, loaded.tokenizer))
    for policy in (loaded, load_policy(tmp_path / "saved", dtype=torch.float32)):
        for ours, theirs in zip(results(policy), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pad", [9, 20])
def test_token_ids_are_the_tokenizers(pad: int, twin: Any, folder: Path, tmp_path: Path) -> None:
    """DeepSeek's 1B and 7B differ in the id of the pad token."""
    published_files(folder, pad)
    convert.main([str(folder), str(tmp_path / "converted")])
    for path in (folder, tmp_path / "converted"):
        policy = load_policy(path, dtype=torch.float32)
        tokenizer = policy.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.boi_token_id)
        assert ids == (0, 1, pad, 3) and (tokenizer.image_token_id, tokenizer.eoi_token_id) == (2, 4)
        text, generation = policy.config.text_config, policy.model.generation_config
        assert (text.bos_token_id, text.eos_token_id, text.pad_token_id, policy.config.image_token_id) == (0, 1, pad, 2)
        assert generation.pad_token_id == pad and generation.generation_kwargs == {"boi_token_id": 3}
        row = policy.prompt_encoder(PromptFormat("janus")).unconditional_ids(5)
        assert row == [0, pad, pad, pad, 3]
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer("a red circle. w7", add_special_tokens=False).input_ids == core.encode("a red circle. w7").ids


def test_a_pad_token_that_only_the_vocabulary_names(twin: Any, folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    assert load_policy(folder).tokenizer.pad_token_id == 9


def test_convert_writes_what_transformers_reads(twin: Any, folder: Path, tmp_path: Path) -> None:
    half = {key: tensor.bfloat16() for key, tensor in published_weights(twin).items()}
    write_weights(folder, half)
    output = tmp_path / "new"
    convert.main([str(folder), str(output)])
    model, report = JanusForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16, "as the weights were"
    assert_same_weights(model, twin.__class__.from_pretrained(None, config=twin.config, state_dict=half_of(twin)))
    for words, message in (
        ([str(folder), str(output)], "is not empty"),
        ([str(tmp_path / "nothing"), str(tmp_path / "third")], "error: .*/nothing has no config.json"),
        ([str(output), str(tmp_path / "third")], "'janus' checkpoint, not in DeepSeek's layout"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main(words)
    assert not (tmp_path / "third").exists()


def half_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gen_embed.weight", None, "lacks 1 weights, .* model.generation_embeddings.weight"),
        ("vision_model.vision_tower.blocks.1.attn.qkv.bias", None, "lacks 3 weights, .* model.vision_model.encoder"),
        ("gen_vision_model.quantize.other", torch.ones(1), "1 unknown .* gen_vision_model.quantize.other"),
        (
            "language_model.model.layers.9.mlp.up_proj.weight",
            torch.ones(1),
            "1 unknown .*language_model.model.layers.9",
        ),
        ("lm_head.weight", torch.ones(1), "1 unknown weights, such as lm_head.weight"),
        ("aligner.layers.1.weight", torch.ones(1), "1 unknown weights, such as aligner.layers.1.weight"),
        ("gen_embed.weight", torch.ones(37, 9), r"gen_embed.weight is \[37, 9\], but config.json implies \[37, 8\]"),
        ("vision_model.vision_tower.blocks.0.attn.qkv.weight", torch.ones(16, 16), r"\[16, 16\], .* \[48, 16\]"),
        ("vision_model.vision_tower.pos_embed", torch.ones(1, 25, 16), r"\[1, 25, 16\], .* \[1, 16, 16\]"),
        ("language_model.lm_head.weight", torch.tensor(1.0), r"is \[\], but config.json implies \[61, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    key: str, value: Tensor | None, message: str, twin: Any, folder: Path
) -> None:
    weights = published_weights(twin)
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    write_weights(folder, weights)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("run by unpickling",)


@pytest.mark.parametrize("fault", ["none", "lost", "cut", "code"])
def test_files_that_cannot_be_read_are_named(
    fault: str, twin: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    second = folder / "pytorch_model-00002-of-00002.bin"
    if fault == "none":
        message = "neither model.safetensors nor pytorch_model.bin"
    else:
        write_weights(folder, published_weights(twin), "bin", 2)
        message = "pytorch_model-00002-of-00002.bin cannot be read, download it again"
    if fault == "lost":
        second.unlink()
        message = "pytorch_model-00002-of-00002.bin"
    if fault == "cut":
        second.write_bytes(second.read_bytes()[:5000])
    if fault == "code":
        torch.save({"gen_embed.weight": Evil()}, second)
    with pytest.raises(OSError, match=message):
        load_policy(folder)
    assert "unpickling" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gen_head_config": None}, "config.json lacks gen_head_config, so it is no Janus"),  # DeepSeek-VL, JanusFlow
        ({"gen_vision_config": {"cls": "VQ-8", "params": {}}}, "gen_vision_config.cls .* is 'VQ-8'; supported: VQ-16"),
        ({"vision_config": {"params": {"model_name": "sam"}}}, "model_name .* is 'sam'; supported: siglip_large"),
        ({"aligner_config": {"params": {"projector_type": "linear"}}}, "is 'linear'; supported: mlp_gelu"),
        ({"gen_aligner_config": {"params": {}}}, "config.json lacks 'projector_type'"),
    ],
)
def test_configurations_of_other_models_are_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    words = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer has no <image_placeholder>, <begin_of_image>, <end_of_image>"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("language", "names"),
    [
        ({"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}, 882),
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32}, 936),
    ],
)
def test_names_and_shapes_of_the_published_models(
    language: dict[str, int], names: int, folder: Path, twin: Any
) -> None:
    """Janus-Pro-1B and 7B on the meta device; the numbers of names are those of DeepSeek's own modules."""
    raw = published_config(twin, "siglip_large_patch16_384", "VQ-16")
    raw["language_config"] = language | {"max_position_embeddings": 16384, "vocab_size": 102400}
    width = language["hidden_size"]
    for part in ("aligner_config", "gen_aligner_config", "gen_head_config"):
        raw[part]["params"] |= {"n_embed": width}
    raw["vision_config"]["params"]["image_size"] = 384
    raw["gen_vision_config"]["params"]["image_token_size"] = 16384
    config = convert.original_config(folder, raw, convert.original_tokenizer(folder))
    assert config.vision_config.num_image_tokens == config.vq_config.num_patches**2 == 576
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
        theirs = published_weights(model)
    assert len(theirs) == names
    found = [name for key in theirs for name in convert.new_names(key) or ()]
    assert len(found) == len(set(found)) and set(found) == model.state_dict().keys()
