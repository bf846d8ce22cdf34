"""Weights in and out: checkpoints, PaliGemma, Gemma, timm, the hub, LoRA adapters.

Files are data: safetensors and JSON are parsed, and nothing in them is run. A wrong file is a ValueError of
one line that names it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
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

# of safetensors, which training uses
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# modules of transformers that have no counterpart here
WRAPPERS = {"model", "vision_model", "embeddings", "encoder", "self_attn", "mlp", "linear"}
# field of EFMConfig: key in config.json, and the default of transformers' GemmaConfig and SiglipVisionConfig
DECODER = {
    "width": ("hidden_size", 3072),
    "depth": ("num_hidden_layers", 28),
    "heads": ("num_attention_heads", 16),
    "kv_heads": ("num_key_value_heads", 16),
    "head_dim": ("head_dim", 256),
    "mlp_dim": ("intermediate_size", 24_576),
    "vocab_size": ("vocab_size", 256_000),
}
TOWER = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "vit_width": ("hidden_size", 768),
    "vit_depth": ("num_hidden_layers", 12),
    "vit_heads": ("num_attention_heads", 12),
    "vit_mlp_dim": ("intermediate_size", 3072),
}
TIMM = {  # a timm key's part -> ours
    r"^blocks\.(\d+)\.norm": r"layers.\1.layer_norm",
    r"^blocks\.(\d+)\.attn\.proj": r"layers.\1.out_proj",
    r"^blocks\.(\d+)\.(attn|mlp)": r"layers.\1",
    r"^norm": "post_layernorm",
    r"^patch_embed\.proj": "patch_embedding",
    r"^pos_embed$": "position_embedding.weight",
}
LORA = ".lora_"  # in the names of an adapter's weights, and in no other (peft)
PROJECTIONS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "fc1",
    "fc2",
]


# --- reading files ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def as_value_error(path: Path | str, way_out: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of `path`: a ValueError of one line with a way out."""
    try:
        yield
    except Exception as e:  # safetensors, tokenizers, torch and the hub each raise their own kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if isinstance(e, FileNotFoundError) and isinstance(path, Path):
            reason = "no such file"
        raise ValueError(f"{path}: {reason}; {way_out}") from None


def parse_tokenizer(text: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, tried on a word. It cuts off and fills up nothing."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("word\n", add_special_tokens=False)
    except BaseException as e:
        if type(e).__name__ == "PanicException":  # of the library's Rust: not an Exception
            raise ValueError(f"not a tokenizer: {e}") from None
        raise
    return tokenizer


def require_rows(tokenizer: tokenizers.Tokenizer, rows: int) -> None:
    """Raise ValueError unless each of the tokenizer's words has one of the embeddings' rows."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(f"a word has id {largest}, but the model has embeddings for {rows}")


def read_weights(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor in `dtype`, None: as stored) of a safetensors file, one at a time.

    Read through a buffer of 16 MB: nothing else is in memory, where a memory map's pages would stay.
    """
    with safetensors.safe_open(path, "pt"):  # checks the header and the file's length, reads no weight
        pass
    buffer = torch.empty(2**24, dtype=torch.uint8)
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(start - 8))
        header.pop("__metadata__", None)
        for key, entry in header.items():
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


