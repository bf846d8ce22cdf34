"""PaliGemma, Gemma and timm against the reference libraries; key layouts, checkpoints, damage, memory, the hub."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from torch import Tensor, nn

from common.weights import (
    DECODER,
    TOWER,
    decoder_sizes,
    load_model,
    load_paligemma,
    load_unimodal,
    pull,
    push,
    read_sizes,
    save_model,
    timm_vit,
    without_wrappers,
)
from model import EFM, PRESETS, EFMConfig
from tests.test_model import observe, questions, tiny
from tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "what robot action to move to the red goal",
    "how many steps to go to the blue spot",
    "what is in the picture",
]
TEXTS = ["the red goal", "go to the blue spot and stop", "spot"]
# pixels, patch, images, query heads, key/value heads, head width
SHAPES = {
    "grouped": (28, 14, 2, 4, 2, 8),
    "one key head": (24, 8, 2, 4, 1, 16),
    "as many key heads": (30, 14, 1, 2, 2, 12),  # the last two pixels are in no patch
}


def words(numbers: bool = True) -> tokenizers.Tokenizer:
    """A byte-fallback BPE with PaliGemma's special tokens, normaliser and decoder, trained on WORDS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    special += [f"<loc{i:04d}>" for i in range(1024)] + ["<image>"] if numbers else []
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(special) + 60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["\n", *WORDS, *TEXTS], trainer)
    return tokenizer


@functools.cache
def vocabulary() -> str:
    return words().to_str()


