"""FLAVA: an image, a text and a multimodal encoder, and the heads of its losses.

The paper is arXiv:2112.04482; `docs/model.md` lists what it leaves open and what this code does.
All three encoders consist of the same block. An encoder returns its states before the final
normalisation, because the multimodal encoder reads those; `encoder.norm` is applied only at the
positions that a head reads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F  # noqa: N812  # its name in all of PyTorch's documentation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flava_train.shapes import Bool, Float, Int, Shaped

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SCALE_RANGE = (0.0, math.log(100))
"""Range of `logit_scale`: temperatures from 1 to 0.01, as in CLIP."""


@dataclass(frozen=True)
class TowerConfig:
    """One encoder: blocks, width, attention heads, and width inside the feed-forward layer."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} cannot be split among {self.heads} heads")


@dataclass(frozen=True)
class FlavaConfig:
    """The whole model; the defaults are those of the paper and of the released weights.

    Args:
        image: ViT-B/16.
        text: the same, for tokens.
        multimodal: half as deep.
        image_size: pixels along each side in pretraining; for other sizes, positions are
            interpolated.
        patch_size: pixels along each side of a patch.
        image_vocab: size of the image tokenizer's vocabulary.
        text_vocab: size of the text tokenizer's vocabulary.
        text_positions: most tokens of a text.
        projection_dim: width of the contrastive embeddings. The paper states 512, the released
            weights and both public ports have 768.
        mm_pad_mask: exclude padding from attention in the multimodal encoder. The released
            weights were trained without this mask; then all texts must be padded to one length.
        norm_eps: epsilon of all layer normalisations.
        logit_scale: initial logarithm of the inverse temperature.
        logit_bias: initial bias of the logits, for the SigLIP loss; absent for the others.
    """

    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    multimodal: TowerConfig = TowerConfig(layers=6)
    image_size: int = 224
    patch_size: int = 16
    image_vocab: int = 8192
    text_vocab: int = 30_522
    text_positions: int = 512
    projection_dim: int = 768
    mm_pad_mask: bool = True
    norm_eps: float = 1e-12
    logit_scale: float = 2.6592
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"an image of {self.image_size} pixels cannot be cut into patches of "
                f"{self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along each side in pretraining."""
        return self.image_size // self.patch_size


