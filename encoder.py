# SPDX-License-Identifier: MIT
"""A frozen open_clip image tower: spatial, dense and global features from one pass, and text features.

    tokens (B, D, Hf, Wf), pooled (B, E) = tower(images)      raw CLIP features, which a cache may store
    dense (B, E, Hf, Wf) = tower with another last attention  answers to text, cell by cell (`last_block`)
    spatial = spatial_proj(tokens)                            learned 1x1 convolution, D -> 256
    global  = pooled @ global_proj.T                          fixed semi-orthogonal matrix, E -> 256

`global` is the target of a consistency loss, and a learned matrix could shrink it to a constant. Angles
are kept at least as well as by other random projections (Johnson-Lindenstrauss). Text features pass
through the same matrix. `TimmTower` takes its tokens from a transformer of timm instead. The top of
fusion.py says what any image tower must offer.

CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
NACLIP: Hajimiri et al., "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic
Segmentation", WACV 2025.
Imports torch, open_clip, and timm, which comes with open_clip.
"""
import contextlib
import difflib
import hashlib
import importlib.util
import json
import re
import socket
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # model names that stand for a config and its weights
ATTENTIONS = ("naclip", "clearclip", "identity", "tips", "ordinary")


def set_tf32(products, convolutions):
    """Whether a GPU rounds factors of float32 matrix products and convolutions to the 10 bits of TF32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 announces other names; its compiler fails on them
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


@contextlib.contextmanager
def full_float32():
    """Without TF32, whatever is set."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # the old names cannot be read once the new ones were set
        before = (matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32")
    else:
        before = (matmul.allow_tf32, cudnn.allow_tf32)
    set_tf32(False, False)
    try:
        yield
    finally:
        set_tf32(*before)


def semi_orthogonal(rows, cols, seed=0):
    """A fixed float32 matrix (rows, cols) of orthonormal rows, or columns if rows > cols."""
    generator = torch.Generator().manual_seed(seed)
    shape = (max(rows, cols), min(rows, cols))
    q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    q = (q * r.diagonal().sign()).float()  # the signs differ between LAPACK builds
    return q.T.contiguous() if rows < cols else q


def whole_patches(size, patch):
    """The multiples of a patch (h, w) that are nearest to an image size (H, W)."""
    halves_down = 1e-3
    return tuple(max(1, round(side / p - halves_down)) * p for side, p in zip(size, patch))


def neighbor_bias(grid, sigma=5.0):
    """exp(-distance^2 / (2 sigma^2)) of patches in a grid (h, w) -> (1 + h * w, 1 + h * w).

    Distances are in patches. The first row and column, of the class token, are zero.
    """
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()  # (h * w, 2)
    distance2 = (place[:, None] - place).square().sum(-1)
    return F.pad(torch.exp(-distance2 / (2 * sigma**2)), (1, 0, 1, 0))


def last_block(block, x, grid, attention="naclip"):
    """The last block of a CLIP ViT, changed so that every patch keeps to its own place.

    block: open_clip's ResidualAttentionBlock. x (B, 1 + h * w, D): its input, the class token first.
    grid (h, w): of the patches. attention, with weights A, s the root of a head's width, and neither
    residual nor MLP in the first three:
        "naclip"     A = softmax(k k^T / s + neighbor_bias)
        "clearclip"  A = softmax(q q^T / s)  Lan et al., "ClearCLIP", ECCV 2024
        "identity"   A = 1, the value path   Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022
        "tips"       A = 1                   TIPSv2, arXiv 2604.12012
        "ordinary"   the block as it is
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r}: must be one of {', '.join(ATTENTIONS)}")
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, 1 + h * w, D / heads)
    if attention in ("identity", "tips"):
        out = v
    else:
        a, b = {"naclip": (k, k), "clearclip": (q, q), "ordinary": (q, k)}[attention]
        bias = neighbor_bias(grid).to(k) if attention == "naclip" else None
        out = F.scaled_dot_product_attention(a, b, v, attn_mask=bias)
    out = block.ls_1(attn.out_proj(out.transpose(1, 2).flatten(2)))
    if attention not in ("tips", "ordinary"):
        return out
    x = x + out
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@contextlib.contextmanager
def offline_without_network(seconds=5):
    """Lets the hub's client read only its cache if the hub cannot be reached, instead of retrying."""
    from huggingface_hub import constants  # open_clip's own client, installed with it
    before = constants.HF_HUB_OFFLINE
    if not before and {"http", "https", "all"}.isdisjoint(getproxies()):  # a proxy is the client's matter
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
    """open_clip's config of a model, a dict; ValueError or FileNotFoundError if it has none."""
    if model_name.startswith(WITH_WEIGHTS):
        kind, place = model_name.split(":", 1)
        path = Path(place) / "open_clip_config.json"
        try:
            if kind == "hf-hub":
                with offline_without_network():
                    path = open_clip.pretrained.download_pretrained_from_hf(place, filename=path.name)
            config = json.loads(Path(path).read_text())
            config["model_cfg"]["text_cfg"]  # a KeyError if it is missing
        except Exception as error:
            raise FileNotFoundError(f"CLIP model {model_name}: no usable open_clip_config.json ({error!r})") from error
        return config
    names = open_clip.list_models()
    if model_name not in names:
        near = ", ".join(difflib.get_close_matches(model_name, names, n=3, cutoff=0))
        raise ValueError(f"CLIP model {model_name!r} is unknown to open_clip; nearest: {near}")
    return {"model_cfg": open_clip.get_model_config(model_name)}


def image_scaling(model_name, pretrained, mean_std=None):
    """What `load_clip` cannot know of the scaling of images: {"mean": ..., "std": ...}, or nothing, {}.

    mean_std: a pair (mean, std), 3 numbers each, or a tag of the model. None: a tag knows its scaling,
    a "hf-hub:" or "local-dir:" config says it, and for random weights any will do. A file does not say:
    all tags of its model must agree. Raises ValueError if the scaling cannot be known.
    """
    if mean_std is not None and not isinstance(mean_std, str):
        values = torch.tensor(mean_std, dtype=torch.float64)
        if values.shape != (2, 3) or not values.isfinite().all() or (values[1] <= 0).any():
            raise ValueError(f"mean_std {mean_std}: must be 3 means and 3 positive standard deviations")
        return dict(zip(("mean", "std"), map(tuple, values.tolist())))
    tags = {}
    for tag in open_clip.list_pretrained_tags_by_model(model_name):
        config = open_clip.get_pretrained_cfg(model_name, tag)
        tags[tag] = {"mean": config["mean"], "std": config["std"]}
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
    known = "".join(f"\n  {tag}: {scaling}" for tag, scaling in tags.items()) or " none"
    raise ValueError(f"CLIP weights {pretrained}: the mean and std of their images must be given as mean_std, in "
                     f"numbers or as a tag of {model_name}, got {mean_std!r}; its tags:{known}")


def load_clip(model_name, pretrained):
    """An open_clip model. pretrained: a tag, a checkpoint file, or None for weights of a fixed seed.

    A name "hf-hub:OWNER/REPOSITORY" or "local-dir:FOLDER" brings its weights: pretrained is "own" or None.
    A tag sets the activation that its weights were trained with. A file does not tell: for weights
    trained with QuickGELU, such as OpenAI's, give a model name that ends in "-quickgelu". Raises
    ValueError for an unknown model or tag, a missing package, or a file that does not fit the model;
    FileNotFoundError if weights are neither here nor can be downloaded.
    """
    name = f"CLIP model {model_name}"
    text_tower = read_config(model_name)["model_cfg"]["text_cfg"].get("hf_model_name")
    if text_tower and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{name}: its text tower {text_tower} needs: pip install transformers")
    error_type = FileNotFoundError
    advice = ""
    hub = contextlib.nullcontext()
    if pretrained is None:
        options = {"load_weights": False, "pretrained_text": False}
    elif model_name.startswith(WITH_WEIGHTS):
        if pretrained != "own":
            raise ValueError(f"{name} brings weights: pretrained must be 'own' or None, got {pretrained!r}")
        options = {"require_pretrained": True}
        hub = offline_without_network()
    elif Path(pretrained).is_file():
        options = {"pretrained": str(pretrained)}
        error_type = ValueError
        advice = "; is it a file of weights of this model? Those of OpenAI's want a name that ends in -quickgelu"
    else:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if pretrained not in tags:
            raise ValueError(f"CLIP weights {pretrained!r}: no such file, and not a tag of {model_name}, "
                             f"which has {', '.join(tags) or 'none'}")
        # open_clip only warns if the names of model and tag disagree about the activation
        quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu"))
        options = {"pretrained": pretrained, "force_quick_gelu": quick_gelu}
        hub = offline_without_network()
        suffix = "-quickgelu" if quick_gelu and "quickgelu" not in model_name else ""
        advice = (". Without a network, download the file elsewhere and give its path instead of the "
                  f"tag, with model {model_name}{suffix}; or ask for random weights")
    try:
        with hub, torch.random.fork_rng(devices=[], enabled=pretrained is None):
            if pretrained is None:
                torch.manual_seed(0)  # the same weights in every run, and the global RNG untouched
            return open_clip.create_model(model_name, **options)
    except Exception as error:
        reason = str(error)
        if len(reason) > 500:  # it names every key that does not fit
            keys = list(dict.fromkeys(re.findall(r'"([\w.]+)"', reason)))[:3]
            reason = f"{reason.strip().splitlines()[0][:200]} keys such as {', '.join(keys)} do not fit"
        message = f"{name}: weights {pretrained or 'of a seed'} could not be loaded ({reason}){advice}"
        raise error_type(message) from error


def frozen(model, source):
    """The model in float32, in eval mode, without gradients; ValueError if a weight is not finite."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{source}: field {name} holds NaN or inf")
    return model.float().eval().requires_grad_(False)


def digest_of(text, model):
    """Hex digest of a text and of all weights of a model."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Enhanced2DEncoder(nn.Module):
    """Spatial and global CLIP features of images; CLIP is frozen, except for `trainable_blocks`.

    model_name, pretrained: see `load_clip`. mean_std: see `image_scaling`. embed_dim: of all outputs.
    image_size: int or (H, W), multiples of the patch size; None: what the model's own patches cover.
    trainable_blocks: the last k blocks get gradients and are in parameters and state dict.

    The frozen tower is not a registered submodule: no state dict or optimizer contains it, and
    `.train()` does not reach it. `.to()` does.
    """

    def __init__(self, model_name="ViT-B-16", pretrained="openai", embed_dim=256, image_size=None,
                 trainable_blocks=0, mean_std=None):
        super().__init__()
        scaling = image_scaling(model_name, pretrained, mean_std)
        clip = load_clip(model_name, pretrained)
        self.__dict__["clip"] = frozen(clip, f"CLIP weights {pretrained}")  # not registered
        self.model_name = model_name
        visual = clip.visual
        visual.preprocess_cfg = {**visual.preprocess_cfg, **scaling}
        for name in ("mean", "std"):
            value = torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        blocks = self._find_blocks()
        self._set_image_size(image_size)
        if not 0 <= trainable_blocks <= len(blocks):
            raise ValueError(f"trainable_blocks={trainable_blocks} of {model_name}'s {len(blocks)} blocks")
        self.blocks = list(blocks)  # a plain list registers nothing
        self.trainable = nn.ModuleList(blocks[len(blocks) - trainable_blocks:]).requires_grad_(True)
        tokens, pooled = self.encode(torch.zeros(1, 3, *self.image_size))
        self.spatial_proj = nn.Conv2d(tokens.shape[1], embed_dim, 1)
        self.register_buffer("global_proj", semi_orthogonal(embed_dim, pooled.shape[1]))

    def _find_blocks(self):
        """The tower's transformer blocks; ValueError if it is not a ViT whose tokens form one grid."""
        visual = self.clip.visual
        tower = getattr(visual, "trunk", visual)  # timm's
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            return visual.transformer.resblocks
        if hasattr(tower, "blocks") and hasattr(getattr(tower, "patch_embed", None), "grid_size"):
            return tower.blocks
        raise ValueError(f"CLIP model {self.model_name}: {type(tower).__name__} is not a vision transformer")

    def _set_image_size(self, image_size):
        """Sets image_size (H, W) and grid (Hf, Wf), and makes the tower take images of that size."""
        visual = self.clip.visual
        is_timm = hasattr(visual, "trunk")
        embed = visual.trunk.patch_embed if is_timm else visual
        native = embed.img_size if is_timm else visual.image_size
        native_grid = tuple(embed.grid_size)
        # The patches of a stem of convolutions are of its own output: divide the image by the grid.
        patch = [p if size // p == cells else size // cells
                 for size, p, cells in zip(native, embed.patch_size, native_grid)]
        if image_size is None:
            image_size = [cells * p for cells, p in zip(native_grid, patch)]
        elif isinstance(image_size, int):
            image_size = (image_size, image_size)
        nearest = whole_patches(image_size, patch)
        if len(nearest) != 2 or tuple(image_size) != nearest:
            raise ValueError(f"image_size {image_size}: must be multiples of the patch size {tuple(patch)} of "
                             f"{self.model_name}; nearest: --image-size {','.join(map(str, nearest))}")
        self.image_size = tuple(image_size)
        self.grid = tuple(size // p for size, p in zip(image_size, patch))
        if is_timm:
            visual.set_input_size(self.image_size)
        elif self.grid != native_grid:
            embedding = visual.positional_embedding  # (1 + Hf * Wf, D), class token first
            embedding.data = resample_abs_pos_embed(embedding.data[None], self.grid, native_grid)[0]
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
        """Hex digest of what raw features depend on: model, image size, scaling, layers, weights."""
        visual = self.clip.visual
        scaling = [*visual.preprocess_cfg["mean"], *visual.preprocess_cfg["std"]]
        stateless = {type(module).__name__ for module in visual.modules() if not module.state_dict()}
        return digest_of(f"{self.model_name} {self.image_size} {scaling} {sorted(stateless)}", visual)

    def encode(self, images):
        """images (B, 3, H, W), RGB in [0, 1] -> tokens (B, D, Hf, Wf), pooled (B, E): raw, in one pass.

        `pooled` equals open_clip's `encode_image` of the normalized images. Without TF32, as caches store
        them. Raises ValueError for another image size and for integers.
        """
        visual = self.clip.visual
        # With an attention pool, the final norm acts on the pooled feature and not on the tokens.
        norm = getattr(visual, "attn_pool", None) is None
        with self._grad_mode(), full_float32():
            out = visual.forward_intermediates(
                self._normalized(images), indices=1, output_fmt="NCHW", normalize_intermediates=norm)
            pooled = out["image_features"]
            if isinstance(self.clip, open_clip.CoCa):  # its encode_image normalizes, too
                pooled = F.normalize(pooled, dim=-1)
        return out["image_intermediates"][-1], pooled

    def encode_with_dense(self, images, attention="naclip"):
        """images (B, 3, H, W) -> tokens, pooled, dense: `encode` and `encode_dense` in one pass.

        attention: see `last_block`. Raises ValueError for towers without open_clip's blocks and head.
        """
        self._check_dense()
        visual = self.clip.visual
        with self._grad_mode(), full_float32():
            out = visual.forward_intermediates(
                self._normalized(images), indices=2, output_fmt="NLC", output_extra_tokens=True)
            before, last = out["image_intermediates"]  # (B, Hf * Wf, D)
            tokens = visual.ln_post(last)
            before = torch.cat([out["image_intermediates_prefix"][0], before], 1)  # (B, 1 + Hf * Wf, D)
            dense = last_block(visual.transformer.resblocks[-1], before, self.grid, attention)
            dense = F.normalize(visual.ln_post(dense[:, 1:]) @ visual.proj, dim=-1)
        return self._to_map(tokens), out["image_features"], self._to_map(dense)

    def encode_dense(self, images, attention="naclip"):
        """images (B, 3, H, W) -> unit vectors (B, E, Hf, Wf), comparable to `encode_prompts`."""
        return self.encode_with_dense(images, attention)[2]

    def _check_dense(self):
        visual = self.clip.visual
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            found = f"timm's {type(visual.trunk).__name__}"
        elif visual.attn_pool is not None:
            found = "an attention pool"
        elif len(visual.transformer.resblocks) < 2:
            found = "a single block"
        elif not isinstance(visual.transformer.resblocks[-1].attn, nn.MultiheadAttention):
            found = "a custom attention"
        else:
            return
        raise ValueError(f"CLIP model {self.model_name}: dense features need open_clip's own ViT with plain "
                         f"blocks and a linear head, such as ViT-B-16 or ViT-L-14; this one has {found}")

    def _to_map(self, x):  # (B, Hf * Wf, C) -> (B, C, Hf, Wf)
        return x.transpose(1, 2).unflatten(2, self.grid).contiguous()

    def _normalized(self, images):
        """Images as CLIP wants them; ValueError if they do not fit."""
        expected = (3, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise ValueError(f"images: expected floats (B, {', '.join(map(str, expected))}), "
                             f"got {images.dtype} {tuple(images.shape)}")
        return (images - self.mean) / self.std

    def _grad_mode(self):
        return torch.set_grad_enabled(len(self.trainable) > 0 and torch.is_grad_enabled())

    def project(self, tokens, pooled):
        """Raw tokens (B, D, Hf, Wf), pooled (B, E) -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        tokens = tokens.to(self.spatial_proj.weight.dtype)
        return self.spatial_proj(tokens), self.project_global(pooled)

    def project_global(self, pooled):
        """Raw global or text features (B, E) -> (B, 256), by the fixed matrix."""
        return F.linear(pooled.to(self.global_proj.dtype), self.global_proj)

    def project_dense_target(self, dense):
        """Dense features (B, E, Hf, Wf) -> targets (B, 256, Hf, Wf), by the fixed matrix."""
        return F.conv2d(dense.to(self.global_proj.dtype), self.global_proj[:, :, None, None])

    def forward(self, images):
        """images (B, 3, H, W), RGB in [0, 1] -> spatial (B, 256, Hf, Wf), global (B, 256)."""
        return self.project(*self.encode(images))

    def forward_spatial(self, images):
        """images (B, 3, H, W) -> spatial (B, 256, Hf, Wf)."""
        return self(images)[0]

    def forward_global(self, images):
        """images (B, 3, H, W) -> global (B, 256)."""
        return self(images)[1]

    def encode_text(self, prompts):
        """List of T strings -> (T, 256), in the space of the global feature; no gradients."""
        return self.project_global(self._text(prompts))

    def encode_prompts(self, prompts):
        """List of T strings -> unit vectors (T, E), comparable to `encode_dense`; no gradients."""
        return F.normalize(self._text(prompts), dim=-1)

    @torch.no_grad()
    def _text(self, prompts):
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of at least one string, got {prompts!r}")
        try:
            tokenizer = open_clip.get_tokenizer(self.model_name)
        except ImportError as error:
            message = f"CLIP model {self.model_name}: its tokenizer needs: pip install {error.name}"
            raise ValueError(message) from error
        except OSError as error:
            raise FileNotFoundError(f"CLIP model {self.model_name}: no tokenizer ({error})") from error
        tokens = tokenizer(prompts)
        longer = tokenizer(prompts, context_length=tokens.shape[1] + 1)
        for prompt, row in zip(prompts, longer):
            if row[-1] != 0:  # padding is 0
                raise ValueError(f"CLIP model {self.model_name} reads {tokens.shape[1]} tokens, and a prompt is "
                                 f"longer: {prompt[:80]!r} ...")
        return self.clip.encode_text(tokens.to(self.global_proj.device))


# -------------------------------------------------------------------------------- timm


def load_timm(name, pretrained=None):
    """A vision transformer of timm. name: such as "vit_base_patch14_dinov2", also with a tag.

    pretrained: a file of weights, None for timm's download, or "none" for weights of a fixed seed.
    Raises ValueError for an unknown model, one that is no transformer, and weights that cannot be had.
    """
    options = {"pretrained": pretrained != "none"}  # with its head: without one, timm takes any file
    hub = offline_without_network() if pretrained is None else contextlib.nullcontext()
    if pretrained not in (None, "none"):
        options["pretrained_cfg_overlay"] = {"file": pretrained, "source": "", "custom_load": False}
    try:
        with hub, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(name, **options)
    except Exception as error:  # timm raises many kinds
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3, cutoff=0))
        raise ValueError(f"timm model {name}, weights {pretrained or 'to download'}: {str(error)[:300]}; give a file "
                         f"of weights, or 'none' for random ones; names near it: {near}") from error
    takes_any_size = hasattr(model, "set_input_size") or hasattr(model, "embeds")  # the latter: NaFlexVit
    if not takes_any_size or not hasattr(model, "num_prefix_tokens"):
        raise ValueError(f"timm model {name}: {type(model).__name__} is not a vision transformer, or takes images of "
                         "one size alone")
    return frozen(model, f"timm weights {pretrained or name}")


class TimmTower(Enhanced2DEncoder):
    """Spatial features of a timm vision transformer; CLIP gives global, dense and text features.

    name: "timm:NAME". weights: see `load_timm`. clip: the arguments of `Enhanced2DEncoder`.
    The transformer sees the images with its own mean and std, resized to the nearest multiples of its
    patch size, so its grid may differ from CLIP's. Its class token and registers are dropped.
    """

    def __init__(self, name, weights=None, **clip):
        kind, _, model_name = name.partition(":")
        if kind != "timm":
            raise ValueError(f"--tower {name}: must be timm:NAME, such as timm:vit_base_patch14_dinov2")
        self.__dict__["timm"] = load_timm(model_name, weights)  # not registered
        super().__init__(**clip)
        self.timm_name = model_name
        self.blocks += self.timm.blocks

    def _set_image_size(self, image_size):
        super()._set_image_size(image_size)
        patch = self.timm.feature_info[-1]["reduction"]
        self.timm_size = whole_patches(self.image_size, (patch, patch))
        if hasattr(self.timm, "set_input_size"):  # NaFlexViT takes any
            self.timm.set_input_size(img_size=self.timm_size)
        for key in ("mean", "std"):
            value = torch.tensor(self.timm.pretrained_cfg[key]).view(3, 1, 1)
            self.register_buffer(f"timm_{key}", value, persistent=False)

    def _apply(self, fn, recurse=True):
        self.timm._apply(fn)
        return super()._apply(fn, recurse)

    def fingerprint(self):
        scaling = [self.timm.pretrained_cfg[key] for key in ("mean", "std")]
        return digest_of(f"{super().fingerprint()} {self.timm_name} {self.timm_size} {scaling}", self.timm)

    def encode(self, images):
        _, pooled = super().encode(images)
        return self._tokens(images), pooled

    def encode_with_dense(self, images, attention="naclip"):
        _, pooled, dense = super().encode_with_dense(images, attention)
        return self._tokens(images), pooled, dense

    @torch.no_grad()
    def _tokens(self, images):
        """images (B, 3, H, W) -> (B, D, Hf, Wf), after the final norm."""
        if self.timm_size != self.image_size:
            images = F.interpolate(images, self.timm_size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images - self.timm_mean) / self.timm_std
        with full_float32():
            tokens, = self.timm.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        return tokens