def load_into(
    module: nn.Module,
    files: list[Path],
    way_out: str,
    *,
    part: str = "",
    dtype: torch.dtype | None = None,
    our_name: Callable[[str], str] = str,
    embeddings: str = "",
    new_rows: int = 0,
) -> None:
    """Give `module`, on the meta device if need be, the weights in `files`, one at a time.

    part: only weights with this in their names are looked for
    dtype: what the weights become; None: as stored
    our_name: key in a file -> name in `module`
    embeddings: name of the embeddings, if a file may have them once more as lm_head.weight
    new_rows: rows that the embeddings have and the file has not

    Raises ValueError naming the file, or its folder, if a weight is damaged, missing, misshapen or too many.
    """
    missing = {name: p for name, p in module.state_dict(keep_vars=True).items() if part in name}
    heads = []
    for path in files:
        with as_value_error(path, way_out):
            for key, tensor in read_weights(path, dtype):
                if embeddings and key.endswith("lm_head.weight"):
                    heads.append((path, tensor))
                    continue
                name = our_name(key)
                if name not in missing:
                    raise ValueError(f"{key} has no place in this model, or comes twice")
                if new_rows and name == embeddings:  # as PaliGemma started its own (Beyer et al., 2024)
                    rows = 0.02 * torch.randn(new_rows, *tensor.shape[1:])
                    tensor = torch.cat([tensor, rows.to(tensor)])
                place = missing.pop(name)
                if tensor.shape != place.shape:
                    raise ValueError(f"{key} is {tuple(tensor.shape)}, not {tuple(place.shape)} as the sizes say")
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(tensor) if isinstance(place, nn.Parameter) else tensor
                setattr(module.get_submodule(owner), leaf, value)
    if missing:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where}: {len(missing)} weights are missing, {min(missing)} for one; {way_out}")
    for path, head in heads:  # behind the loop: which of the two comes first is up to the file
        with as_value_error(path, "name a checkpoint whose embeddings are tied"):
            if not torch.equal(head, module.get_parameter(embeddings)[: len(head)]):
                raise ValueError("lm_head.weight differs from the embeddings, which model.py takes for both")


# --- checkpoints ------------------------------------------------------------------------------------------
def trainable_state(model: EFM) -> dict[str, Tensor]:
    """What training changes and checkpoints keep: the adapters' weights where there are some, else all."""
    return {k: v for k, v in model.state_dict().items() if LORA in k or not model.lora_rank}


