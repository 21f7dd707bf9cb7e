# SPDX-License-Identifier: MIT
"""Furnished rooms generated from a seed, and a ray caster that renders RGB, depth, label and instance images of them.

The rooms show what images add to geometry. Table, chair, sofa, bed and lamp draw their colours from one distribution,
so only their shape tells them apart. Door, window, picture, whiteboard and curtain are panels less than 1 cm thick on
the wall that share one distribution of sizes and heights; cabinet, refrigerator and bookshelf share one distribution of
boxes. Only their appearance tells these apart.

Every surface is an axis-aligned box, or the ellipsoid inscribed in one. A pixel (u, v) looks along
`ray = R^T K^-1 (u, v, 1)`, whose component along the optical axis is 1, so the parameter of a hit is its depth. Boxes
are hit by the slab test (Kay and Kajiya, "Ray tracing complex scenes", SIGGRAPH 1986), restricted to the rectangle that
their corners project to. Metres, world z up, OpenCV camera axes, pixel centres at integer coordinates.

Imports numpy.
"""
import colorsys
import math

import numpy as np

PANELS = ("door", "window", "picture", "whiteboard", "curtain")
BOXES = ("cabinet", "refrigerator", "bookshelf")
SHAPES = ("table", "chair", "sofa", "bed", "lamp")
CLASSES = ("wall", "floor", "ceiling") + PANELS + SHAPES + BOXES  # label images hold 1 + index, 0 = unlabeled
SPLITS = ("train", "val", "test")
STUFF = 3  # the first three classes have no instances

# -------------------------------------------------------------------------------------------------------- appearance


