# SPDX-License-Identifier: MIT
"""Furnished rooms generated from a seed, and a ray caster that renders color, depth, label and instance
images of them.

The rooms show what images add to geometry. Table, chair, sofa, bed and lamp draw their colors from one
distribution, so only their shape tells them apart. Door, window, picture, whiteboard and curtain are
panels less than 1 cm thick on the wall that share one distribution of sizes and heights; cabinet,
refrigerator and bookshelf share one distribution of boxes. Only their appearance tells these apart.

Every surface is an axis-aligned box, or the ellipsoid inscribed in one. A pixel (u, v) looks along
`ray = R^T K^-1 (u, v, 1)`, whose component along the optical axis is 1, so the ray parameter of a hit is
its depth. Boxes are hit by the slab test (Kay and Kajiya, "Ray tracing complex scenes", SIGGRAPH 1986),
restricted to the rectangle that their corners project to. Meters, world z up, OpenCV camera axes, pixel
centers at integer coordinates.

Imports numpy.
"""
import colorsys
import itertools
import math
from dataclasses import dataclass

import numpy as np

STUFF = ("wall", "floor", "ceiling")  # without instances
PANELS = ("door", "window", "picture", "whiteboard", "curtain")
SHAPES = ("table", "chair", "sofa", "bed", "lamp")
BOXES = ("cabinet", "refrigerator", "bookshelf")
CLASSES = STUFF + PANELS + SHAPES + BOXES
SPLITS = ("train", "val", "test")


def read_ranges(table):
    """Rows of a name, then low and high of each number -> {name: (lows, highs)} for `rng.uniform`."""
    rows = [line.split() for line in table.strip().splitlines()]
    return {name: np.array(limits, float).reshape(-1, 2).T for name, *limits in rows}


# ------------------------------------------------------------------------------------------ appearance

COLORS = read_ranges("""
    wall            -0.10 0.45      0.08 0.30      0.55 0.72
    ceiling          0.00 1.00      0.00 0.05      0.85 0.95
    planks           0.05 0.10      0.30 0.60      0.30 0.55
    tiles            0.00 1.00      0.03 0.25      0.25 0.50
    door             0.00 0.06      0.60 0.85      0.25 0.50
    window           0.15 0.40      0.30 0.60      0.40 0.70
    sky              0.52 0.63      0.35 0.65      0.85 1.00
    picture          0.00 0.75      0.70 1.00      0.60 1.00
    frame            0.08 0.13      0.30 0.80      0.10 0.50
    marker           0.00 1.00      0.20 0.60      0.60 0.90
    curtain          0.78 1.00      0.50 0.90      0.35 0.70
    cabinet          0.09 0.15      0.40 0.70      0.50 0.75
    refrigerator     0.52 0.66      0.10 0.25      0.60 0.85
    bookshelf        0.05 0.10      0.40 0.70      0.15 0.35
    book             0.30 0.75      0.40 0.90      0.20 0.60
    shape            0.00 1.00      0.20 0.60      0.30 0.75
    clutter          0.00 1.00      0.30 0.90      0.30 0.90
""")  # hue, which wraps around; saturation; value


@dataclass
class Look:
    """Texture of a surface: cells in the colors of a palette, with joints between them. Lengths in meters."""

    palette: np.ndarray  # (n, 3), or (3,) for one color
    cell_u: float = 100.0  # larger than any face
    cell_v: float = 100.0
    step_u: int = 5  # from one cell to the next, in the palette
    step_v: int = 11
    joint_u: float = 0.0
    joint_v: float = 0.0
    joint_color: object = 0.0  # (3,), or a number
    rim: float = 0.0  # around every face
    rim_color: object = 0.0
    fold: float = 0.0  # share by which the sides of a cell are darker


def draw_color(rng, name):
    """One RGB color (3,) in [0, 1], drawn from a row of COLORS."""
    hue, saturation, value = rng.uniform(*COLORS[name])
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def vary(rng, color, share, count=16):
    """(count, 3): a color, brighter or darker by up to `share`."""
    return color * (1 + share * rng.uniform(-1, 1, (count, 1)))