def save_model(model: EFM, path: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights, sizes and vocabulary in one safetensors file; of adapters these, and where their base is.

    weights: those of `trainable_state(model)`, where the model itself is in parts on several devices.
    """
    # one entry: safetensors writes several in random order, and equal models would be unequal files
    made_with = {"config": asdict(model.cfg), "tokenizer": model.tokenizer.tokenizer.to_str()}
    if model.lora_rank:
        made_with["lora_rank"] = model.lora_rank
        made_with["base"] = os.path.relpath(model.base, path.parent)
    metadata = {"nanoEFM": json.dumps(made_with, ensure_ascii=False)}
    if weights is None:
        weights = trainable_state(model)
    weights = {k: v.contiguous() for k, v in weights.items()}
    safetensors.torch.save_file(weights, path, metadata)


def parse_config(found: dict[str, Any]) -> EFMConfig:
    """The sizes in a checkpoint; what it lacks has its default, what we lack is a ValueError."""
    unknown = found.keys() - {f.name for f in fields(EFMConfig)}
    if unknown:
        raise ValueError(f"its model has a setting {min(unknown)}, which this version has not")
    return EFMConfig(**found | {"state_names": tuple(found["state_names"])})


def load_model(path: Path, beside: EFM | None = None) -> EFM:
    """The model that `save_model` wrote. ValueError names a file that is missing or damaged.

    beside: a model in memory; adapters of the same base share its weights: two take the memory of one.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; run stage1.py first or name another run")
    with as_value_error(path, "not a nanoEFM checkpoint, or a damaged one; train it again"):
        with safetensors.safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
        made_with = json.loads(metadata["nanoEFM"])
        cfg = parse_config(made_with["config"])
        words = parse_tokenizer(made_with["tokenizer"])
        require_rows(words, cfg.vocab_size)
        with torch.device("meta"):
            model = EFM(cfg, Tokenizer(words))
        rank = made_with.get("lora_rank", 0)
        base = Path(os.path.normpath(path.parent / made_with["base"])) if rank else Path()
    if not rank:
        load_into(model, [path], "a damaged checkpoint; train it again")
        return model
    if beside is not None and beside.lora_rank == rank and base.exists() and base.samefile(beside.base):
        shared = [p for name, p in beside.named_parameters() if LORA not in name]
        shared.append(beside.tokenizer)
        # deepcopy copies all but what its memo has already: the base stays one
        model = copy.deepcopy(beside, {id(x): x for x in shared})
    else:
        model = add_lora(load_model(base), rank, base)
    load_into(model, [path], "a damaged checkpoint; train it again", part=LORA)
    return model


# --- the hub ----------------------------------------------------------------------------------------------
def hub(call: str, repo_id: str, **arguments: Any) -> Any:
    """A function of `huggingface_hub`. Raises ValueError with the way out if the hub says no or nothing."""
    import huggingface_hub

    login = f"accept its licence on huggingface.co/{repo_id} and run `hf auth login`"
    with as_value_error(repo_id, f"{login}, or name a local copy's folder"):
        return getattr(huggingface_hub, call)(repo_id=repo_id, **arguments)


def push(path: Path, repo_id: str) -> None:
    """Upload a checkpoint to the hub, under its own name, adapters merged. Raises ValueError as `hub`."""
    path = Path(path)
    hub("create_repo", repo_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, upload = load_model(path), path
        if model.lora_rank:
            upload = Path(folder) / "merged.safetensors"
            save_model(merge_lora(model), upload)
        hub("upload_file", repo_id, path_or_fileobj=upload, path_in_repo=path.name)


def pull(repo_id: str, name: str = "policy.safetensors") -> EFM:
    """The model that `push` uploaded. Raises ValueError as `hub` and `load_model` do."""
    return load_model(Path(hub("hf_hub_download", repo_id, filename=name)))


# --- PaliGemma and Gemma ----------------------------------------------------------------------------------
def read_sizes(config: dict, names: dict[str, tuple[str, int]]) -> dict[str, int]:
    """Fields of EFMConfig, as `names` says, from a part of config.json."""
    return {ours: int(config.get(theirs, default)) for ours, (theirs, default) in names.items()}


def require_values(config: dict, **allowed: tuple) -> None:
    """Raise ValueError if a key has none of the values that model.py computes; the first is the default."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {config[key]}, and model.py computes {values[0]} only")


def decoder_sizes(text: dict) -> dict[str, Any]:
    """The decoder's fields of EFMConfig, from Gemma's config.json or PaliGemma's text_config."""
    if text.get("model_type") == "gemma2":
        raise ValueError("the decoder is Gemma 2, with more norms and capped logits; model.py has PaliGemma 1's")
    rope = text.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": text.get("rope_theta", 10_000.0)} | (text.get("rope_scaling") or {})
    require_values(rope, rope_type=("default",), type=("default",))
    require_values(
        text,
        model_type=("gemma",),
        # "gelu" in a Gemma file means the tanh approximation, too (transformers' GemmaConfig)
        hidden_act=("gelu_pytorch_tanh", "gelu"),
        hidden_activation=("gelu_pytorch_tanh", None),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        tie_word_embeddings=(True,),
    )
    return read_sizes(text, DECODER) | {"rope_theta": float(rope.get("rope_theta", 10_000.0))}


def published(weights: str | Path, model_type: str) -> tuple[dict, tokenizers.Tokenizer, list[Path]]:
    """config.json, tokenizer and safetensors files of the folder, or hub repository, that `weights` names.

    Raises ValueError, one line, if one of them is missing or damaged, or if they are not of a `model_type`.
    """
    folder = Path(weights)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
            raise ValueError(f"{weights}: neither a folder nor the id of a hub repository; name one of the two")
        folder = Path(hub("snapshot_download", str(weights), allow_patterns=["*.safetensors", "*.json"]))
    way_out = f"name the folder of a {model_type} checkpoint as published on the hub"
    with as_value_error(folder / "config.json", way_out):
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != model_type:
            raise ValueError(f"of a {config.get('model_type')} model")
    with as_value_error(folder / "tokenizer.json", way_out):
        tokenizer = parse_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        with as_value_error(index, way_out):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) or names
            for name in names:
                if Path(name).name != name:
                    raise ValueError(f"{name} is not in this folder")
    return config, tokenizer, [folder / name for name in names]


def without_wrappers(key: str) -> str:
    """A weight's key in any layout that transformers has used -> its name here.

    language_model.model.layers.0.mlp.up_proj.weight, model.language_model.layers.0.mlp.up_proj.weight
    -> language_model.layers.0.up_proj.weight
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def load_paligemma(weights: str | Path, dtype: torch.dtype = torch.float32) -> EFM:
    """PaliGemma from a folder, or a hub id, with config.json, tokenizer.json and safetensors files.

    The weights come one at a time in `dtype`, so memory peaks at the model's own size. It computes what
    transformers' PaliGemmaForConditionalGeneration does; positions start at 0, not 1, which rotary attention
    does not see. Raises ValueError, one line: not PaliGemma 1, or damaged, missing or surplus weights.
    """
    config, words, files = published(weights, "paligemma")
    folder = files[0].parent
    with as_value_error(folder / "config.json", "name a PaliGemma 1 checkpoint, such as google/paligemma-3b-pt-224"):
        require_values(config, tie_word_embeddings=(True,))
        vision = config["vision_config"]
        require_values(
            vision,
            model_type=("siglip_vision_model",),
            hidden_act=("gelu_pytorch_tanh",),
            layer_norm_eps=(1e-6,),
            num_channels=(3,),
        )
        cfg = EFMConfig(**decoder_sizes(config["text_config"]), **read_sizes(vision, TOWER), resize=True)
    with as_value_error(folder / "tokenizer.json", "take the one published with the weights"):
        tokenizer = Tokenizer(words)
        require_rows(words, cfg.vocab_size)
        with torch.device("meta"):
            model = EFM(cfg, tokenizer)
    embeddings = "language_model.embed_tokens.weight"
    load_into(model, files, "download it again", dtype=dtype, our_name=without_wrappers, embeddings=embeddings)
    return model


# --- a ViT of timm ----------------------------------------------------------------------------------------
def timm_vit(name: str, pretrained: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes, and weights by their names here, of a timm ViT. Raises ValueError if its layout is not ours.

    Ours: no class token, learned positions, pre-LayerNorm blocks, tanh GELU, pixels in [-1, 1]. SigLIP's
    pooling head is dropped. SigLIP was trained with the tanh GELU (big_vision's jax.nn.gelu);
    some of timm's entries have the exact one.
    """
    with as_value_error(f"timm:{name}", "pip install timm"):
        import timm
    with as_value_error(f"timm:{name}", "choose a SigLIP tower, such as timm:vit_so400m_patch14_siglip_224"):
        gelu = {"act_layer": "gelu_tanh"} if "siglip" in name else {}
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **gelu)
        block = vit.blocks[0]
        height, width = vit.patch_embed.img_size
        if (type(block).__name__, type(block.mlp.act).__name__, block.norm1.eps) != (
            "Block",
            "GELUTanh",
            1e-6,
        ):
            raise ValueError("its blocks are not ours: other modules, another GELU or another LayerNorm")
        half = (0.5, 0.5, 0.5)
        if tuple(vit.pretrained_cfg["mean"]) != half or tuple(vit.pretrained_cfg["std"]) != half:
            raise ValueError("its images are not ours: pixels of another scale")
        if height != width or len(set(vit.patch_embed.patch_size)) != 1:
            raise ValueError("its images are not ours: not square")
        cfg = {
            "vit_width": vit.embed_dim,
            "vit_depth": len(vit.blocks),
            "vit_heads": block.attn.num_heads,
            "vit_mlp_dim": block.mlp.fc1.out_features,
            "image_size": height,
            "patch_size": vit.patch_embed.patch_size[0],
        }
        weights = {}
        for key, value in vit.state_dict().items():
            if key.startswith("attn_pool."):
                continue
            for theirs, ours in TIMM.items():
                key = re.sub(theirs, ours, key)
            if ".qkv." in key:
                for x, part in zip("qkv", value.chunk(3), strict=True):
                    weights[key.replace("qkv", f"{x}_proj")] = part
            else:
                weights[key] = value[0] if key == "position_embedding.weight" else value
        with torch.device("meta"):
            ours = ViT(EFMConfig(**cfg)).state_dict()
        different = {(k, v.shape) for k, v in weights.items()} ^ {(k, v.shape) for k, v in ours.items()}
        if different:
            raise ValueError(f"it is not our ViT, see {min(different)[0]}")
    return cfg, weights


