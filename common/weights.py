"""Weights in and out: checkpoints, PaliGemma, Gemma, timm, the hub, LoRA adapters."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import EFM, EFMConfig, ViT
from tokens import N_LOC, Tokenizer

# --- weights in and out ---------------------------------------------------------------------------------------------
WRAPPERS = {"model", "vision_model", "embeddings", "encoder", "self_attn", "mlp", "linear"}  # modules of transformers, not ours
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# what a config.json leaves out has the defaults of transformers' GemmaConfig and SiglipVisionConfig
DECODER = {"width": ("hidden_size", 3072), "depth": ("num_hidden_layers", 28), "heads": ("num_attention_heads", 16),
           "kv_heads": ("num_key_value_heads", 16), "head_dim": ("head_dim", 256), "mlp_dim": ("intermediate_size", 24_576),
           "vocab_size": ("vocab_size", 256_000)}  # fmt: skip
TOWER = {"image_size": ("image_size", 224), "patch_size": ("patch_size", 16), "vit_width": ("hidden_size", 768),
         "vit_depth": ("num_hidden_layers", 12), "vit_heads": ("num_attention_heads", 12),
         "vit_mlp_dim": ("intermediate_size", 3072)}  # fmt: skip
TIMM = {r"^blocks\.(\d+)\.norm": r"layers.\1.layer_norm", r"^blocks\.(\d+)\.attn\.proj": r"layers.\1.out_proj",
        r"^blocks\.(\d+)\.(attn|mlp)": r"layers.\1", r"^norm": "post_layernorm", r"^patch_embed\.proj": "patch_embedding",
        r"^pos_embed$": "position_embedding.weight"}  # fmt: skip


@contextlib.contextmanager
def blame(path: Path | str, way_out: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of `path`: a ValueError of one line with a way out."""
    try:
        yield
    except Exception as e:  # safetensors, tokenizers, torch and the hub each raise their own kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if isinstance(e, FileNotFoundError) and isinstance(path, Path):
            reason = "no such file"
        raise ValueError(f"{path}: {reason}; {way_out}") from None


def read_weights(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor in `dtype`, None: as stored) of a safetensors file, one at a time.

    Read through a buffer of 16 MB, so that nothing else is in memory: a memory map's pages would stay beside the copies.
    """
    with safetensors.safe_open(path, "pt"):  # checks the header and the file's length, reads no weight
        pass
    with open(path, "rb") as f:
        start, buffer = 8 + int.from_bytes(f.read(8), "little"), torch.empty(2**24, dtype=torch.uint8)
        for key, entry in json.loads(f.read(start - 8)).items():
            if key != "__metadata__":
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{key} is stored as {entry['dtype']}, not as one of {', '.join(DTYPES)}")
                stored = DTYPES[entry["dtype"]]
                tensor = torch.empty(entry["shape"], dtype=dtype or stored)
                f.seek(start + entry["data_offsets"][0])
                for part in tensor.view(-1).split(2**22):
                    raw = buffer[: len(part) * stored.itemsize]
                    f.readinto(raw.numpy())
                    part.copy_(raw.view(stored))
                yield key, tensor


def fill(module: nn.Module, files: list[Path], way_out: str, rename: Callable[[str], str] = str,
         dtype: torch.dtype | None = None, new_words: int = 0, only: str = "") -> None:  # fmt: skip
    """Give `module` (on the meta device, if need be) the weights in `files`, one at a time, in `dtype` (None: as stored).

    rename: key in a file -> name here, "" to leave it out; new_words: rows that the embeddings have and the file has not;
    only: a part of the names of the weights to fill.
    Raises ValueError naming the file, or its folder, if a weight is damaged, missing, misshapen or too many.
    """
    missing = {name: p for name, p in module.state_dict(keep_vars=True).items() if only in name}
    for path in files:
        with blame(path, way_out):
            for key, tensor in read_weights(path, dtype):
                if not (name := rename(key)):
                    continue
                if name not in missing:
                    raise ValueError(f"{key} has no place in this model, or comes twice")
                if new_words and name.endswith("embed_tokens.weight"):  # as PaliGemma started its own (Beyer et al., 2024)
                    tensor = torch.cat([tensor, 0.02 * torch.randn(new_words, *tensor.shape[1:]).to(tensor)])
                if tensor.shape != (place := missing.pop(name)).shape:
                    raise ValueError(f"{key} is {tuple(tensor.shape)}, not {tuple(place.shape)} as the sizes say")
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(place, nn.Parameter) else tensor)
    if missing:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where}: {len(missing)} weights are missing, {min(missing)} for one; {way_out}")


def save_model(model: EFM, path: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights, sizes and vocabulary in one safetensors file; of a model with adapters only these, and where its base is.

    weights: those of `trainable_state(model)`, where the model itself is in parts on several devices.
    """
    # one entry: safetensors writes several in random order, and equal models would be unequal files
    made_with = {"config": asdict(model.cfg), "tokenizer": model.tokenizer.tokenizer.to_str()}
    if model.lora_rank:
        made_with |= {"lora_rank": model.lora_rank, "base": os.path.relpath(model.base, path.parent)}
    meta = {"nanoEFM": json.dumps(made_with, ensure_ascii=False)}
    weights = trainable_state(model) if weights is None else weights
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path, meta)