def build(shape: str, seed: int = 0) -> nn.Module:
    """transformers' PaliGemma with random weights of a size at which every part matters."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    pixels, patch, _, heads, kv_heads, head_dim = SHAPES[shape]
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary())
    rows = -(-tokenizer.get_vocab_size() // 64) * 64  # padded, as the published 257,216
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": pixels,
        "patch_size": patch,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "vocab_size": rows,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=40, hidden_size=40,
        image_token_index=tokenizer.token_to_id("<image>"), attn_implementation="eager")).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():  # away from the 0, 1 and 0.02 that would hide a mistake
            p += (0.3 if p.ndim == 1 else p[0].numel() ** -0.5) * torch.randn_like(p)
    return model


def save(model: nn.Module, folder: Path, **how) -> Path:
    model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text(vocabulary(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", name="oracle")
def make_oracle(torchvision_ops, tmp_path_factory):
    """shape -> (transformers' model, the folder it is saved in), made once."""
    return functools.cache(lambda shape: (m := build(shape), save(m, tmp_path_factory.mktemp("paligemma") / "saved")))


def frames(shape: str, B: int = 3) -> Tensor:
    pixels, _, images, *_ = SHAPES[shape]
    return torch.randint(0, 256, (B, images, pixels, pixels, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def reference_inputs(theirs: nn.Module, images: Tensor, prompts: list[str], texts: list[str] | None) -> dict[str, Tensor]:
    """What PaliGemmaProcessor makes: <image> ... <image> <bos> prompt newline | text <eos>, padded on the left."""
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary())
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    patches = theirs.model.vision_tower(torch.zeros(1, 3, *images.shape[2:4], dtype=theirs.dtype)).last_hidden_state.shape[1]
    picture = [tokenizer.token_to_id("<image>")] * patches * images.shape[1]
    rows = []
    for i, prompt in enumerate(prompts):
        prefix = [*picture, tokenizer.token_to_id("<bos>"), *encode(prompt + "\n").ids]
        suffix = [*encode(texts[i]).ids, tokenizer.token_to_id("<eos>")] if texts else []
        rows.append((prefix, suffix))
    longest = max(len(p) + len(s) for p, s in rows)
    pad = [longest - len(p) - len(s) for p, s in rows]
    columns = {
        "input_ids": [[0] * n + p + s for n, (p, s) in zip(pad, rows, strict=True)],
        "attention_mask": [[0] * n + [1] * (longest - n) for n in pad],
        "token_type_ids": [[0] * (longest - len(s)) + [1] * len(s) for _, s in rows],
        "labels": [[-100] * (longest - len(s)) + s for _, s in rows],
    }
    if not texts:
        del columns["labels"]
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
    return {k: torch.tensor(v) for k, v in columns.items()} | {"pixel_values": pixels.to(theirs.dtype)}


# --- PaliGemma against transformers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_on_a_suffix_equal_transformers(oracle, shape):
    theirs, folder = oracle(shape)
    ours, images = load_paligemma(folder), frames(shape)
    inputs = reference_inputs(theirs, images, WORDS, TEXTS)
    theirs.zero_grad()
    expected = theirs(**inputs)
    expected.loss.backward()

    ids, valid = ours.tokenizer.answers(TEXTS)
    hidden = ours.hidden({"images": images}, WORDS, ids)  # (B, L, D)
    logits = ours.logits(hidden, None)
    for i, n in enumerate(valid.sum(1).tolist()):  # what predicts a token stands one place before it
        torch.testing.assert_close(logits[i, :n], expected.logits[i, -n - 1 : -1], atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.5  # so that 1e-4 says something

    loss = -ours.text_log_prob({"images": images}, WORDS, TEXTS).sum() / valid.sum()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    gradients = {without_wrappers(k): p.grad for k, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    theirs.zero_grad(set_to_none=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_decoding_equals_transformers(oracle, shape):
    theirs, folder = oracle(shape)
    ours, images = load_paligemma(folder), frames(shape)
    inputs = reference_inputs(theirs, images, WORDS, None)
    T, tokenizer = inputs["input_ids"].shape[1], ours.tokenizer
    generate = functools.partial(theirs.generate, **inputs, do_sample=False, pad_token_id=0, eos_token_id=1)
    said = generate(max_new_tokens=12)[:, T:].tolist()
    assert ours.generate_text({"images": images}, WORDS, longest=12) == [tokenizer.text(row) for row in said]

    ranges = [(0, 1024), (7, 300), (5, 6)]  # numbers only: constrained decoding with the KV cache

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [tokenizer.loc + i for i in range(*ranges[len(ids) - T])]

    numbers = generate(max_new_tokens=3, prefix_allowed_tokens_fn=allowed)[:, T:] - tokenizer.loc
    assert torch.equal(ours.sample({"images": images}, WORDS, ranges, greedy=True)[0], numbers)
    assert len(set(numbers.flatten().tolist())) > 3


def test_bfloat16_is_as_near_to_float32_as_transformers_is(torchvision_ops, tmp_path):
    half = build("grouped").to(torch.bfloat16)
    ours = load_paligemma(save(half, tmp_path), dtype=torch.bfloat16)
    for key, p in half.named_parameters():
        got = ours.get_parameter(without_wrappers(key))
        assert got.dtype == torch.bfloat16 and torch.equal(got, p), key
    exact, images = load_paligemma(tmp_path, dtype=torch.float32), frames("grouped")
    inputs, seen = reference_inputs(half, images, WORDS, TEXTS), []
    ours.vision_tower.patch_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours.encode_images(images)
    assert torch.equal(seen[0], inputs["pixel_values"])  # rounded once
    embeddings = half.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(ours.language_model.embed(inputs["input_ids"]), embeddings)  # as is the factor sqrt(D)
    ids, valid = ours.tokenizer.answers(TEXTS)
    with torch.no_grad():
        expected = half(**inputs).logits.float()
        got, exact = (m.logits(m.hidden({"images": images}, WORDS, ids), None).float() for m in (ours, exact))
    lengths = valid.sum(1).tolist()
    error = torch.cat([got[i, :n] - exact[i, :n] for i, n in enumerate(lengths)]).pow(2).mean().sqrt()
    theirs = torch.cat([expected[i, -n - 1 : -1] - exact[i, :n] for i, n in enumerate(lengths)]).pow(2).mean().sqrt()
    assert 0 < error < 1.2 * theirs < 0.05 * exact.std()


# --- every layout in which the weights exist --------------------------------------------------------------------------
def layout(name: str, key: str) -> str:
    """Keys as transformers 5 saves them -> another layout."""
    if name == "published on the hub":  # transformers 4.41
        return key.replace("vision_tower.", "vision_tower.vision_model.")
    if name == "4.5x in memory":
        key = key.replace("vision_tower.", "vision_tower.vision_model.")
    return key if name == "5.x saved" else "model." + key.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("name", ["5.x saved", "5.x in memory", "4.5x in memory", "published on the hub"])
def test_every_key_layout(oracle, tmp_path, name):
    theirs, folder = oracle("grouped")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert len(weights) == len(list(theirs.parameters()))
    renamed = {layout(name, k): v for k, v in weights.items()}
    assert (set(renamed) == set(weights)) == (name == "5.x saved")
    if "memory" in name:
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"].clone()  # tied, so left out
    if name == "5.x in memory":
        assert renamed.keys() == theirs.state_dict().keys()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(folder / file, tmp_path)
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    same(load_paligemma(tmp_path), theirs)


def same(ours: EFM, theirs: nn.Module) -> None:
    wanted = {without_wrappers(k): p for k, p in theirs.named_parameters()}
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert torch.equal(p, wanted[name]) and p.requires_grad, name


def test_shards_and_the_config_of_the_hub(oracle, tmp_path):
    """Several files, and a config.json that leaves out what transformers' classes have as defaults."""
    theirs, folder = oracle("grouped")
    save(theirs, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    config = json.loads((tmp_path / "config.json").read_text())
    for part, kept in (
        ("text_config", {"hidden_act": "gelu"}),
        ("vision_config", {"projector_hidden_act": "gelu_fast"}),
    ):
        names = (DECODER if part == "text_config" else TOWER).values()
        config[part] = {k: config[part][k] for k in ("model_type", *(theirs for theirs, _ in names))} | kept
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tie_word_embeddings"}))
    ours = load_paligemma(str(tmp_path))
    same(ours, theirs)
    assert ours.cfg == load_paligemma(folder).cfg


def test_the_published_sizes():
    """config.json of google/paligemma-3b-pt-224 says no more than this, and 448 only adds the image size."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    tower = read_sizes(vision, TOWER)
    assert EFMConfig(**decoder_sizes(text), **tower) == PRESETS["paligemma-3b"]
    assert read_sizes(vision | {"image_size": 448}, TOWER)["image_size"] == 448


def test_saved_runs_load_back(oracle, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_paligemma(oracle("one key head")[1], dtype)
        save_model(model, tmp_path / "policy.safetensors")
        again = load_model(tmp_path / "policy.safetensors")
        assert again.cfg == model.cfg and again.tokenizer.tokenizer.to_str() == model.tokenizer.tokenizer.to_str()
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert p.dtype == q.dtype == dtype and torch.equal(p, q), name


def test_frames_of_another_size_are_scaled_as_siglips_are(oracle):
    from PIL import Image

    tower = load_paligemma(oracle("grouped")[1]).vision_tower  # of 28 pixels
    for side in (20, 64):
        small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(side))
        image = (nn.functional.interpolate(small, (side, side), mode="bilinear") * 255).byte()[0].permute(1, 2, 0)
        by_pil = torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((28, 28), Image.Resampling.BICUBIC)))
        difference = tower(image[None]) - tower(by_pil[None])
        assert difference.abs().max() < 0.05 < tower(by_pil[None]).std()


# --- what is wrong ----------------------------------------------------------------------------------------------------
def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    path.unlink()
    change(weights)
    safetensors.torch.save_file(weights, path)


def reconfigure(folder: Path, part: str, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "as I am told")


def payload(folder: Path) -> bytes:
    import pickle

    return pickle.dumps(Payload(folder / "ran"))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload(folder))


def respell(folder: Path, **changes) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def far_word() -> dict:
    model = json.loads(vocabulary())["model"]
    return model | {"vocab": model["vocab"] | {"far": 4_000_000_000}}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def head(name: str):
    """Adds an output matrix that is not the embeddings."""

    def change(weights: dict[str, Tensor]) -> None:
        table = next(v for k, v in weights.items() if k.endswith("embed_tokens.weight"))
        weights[name] = table.flip(0).contiguous()

    return change


def untold(folder: Path, parts: tuple[str, ...] = ("", "text_config")) -> None:
    """config.json says nothing about ties."""
    config = json.loads((folder / "config.json").read_text())
    for part in parts:
        (config[part] if part else config).pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))


NORM = "language_model.model.norm.weight"
EIGHT = torch.zeros(40, dtype=torch.int8)
WRONG = {  # what is done to the folder, what the line says
    "truncated": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "a missing weight": (lambda f: rewrite(f, lambda w: w.pop(NORM)), "language_model.norm.weight"),
    "one too many": (
        lambda f: rewrite(f, lambda w: w.update({"vision_tower.head.probe": EIGHT.float()})),
        "head.probe",
    ),
    "one twice": (lambda f: rewrite(f, lambda w: w.update({"model." + NORM: EIGHT.float()})), "norm.weight"),
    "another shape": (lambda f: rewrite(f, lambda w: w.update({NORM: torch.zeros(41)})), NORM),
    "another depth": (
        lambda f: reconfigure(f, "text_config", num_hidden_layers=4),
        "language_model.layers.3.",
    ),
    "another dtype": (lambda f: rewrite(f, lambda w: w.update({NORM: EIGHT})), "I8"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "not a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "no number tokens": (lambda f: words(numbers=False).save(str(f / "tokenizer.json")), "<loc0000>"),
    "too many words": (lambda f: reconfigure(f, "text_config", vocab_size=1000), "1000"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "not JSON": (lambda f: (f / "config.json").write_text('{"text_config"'), "config.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "paligemma"}'), "config.json"),
    "another model": (lambda f: reconfigure(f, "", model_type="llava"), "llava"),
    "PaliGemma 2": (lambda f: reconfigure(f, "text_config", model_type="gemma2"), "Gemma 2"),
    "CLIP": (lambda f: reconfigure(f, "vision_config", model_type="clip_vision_model"), "clip_vision_model"),
    "exact GELU": (lambda f: reconfigure(f, "vision_config", hidden_act="gelu"), "hidden_act"),
    "scaled rotations": (
        lambda f: reconfigure(f, "text_config", rope_parameters={"rope_type": "linear"}),
        "linear",
    ),
    "untied": (lambda f: reconfigure(f, "", tie_word_embeddings=False), "tie_word_embeddings"),
    "a head of its own": (lambda f: rewrite(f, head("lm_head.weight")), "lm_head.weight differs"),
    "one in the decoder": (
        lambda f: rewrite(f, head("language_model.lm_head.weight")),
        "lm_head.weight differs",
    ),
    "one, and no word of it": (
        lambda f: (untold(f), rewrite(f, head("lm_head.weight"))),
        "lm_head.weight differs",
    ),
    "a shorter one": (
        lambda f: rewrite(f, lambda w: w.update({"lm_head.weight": torch.zeros(9, 40)})),
        "lm_head.weight",
    ),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(payload(f)), "model.safetensors"),
    "a pickle for words": (lambda f: (f / "tokenizer.json").write_bytes(payload(f)), "tokenizer.json"),
    "a pickle for sizes": (lambda f: (f / "config.json").write_bytes(payload(f)), "config.json"),
    "a pickle beside": (lambda f: only_pickled(f), "model.safetensors: no such file"),
    "other code": (lambda f: respell(f, pre_tokenizer={"type": "Custom", "module": "os"}), "tokenizer.json"),
    "words that panic": (
        lambda f: respell(f, pre_tokenizer={"type": "FixedLength", "length": 0}),
        "tokenizer.json",
    ),
    "a map that panics": (
        lambda f: respell(f, normalizer={"type": "Precompiled", "precompiled_charsmap": "AA=="}),
        "tokenizer",
    ),
    "a word without a row": (lambda f: respell(f, model=far_word()), "4000000000"),
    "oblong images": (lambda f: reconfigure(f, "vision_config", image_size=[28, 14]), "config.json"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_paligemma_is_refused_in_one_line(oracle, tmp_path, wrong):
    damage, culprit = WRONG[wrong]
    folder = shutil.copytree(oracle("grouped")[1], tmp_path / "weights")
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        load_paligemma(folder)
    assert culprit in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)


def test_nothing_in_a_payload_runs(oracle, tmp_path):
    """The pickle of the tests above would write the file `ran` if somebody unpickled it."""
    import pickle

    folder = shutil.copytree(oracle("grouped")[1], tmp_path / "weights")
    assert pickle.loads(payload(folder)) is not None and (folder / "ran").exists()  # so the assertions below can fail
    (folder / "ran").unlink()
    for name in ("model.safetensors", "tokenizer.json", "config.json", "model.safetensors.index.json"):
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(payload(folder))
        with pytest.raises(ValueError, match=re.escape(name)):
            load_paligemma(folder)
        (folder / name).unlink() if whole is None else (folder / name).write_bytes(whole)
    load_paligemma(folder)
    save_model(tiny(), tmp_path / "policy.safetensors")
    whole = (tmp_path / "policy.safetensors").read_bytes()
    for content in (payload(folder), whole[:8] + payload(folder) + whole[8:]):
        (tmp_path / "policy.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="policy.safetensors"):
            load_model(tmp_path / "policy.safetensors")
    assert not (folder / "ran").exists()


def test_shards_are_in_the_folder(oracle, tmp_path):
    folder = shutil.copytree(oracle("grouped")[1], tmp_path / "weights")
    shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match="index.json: .*elsewhere.safetensors is not in this folder"):
            load_paligemma(folder)


def test_a_tokenizer_that_was_used_to_cut_and_to_fill(oracle, tmp_path):
    """transformers saves what its last call asked for; our prompts stay whole."""
    folder = shutil.copytree(oracle("grouped")[1], tmp_path / "weights")
    expected = load_paligemma(folder).tokenizer.prompts(WORDS)
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    respell(folder, truncation=truncation, padding=padding)
    assert len(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(WORDS[0]).ids) == 99
    for got, wanted in zip(load_paligemma(folder).tokenizer.prompts(WORDS), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_missing_shard(oracle, tmp_path):
    folder = save(oracle("grouped")[0], tmp_path, max_shard_size="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(gone))}: no such file"):
        load_paligemma(folder)
    for content, culprit in (
        ("[", "index.json"),
        ("{}", "index.json"),
        ('{"weight_map": {}}', "model.safetensors: no such"),
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=culprit):
            load_paligemma(folder)


def test_a_hub_id_out_of_reach_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"google/paligemma-3b-pt-224: .*; accept its licence .*hf auth login.*folder") as error:
        load_paligemma("google/paligemma-3b-pt-224")
    assert "\n" not in str(error.value)
    assert "offline" in str(error.value).lower()
    for name in ("weights", "a/b/c", "../weights/x", "~/x", ""):
        with pytest.raises(ValueError, match="neither a folder nor the id") as error:
            load_paligemma(name or "no such folder")


def test_memory_peaks_at_the_size_of_the_weights(tmp_path):
    """210 MB in two files, loaded by a fresh process that has loaded a small model before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    for name, depth in (("small", 1), ("large", 24)):
        cfg = EFMConfig(
            width=640,
            depth=depth,
            heads=4,
            kv_heads=1,
            head_dim=64,
            mlp_dim=896,
            image_size=28,
            patch_size=14,
        )
        with torch.device("meta"):
            model = EFM(cfg, Tokenizer(tokenizers.Tokenizer.from_str(vocabulary())))
        weights = {k: torch.full(v.shape, 0.5) for k, v in model.state_dict().items()}
        folder = tmp_path / name
        folder.mkdir()
        cut, index = len(weights) // 2, {}
        for i, part in enumerate((list(weights)[:cut], list(weights)[cut:])):
            safetensors.torch.save_file({k: weights[k] for k in part}, folder / f"{i}.safetensors")
            index |= dict.fromkeys(part, f"{i}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / "tokenizer.json").write_text(vocabulary(), encoding="utf-8")
        parts = {"text_config": DECODER, "vision_config": TOWER}
        config = {
            part: {theirs: getattr(model.cfg, ours) for ours, (theirs, _) in names.items()} for part, names in parts.items()
        }
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "paligemma"}))
    script = """
import re, sys, torch
from common.weights import load_paligemma
def memory(what): return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
kept = []
for dtype in (torch.bfloat16, torch.float32):
    load_paligemma(sys.argv[1] + "/small", dtype)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = memory("VmRSS")
    kept = kept + [load_paligemma(sys.argv[1] + "/large", dtype)]  # a freed one would make room unseen
    size = sum(p.nbytes for p in kept[-1].parameters())
    print(size, (memory("VmHWM") - before) / size)
"""
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                         cwd=ROOT).stdout.split()  # fmt: skip
    assert float(out[2]) == 2 * float(out[0]) > 200e6
    for share in (out[1], out[3]):
        assert 0.9 < float(share) < 1.15, out


# --- checkpoints ------------------------------------------------------------------------------------------------------
def test_save_and_load_return_the_same_model(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "policy.safetensors")
    loaded = load_model(tmp_path / "policy.safetensors").requires_grad_(False)
    assert loaded.cfg == model.cfg
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    obs, prompts, answer = observe(3), questions(3), torch.zeros(3, 2, dtype=torch.long)
    assert torch.equal(
        model.log_prob(obs, prompts, answer, [(0, 9)] * 2),
        loaded.log_prob(obs, prompts, answer, [(0, 9)] * 2),
    )
    save_model(loaded, tmp_path / "again.safetensors")
    first, again = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("policy", "again"))
    assert first.keys() == again.keys() and all(torch.equal(again[k], v) for k, v in first.items())


def damage(kind: str, path) -> None:
    model = tiny()
    save_model(model, path)
    whole, weights = path.read_bytes(), {k: v.contiguous() for k, v in model.state_dict().items()}
    config = dataclasses.asdict(model.cfg)
    save = functools.partial(safetensors.torch.save_file, filename=path)

    def meta(**changes) -> dict[str, str]:
        return {"nanoEFM": json.dumps({"config": config, "tokenizer": model.tokenizer.tokenizer.to_str()} | changes)}

    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not weights\n")
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "wrong shapes":
        save(weights | {"language_model.norm.weight": torch.zeros(5)}, metadata=meta())
    elif kind == "missing weight":
        save({k: v for k, v in weights.items() if k != "language_model.norm.weight"}, metadata=meta())
    elif kind == "a weight too many":
        save(weights | {"language_model.norm.bias": torch.zeros(24)}, metadata=meta())
    elif kind == "integers":
        save({k: v.to(torch.int32) for k, v in weights.items()}, metadata=meta())
    elif kind == "no metadata":
        save(weights)
    elif kind == "not our config":
        save(weights, metadata=meta(config={"state_names": [], "hidden_size": 3}))
    elif kind == "a setting of another version":
        save(weights, metadata=meta(config=config | {"number_waves": True}))
    elif kind == "sizes that are words":
        save(weights, metadata=meta(config=config | {"width": "24"}))
    elif kind == "more words than rows":
        save(weights, metadata=meta(config=config | {"vocab_size": 1000}))
    elif kind == "config is not JSON":
        save(weights, metadata={"nanoEFM": "{"})
    elif kind == "not a tokenizer":
        save(weights, metadata=meta(tokenizer="{}"))
    elif kind == "not our tokenizer":
        other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        save(weights, metadata=meta(tokenizer=other.to_str()))
    elif kind == "nothing":  # so that the others fail for what is wrong with them
        save(weights, metadata=meta())


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "empty",
        "text",
        "a folder",
        "wrong shapes",
        "missing weight",
        "a weight too many",
        "integers",
        "no metadata",
        "not our config",
        "a setting of another version",
        "sizes that are words",
        "more words than rows",
        "config is not JSON",
        "not a tokenizer",
        "not our tokenizer",
    ],
)
def test_load_model_names_the_file_that_is_wrong(tmp_path, kind):
    path = tmp_path / "policy.safetensors"
    damage("nothing", path)
    load_model(path)
    damage(kind, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    if kind == "a setting of another version":
        assert "number_waves, which this version has not" in str(error.value)


def test_a_checkpoint_from_before_a_setting_has_its_default(tmp_path):
    model, path = tiny(), tmp_path / "policy.safetensors"
    config = dataclasses.asdict(model.cfg)
    assert config.pop("action_head") == 0
    metadata = {"nanoEFM": json.dumps({"config": config, "tokenizer": model.tokenizer.tokenizer.to_str()})}
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata)
    assert load_model(path).cfg == model.cfg