def load_unimodal(
    vit: str, weights: str | Path, cfg: EFMConfig, tokenizer: Tokenizer | None, pretrained: bool = True
) -> EFM:
    """The paper's Uni-PaLI: a ViT and a decoder that have not met, and a random projection between them.

    vit: "timm:NAME"; weights: a folder or hub id of Gemma 1, or "" for a random decoder with the sizes of
    `cfg` and the words of `tokenizer`. Gemma's vocabulary gets the number tokens it lacks. ValueErrors.
    """
    if not vit.startswith("timm:"):
        raise ValueError(f"{vit}: not a vision tower; name one as timm:vit_so400m_patch14_siglip_224")
    tower, vit_weights = timm_vit(vit.removeprefix("timm:"), pretrained)
    files, new_rows = [], 0
    if weights:
        config, words, files = published(weights, "gemma")
        folder = files[0].parent
        with as_value_error(folder / "config.json", "name a Gemma 1 checkpoint, such as google/gemma-2b"):
            cfg = replace(cfg, **decoder_sizes(config))
        with as_value_error(folder / "tokenizer.json", "take the one published with the weights"):
            if words.token_to_id("<loc0000>") is None:
                words.add_special_tokens([f"<loc{i:04d}>" for i in range(N_LOC)])
                new_rows = max(0, words.get_vocab_size() - cfg.vocab_size)
            cfg = replace(cfg, vocab_size=cfg.vocab_size + new_rows)
            require_rows(words, cfg.vocab_size)
            tokenizer = Tokenizer(words)
    model = EFM(replace(cfg, **tower, resize=True), tokenizer)
    model.vision_tower.load_state_dict(vit_weights)
    if files:
        load_into(
            model.language_model,
            files,
            "download it again",
            dtype=torch.float32,
            our_name=without_wrappers,
            embeddings="embed_tokens.weight",
            new_rows=new_rows,
        )
    return model


