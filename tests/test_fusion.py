# SPDX-License-Identifier: MIT
"""fusion.py: pixels and points line up, sampling is grid_sample's, and nothing leaks into a point that no view sees."""
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusion import (BiFusionEncoder, FusionGate, apply_transform, bilinear_corners, check_batch,
                    fold_projection, occluded_mask, project_packed, project_to_image, sample_cells, sample_features,
                    sample_views, transform_packed, view_cells, visible_mask, weighted_rows)

SIZE = (480, 640)
GRIDS = [(14, 14), (30, 40), (37, 51)]
K = torch.tensor([[577.87, 0.0, 319.5], [0.0, 579.1, 239.5], [0.0, 0.0, 1.0]])


def pose(seed, shift=0.5):
    """A random rigid world2cam (4, 4) that keeps points in front of the camera there."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randn(3, generator=generator, dtype=torch.float64)
    x, y, z = 0.3 * axis / axis.norm()
    rotation = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = shift * torch.randn(3, generator=generator, dtype=torch.float64)
    return matrix.float()


def cloud(n, seed=0):
    """(n, 3) points of a room before a camera at the origin that looks along z."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, generator=generator) * torch.tensor([3.0, 2.0, 3.0]) + torch.tensor([-1.5, -1.0, 1.5])


# ---------------------------------------------------------------------------------------------- geometry


def test_projection_of_a_table_computed_by_hand():
    intrinsics = torch.tensor([[500.0, 0, 320], [0, 400, 240], [0, 0, 1]])
    points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [-1, 0.5, 4], [0.64, -0.6, 1], [0.3, 0.2, -1]])
    uv, depth = project_to_image(points, intrinsics)
    expected = torch.tensor([[320.0, 240], [570, 240], [195, 290], [640, 0]])
    torch.testing.assert_close(uv[:4], expected, rtol=0, atol=1e-4)
    assert depth.tolist() == [2, 2, 4, 1, -1]
    assert visible_mask(uv, depth, SIZE).tolist() == [True, True, True, False, False]


def test_projection_agrees_with_a_3_by_4_matrix_in_double():
    points, world2cam = cloud(500), pose(1)
    skewed = K.clone()
    skewed[0, 1] = 3.0
    homogeneous = np.c_[points.double().numpy(), np.ones(500)] @ (skewed.double() @ world2cam[:3].double()).numpy().T
    expected = homogeneous[:, :2] / homogeneous[:, 2:]
    uv, depth = project_to_image(apply_transform(points, world2cam), skewed)
    inside = visible_mask(uv, depth, SIZE).numpy()
    assert inside.sum() > 100
    np.testing.assert_allclose(uv.numpy()[inside], expected[inside], rtol=0, atol=1e-4)
    np.testing.assert_allclose(depth.numpy(), homogeneous[:, 2], rtol=1e-6)
    exact, _ = project_to_image(apply_transform(points.double(), world2cam.double()), skewed.double())
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-9)


def test_a_point_at_the_camera_centre_has_finite_pixels_and_gradients():
    points = torch.zeros(2, 3, requires_grad=True)
    uv, _ = project_to_image(points, K)
    uv.sum().backward()
    assert uv.isfinite().all() and points.grad.isfinite().all()


def test_projection_agrees_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    points, world2cam = cloud(500).double(), pose(1).double()
    rotation, _ = cv2.Rodrigues(world2cam[:3, :3].numpy())
    theirs, _ = cv2.projectPoints(points.numpy(), rotation, world2cam[:3, 3].numpy(), K.double().numpy(), None)
    uv, _ = project_to_image(apply_transform(points, world2cam), K.double())
    np.testing.assert_allclose(uv.numpy(), theirs[:, 0], rtol=0, atol=1e-4)


def test_transform_agrees_with_homogeneous_coordinates_for_all_shapes():
    points, matrices = torch.randn(3, 20, 3), torch.stack([pose(s) for s in range(3)])
    expected = torch.einsum("bij,bnj->bni", matrices, F.pad(points, (0, 1), value=1))[..., :3]
    torch.testing.assert_close(apply_transform(points, matrices), expected)
    for b in range(3):
        torch.testing.assert_close(apply_transform(points[b], matrices[b]), expected[b])
        torch.testing.assert_close(apply_transform(points, matrices[b])[b], expected[b])
    assert apply_transform(torch.zeros(0, 3), matrices[0]).shape == (0, 3)


def test_a_transform_and_its_inverse_cancel():
    points, matrix = torch.randn(50, 3, dtype=torch.float64), pose(3).double()
    torch.testing.assert_close(apply_transform(apply_transform(points, matrix), matrix.inverse()), points)