def test_a_checkpoint_keeps_its_action_head(tmp_path):
    torch.manual_seed(0)
    model = EFM(dataclasses.replace(tiny().cfg, action_head=6), tiny().tokenizer)
    torch.nn.init.normal_(model.action_head[2].weight)
    save_model(model, tmp_path / "policy.safetensors")
    again = load_model(tmp_path / "policy.safetensors")
    assert again.cfg.action_head == 6 and torch.equal(again.action_head[2].weight, model.action_head[2].weight)
    obs, prompts, answer = observe(3), questions(3), torch.zeros(3, 2, dtype=torch.long)
    assert torch.equal(*(m.log_prob(obs, prompts, answer, [(0, 9)] * 2) for m in (model, again)))


# --- the paper's Uni-PaLI: a ViT of timm, a Gemma ---------------------------------------------------------------------
@pytest.fixture(name="timm_models")
def make_timm_models(torchvision_ops, monkeypatch):
    """timm's constructor, which makes the named model 48 wide and 2 deep; a list of what it made."""
    import timm

    made, create = [], timm.create_model

    def small(name, pretrained=False, **settings):
        torch.manual_seed(0)
        vit = create(name, pretrained=False, embed_dim=48, depth=2, num_heads=4, **settings).eval()
        with torch.no_grad():
            for p in vit.parameters():
                p += 0.15 * torch.randn_like(p)
        return made.append(vit) or vit

    monkeypatch.setattr(timm, "create_model", small)
    return made