# --- adapters, memory, speed ------------------------------------------------------------------------------
def add_lora(model: EFM, rank: int, base: Path) -> EFM:
    """Freeze the model; add to each projection W x a trainable 2 B A x (Hu et al., 2021), B = 0 at first.

    rank: rows of A; base: the file that has, or will have, the model's weights as they are now (`save_base`).
    Raises ValueError with the way out where peft is missing.
    """
    with as_value_error(f"--lora-rank {rank}", "pip install peft"):
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS), model)
    model.lora_rank = rank
    model.base = Path(base)
    return model


def merge_lora(model: EFM) -> EFM:
    """The same function without adapters: W + 2 B A in place of W. A model that has none stays as it is."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    model.lora_rank = 0
    model.base = Path()
    return model.requires_grad_(True)


def save_base(model: EFM, path: Path) -> None:
    """The weights below the adapters, as the model that it was before `add_lora`."""
    plain = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if LORA not in k}
    without = copy.copy(model)
    without.lora_rank = 0
    save_model(without, path, plain)


def economise(model: EFM, checkpointing: bool, compiled: bool) -> None:
    """checkpointing: a block's activations are computed again in the backward pass; compiled: torch.compile.

    Both block by block: few activations are at a block's edges, and one compilation serves all blocks.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # with gradients or not, a cache or not, ...: a dozen kinds of call
    for tower in filter(None, (model.language_model, getattr(model, "vision_tower", None))):
        for block in tower.layers:
            if compiled:  # for every batch size: the simulations whose episode goes on become fewer
                block.forward = torch.compile(block.forward, dynamic=True)
            if checkpointing:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