def test_packed_geometry_equals_scene_by_scene_and_view_by_view():
    points, batch = cloud(30), torch.tensor([0] * 10 + [2] * 20)
    world2cam = torch.stack([torch.stack([pose(10 * b + v) for v in range(2)]) for b in range(3)])
    intrinsics = K + torch.rand(3, 2, 3, 3) * torch.tensor([[9.0, 0, 9], [0, 9, 9], [0, 0, 0]])
    points_cam = transform_packed(points, world2cam, batch)
    uv, depth = project_packed(points_cam, intrinsics, batch)
    for b in range(3):
        for v in range(2):
            own = batch == b
            expected = project_to_image(apply_transform(points[own], world2cam[b, v]), intrinsics[b, v])
            torch.testing.assert_close((uv[own, v], depth[own, v]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_fast_matmul_do_not_degrade_projection(dtype):
    points, world2cam = cloud(100), pose(2)
    batch = torch.zeros(100, dtype=torch.long)

    def project():
        points_cam = apply_transform(points, world2cam)
        packed = project_packed(transform_packed(points, world2cam[None, None], batch), K[None, None], batch)
        return (points_cam, *project_to_image(points_cam, K), *packed)
    expected, precision = project(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype):
            assert all(map(torch.equal, project(), expected))
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_projection_with_a_fourth_column_is_folded_exactly():
    """KITTI's colour camera 2, whose fourth column moves pixels by 44.857 / z."""
    projection = torch.tensor([[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791],
                               [0, 0, 1, 0.002745884]], dtype=torch.float64)
    points, world2cam = cloud(300).double(), torch.stack([pose(1), pose(2)]).double()
    intrinsics, folded = fold_projection(projection.expand(2, 3, 4), world2cam)
    for i in range(2):
        homogeneous = np.c_[points.numpy(), np.ones(300)] @ (projection @ world2cam[i]).numpy().T
        uv, depth = project_to_image(apply_transform(points, folded[i]), intrinsics[i])
        np.testing.assert_allclose(uv.numpy(), homogeneous[:, :2] / homogeneous[:, 2:], rtol=0, atol=1e-9)
        np.testing.assert_allclose(depth.numpy(), homogeneous[:, 2], rtol=1e-12)


def test_float64_projects_a_world_far_from_the_origin_and_float32_does_not():
    """UTM: 5e5 m east, 5e6 m north. What docs/cameras.md says about precision."""
    offset = torch.tensor([5e5, 5e6, 100.0], dtype=torch.float64)
    points, world2cam, batch = cloud(500).double(), pose(1).double(), torch.zeros(500, dtype=torch.long)
    far = world2cam.clone()
    far[:3, 3] -= far[:3, :3] @ offset
    expected, _ = project_to_image(apply_transform(points, world2cam), K.double())

    def error(points, matrix, intrinsics):
        uv, _ = project_packed(transform_packed(points, matrix[None, None], batch), intrinsics[None, None], batch)
        return (uv[:, 0] - expected).abs().max().item()

    assert error(points.float(), world2cam.float(), K) < 1e-3
    assert error(points + offset, far, K.double()) < 1e-5  # float64 resolves 1 nm there
    assert error(points + offset, far.float(), K) > 10 < error((points + offset).float(), far, K)


# ---------------------------------------------------------------------------------------------- visibility


def test_a_image_covers_half_a_pixel_beyond_its_outer_centres():
    h, w = SIZE
    uv = torch.tensor([[-0.5, -0.5], [w - 0.5, h - 0.5], [-0.51, 0], [0, -0.51], [w - 0.49, 0], [0, h - 0.49], [5, 5]])
    assert visible_mask(uv, torch.ones(7), SIZE).tolist() == [True, True, False, False, False, False, True]


@pytest.mark.parametrize("depth", [0.0, -0.0, -1e-30, -2.0, math.nan, math.inf, -math.inf])
def test_what_is_not_in_front_of_the_camera_is_not_visible(depth):
    uv, z = project_to_image(torch.tensor([[0.0, 0.0, depth]]), K)
    assert not visible_mask(uv, z, SIZE).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entry", range(3))
def test_a_point_with_a_coordinate_that_is_not_finite_is_not_visible(bad, entry):
    point = torch.tensor([[0.0, 0.0, 2.0]])
    point[0, entry] = bad
    assert not visible_mask(*project_to_image(point, K), SIZE).any()
    assert not visible_mask(*project_to_image(apply_transform(point, pose(0)), K), SIZE).any()


def test_a_point_is_occluded_where_a_surface_lies_more_than_the_tolerance_before_it():
    depth_map = torch.full((1, 4, 5), 2.0)
    depth_map[0, 1, 2] = 0  # a hole: nothing known
    depth_map[0, 3, 4] = 1.0
    uv = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0], [2, 1], [4.4, 3.4], [3.6, 2.6], [3.4, 3]])
    depth = torch.tensor([2.0, 2.049, 2.051, 0.5, 9, 1.2, 1.2, 1.2])
    view = torch.zeros(8, dtype=torch.long)
    expected = [False, False, True, False, False, True, True, False]
    assert occluded_mask(uv, depth, depth_map, view, 0.05).tolist() == expected
    assert occluded_mask(uv, depth, depth_map, view, 0.5).tolist() == [False] * 8
    assert not occluded_mask(uv, depth, torch.zeros_like(depth_map), view).any()
    assert not occluded_mask(uv, depth, torch.full_like(depth_map, math.nan), view).any()


def test_outside_of_the_depth_map_nothing_is_occluded_and_its_edges_are_read():
    depth_map = torch.full((1, 4, 5), 1.0)
    uv = torch.tensor([[-0.5, -0.5], [4.5, 3.5], [4.6, 0], [0, -0.6], [math.nan, 0], [1e30, 0], [math.inf, 1]])
    occluded = occluded_mask(uv, torch.full((7,), 5.0), depth_map, torch.zeros(7, dtype=torch.long))
    assert occluded.tolist() == [True, True] + [False] * 5


# ---------------------------------------------------------------------------------------------- sampling


def centre_map(grid, size, dtype=torch.float64):
    """(1, 2, Hf, Wf): each cell holds the pixel (u, v) at its centre."""
    v, u = (((torch.arange(cells, dtype=dtype) + 0.5) * s / cells - 0.5) for cells, s in zip(grid, size))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"))[None]


def within_centres(uv, grid, size):
    """Pixels between the outermost cell centres; beyond them sampling repeats the border and cannot be exact."""
    margin = torch.tensor([size[1] / grid[1], size[0] / grid[0]]) / 2
    return ((uv > margin - 0.5) & (uv < torch.tensor([size[1], size[0]]) - 0.5 - margin)).all(-1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("crop, size", [(None, SIZE), ((40, 30, 560, 420), (420, 560)), (None, (224, 224)),
                                        ((100, 0, 480, 480), (224, 224)), ((7, 11, 613, 407), (336, 448))])
def test_sampling_at_projected_points_returns_the_pixel(grid, crop, size):
    """crop: (x, y, w, h) of the 640 x 480 image, which is then resized to `size`."""
    points_cam = apply_transform(cloud(4000), pose(4, 0.1))
    x, y, w, h = crop or (0, 0, SIZE[1], SIZE[0])
    intrinsics = K.clone()
    intrinsics[0, 2] -= x
    intrinsics[1, 2] -= y
    scale = torch.tensor([size[1] / w, size[0] / h])
    intrinsics[:2, :2] *= scale[:, None]
    intrinsics[:2, 2] = (intrinsics[:2, 2] + 0.5) * scale - 0.5
    uv, depth = project_to_image(points_cam, intrinsics)
    keep = visible_mask(uv, depth, size) & within_centres(uv, grid, size)
    assert keep.sum() > 500
    sampled = sample_features(centre_map(grid, size), uv[keep], size, torch.zeros(int(keep.sum()), dtype=torch.long))
    # back in pixels of the full image, against the projection with its own intrinsics
    original = (sampled + 0.5) / scale - 0.5 + torch.tensor([x, y])
    expected, _ = project_to_image(points_cam[keep].double(), K.double())
    assert (original - expected).abs().max() < 1e-3


def grid_sample(feature_map, uv, size, batch):
    """torch's own sampler, one image at a time."""
    coordinates = 2 * (uv + 0.5) / uv.new_tensor([size[1], size[0]]) - 1
    out = uv.new_zeros(len(uv), feature_map.shape[1], dtype=feature_map.dtype)
    for b in range(len(feature_map)):
        own = batch == b
        sampled = F.grid_sample(feature_map[b:b + 1], coordinates[own][None, None], mode="bilinear",
                                padding_mode="border", align_corners=False)
        out = out.index_put((own.nonzero()[:, 0],), sampled[0, :, 0].T)
    return out


@pytest.mark.parametrize("grid", GRIDS + [(1, 1), (1, 5), (2, 1)])
def test_sampling_equals_grid_sample_forward_and_backward(grid):
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(3, 6, *grid, generator=generator, dtype=torch.float64, requires_grad=True)
    uv = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 800 - 80  # also outside of the image
    uv[:4] = torch.tensor([[-0.5, -0.5], [639.5, 479.5], [0, 0], [1e9, -1e9]])
    uv.requires_grad_()
    batch = torch.arange(200) % 3
    ours, theirs = (f(feature_map, uv, SIZE, batch) for f in (sample_features, grid_sample))
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * upstream).sum(), (feature_map, uv)) for x in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradients_of_positions_on_centres_and_borders_of_cells_are_those_of_grid_sample():
    feature_map = torch.randn(1, 5, 4, 8, dtype=torch.float64)
    v, u = torch.meshgrid(torch.arange(-0.5, 64, 4), torch.arange(-0.5, 128, 4), indexing="ij")  # cells of 16 pixels
    uv = torch.stack([u, v], -1).flatten(0, 1).double().requires_grad_()
    upstream, batch = torch.randn(len(uv), 5, dtype=torch.float64), torch.zeros(len(uv)).long()
    ours, theirs = (torch.autograd.grad((sample(feature_map, uv, (64, 128), batch) * upstream).sum(), uv)
                    for sample in (sample_features, grid_sample))
    torch.testing.assert_close(ours, theirs)


