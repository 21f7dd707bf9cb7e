# SPDX-License-Identifier: MIT
"""encoder.py: CLIP's own numbers from one pass, any image size, frozen in every sense, clear refusals.

The towers are tiny open_clip models of the same classes as the real ones.
"""
import copy
import importlib.util
import io
import json
import math
import os
import re
import socket
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import encoder as encoder_module
from encoder import (ATTENTIONS, Enhanced2DEncoder, full_float32, image_scaling, last_block, load_clip, load_timm,
                     offline_without_network, semi_orthogonal, set_tf32)

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}


def tower(**vision):
    """The config of a tiny model, whose image tower differs from VISION."""
    return {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": {**VISION, **vision}}


TOWERS = {
    "tiny-vit": tower(),
    "tiny-vit-quickgelu": {**tower(), "quick_gelu": True},
    "tiny-scaled": tower(ls_init_value=0.3),
    "tiny-short": tower(layers=1),
    "tiny-average": tower(pool_type="avg", final_ln_after_pool=True),
    "tiny-attention-pool": tower(attentional_pool=True, attn_pooler_heads=2),
    "tiny-timm": {**tower(timm_model_name="vit_tiny_patch16_224", timm_model_pretrained=False, timm_pool="map",
                          timm_proj="none"), "embed_dim": 192},
    "tiny-timm-average": tower(timm_model_name="test_vit2", timm_pool="avg", timm_proj="linear", image_size=160),
    "tiny-uneven": tower(image_size=(66, 75)),
    "tiny-coca": {**tower(attentional_pool=True, attn_pooler_heads=2, output_tokens=True), "custom_text": True,
                  "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
                  "multimodal_cfg": {**TEXT, "context_length": 76}},
    "tiny-resnet": tower(layers=[1, 1, 1, 1], width=16, patch_size=None)}
VITS = [name for name in TOWERS if name not in ("tiny-resnet", "tiny-uneven")]
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.fixture(scope="module", autouse=True)
def towers(tmp_path_factory):
    """Makes the tiny models known to open_clip under their names."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def checkpoint(towers, tmp_path_factory):
    """A file of weights of tiny-vit that no seed of the encoder draws."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(open_clip.create_model("tiny-vit").state_dict(), path)
    return path


def sample_images(encoder, b=2):
    images = torch.rand(b, 3, *encoder.image_size, generator=torch.Generator().manual_seed(1))
    return images.to(encoder.global_proj.device)


def normalized(images, mean=OPENAI[0], std=OPENAI[1]):
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)


def from_file(checkpoint, **options):
    return Enhanced2DEncoder("tiny-vit", checkpoint, mean_std=OPENAI, **options)


# -------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", VITS)
def test_pooled_equals_open_clips_encode_image(device, name):
    encoder = Enhanced2DEncoder(name, None, image_size=(64, 96)).to(device)
    images = sample_images(encoder)
    tokens, pooled = encoder.encode(images)
    cfg = encoder.clip.visual.preprocess_cfg
    with torch.no_grad():
        expected = encoder.clip.encode_image(normalized(images, cfg["mean"], cfg["std"]))
    assert_close(pooled, expected, rtol=1e-5, atol=1e-6)  # of a CoCa: both are normalized
    assert tokens.shape[0] == 2 and tokens.shape[2:] == encoder.grid == (4, 6)


@pytest.mark.parametrize("field, bad", [("visual.conv1.weight", math.nan), ("text_projection", math.inf)])
def test_weights_of_a_file_with_nan_or_inf_are_refused_by_name(checkpoint, tmp_path, field, bad):
    weights = torch.load(checkpoint, weights_only=True)
    weights[field].view(-1)[3] = bad
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt: field {field} holds NaN or inf"):
        from_file(tmp_path / "bad.pt")


def inner(encoder, images):
    """What the last block of a tiny-vit gets, and what it gives, in one pass: (B, 1 + L, D)."""
    seen = []
    block = encoder.clip.visual.transformer.resblocks[-1]
    hook = block.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    features = encoder.encode(images)
    hook.remove()
    before, after = seen
    return block, before, after, features


