# SPDX-License-Identifier: MIT
"""fusion.py: pixels and points line up, sampling is grid_sample's, an unseen point gets nothing of the images."""
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from data import to_device
from fusion import (BiFusionEncoder, FusionGate, apply_transform, check_batch, occluded_mask,
                    project_packed, project_to_image, sample_cells, sample_features, transform_packed,
                    view_cells, visible_mask)
from support.lens import distorted_pixels, undistort

SIZE = (480, 640)
GRIDS = [(14, 14), (30, 40), (37, 51)]
K = torch.tensor([[577.87, 0.0, 319.5], [0.0, 579.1, 239.5], [0.0, 0.0, 1.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pose(seed, shift=0.5):
    """A random rigid world2cam (4, 4) that keeps points in front of the camera there."""
    generator = seeded(seed)
    axis = torch.randn(3, generator=generator, dtype=torch.float64)
    x, y, z = 0.3 * axis / axis.norm()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.linalg.matrix_exp(skew)
    matrix[:3, 3] = shift * torch.randn(3, generator=generator, dtype=torch.float64)
    return matrix.float()


def cloud(n, seed=0):
    """(n, 3) points of a room before a camera at the origin that looks along z."""
    unit = torch.rand(n, 3, generator=seeded(seed))
    return unit * torch.tensor([3.0, 2.0, 3.0]) + torch.tensor([-1.5, -1.0, 1.5])


# -------------------------------------------------------------------------------- geometry


def test_projection_of_a_table_computed_by_hand(device):
    intrinsics = torch.tensor([[500.0, 0, 320], [0, 400, 240], [0, 0, 1]], device=device)
    points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [-1, 0.5, 4], [0.64, -0.6, 1], [0.3, 0.2, -1]], device=device)
    uv, depth = project_to_image(points, intrinsics)
    expected = torch.tensor([[320.0, 240], [570, 240], [195, 290], [640, 0]], device=device)
    assert_close(uv[:4], expected, rtol=0, atol=1e-4)
    assert depth.tolist() == [2, 2, 4, 1, -1]
    assert visible_mask(uv, depth, SIZE).tolist() == [True, True, True, False, False]


def test_transform_agrees_with_homogeneous_coordinates_for_all_shapes_and_cancels_its_inverse():
    points, matrices = torch.randn(3, 20, 3), torch.stack([pose(s) for s in range(3)])
    expected = torch.einsum("bij,bnj->bni", matrices, F.pad(points, (0, 1), value=1))[..., :3]
    assert_close(apply_transform(points, matrices), expected)
    assert_close(apply_transform(expected, matrices.inverse()), points, rtol=1e-4, atol=1e-5)
    for b in range(3):
        assert_close(apply_transform(points[b], matrices[b]), expected[b])
        assert_close(apply_transform(points, matrices[b])[b], expected[b])
    assert apply_transform(torch.zeros(0, 3), matrices[0]).shape == (0, 3)


def test_packed_geometry_equals_scene_by_scene_and_view_by_view(device):
    points, batch = cloud(30).to(device), torch.tensor([0] * 10 + [2] * 20, device=device)
    world2cam = torch.stack([pose(seed) for seed in range(6)]).view(3, 2, 4, 4).to(device)
    noise = torch.rand(3, 2, 3, 3) * torch.tensor([[9.0, 0, 9], [0, 9, 9], [0, 0, 0]])
    intrinsics = (K + noise).to(device)
    points_cam = transform_packed(points, world2cam, batch)
    uv, depth = project_packed(points_cam, intrinsics, batch)
    for b in range(3):
        own = batch == b
        for v in range(2):
            expected = project_to_image(apply_transform(points[own], world2cam[b, v]), intrinsics[b, v])
            assert_close((uv[own, v], depth[own, v]), expected)


def test_float64_projects_a_world_far_from_the_origin_and_float32_does_not():
    """UTM: 5e5 m east, 5e6 m north. What docs/cameras.md says about precision."""
    offset = torch.tensor([5e5, 5e6, 100.0], dtype=torch.float64)
    points, world2cam, batch = cloud(500).double(), pose(1).double(), torch.zeros(500, dtype=torch.long)
    far = world2cam.clone()
    far[:3, 3] -= far[:3, :3] @ offset
    expected, _ = project_to_image(apply_transform(points, world2cam), K.double())

    def error(points, matrix, intrinsics):
        points_cam = transform_packed(points, matrix[None, None], batch)
        uv, _ = project_packed(points_cam, intrinsics[None, None], batch)
        return (uv[:, 0] - expected).abs().max().item()

    assert error(points.float(), world2cam.float(), K) < 1e-3
    assert error(points + offset, far, K.double()) < 1e-5  # float64 resolves 1 nm there
    assert error(points + offset, far.float(), K) > 10
    assert error((points + offset).float(), far, K) > 10


# -------------------------------------------------------------------------------- docs/cameras.md


@pytest.fixture(scope="module")
def recipes():
    """What the Python blocks of docs/cameras.md define."""
    text = (Path(__file__).parent.parent / "docs" / "cameras.md").read_text()
    names = {}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def test_a_projection_matrix_is_folded_into_intrinsics_and_pose_exactly(recipes):
    """KITTI's color camera 2, whose fourth column moves pixels by 44.857 / z, here with a skew."""
    projection = np.array([[721.5377, 3, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791],
                           [0, 0, 1, 0.002745884]])
    points, world2cam = cloud(300).double(), pose(1).double().numpy()
    intrinsics, folded = map(torch.from_numpy, recipes["fold_projection"](projection, world2cam))
    homogeneous = np.c_[points.numpy(), np.ones(300)] @ (projection @ world2cam).T
    uv, depth = project_to_image(apply_transform(points, folded), intrinsics)
    np.testing.assert_allclose(uv.numpy(), homogeneous[:, :2] / homogeneous[:, 2:], rtol=0, atol=1e-9)
    np.testing.assert_allclose(depth.numpy(), homogeneous[:, 2], rtol=1e-12)
    single, _ = project_to_image(apply_transform(points.float(), folded.float()), intrinsics.float())
    np.testing.assert_allclose(single.numpy(), uv.numpy(), rtol=0, atol=1e-3)


LENS_K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
RAYS = np.array([[0.3, -0.2], [-0.6, 0.4], [0.05, 0.4]])
LENSES = {  # coefficients, and where OpenCV (projectPoints, fisheye.projectPoints) sees the points (x, y, 1) of RAYS
    "OPENCV": ((-0.28, 0.09, 1e-3, -2e-3, -0.01),
               [[464.3949, 141.7894], [55.321, 419.8933], [343.7733, 435.3993]]),
    "OPENCV_FISHEYE": ((0.05, -0.01, 0.004, -0.0006),
                       [[464.8065, 141.5316], [55.352, 419.9606], [343.9339, 435.3005]])}


@pytest.mark.parametrize("lens", LENSES)
def test_pixels_of_a_lens_are_opencvs_and_undistorted_images_show_what_the_camera_saw_there(lens):
    coefficients, expected = LENSES[lens]
    focal, center = LENS_K[[0, 1], [0, 1]], LENS_K[:2, 2]
    for ray, pixel in zip(RAYS, expected):
        shift = -focal * ray  # the center of an image of one pixel that looks along the ray
        position = np.array(distorted_pixels((1, 1), (*focal, *shift), lens, coefficients)).reshape(2)
        np.testing.assert_allclose(position - shift + center, pixel, rtol=0, atol=1e-3)
    x, y = distorted_pixels((480, 640), (*focal, *center), lens, coefficients)
    inside = (x >= 0) & (x <= 639) & (y >= 0) & (y <= 479)
    columns = np.tile(np.arange(640, dtype=np.uint16), (480, 1))  # every pixel holds its own column
    straight = undistort(columns, LENS_K, lens, coefficients)
    assert straight.dtype == np.uint16 and np.array_equal(straight[inside], np.rint(x[inside]))
    assert inside.mean() > 0.9 and not straight[(x > 640) | (y > 480)].any()


# -------------------------------------------------------------------------------- visibility


def test_an_image_covers_half_a_pixel_beyond_its_outer_centers():
    u, v = torch.tensor([-0.51, -0.5, 5, 639.5, 639.51]), torch.tensor([-0.51, -0.5, 5, 479.5, 479.51])
    uv = torch.stack(torch.meshgrid(u, v, indexing="ij"), -1)  # (5, 5, 2)
    expected = F.pad(torch.ones(3, 3), (1, 1, 1, 1)).bool()
    assert torch.equal(visible_mask(uv, torch.ones(5, 5), SIZE), expected)


def test_points_that_are_not_in_front_or_not_finite_are_not_visible(device):
    bad = (math.nan, math.inf, -math.inf)
    points = [[0.0, 0.0, depth] for depth in (0.0, -0.0, -1e-30, -2.0, *bad)]
    points += [[value, 0.0, 2.0] for value in bad] + [[0.0, value, 2.0] for value in bad]
    points_cam = torch.tensor(points, device=device, requires_grad=True)
    uv, depth = project_to_image(points_cam, K.to(device))
    assert not visible_mask(uv, depth, SIZE).any()
    gradient, = torch.autograd.grad(uv[:2].sum(), points_cam)  # at the center of the camera
    assert uv[:2].isfinite().all() and gradient[:2].isfinite().all()
    moved = apply_transform(points_cam[4:], pose(0).to(device))
    assert not visible_mask(*project_to_image(moved, K.to(device)), SIZE).any()


def test_a_point_is_occluded_where_a_surface_lies_more_than_the_tolerance_before_it(device):
    depth_map = torch.full((1, 4, 5), 2.0, device=device)
    depth_map[0, 1, 2] = 0  # a hole: nothing known
    depth_map[0, 3, 4] = 1.0
    table = torch.tensor([  # u, v, depth, whether hidden at a tolerance of 0.05
        [0.0, 0, 2.0, 0], [0, 0, 2.049, 0], [0, 0, 2.051, 1], [0, 0, 0.5, 0], [2, 1, 9, 0], [4.4, 3.4, 1.2, 1],
        [3.6, 2.6, 1.2, 1], [3.4, 3, 1.2, 0], [-0.5, -0.5, 5, 1], [4.5, 3.5, 5, 1],  # the edges are read
        [4.6, 0, 5, 0], [0, -0.6, 5, 0], [math.nan, 0, 5, 0], [1e30, 0, 5, 0], [math.inf, 1, 5, 0]], device=device)
    uv, depth, hidden = table[:, :2], table[:, 2], table[:, 3].bool()
    view = torch.zeros(len(uv), dtype=torch.long, device=device)
    assert torch.equal(occluded_mask(uv, depth, depth_map, view, 0.05), hidden)
    assert torch.equal(occluded_mask(uv, depth, depth_map, view, 0.5), hidden & (depth == 5))
    assert not occluded_mask(uv, depth, torch.zeros_like(depth_map), view).any()
    assert not occluded_mask(uv, depth, torch.full_like(depth_map, math.nan), view).any()


# -------------------------------------------------------------------------------- sampling


def center_map(grid, size):
    """(1, 2, Hf, Wf): each cell holds the pixel (u, v) at its center."""
    v, u = ((torch.arange(cells).double() + 0.5) * s / cells - 0.5 for cells, s in zip(grid, size))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"))[None]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("crop, size", [(None, SIZE), ((40, 30, 560, 420), (420, 560)), (None, (224, 224)),
                                        ((100, 0, 480, 480), (224, 224)), ((7, 11, 613, 407), (336, 448))])
