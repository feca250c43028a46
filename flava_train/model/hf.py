"""Exchange with Hugging Face in both directions: folders with a `FlavaForPreTraining`.

Weights are the same bits on both sides. Only safetensors are read: the older format runs any code
that it holds. Nothing here needs the transformers library; loading from the hub needs
`huggingface_hub`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from flava_train.model.flava import (
    CLIP_MEAN,
    CLIP_STD,
    PUBLISHED_HEADS,
    Flava,
    FlavaConfig,
    TowerConfig,
)
from pmd_pipeline.contract.errors import PmdError

WEIGHTS = "model.safetensors"


def load_hf(source: str | Path, *, revision: str | None = None) -> Flava:
    """The model in a local folder, or under a hub id at a commit.

    What our model lacks is skipped: the image tokenizer, the poolers, which no loss trains, and
    heads that `export_hf` has written untrained.

    Args:
        source: a folder, or an id such as `facebook/flava-full`.
        revision: the commit on the hub, 40 hex digits; a branch would change.

    Raises:
        PmdError: there is no such model, it is not a `FlavaForPreTraining` in safetensors, or it
            has options that our model does not have.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source), revision)
    if not (folder / "config.json").is_file():
        raise PmdError(f"{folder}: no config.json; a model folder has one")
    config = json.loads((folder / "config.json").read_text())
    listed = config.get(_UNTRAINED)
    untrained = listed if isinstance(listed, list) else []
    heads = {name: head for name, head in PUBLISHED_HEADS.items() if name not in untrained}
    model = Flava(read_config(config), heads)
    state = {
        name: tensor
        for name, tensor in _weights(folder).items()
        if name.partition("_head.")[0] not in untrained
    }
    with torch.no_grad():
        for name, ours in model.state_dict().items():
            if name != "logit_bias":  # the config has it, so it is set already
                ours.copy_(_joined(name, ours, state, folder))
    left = sorted(name for name in state if not _UNUSED.search(name))
    if left:
        raise PmdError(f"{folder}: this is no FlavaForPreTraining: it also has {left[:5]}")
    return model