def _hsv(rng, hue, saturation, value):
    """One RGB colour (3,), drawn uniformly from ranges (low, high) in [0, 1]; hues wrap around."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value)))


def _shades(rng, color, spread, count=16):
    """(count, 3): a colour, brighter or darker by up to the share `spread`."""
    return color * (1 + spread * rng.uniform(-1, 1, (count, 1)))


def make_look(palette, cell=(100.0, 100.0), step=(5, 11), joint=(0.0, 0.0), joint_color=0.0, rim=0.0, rim_color=0.0,
              fold=0.0):
    """Parameters of `_texture`. Lengths in metres; a cell of 100 is larger than any face."""
    return dict(palette=np.atleast_2d(palette), cell=cell, step=step, joint=joint, joint_color=joint_color, rim=rim,
                rim_color=rim_color, fold=fold)


def _appearance(kind, width, height, rng):
    """Appearance of one object of a class: parameters of `_texture` for faces of about width x height metres."""
    any_hue = (0.0, 1.0)
    if kind == "wall":
        color = _hsv(rng, (-0.1, 0.45), (0.08, 0.3), (0.55, 0.72))
        return make_look(_shades(rng, color, rng.choice([0.0, 0.05])), cell=(rng.uniform(0.1, 0.3), 100.0))
    if kind == "ceiling":
        return make_look(_hsv(rng, any_hue, (0.0, 0.05), (0.85, 0.95)))
    if kind == "floor":
        if rng.random() < 0.5:  # planks
            color = _hsv(rng, (0.05, 0.1), (0.3, 0.6), (0.3, 0.55))
            return make_look(_shades(rng, color, 0.15), (rng.uniform(0.12, 0.2), rng.uniform(0.8, 1.4)),
                             joint=(0.008, 0.008), joint_color=0.5 * color)
        color = _hsv(rng, any_hue, (0.03, 0.25), (0.25, 0.5))  # tiles
        side = rng.uniform(0.3, 0.6)
        return make_look(_shades(rng, color, 0.08), (side, side), joint=(0.015, 0.015), joint_color=1.4 * color)
    if kind == "door":
        color = _hsv(rng, (0.0, 0.06), (0.6, 0.85), (0.25, 0.5))
        return make_look(_shades(rng, color, 0.15), (width / rng.integers(3, 7), 100.0), joint=(0.01, 0.0),
                         joint_color=0.5 * color, rim=rng.uniform(0.04, 0.1), rim_color=0.7 * color)
    if kind == "window":  # land below, sky above, white bars
        land = _hsv(rng, (0.15, 0.4), (0.3, 0.6), (0.4, 0.7))
        sky = _hsv(rng, (0.52, 0.63), (0.35, 0.65), (0.85, 1.0))
        share = np.clip((np.arange(16) / 15 - rng.uniform(0.1, 0.4)) / 0.15, 0, 1)[:, None]
        return make_look(land + share * (sky - land), (width / rng.integers(1, 4), height / 15.99), step=(0, 1),
                         joint=(0.05, 0.0), joint_color=0.95, rim=rng.uniform(0.04, 0.08), rim_color=0.95)
    if kind == "picture":
        side = rng.uniform(0.12, 0.3)
        return make_look([_hsv(rng, (0.0, 0.75), (0.7, 1.0), (0.6, 1.0)) for _ in range(16)], (side, side), rim=0.06,
                         rim_color=_hsv(rng, (0.08, 0.13), (0.3, 0.8), (0.1, 0.5)))
    if kind == "whiteboard":
        marks = [_hsv(rng, any_hue, (0.2, 0.6), (0.6, 0.9)) for _ in range(3)]
        return make_look(np.concatenate([_shades(rng, np.full(3, 0.97), 0.03, 20), marks]),
                         (rng.uniform(0.06, 0.1), rng.uniform(0.05, 0.08)), rim=0.04, rim_color=rng.uniform(0.5, 0.7))
    if kind == "curtain":
        color = _hsv(rng, (0.78, 1.0), (0.5, 0.9), (0.35, 0.7))
        return make_look(_shades(rng, color, 0.08), (rng.uniform(0.1, 0.25), 100.0), fold=rng.uniform(0.3, 0.6))
    if kind == "cabinet":
        color = _hsv(rng, (0.09, 0.15), (0.4, 0.7), (0.5, 0.75))
        return make_look(_shades(rng, color, 0.1), (width / 2, height / rng.integers(1, 4)), joint=(0.015, 0.015),
                         joint_color=0.4 * color)
    if kind == "refrigerator":
        color = _hsv(rng, (0.52, 0.66), (0.1, 0.25), (0.6, 0.85))
        return make_look(color, (100.0, rng.uniform(0.5, 0.7) * height), joint=(0.0, 0.02), joint_color=0.4 * color)
    if kind == "bookshelf":
        wood = _hsv(rng, (0.05, 0.1), (0.4, 0.7), (0.15, 0.35))
        return make_look([_hsv(rng, (0.3, 0.75), (0.4, 0.9), (0.2, 0.6)) for _ in range(16)],
                         (rng.uniform(0.04, 0.07), rng.uniform(0.25, 0.35)), joint=(0.0, 0.04), joint_color=wood,
                         rim=0.04, rim_color=wood)
    return make_look(_shades(rng, _hsv(rng, any_hue, (0.2, 0.6), (0.3, 0.75)), rng.choice([0.0, 0.1])),
                     (rng.uniform(0.05, 0.2), 100.0))  # one distribution for all classes that differ by shape


def _texture(look, u, v, width, height):
    """Colours (n, 3) at u, v (n,) metres from the lower left corners of faces of width x height (n,) metres."""
    pu, pv = look["cell"]
    i, j = np.floor(u / pu), np.floor(v / pv)
    palette = look["palette"].astype(np.float32)
    color = palette[(look["step"][0] * i + look["step"][1] * j).astype(np.int64) % len(palette)]
    if look["fold"]:
        color *= (1 - look["fold"] * np.abs(2 * (u / pu - i) - 1))[:, None]
    color[(u - i * pu < look["joint"][0]) | (v - j * pv < look["joint"][1])] = look["joint_color"]
    color[np.minimum(np.minimum(u, width - u), np.minimum(v, height - v)) < look["rim"]] = look["rim_color"]
    return color


# ------------------------------------------------------------------------------------------------------------ layout


def _furniture(kind, rng):
    """Size (3,) of a piece and its parts (low, high[, is_ellipsoid]); its back is at y = 0, the floor at z = 0."""
    if kind in BOXES:
        w, d, h = rng.uniform([0.7, 0.35, 1.0], [1.2, 0.6, 2.0])
        parts = [((0, 0, 0), (w, d, h))]
    elif kind == "table":
        w, d, h = rng.uniform([0.9, 0.6, 0.68], [1.6, 0.9, 0.78])
        parts = [((0, 0, h - 0.04), (w, d, h))]
        parts += [((x, y, 0), (x + 0.06, y + 0.06, h - 0.04)) for x in (0.02, w - 0.08) for y in (0.02, d - 0.08)]
    elif kind == "chair":
        w, d, h, seat = rng.uniform([0.42, 0.42, 0.85, 0.42], [0.52, 0.52, 1.0, 0.48])
        parts = [((0, 0, seat - 0.05), (w, d, seat)), ((0, 0, seat), (w, 0.05, h))]
        parts += [((x, y, 0), (x + 0.04, y + 0.04, seat - 0.05)) for x in (0, w - 0.04) for y in (0, d - 0.04)]
    elif kind == "sofa":
        w, d, h, seat, arm = rng.uniform([1.4, 0.8, 0.75, 0.38, 0.55], [2.2, 0.95, 0.9, 0.45, 0.65])
        parts = [((0, 0, 0.05), (w, d, seat)), ((0, 0, seat), (w, 0.22, h)),
                 ((0, 0.22, seat), (0.18, d, arm)), ((w - 0.18, 0.22, seat), (w, d, arm))]
    elif kind == "bed":
        w, d, h, top = rng.uniform([0.9, 1.9, 0.85, 0.42], [1.6, 2.1, 1.1, 0.55])
        parts = [((0, 0, 0), (w, 0.08, h)), ((0, 0.08, 0.15), (w, d, top)),
                 ((0.1, 0.15, top), (w - 0.1, 0.5, top + 0.1))]
    elif kind == "lamp":
        w, h = rng.uniform([0.3, 1.3], [0.45, 1.7])
        d = w
        parts = [((0.2 * w, 0.2 * w, 0), (0.8 * w, 0.8 * w, 0.04)),
                 ((w / 2 - 0.02, w / 2 - 0.02, 0.04), (w / 2 + 0.02, w / 2 + 0.02, h - w)),
                 ((0, 0, h - w), (w, w, h), True)]
    return np.array([w, d, h]), parts


def _turned(low, high, quarter, origin):
    """Sorted corners (2, 3) of a box after `quarter` turns of 90 degrees about z and a shift."""
    c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter]
    corners = np.array([low, high], float) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]]) + origin
    return np.sort(corners, 0)


def _against_wall(room, quarter, along):
    """Origin (3,) of an object turned by `quarter`, back to a wall, `along` metres from a corner of the room."""
    x, y, _ = room
    return np.array([(along, 0, 0), (x, along, 0), (x - along, y, 0), (0, y - along, 0)][quarter], float)


def _surface(box, kind, instance, look, ellipsoid=False):
    """One box or ellipsoid of a scene; kind None: small things without a class."""
    label = 1 + CLASSES.index(kind) if kind else 0
    return dict(corners=box, ellipsoid=ellipsoid, label=label, instance=instance, look=look)


def _next_instance(surfaces):
    return 1 + max(surface["instance"] for surface in surfaces)


def _shell(room, rng):
    """Surfaces of walls, floor and ceiling, 10 cm thick."""
    surfaces = []
    wall = _appearance("wall", *room[1:], rng)
    for axis, kinds in ((0, ("wall", "wall")), (1, ("wall", "wall")), (2, ("floor", "ceiling"))):
        for side, kind in enumerate(kinds):
            box = np.stack([np.full(3, -0.1), room + 0.1])
            box[1 - side, axis] = (-0.1, room[axis] + 0.1)[side] + (0.1, -0.1)[side]
            look = wall if kind == "wall" else _appearance(kind, *room[:2], rng)
            surfaces.append(_surface(box, kind, 0, look))
    return surfaces


def _hang_panels(room, surfaces, rng):
    """Adds panels where the walls have space for them -> (wall, left, right, bottom) of each."""
    panels = []
    for kind in rng.permutation([*PANELS, *rng.choice(PANELS, rng.integers(2, 5))]):  # late ones find less space
        for _ in range(30):
            if rng.random() < 0.4:  # down to the floor
                w, h, bottom = rng.uniform([0.8, 1.9, 0.0], [1.4, 2.1, 0.1])
            else:
                w, h, bottom = rng.uniform([0.9, 0.8, 0.7], [1.7, 1.3, 1.0])
            side = int(rng.integers(4))
            left = rng.uniform(0.05, room[side % 2] - w - 0.05)
            if all(side != s or left > r + 0.1 or left + w < l - 0.1 for s, l, r, _ in panels):
                panels.append((side, left, left + w, bottom))
                box = _turned((0, 0, bottom), (w, rng.uniform(0.002, 0.009), bottom + h), side,
                              _against_wall(room, side, left))
                surfaces.append(_surface(box, kind, _next_instance(surfaces), _appearance(kind, w, h, rng)))
                break
    return panels


def _furnish(room, panels, surfaces, rng):
    """Adds furniture that neither intersects other pieces nor hides a panel, and clutter on the tables."""
    taken = []  # corners (2, 3) of the pieces in place
    pieces = [*rng.permutation(BOXES), "bed", "sofa", "table", rng.choice(BOXES), "chair", "chair", "lamp",
              *rng.choice(SHAPES[:2] + SHAPES[-1:], 3)]
    for kind in pieces:
        for _ in range(40):
            size, parts = _furniture(kind, rng)
            side = int(rng.integers(4))
            if kind in ("table", "chair", "lamp"):
                origin = np.append(rng.uniform(0.1, room[:2] - 0.1), 0.0)
            else:
                left = rng.uniform(0.02, room[side % 2] - size[0] - 0.02)
                origin = _against_wall(room, side, left)
                if any(side == s and left < r and left + size[0] > l and size[2] > bottom + 0.3
                       for s, l, r, bottom in panels):
                    continue  # it would hide the panel behind it
            box = _turned((0, 0, 0), size, side, origin)
            if (box[0] < -1e-9).any() or (box[1] > room + 1e-9).any():
                continue
            if any((box[0, :2] <= t[1, :2] + 0.08).all() and (box[1, :2] >= t[0, :2] - 0.08).all() for t in taken):
                continue
            taken.append(box)
            instance, look = _next_instance(surfaces), _appearance(kind, *size[[0, 2]], rng)
            for low, high, *ellipsoid in parts:
                surfaces.append(_surface(_turned(low, high, side, origin), kind, instance, look, bool(ellipsoid)))
            if kind == "table":
                for _ in range(rng.integers(0, 4)):
                    low = np.append(rng.uniform(0.05, size[:2] - 0.3), size[2])
                    high = low + rng.uniform([0.08, 0.08, 0.05], [0.25, 0.25, 0.25])
                    clutter = make_look(_hsv(rng, (0, 1), (0.3, 0.9), (0.3, 0.9)))
                    surfaces.append(_surface(_turned(low, high, side, origin), None, 0, clutter))
            break


def make_room(seed):
    """Seed (an int or a sequence of ints >= 0) -> scene, a dict of S surfaces in a room with one corner at the origin.

    size (3,) metres; corners (S, 2, 3) low and high; ellipsoid (S,) bool; label (S,) uint8, 1 + index into CLASSES or
    0 for small things without a class; instance (S,) uint8, 0 for walls, floor, ceiling and unlabeled; look, a list of
    S parameter dicts; light (3,) and tint (3,), position and colour of the lamp; ambient, the share of ambient light.
    The same seed gives the same room wherever numpy's Generator draws the same numbers.
    """
    rng = np.random.default_rng(seed)
    room = rng.uniform([4.2, 4.2, 2.4], [6.0, 6.0, 2.8])
    surfaces = _shell(room, rng)
    panels = _hang_panels(room, surfaces, rng)
    _furnish(room, panels, surfaces, rng)
    columns = {key: [surface[key] for surface in surfaces] for key in surfaces[0]}
    return dict(size=room, corners=np.array(columns["corners"]), ellipsoid=np.array(columns["ellipsoid"]),
                label=np.array(columns["label"], np.uint8), instance=np.array(columns["instance"], np.uint8),
                look=columns["look"], ambient=rng.uniform(0.5, 0.7),
                light=np.append(rng.uniform(0.3, 0.7, 2) * room[:2], room[2] - 0.2), tint=rng.uniform(0.92, 1.08, 3))


# ------------------------------------------------------------------------------------------------------------ camera


def look_at(eye, target, roll=0.0):
    """world2cam (4, 4) of a camera at `eye` (3,) that looks at `target` (3,), upright except for `roll` radians."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    world2cam = np.eye(4)
    world2cam[:3, :3] = c * right + s * down, c * down - s * right, forward
    world2cam[:3, 3] = -(world2cam[:3, :3] * eye).sum(1)
    return world2cam