def test_sampling_gradcheck_in_double():
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    uv = (torch.rand(6, 2, 2, generator=generator, dtype=torch.float64) * 30).requires_grad_()
    visible = torch.rand(6, 2, generator=generator) < 0.6
    view = torch.randint(4, (6, 2), generator=generator)
    assert torch.autograd.gradcheck(lambda f, x: sample_views(f, x, (24, 40), view, visible), (feature_map, uv))


def test_corner_weights_are_a_partition_of_one_over_cells_of_the_map():
    index, weight = bilinear_corners(torch.rand(500, 2) * 900 - 100, SIZE, (7, 9))
    assert (weight >= 0).all() and index.min() >= 0 and index.max() < 63
    torch.testing.assert_close(weight.sum(-1), torch.ones(500))


def test_views_are_averaged_over_those_that_see_the_point():
    generator = torch.Generator().manual_seed(0)
    maps, uv = torch.randn(6, 4, 5, 5, generator=generator), torch.rand(40, 3, 2, generator=generator) * 100
    visible, owner = torch.rand(40, 3, generator=generator) < 0.5, torch.arange(40) % 2
    visible[0], visible[1] = False, True
    out = sample_views(maps, uv, (100, 100), owner[:, None] * 3 + torch.arange(3), visible)
    for n in range(40):
        seen = [sample_features(maps, uv[n, v][None], (100, 100), owner[n:n + 1] * 3 + v)[0]
                for v in range(3) if visible[n, v]]
        torch.testing.assert_close(out[n], torch.stack(seen).mean(0) if seen else torch.zeros(4))
    assert not visible.any(1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cells_that_no_visible_point_touches_have_no_influence_and_get_no_gradient(bad):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 8, 8, generator=generator)
    uv = torch.rand(20, 1, 2, generator=generator) * 80
    visible, view = torch.rand(20, 1, generator=generator) < 0.4, torch.randint(2, (20, 1), generator=generator)
    touched = torch.zeros(2, 8, 8, dtype=torch.bool)
    for (u, v), seen, i in zip(uv[:, 0].tolist(), visible[:, 0], view[:, 0]):
        if seen:  # an independent count of the cells: those whose bilinear tent reaches the point
            x, y = (min(max((p + 0.5) / 10 - 0.5, 0), 7) for p in (u, v))
            touched[i] |= torch.outer((torch.arange(8) - y).abs() < 1, (torch.arange(8) - x).abs() < 1)
    assert 0 < touched.sum() < touched.numel()
    poisoned = maps.where(touched[:, None], bad).requires_grad_()
    uv[~visible] = bad
    out = sample_views(poisoned, uv, (80, 80), view, visible)
    out.square().sum().backward()
    assert torch.equal(out, sample_views(maps, uv, (80, 80), view, visible))
    gradient = poisoned.grad.abs().sum(1)
    assert gradient.isfinite().all() and torch.equal(gradient > 0, touched)