def load_model(path: Path, beside: EFM | None = None) -> EFM:
    """The model that `save_model` wrote. Raises ValueError naming the file if it is missing, damaged or misshapen.

    beside: a model in memory; adapters of the same base share its weights, so that two models take the memory of one.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; run stage1.py first or name another run")
    with blame(path, "not a nanoEFM checkpoint, or a damaged one; train it again"):
        with safetensors.safe_open(path, "pt") as f:
            made_with = json.loads((f.metadata() or {})["nanoEFM"])
        made_with["config"]["state_names"] = tuple(made_with["config"]["state_names"])
        if made_with["config"].get("state_mlp") and not made_with["config"].get("state_hints"):
            raise ValueError("of a nano-arms whose MLP added to the state's tokens")
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(made_with["tokenizer"]))
        with torch.device("meta"):
            model = EFM(EFMConfig(**made_with["config"]), tokenizer)
    if not (rank := made_with.get("lora_rank", 0)):
        fill(model, [path], "a damaged checkpoint; train it again")
        return model
    base = Path(os.path.normpath(path.parent / made_with["base"]))
    if beside is not None and beside.lora_rank == rank and base.exists() and base.samefile(beside.base):
        shared = {id(x): x for x in (beside.tokenizer, *(p for name, p in beside.named_parameters() if LORA not in name))}
        model = copy.deepcopy(beside, shared)  # everything is copied but what `shared` has: the base stays one
    else:
        model = add_lora(load_model(base), rank, base)
    fill(model, [path], "a damaged checkpoint; train it again", only=LORA)
    return model


def hub(call: str, repo_id: str, **arguments: Any) -> Any:
    """A function of `huggingface_hub`. Raises ValueError with the way out if the hub is out of reach or says no."""
    import huggingface_hub

    with blame(repo_id, f"accept its licence on huggingface.co/{repo_id} and run `hf auth login`, or name a local copy's folder"):
        return getattr(huggingface_hub, call)(repo_id=repo_id, **arguments)


def push(path: Path, repo_id: str) -> None:
    """Upload a checkpoint that `save_model` wrote to the hub, under its own name, adapters merged. Raises ValueError as `hub`."""
    hub("create_repo", repo_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, whole = load_model(Path(path)), Path(path)
        if model.lora_rank:
            whole = Path(folder) / "merged.safetensors"
            save_model(merge_lora(model), whole)
        hub("upload_file", repo_id, path_or_fileobj=whole, path_in_repo=Path(path).name)


def pull(repo_id: str, name: str = "policy.safetensors") -> EFM:
    """The model that `push` uploaded. Raises ValueError as `hub` and `load_model` do."""
    return load_model(Path(hub("hf_hub_download", repo_id, filename=name)))


def sizes(config: dict, names: dict[str, tuple[str, Any]], **must: tuple) -> dict[str, int]:
    """Fields of EFMConfig from a part of config.json. Raises ValueError if one of `must` is not as model.py computes it."""
    for key, allowed in must.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {config[key]}, and model.py computes {allowed[0]} only")
    return {ours: int(config.get(theirs, default)) for ours, (theirs, default) in names.items()}


def decoder_sizes(text: dict) -> dict[str, Any]:
    """The decoder's fields of EFMConfig from Gemma's config.json, or PaliGemma's text_config. Raises ValueError as `sizes`."""
    if text.get("model_type") == "gemma2":
        raise ValueError("the decoder is Gemma 2, with more norms and capped logits; model.py has PaliGemma 1's")
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 10_000.0)} | (text.get("rope_scaling") or {})
    sizes(rope, {}, rope_type=("default",), type=("default",))
    # "gelu" in a Gemma file means the tanh approximation, too (transformers' GemmaConfig)
    found = sizes(text, DECODER, model_type=("gemma",), hidden_act=("gelu_pytorch_tanh", "gelu"), attention_bias=(False,),
                  hidden_activation=("gelu_pytorch_tanh", None), rms_norm_eps=(1e-6,), tie_word_embeddings=(True,))  # fmt: skip
    return found | {"rope_theta": float(rope.get("rope_theta", 10_000.0))}