def draw_camera(scene, rng):
    """world2cam (4, 4) of a camera at eye height, clear of furniture, that looks at some object from a distance."""
    low, high = scene["corners"][:, 0] - 0.3, scene["corners"][:, 1] + 0.3
    while True:
        eye = rng.uniform([0.35, 0.35, 1.2], [*(scene["size"][:2] - 0.35), 1.8])
        seen = rng.choice(np.unique(scene["instance"]))  # 0: wall, floor or ceiling
        centre = scene["corners"][rng.choice(np.flatnonzero(scene["instance"] == seen))].mean(0)
        target = centre + rng.uniform(-1, 1, 3) * [0.5, 0.5, 0.8]
        roll = rng.uniform(-0.05, 0.05)
        distance = np.hypot(*(target - eye)[:2])
        if ((eye > low) & (eye < high)).all(1).any() or distance < 1.2 \
                or not -0.7 < (target - eye)[2] / distance < 0.35:
            continue
        world2cam = look_at(eye, target, roll)
        glance = _cast(scene, world2cam, np.array([[10.5, 0, 5.5], [0, 10.5, 4.0], [0, 0, 1]]), (9, 12))[0]
        if glance.min() > 0.4 and np.median(glance) > 1.5:
            return world2cam


# --------------------------------------------------------------------------------------------------------- rendering