def test_weighted_rows_are_a_product_with_a_matrix_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(8, (40, 5), generator=generator).int()  # 7: no row
    weight = torch.rand(40, 5, generator=generator, dtype=torch.float64).requires_grad_()
    matrix = torch.zeros(40, 8, dtype=torch.float64).scatter_add(1, index.long(), weight)[:, :7]
    upstream = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    ours, theirs = weighted_rows(rows, index, weight), matrix @ rows
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad((out * upstream).sum(), (rows, weight)) for out in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_views_that_do_not_see_a_point_read_no_cell_and_the_rest_its_share():
    generator = torch.Generator().manual_seed(0)
    uv, visible = torch.rand(30, 3, 2, generator=generator) * 100, torch.rand(30, 3, generator=generator) < 0.5
    index, weight = view_cells(uv, (100, 100), (6, 4, 5), torch.arange(3).expand(30, 3), visible)
    assert index.shape == weight.shape == (30, 12) and not weight.view(30, 3, 4)[~visible].any()
    assert ((index.view(30, 3, 4) == 6 * 4 * 5) == ~visible[..., None]).all()
    assert (index.view(30, 3, 4)[visible].amin(1) // 20 == torch.arange(3).expand(30, 3)[visible]).all()
    torch.testing.assert_close(weight.sum(1), visible.any(1).float())


def test_a_position_that_is_no_number_samples_zeros():
    uv = torch.tensor([[math.nan, 3.0], [3.0, 3.0], [3.0, math.nan]])
    out = sample_features(torch.ones(1, 2, 4, 4), uv, (8, 8), torch.zeros(3, dtype=torch.long))
    assert out.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_sampling_no_point_gives_no_row_and_a_graph():
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = sample_features(maps, torch.zeros(0, 2), (8, 8), torch.zeros(0, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0, 3) and not maps.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_maps_are_sampled_in_fp32(dtype):
    maps, uv, batch = torch.randn(1, 3, 30, 40).to(dtype), torch.rand(50, 2) * 480, torch.zeros(50, dtype=torch.long)
    out = sample_features(maps, uv, SIZE, batch)
    assert out.dtype == torch.float32 and torch.equal(out, sample_features(maps.float(), uv, SIZE, batch))


# ---------------------------------------------------------------------------------------------- transforms


def problems(n):
    """n inputs of the sampler."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(n, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    uv = torch.rand(n, 6, 2, generator=generator, dtype=torch.float64) * 40
    return maps, uv, torch.randint(2, (n, 6), generator=generator)


class Sampler(nn.Module):
    def forward(self, feature_map, uv, batch):
        return sample_features(feature_map, uv, (40, 50), batch)


def test_sampling_compiles_without_a_break_and_exports_for_any_number_of_points():
    maps, uv, batch = (x[0] for x in problems(1))
    maps.requires_grad_()
    expected, = torch.autograd.grad(Sampler()(maps, uv, batch).square().sum(), maps)
    compiled = torch.compile(Sampler(), fullgraph=True, backend="eager")(maps, uv, batch)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), maps)[0], expected)
    n = torch.export.Dim("n", min=2, max=1000)
    exported = torch.export.export(Sampler(), (maps, uv, batch), dynamic_shapes=(None, {0: n}, {0: n})).module()
    torch.testing.assert_close(exported(maps, uv[:4], batch[:4]), Sampler()(maps, uv[:4], batch[:4]))


# ---------------------------------------------------------------------------------------------- gate


def test_the_gate_is_closed_where_nothing_was_seen():
    torch.manual_seed(0)
    gate = FusionGate(8, 4)
    feat_3d, feat_2d = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8)
    valid = torch.arange(10) % 2 == 0
    feat_2d[~valid] = math.nan
    feat_2d.requires_grad_()
    fused, alpha = gate(feat_3d, feat_2d, valid)
    assert torch.equal(fused[~valid], feat_3d[~valid]) and not alpha[~valid].any()
    assert ((alpha[valid] > 0) & (alpha[valid] < 1)).all() and alpha.shape == (10, 1)
    torch.testing.assert_close(fused[valid], ((1 - alpha) * feat_3d + alpha * feat_2d)[valid])
    fused.square().sum().backward()
    assert not feat_2d.grad[~valid].any() and feat_2d.grad[valid].all(1).all()
    torch.testing.assert_close(feat_3d.grad[~valid], 2 * feat_3d.detach()[~valid])
    assert all(p.grad.isfinite().all() for p in gate.parameters())


def test_an_open_gate_takes_the_image_and_a_shut_one_the_points():
    gate = FusionGate(8, 4)
    feat_3d, feat_2d, valid = torch.randn(5, 8), torch.randn(5, 8), torch.ones(5, dtype=torch.bool)
    for bias, expected in ((1e4, feat_2d), (-1e4, feat_3d)):
        nn.init.constant_(gate.gate[-1].bias, bias)
        torch.testing.assert_close(gate(feat_3d, feat_2d, valid)[0], expected)


def test_gate_rows_are_independent():
    torch.manual_seed(0)
    gate, feat_3d, feat_2d = FusionGate(8, 4), torch.randn(6, 8), torch.randn(6, 8)
    valid = torch.tensor([True, True, False, True, False, True])
    whole = gate(feat_3d, feat_2d, valid)
    for i in range(6):
        torch.testing.assert_close([x[i:i + 1] for x in whole], list(gate(feat_3d[[i]], feat_2d[[i]], valid[[i]])))


def test_the_gate_is_its_layers_on_the_concatenated_features():
    torch.manual_seed(0)
    gate, feat_3d, feat_2d = FusionGate(8, 4), torch.randn(40, 8), torch.randn(40, 8)
    expected = gate.gate(torch.cat([feat_3d, feat_2d], 1)).sigmoid()
    torch.testing.assert_close(gate(feat_3d, feat_2d, torch.ones(40, dtype=torch.bool))[1], expected)


# ---------------------------------------------------------------------------------------------- the whole encoder


CACHED = ("clip_tokens", "clip_pooled", "clip_dense_map")


class Tower(nn.Module):
    """Stands in for the image encoder: 16 x 16 patches of a 64 x 96 image, no exchange between them."""

    image_size = (64, 96)

    def __init__(self, dim=16):
        super().__init__()
        self.spatial_proj = nn.Conv2d(12, dim, 1)
        self.register_buffer("fixed", torch.randn(dim, 12, generator=torch.Generator().manual_seed(0)))

    def encode(self, images):
        tokens = F.avg_pool2d(F.pixel_unshuffle(images, 2), 8)
        return tokens, tokens.mean((2, 3))

    def project(self, tokens, pooled):
        return self.spatial_proj(tokens.float()), F.linear(pooled.float(), self.fixed)

    def encode_with_dense(self, images):
        tokens, pooled = self.encode(images)
        return tokens, pooled, tokens.flip(1)

    def project_dense_target(self, dense):
        return F.conv2d(dense.float(), self.fixed[:, :, None, None])

    def forward(self, images):
        return self.project(*self.encode(images))


class Points(nn.Module):
    """Stands in for the 3D encoder: one row at a time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, batch):
        return self.layer(torch.cat([batch["coords"], batch["features"]], 1)).relu()


def model(**options):
    torch.manual_seed(0)
    return BiFusionEncoder(Tower(), Points(), dim_3d=12, embed_dim=16, **options).eval()


def sample(n, v=2, seed=0):
    """One scene as `collate` would make it, with depth at another size than the images."""
    generator = torch.Generator().manual_seed(seed)
    intrinsics = torch.tensor([[80.0, 0, 47.5], [0, 80, 31.5], [0, 0, 1]])
    depth_intrinsics = torch.tensor([[40.0, 0, 23.5], [0, 40, 15.5], [0, 0, 1]])
    return {
        "points": torch.rand(n, 3, generator=generator) * torch.tensor([6.0, 4, 4]) + torch.tensor([-3.0, -2, 0.5]),
        "coords": torch.randn(n, 3, generator=generator), "features": torch.rand(n, 3, generator=generator),
        "batch": torch.zeros(n, dtype=torch.long), "images": torch.rand(1, v, 3, 64, 96, generator=generator),
        "world2cam": torch.stack([pose(seed * 10 + i, 0.2) for i in range(v)])[None],
        "intrinsics": intrinsics.expand(1, v, 3, 3).clone(),
        "depth": 1 + 3 * torch.rand(1, v, 32, 48, generator=generator),
        "depth_intrinsics": depth_intrinsics.expand(1, v, 3, 3).clone()}


def collate(samples):
    out = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
    out["batch"] = torch.cat([torch.full_like(s["batch"], i) for i, s in enumerate(samples)])
    return out


OUTPUTS = {"feat_fusion", "feat_3d", "clip_global", "clip_point", "clip_dense", "valid", "alpha"}


@pytest.mark.parametrize("dense_target", [False, True])
def test_a_batch_equals_its_scenes_one_by_one(dense_target):
    net = model(dense_target=dense_target)
    scenes = [sample(50, seed=1), sample(0, seed=2), sample(1, seed=3), sample(30, seed=4)]
    whole, parts = net(collate(scenes)), [net(s) for s in scenes]
    assert set(whole) == OUTPUTS and 0 < whole["valid"].sum() < 81
    assert whole["feat_fusion"].shape == (81, 16) and whole["clip_global"].shape == (4, 16)
    for name in OUTPUTS if dense_target else OUTPUTS - {"clip_dense"}:
        torch.testing.assert_close(whole[name], torch.cat([p[name] for p in parts]), rtol=1e-5, atol=1e-6)


def test_the_global_target_is_the_mean_over_the_views_of_a_scene():
    net, scenes = model(), collate([sample(5, v=3, seed=1), sample(5, v=3, seed=2)])
    expected = torch.stack([torch.stack([net.encoder_2d(view[None])[1][0] for view in views]).mean(0)
                            for views in scenes["images"]])
    torch.testing.assert_close(net(scenes)["clip_global"], expected)


def test_the_fused_feature_is_the_gate_of_its_two_parts():
    net, scene = model(), sample(60, v=3)
    out = net(scene)
    fused, alpha = net.gate(out["feat_3d"], out["clip_point"], out["valid"])
    torch.testing.assert_close(out["feat_fusion"], fused)
    torch.testing.assert_close(out["alpha"], alpha)


class ChannelGate(nn.Module):
    """Another gate: one value per channel."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(2 * dim, dim)

    def forward(self, feat_3d, feat_2d, valid):
        feat_2d = feat_2d.where(valid[:, None], 0)
        alpha = self.layer(torch.cat([feat_3d, feat_2d], 1)).sigmoid() * valid[:, None]
        return torch.lerp(feat_3d, feat_2d, alpha), alpha


def test_another_gate_works_unchanged():
    net, scene = model(gate=ChannelGate(16)), sample(60)
    out = net(scene)
    out["feat_fusion"].square().sum().backward()
    assert set(out) == OUTPUTS and out["alpha"].shape == (60, 16)
    assert torch.equal(out["feat_fusion"][~out["valid"]], out["feat_3d"][~out["valid"]])
    assert net.gate.layer.weight.grad.any() and net.encoder_2d.spatial_proj.weight.grad.any()


def test_point_order_does_not_matter():
    net, scene, order = model(), sample(40), torch.randperm(40)
    shuffled = {**scene, **{name: scene[name][order] for name in ("points", "coords", "features")}}
    torch.testing.assert_close(net(shuffled)["feat_fusion"], net(scene)["feat_fusion"][order], rtol=1e-5, atol=1e-6)


def test_points_projected_in_parts_are_those_projected_at_once(monkeypatch):
    net, scenes = model(), collate([sample(50, v=3, seed=1), sample(30, v=3, seed=2)])
    results = []
    for chunk in (10 ** 9, 7):
        monkeypatch.setattr("fusion.CHUNK", chunk)
        points = scenes["points"].clone().requires_grad_()
        out = net({**scenes, "points": points})
        results.append((out["feat_fusion"], out["valid"], *torch.autograd.grad(out["feat_fusion"].sum(), points)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])
    assert results[0][2].any()


def test_an_unseen_point_is_the_3d_path_exactly_and_sends_nothing_to_the_image():
    net, scene = model(), sample(60)
    scene["images"].requires_grad_()
    out = net(scene)
    unseen = ~out["valid"]
    assert unseen.any() and torch.equal(out["feat_fusion"][unseen], out["feat_3d"][unseen])
    assert not out["alpha"][unseen].any() and not out["clip_point"][unseen].any()
    assert (out["alpha"][out["valid"]] > 0).all()
    from_unseen = out["feat_fusion"][unseen].square().sum()
    assert not torch.autograd.grad(from_unseen, scene["images"], retain_graph=True)[0].any()
    assert torch.autograd.grad(out["feat_fusion"].square().sum(), scene["images"])[0].any()


def test_an_unseen_point_equals_the_baseline_without_images():
    net = model()
    baseline = BiFusionEncoder(None, net.encoder_3d, dim_3d=12, embed_dim=16)
    baseline.load_state_dict({k: v for k, v in net.state_dict().items() if k.startswith(("encoder_3d", "proj_3d"))})
    scene = sample(60)
    out, alone = net(scene), baseline({k: scene[k] for k in ("points", "coords", "features", "batch")})
    assert torch.equal(out["feat_fusion"][~out["valid"]], alone["feat_fusion"][~out["valid"]])
    assert set(alone) == OUTPUTS and all(alone[name] is None for name in OUTPUTS if "clip" in name)
    assert not alone["valid"].any() and not alone["alpha"].any()


def test_images_change_only_the_points_that_land_on_them():
    net, scene = model(), sample(200, v=1)
    out = net(scene)
    uv, visible, _ = net.project(scene, (64, 96))
    changed = scene["images"].clone()
    changed[..., 32:48, 64:80] = 1 - changed[..., 32:48, 64:80]  # cell (2, 4): its tent covers u 56..88, v 24..56
    reach = (uv[:, 0, 0] > 55.5) & (uv[:, 0, 0] < 87.5) & (uv[:, 0, 1] > 23.5) & (uv[:, 0, 1] < 55.5) & visible[:, 0]
    moved = (net({**scene, "images": changed})["feat_fusion"] != out["feat_fusion"]).any(1)
    assert reach.any() and torch.equal(moved, reach)


def test_a_cell_that_is_not_finite_reaches_no_point_elsewhere():
    net, scene = model(), sample(200, v=1)
    out, (uv, visible, _) = net(scene), net.project(scene, (64, 96))
    tokens, pooled = net.encoder_2d.encode(scene["images"][0])
    tokens[:, :, 2, 4] = math.nan
    reach = (uv[:, 0, 0] > 55.5) & (uv[:, 0, 0] < 87.5) & (uv[:, 0, 1] > 23.5) & (uv[:, 0, 1] < 55.5) & visible[:, 0]
    cached = {k: x for k, x in scene.items() if k != "images"}
    fused = net({**cached, "clip_tokens": tokens[None], "clip_pooled": pooled[None]})["feat_fusion"]
    torch.testing.assert_close(fused[~reach], out["feat_fusion"][~reach], rtol=1e-5, atol=1e-6)
    assert fused[reach].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entry", [(0, 0), (0, 3), (1, 3), (2, 3), (2, 2), "all"])
def test_a_pose_that_is_not_finite_sees_nothing(bad, entry):
    net, scene = model(), sample(40)
    lost = scene["world2cam"].clone()
    lost[0, 1][(slice(3), slice(4)) if entry == "all" else entry] = bad
    del scene["depth"], scene["depth_intrinsics"]
    out = net({**scene, "world2cam": lost})
    one_view = net({**scene, **{k: scene[k][:, :1] for k in ("world2cam", "intrinsics", "images")}})
    assert torch.equal(out["valid"], one_view["valid"]) and out["valid"].any()
    torch.testing.assert_close(out["feat_fusion"], one_view["feat_fusion"], rtol=1e-5, atol=1e-6)
    net.train()
    net({**scene, "world2cam": lost})["feat_fusion"].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_projection_reads_the_points_and_the_3d_encoder_the_coordinates():
    net, scene = model(), sample(50)
    out = net(scene)
    augmented = net({**scene, "coords": scene["coords"] * 3 + 1})
    assert torch.equal(out["valid"], augmented["valid"]) and torch.equal(out["clip_point"], augmented["clip_point"])
    assert not torch.equal(out["feat_3d"], augmented["feat_3d"])
    moved = net({**scene, "points": scene["points"] + torch.tensor([0.3, 0, 0])})
    assert torch.equal(out["feat_3d"], moved["feat_3d"]) and not torch.equal(out["clip_point"], moved["clip_point"])


def test_depth_hides_points_by_the_tolerance():
    scene = sample(200, v=1)
    free = model()({k: x for k, x in scene.items() if "depth" not in k})["valid"]
    seen = {t: model(depth_tolerance=t)(scene)["valid"] for t in (0.05, 1.0, 100.0)}
    uv, depth = project_to_image(apply_transform(scene["points"], scene["world2cam"][0, 0]),
                                 scene["depth_intrinsics"][0, 0])
    column, row = uv.round().long().unbind(1)
    for tolerance, valid in seen.items():
        for n in free.nonzero()[:, 0].tolist():
            surface = scene["depth"][0, 0, min(max(row[n], 0), 31), min(max(column[n], 0), 47)]
            assert valid[n] == (depth[n] <= surface + tolerance)
        assert not (valid & ~free).any()
    assert seen[0.05].sum() < seen[1.0].sum() < free.sum() == seen[100.0].sum()
    assert torch.equal(model()({**scene, "depth": torch.zeros_like(scene["depth"])})["valid"], free)  # only holes


@pytest.mark.parametrize("dense_target", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cached_features_give_what_the_images_give(dense_target, dtype):
    net, scenes = model(dense_target=dense_target), collate([sample(30, seed=1), sample(20, seed=2)])
    expected = net(scenes)
    features = net.encoder_2d.encode_with_dense(scenes["images"].flatten(0, 1))
    cached = {k: x for k, x in scenes.items() if k != "images"}
    cached |= {k: x.unflatten(0, (2, 2)).to(dtype) for k, x in zip(CACHED, features)}
    out = net(cached)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for name in OUTPUTS if dense_target else OUTPUTS - {"clip_dense"}:
        torch.testing.assert_close(out[name], expected[name], rtol=tolerance, atol=tolerance)


def test_a_gate_that_forgets_invalid_points_cannot_change_them():
    class Half(nn.Module):
        def forward(self, feat_3d, feat_2d, valid):
            return (feat_3d + feat_2d) / 2, feat_3d.new_full((len(valid), 1), 0.5)

    net, scene = model(gate=Half()), sample(60)
    scene["world2cam"][:, 0, :3, 3] -= 2  # many points leave the image
    scene.pop("depth")
    out = net(scene)
    assert not out["valid"].all()
    assert torch.equal(out["feat_fusion"][~out["valid"]], out["feat_3d"][~out["valid"]])
    assert not out["alpha"][~out["valid"]].any()


def test_the_dense_target_cannot_be_trained_and_the_sampled_feature_can():
    plain, dense = (model(dense_target=flag)(sample(30)) for flag in (False, True))
    assert plain["clip_dense"] is None and not dense["clip_dense"].requires_grad
    assert plain["clip_point"].requires_grad and torch.equal(plain["clip_point"], dense["clip_point"])
    assert torch.equal(plain["feat_fusion"], dense["feat_fusion"])


# ---------------------------------------------------------------------------------------------- cameras of all kinds


class PixelTower(nn.Module):
    """Every cell of the feature map holds the pixel of its centre, in images of 60 x 90 for whatever camera."""

    def forward(self, images):
        spatial = centre_map((60, 90), (60, 90), torch.float32).expand(len(images), 2, 60, 90)
        return spatial + 0 * images[:, :2], images.mean((2, 3))[:, :2]


def six_cameras():
    """A scene of 400 points and six cameras around it: 1296 x 968, but 640 x 480 for 3 to 5, of which 3 is a fisheye
    and 4 is absent, with NaN in all of its fields. Images are 90 x 60."""
    points = cloud(400) - torch.tensor([0.0, 0.0, 3.0])  # about the origin
    world2cam = torch.stack([pose(i, 0.1) for i in range(6)])
    for i in range(6):
        c, s = math.cos(i * math.pi / 3), math.sin(i * math.pi / 3)
        turn = torch.tensor([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])
        world2cam[i] = world2cam[i] @ turn
        world2cam[i, 2, 3] += 2.0
    sizes = torch.tensor([[968, 1296]] * 3 + [[480, 640]] * 3)
    intrinsics = torch.stack([torch.tensor([[0.6 * w, 0, 0.51 * w], [0, 0.62 * w, 0.48 * h], [0, 0, 1]])
                              for h, w in sizes.tolist()])
    scene = {"points": points, "coords": points, "features": points, "batch": torch.zeros(400, dtype=torch.long),
             "images": torch.rand(1, 6, 3, 60, 90), "world2cam": world2cam[None], "intrinsics": intrinsics[None],
             "image_sizes": sizes[None], "view_valid": torch.tensor([[True] * 4 + [False, True]])}
    for name in ("images", "world2cam", "intrinsics"):
        scene[name][0, 4] = math.nan
    return scene


FISHEYE = (260.0, 262.0, 318.0, 236.0), (0.05, -0.01, 0.004, -0.0006)  # fx fy cx cy, k1 to k4 of Kannala and Brandt


def numpy_projection(scene, view):
    """Where the points lie in a view of `six_cameras`, in pixels of the 90 x 60 image: uv (400, 2) and whether seen."""
    h, w = scene["image_sizes"][0, view].numpy()
    matrix, (x, y, z) = scene["world2cam"][0, view].double().numpy(), np.zeros((3, 400))
    x, y, z = matrix[:3, :3] @ scene["points"].double().numpy().T + matrix[:3, 3:]
    if view == 3:
        (fx, fy, cx, cy), k = FISHEYE
        theta, phi = np.arccos(z / np.sqrt(x * x + y * y + z * z)), np.arctan2(y, x)
        radius = theta * np.polyval([*k[::-1], 1], theta ** 2)
        u, v = fx * radius * np.cos(phi) + cx, fy * radius * np.sin(phi) + cy
    else:
        u, v, _ = scene["intrinsics"][0, view].double().numpy() @ (x, y, z) / z
    seen = (z > 0) & (u >= -0.5) & (u <= w - 0.5) & (v >= -0.5) & (v <= h - 0.5)
    return np.stack([(u + 0.5) * 90 / w - 0.5, (v + 0.5) * 60 / h - 0.5], 1), seen


def documented():
    """What the Python blocks of docs/cameras.md define."""
    text = (Path(__file__).parent.parent / "docs" / "cameras.md").read_text()
    names = {}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def pixel_model(**options):
    torch.manual_seed(0)
    net = BiFusionEncoder(PixelTower(), Points(), dim_3d=12, embed_dim=2, **options)
    net.norm_2d = nn.Identity()
    return net


def test_six_cameras_of_two_sizes_one_absent_and_one_fisheye_paint_as_numpy_does():
    scene = six_cameras()
    (fx, fy, cx, cy), k = FISHEYE
    fisheye = documented()["kannala_brandt"](fx, fy, cx, cy, k, max_angle=math.radians(95))
    net = pixel_model(camera_model=[None, None, None, fisheye, None, None])
    out, (uv, visible, _) = net(scene), net.project(scene, (60, 90))
    total, count, inner = np.zeros((400, 2)), np.zeros(400), np.ones(400, bool)
    for view in (0, 1, 2, 3, 5):
        expected, seen = numpy_projection(scene, view)
        assert 50 < seen.sum() < 400 and np.array_equal(visible[:, view].numpy(), seen), view
        assert np.abs(uv[:, view].numpy() - expected)[seen].max() < 1e-3
        total[seen] += expected[seen]
        count += seen
        inner &= ~seen | ((expected >= 0) & (expected <= (89, 59))).all(1)
    assert not visible[:, 4].any() and np.array_equal(out["valid"].numpy(), count > 0)
    painted = out["clip_point"].detach().numpy()[inner & (count > 0)]
    assert len(painted) > 100 and np.abs(painted - (total / count[:, None])[inner & (count > 0)]).max() < 1e-3
    expected = scene["images"][0, [0, 1, 2, 3, 5], :2].mean((0, 2, 3))
    torch.testing.assert_close(out["clip_global"][0], expected)
    own = net({**scene, "camera_model": net.camera_model})
    assert torch.equal(own["clip_point"], out["clip_point"])  # handed in with the batch


def test_resized_intrinsics_say_the_same_as_the_sizes_of_the_cameras():
    scene, net = six_cameras(), pixel_model()
    resized = {name: x.clone() for name, x in scene.items() if name != "image_sizes"}
    scale = torch.tensor([60, 90]) / scene["image_sizes"][0]  # (6, 2)
    resized["intrinsics"][0, :, :2] *= scale.flip(1)[..., None]
    resized["intrinsics"][0, :, :2, 2] += 0.5 * scale.flip(1) - 0.5
    torch.testing.assert_close(net(resized)["clip_point"], net(scene)["clip_point"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dense_target", [False, True])
def test_an_absent_view_is_as_if_it_had_not_been_given_whatever_it_holds(cached, dense_target):
    net, scenes = model(dense_target=dense_target).train(), collate([sample(40, v=3, seed=1), sample(30, v=3, seed=2)])
    if cached:
        features = net.encoder_2d.encode_with_dense(scenes.pop("images").flatten(0, 1))
        scenes |= {k: x.unflatten(0, (2, 3)) for k, x in zip(CACHED, features)}
    per_view = {"images", *CACHED, "world2cam", "intrinsics", "depth", "depth_intrinsics"}
    fewer = {name: x[:, :2] if name in per_view else x for name, x in scenes.items()}
    absent = {name: x.clone() for name, x in scenes.items()}
    for name in per_view & set(absent):
        absent[name][:, 2] = math.nan
    absent["view_valid"] = torch.tensor([[True, True, False]] * 2)
    results = []
    for batch in (fewer, absent):
        out = net(batch)
        loss = sum(x.square().sum() for x in (out["feat_fusion"], out["clip_global"]))
        parameters = [p for p in net.parameters() if p.requires_grad]
        results.append((*(out[name] for name in sorted(OUTPUTS) if out[name] is not None),
                        *torch.autograd.grad(loss, parameters, allow_unused=True)))
    assert results[0][-1] is not None
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_views_that_are_all_there_change_nothing_and_a_scene_without_any_has_a_global_feature_of_zero():
    net, scenes = model(), collate([sample(40, seed=1), sample(30, seed=2)])
    out = net(scenes)
    all_there = net({**scenes, "view_valid": torch.ones(2, 2, dtype=torch.bool)})
    assert torch.equal(out["feat_fusion"], all_there["feat_fusion"])
    torch.testing.assert_close(out["clip_global"], all_there["clip_global"])
    one = net({**scenes, "view_valid": torch.tensor([[False, False], [True, True]])})
    assert not one["clip_global"][0].any() and not one["valid"][:40].any() and one["valid"][40:].any()
    assert torch.equal(one["feat_fusion"][:40], one["feat_3d"][:40])


@pytest.mark.parametrize("camera_model", [lambda points: points, [None], [None, None, None]])
def test_a_camera_model_of_another_shape_is_refused(camera_model):
    with pytest.raises(ValueError, match="camera_model"):
        model(camera_model=camera_model)(sample(5))


class Whole(nn.Module):
    """A BiFusionEncoder with its criterion."""

    def __init__(self):
        super().__init__()
        self.encoder = model()

    def forward(self, batch):
        out = self.encoder(batch)
        return out["feat_fusion"], out["clip_global"], out["valid"]


def test_the_whole_encoder_compiles_without_a_break_and_exports():
    net, scene = Whole(), collate([sample(30, seed=1), sample(20, seed=2)])
    expected = net(scene)
    compiled = torch.compile(net, fullgraph=True, backend="eager")(scene)
    exported = torch.export.export(net, (scene,)).module()(scene)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, points", [
    ("no point", torch.zeros(0, 3)), ("one point", torch.tensor([[0.0, 0, 2]])),
    ("all behind", torch.tensor([[0.0, 0, -2], [1, 1, -3]])), ("at the centre", torch.zeros(2, 3)),
    ("not a number", torch.full((3, 3), math.nan))])
def test_degenerate_clouds_pass_forward_and_backward(name, points):
    net, scene = model().train(), sample(len(points))
    scene["world2cam"][:] = torch.eye(4)
    out = net({**scene, "points": points, "depth": torch.zeros_like(scene["depth"])})
    assert out["valid"].tolist() == ([True] if name == "one point" else [False] * len(points))
    assert out["feat_fusion"].shape == (len(points), 16) and out["feat_fusion"].isfinite().all()
    out["feat_fusion"].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_same_points_are_seen_at_the_same_pixels(dtype):
    net, scene = model(), sample(60)
    full, geometry = net(scene), net.project(scene, (64, 96))
    with torch.autocast("cpu", dtype):
        low = net(scene)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(net.project(scene, (64, 96)), geometry))
    assert torch.equal(low["valid"], full["valid"])
    assert torch.equal(low["feat_fusion"][~low["valid"]], low["feat_3d"][~low["valid"]])
    torch.testing.assert_close(low["feat_fusion"].float(), full["feat_fusion"], rtol=0.1, atol=0.1)


def test_the_batch_is_left_alone():
    net, scene = model(), sample(30)
    before = {name: value.clone() for name, value in scene.items()}
    net(scene)
    assert set(scene) == set(before) and all(torch.equal(scene[name], value) for name, value in before.items())


@pytest.mark.parametrize("field, value", [
    ("points", None), ("points", (30, 2)), ("coords", None), ("coords", (29, 3)), ("features", None),
    ("features", (29, 3)), ("features", (30,)), ("batch", None), ("batch", (29,)), ("world2cam", None),
    ("world2cam", (1, 2, 3, 3)), ("world2cam", (2, 4, 4)), ("intrinsics", None),
    ("intrinsics", (1, 2, 4)), ("intrinsics", (1, 1, 3, 3)), ("images", None), ("images", (1, 3, 64, 96)),
    ("images", (1, 3, 3, 64, 96)), ("images", (1, 2, 1, 64, 96)), ("depth", (1, 2, 48)), ("depth", (2, 2, 32, 48)),
    ("depth_intrinsics", None), ("depth_intrinsics", (1, 2, 1))])
def test_a_missing_or_misshapen_field_is_named_with_its_shape(field, value):
    scene = sample(30)
    del scene[field]
    if value is not None:
        scene[field] = torch.zeros(value)
    with pytest.raises(ValueError, match=f"'{field}'") as error:
        model()(scene)
    assert "missing" in str(error.value) if value is None else str(value) in str(error.value)


def test_cached_features_are_checked_and_the_baseline_needs_no_camera():
    scene = sample(5)
    del scene["images"]
    scene["clip_tokens"] = torch.zeros(1, 2, 12, 4)
    with pytest.raises(ValueError, match=r"'clip_tokens'.*\(1, 2, 12, 4\)"):
        check_batch(scene, True)
    scene["clip_tokens"] = torch.zeros(1, 2, 12, 4, 6)
    with pytest.raises(ValueError, match="'clip_pooled'.*missing"):
        check_batch(scene, True)
    check_batch({name: scene[name] for name in ("points", "coords", "features", "batch")}, False)


REFUSED = [  # function, shapes of its arguments
    *((apply_transform, shapes) for shapes in (
        ((5, 2), (4, 4)), ((5, 3), (3, 4)), ((5, 3), (2, 4, 4)), ((3,), (4, 4)), ((2, 5, 3), (3, 4, 4)),
        ((1, 2, 5, 3), (4, 4)), ((5, 3), (4, 3)))),
    *((project_to_image, shapes) for shapes in (((5, 2), (3, 3)), ((5, 3), (4, 4)), ((5, 3), (3, 4)))),
    *((lambda maps, uv, batch: sample_features(maps, uv, SIZE, batch.long()), shapes) for shapes in (
        ((2, 3, 4), (5, 2), (5,)), ((2, 3, 4, 4), (5, 3), (5,)), ((2, 3, 4, 4), (5, 2), (4,)),
        ((2, 3, 4, 4), (1, 5, 2), (1,)))),
    *((lambda feat_3d, feat_2d, valid: FusionGate(8)(feat_3d, feat_2d, valid > 0), shapes) for shapes in (
        ((4, 8), (4, 7), (4,)), ((4, 8), (3, 8), (4,)), ((4, 8), (4, 8), (4, 1)), ((4, 8), (4, 8), (3,)))),
    *((transform_packed, shapes) for shapes in (
        ((5, 3), (4, 4), (5,)), ((5, 3), (1, 2, 3, 4), (5,)), ((5, 4), (1, 2, 4, 4), (5,)),
        ((5, 3), (1, 2, 4, 4), (6,)))),
    *((project_packed, shapes) for shapes in (
        ((5, 3), (1, 2, 3, 3), (5,)), ((5, 2, 3), (1, 2, 3, 4), (5,)), ((5, 2, 3), (1, 2, 4, 4), (5,)),
        ((5, 2, 3), (1, 3, 3, 3), (5,)))),
    *((fold_projection, shapes) for shapes in (((3, 3), (4, 4)), ((4, 4), (4, 4)), ((3, 4), (3, 4)))),
    (lambda uv, depth: visible_mask(uv, depth, SIZE), ((5, 2), (4,))),
    (lambda depth, depth_map, view: occluded_mask(torch.zeros(5, 2), depth, depth_map, view), ((5,), (4, 4), (5,))),
    (lambda uv: bilinear_corners(uv, SIZE, (4, 4)), ((5, 3),)),
    (weighted_rows, ((5, 3), (4, 2), (4, 3))),
    (lambda uv, view, visible: view_cells(uv, SIZE, (2, 4, 4), view, visible), ((5, 2), (5, 1), (5, 1)))]


@pytest.mark.parametrize("function, shapes", REFUSED, ids=str)
def test_misshapen_arguments_are_refused_with_their_shapes(function, shapes):
    with pytest.raises(ValueError) as error:
        function(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def last_row(n, *values):
    matrix = torch.eye(n)
    matrix[-1, -len(values):] = torch.tensor(values)
    return matrix


POINTS, IDS, MAPS = torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 3, 4, 4)
BAD_VALUES = [  # call, what the message must hold
    (lambda: apply_transform(POINTS, pose(1).T), r"matrix \(4, 4\) must have the last row 0 0 0 1"),
    (lambda: apply_transform(POINTS, last_row(4, 2.0)), "last row 0 0 0 1"),
    (lambda: project_to_image(POINTS, K.T), r"intrinsics \(3, 3\) must have the last row 0 0 1"),
    (lambda: fold_projection(torch.zeros(3, 4), torch.eye(4)), r"projection \(3, 4\) must have the third row 0 0 1 t"),
    (lambda: fold_projection(torch.eye(4)[:3], pose(1).T), r"world2cam \(4, 4\) must have the last row 0 0 0 1"),
    (lambda: sample_features(MAPS, POINTS[:, :2], SIZE, IDS), r"batch \(2,\) must lie in \[0, 2\)"),
    (lambda: sample_features(MAPS, POINTS[:, :2], SIZE, -IDS), r"batch \(2,\) must lie in \[0, 2\)"),
    (lambda: sample_features(MAPS, POINTS[:, :2], SIZE, IDS.float()), "batch must be int32 or int64, got torch.float32"),
    (lambda: sample_views(MAPS, torch.zeros(2, 1, 2), SIZE, IDS[:, None], IDS[:, None] > 0), r"view \(2, 1\) must lie"),
    (lambda: sample_views(MAPS, torch.zeros(2, 1, 2), SIZE, 0 * IDS[:, None], IDS[:, None]), "visible must be bool"),
    (lambda: FusionGate(3)(POINTS, POINTS, torch.ones(2)), "valid must be bool, got torch.float32"),
    *((lambda change=change: model()({**sample(5), **change}), message) for change, message in (
        ({"batch": torch.ones(5).long()}, r"field 'batch' \(5,\) must lie in \[0, 1\)"),
        ({"batch": torch.zeros(5)}, "field 'batch' must be int32 or int64"),
        ({"view_valid": torch.ones(1, 2)}, "field 'view_valid' must be bool"),
        ({"view_valid": torch.ones(2, 1) > 0}, r"'view_valid' must be \(1, 2\), got \(2, 1\)"),
        ({"image_sizes": torch.ones(1, 2)}, r"'image_sizes' must be \(1, 2, 2\), got \(1, 2\)"),
        ({"world2cam": pose(1).T.expand(1, 2, 4, 4)}, r"'world2cam' \(1, 2, 4, 4\) must have the last row 0 0 0 1"),
        ({"intrinsics": K.T.expand(1, 2, 3, 3)}, r"'intrinsics' \(1, 2, 3, 3\) must have the last row 0 0 1"),
        ({"depth_intrinsics": K.T.expand(1, 2, 3, 3)}, r"'depth_intrinsics' \(1, 2, 3, 3\) must have"),
        ({"world2cam": torch.zeros(1, 2, 3, 4)}, r"'world2cam' .* got \(1, 2, 3, 4\)"),
        ({"intrinsics": torch.zeros(1, 2, 4, 4)}, r"'intrinsics' must be \(1, 2, 3, 3\), got \(1, 2, 4, 4\)"),
        ({"intrinsics": torch.zeros(1, 2, 3, 4)}, r"'intrinsics' must be \(1, 2, 3, 3\), got \(1, 2, 3, 4\)")))]


@pytest.mark.parametrize("call, message", BAD_VALUES, ids=[str(i) for i in range(len(BAD_VALUES))])
def test_values_that_cannot_be_right_are_refused_with_field_and_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()