def published(weights: str | Path, model_type: str) -> tuple[dict, tokenizers.Tokenizer, list[Path]]:
    """config.json, tokenizer and safetensors files of a folder, or of the hub repository that `weights` names.

    Raises ValueError, one line, if one of them is missing or damaged, or if they are not of a `model_type`.
    """
    folder = Path(weights)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
            raise ValueError(f"{weights}: neither a folder nor the id of a hub repository; name one of the two")
        folder = Path(hub("snapshot_download", str(weights), allow_patterns=["*.safetensors", "*.json"]))
    way_out = f"name the folder of a {model_type} checkpoint as published on the hub"
    with blame(folder / "config.json", way_out):
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != model_type:
            raise ValueError(f"of a {config.get('model_type')} model")
    with blame(folder / "tokenizer.json", way_out):
        tokenizer = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        with blame(index, way_out):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) or names
    return config, tokenizer, [folder / name for name in names]


def rename(key: str) -> str:
    """A weight's key in any layout that transformers has used -> its name here: their wrappers are left out.

    language_model.model.layers.0.mlp.up_proj.weight and model.language_model.layers.0.… -> language_model.layers.0.up_proj.weight
    """
    return "" if key.endswith("lm_head.weight") else ".".join(part for part in key.split(".") if part not in WRAPPERS)


def load_paligemma(weights: str | Path, dtype: torch.dtype = torch.float32) -> EFM:
    """PaliGemma from a folder, or a hub id, with config.json, tokenizer.json and safetensors, as published or saved since.

    The weights come one at a time in `dtype`, so memory peaks at the model's own size. It computes what transformers'
    PaliGemmaForConditionalGeneration does; positions start at 0, not 1, which rotary attention does not see.
    Raises ValueError, one line: a folder or hub id that is not PaliGemma 1, or with damaged, missing or surplus weights.
    """
    config, words, files = published(weights, "paligemma")
    folder = files[0].parent
    with blame(folder / "config.json", "name a PaliGemma 1 checkpoint, such as google/paligemma-3b-pt-224"):
        sizes(config, {}, tie_word_embeddings=(True,))
        tower = sizes(config["vision_config"], TOWER, model_type=("siglip_vision_model",), hidden_act=("gelu_pytorch_tanh",),
                      layer_norm_eps=(1e-6,), num_channels=(3,))  # fmt: skip
        cfg = EFMConfig(**decoder_sizes(config["text_config"]), **tower, resize=True)
    with blame(folder / "tokenizer.json", "take the one published with the weights"):
        tokenizer = Tokenizer(words)
        if words.get_vocab_size() > cfg.vocab_size:
            raise ValueError(f"{words.get_vocab_size()} words, but the model has embeddings for {cfg.vocab_size}")
        with torch.device("meta"):
            model = EFM(cfg, tokenizer)
    fill(model, files, "download it again", rename, dtype)
    return model