@torch.no_grad()
def test_tokens_are_the_last_blocks_output_after_the_final_norm_in_image_order(checkpoint):
    encoder = from_file(checkpoint, image_size=(32, 96))
    *_, after, (tokens, pooled) = inner(encoder, sample_images(encoder))
    expected = encoder.clip.visual.ln_post(after)
    assert_close(tokens.flatten(2).mT, expected[:, 1:])
    assert_close(pooled, expected[:, 0] @ encoder.clip.visual.proj)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-timm"])
def test_all_ways_to_the_features_agree_alone_and_in_a_batch(name):
    encoder = Enhanced2DEncoder(name, None, embed_dim=48, image_size=64)
    images = sample_images(encoder, 3)
    spatial, global_ = encoder(images)
    assert spatial.shape == (3, 48, 4, 4) and global_.shape == (3, 48)
    assert torch.equal(encoder.forward_spatial(images), spatial)
    assert torch.equal(encoder.forward_global(images), global_)
    for whole, part in zip((spatial, global_), zip(*[encoder(image[None]) for image in images])):
        assert_close(whole, torch.cat(part), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- dense features


@pytest.mark.parametrize("name, size", [("tiny-vit", (64, 64)), ("tiny-vit", (32, 96)), ("tiny-scaled", (64, 64)),
                                        ("tiny-vit-quickgelu", (64, 64)), ("tiny-average", (64, 64))])
@torch.no_grad()
def test_with_the_ordinary_block_the_dense_code_equals_encode_image(name, size):
    encoder = Enhanced2DEncoder(name, None, image_size=size)
    visual, images = encoder.clip.visual, sample_images(encoder)
    block, before, after, (tokens, pooled) = inner(encoder, images)
    assert_close(last_block(block, before, encoder.grid, "ordinary"), after, rtol=1e-5, atol=1e-5)
    expected = F.normalize(visual.proj.T @ tokens.flatten(2), dim=1).unflatten(2, encoder.grid)
    assert_close(encoder.encode_dense(images, "ordinary"), expected, rtol=1e-5, atol=1e-5)
    if name != "tiny-average":
        ours = visual.ln_post(last_block(block, before, encoder.grid, "ordinary"))[:, 0] @ visual.proj
        assert_close(ours, pooled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dense_features_equal_those_written_out_head_by_head_in_float64():
    encoder = Enhanced2DEncoder("tiny-vit", None, image_size=(32, 96))
    visual, images = encoder.clip.visual, sample_images(encoder)
    block, before, *_ = inner(encoder, images)
    rows, columns = np.divmod(np.arange(12), 6)
    distance2 = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    bias = np.zeros((13, 13))
    bias[1:, 1:] = np.exp(-distance2 / 50)

    y = block.ln_1(before).double().numpy()
    weight, offset = (x.double().numpy() for x in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    q, k, v = (y @ weight[i:i + 64].T + offset[i:i + 64] for i in (0, 64, 128))
    heads = {name: [] for name in ("naclip", "clearclip", "identity", "tips")}
    for h in (slice(0, 32), slice(32, 64)):
        for name, logits in (("naclip", k[..., h] @ k[..., h].transpose(0, 2, 1) / 32**0.5 + bias),
                             ("clearclip", q[..., h] @ q[..., h].transpose(0, 2, 1) / 32**0.5)):
            a = np.exp(logits - logits.max(-1, keepdims=True))
            heads[name].append(a / a.sum(-1, keepdims=True) @ v[..., h])
        heads["identity"].append(v[..., h])
        heads["tips"].append(v[..., h])
    exact, norm = copy.deepcopy(block).double(), copy.deepcopy(visual.ln_post).double()
    for name, parts in heads.items():
        out = exact.attn.out_proj(torch.tensor(np.concatenate(parts, -1)))
        if name == "tips":
            out = out + before.double()
            out = out + exact.mlp(exact.ln_2(out))
        expected = F.normalize(norm(out)[:, 1:] @ visual.proj.double(), dim=-1)
        dense = encoder.encode_dense(images, name)
        assert dense.shape == (2, 32, 2, 6)
        assert_close(dense.double(), expected.transpose(1, 2).unflatten(2, (2, 6)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_pass_gives_the_features_of_encode_and_dense_ones_that_differ_by_the_attention():
    encoder = Enhanced2DEncoder("tiny-vit", None, image_size=(32, 96))
    images = sample_images(encoder)
    tokens, pooled, dense = encoder.encode_with_dense(images)
    assert all(map(torch.equal, encoder.encode(images), (tokens, pooled)))
    different = [encoder.encode_dense(images, attention) for attention in ATTENTIONS]
    assert torch.equal(different[0], dense)
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(different) for b in different[:i])


def test_the_dense_target_is_the_fixed_map_of_unit_vectors_and_has_no_gradient():
    encoder = Enhanced2DEncoder("tiny-vit", None, embed_dim=64)  # 32 -> 64 keeps all angles and norms
    dense = encoder.encode_dense(sample_images(encoder))
    target = encoder.project_dense_target(dense.half())
    assert target.shape == (2, 64, 4, 4) and not target.requires_grad
    assert_close(dense.norm(dim=1), torch.ones(2, 4, 4))
    assert_close(target.norm(dim=1), torch.ones(2, 4, 4), rtol=1e-3, atol=1e-3)
    assert_close(target[1, :, 2, 3], encoder.project_global(dense[1:, :, 2, 3])[0], rtol=1e-2, atol=1e-3)


# -------------------------------------------------------------------------------- image size


@pytest.mark.parametrize("size", [(96, 96), (32, 32), (48, 80), (32, 128)])  # the last has as many patches as 64 x 64
def test_position_embedding_is_resized_as_open_clip_does(checkpoint, size):
    encoder = from_file(checkpoint, image_size=size)
    grid = (size[0] // 16, size[1] // 16)
    native = torch.load(checkpoint, weights_only=True)["visual.positional_embedding"]
    if grid[0] * grid[1] != 16:
        model = open_clip.create_model("tiny-vit", pretrained=str(checkpoint), force_image_size=size).eval()
        assert torch.equal(encoder.clip.visual.positional_embedding, model.visual.positional_embedding)
        images = sample_images(encoder)
        with torch.no_grad():
            assert_close(encoder.encode(images)[1], model.encode_image(normalized(images)))
    else:  # open_clip compares counts only, and would read the rows of one grid as those of another
        expected = F.interpolate(native[1:].T.view(1, -1, 4, 4), grid, mode="bicubic", antialias=True)
        assert_close(encoder.clip.visual.positional_embedding[1:].T, expected[0].flatten(1))
    assert torch.equal(encoder.clip.visual.positional_embedding[0], native[0])
    assert encoder.image_size == size and encoder.grid == grid
    assert encoder.encode(sample_images(encoder))[0].shape == (2, 64, *grid)


def test_the_border_that_the_patches_do_not_cover_is_left_out():
    """As of SO400M at 384: 27 patches of 14 cover 378 pixels."""
    encoder = Enhanced2DEncoder("tiny-uneven", None)
    assert encoder.image_size == (64, 64) and encoder.grid == (4, 4)
    images = torch.rand(2, 3, 66, 75)
    with torch.no_grad():
        expected = open_clip.create_model("tiny-uneven").eval()
        expected.load_state_dict(encoder.clip.state_dict())  # no position embedding was resized
        assert_close(encoder.encode(images[..., :64, :64])[1], expected.encode_image(normalized(images)))


# -------------------------------------------------------------------------------- frozen


def test_frozen_in_every_sense(checkpoint):
    encoder = from_file(checkpoint)
    before = copy.deepcopy(encoder.clip.state_dict())
    assert [name for name, _ in encoder.named_parameters()] == ["spatial_proj.weight", "spatial_proj.bias"]
    assert sorted(encoder.state_dict()) == ["global_proj", "spatial_proj.bias", "spatial_proj.weight"]
    encoder.train().requires_grad_(True)
    assert not any(m.training for m in encoder.clip.modules())
    images = sample_images(encoder).requires_grad_()
    tokens, pooled = encoder.encode(images)
    assert not tokens.requires_grad and not pooled.requires_grad and not any(
        p.requires_grad for p in encoder.clip.parameters())
    spatial, global_ = encoder(images)
    assert not global_.requires_grad and not encoder.encode_text(["a chair"]).requires_grad
    spatial.sum().backward()
    torch.optim.SGD(encoder.parameters(), 1.0, weight_decay=1.0).step()
    assert images.grad is None and all(p.grad is None for p in encoder.clip.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.clip.state_dict().items())
    encoder.clip.requires_grad_(True)  # even then
    assert not any(x.requires_grad for x in (*encoder.encode(images), encoder.encode_text(["a chair"])))


def test_inside_a_larger_model_the_tower_moves_along_but_is_no_part_of_its_state():
    model = nn.Sequential(Enhanced2DEncoder("tiny-vit", None)).train().double()
    assert not model[0].clip.training and not any("clip" in name for name in model.state_dict())
    assert model[0].encode(sample_images(model[0]).double())[1].dtype == torch.float64
    meta = copy.deepcopy(model).to("meta")
    assert all(p.is_meta for p in meta[0].clip.parameters()) and not model[0].clip.visual.proj.is_meta


@pytest.mark.parametrize("name, k", [("tiny-vit", 1), ("tiny-vit", 2), ("tiny-vit", 3), ("tiny-timm", 2)])
def test_trainable_blocks_get_gradients_and_nothing_else_does(name, k):
    encoder = Enhanced2DEncoder(name, None, image_size=64, trainable_blocks=k).train()
    visual = encoder.clip.visual
    blocks = list(visual.trunk.blocks if name == "tiny-timm" else visual.transformer.resblocks)
    free = {id(p) for block in blocks[-k:] for p in block.parameters()}
    spatial, global_ = encoder(sample_images(encoder))
    (spatial.square().sum() + global_.square().sum()).backward()
    for p in encoder.clip.parameters():
        assert (p.grad is not None and p.grad.any().item()) == (id(p) in free) == p.requires_grad
    own = {id(p) for p in encoder.spatial_proj.parameters()}
    assert {id(p) for p in encoder.parameters()} == free | own
    assert sum(name.startswith("trainable.") for name in encoder.state_dict()) == len(free)
    assert not any(m.training for m in encoder.clip.modules())


def test_trainable_blocks_leave_the_numbers_alone_respect_no_grad_and_come_back_with_the_state_dict():
    frozen, freed = (Enhanced2DEncoder("tiny-vit", None, trainable_blocks=k) for k in (0, 3))
    images = sample_images(frozen)
    assert_close(frozen.encode(images), freed.encode(images))
    with torch.no_grad():
        assert not freed.encode(images)[0].requires_grad
        for p in freed.parameters():
            p.add_(0.1)
    other = Enhanced2DEncoder("tiny-vit", None, trainable_blocks=3)
    assert not torch.equal(other(images)[1], freed(images)[1])
    other.load_state_dict(freed.state_dict())
    assert all(map(torch.equal, other(images), freed(images)))


# -------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("rows, cols", [(256, 512), (256, 32), (5, 5), (1, 7)])
def test_the_global_map_is_semi_orthogonal_and_always_the_same(rows, cols):
    matrix = semi_orthogonal(rows, cols)
    gram = matrix @ matrix.T if rows <= cols else matrix.T @ matrix
    assert_close(gram, torch.eye(min(rows, cols)), rtol=0, atol=1e-5)
    torch.rand(1)  # whatever the global generator did meanwhile
    assert matrix.shape == (rows, cols) and torch.equal(matrix, semi_orthogonal(rows, cols))


def test_text_is_clips_own_and_a_map_into_more_dimensions_keeps_its_cosines_with_images():
    encoder = Enhanced2DEncoder("tiny-vit", None, embed_dim=64)
    images, prompts = sample_images(encoder, 3), ["a chair", "a table", "wall", "the ceiling"]
    with torch.no_grad():
        image = encoder.clip.encode_image(normalized(images), normalize=True)
        text = encoder.clip.encode_text(open_clip.get_tokenizer("tiny-vit")(prompts), normalize=True)
    assert_close(encoder.encode_prompts(prompts), text)
    assert not encoder.encode_prompts(prompts).requires_grad
    mapped = encoder.encode_text(prompts)
    assert mapped.shape == (4, 64)
    ours = F.normalize(encoder.forward_global(images)) @ F.normalize(mapped).T
    assert_close(ours, image @ text.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cached_half_precision_features_and_autocast_pass(dtype):
    encoder = Enhanced2DEncoder("tiny-vit", None)
    images = sample_images(encoder)
    tokens, pooled = encoder.encode(images)
    half = encoder.project(tokens.to(dtype), pooled.to(dtype))
    assert_close(half, encoder(images), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype):
        for low, full in zip(encoder(images), encoder.eval()(images)):
            assert low.isfinite().all()
            assert_close(low.float(), full.float(), rtol=0.1, atol=0.1)


# -------------------------------------------------------------------------------- weights


def test_the_random_tower_is_always_the_same_and_leaves_the_global_rng_alone():
    torch.manual_seed(1)
    first = load_clip("tiny-vit", None).state_dict()
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))
    assert_close(load_clip("tiny-vit", None).state_dict(), first, rtol=0, atol=0)


def test_the_fingerprint_changes_with_all_that_the_features_depend_on(checkpoint):
    digests = [from_file(checkpoint).fingerprint()]
    assert from_file(checkpoint, embed_dim=8).fingerprint() == digests[0]
    digests += [Enhanced2DEncoder("tiny-vit", None).fingerprint(),
                Enhanced2DEncoder("tiny-vit-quickgelu", checkpoint, mean_std=OPENAI).fingerprint(),
                from_file(checkpoint, image_size=(32, 128)).fingerprint()]
    encoder = from_file(checkpoint)
    encoder.model_name = "tiny-vit-quickgelu"  # the same name, weights and size: only the activation differs
    digests.append(encoder.fingerprint())
    encoder = from_file(checkpoint)
    encoder.clip.visual.preprocess_cfg = {**encoder.clip.visual.preprocess_cfg, "mean": (0.5, 0.5, 0.5)}
    digests.append(encoder.fingerprint())
    assert len(set(digests)) == len(digests)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_wrong_checkpoint_file_is_named_in_a_few_words(tmp_path, checkpoint):
    path = tmp_path / "wrong.pt"
    truncated, other = checkpoint.read_bytes()[:1000], saved(open_clip.create_model("tiny-coca").state_dict())
    for content in (b"not a checkpoint", truncated, other, saved([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tiny-vit.*wrong\.pt could not be loaded") as error:
            from_file(path)
        assert len(str(error.value)) < 800


@pytest.mark.parametrize("pretrained, quick_gelu, file_model", [
    ("openai", True, "ViT-B-32-quickgelu"), ("laion2b_e16", False, "ViT-B-32")])
def test_a_tag_sets_the_activation_and_if_it_cannot_be_downloaded_says_what_to_do(
        monkeypatch, pretrained, quick_gelu, file_model):
    options = {}

    def no_network(name, **given):
        options.update(given)
        raise RuntimeError("connection refused")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(FileNotFoundError, match=f"ViT-B-32.*{pretrained}.*connection refused.*{file_model};"):
        Enhanced2DEncoder("ViT-B-32", pretrained)
    assert options == {"pretrained": pretrained, "force_quick_gelu": quick_gelu}


def no_route(*_, **__):
    raise OSError("no route to host")


def test_without_a_network_the_hub_client_does_not_retry(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", no_route)
    monkeypatch.setattr(encoder_module, "getproxies", dict)
    with pytest.raises(FileNotFoundError, match="ViT-B-32.*laion2b_e16 could not be loaded"):
        load_clip("ViT-B-32", "laion2b_e16")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224, weights to download: .*give a file"):
        load_timm("vit_tiny_patch16_224")
    assert "Retry" not in caplog.text


@pytest.mark.parametrize("connect, proxies, offline", [
    (no_route, {}, True), (no_route, {"no": "localhost"}, True), (no_route, {"https": "http://proxy"}, False),
    (lambda *_: socket.socket(), {}, False)])
def test_the_hub_client_is_offline_only_if_nothing_leads_to_the_hub(monkeypatch, connect, proxies, offline):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(encoder_module, "getproxies", lambda: proxies)
    with offline_without_network():
        assert constants.HF_HUB_OFFLINE is offline
    assert constants.HF_HUB_OFFLINE is False


# -------------------------------------------------------------------------------- scaling of images


def test_a_file_takes_the_scaling_on_which_all_tags_of_its_model_agree(checkpoint):
    undecided = set()
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        scalings = [image_scaling(name, checkpoint, tag) for tag in tags]
        try:
            found = image_scaling(name, checkpoint)
        except ValueError as error:
            undecided.add(name)
            assert all(str(scaling["mean"]) in str(error) for scaling in scalings) and name in str(error)
        else:
            assert scalings and all(scaling == found for scaling in scalings)
    tagged = {name for name in open_clip.list_models() if open_clip.list_pretrained_tags_by_model(name)}
    assert undecided & tagged == {"ViT-L-14"}
    assert image_scaling("ViT-B-16-SigLIP", checkpoint)["mean"] == (0.5, 0.5, 0.5)


def test_the_scaling_may_be_given_in_numbers_or_by_a_tag_and_random_weights_and_tags_need_none(checkpoint):
    assert image_scaling("tiny-vit", None) == image_scaling("ViT-L-14", "openai") == {}
    assert image_scaling("ViT-L-14", checkpoint, "laion2b_s32b_b82k")["mean"] == (0.5, 0.5, 0.5)
    assert image_scaling("ViT-L-14", checkpoint, "openai")["std"] == open_clip.OPENAI_DATASET_STD
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    encoder = Enhanced2DEncoder("tiny-vit", checkpoint, mean_std=[mean, std])
    model = open_clip.create_model("tiny-vit", pretrained=str(checkpoint)).eval()
    images = sample_images(encoder)
    with torch.no_grad():
        assert_close(encoder.encode(images)[1], model.encode_image(normalized(images, mean, std)))
    assert encoder.fingerprint() != from_file(checkpoint).fingerprint()


# -------------------------------------------------------------------------------- names with weights


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A folder as open_clip publishes models: config, scaling, weights."""
    scaling = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "interpolation": "bilinear"}
    config = {"model_cfg": TOWERS["tiny-vit"], "preprocess_cfg": scaling}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(checkpoint.read_bytes())
    return tmp_path


@pytest.mark.parametrize("kind", ["local-dir", "hf-hub"])
def test_a_published_folder_brings_its_weights_scaling_and_tokenizer(folder, checkpoint, monkeypatch, kind):
    name = f"local-dir:{folder}"
    if kind == "hf-hub":
        def download(model_id, filename=None, **_):
            assert model_id == "someone/model"
            return str(folder / (filename or "open_clip_pytorch_model.bin"))
        monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
        monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", download)
        name = "hf-hub:someone/model"
    encoder = Enhanced2DEncoder(name, "own")
    same = Enhanced2DEncoder("tiny-vit", checkpoint, mean_std=((0.5, 0.4, 0.3), (0.3, 0.2, 0.1)))
    images = sample_images(same)
    assert all(map(torch.equal, encoder.encode(images), same.encode(images)))
    assert torch.equal(encoder.encode_text(["a chair"]), same.encode_text(["a chair"]))
    assert not torch.equal(Enhanced2DEncoder(name, None).encode(images)[1], encoder.encode(images)[1])
    with pytest.raises(ValueError, match="pretrained must be 'own' or None, got 'openai'"):
        load_clip(name, "openai")


CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("file, content, error, message", [
    (CONFIG, None, FileNotFoundError, "no usable open_clip_config.json"),
    (CONFIG, "{}", FileNotFoundError, "no usable open_clip_config.json.*model_cfg"),
    (CONFIG, json.dumps({"model_cfg": TOWERS["tiny-vit"]}), ValueError, "must be given as mean_std.*its tags: none"),
    (WEIGHTS, None, FileNotFoundError, "could not be loaded"),
    (WEIGHTS, "no", FileNotFoundError, "could not be loaded")])
def test_a_folder_that_lacks_something_is_named_with_what_it_lacks(folder, file, content, error, message):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(error) as raised:
        Enhanced2DEncoder(f"local-dir:{folder}", "own")
    assert folder.name in str(raised.value) and re.search(message, str(raised.value))


def test_a_hub_that_cannot_be_reached_and_a_missing_package_are_named(monkeypatch):
    def raises(error):
        def function(*_, **__):
            raise error
        return function

    encoder, no_network = Enhanced2DEncoder("tiny-vit", None), raises(OSError("no connection"))
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", no_network)
    with pytest.raises(FileNotFoundError, match="hf-hub:someone/model.*open_clip_config.json.*no connection"):
        Enhanced2DEncoder("hf-hub:someone/model", "own")
    monkeypatch.setattr(open_clip, "get_tokenizer", no_network)  # of the transformers package
    with pytest.raises(FileNotFoundError, match="tiny-vit.*tokenizer.*no connection"):
        encoder.encode_prompts(["a chair"])
    monkeypatch.setattr(open_clip, "create_model", no_network)  # for the config of a text tower
    with pytest.raises(FileNotFoundError, match="tiny-vit.*no connection"):
        load_clip("tiny-vit", None)

    monkeypatch.setattr(open_clip, "get_tokenizer", raises(ModuleNotFoundError(name="transformers")))
    with pytest.raises(ValueError, match="tiny-vit: its tokenizer needs: pip install transformers"):
        encoder.encode_prompts(["a chair"])
    monkeypatch.setattr(encoder_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="roberta-ViT-B-32.*text tower roberta-base needs: pip install transformers"):
        Enhanced2DEncoder("roberta-ViT-B-32", None)


# -------------------------------------------------------------------------------- refusals


def vit(**options):
    return Enhanced2DEncoder("tiny-vit", None, **options)


def dense(name):
    return Enhanced2DEncoder(name, None, image_size=64).encode_dense(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("call, message", [
    (lambda: Enhanced2DEncoder("ViT-B-61", None), "'ViT-B-61'.*ViT-B-16"),
    (lambda: image_scaling("ViT-L-14", __file__), r"test_encoder\.py.*got None.*openai: .*0\.48.*82k: .*0\.5"),
    (lambda: image_scaling("ViT-L-14", __file__, "laion"), "got 'laion'.*laion400m_e31"),
    (lambda: image_scaling("tiny-vit", __file__), "tag of tiny-vit, got None; its tags: none"),
    *((lambda pair=pair: image_scaling("tiny-vit", None, pair), "3 means and 3 positive")
      for pair in ((0, 0, 0, 1, 1, 1), ((0, 0, 0), (1, 0, 1)), ((0, 0, float("nan")), (1, 1, 1)))),
    (lambda: Enhanced2DEncoder("tiny-resnet", None), "tiny-resnet: ModifiedResNet is not a vision transformer"),
    (lambda: Enhanced2DEncoder("ViT-B-32", "missing.pt"), r"missing\.pt.*no such file.*laion400m_e32"),
    *((lambda size=size: vit(image_size=size), r"image_size.*\(16, 16\) of tiny-vit; nearest: --image-size " + near)
      for size, near in ((60, "64,64"), ((64, 60), "64,64"), (0, "16,16"), ((64,), "64"), ((64, 64, 64), "64,64"),
                         ((-64, 64), "16,64"), (8, "16,16"), ((240, 328), "240,320"))),
    *((lambda k=k: vit(trainable_blocks=k), f"trainable_blocks={k}.*3 blocks") for k in (-1, 4)),
    *((lambda shape=shape: vit().encode(torch.zeros(shape)), r"\(B, 3, 64, 64\).*" + re.escape(str(shape)))
      for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 32), (1, 64, 64, 3))),
    (lambda: vit().encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), r"floats.*uint8 \(1, 3, 64, 64\)"),
    *((lambda name=name: dense(name), message) for name, message in (
        ("tiny-timm", "tiny-timm.*ViT-B-16.*timm's VisionTransformer"), ("tiny-short", "this one has a single block"),
        ("tiny-attention-pool", "tiny-attention-pool.*linear head.*an attention pool"))),
    (lambda: vit().encode_dense(torch.zeros(1, 3, 64, 64), "sclip"), "'sclip'.*naclip, clearclip"),
    (lambda: vit().encode_dense(torch.zeros(1, 3, 64, 32)), r"\(B, 3, 64, 64\).*\(1, 3, 64, 32\)"),
    (lambda: vit().encode_prompts("a chair"), "list of at least one string, got 'a chair'"),
    (lambda: vit().encode_text([]), r"list of at least one string, got \[\]")])
def test_malformed_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call()


# -------------------------------------------------------------------------------- TF32


@pytest.mark.parametrize("set_before", [lambda: set_tf32(True, True), lambda: set_tf32(False, True),
                                        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")],
                         ids=["on", "half on", "by the newer names"])
def test_tf32_is_off_inside_and_what_it_was_outside_also_after_an_error(set_before):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("needs torch 2.9, which can be asked by names that never raise")

    def seen():
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_before()
            before = seen()
            assert before[0] or before[1]
            with pytest.raises(KeyError), full_float32():
                assert seen() == (False, False)
                raise KeyError
            assert seen() == before
    finally:
        set_tf32(False, True)  # torch's defaults


# -------------------------------------------------------------------------------- towers by name

PAGE = (Path(__file__).parent.parent / "docs" / "towers.md").read_text()
ROWS = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (\S+ \| \d+ \|.*) \|$", PAGE, re.M)]
REASONS = {"yes": None, "no: timm": "timm's", "no: attention pool": "an attention pool",
           "needs `transformers`": "pip install transformers"}
slow = pytest.mark.skipif(os.environ.get("BIFUSION_SLOW") != "1", reason="large towers: BIFUSION_SLOW=1")


@slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@torch.no_grad()
def test_towers_by_name_give_what_the_table_says(row):
    name, millions, patch, dense, text = row
    encoder = Enhanced2DEncoder(name, None)
    assert sum(p.numel() for p in encoder.clip.parameters()) // 10 ** 6 == int(millions)
    assert encoder.image_size == tuple(cells * int(patch) for cells in encoder.grid)
    images = torch.rand(1, 3, *encoder.image_size)
    expected = encoder.clip.encode_image((images - encoder.mean) / encoder.std)
    assert_close(encoder.encode(images)[1], expected, rtol=1e-4, atol=1e-5)
    calls = (lambda: encoder.encode_dense(images), lambda: encoder.encode_text(["chair"]))
    for call, cell in zip(calls, (dense, text)):
        if REASONS[cell] is None:
            assert call().isfinite().all()
        elif "transformers" not in cell or importlib.util.find_spec("transformers") is None:
            with pytest.raises(ValueError, match=f"{name}.*{REASONS[cell]}"):
                call()
    size = (int(patch) * 3, int(patch) * 4)
    assert Enhanced2DEncoder(name, None, image_size=size).grid == (3, 4)


@slow
@pytest.mark.parametrize("name, reason", [
    ("RN50", "ModifiedResNet is not"), ("convnext_base", "ConvNeXt is not"), ("MobileCLIP-S1", "FastVit is not"),
    ("swin_base_patch4_window7_224", "SwinTransformer is not"), ("roberta-ViT-B-32", "pip install transformers")])
def test_towers_that_are_refused_by_name_say_why(name, reason, monkeypatch):
    monkeypatch.setattr(encoder_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        Enhanced2DEncoder(name, None)