def test_sampling_at_projected_points_returns_the_pixel(grid, crop, size):
    """crop: (x, y, w, h) of the 640 x 480 image, which is then resized to `size`."""
    points_cam = apply_transform(cloud(4000), pose(4, 0.1))
    x, y, w, h = crop or (0, 0, SIZE[1], SIZE[0])
    scale = torch.tensor([size[1] / w, size[0] / h])
    intrinsics = K.clone()
    intrinsics[:2, 2] -= torch.tensor([x, y])
    intrinsics[:2, :2] *= scale[:, None]
    intrinsics[:2, 2] = (intrinsics[:2, 2] + 0.5) * scale - 0.5
    uv, depth = project_to_image(points_cam, intrinsics)
    # beyond the outermost cell centers sampling repeats the border and cannot be exact
    margin = torch.tensor([size[1] / grid[1], size[0] / grid[0]]) / 2 - 0.5
    within = ((uv > margin) & (uv < torch.tensor([size[1], size[0]]) - 1 - margin)).all(-1)
    keep = visible_mask(uv, depth, size) & within
    assert keep.sum() > 500
    batch = torch.zeros(int(keep.sum()), dtype=torch.long)
    sampled = sample_features(center_map(grid, size), uv[keep], size, batch)
    # back in pixels of the full image, against the projection with its own intrinsics
    original = (sampled + 0.5) / scale - 0.5 + torch.tensor([x, y])
    expected, _ = project_to_image(points_cam[keep].double(), K.double())
    assert (original - expected).abs().max() < 1e-3


