# SPDX-License-Identifier: MIT
"""A frozen open_clip image tower: spatial, dense and global features from one pass, and text features.

    tokens (B, D, Hf, Wf), pooled (B, E) = tower(images)            raw CLIP features, which a cache may store
    dense (B, E, Hf, Wf) = tower with another last attention        answers to text, cell by cell: see `last_block`
    spatial = spatial_proj(tokens)                                  learned 1x1 convolution, D -> 256
    global  = pooled @ global_proj.T                                fixed semi-orthogonal matrix, E -> 256

`global` is the target of a consistency loss. Text features pass through the same matrix. A learned matrix could shrink
the target to a constant, which would minimize the loss without meaning, hence the fixed one. A semi-orthogonal matrix
keeps angles at least as well as other random projections (Johnson-Lindenstrauss).

CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
NACLIP: Hajimiri et al., "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic Segmentation",
WACV 2025.
Imports torch and open_clip.
"""
import contextlib
import difflib
import hashlib
import importlib.util
import json
import socket
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # model names that stand for a config and its weights
PROXIES = {"http", "https", "all"}
ATTENTIONS = ("naclip", "clearclip", "identity", "ordinary")


def set_tf32(products, convolutions):
    """Whether a GPU rounds the factors of float32 matrix products and convolutions to the 10 bits of TF32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 announces other names, but its compiler fails if those are set
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


@contextlib.contextmanager
def full_float32(device):
    """Without TF32, whatever is set."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # reading the old names raises an error if somebody has set the new ones
        before = (matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32")
    else:
        before = (matmul.allow_tf32, cudnn.allow_tf32)
    set_tf32(False, False)
    try:
        yield
    finally:
        set_tf32(*before)


def semi_orthogonal(rows, cols, seed=0):
    """A fixed (rows, cols) float32 matrix with orthonormal rows, or orthonormal columns if rows > cols."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(max(rows, cols), min(rows, cols), generator=generator, dtype=torch.float64))
    q = (q * r.diagonal().sign()).float()  # the signs differ between LAPACK builds
    return q.T.contiguous() if rows < cols else q


def resize_position_embedding(embedding, old_grid, new_grid):
    """Bicubic, antialiased resize of a ViT's position embedding, as open_clip does it when it loads weights.

    embedding (1 + h * w, D), the class token first -> (1 + h' * w', D). old_grid (h, w), new_grid (h', w').
    """
    class_token = embedding[:1]
    grid = embedding[1:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_token, grid.permute(0, 2, 3, 1).flatten(0, 2)])


def neighbour_bias(grid, sigma=5.0):
    """exp(-distance^2 / (2 sigma^2)) of patches in a grid (h, w), distances in patches -> (1 + h * w, 1 + h * w).

    The first row and column, of the class token, are zero.
    """
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()  # (h * w, 2)
    distance2 = (place[:, None] - place).square().sum(-1)
    return F.pad(torch.exp(-distance2 / (2 * sigma**2)), (1, 0, 1, 0))


def attend(attn, y, grid, attention):
    """The self-attention of a CLIP ViT with its own projections, but other weights A; see `last_block`.

    attn: nn.MultiheadAttention. y (B, 1 + h * w, D), the class token first, grid (h, w) -> (B, 1 + h * w, D).
    """
    qkv = F.linear(y, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1 + h * w, D / heads)
    if attention == "naclip":
        bias = neighbour_bias(grid).to(k)
        out = F.scaled_dot_product_attention(k, k, v, attn_mask=bias)
    elif attention == "clearclip":
        out = F.scaled_dot_product_attention(q, q, v)
    elif attention == "identity":
        out = v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return attn.out_proj(out.transpose(1, 2).flatten(2))


def last_block(block, x, grid, attention="naclip"):
    """The last block of a CLIP ViT, changed so that every patch keeps to its own place: x (B, 1 + h * w, D) -> same.

    block: open_clip's ResidualAttentionBlock. x: its input, the class token first. grid (h, w): of the patches.
    attention, with `A` over patches, s the root of a head's width, and no residual and no MLP in the first three:
        "naclip"     A = softmax(k k^T / s + neighbour_bias)
        "clearclip"  A = softmax(q q^T / s)       Lan et al., "ClearCLIP", ECCV 2024
        "identity"   A = 1, the value path        Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022
        "ordinary"   the block as it is, with residual and MLP
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r}: must be one of {', '.join(ATTENTIONS)}")
    out = block.ls_1(attend(block.attn, block.ln_1(x), grid, attention))
    if attention != "ordinary":
        return out
    x = x + out
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@contextlib.contextmanager
def offline_without_network(seconds=5):
    """Lets the hub client read only its cache meanwhile if the hub cannot be reached; its retries take a minute.

    Behind a proxy nothing is tried: there the client itself must find out.
    """
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if not before and PROXIES.isdisjoint(getproxies()):
        hub = urlsplit(constants.ENDPOINT)
        try:
            port = hub.port or (80 if hub.scheme == "http" else 443)
            socket.create_connection((hub.hostname, port), seconds).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_config(model_name):
    """open_clip's config of a model: a dict with "model_cfg" and, if it comes with weights, usually "preprocess_cfg".

    Raises ValueError for an unknown model, FileNotFoundError without the config of a "hf-hub:" or "local-dir:" name.
    """
    if model_name.startswith(WITH_WEIGHTS):
        kind, place = model_name.split(":", 1)
        try:
            path = Path(place) / "open_clip_config.json"
            if kind == "hf-hub":
                with offline_without_network():
                    path = Path(open_clip.pretrained.download_pretrained_from_hf(place, filename=path.name))
            config = json.loads(path.read_text())
            config["model_cfg"]["text_cfg"]  # a KeyError if it is missing
        except Exception as error:
            raise FileNotFoundError(f"CLIP model {model_name}: no usable open_clip_config.json ({error!r})") from error
        return config
    if model_name in open_clip.list_models():
        return {"model_cfg": open_clip.get_model_config(model_name)}
    near = difflib.get_close_matches(model_name, open_clip.list_models(), n=3, cutoff=0)
    raise ValueError(f"CLIP model {model_name!r} is unknown to open_clip; the nearest names: {', '.join(near)}")