def draw_look(rng, kind, width=0.0, height=0.0):
    """Look of one object of a class; its front has about width x height meters."""
    if kind in PANELS:
        return draw_panel_look(rng, kind, width, height)
    if kind == "floor":
        kind = "planks" if rng.random() < 0.5 else "tiles"
    color = draw_color(rng, "shape" if kind in SHAPES else kind)
    if kind == "wall":
        share = rng.choice([0.0, 0.05])
        return Look(vary(rng, color, share), rng.uniform(0.1, 0.3))
    if kind == "planks":
        palette = vary(rng, color, 0.15)
        return Look(palette, rng.uniform(0.12, 0.2), rng.uniform(0.8, 1.4),
                    joint_u=0.008, joint_v=0.008, joint_color=0.5 * color)
    if kind == "tiles":
        side = rng.uniform(0.3, 0.6)
        return Look(vary(rng, color, 0.08), side, side,
                    joint_u=0.015, joint_v=0.015, joint_color=1.4 * color)
    if kind == "cabinet":
        palette = vary(rng, color, 0.1)
        return Look(palette, width / 2, height / rng.integers(1, 4),
                    joint_u=0.015, joint_v=0.015, joint_color=0.4 * color)
    if kind == "refrigerator":
        door = rng.uniform(0.5, 0.7) * height
        return Look(color, cell_v=door, joint_v=0.02, joint_color=0.4 * color)
    if kind == "bookshelf":
        books = [draw_color(rng, "book") for _ in range(16)]
        return Look(books, rng.uniform(0.04, 0.07), rng.uniform(0.25, 0.35),
                    joint_v=0.04, joint_color=color, rim=0.04, rim_color=color)
    if kind in SHAPES:
        share = rng.choice([0.0, 0.1])
        return Look(vary(rng, color, share), rng.uniform(0.05, 0.2))
    return Look(color)


def draw_panel_look(rng, kind, width, height):
    """Look of a panel of a class."""
    if kind == "picture":
        side = rng.uniform(0.12, 0.3)
        palette = [draw_color(rng, kind) for _ in range(16)]
        return Look(palette, side, side, rim=0.06, rim_color=draw_color(rng, "frame"))
    if kind == "whiteboard":
        marks = [draw_color(rng, "marker") for _ in range(3)]
        palette = np.concatenate([vary(rng, np.full(3, 0.97), 0.03, 20), marks])
        return Look(palette, rng.uniform(0.06, 0.1), rng.uniform(0.05, 0.08),
                    rim=0.04, rim_color=rng.uniform(0.5, 0.7))
    color = draw_color(rng, kind)
    if kind == "window":  # land below, sky above, white bars
        sky = draw_color(rng, "sky")
        share = (np.arange(16) / 15 - rng.uniform(0.1, 0.4)) / 0.15
        palette = color + np.clip(share, 0, 1)[:, None] * (sky - color)
        return Look(palette, width / rng.integers(1, 4), height / 15.99, step_u=0, step_v=1,
                    joint_u=0.05, joint_color=0.95, rim=rng.uniform(0.04, 0.08), rim_color=0.95)
    if kind == "door":
        palette = vary(rng, color, 0.15)
        return Look(palette, width / rng.integers(3, 7), joint_u=0.01, joint_color=0.5 * color,
                    rim=rng.uniform(0.04, 0.1), rim_color=0.7 * color)
    palette = vary(rng, color, 0.08)  # curtain
    return Look(palette, rng.uniform(0.1, 0.25), fold=rng.uniform(0.3, 0.6))


def texture(look, u, v, width, height):
    """Colors (n, 3) at u, v (n,) meters from the lower left corners of faces of width x height (n,)."""
    i = np.floor(u / look.cell_u)
    j = np.floor(v / look.cell_v)
    palette = np.atleast_2d(look.palette).astype(np.float32)
    index = look.step_u * i + look.step_v * j
    color = palette[index.astype(np.int64) % len(palette)]
    if look.fold:
        side = np.abs(2 * (u / look.cell_u - i) - 1)
        color *= (1 - look.fold * side)[:, None]
    color[u - i * look.cell_u < look.joint_u] = look.joint_color
    color[v - j * look.cell_v < look.joint_v] = look.joint_color
    edge = np.minimum(np.minimum(u, width - u), np.minimum(v, height - v))
    color[edge < look.rim] = look.rim_color
    return color


# ---------------------------------------------------------------------------------------------- layout