def grid_sample(feature_map, uv, size, batch):
    """torch's own sampler, one image at a time."""
    coordinates = 2 * (uv + 0.5) / uv.new_tensor([size[1], size[0]]) - 1
    out = uv.new_zeros(len(uv), feature_map.shape[1], dtype=feature_map.dtype)
    for b in range(len(feature_map)):
        own = (batch == b).nonzero()[:, 0]
        sampled = F.grid_sample(feature_map[b:b + 1], coordinates[own][None, None], mode="bilinear",
                                padding_mode="border", align_corners=False)
        out = out.index_put((own,), sampled[0, :, 0].T)
    return out


def assert_samples_as_grid_sample(feature_map, uv, size, batch):
    """Features and gradients of both inputs."""
    upstream = torch.randn(len(uv), feature_map.shape[1], generator=seeded()).to(uv)
    results = []
    for sample in (sample_features, grid_sample):
        inputs = feature_map.clone().requires_grad_(), uv.clone().requires_grad_()
        out = sample(*inputs, size, batch)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), inputs)))
    assert_close(*results)


@pytest.mark.parametrize("grid", GRIDS + [(1, 1), (1, 5), (2, 1)])
def test_sampling_equals_grid_sample_forward_and_backward(device, grid):
    generator = seeded()
    feature_map = torch.randn(3, 6, *grid, generator=generator, dtype=torch.float64)
    uv = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 800 - 80  # also outside of the image
    uv[:4] = torch.tensor([[-0.5, -0.5], [639.5, 479.5], [0, 0], [1e9, -1e9]])
    batch = torch.arange(200) % 3
    assert_samples_as_grid_sample(feature_map.to(device), uv.to(device), SIZE, batch.to(device))