def tag_scaling(model_name, tag):
    """How the images of open_clip's weights of that tag were scaled and resized."""
    config = open_clip.get_pretrained_cfg(model_name, tag)
    return {key: config[key] for key in ("mean", "std", "interpolation")}


def image_scaling(model_name, pretrained, mean_std=None):
    """What `load_clip` cannot know of the scaling of images: a dict with "mean" and "std", and maybe "interpolation".

    mean_std: a pair (mean, std), 3 numbers each, or a tag of the model. None: a tag knows its own scaling, a "hf-hub:"
    or "local-dir:" config says it, and for random weights any will do. A file does not say: all tags of its model must
    agree. Raises ValueError if the scaling cannot be known.
    """
    if mean_std is not None and not isinstance(mean_std, str):
        values = torch.tensor(mean_std, dtype=torch.float64)
        if values.shape != (2, 3) or not values.isfinite().all() or (values[1] <= 0).any():
            raise ValueError(f"mean_std {mean_std}: must be 3 means and 3 positive standard deviations")
        return {"mean": tuple(values[0].tolist()), "std": tuple(values[1].tolist())}
    tags = {tag: tag_scaling(model_name, tag) for tag in open_clip.list_pretrained_tags_by_model(model_name)}
    if mean_std in tags:
        return tags[mean_std]
    if mean_std is None:
        config = read_config(model_name).get("preprocess_cfg", {})
        is_tag = not model_name.startswith(WITH_WEIGHTS) and not Path(pretrained or "").is_file()
        if pretrained is None or is_tag or ("mean" in config and "std" in config):
            return {}
        scalings = list(tags.values())
        if scalings and all(scaling == scalings[0] for scaling in scalings):
            return scalings[0]
    known = "".join(f"\n  {tag}: mean {scaling['mean']}, std {scaling['std']}" for tag, scaling in tags.items())
    raise ValueError(f"{pretrained}: the mean and std of the images of these weights must be given as mean_std, in "
                     f"numbers or as a tag of {model_name}, got {mean_std!r}; its tags:{known or ' none'}")