@pytest.mark.parametrize("name", [
    "vit_base_patch16_siglip_224", "vit_base_patch32_siglip_gap_256", "vit_so400m_patch14_siglip_378"])  # fmt: skip
def test_features_equal_timms(timm_models, name):
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(vocabulary()))
    model = load_unimodal(f"timm:{name}", "", PRESETS["nano-vision"], tokenizer)
    side = model.cfg.image_size
    assert str(side) in name and model.cfg.vit_width == 48 and model.cfg.width == PRESETS["nano-vision"].width
    images = torch.randint(0, 256, (2, 2, side, side, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = timm_models[0].forward_features(images.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1)
        got = model.encode_images(images).flatten(0, 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.std() > 0.5 and torch.isfinite(model.prefix({"images": images}, WORDS[:2])[0]).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_base_patch16_224", {}),
        ("vit_medium_patch16_gap_256", {}),
        ("vit_small_patch16_rope_224", {}),
        ("vit_nope", {}),
        *(
            ("vit_base_patch16_siglip_224", s)
            for s in (
                {"class_token": True},
                {"reg_tokens": 2},
                {"qk_norm": True},
                {"pre_norm": True},
                {"init_values": 1e-5},
                {"act_layer": "gelu"},
                {"pos_embed": "none"},
                {"img_size": (224, 112)},
                {"fc_norm": True},
            )
        ),
    ],
)
def test_another_vit_is_refused_in_one_line(timm_models, monkeypatch, name, settings):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **s: create(name, **s | settings))
    with pytest.raises(ValueError, match=rf"^timm:{name}: .*; choose") as error:
        timm_vit(name, pretrained=False)
    assert "\n" not in str(error.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="^timm:vit_base_patch16_siglip_224: .*timm.*; pip install timm$"):
        timm_vit("vit_base_patch16_siglip_224", pretrained=True)