SIZES = read_ranges("""
    box         0.70 1.20    0.35 0.60    1.00 2.00
    table       0.90 1.60    0.60 0.90    0.68 0.78
    chair       0.42 0.52    0.42 0.52    0.85 1.00    0.42 0.48
    sofa        1.40 2.20    0.80 0.95    0.75 0.90    0.38 0.45    0.55 0.65
    bed         0.90 1.60    1.90 2.10    0.85 1.10    0.42 0.55
    tall        0.80 1.40    1.90 2.10    0.00 0.10
    wide        0.90 1.70    0.80 1.30    0.70 1.00
    clutter     0.08 0.25    0.08 0.25    0.05 0.25
""")  # width, depth, height; height of the seat or mattress; height of the arms


def draw_furniture(rng, kind):
    """Size (3,) of a piece and the corners (n, 6) of its parts; its back is at y = 0, the floor at z = 0.

    The last part of a lamp, its shade, is an ellipsoid.
    """
    if kind == "lamp":
        w, h = rng.uniform([0.3, 1.3], [0.45, 1.7])
        foot = (0.2 * w, 0.2 * w, 0, 0.8 * w, 0.8 * w, 0.04)
        pole = (w / 2 - 0.02, w / 2 - 0.02, 0.04, w / 2 + 0.02, w / 2 + 0.02, h - w)
        return np.array([w, w, h]), [foot, pole, (0, 0, h - w, w, w, h)]
    size = rng.uniform(*SIZES["box" if kind in BOXES else kind])
    w, d, h = size[:3]
    parts = [(0, 0, 0, w, d, h)]
    if kind == "table":
        parts = [(0, 0, h - 0.04, w, d, h), *draw_legs(w, d, h - 0.04, 0.06, 0.02)]
    elif kind == "chair":
        seat = size[3]
        parts = [(0, 0, seat - 0.05, w, d, seat), (0, 0, seat, w, 0.05, h),
                 *draw_legs(w, d, seat - 0.05, 0.04, 0)]
    elif kind == "sofa":
        seat, arm = size[3:]
        parts = [(0, 0, 0.05, w, d, seat), (0, 0, seat, w, 0.22, h),
                 (0, 0.22, seat, 0.18, d, arm), (w - 0.18, 0.22, seat, w, d, arm)]
    elif kind == "bed":
        top = size[3]
        parts = [(0, 0, 0, w, 0.08, h), (0, 0.08, 0.15, w, d, top),
                 (0.1, 0.15, top, w - 0.1, 0.5, top + 0.1)]
    return size[:3], parts


def draw_legs(w, d, height, side, inset):
    """Corners of the four legs of a table or a chair."""
    ends = inset, inset + side
    return [(x, y, 0, x + side, y + side, height)
            for x in (inset, w - (inset + side)) for y in (inset, d - (inset + side))]


def turn(corners, quarter, origin):
    """Sorted corners (2, 3) of a box (6,) after `quarter` turns of 90 degrees about z and a shift."""
    rotation = np.linalg.matrix_power([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], quarter)
    return np.sort(np.reshape(corners, (2, 3)) @ rotation + origin, 0)


def wall_point(room, side, along):
    """The point (3,) of the floor `along` meters from a corner of the room along one of its four sides."""
    x, y, _ = room
    return np.array([(along, 0, 0), (x, along, 0), (x - along, y, 0), (0, y - along, 0)][side], float)


def build_shell(room, rng):
    """Walls, floor and ceiling, 10 cm thick."""
    surfaces = []
    wall = draw_look(rng, "wall")
    for i, kind in enumerate(("wall", "wall", "wall", "wall", "floor", "ceiling")):
        axis, end = divmod(i, 2)
        corners = np.stack([np.full(3, -0.1), room + 0.1])
        corners[1 - end, axis] = corners[end, axis] + (0.1, -0.1)[end]
        look = wall if kind == "wall" else draw_look(rng, kind)
        surfaces.append((corners, False, kind, -1, look))
    return surfaces