class LayerNorm(nn.LayerNorm):
    """Computes in float32 or wider, as in the paper; the result has the dtype of the input."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Normalise the last axis."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(
            x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps
        )
        return normed.to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, tower: TowerConfig, eps: float) -> None:
        super().__init__()
        self.heads = tower.heads
        self.norm1 = LayerNorm(tower.width, eps)
        self.qkv = nn.Linear(tower.width, 3 * tower.width)
        self.proj = nn.Linear(tower.width, tower.width)
        self.norm2 = LayerNorm(tower.width, eps)
        self.fc1 = nn.Linear(tower.width, tower.hidden)
        self.fc2 = nn.Linear(tower.hidden, tower.width)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        attention_bias: Float[Tensor, "b 1 1 s"] | None,
        positions: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b out d"]:
        """New states at all positions, or at some; `attention_bias` is added to the logits."""
        normed = self.norm1(x)
        if positions is None:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        else:
            width = x.shape[2]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(gather(normed, positions), weight[:width], bias[:width])
            key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
            x = gather(x, positions)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )  # b h s e
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        fed: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + fed


class TransformerEncoder(nn.Module):
    """Blocks, and the normalisation that follows the last.

    With `recompute`, the backward pass computes activations inside blocks again instead of
    storing them (activation checkpointing).
    """

    def __init__(self, tower: TowerConfig, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(tower, eps) for _ in range(tower.layers))
        self.norm = LayerNorm(tower.width, eps)
        self.recompute = False

    def run(
        self,
        x: Float[Tensor, "b s d"],
        attention_mask: Bool[Tensor, "b s"] | None,
        positions: Int[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b out d"]:
        """States after the last block, before `norm`.

        Args:
            x: input states.
            attention_mask: false at positions that no position attends to; none masks nothing.
            positions: where states are returned; the last block computes only those. Default: all.
        """
        if torch.is_autocast_enabled(x.device.type):  # else float32 parameters would widen all sums
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if attention_mask is None else _attention_bias(attention_mask, x.dtype)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            at = positions if number == last else None
            if self.recompute:
                x = checkpoint(block, x, bias, at, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, bias, at)
        return x


class ImageEncoder(TransformerEncoder):
    """`[CLS]`, then patches row by row."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__(config.image, config.norm_eps)
        width = config.image.width
        self.patch_size = config.patch_size
        self.grid = config.grid
        self.patches = nn.Linear(3 * config.patch_size**2, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.register_buffer("mean", _per_channel(CLIP_MEAN).float() * 255, persistent=False)
        self.register_buffer("std", _per_channel(CLIP_STD).float() * 255, persistent=False)

    def forward(
        self,
        pixels: Shaped[Tensor, "b 3 height width"],
        patch_mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b out d"]:
        """States at all positions, or at some.

        Args:
            pixels: uint8, or floats that are already normalised; height and width are multiples
                of the patch size.
            patch_mask: true for patches that the mask token replaces.
            positions: 0 is `[CLS]`, 1 the first patch.
        """
        if not pixels.is_floating_point():
            pixels = (pixels - self.mean) / self.std
        size = self.patch_size
        high, wide = pixels.shape[2] // size, pixels.shape[3] // size
        squares = pixels.unflatten(3, (wide, size)).unflatten(2, (high, size))  # b 3 high p wide p
        x = self.patches(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # b n d
        if patch_mask is not None:
            x = torch.where(patch_mask[..., None], self.mask.to(x.dtype), x)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return self.run(x + self._position_embeddings(high, wide), None, positions)

    def _position_embeddings(self, high: int, wide: int) -> Float[Tensor, "1 1+{high}*{wide} d"]:
        if high == wide == self.grid:
            return self.positions
        square = self.positions[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, (high, wide), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


class TextEncoder(TransformerEncoder):
    """WordPiece tokens, `[CLS]` first."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__(config.text, config.norm_eps)
        width = config.text.width
        self.words = nn.Embedding(config.text_vocab, width, padding_idx=0)
        self.positions = nn.Embedding(config.text_positions, width)
        self.types = nn.Embedding(2, width)  # the second is never used, but published
        self.embedding_norm = LayerNorm(width, config.norm_eps)

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        lengths: Int[Tensor, " b"],
        positions: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b out d"]:
        """States at all positions, or at some; tokens after a row's length are masked."""
        length = tokens.shape[1]
        x = self.words(tokens) + self.positions.weight[:length] + self.types.weight[0]
        return self.run(self.embedding_norm(x), _length_mask(lengths, length), positions)


class MultimodalEncoder(TransformerEncoder):
    """`[CLS_M]`, then all states of the image, then all states of the text."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__(config.multimodal, config.norm_eps)
        width = config.multimodal.width
        self.pad_mask = config.mm_pad_mask
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.from_image = nn.Linear(config.image.width, width)
        self.from_text = nn.Linear(config.text.width, width)

    def forward(
        self,
        image: Float[Tensor, "b i d"],
        text: Float[Tensor, "b l e"],
        lengths: Int[Tensor, " b"],
        positions: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b out f"]:
        """States at all positions, or at some.

        Args:
            image: all states of the image encoder, before its final normalisation.
            text: all states of the text encoder, likewise.
            lengths: tokens of each text.
            positions: 0 is `[CLS_M]`, 1 the image's `[CLS]`; the text follows the image.
        """
        image, text = self.from_image(image), self.from_text(text)
        cls = self.cls.expand(len(image), -1, -1).to(image.dtype)
        x = torch.cat([cls, image, text], dim=1)
        before = 1 + image.shape[1]
        attention_mask = _length_mask(before + lengths, x.shape[1]) if self.pad_mask else None
        return self.run(x, attention_mask, positions)


class MaskedHead(nn.Module):
    """Logits over codes or tokens at masked positions."""

    def __init__(self, width: int, vocab: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps)
        self.decoder = nn.Linear(width, vocab)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b vocab"]:
        """Logits for states after the encoder's final normalisation."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.dense(x))))
        return logits


class MatchHead(nn.Module):
    """Image-text matching: logits for mismatched and matched."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """Logits for states of `[CLS_M]` after the final normalisation."""
        logits: Tensor = self.classifier(torch.tanh(self.dense(x)))
        return logits


HeadFactory = Callable[[FlavaConfig], nn.Module]
"""Makes the head of a loss for a model of this configuration."""


def _multimodal_head(vocab: Callable[[FlavaConfig], int]) -> HeadFactory:
    return lambda config: MaskedHead(config.multimodal.width, vocab(config), config.norm_eps)


PUBLISHED_HEADS: dict[str, HeadFactory] = {
    "mim": lambda config: MaskedHead(config.image.width, config.image_vocab, config.norm_eps),
    "mlm": lambda config: MaskedHead(config.text.width, config.text_vocab, config.norm_eps),
    "mmm_image": _multimodal_head(lambda config: config.image_vocab),
    "mmm_text": _multimodal_head(lambda config: config.text_vocab),
    "itm": lambda config: MatchHead(config.multimodal.width),
}
"""Heads of the published model, by the names of their losses."""


class Flava(nn.Module):
    """Three encoders, two projections, and a head for each loss that needs one.

    The poolers of the published model are left out: no loss trains them.

    Args:
        config: sizes.
        heads: by name of the loss; head `x` is the submodule `x_head`. The initial weights of one
            head do not depend on which others there are.
    """

    def __init__(
        self, config: FlavaConfig, heads: Mapping[str, HeadFactory] = PUBLISHED_HEADS
    ) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.multimodal = MultimodalEncoder(config)
        self.image_projection = nn.Linear(config.image.width, config.projection_dim)
        self.text_projection = nn.Linear(config.text.width, config.projection_dim)
        # one axis: FSDP2 shards parameters along the first, which a scalar does not have
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale))
        bias = config.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        # all of them draw random numbers, so that each has the same weights without the others
        for name, published in PUBLISHED_HEADS.items():
            self.add_module(f"{name}_head", published(config))
        self.initialize()
        for name in PUBLISHED_HEADS.keys() - heads.keys():
            delattr(self, f"{name}_head")
        for name, factory in heads.items():
            if name not in PUBLISHED_HEADS:
                self.add_module(f"{name}_head", _drawn_alone(factory, config, name))

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights from torch's generator.

        As published, except that `[CLS]`, the mask token and the positions of the image encoder
        are initialised as in ViT and BEiT. Both ports initialise them with zeros, which is
        suitable only because DINO's weights replace them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, LayerNorm):
                module.reset_parameters()
        self.text.words.weight[0] = 0
        for token in (self.image.cls, self.image.mask, self.image.positions):
            nn.init.normal_(token, std=0.02)
        nn.init.zeros_(self.multimodal.cls)

    def head(self, name: str) -> nn.Module:
        """The head of a loss."""
        return self.get_submodule(f"{name}_head")

    def embed_images(
        self, pixels: Shaped[Tensor, "b 3 height width"]
    ) -> Float[Tensor, "b projection"]:
        """Unit vectors in float32 or wider, comparable with those of texts."""
        states = self.image(pixels, positions=_first(pixels))[:, 0]
        return _unit(self.image_projection(self.image.norm(states)))

    def embed_texts(
        self, tokens: Int[Tensor, "b l"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b projection"]:
        """Unit vectors in float32 or wider, comparable with those of images."""
        states = self.text(tokens, lengths, _first(tokens))[:, 0]
        return _unit(self.text_projection(self.text.norm(states)))

    def compile_regions(self, *, backend: str = "inductor", most_shapes: int = 128) -> None:
        """Compile the blocks and the published kinds of heads, in place, for each shape.

        All blocks of an encoder share one compilation, whatever their number.

        Args:
            backend: of `torch.compile`.
            most_shapes: limit of compiled variants: encoders and heads, times widths, with and
                without gradient, for all positions or some. Above it torch runs eagerly.
        """
        limits = torch._dynamo.config  # noqa: SLF001  # the documented place of this limit
        limits.recompile_limit = max(limits.recompile_limit, most_shapes)
        for module in self.modules():
            if isinstance(module, Block | MaskedHead | MatchHead):
                module.compile(fullgraph=True, dynamic=False, backend=backend)


@torch.no_grad()
def load_dino(encoder: ImageEncoder, state: Mapping[str, Tensor]) -> None:
    """Load DINO's ViT-B/16 (`dino_vitbase16_pretrain.pth`) into an image encoder of its shape.

    DINO normalises pixels by ImageNet's mean and deviation, this model by CLIP's. The patch layer
    is changed by the difference, so that the encoder computes the same function as DINO (except
    for the epsilon of DINO's normalisations, 1e-6). The mask token, which DINO lacks, is not
    changed.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
    """
    renamed = {_dino_name(name): tensor for name, tensor in state.items()}
    ours = {name: tensor for name, tensor in encoder.state_dict().items() if name != "mask"}
    wrong = sorted(renamed.keys() ^ ours.keys())
    if wrong:
        raise ValueError(
            f"these are not the weights of a DINO ViT of {len(encoder.blocks)} blocks: "
            f"{wrong[:5]} are missing or unexpected"
        )
    kernel = renamed["patches.weight"]
    renamed["patches.weight"] = kernel.flatten(1)
    for name, tensor in renamed.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, not {tuple(ours[name].shape)}"
            )
    deviation = _per_channel(IMAGENET_STD)
    shift = (_per_channel(CLIP_MEAN) - _per_channel(IMAGENET_MEAN)) / deviation
    stretch = _per_channel(CLIP_STD) / deviation
    renamed["patches.bias"] = renamed["patches.bias"] + (kernel * shift).sum((1, 2, 3))
    renamed["patches.weight"] = (kernel * stretch).flatten(1)
    encoder.load_state_dict(renamed, strict=False)


def gather(states: Float[Tensor, "b s d"], positions: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The states at some positions of each row."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[2]))


def _drawn_alone(factory: HeadFactory, config: FlavaConfig, name: str) -> nn.Module:
    """A head whose weights depend on torch's seed and its name alone."""
    digest = sha256(f"{torch.initial_seed()} {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return factory(config)


def _first(rows: Shaped[Tensor, "b ..."]) -> Int[Tensor, "b 1"]:
    return torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)


def _dino_name(name: str) -> str:
    changed = {"cls_token": "cls", "pos_embed": "positions"}
    plain = name.replace("attn.", "").replace("mlp.", "").replace("patch_embed.proj", "patches")
    return changed.get(name, plain)


def _per_channel(values: tuple[float, float, float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _length_mask(lengths: Int[Tensor, " b"], width: int) -> Bool[Tensor, "b {width}"]:
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _attention_bias(
    attention_mask: Bool[Tensor, "b s"], dtype: torch.dtype
) -> Float[Tensor, "b 1 1 s"]:
    # added, not boolean: the fused kernels are faster with it; finite, so that no row is all NaN
    zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return zeros.masked_fill(~attention_mask, torch.finfo(dtype).min)[:, None, None]


def _unit(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