def _cast(scene, world2cam, intrinsics, size):
    """Depth (H, W) float32 and surface (H, W) int16 of the first hit, inf and -1 if there is none; rays (3, H, W)."""
    height, width = size
    rotation, corners = world2cam[:3, :3], scene["corners"]
    eye = -(rotation * world2cam[:3, 3:]).sum(0)
    inverse = np.linalg.inv(intrinsics)
    columns, rows = np.arange(width), np.arange(height)[:, None]
    camera = [inverse[i, 0] * columns + inverse[i, 1] * rows + inverse[i, 2] for i in range(3)]
    rays = np.stack([sum(rotation[i, j] * camera[i] for i in range(3)) for j in range(3)]).astype(np.float32)
    slope = 1 / np.where(np.abs(rays) < 1e-9, np.float32(1e-9), rays)

    depth = np.full(size, np.inf, np.float32)
    surface = np.full(size, -1, np.int16)
    vertices = np.stack([corners[:, k, range(3)] for k in np.ndindex(2, 2, 2)], 1)  # (S, 8, 3)
    vertices = (vertices[:, :, None] * rotation).sum(-1) + world2cam[:3, 3]
    for index, ((low, high), vertex) in enumerate(zip((corners - eye).astype(np.float32), vertices)):
        z = vertex[:, 2]
        if z.max() <= 0.01:
            continue
        left, top, right, bottom = 0, 0, width, height
        if z.min() > 0.01:
            uv = [(vertex * row).sum(1) / z for row in intrinsics[:2]]
            left, right = max(left, math.floor(uv[0].min())), min(right, math.ceil(uv[0].max()) + 1)
            top, bottom = max(top, math.floor(uv[1].min())), min(bottom, math.ceil(uv[1].max()) + 1)
            if left >= right or top >= bottom:
                continue
        window = np.s_[top:bottom, left:right]
        if scene["ellipsoid"][index]:
            # from the closest approach to the centre: the textbook discriminant loses three digits in float32
            half = (high - low) / 2
            d, o = rays[:, top:bottom, left:right] / half[:, None, None], ((high + low) / 2 / half)[:, None, None]
            square = (d * d).sum(0)
            middle = (o * d).sum(0) / square
            inside = 1 - ((middle * d - o) ** 2).sum(0)
            near = middle - np.sqrt(np.maximum(inside, 0) / square)
            hit = inside > 0
        else:
            near, far = np.float32(-np.inf), np.float32(np.inf)
            for axis in range(3):
                s = slope[axis, top:bottom, left:right]
                a, b = low[axis] * s, high[axis] * s
                near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
            hit = near <= far
        hit &= (near > 0) & (near < depth[window])
        depth[window][hit] = near[hit]
        surface[window][hit] = index
    return depth, surface, rays