def timm_vit(name: str, pretrained: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes, and weights by their names here, of a timm ViT. Raises ValueError if its layout is not ours.

    Ours: no class token, learned positions, pre-LayerNorm blocks, tanh GELU, pixels in [-1, 1]. SigLIP's pooling head is
    dropped. SigLIP was trained with the tanh GELU (jax.nn.gelu in big_vision); some of timm's entries have the exact one.
    """
    with blame(f"timm:{name}", "pip install timm"):
        import timm
    with blame(f"timm:{name}", "choose a SigLIP tower, such as timm:vit_so400m_patch14_siglip_224"):
        gelu = {"act_layer": "gelu_tanh"} if "siglip" in name else {}
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **gelu)
        block, side, patch = vit.blocks[0], vit.patch_embed.img_size, vit.patch_embed.patch_size
        scale = [tuple(vit.pretrained_cfg[k]) for k in ("mean", "std")]
        if (type(block).__name__, type(block.mlp.act).__name__, block.norm1.eps) != ("Block", "GELUTanh", 1e-6):
            raise ValueError("its blocks are not ours: other modules, another GELU or another LayerNorm")
        if scale != [(0.5,) * 3] * 2 or side[0] != side[1] or patch[0] != patch[1]:
            raise ValueError("its images are not ours: pixels of another scale, or not square")
        cfg = {"vit_width": vit.embed_dim, "vit_depth": len(vit.blocks), "vit_heads": block.attn.num_heads,
               "vit_mlp_dim": block.mlp.fc1.out_features, "image_size": side[0], "patch_size": patch[0]}  # fmt: skip
        weights = {}
        for key, value in vit.state_dict().items():
            for theirs, ours in TIMM.items():
                key = re.sub(theirs, ours, key)
            if ".qkv." in key:
                weights |= {key.replace("qkv", f"{x}_proj"): part for x, part in zip("qkv", value.chunk(3), strict=True)}
            elif not key.startswith("attn_pool."):
                weights[key] = value[0] if key == "position_embedding.weight" else value
        with torch.device("meta"):
            ours = {(k, v.shape) for k, v in ViT(EFMConfig(**cfg)).state_dict().items()}
        if different := sorted({(k, v.shape) for k, v in weights.items()} ^ ours):
            raise ValueError(f"it is not our ViT, see {different[0][0]}")
    return cfg, weights


def load_unimodal(vit: str, weights: str | Path, cfg: EFMConfig, tokenizer: Tokenizer | None, pretrained: bool = True) -> EFM:
    """The paper's Uni-PaLI: a ViT and a decoder that have not met, and a random projection between them.

    vit: "timm:NAME"; weights: a folder or hub id of Gemma 1, or "" for a random decoder with the sizes of `cfg` and the
    words of `tokenizer`. Gemma's vocabulary gets the number tokens it lacks. Raises ValueError, one line.
    """
    if not vit.startswith("timm:"):
        raise ValueError(f"{vit}: not a vision tower; name one as timm:vit_so400m_patch14_siglip_224")
    tower, vit_weights = timm_vit(vit.removeprefix("timm:"), pretrained)
    files, new_words = [], 0
    if weights:
        config, words, files = published(weights, "gemma")
        with blame(files[0].parent / "config.json", "name a Gemma 1 checkpoint, such as google/gemma-2b"):
            cfg = replace(cfg, **decoder_sizes(config))
        if words.token_to_id("<loc0000>") is None:
            words.add_special_tokens([f"<loc{i:04d}>" for i in range(N_LOC)])
            new_words = max(0, words.get_vocab_size() - cfg.vocab_size)
        tokenizer, cfg = Tokenizer(words), replace(cfg, vocab_size=cfg.vocab_size + new_words)
    model = EFM(replace(cfg, **tower, resize=True), tokenizer)
    model.vision_tower.load_state_dict(vit_weights)
    if files:
        fill(model.language_model, files, "download it again", rename, torch.float32, new_words)
    return model


# --- adapters, memory, speed ------------------------------------------------------------------------------------------
LORA = ".lora_"  # in the names of an adapter's weights, and in no other (peft)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


def add_lora(model: EFM, rank: int, base: Path) -> EFM:
    """Freeze the model, and add to each projection of both towers W x a trainable 2 B A x (Hu et al., 2021), B = 0 at first.

    rank: rows of A; base: the file that has, or will have, the model's weights as they are now (`save_base`).
    Raises ValueError with the way out where peft is missing.
    """
    with blame(f"--lora-rank {rank}", "pip install peft"):
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS), model)
    model.lora_rank, model.base = rank, Path(base)
    return model


def merge_lora(model: EFM) -> EFM:
    """The same function without adapters: W + 2 B A in place of W. A model that has none stays as it is."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    model.lora_rank, model.base = 0, Path()
    return model.requires_grad_(True)


def economise(model: EFM, checkpointing: bool, compiled: bool) -> None:
    """checkpointing: a block's activations are computed again in the backward pass, not kept; compiled: torch.compile.

    Both block by block: activations are few at a block's edges, and blocks are alike, so one compilation serves all.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # with gradients or not, with a cache or not, ...: a dozen kinds of call
    for tower in filter(None, (model.language_model, getattr(model, "vision_tower", None))):
        for block in tower.layers:
            if compiled:  # for every batch size: the simulations whose episode goes on become fewer
                block.forward = torch.compile(block.forward, dynamic=True)
            if checkpointing:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def trainable_state(model: EFM) -> dict[str, Tensor]:
    """What training changes and checkpoints keep: the adapters' weights where there are some, else all."""
    return {k: v for k, v in model.state_dict().items() if LORA in k or not model.lora_rank}


def save_base(model: EFM, path: Path) -> None:
    """The weights below the adapters, as the model that it was before `add_lora`."""
    plain = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if LORA not in k}
    whole = copy.copy(model)
    whole.lora_rank = 0
    save_model(whole, path, plain)