def hang_panels(room, surfaces, instances, rng):
    """Adds panels where the walls have space for them -> (side, left, right, bottom) of each."""
    panels = []
    kinds = [*PANELS, *rng.choice(PANELS, rng.integers(2, 5))]
    for kind in rng.permutation(kinds):  # late ones find less space
        for _ in range(30):
            w, h, bottom = rng.uniform(*SIZES["tall" if rng.random() < 0.4 else "wide"])
            side = int(rng.integers(4))
            left = rng.uniform(0.05, room[side % 2] - w - 0.05)
            right = left + w
            if any(side == s and left <= r + 0.1 and right >= l - 0.1 for s, l, r, _ in panels):
                continue
            panels.append((side, left, right, bottom))
            box = (0, 0, bottom, w, rng.uniform(0.002, 0.009), bottom + h)
            corners = turn(box, side, wall_point(room, side, left))
            surfaces.append((corners, False, kind, next(instances), draw_look(rng, kind, w, h)))
            break
    return panels


def place_furniture(room, kind, size, panels, rng):
    """A random place of a piece -> turns of 90 degrees and origin (3,), or None if it would hide a panel."""
    side = int(rng.integers(4))
    if kind in ("table", "chair", "lamp"):
        return side, np.append(rng.uniform(0.1, room[:2] - 0.1), 0.0)
    left = rng.uniform(0.02, room[side % 2] - size[0] - 0.02)
    right = left + size[0]
    if any(side == s and left < r and right > l and size[2] > bottom + 0.3 for s, l, r, bottom in panels):
        return None
    return side, wall_point(room, side, left)


def is_free(box, room, taken):
    """Whether a box (2, 3) lies in the room and 8 cm apart from all others, seen from above."""
    inside = (box[0] >= -1e-9).all() and (box[1] <= room + 1e-9).all()
    low, high = box[:, :2]
    return inside and not any((low <= t[1, :2] + 0.08).all() and (high >= t[0, :2] - 0.08).all() for t in taken)


def furnish(room, panels, surfaces, instances, rng):
    """Adds furniture that neither intersects other pieces nor hides a panel, and clutter on the tables."""
    taken = []  # corners (2, 3) of the pieces in place
    kinds = [*rng.permutation(BOXES), "bed", "sofa", "table", rng.choice(BOXES), "chair", "chair", "lamp",
             *rng.choice(["table", "chair", "lamp"], 3)]
    for kind in kinds:
        for _ in range(40):
            size, parts = draw_furniture(rng, kind)
            place = place_furniture(room, kind, size, panels, rng)
            if place is None:
                continue
            box = turn((0, 0, 0, *size), *place)
            if is_free(box, room, taken):
                taken.append(box)
                add_furniture(surfaces, kind, size, parts, place, next(instances), rng)
                break


def add_furniture(surfaces, kind, size, parts, place, instance, rng):
    look = draw_look(rng, kind, size[0], size[2])
    for part in parts:
        ellipsoid = kind == "lamp" and part is parts[-1]
        surfaces.append((turn(part, *place), ellipsoid, kind, instance, look))
    if kind == "table":
        for _ in range(rng.integers(0, 4)):
            low = np.append(rng.uniform(0.05, size[:2] - 0.3), size[2])
            high = low + rng.uniform(*SIZES["clutter"])
            look = Look(draw_color(rng, "clutter"))
            surfaces.append((turn((*low, *high), *place), False, "clutter", -1, look))


def make_room(seed):
    """Seed (an int or a sequence of ints >= 0) -> scene, a dict of S surfaces in a room with one corner at 0.

    size (3,) meters; corners (S, 2, 3) low and high; ellipsoid (S,) bool; label (S,) index into CLASSES, -1
    for clutter; instance (S,) from 1, -1 for walls, floor, ceiling and clutter; look, S of `Look`; light (3,)
    and tint (3,), position and color of the lamp; ambient, the share of ambient light. The same seed gives
    the same room wherever numpy's Generator draws the same numbers.
    """
    rng = np.random.default_rng(seed)
    room = rng.uniform([4.2, 4.2, 2.4], [6.0, 6.0, 2.8])
    instances = itertools.count(1)
    surfaces = build_shell(room, rng)
    panels = hang_panels(room, surfaces, instances, rng)
    furnish(room, panels, surfaces, instances, rng)
    corners, ellipsoid, kinds, instance, looks = zip(*surfaces)
    label = [CLASSES.index(kind) if kind in CLASSES else -1 for kind in kinds]
    ambient = rng.uniform(0.5, 0.7)
    light = np.append(rng.uniform(0.3, 0.7, 2) * room[:2], room[2] - 0.2)
    return dict(size=room, corners=np.array(corners), ellipsoid=np.array(ellipsoid), look=looks,
                label=np.array(label, np.int32), instance=np.array(instance, np.int32),
                ambient=ambient, light=light, tint=rng.uniform(0.92, 1.08, 3))