def render(scene, world2cam, intrinsics, size=(240, 320), rng=None):
    """Image of a scene -> dict(color (H, W, 3) uint8 RGB, depth (H, W) float32, label and instance (H, W) uint8).

    world2cam (4, 4) rigid, intrinsics (3, 3) in pixels, size (H, W). Depth is metres along the optical axis, 0 = hole.
    With a Generator `rng`, depth has the noise of a structured-light sensor, sigma = 0.0012 + 0.0019 (z - 0.4)^2
    (Nguyen, Izadi and Lovell, "Modeling Kinect sensor noise", 3DIMPVT 2012), and holes at grazing angles, depth edges,
    large distances and in random blobs, none of which depends on the class. Exposure, white balance and pixel values
    vary slightly. Without `rng` there is no noise. Labels are exact in both cases, holes included.
    """
    world2cam, intrinsics = np.asarray(world2cam, np.float64), np.asarray(intrinsics, np.float64)
    if world2cam.shape != (4, 4) or intrinsics.shape != (3, 3):
        raise ValueError(f"expected world2cam (4, 4) and intrinsics (3, 3), got {world2cam.shape}, {intrinsics.shape}")
    depth, surface, rays = _cast(scene, world2cam, intrinsics, size)
    eye = -(world2cam[:3, :3] * world2cam[:3, 3:]).sum(0)

    color, cosine = np.zeros((depth.size, 3), np.float32), np.ones(depth.size, np.float32)
    order = np.argsort(surface, axis=None, kind="stable")
    found, starts = np.unique(surface.ravel()[order], return_index=True)
    for index, pixels in zip(found, np.split(order, starts[1:])):
        if index < 0:
            continue
        low, high = scene["corners"][index].astype(np.float32)
        ray = rays.reshape(3, -1)[:, pixels]
        hit = ray * depth.ravel()[pixels] + eye[:, None].astype(np.float32)
        local = (2 * hit - (low + high)[:, None]) / (high - low)[:, None]  # (3, n) in [-1, 1]
        axis, n = np.abs(local).argmax(0), np.arange(len(pixels))
        if scene["ellipsoid"][index]:
            normal = local / (high - low)[:, None]
            normal /= np.sqrt((normal * normal).sum(0))
        else:
            normal = np.zeros_like(local)
            normal[axis, n] = np.sign(local[axis, n])
        across, up = np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)
        base = _texture(scene["look"][index], hit[across, n] - low[across], hit[up, n] - low[up],
                        (high - low)[across], (high - low)[up])
        to_light = scene["light"].astype(np.float32)[:, None] - hit
        square = (to_light * to_light).sum(0)
        lambert = np.maximum((normal * to_light).sum(0), 0) / np.sqrt(square) * 1.5 / (1 + square / 16)
        ambient = np.float32(scene["ambient"])
        color[pixels] = base * (ambient + (1 - ambient) * lambert)[:, None] * scene["tint"].astype(np.float32)
        cosine[pixels] = np.abs((normal * ray).sum(0)) / np.sqrt((ray * ray).sum(0))
    color = color.reshape(*size, 3)
    known = surface >= 0
    depth = np.where(known, depth, np.float32(0))
    label = np.where(known, scene["label"][surface], 0).astype(np.uint8)
    instance = np.where(known, scene["instance"][surface], 0).astype(np.uint8)

    if rng is not None:
        color *= (rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3)).astype(np.float32)
        color += 0.012 * rng.standard_normal(color.shape, np.float32)
        draw = rng.random(size, np.float32)
        known &= (cosine.reshape(size) > 0.15 * draw + 0.03) & (depth < 8 - 2 * draw)
        edge = np.zeros(size, bool)
        edge[:, 1:] |= np.abs(np.diff(depth, axis=1)) > 0.1
        edge[1:] |= np.abs(np.diff(depth, axis=0)) > 0.1
        known &= ~(edge & (draw < 0.5))
        rows, columns = np.arange(size[0])[:, None], np.arange(size[1])
        for _ in range(rng.integers(2, 7)):
            v, u, a, b = rng.uniform(0, 1, 4) * [size[0], size[1], size[0] / 12, size[0] / 12] + [0, 0, 2, 2]
            known &= ((rows - v) / a) ** 2 + ((columns - u) / b) ** 2 > 1
        sigma = np.float32(0.0012) + np.float32(0.0019) * (depth - np.float32(0.4)) ** 2
        depth = depth + sigma * rng.standard_normal(size, np.float32)
    return dict(color=(255 * np.clip(color, 0, 1) + 0.5).astype(np.uint8),
                depth=np.where(known, depth, 0).astype(np.float32), label=label, instance=instance)


