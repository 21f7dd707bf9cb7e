# SPDX-License-Identifier: MIT
"""A frozen open_clip image tower that gives spatial and global features of a picture in one pass.

    tokens (B, D, Hf, Wf), pooled (B, E) = tower(images)            raw CLIP, what a feature cache stores
    spatial = spatial_proj(tokens)                                  learned 1x1 map, D -> 256
    global  = pooled @ global_proj.T                                fixed semi-orthogonal map, E -> 256

`global` (and the text features, which pass through the same map) is what a consistency loss pulls towards. A learned
map could shrink that target to a constant and so win the loss without meaning, hence a fixed one by default; a
semi-orthogonal one keeps angles as well as any random projection does (Johnson-Lindenstrauss).

CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
Imports torch and open_clip.
"""
import difflib
import hashlib
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def semi_orthogonal(rows, cols, seed=0):
    """A fixed (rows, cols) matrix whose rows (or columns, if there are more rows) are orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(max(rows, cols), min(rows, cols), generator=generator, dtype=torch.float64))
    q = (q * r.diagonal().sign()).float()  # LAPACK builds differ in these signs; the checkpoint should not
    return q.T.contiguous() if rows < cols else q


def resize_position_embedding(embedding, old_grid, new_grid):
    """Bicubic, antialiased resize of a ViT's position embedding, as open_clip does it on loading.

    embedding (1 + h * w, D) with the class token first; grids are (h, w). Returns (1 + h' * w', D).
    """
    token, grid = embedding[:1], embedding[1:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(0, 2)])


def load_clip(model_name, pretrained):
    """An open_clip model with the weights of a tag, of a checkpoint file, or (None) random ones from a fixed seed.

    A file does not say which activation it was trained with: weights of OpenAI (and of all tags with QuickGELU) from a
    file need the model name with "-quickgelu".
    Raises ValueError for an unknown model or tag or a file that does not fit it, and FileNotFoundError where the
    weights of a known tag cannot be had.
    """
    if model_name not in open_clip.list_models():
        near = difflib.get_close_matches(model_name, open_clip.list_models(), n=3, cutoff=0)
        raise ValueError(f"CLIP model {model_name!r} is unknown to open_clip; the nearest names: {', '.join(near)}")
    if pretrained is None:
        with torch.random.fork_rng(devices=[]):  # the same random tower in every run, whatever was drawn before
            torch.manual_seed(0)
            return open_clip.create_model(model_name, pretrained_text=False)
    if Path(pretrained).is_file():
        try:
            return open_clip.create_model(model_name, pretrained=str(pretrained))
        except Exception as error:
            raise ValueError(f"{pretrained}: not a checkpoint of CLIP model {model_name}: {error}") from error
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if pretrained not in tags:
        raise ValueError(f"CLIP weights {pretrained!r}: no such file, and not a tag of {model_name} "
                         f"(its tags: {', '.join(tags)})")
    # OpenAI's weights were trained with QuickGELU; open_clip only warns where the name asks for another activation.
    quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu"))
    try:
        return open_clip.create_model(model_name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    except Exception as error:
        named = model_name if not quick_gelu or "quickgelu" in model_name else f"{model_name}-quickgelu"
        raise FileNotFoundError(
            f"CLIP weights {model_name}/{pretrained} could not be had ({error}). Download them where there is a "
            f"network and give the file's path instead of the tag, with model {named}, or ask for random weights on "
            "purpose"
        ) from error


class Enhanced2DEncoder(nn.Module):
    """Spatial and global CLIP features of a picture; everything of CLIP is frozen unless blocks are freed.

    model_name, pretrained: open_clip's names; `pretrained` may also be a checkpoint path, or None for random weights.
    embed_dim: width of all outputs. image_size: int or (H, W), multiples of the patch; None takes the model's own.
    trainable_blocks: the last k transformer blocks get gradients, an optimizer entry and a place in the state dict.
    learn_global_proj: make the map of the global and text features a learned one (it may then collapse).

    The frozen tower is deliberately not a registered submodule: it is in no state dict, no optimizer and no
    `.train()`, but it follows `.to()`.
    """

    def __init__(self, model_name="ViT-B-16", pretrained="openai", embed_dim=256, image_size=None,
                 trainable_blocks=0, learn_global_proj=False):
        super().__init__()
        clip = load_clip(model_name, pretrained).float().eval().requires_grad_(False)
        self.__dict__["clip"] = clip
        self.model_name = model_name
        visual = clip.visual
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1), persistent=False)
        is_timm = hasattr(visual, "trunk")
        if is_timm and not hasattr(visual.trunk, "patch_embed") or not is_timm and not hasattr(visual, "patch_size"):
            raise ValueError(f"CLIP model {model_name}: not a vision transformer ({type(visual).__name__})")
        self.patch = tuple(visual.trunk.patch_embed.patch_size if is_timm else visual.patch_size)
        blocks = visual.trunk.blocks if is_timm else visual.transformer.resblocks

        native = tuple(visual.image_size)
        size = native if image_size is None else (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = tuple(size)
        if len(self.image_size) != 2 or any(s < p or s % p for s, p in zip(self.image_size, self.patch)):
            raise ValueError(f"image_size {image_size}: both sides must be multiples of the patch {self.patch}")
        self.grid = tuple(s // p for s, p in zip(self.image_size, self.patch))
        if is_timm:
            visual.set_input_size(self.image_size)
        elif self.image_size != native:
            embedding = resize_position_embedding(visual.positional_embedding.data, visual.grid_size, self.grid)
            visual.positional_embedding = nn.Parameter(embedding, requires_grad=False)
            visual.image_size, visual.grid_size = self.image_size, self.grid

        if not 0 <= trainable_blocks <= len(blocks):
            raise ValueError(f"trainable_blocks={trainable_blocks}: {model_name} has {len(blocks)} blocks")
        self.blocks = list(blocks)  # of the tower, for torch.compile; a list registers nothing
        self.trainable = nn.ModuleList(blocks[len(blocks) - trainable_blocks:]).requires_grad_(True)

        with torch.no_grad():
            tokens, pooled = self.encode(torch.zeros(1, 3, *self.image_size))
        self.token_dim, self.pooled_dim = tokens.shape[1], pooled.shape[1]
        self.spatial_proj = nn.Conv2d(self.token_dim, embed_dim, 1)
        matrix = semi_orthogonal(embed_dim, self.pooled_dim)
        if learn_global_proj:
            self.global_proj = nn.Parameter(matrix)
        else:
            self.register_buffer("global_proj", matrix)

    def _apply(self, fn, recurse=True):
        self.clip._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        super().train(mode)
        self.trainable.eval()  # freed blocks learn, but as CLIP runs them: without dropout
        return self

    def fingerprint(self):
        """Hex digest of everything that the raw features depend on: model, input size and scaling, layers, weights."""
        visual = self.clip.visual
        scaling = [*visual.preprocess_cfg["mean"], *visual.preprocess_cfg["std"]]
        without_weights = sorted({type(m).__name__ for m in visual.modules() if not m.state_dict()})  # the activation
        digest = hashlib.sha256(f"{self.model_name} {self.image_size} {scaling} {without_weights}".encode())
        for name, tensor in sorted(visual.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, images: Tensor):
        """images (B, 3, H, W), RGB in [0, 1] -> tokens (B, D, Hf, Wf), pooled (B, E): raw CLIP features, one pass.

        `pooled` equals open_clip's `encode_image` of the normalised picture. Raises ValueError for another size or for
        integers.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.image_size) or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, 3, {self.image_size[0]}, {self.image_size[1]}), "
                             f"got {images.dtype} {tuple(images.shape)}")
        visual = self.clip.visual
        with torch.set_grad_enabled(len(self.trainable) > 0 and torch.is_grad_enabled()):
            out = visual.forward_intermediates(  # where attention pools, the final norm is not one of tokens
                (images - self.mean) / self.std, indices=1, output_fmt="NCHW",
                normalize_intermediates=getattr(visual, "attn_pool", None) is None)
        return out["image_intermediates"][-1], out["image_features"]

    def project(self, tokens: Tensor, pooled: Tensor):
        """Raw tokens (B, D, Hf, Wf), pooled (B, E) -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        return self.project_spatial(tokens), self.project_global(pooled)

    def project_spatial(self, tokens):
        """Raw tokens (B, D, Hf, Wf) -> spatial (B, 256, Hf, Wf) through the learned map."""
        return self.spatial_proj(tokens.to(self.spatial_proj.weight.dtype))

    def project_global(self, pooled):
        """Raw global or text features (B, E) -> (B, 256) through the fixed map."""
        return F.linear(pooled.to(self.global_proj.dtype), self.global_proj)

    def project_dense(self, tokens):
        """Raw tokens (B, D, Hf, Wf) -> (B, 256, Hf, Wf) in the space of the global feature: a per-point loss target.

        CLIP's own output projection is applied to every token (as in MaskCLIP, Zhou et al. 2022), then the fixed map,
        so this target cannot collapse either.
        """
        visual = self.clip.visual
        if not hasattr(visual, "proj") or visual.attn_pool is not None:
            raise ValueError(f"CLIP model {self.model_name}: a per-point target needs a linear map from tokens to the "
                             f"global feature, which the head of {type(visual).__name__} is not")
        matrix = self.global_proj if visual.proj is None else self.global_proj @ visual.proj.T
        return F.conv2d(tokens.to(matrix.dtype), matrix[:, :, None, None])

    def forward(self, images: Tensor):
        """images (B, 3, H, W), RGB in [0, 1] -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        return self.project(*self.encode(images))

    def forward_spatial(self, images: Tensor):
        """images (B, 3, H, W) -> spatial (B, 256, Hf, Wf)."""
        return self.project_spatial(self.encode(images)[0])

    def forward_global(self, images: Tensor):
        """images (B, 3, H, W) -> global (B, 256)."""
        return self.project_global(self.encode(images)[1])

    def encode_text(self, prompts):
        """A list of T strings -> (T, 256), in the space of the global feature; never with a gradient to CLIP."""
        with torch.no_grad():
            text = self.clip.encode_text(open_clip.get_tokenizer(self.model_name)(prompts).to(self.global_proj.device))
        return self.project_global(text)