# ---------------------------------------------------------------------------------------------- camera


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
    """world2cam (4, 4) of a camera at eye height, clear of furniture, that looks at an object from a distance."""
    glance = np.array([[10.5, 0, 5.5], [0, 10.5, 4.0], [0, 0, 1]])  # of a small image
    low = scene["corners"][:, 0] - 0.3
    high = scene["corners"][:, 1] + 0.3
    while True:
        eye = rng.uniform([0.35, 0.35, 1.2], [*(scene["size"][:2] - 0.35), 1.8])
        seen = rng.choice(np.unique(scene["instance"]))  # -1: wall, floor or ceiling
        surface = rng.choice(np.flatnonzero(scene["instance"] == seen))
        center = scene["corners"][surface].mean(0)
        target = center + rng.uniform(-1, 1, 3) * [0.5, 0.5, 0.8]
        roll = rng.uniform(-0.05, 0.05)
        x, y, z = target - eye
        distance = np.hypot(x, y)
        collides = ((eye > low) & (eye < high)).all(1).any()
        if collides or distance < 1.2 or not -0.7 < z / distance < 0.35:
            continue
        world2cam = look_at(eye, target, roll)
        depth = cast(scene, world2cam, glance, (9, 12))[0]
        if depth.min() > 0.4 and np.median(depth) > 1.5:
            return world2cam


# ------------------------------------------------------------------------------------------- rendering


def combine(matrix, x, y, z):
    """Product of a matrix (3, 3) and vectors (x, y, z) of any shape, summed in a fixed order, unlike `@`."""
    return np.stack([a * x + b * y + c * z for a, b, c in matrix])


def windows(corners, world2cam, intrinsics, size):
    """(S, 4): left, top, right, bottom of the pixels that S boxes can cover; of hidden ones none."""
    vertices = np.stack([corners[:, k, range(3)] for k in np.ndindex(2, 2, 2)])  # (8, S, 3)
    camera = combine(world2cam[:3, :3], *np.moveaxis(vertices, 2, 0)) + world2cam[:3, 3, None, None]
    z = camera[2]
    with np.errstate(all="ignore"):
        uv = combine(intrinsics, *camera)[:2] / z  # (2, 8, S)
    start = np.where(z.min(0) > 0.01, np.floor(uv.min(1)), 0)
    stop = np.where(z.min(0) > 0.01, np.ceil(uv.max(1)) + 1, np.inf)
    limit = np.where(z.max(0) > 0.01, np.array(size)[::-1, None], 0)
    return np.concatenate([start.clip(0, limit), stop.clip(0, limit)]).astype(int).T


def hit_box(low, high, slope):
    """Slab test: low, high (3, 1, 1) from the eye, 1 / rays (3, h, w) -> depth (h, w) and whether it is hit."""
    a, b = low * slope, high * slope
    near = np.minimum(a, b).max(0)
    return near, near <= np.maximum(a, b).min(0)


def hit_ellipsoid(low, high, rays):
    """The same for the ellipsoid inscribed in a box; rays (3, h, w).

    It starts from the closest approach to the center: the textbook discriminant loses three digits in float32.
    """
    half = (high - low) / 2
    d = rays / half
    o = (high + low) / 2 / half
    square = (d * d).sum(0)
    middle = (o * d).sum(0) / square
    inside = 1 - ((middle * d - o) ** 2).sum(0)
    return middle - np.sqrt(np.maximum(inside, 0) / square), inside > 0