def test_gradients_of_positions_on_centers_and_borders_of_cells_are_those_of_grid_sample(device):
    feature_map = torch.randn(1, 5, 4, 8, generator=seeded(), dtype=torch.float64)
    v, u = torch.meshgrid(torch.arange(-0.5, 64, 4), torch.arange(-0.5, 128, 4), indexing="ij")
    uv = torch.stack([u, v], -1).flatten(0, 1).double()  # cells have 16 pixels
    batch = torch.zeros(len(uv), dtype=torch.long)
    assert_samples_as_grid_sample(feature_map.to(device), uv.to(device), (64, 128), batch.to(device))


def sample_views(maps, uv, size, view, visible):
    return sample_cells(maps, *view_cells(uv, size, maps.shape, view, visible))


def views(n, v, images, seed=0):
    """uv (n, v, 2) within 100 pixels, view (n, v), visible (n, v)."""
    generator = seeded(seed)
    uv = torch.rand(n, v, 2, generator=generator, dtype=torch.float64) * 100
    view = torch.randint(images, (n, v), generator=generator)
    return uv, view, torch.rand(n, v, generator=generator) < 0.5


def test_sampling_gradcheck_in_double():
    maps = torch.randn(4, 2, 3, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    uv, view, visible = views(6, 2, 4)
    assert torch.autograd.gradcheck(lambda f, x: sample_views(f, x, (100, 100), view, visible),
                                    (maps, uv.requires_grad_()))


def test_views_are_averaged_over_those_that_see_the_point(device):
    maps = torch.randn(6, 4, 5, 5, generator=seeded(), dtype=torch.float64).to(device)
    uv, view, visible = (to_device(x, device) for x in views(40, 3, 6))
    visible[0], visible[1] = False, True
    index, weight = view_cells(uv, (100, 100), maps.shape, view, visible)
    assert_close(weight.sum(1), visible.any(1).double())
    assert ((index == 6 * 25) == ~visible.repeat_interleave(4, 1)).all() and (weight >= 0).all()
    out = sample_cells(maps, index, weight)
    for n in range(40):
        seen = sample_features(maps, uv[n], (100, 100), view[n])[visible[n]]
        assert_close(out[n], seen.sum(0) / max(1, len(seen)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cells_that_no_visible_point_touches_have_no_influence_and_get_no_gradient(device, bad):
    uv, view, visible = views(20, 1, 2)
    touched = torch.zeros(2, 8, 8, dtype=torch.bool)
    for (u, v), seen, i in zip(uv[:, 0].tolist(), visible[:, 0], view[:, 0]):
        if seen:  # an independent count of the cells: those whose bilinear tent reaches the point
            x, y = (min(max((p + 0.5) * 8 / 100 - 0.5, 0), 7) for p in (u, v))
            touched[i] |= torch.outer((torch.arange(8) - y).abs() < 1, (torch.arange(8) - x).abs() < 1)
    assert 0 < touched.sum() < touched.numel()
    maps = torch.randn(2, 3, 8, 8, generator=seeded())
    uv[~visible] = bad
    maps, uv, view, visible, touched = (to_device(x, device) for x in (maps, uv, view, visible, touched))
    poisoned = maps.where(touched[:, None], bad).requires_grad_()
    out = sample_views(poisoned, uv, (100, 100), view, visible)
    out.square().sum().backward()
    assert torch.equal(out, sample_views(maps, uv, (100, 100), view, visible))
    gradient = poisoned.grad.abs().sum(1)
    assert gradient.isfinite().all() and torch.equal(gradient > 0, touched)


def test_positions_without_a_number_sample_zeros_and_no_position_gives_no_row_but_a_graph(device):
    uv = torch.tensor([[math.nan, 3.0], [3.0, 3.0], [3.0, math.nan]], device=device)
    batch = torch.zeros(3, dtype=torch.long, device=device)
    maps = torch.ones(1, 2, 4, 4, device=device, requires_grad=True)
    assert sample_features(maps, uv, (8, 8), batch).tolist() == [[0, 0], [1, 1], [0, 0]]
    nothing = sample_features(maps, uv[:0], (8, 8), batch[:0])
    nothing.sum().backward()
    assert nothing.shape == (0, 2) and not maps.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_maps_are_sampled_in_float32(device, dtype):
    maps = torch.randn(1, 3, 30, 40, device=device).to(dtype)
    uv, batch = torch.rand(50, 2, device=device) * 480, torch.zeros(50, dtype=torch.long, device=device)
    with torch.autocast(device, dtype):
        out = sample_features(maps, uv, SIZE, batch)
    assert out.dtype == torch.float32 and torch.equal(out, sample_features(maps.float(), uv, SIZE, batch))


# -------------------------------------------------------------------------------- gate


def test_the_gate_is_its_layers_on_both_features_and_closed_where_nothing_was_seen(device):
    torch.manual_seed(0)
    gate = FusionGate(8, 4).to(device)
    feat_3d, feat_2d = (torch.randn(10, 8, device=device, requires_grad=True) for _ in range(2))
    valid = torch.arange(10, device=device) % 2 == 0
    fused, alpha = gate(feat_3d, feat_2d, valid)
    assert torch.equal(fused[~valid], feat_3d[~valid]) and not alpha[~valid].any()
    expected = gate.gate(torch.cat([feat_3d, feat_2d], 1)).sigmoid()
    assert_close(alpha[valid], expected[valid])
    assert ((alpha[valid] > 0) & (alpha[valid] < 1)).all() and alpha.shape == (10, 1)
    assert_close(fused[valid], ((1 - alpha) * feat_3d + alpha * feat_2d)[valid])
    fused.square().sum().backward()
    assert not feat_2d.grad[~valid].any() and feat_2d.grad[valid].all(1).all()
    assert_close(feat_3d.grad[~valid], 2 * feat_3d.detach()[~valid])
    assert all(p.grad.isfinite().all() for p in gate.parameters())


# -------------------------------------------------------------------------------- the whole encoder


CACHED = ("clip_tokens", "clip_pooled", "clip_dense_map")


class Tower(nn.Module):
    """Stands in for the image encoder: patches of 16 x 16 pixels, and of 32 x 32 for dense features, on their own."""

    image_size = (64, 96)

    def __init__(self, dim=16):
        super().__init__()
        self.spatial_proj = nn.Conv2d(12, dim, 1)
        self.register_buffer("fixed", torch.randn(dim, 12, generator=seeded()))

    def encode(self, images):
        tokens = F.avg_pool2d(F.pixel_unshuffle(images, 2), 8)
        return tokens, tokens.mean((2, 3))

    def project(self, tokens, pooled):
        return self.spatial_proj(tokens.float()), F.linear(pooled.float(), self.fixed)

    def encode_with_dense(self, images):
        tokens, pooled = self.encode(images)
        return tokens, pooled, F.avg_pool2d(tokens.flip(1), 2)

    def project_dense_target(self, dense):
        return F.conv2d(dense.float(), self.fixed[:, :, None, None])


class Points(nn.Module):
    """Stands in for the 3D encoder: one row at a time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, batch):
        return self.layer(torch.cat([batch["coords"], batch["features"]], 1)).relu()


def model(device="cpu", **options):
    torch.manual_seed(0)
    return BiFusionEncoder(Tower(), Points(), dim_3d=12, embed_dim=16, **options).eval().to(device)


def sample(n, v=2, seed=0):
    """One scene as `collate` would make it, with depth at another size than the images."""
    generator = seeded(seed)
    intrinsics = torch.tensor([[80.0, 0, 47.5], [0, 80, 31.5], [0, 0, 1]])
    depth_intrinsics = torch.tensor([[40.0, 0, 23.5], [0, 40, 15.5], [0, 0, 1]])
    extent, corner = torch.tensor([6.0, 4, 4]), torch.tensor([-3.0, -2, 0.5])
    return {"points": torch.rand(n, 3, generator=generator) * extent + corner,
            "coords": torch.randn(n, 3, generator=generator),
            "features": torch.rand(n, 3, generator=generator),
            "batch": torch.zeros(n, dtype=torch.long),
            "images": torch.rand(1, v, 3, 64, 96, generator=generator),
            "world2cam": torch.stack([pose(seed * 10 + i, 0.2) for i in range(v)])[None],
            "intrinsics": intrinsics.expand(1, v, 3, 3).clone(),
            "depth": 1 + 3 * torch.rand(1, v, 32, 48, generator=generator),
            "depth_intrinsics": depth_intrinsics.expand(1, v, 3, 3).clone()}


def collate(samples):
    out = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
    out["batch"] = torch.cat([torch.full_like(s["batch"], i) for i, s in enumerate(samples)])
    return out


def cache(net, batch, dtype=torch.float32):
    """The batch with raw features in the place of its images."""
    b, v = batch["images"].shape[:2]
    features = net.encoder_2d.encode_with_dense(batch["images"].flatten(0, 1))
    rest = {name: value for name, value in batch.items() if name != "images"}
    return rest | {name: x.unflatten(0, (b, v)).to(dtype) for name, x in zip(CACHED, features)}


OUTPUTS = {"feat_fusion", "feat_3d", "clip_global", "clip_point", "clip_dense", "valid", "alpha"}


def test_a_batch_equals_its_scenes_one_by_one(device):
    net = model(device)
    scenes = [to_device(sample(n, seed=seed), device) for seed, n in enumerate((50, 0, 1, 30), 1)]
    whole = net(collate(scenes), with_dense=True)
    parts = [net(scene, with_dense=True) for scene in scenes]
    assert set(whole) == OUTPUTS and 0 < whole["valid"].sum() < 81
    assert whole["feat_fusion"].shape == (81, 16) and whole["clip_global"].shape == (4, 16)
    for name in OUTPUTS:
        assert_close(whole[name], torch.cat([p[name] for p in parts]), rtol=1e-5, atol=1e-6)


def test_the_outputs_are_the_gate_of_both_features_and_the_mean_global_feature_and_the_batch_is_left_alone():
    net, scenes = model(), collate([sample(60, v=3, seed=1), sample(5, v=3, seed=2)])
    before = {name: value.clone() for name, value in scenes.items()}
    out = net(scenes)
    assert_close(scenes, before, rtol=0, atol=0)
    fused, alpha = net.gate(out["feat_3d"], out["clip_point"], out["valid"])
    assert_close((out["feat_fusion"], out["alpha"]), (fused, alpha))
    _, pooled = net.encoder_2d.encode(scenes["images"].flatten(0, 1))
    expected = F.linear(pooled, net.encoder_2d.fixed).view(2, 3, 16).mean(1)
    assert_close(out["clip_global"], expected)


class ChannelGate(nn.Module):
    """Another gate: one value per channel; it forgets that some points are not valid."""

    def __init__(self, dim=16):
        super().__init__()
        self.layer = nn.Linear(2 * dim, dim)

    def forward(self, feat_3d, feat_2d, valid):
        alpha = self.layer(torch.cat([feat_3d, feat_2d], 1)).sigmoid()
        return torch.lerp(feat_3d, feat_2d, alpha), alpha


@pytest.mark.parametrize("gate", [None, ChannelGate()], ids=["own", "another"])
def test_whatever_the_gate_an_unseen_point_is_the_3d_path_exactly_and_sends_nothing_to_the_image(device, gate):
    net, scene = model(device, gate=gate), to_device(sample(60), device)
    scene["images"].requires_grad_()
    out = net(scene)
    unseen = ~out["valid"]
    assert unseen.any() and torch.equal(out["feat_fusion"][unseen], out["feat_3d"][unseen])
    assert not out["alpha"][unseen].any() and not out["clip_point"][unseen].any()
    assert (out["alpha"][out["valid"]] > 0).all()
    from_unseen = out["feat_fusion"][unseen].square().sum()
    tensors = [scene["images"], *net.gate.parameters()]
    assert not any(g.any() for g in torch.autograd.grad(from_unseen, tensors, retain_graph=True))
    assert all(g.any() for g in torch.autograd.grad(out["feat_fusion"].square().sum(), tensors))


def test_points_projected_in_parts_are_those_projected_at_once(monkeypatch):
    net, scenes = model(), collate([sample(50, v=3, seed=1), sample(30, v=3, seed=2)])
    results = []
    for chunk in (10 ** 9, 7):
        monkeypatch.setattr("fusion.CHUNK", chunk)
        points = scenes["points"].clone().requires_grad_()
        out = net({**scenes, "points": points})
        gradient, = torch.autograd.grad(out["feat_fusion"].sum(), points)
        results.append((out["feat_fusion"], out["valid"], gradient))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2])
    assert results[0][2].any()


def test_an_unseen_point_equals_the_baseline_without_images():
    net, scene = model(), sample(60)
    baseline = BiFusionEncoder(None, net.encoder_3d, dim_3d=12, embed_dim=16)
    baseline.proj_3d.load_state_dict(net.proj_3d.state_dict())
    out, alone = net(scene), baseline({k: scene[k] for k in ("points", "coords", "features", "batch")})
    assert torch.equal(out["feat_fusion"][~out["valid"]], alone["feat_fusion"][~out["valid"]])
    assert set(alone) == OUTPUTS and all(alone[name] is None for name in OUTPUTS if "clip" in name)
    assert not alone["valid"].any() and not alone["alpha"].any()


@pytest.mark.parametrize("value", [-3.0, math.nan])
def test_a_cell_changes_only_the_points_that_land_on_it(value):
    net, scene = model(), sample(200, v=1)
    scene = cache(net, scene)
    uv, visible, _ = net.project(scene, (64, 96))
    u, v = uv[:, 0].unbind(1)
    changed = scene["clip_tokens"].clone()
    changed[..., 2, 4] = value  # the tent of cell (2, 4) covers u 56 to 88 and v 24 to 56
    reach = (u > 55.5) & (u < 87.5) & (v > 23.5) & (v < 55.5) & visible[:, 0]
    fused = net({**scene, "clip_tokens": changed})["feat_fusion"]
    moved = (fused != net(scene)["feat_fusion"]).any(1)
    assert reach.any() and torch.equal(moved, reach)
    assert fused[reach].isnan().all() == math.isnan(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pose_that_is_not_finite_sees_nothing(bad):
    net, scene = model().train(), sample(40)
    del scene["depth"], scene["depth_intrinsics"]
    one_view = net({**scene, **{k: scene[k][:, :1] for k in ("world2cam", "intrinsics", "images")}})
    for entry in ((0, 0), (0, 3), (1, 3), (2, 3), (2, 2), (slice(3), slice(4))):
        lost = scene["world2cam"].clone()
        lost[0, 1][entry] = bad
        out = net({**scene, "world2cam": lost})
        assert torch.equal(out["valid"], one_view["valid"]) and out["valid"].any()
        assert_close(out["feat_fusion"], one_view["feat_fusion"], rtol=1e-5, atol=1e-6)
        out["feat_fusion"].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_projection_reads_the_points_and_the_3d_encoder_the_coordinates():
    net, scene = model(), sample(50)
    out = net(scene)
    augmented = net({**scene, "coords": scene["coords"] * 3 + 1})
    moved = net({**scene, "points": scene["points"] + torch.tensor([0.3, 0, 0])})
    for name, follows in (("feat_3d", augmented), ("clip_point", moved)):
        still = moved if follows is augmented else augmented
        assert torch.equal(out[name], still[name]) and not torch.equal(out[name], follows[name])
    assert torch.equal(out["valid"], augmented["valid"])


def test_depth_hides_points_by_the_tolerance():
    scene = sample(200, v=1)
    free = model()({k: x for k, x in scene.items() if "depth" not in k})["valid"]
    seen = {t: model(depth_tolerance=t)(scene)["valid"] for t in (0.05, 1.0, 100.0)}
    points_cam = apply_transform(scene["points"], scene["world2cam"][0, 0])
    uv, depth = project_to_image(points_cam, scene["depth_intrinsics"][0, 0])
    column, row = uv.round().long().unbind(1)
    surface = scene["depth"][0, 0][row.clamp(0, 31), column.clamp(0, 47)]
    for tolerance, valid in seen.items():
        assert torch.equal(valid, free & (depth <= surface + tolerance))
    assert seen[0.05].sum() < seen[1.0].sum() < free.sum() == seen[100.0].sum()
    holes = {**scene, "depth": torch.zeros_like(scene["depth"])}
    assert torch.equal(model()(holes)["valid"], free)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-2)], ids=str)
def test_cached_features_give_what_the_images_give(dtype, tolerance):
    net, scenes = model(), collate([sample(30, seed=1), sample(20, seed=2)])
    expected, out = net(scenes, with_dense=True), net(cache(net, scenes, dtype), with_dense=True)
    for name in OUTPUTS:
        assert_close(out[name], expected[name], rtol=tolerance, atol=tolerance)


def test_the_dense_target_is_sampled_on_its_own_grid_and_cannot_be_trained_and_the_sampled_feature_can():
    net, scene = model(), sample(30, v=1)
    plain, dense = net(scene), net(scene, with_dense=True)
    assert plain["clip_dense"] is None and not dense["clip_dense"].requires_grad
    assert plain["clip_point"].requires_grad and torch.equal(plain["clip_point"], dense["clip_point"])
    assert torch.equal(plain["feat_fusion"], dense["feat_fusion"])
    target = net.encoder_2d.project_dense_target(net.encoder_2d.encode_with_dense(scene["images"][0])[2])
    uv, visible, _ = net.project(scene, (64, 96))
    expected = sample_features(target, uv[:, 0], (64, 96), scene["batch"])
    assert_close(dense["clip_dense"], expected * visible)


def test_the_whole_encoder_compiles_without_a_break_and_exports():
    net, scene = model(), collate([sample(30, seed=1), sample(20, seed=2)])
    exported = torch.export.export(net, (scene,)).module()
    for other in (torch.compile(net, fullgraph=True, backend="eager"), exported):
        assert_close([x for x in other(scene).values() if x is not None],
                                   [x for x in net(scene).values() if x is not None])


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, points", [
    ("no point", torch.zeros(0, 3)), ("one point", torch.tensor([[0.0, 0, 2]])),
    ("all behind", torch.tensor([[0.0, 0, -2], [1, 1, -3]])), ("at the center", torch.zeros(2, 3)),
    ("not a number", torch.full((3, 3), math.nan))])
def test_degenerate_clouds_pass_forward_and_backward(device, name, points):
    net, scene = model(device).train(), sample(len(points))
    scene |= {"points": points, "depth": torch.zeros_like(scene["depth"])}
    scene["world2cam"][:] = torch.eye(4)
    out = net(to_device(scene, device))
    assert out["valid"].tolist() == ([True] if name == "one point" else [False] * len(points))
    assert out["feat_fusion"].shape == (len(points), 16) and out["feat_fusion"].isfinite().all()
    out["feat_fusion"].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_and_with_fast_products_the_same_points_are_seen_at_the_same_pixels(device, dtype):
    net, scene = model(device), to_device(sample(60), device)

    def outputs():
        points_cam = apply_transform(scene["points"], scene["world2cam"][0, 0])
        alone = project_to_image(points_cam, scene["intrinsics"][0, 0])
        return net(scene), (points_cam, *alone, *net.project(scene, (64, 96)))

    (full, pixels), precision = outputs(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype):
            low, low_pixels = outputs()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert_close(low_pixels, pixels, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(low["valid"], full["valid"])
    assert torch.equal(low["feat_fusion"][~low["valid"]], low["feat_3d"][~low["valid"]])
    assert_close(low["feat_fusion"].float(), full["feat_fusion"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("field, shape", [
    ("points", (30, 2)), ("coords", (29, 3)), ("features", (30,)), ("batch", (29,)), ("world2cam", (1, 2, 3, 4)),
    ("world2cam", (2, 4, 4)), ("intrinsics", (1, 2, 3, 4)), ("intrinsics", (1, 2, 4, 4)), ("intrinsics", (1, 1, 3, 3)),
    ("images", (1, 3, 64, 96)), ("images", (1, 2, 1, 64, 96)), ("depth", (2, 2, 32, 48)),
    ("depth_intrinsics", (1, 2, 1))])
def test_a_missing_or_misshapen_field_is_named_with_its_shape(field, shape):
    scene = sample(30)
    del scene[field]
    if field != "depth":
        with pytest.raises(ValueError, match=f"field '{field}' .* is missing"):
            model()(scene)
    with pytest.raises(ValueError, match=f"field '{field}' {re.escape(str(shape))} must be"):
        model()({**scene, field: torch.zeros(shape)})


def test_cached_features_are_checked_and_the_baseline_needs_no_camera():
    scene = cache(model(), sample(5))
    check_batch(scene, True, True)
    for field in CACHED:
        with pytest.raises(ValueError, match=rf"'{field}' \(1, 2\) must be \(1, 2, "):
            check_batch({**scene, field: torch.zeros(1, 2)}, True, True)
    del scene["clip_pooled"]
    with pytest.raises(ValueError, match="'clip_pooled'.*missing"):
        check_batch(scene, True)
    check_batch({name: scene[name] for name in ("points", "coords", "features", "batch")}, False)


REFUSED = [  # function, shapes of its arguments
    *((apply_transform, shapes) for shapes in (
        ((5, 2), (4, 4)), ((5, 3), (3, 4)), ((5, 3), (2, 4, 4)), ((3,), (4, 4)), ((2, 5, 3), (3, 4, 4)))),
    *((project_to_image, shapes) for shapes in (
        ((5, 2), (3, 3)), ((3,), (3, 3)), ((5, 3), (4, 4)), ((5, 3), (3, 4)))),
    *((lambda maps, uv, batch: sample_features(maps, uv, SIZE, batch.long()), shapes) for shapes in (
        ((2, 3, 4), (5, 2), (5,)), ((2, 3, 4, 4), (5, 3), (5,)), ((2, 3, 4, 4), (5, 2), (4,)))),
    *((lambda feat_3d, feat_2d, valid: FusionGate(8)(feat_3d, feat_2d, valid > 0), shapes) for shapes in (
        ((4, 8), (4, 7), (4,)), ((4, 8), (3, 8), (4,)), ((4, 8), (4, 8), (4, 1)))),
    (lambda uv, depth: visible_mask(uv, depth, SIZE), ((5, 2), (4,))),
    (lambda depth_map, depth, view: occluded_mask(torch.zeros(5, 2), depth, depth_map, view), ((4, 4), (5,), (5,)))]


@pytest.mark.parametrize("function, shapes", REFUSED, ids=str)
def test_misshapen_arguments_are_refused_with_their_shapes(function, shapes):
    with pytest.raises(ValueError, match="must be") as error:
        function(*map(torch.zeros, shapes))
    assert any(str(shape) in str(error.value) for shape in shapes)


POINTS, IDS, MAPS = torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize("call, message", [
    (lambda: apply_transform(POINTS, pose(1).T), r"matrix \(4, 4\) must have the last row 0 0 0 1"),
    *((lambda factor=factor: apply_transform(POINTS, factor * torch.eye(4)), "last row 0 0 0 1")
      for factor in (0, 2, math.nan)),
    (lambda: project_to_image(POINTS, K.T), r"intrinsics \(3, 3\) must have the last row 0 0 1"),
    (lambda: sample_features(MAPS, POINTS[:, :2], SIZE, IDS), r"batch \(2,\) must lie in \[0, 2\)"),
    (lambda: sample_features(MAPS, POINTS[:, :2], SIZE, -IDS), r"batch \(2,\) must lie in \[0, 2\)"),
    *((lambda change=change: model()({**sample(5), **change}), message) for change, message in (
        ({"batch": torch.ones(5).long()}, r"field 'batch' \(5,\) must lie in \[0, 1\)"),
        ({"world2cam": pose(1).T.expand(1, 2, 4, 4)}, r"'world2cam' \(1, 2, 4, 4\) must have the last row 0 0 0 1"),
        ({"intrinsics": K.T.expand(1, 2, 3, 3)}, r"'intrinsics' \(1, 2, 3, 3\) must have the last row 0 0 1"),
        ({"depth_intrinsics": K.T.expand(1, 2, 3, 3)}, r"'depth_intrinsics' \(1, 2, 3, 3\) must have")))])
def test_values_that_cannot_be_right_are_refused_with_field_and_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()