def frames(split, num_rooms, frames_per_room, seed=0, size=(240, 320)):
    """Rooms of a split ("train", "val" or "test"), each rendered from `frames_per_room` cameras -> list of dicts.

    Each holds what `render` gives, name "<split>0003/2", world2cam (4, 4), intrinsics and depth_intrinsics (3, 3),
    equal, all float64. A room is drawn from (split, room, seed) and a frame from that and its own number, so splits
    share no room, and asking for more leaves the first ones unchanged.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    if min(num_rooms, frames_per_room, seed) < 0 or min(size) < 1:
        raise ValueError(f"expected counts and seed >= 0 and a size (H, W) >= 1, got num_rooms={num_rooms}, "
                         f"frames_per_room={frames_per_room}, seed={seed}, size={tuple(size)}")
    result = []
    for room in range(num_rooms):
        # the seed comes last: however many 32-bit words it takes, no two of these lists hold the same words
        scene = make_room([SPLITS.index(split), room, 0, seed])
        for number in range(frames_per_room):
            rng = np.random.default_rng([SPLITS.index(split), room, 1 + number, seed])
            focal = 280 * size[1] / 320 * rng.uniform(0.97, 1.03)
            centre = [(extent - 1) / 2 + 0.02 * extent * rng.uniform(-1, 1) for extent in (size[1], size[0])]
            intrinsics = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
            world2cam = draw_camera(scene, rng)
            frame = render(scene, world2cam, intrinsics, size, rng)
            frame |= dict(name=f"{split}{room:04d}/{number}", world2cam=world2cam, intrinsics=intrinsics,
                          depth_intrinsics=intrinsics.copy())
            result.append(frame)
    return result


class RoomFrames:
    """A source of frames (see data.py): built-in rooms, rendered at construction.

    split: "train", "val" or "test", which share no room. size: (H, W) of the images.
    """

    num_skipped = 0

    def __init__(self, split, num_rooms, frames_per_room, seed=0, size=(240, 320)):
        self.class_names = list(CLASSES)
        self._frames = frames(split, num_rooms, frames_per_room, seed, size)
        self.names = [frame["name"] for frame in self._frames]

    def __len__(self):
        return len(self.names)

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame."""
        return self._frames[index]["color"]

    def __getitem__(self, index):
        frame = self._frames[index]
        label = frame["label"].astype(np.int32) - 1
        instance = np.where(frame["instance"] > 0, frame["instance"].astype(np.int32), -1)
        return {**frame, "label": label, "instance": instance}