def cast(scene, world2cam, intrinsics, size):
    """Depth (H, W) float32 and surface (H, W) int16 of the first hit, inf and -1 if there is none; rays (3, H, W)."""
    eye = -(world2cam[:3, :3] * world2cam[:3, 3:]).sum(0)
    columns, rows = np.arange(size[1]), np.arange(size[0])[:, None]
    camera = combine(np.linalg.inv(intrinsics), columns, rows, 1.0)
    rays = combine(world2cam[:3, :3].T, *camera).astype(np.float32)
    slope = 1 / np.where(np.abs(rays) < 1e-9, np.float32(1e-9), rays)

    depth = np.full(size, np.inf, np.float32)
    surface = np.full(size, -1, np.int16)
    boxes = (scene["corners"] - eye).astype(np.float32)[..., None, None]
    extents = windows(scene["corners"], world2cam, intrinsics, size)
    for index, (left, top, right, bottom) in enumerate(extents):
        if left >= right or top >= bottom:
            continue
        window = np.s_[..., top:bottom, left:right]
        if scene["ellipsoid"][index]:
            near, hit = hit_ellipsoid(*boxes[index], rays[window])
        else:
            near, hit = hit_box(*boxes[index], slope[window])
        hit &= (near > 0) & (near < depth[window])
        depth[window][hit] = near[hit]
        surface[window][hit] = index
    return depth, surface, rays


def shade(scene, index, rays, depth, eye):
    """Color (n, 3) where rays (3, n) hit a surface at depth (n,), and cosine (n,) of their angles to its normal."""
    low, high = scene["corners"][index].astype(np.float32)[..., None]
    extent = high - low
    hit = rays * depth + eye
    local = (2 * hit - (low + high)) / extent  # (3, n) in [-1, 1]
    axis = np.abs(local).argmax(0)
    n = np.arange(len(depth))
    if scene["ellipsoid"][index]:
        normal = local / extent
        normal /= np.sqrt((normal * normal).sum(0))
    else:
        normal = np.zeros_like(local)
        normal[axis, n] = np.sign(local[axis, n])

    across, up = np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)
    u, v = (hit - low)[across, n], (hit - low)[up, n]
    base = texture(scene["look"][index], u, v, extent[across, 0], extent[up, 0])
    to_light = scene["light"].astype(np.float32)[:, None] - hit
    square = (to_light * to_light).sum(0)
    lambert = np.maximum((normal * to_light).sum(0), 0) / np.sqrt(square) * 1.5 / (1 + square / 16)
    ambient = np.float32(scene["ambient"])
    color = base * (ambient + (1 - ambient) * lambert)[:, None] * scene["tint"].astype(np.float32)
    return color, np.abs((normal * rays).sum(0)) / np.sqrt((rays * rays).sum(0))


def add_noise(color, depth, cosine, rng):
    """What a sensor makes of color (H, W, 3), changed in place, and depth (H, W); cosine (H, W) of the angles."""
    size = depth.shape
    color *= (rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3)).astype(np.float32)
    color += 0.012 * rng.standard_normal(color.shape, np.float32)
    draw = rng.random(size, np.float32)
    kept = (cosine > 0.15 * draw + 0.03) & (depth < 8 - 2 * draw)
    edge = np.zeros(size, bool)
    edge[:, 1:] |= np.abs(np.diff(depth, axis=1)) > 0.1
    edge[1:] |= np.abs(np.diff(depth, axis=0)) > 0.1
    kept &= ~(edge & (draw < 0.5))
    rows, columns = np.ogrid[:size[0], :size[1]]
    for _ in range(rng.integers(2, 7)):
        v, u, a, b = rng.uniform(0, 1, 4) * [*size, size[0] / 12, size[0] / 12] + [0, 0, 2, 2]
        kept &= ((rows - v) / a) ** 2 + ((columns - u) / b) ** 2 > 1
    sigma = np.float32(0.0012) + np.float32(0.0019) * (depth - np.float32(0.4)) ** 2
    noisy = depth + sigma * rng.standard_normal(size, np.float32)
    return np.where(kept & (depth > 0), noisy, np.float32(0))