def export_hf(model: Flava, folder: Path, *, vocabulary: Sequence[str] | None = None) -> None:
    """Write a folder that `FlavaForPreTraining.from_pretrained` loads without warnings.

    The folder appears complete or not at all. The image tokenizer is left out
    (`init_codebook=false`), so training with transformers needs `mim_labels`. Heads that the model
    lacks are written untrained, and listed in `config.json` as `untrained_heads`; heads of the
    user's own losses are left out.

    Args:
        model: it is written in its own precision.
        folder: must not exist yet.
        vocabulary: WordPieces by number. With it, the folder also has the tokenizer and the image
            processor, so that `AutoProcessor` loads from it.

    Raises:
        PmdError: the folder exists, the vocabulary is not the model's, or the encoders have
            different widths, which `FlavaForPreTraining` does not support.
    """
    if folder.exists():
        raise PmdError(f"{folder} exists; remove it, or name another folder")
    if vocabulary is not None and len(vocabulary) != model.config.text_vocab:
        size = model.config.text_vocab
        raise PmdError(f"the vocabulary has {len(vocabulary)} WordPieces, the model {size}")
    widths = _widths(model.config)
    if len(set(widths.values())) > 1:
        raise PmdError(f"transformers has one width for all encoders; these have {widths}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        written = Path(scratch) / "complete"
        written.mkdir()
        save_file(hf_state(model), written / WEIGHTS, metadata={"format": "pt"})
        _write_json(written / "config.json", write_config(model))
        if vocabulary is not None:
            _write_processor(written, model.config, vocabulary)
        written.rename(folder)


def hf_state(model: Flava) -> dict[str, Tensor]:
    """All tensors of `FlavaForPreTraining`, under its names, without the image tokenizer.

    Poolers, which our model lacks, and heads that this model lacks have weights as that model
    initialises them, from a fixed seed.
    """
    state = {}
    for name, tensor in _published_state(model).items():
        names = _their_names(name)
        for their, part in zip(names, tensor.chunk(len(names)), strict=True):
            state[their] = part.reshape(_their_shape(name, part, model.config)).contiguous()
    draw = torch.Generator().manual_seed(0)
    for tower, width in _widths(model.config).items():
        pooler = f"flava.{tower}_model.pooler.dense"
        weight = torch.randn(width, width, generator=draw) * 0.02
        state[f"{pooler}.weight"] = weight.to(model.logit_scale.dtype)
        state[f"{pooler}.bias"] = torch.zeros(width, dtype=model.logit_scale.dtype)
    return {name: tensor.cpu() for name, tensor in state.items()}


def untrained_heads(model: Flava) -> list[str]:
    """Heads of the published model that this model lacks, since no loss of its run used them."""
    return [name for name in PUBLISHED_HEADS if not hasattr(model, f"{name}_head")]


def read_config(theirs: Mapping[str, Any]) -> FlavaConfig:
    """Our configuration from theirs; absent values have the defaults of the transformers library.

    Raises:
        PmdError: the model has an option that ours does not have.
    """
    parts = {part: _DEFAULTS[part] | dict(theirs.get(part) or {}) for part in _DEFAULTS}
    for part, fixed in _FIXED.items():
        for key, value in fixed.items():
            if parts[part].get(key, value) != value:
                raise PmdError(f"{part}.{key} is {parts[part][key]!r}; only {value!r} is supported")
    image, text, multimodal = parts.values()
    if not isinstance(image["image_size"], int) or not isinstance(image["patch_size"], int):
        raise PmdError(f"images of {image['image_size']} pixels are not square")
    eps = {part["layer_norm_eps"] for part in parts.values()}
    if len(eps) > 1:
        raise PmdError(f"layer_norm_eps differs between the encoders: {sorted(eps)}")
    ours = FlavaConfig()
    return FlavaConfig(
        image=_tower(image),
        text=_tower(text),
        multimodal=_tower(multimodal),
        image_size=image["image_size"],
        patch_size=image["patch_size"],
        image_vocab=image["vocab_size"],
        text_vocab=text["vocab_size"],
        text_positions=text["max_position_embeddings"],
        projection_dim=theirs.get("projection_dim", ours.projection_dim),
        mm_pad_mask=theirs.get("mm_pad_mask", ours.mm_pad_mask),
        norm_eps=eps.pop(),
        logit_scale=theirs.get("logit_scale_init_value", ours.logit_scale),
        logit_bias=theirs.get("logit_bias"),
    )


def write_config(model: Flava) -> dict[str, Any]:
    """Their configuration from ours.

    It also has `mm_pad_mask`, `logit_bias` and `untrained_heads`, which transformers ignores.
    """
    ours = model.config
    towers = {
        f"{name}_config": {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.hidden,
            "layer_norm_eps": ours.norm_eps,
        }
        | _FIXED[f"{name}_config"]
        for name, tower in _towers(ours).items()
    }
    towers["image_config"] |= {
        "image_size": ours.image_size,
        "patch_size": ours.patch_size,
        "vocab_size": ours.image_vocab,
    }
    towers["text_config"] |= {
        "max_position_embeddings": ours.text_positions,
        "vocab_size": ours.text_vocab,
    }
    bias = model.logit_bias
    return towers | {
        "architectures": ["FlavaForPreTraining"],
        "model_type": "flava",
        "dtype": str(model.logit_scale.dtype).removeprefix("torch."),
        "hidden_size": ours.multimodal.width,
        "image_codebook_config": {"vocab_size": ours.image_vocab},
        "init_codebook": False,
        "layer_norm_eps": ours.norm_eps,
        "logit_scale_init_value": ours.logit_scale,
        "projection_dim": ours.projection_dim,
        "mm_pad_mask": ours.mm_pad_mask,
        "logit_bias": None if bias is None else bias.item(),
        **({_UNTRAINED: untrained} if (untrained := untrained_heads(model)) else {}),
    }


_UNTRAINED = "untrained_heads"


_FIXED: dict[str, dict[str, Any]] = {
    "image_config": {
        "hidden_act": "gelu",
        "qkv_bias": True,
        "mask_token": True,
        "num_channels": 3,
    },
    "text_config": {
        "hidden_act": "gelu",
        "qkv_bias": True,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    },
    "multimodal_config": {"hidden_act": "gelu", "qkv_bias": True, "use_cls_token": True},
}

_TOWER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "image_config": _TOWER | {"image_size": 224, "patch_size": 16, "vocab_size": 8192},
    "text_config": _TOWER | {"vocab_size": 30_522, "max_position_embeddings": 512},
    "multimodal_config": _TOWER | {"num_hidden_layers": 6},
}

_RENAMED = (
    (r"^image\.cls$", "flava.image_model.embeddings.cls_token"),
    (r"^image\.mask$", "flava.image_model.embeddings.mask_token"),
    (r"^image\.positions$", "flava.image_model.embeddings.position_embeddings"),
    (r"^image\.patches\.", "flava.image_model.embeddings.patch_embeddings.projection."),
    (r"^text\.words\.", "flava.text_model.embeddings.word_embeddings."),
    (r"^text\.positions\.", "flava.text_model.embeddings.position_embeddings."),
    (r"^text\.types\.", "flava.text_model.embeddings.token_type_embeddings."),
    (r"^text\.embedding_norm\.", "flava.text_model.embeddings.LayerNorm."),
    (r"^multimodal\.cls$", "flava.multimodal_model.cls_token"),
    (r"^multimodal\.from_(image|text)\.", r"flava.\1_to_mm_projection."),
    (r"^(image|text|multimodal)\.norm\.", r"flava.\1_model.layernorm."),
    (r"^(image|text|multimodal)\.blocks\.", r"flava.\1_model.encoder.layer."),
    (r"(\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.layer\.\d+)\.proj\.", r"\1.attention.output.dense."),
    (r"(\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(\.layer\.\d+)\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.layer\.\d+)\.fc2\.", r"\1.output.dense."),
    (r"^(image_projection|text_projection|logit_scale)", r"flava.\1"),
    (r"^itm_head\.dense\.", "itm_head.pooler.dense."),
    (r"^itm_head\.classifier\.", "itm_head.seq_relationship."),
    (r"^(mim|mlm|mmm_image|mmm_text)_head\.dense\.", r"\1_head.transform.dense."),
    (r"^(mim|mlm|mmm_image|mmm_text)_head\.norm\.", r"\1_head.transform.LayerNorm."),
)