def load_clip(model_name, pretrained):
    """An open_clip model. pretrained: a tag, the path of a checkpoint file, or None for random weights of a fixed seed.

    A name "hf-hub:OWNER/REPOSITORY" or "local-dir:FOLDER" brings its own weights: pretrained is "own", or None.
    A tag sets the activation that its weights were trained with. A file does not tell: for OpenAI's weights, and others
    trained with QuickGELU, give a model name that ends in "-quickgelu"; for mean and std see `image_scaling`.
    Raises ValueError for an unknown model or tag, a missing package, or a file that does not fit the model;
    FileNotFoundError if weights are neither here nor can be downloaded.
    """
    text_tower = read_config(model_name)["model_cfg"]["text_cfg"].get("hf_model_name")
    if text_tower and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"CLIP model {model_name}: its text tower {text_tower} needs the package transformers "
                         f"(pip install transformers)")
    if pretrained is None:
        with torch.random.fork_rng(devices=[]):  # the same weights in every run; the global RNG is left untouched
            torch.manual_seed(0)
            try:
                return open_clip.create_model(model_name, load_weights=False, pretrained_text=False)
            except OSError as error:
                raise FileNotFoundError(f"CLIP model {model_name}: could not be made ({error})") from error
    if model_name.startswith(WITH_WEIGHTS):
        if pretrained != "own":
            raise ValueError(f"CLIP model {model_name} brings its own weights: pretrained must be 'own', or None for "
                             f"random ones, got {pretrained!r}")
        try:
            with offline_without_network():
                return open_clip.create_model(model_name, require_pretrained=True)
        except Exception as error:
            raise FileNotFoundError(f"CLIP model {model_name}: its weights could not be loaded ({error})") from error
    if Path(pretrained).is_file():
        try:
            return open_clip.create_model(model_name, pretrained=str(pretrained))
        except Exception as error:
            raise ValueError(f"{pretrained}: not a checkpoint of CLIP model {model_name}: {error}") from error
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if pretrained not in tags:
        raise ValueError(f"CLIP weights {pretrained!r}: no such file, and not a tag of {model_name} "
                         f"(its tags: {', '.join(tags)})")
    # Some weights were trained with QuickGELU; open_clip only warns if the model name asks for another activation.
    quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu"))
    try:
        with offline_without_network():
            return open_clip.create_model(model_name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    except Exception as error:
        file_model = f"{model_name}-quickgelu" if quick_gelu and "quickgelu" not in model_name else model_name
        raise FileNotFoundError(
            f"CLIP weights {model_name}/{pretrained} could not be loaded ({error}). Without a network, download the "
            f"file elsewhere and give its path instead of the tag, with model {file_model}; or ask for random weights"
        ) from error


class Enhanced2DEncoder(nn.Module):
    """Spatial and global CLIP features of images; CLIP is frozen, except for `trainable_blocks`.

    model_name, pretrained: see `load_clip`. embed_dim: width of all outputs.
    image_size: int or (H, W), multiples of the patch size; None: the model's own, less what its patches do not cover.
    trainable_blocks: the last k transformer blocks are trained: they get gradients, are parameters of this module, and
        are in its state dict.
    mean_std: see `image_scaling`. `interpolation` is how the tower's own images were resized.

    The frozen tower is not a registered submodule: no state dict or optimizer contains it, and `.train()` does not
    reach it. `.to()` does.
    """

    def __init__(self, model_name="ViT-B-16", pretrained="openai", embed_dim=256, image_size=None, trainable_blocks=0,
                 mean_std=None):
        super().__init__()
        scaling = image_scaling(model_name, pretrained, mean_std)
        clip = load_clip(model_name, pretrained).float().eval().requires_grad_(False)
        for name, value in clip.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"CLIP weights {pretrained}: field {name} {tuple(value.shape)} holds NaN or inf")
        self.__dict__["clip"] = clip  # not registered
        self.model_name = model_name
        visual = clip.visual
        visual.preprocess_cfg = {**visual.preprocess_cfg, **scaling}
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1), persistent=False)
        self.interpolation = visual.preprocess_cfg["interpolation"]

        blocks = self._find_blocks()
        self._set_image_size(image_size)
        if not 0 <= trainable_blocks <= len(blocks):
            raise ValueError(f"trainable_blocks={trainable_blocks}: {model_name} has {len(blocks)} blocks")
        self.blocks = list(blocks)  # for torch.compile; a plain list registers nothing
        self.trainable = nn.ModuleList(blocks[len(blocks) - trainable_blocks:]).requires_grad_(True)

        with torch.no_grad():
            tokens, pooled = self.encode(torch.zeros(1, 3, *self.image_size))
        self.token_dim = tokens.shape[1]
        self.pooled_dim = pooled.shape[1]
        self.spatial_proj = nn.Conv2d(self.token_dim, embed_dim, 1)
        self.register_buffer("global_proj", semi_orthogonal(embed_dim, self.pooled_dim))

    def _find_blocks(self):
        """The tower's transformer blocks; ValueError if it is not a ViT whose tokens form one grid."""
        visual = self.clip.visual
        tower = getattr(visual, "trunk", visual)
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            return visual.transformer.resblocks
        if hasattr(tower, "blocks") and hasattr(getattr(tower, "patch_embed", None), "grid_size"):
            return tower.blocks
        raise ValueError(f"CLIP model {self.model_name}: not a vision transformer ({type(tower).__name__})")

    def _set_image_size(self, image_size):
        visual = self.clip.visual
        is_timm = hasattr(visual, "trunk")
        embed = visual.trunk.patch_embed if is_timm else visual
        native = embed.img_size if is_timm else visual.image_size
        native_grid = embed.grid_size
        # A stem of convolutions has patches of its own output, so the image's are its size over the grid.
        self.patch = tuple(patch if size // patch == cells else size // cells
                           for size, patch, cells in zip(native, embed.patch_size, native_grid))
        if image_size is None:
            image_size = tuple(cells * patch for cells, patch in zip(native_grid, self.patch))
        elif isinstance(image_size, int):
            image_size = (image_size, image_size)
        self.image_size = tuple(image_size)
        if len(self.image_size) != 2 or any(s < p or s % p for s, p in zip(self.image_size, self.patch)):
            raise ValueError(f"image_size {image_size}: both sides must be multiples of the patch size {self.patch}")
        self.grid = tuple(s // p for s, p in zip(self.image_size, self.patch))
        if is_timm:
            visual.set_input_size(self.image_size)
        elif self.grid != tuple(native_grid):
            embedding = resize_position_embedding(visual.positional_embedding.data, native_grid, self.grid)
            visual.positional_embedding = nn.Parameter(embedding, requires_grad=False)
            visual.image_size = self.image_size
            visual.grid_size = self.grid

    def _apply(self, fn, recurse=True):
        self.clip._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        super().train(mode)
        self.trainable.eval()  # trainable blocks run as the rest of CLIP does: without dropout
        return self

    def fingerprint(self):
        """Hex digest of all that the raw features depend on: model, image size, mean and std, layers, weights."""
        visual = self.clip.visual
        scaling = [*visual.preprocess_cfg["mean"], *visual.preprocess_cfg["std"]]
        stateless = {type(module).__name__ for module in visual.modules() if not module.state_dict()}  # the activation
        digest = hashlib.sha256(f"{self.model_name} {self.image_size} {scaling} {sorted(stateless)}".encode())
        for name, tensor in sorted(visual.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(self, images: Tensor):
        """images (B, 3, H, W), RGB in [0, 1] -> tokens (B, D, Hf, Wf), pooled (B, E): raw CLIP features in one pass.

        `pooled` equals open_clip's `encode_image` of the normalized images. On a GPU without TF32, because a cache may
        store them. Raises ValueError for another image size and for integers.
        """
        visual = self.clip.visual
        # With an attention pool, the final norm acts on the pooled feature and not on the tokens.
        normalize = getattr(visual, "attn_pool", None) is None
        with self._grad_mode(), full_float32(images.device):
            out = visual.forward_intermediates(self._normalized(images), indices=1, output_fmt="NCHW",
                                               normalize_intermediates=normalize)
            pooled = out["image_features"]
            if isinstance(self.clip, open_clip.CoCa):  # its encode_image normalizes, too
                pooled = F.normalize(pooled, dim=-1)
        return out["image_intermediates"][-1], pooled

    def encode_with_dense(self, images: Tensor, attention="naclip"):
        """images (B, 3, H, W), RGB in [0, 1] -> tokens, pooled as of `encode`, dense as of `encode_dense`, in one pass.

        Costs one attention more than `encode`.
        """
        self._check_dense()
        visual = self.clip.visual
        with self._grad_mode(), full_float32(images.device):
            out = visual.forward_intermediates(self._normalized(images), indices=2, output_fmt="NLC",
                                               output_extra_tokens=True)
            before, last = out["image_intermediates"]  # (B, Hf * Wf, D)
            before = torch.cat([out["image_intermediates_prefix"][0], before], 1)  # what the last block gets
            tokens = visual.ln_post(last)
            dense = last_block(visual.transformer.resblocks[-1], before, self.grid, attention)[:, 1:]
            dense = F.normalize(visual.ln_post(dense) @ visual.proj, dim=-1)
        return self._to_map(tokens), out["image_features"], self._to_map(dense)

    def encode_dense(self, images: Tensor, attention="naclip"):
        """images (B, 3, H, W), RGB in [0, 1] -> (B, E, Hf, Wf), unit vectors in the space of `encode_prompts`.

        The tower as it is, except for its last block: see `last_block` for the choices of attention. Raises ValueError
        for towers that are not open_clip's own ViT with a linear head.
        """
        return self.encode_with_dense(images, attention)[2]

    def _check_dense(self):
        visual = self.clip.visual
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            found = f"timm's {type(visual.trunk).__name__}"
        elif visual.attn_pool is not None:
            found = "an attention pool"
        elif len(visual.transformer.resblocks) < 2:
            found = "one block"
        elif not isinstance(visual.transformer.resblocks[-1].attn, nn.MultiheadAttention):
            found = "blocks of a custom attention"
        else:
            return
        raise ValueError(f"CLIP model {self.model_name}: dense features need open_clip's own ViT with plain blocks and "
                         f"a linear head, such as ViT-B-16, ViT-B-32, ViT-L-14 or ViT-H-14; this one has {found}")

    def _to_map(self, x):  # (B, Hf * Wf, C) -> (B, C, Hf, Wf)
        return x.transpose(1, 2).unflatten(2, self.grid).contiguous()

    def _normalized(self, images):
        """Images as CLIP wants them; ValueError if they do not fit."""
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.image_size) or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, 3, {self.image_size[0]}, {self.image_size[1]}), "
                             f"got {images.dtype} {tuple(images.shape)}")
        return (images - self.mean) / self.std

    def _grad_mode(self):
        return torch.set_grad_enabled(len(self.trainable) > 0 and torch.is_grad_enabled())

    def project(self, tokens: Tensor, pooled: Tensor):
        """Raw tokens (B, D, Hf, Wf), pooled (B, E) -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        return self.project_spatial(tokens), self.project_global(pooled)

    def project_spatial(self, tokens):
        """Raw tokens (B, D, Hf, Wf) -> spatial (B, 256, Hf, Wf), by the learned convolution."""
        return self.spatial_proj(tokens.to(self.spatial_proj.weight.dtype))

    def project_global(self, pooled):
        """Raw global or text features (B, E) -> (B, 256), by the fixed matrix."""
        return F.linear(pooled.to(self.global_proj.dtype), self.global_proj)

    def project_dense_target(self, dense):
        """Dense features (B, E, Hf, Wf) -> (B, 256, Hf, Wf), by the fixed matrix: a per-point loss target."""
        return F.conv2d(dense.to(self.global_proj.dtype), self.global_proj[:, :, None, None])

    def project_dense(self, tokens):
        """Raw tokens (B, D, Hf, Wf) -> (B, 256, Hf, Wf), in the space of the global feature.

        Applies CLIP's own output projection to every token, then the fixed matrix. What answers to text, and what the
        loss takes as its target, are the features of `encode_dense` instead. Raises ValueError, with the reason, if
        CLIP's output projection is not linear.
        """
        norm, weight, bias = self._linear_head()
        matrix = self.global_proj if weight is None else self.global_proj @ weight  # (256, D)
        offset = None if bias is None else self.global_proj @ bias
        tokens = norm(tokens.to(matrix.dtype).movedim(1, -1)).movedim(-1, 1)
        return F.conv2d(tokens, matrix[:, :, None, None], offset)

    def _linear_head(self):
        """What takes a pooled feature to CLIP's space: a norm, weight (E, D) and bias (E,), each None if there is none.
        """
        visual = self.clip.visual
        trunk = getattr(visual, "trunk", visual)
        if getattr(trunk, "attn_pool", None) is not None:
            reason = "its pooled feature comes from an attention pool over all tokens"
        elif trunk is visual:
            return nn.Identity(), visual.proj.T, None
        else:
            inert = (nn.Identity, nn.Dropout)
            head = [module for module in (trunk.head, *visual.head) if not isinstance(module, inert)]
            if not head:
                return trunk.fc_norm, None, None
            if len(head) == 1 and isinstance(head[0], nn.Linear):
                return trunk.fc_norm, head[0].weight, head[0].bias
            reason = f"its head is {', '.join(type(module).__name__ for module in head)}"
        raise ValueError(f"CLIP model {self.model_name}: a per-point target needs a linear map from tokens to the "
                         f"global feature, but {reason}")

    def forward(self, images: Tensor):
        """images (B, 3, H, W), RGB in [0, 1] -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        return self.project(*self.encode(images))

    def forward_spatial(self, images: Tensor):
        """images (B, 3, H, W) -> spatial (B, 256, Hf, Wf)."""
        tokens, _ = self.encode(images)
        return self.project_spatial(tokens)

    def forward_global(self, images: Tensor):
        """images (B, 3, H, W) -> global (B, 256)."""
        _, pooled = self.encode(images)
        return self.project_global(pooled)

    def encode_text(self, prompts):
        """List of T strings -> (T, 256), in the space of the global feature, without gradients to CLIP."""
        return self.project_global(self._text(prompts))

    def encode_prompts(self, prompts):
        """List of T strings -> (T, E), CLIP's own unit vectors, in the space of `encode_dense`; no gradients."""
        return F.normalize(self._text(prompts), dim=-1)

    @torch.no_grad()
    def _text(self, prompts):
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of at least one string, got {prompts!r}")
        try:
            tokenizer = open_clip.get_tokenizer(self.model_name)
        except ImportError as error:
            raise ValueError(f"CLIP model {self.model_name}: its tokenizer needs the package {error.name} (pip install "
                             f"{error.name})") from error
        except OSError as error:
            raise FileNotFoundError(f"CLIP model {self.model_name}: no tokenizer ({error})") from error
        return self.clip.encode_text(tokenizer(prompts).to(self.global_proj.device))