@pytest.mark.parametrize("numbers", [False, True])
def test_gemma_text_weights(timm_models, tmp_path, numbers):
    from transformers import GemmaConfig, GemmaForCausalLM

    tokenizer = words(numbers)
    torch.manual_seed(0)
    theirs = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    theirs.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = load_unimodal("timm:vit_base_patch16_siglip_224", tmp_path, EFMConfig(), None)
    n = tokenizer.get_vocab_size()
    for key, p in theirs.named_parameters():
        assert torch.equal(model.get_parameter(f"language_model.{without_wrappers(key)}")[: len(p)], p), key
    ours = model.language_model.embed_tokens.weight
    assert model.cfg.vocab_size == len(ours) == n + (0 if numbers else 1024)
    assert model.tokenizer.loc == (tokenizer.token_to_id("<loc0000>") if numbers else n)
    assert numbers or abs(ours[n:].std() - 0.02) < 1e-3
    ids, valid = model.tokenizer.prompts(WORDS)
    assert ids[0, valid[0]].tolist() == [2, *tokenizer.encode(WORDS[0] + "\n").ids]
    with pytest.raises(ValueError, match="config.json: of a gemma model; name the folder of a paligemma checkpoint"):
        load_paligemma(tmp_path)
    # a head: the embeddings once more, or of its own, whatever config.json says
    load = functools.partial(load_unimodal, "timm:vit_base_patch16_siglip_224", tmp_path, EFMConfig(), None)
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    again = load().language_model.embed_tokens.weight
    assert torch.equal(again[:n], ours[:n])
    rewrite(tmp_path, head("lm_head.weight"))
    for told in (True, False):
        if not told:
            untold(tmp_path, ("",))
        with pytest.raises(ValueError, match="model.safetensors: lm_head.weight differs from the embeddings.*; name") as error:
            load()
        assert "\n" not in str(error.value)
    reconfigure(tmp_path, "", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings is False"):
        load()


# --- the hub ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Four functions of huggingface_hub on a local folder; an unknown repository is an error of several lines."""
    import huggingface_hub

    root = tmp_path / "hub"

    def create_repo(repo_id, exist_ok=False):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_file(*, path_or_fileobj, path_in_repo, repo_id):
        shutil.copy(path_or_fileobj, root / repo_id / path_in_repo)

    def hf_hub_download(repo_id, filename):
        if not (root / repo_id / filename).exists():
            raise RuntimeError("403 Client Error.\n\nAccess to this model is restricted.")
        return str(root / repo_id / filename)

    def snapshot_download(repo_id, allow_patterns):
        assert allow_patterns
        return str(Path(hf_hub_download(repo_id, "config.json")).parent)

    for f in (create_repo, upload_file, hf_hub_download, snapshot_download):
        monkeypatch.setattr(huggingface_hub, f.__name__, f)
    return root


def test_push_and_pull(oracle, fake_hub, tmp_path):
    model = load_paligemma(oracle("grouped")[1], torch.bfloat16)
    save_model(model, tmp_path / "policy.safetensors")
    for _ in range(2):  # the second time the repository exists
        push(tmp_path / "policy.safetensors", "me/robot")
    again = pull("me/robot")
    assert again.cfg == model.cfg
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    for name, file in (("me/nothing", "policy.safetensors"), ("me/robot", "reward.safetensors")):
        with pytest.raises(ValueError, match=rf"^{name}: 403 Client Error.; accept") as error:
            pull(name, file)
        assert "\n" not in str(error.value)


def test_a_hub_id_is_downloaded(oracle, fake_hub):
    theirs, folder = oracle("grouped")
    shutil.copytree(folder, fake_hub / "google/paligemma")
    same(load_paligemma("google/paligemma"), theirs)


def test_the_calls_exist_in_huggingface_hub():
    import inspect

    import huggingface_hub

    for name, arguments in {"create_repo": ["repo_id", "exist_ok"], "hf_hub_download": ["repo_id", "filename"],
                            "upload_file": ["path_or_fileobj", "path_in_repo", "repo_id"],
                            "snapshot_download": ["repo_id", "allow_patterns"]}.items():  # fmt: skip
        assert set(arguments) <= inspect.signature(getattr(huggingface_hub, name)).parameters.keys()