def render(scene, world2cam, intrinsics, size=(240, 320), rng=None):
    """Images of a scene: color (H, W, 3) uint8 RGB, depth (H, W) float32, label and instance (H, W) int32.

    world2cam (4, 4) rigid, intrinsics (3, 3) in pixels, size (H, W). Depth is meters along the optical axis,
    0 = hole; label and instance are -1 for none. With a Generator `rng`, depth has the noise of a
    structured-light sensor, sigma = 0.0012 + 0.0019 (z - 0.4)^2 (Nguyen, Izadi and Lovell, "Modeling Kinect
    sensor noise", 3DIMPVT 2012), and holes at grazing angles, depth edges, large distances and in random
    blobs, none of which depends on the class. Exposure, white balance and pixel values vary slightly.
    Without `rng` there is no noise. Labels are exact in both cases, holes included.
    """
    world2cam = np.asarray(world2cam, np.float64)
    intrinsics = np.asarray(intrinsics, np.float64)
    if world2cam.shape != (4, 4) or intrinsics.shape != (3, 3):
        raise ValueError(f"expected world2cam (4, 4) and intrinsics (3, 3), got {world2cam.shape}, {intrinsics.shape}")
    depth, surface, rays = cast(scene, world2cam, intrinsics, size)
    eye = -(world2cam[:3, :3] * world2cam[:3, 3:]).sum(0, keepdims=True).T.astype(np.float32)
    rays = rays.reshape(3, -1)
    color = np.zeros((depth.size, 3), np.float32)
    cosine = np.ones(depth.size, np.float32)
    order = np.argsort(surface, axis=None, kind="stable")
    found, starts = np.unique(surface.ravel()[order], return_index=True)
    for index, pixels in zip(found, np.split(order, starts[1:])):
        if index >= 0:
            color[pixels], cosine[pixels] = shade(scene, index, rays[:, pixels], depth.ravel()[pixels], eye)
    color = color.reshape(*size, 3)
    known = surface >= 0
    depth = np.where(known, depth, np.float32(0))
    if rng is not None:
        depth = add_noise(color, depth, cosine.reshape(size), rng)
    return dict(color=(255 * np.clip(color, 0, 1) + 0.5).astype(np.uint8), depth=depth.astype(np.float32),
                label=np.where(known, scene["label"][surface], -1),
                instance=np.where(known, scene["instance"][surface], -1))


def frames(split, num_rooms, frames_per_room, seed=0, size=(240, 320)):
    """Rooms of a split ("train", "val" or "test"), each rendered from `frames_per_room` cameras -> list of dicts.

    Each holds what `render` gives, name "<split>0003/2", world2cam (4, 4), intrinsics and depth_intrinsics
    (3, 3), equal, all float64. A room is drawn from (split, room, seed) and a frame from that and its own
    number, so splits share no room, and asking for more leaves the first ones unchanged.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    if min(num_rooms, frames_per_room, seed) < 0 or min(size) < 1:
        raise ValueError(f"expected counts and seed >= 0 and a size (H, W) >= 1, got num_rooms={num_rooms}, "
                         f"frames_per_room={frames_per_room}, seed={seed}, size={tuple(size)}")
    height, width = size
    result = []
    for room, number in np.ndindex(num_rooms, frames_per_room):
        # the seed comes last: however many 32-bit words it takes, no two of these lists hold the same words
        if number == 0:
            scene = make_room([SPLITS.index(split), room, 0, seed])
        rng = np.random.default_rng([SPLITS.index(split), room, 1 + number, seed])
        focal = 280 * width / 320 * rng.uniform(0.97, 1.03)
        cx, cy = ((extent - 1) / 2 + 0.02 * extent * rng.uniform(-1, 1) for extent in (width, height))
        intrinsics = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
        world2cam = draw_camera(scene, rng)
        frame = render(scene, world2cam, intrinsics, size, rng)
        result.append(dict(frame, name=f"{split}{room:04d}/{number}", world2cam=world2cam,
                           intrinsics=intrinsics, depth_intrinsics=intrinsics.copy()))
    return result


class RoomFrames:
    """A source of frames (see data.py): built-in rooms, rendered at construction.

    split: "train", "val" or "test", which share no room. size: (H, W) of the images.
    """

    num_skipped = 0

    def __init__(self, split, num_rooms, frames_per_room, seed=0, size=(240, 320)):
        self.class_names = list(CLASSES)
        self.frames = frames(split, num_rooms, frames_per_room, seed, size)
        self.names = [frame["name"] for frame in self.frames]

    def __len__(self):
        return len(self.names)

    def color(self, index):
        """(H, W, 3) uint8 RGB of one frame."""
        return self.frames[index]["color"]

    def __getitem__(self, index):
        return dict(self.frames[index])