_UNUSED = re.compile(
    r"^image_codebook\.|_model\.pooler\.|_head\.bias$|\.embeddings\.(position|token_type)_ids$"
)


def _published_state(model: Flava) -> dict[str, Tensor]:
    """All tensors of the published model, under our names, untrained heads included."""
    state = {}
    for name, tensor in model.state_dict().items():
        head = re.fullmatch(r"(\w+)_head\..*", name)
        # the bias is in the configuration; heads of the user's own have no place there
        if name != "logit_bias" and (head is None or head[1] in PUBLISHED_HEADS):
            state[name] = tensor
    draw = torch.Generator().manual_seed(1)
    for name in untrained_heads(model):
        for key, tensor in PUBLISHED_HEADS[name](model.config).state_dict().items():
            fresh = torch.ones_like(tensor) if key == "norm.weight" else torch.zeros_like(tensor)
            if tensor.ndim > 1:
                fresh.normal_(std=0.02, generator=draw)
            state[f"{name}_head.{key}"] = fresh.to(model.logit_scale.dtype)
    return state


def _their_names(name: str) -> list[str]:
    """Their names of one of our tensors; three where ours is query, key and value together."""
    for pattern, other in _RENAMED:
        name = re.sub(pattern, other, name)
    if ".qkv." not in name:
        return [name]
    return [
        name.replace(".qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")
    ]


def _their_shape(name: str, part: Tensor, config: FlavaConfig) -> tuple[int, ...]:
    if name == "logit_scale":
        return ()
    if name == "image.patches.weight":
        return (len(part), 3, config.patch_size, config.patch_size)
    return tuple(part.shape)


def _joined(name: str, ours: Tensor, state: dict[str, Tensor], folder: Path) -> Tensor:
    """One of our tensors from theirs, which are removed from `state`."""
    parts = []
    for their in _their_names(name):
        # a tied pair, of which a file holds either
        key = their if their in state else their.replace(".decoder.bias", ".bias")
        if key not in state:
            raise PmdError(f"{folder}: {their} is missing; only FlavaForPreTraining has all")
        parts.append(state.pop(key))
    flat = torch.cat([part.reshape(-1) for part in parts])
    if flat.numel() != ours.numel():
        raise PmdError(
            f"{folder}: {name} has {flat.numel()} numbers, but {ours.numel()} by config.json"
        )
    return flat.view_as(ours)


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    state: dict[str, Tensor] = {}
    for name in names:
        # a name with a folder in it could lead out of this one
        if Path(name).name != name or not (folder / name).is_file():
            raise PmdError(f"{folder}: no {name}; save the model as safetensors first")
        state |= load_file(folder / name)
    return state


def _downloaded(name: str, revision: str | None) -> Path:
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        raise PmdError(f"{name}: no such folder; for a model of the hub, also give its commit")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only the hub needs it

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _tower(part: Mapping[str, Any]) -> TowerConfig:
    return TowerConfig(
        layers=part["num_hidden_layers"],
        width=part["hidden_size"],
        heads=part["num_attention_heads"],
        hidden=part["intermediate_size"],
    )


def _towers(config: FlavaConfig) -> dict[str, TowerConfig]:
    return {"image": config.image, "text": config.text, "multimodal": config.multimodal}


def _widths(config: FlavaConfig) -> dict[str, int]:
    return {name: tower.width for name, tower in _towers(config).items()}


def _write_processor(folder: Path, config: FlavaConfig, vocabulary: Sequence[str]) -> None:
    numbers = {token: number for number, token in enumerate(vocabulary)}
    BertWordPieceTokenizer(vocab=numbers, lowercase=True).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "processor_class": "FlavaProcessor",
            "do_lower_case": True,
            "model_max_length": config.text_positions,
        },
    )
    size = {"height": config.image_size, "width": config.image_size}
    half = {"height": config.image_size // 2, "width": config.image_size // 2}
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "FlavaImageProcessor",
            "processor_class": "FlavaProcessor",
            "size": size,
            "crop_size": size,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "input_size_patches": config.grid,
            "codebook_size": half,
            "codebook_crop_size": half,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
