# SPDX-License-Identifier: MIT
"""Furnished rooms generated from a seed, and a ray caster that renders images of them.

The rooms show what images add to geometry. Table, chair, sofa, bed and lamp draw their colors from one
distribution, so only their shape tells them apart. Door, window, picture, whiteboard and curtain are
panels less than 1 cm thick on the wall that share one distribution of sizes and heights; cabinet,
refrigerator and bookshelf share one distribution of boxes. Only their appearance tells these apart.

Every surface is an axis-aligned box, or the ellipsoid inscribed in one. A pixel (u, v) looks along
`ray = R^T K^-1 (u, v, 1)`, whose component along the optical axis is 1, so the parameter of a hit is its
depth. Boxes are hit by the slab test (Kay and Kajiya, "Ray tracing complex scenes", SIGGRAPH 1986),
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
MOVABLE = ("table", "chair", "lamp")  # not only at walls
BOXES = ("cabinet", "refrigerator", "bookshelf")
CLASSES = STUFF + PANELS + SHAPES + BOXES
SPLITS = ("train", "val", "test")


def read_ranges(table):
    """Lines of a name and pairs low, high -> {name: (lows, highs)} for `rng.uniform`."""
    ranges = {}
    for line in table.strip().splitlines():
        name, *limits = line.split()
        ranges[name] = np.array(limits, float).reshape(-1, 2).T
    return ranges


# ------------------------------------------------------------------------------------------ appearance
# hue, which wraps around; saturation; value
COLORS = read_ranges("""
    wall          -0.10 0.45    0.08 0.30    0.55 0.72
    ceiling        0.00 1.00    0.00 0.05    0.85 0.95
    planks         0.05 0.10    0.30 0.60    0.30 0.55
    tiles          0.00 1.00    0.03 0.25    0.25 0.50
    door           0.00 0.06    0.60 0.85    0.25 0.50
    window         0.15 0.40    0.30 0.60    0.40 0.70
    sky            0.52 0.63    0.35 0.65    0.85 1.00
    picture        0.00 0.75    0.70 1.00    0.60 1.00
    frame          0.08 0.13    0.30 0.80    0.10 0.50
    marker         0.00 1.00    0.20 0.60    0.60 0.90
    curtain        0.78 1.00    0.50 0.90    0.35 0.70
    shape          0.00 1.00    0.20 0.60    0.30 0.75
    cabinet        0.09 0.15    0.40 0.70    0.50 0.75
    refrigerator   0.52 0.66    0.10 0.25    0.60 0.85
    bookshelf      0.05 0.10    0.40 0.70    0.15 0.35
    book           0.30 0.75    0.40 0.90    0.20 0.60
    clutter        0.00 1.00    0.30 0.90    0.30 0.90
""")


@dataclass
class Look:
    """Texture of a surface: a grid of cells in the colors of a palette. Lengths in meters."""

    palette: np.ndarray        # (n, 3), or (3,) for a single color
    cell_u: float = 100.0      # larger than any face
    cell_v: float = 100.0
    step_u: int = 5            # in the palette, from a cell to the next
    step_v: int = 11
    joint_u: float = 0.0       # width of the lines between cells
    joint_v: float = 0.0
    joint_color: object = 0.0  # (3,), or a shade of gray
    rim: float = 0.0           # width of the border of a face
    rim_color: object = 0.0
    fold: float = 0.0          # how much darker a cell is at its sides


def draw_color(rng, name):
    """One RGB color (3,) in [0, 1] from the ranges of COLORS."""
    hue, saturation, value = rng.uniform(*COLORS[name])
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def vary(rng, color, share, count=16):
    """(count, 3): a color, brighter or darker by up to `share`."""
    change = share * rng.uniform(-1, 1, (count, 1))
    return color * (1 + change)


def draw_look(rng, kind, width=0.0, height=0.0):
    """Look of an object of a class with a front of about width x height meters."""
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
        width, length = rng.uniform(0.12, 0.2), rng.uniform(0.8, 1.4)
        return Look(palette, width, length, joint_u=0.008, joint_v=0.008, joint_color=0.5 * color)
    if kind == "tiles":
        side = rng.uniform(0.3, 0.6)
        return Look(vary(rng, color, 0.08), side, side, joint_u=0.015, joint_v=0.015, joint_color=1.4 * color)
    if kind in SHAPES:
        share = rng.choice([0.0, 0.1])
        return Look(vary(rng, color, share), rng.uniform(0.05, 0.2))
    if kind == "cabinet":
        palette = vary(rng, color, 0.1)
        height = height / rng.integers(1, 4)
        return Look(palette, width / 2, height, joint_u=0.015, joint_v=0.015, joint_color=0.4 * color)
    if kind == "refrigerator":
        door = rng.uniform(0.5, 0.7) * height
        return Look(color, cell_v=door, joint_v=0.02, joint_color=0.4 * color)
    if kind == "bookshelf":
        books = [draw_color(rng, "book") for _ in range(16)]
        thickness, board = rng.uniform(0.04, 0.07), rng.uniform(0.25, 0.35)
        return Look(books, thickness, board, joint_v=0.04, joint_color=color, rim=0.04, rim_color=color)
    return Look(color)


def draw_panel_look(rng, kind, width, height):
    """The Look of a picture, whiteboard or other panel; width and height in meters."""
    if kind == "picture":
        side = rng.uniform(0.12, 0.3)
        palette = [draw_color(rng, kind) for _ in range(16)]
        return Look(palette, side, side, rim=0.06, rim_color=draw_color(rng, "frame"))
    if kind == "whiteboard":
        marks = [draw_color(rng, "marker") for _ in range(3)]
        white = vary(rng, np.full(3, 0.97), 0.03, 20)
        width, height = rng.uniform(0.06, 0.1), rng.uniform(0.05, 0.08)
        gray = rng.uniform(0.5, 0.7)
        return Look(np.concatenate([white, marks]), width, height, rim=0.04, rim_color=gray)
    color = draw_color(rng, kind)
    if kind == "curtain":
        palette = vary(rng, color, 0.08)
        width, fold = rng.uniform(0.1, 0.25), rng.uniform(0.3, 0.6)
        return Look(palette, width, fold=fold)
    if kind == "door":
        palette = vary(rng, color, 0.15)
        board = width / rng.integers(3, 7)
        rim = rng.uniform(0.04, 0.1)
        return Look(palette, board, joint_u=0.01, joint_color=0.5 * color, rim=rim, rim_color=0.7 * color)
    sky = draw_color(rng, "sky")  # of a window, with land below and white bars
    horizon = rng.uniform(0.1, 0.4)
    share = (np.arange(16) / 15 - horizon) / 0.15
    share = np.clip(share, 0, 1)[:, None]
    palette = color + share * (sky - color)
    pane = width / rng.integers(1, 4)
    rim = rng.uniform(0.04, 0.08)
    return Look(palette, pane, height / 15.99, step_u=0, step_v=1, joint_u=0.05, joint_color=0.95, rim=rim,
                rim_color=0.95)


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
    edge_u = np.minimum(u, width - u)
    edge_v = np.minimum(v, height - v)
    color[np.minimum(edge_u, edge_v) < look.rim] = look.rim_color
    return color


# ---------------------------------------------------------------------------------------------- layout
# width, depth, height (of panels: width, height, bottom); height of the seat or mattress, of the arms
SIZES = read_ranges("""
    tall        0.80 1.40    1.90 2.10    0.00 0.10
    wide        0.90 1.70    0.80 1.30    0.70 1.00
    box         0.70 1.20    0.35 0.60    1.00 2.00
    table       0.90 1.60    0.60 0.90    0.68 0.78
    chair       0.42 0.52    0.42 0.52    0.85 1.00    0.42 0.48
    sofa        1.40 2.20    0.80 0.95    0.75 0.90    0.38 0.45    0.55 0.65
    bed         0.90 1.60    1.90 2.10    0.85 1.10    0.42 0.55
    clutter     0.08 0.25    0.08 0.25    0.05 0.25
""")
QUARTER_TURN = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])
TURNS = [np.linalg.matrix_power(QUARTER_TURN, quarter) for quarter in range(4)]


def draw_furniture(rng, kind):
    """Size (3,) of a piece and corners (6,) of its parts; its back is at y = 0, the floor at z = 0.

    The last part of a lamp is an ellipsoid.
    """
    if kind == "lamp":
        w, h = rng.uniform([0.3, 1.3], [0.45, 1.7])
        low, high = 0.2 * w, 0.8 * w
        left, right = w / 2 - 0.02, w / 2 + 0.02
        parts = [(low, low, 0, high, high, 0.04),
                 (left, left, 0.04, right, right, h - w),
                 (0, 0, h - w, w, w, h)]
        return np.array([w, w, h]), parts
    size = rng.uniform(*SIZES["box" if kind in BOXES else kind])
    w, d, h, *heights = size
    parts = [(0, 0, 0, w, d, h)]
    if kind == "table":
        parts = [(0, 0, h - 0.04, w, d, h)]
        parts += legs(w, d, h - 0.04, 0.06, 0.02)
    elif kind == "chair":
        seat, = heights
        parts = [(0, 0, seat - 0.05, w, d, seat),
                 (0, 0, seat, w, 0.05, h)]
        parts += legs(w, d, seat - 0.05, 0.04, 0)
    elif kind == "sofa":
        seat, arm = heights
        parts = [(0, 0, 0.05, w, d, seat),
                 (0, 0, seat, w, 0.22, h),
                 (0, 0.22, seat, 0.18, d, arm),
                 (w - 0.18, 0.22, seat, w, d, arm)]
    elif kind == "bed":
        top, = heights
        parts = [(0, 0, 0, w, 0.08, h),
                 (0, 0.08, 0.15, w, d, top),
                 (0.1, 0.15, top, w - 0.1, 0.5, top + 0.1)]
    return size[:3], parts


def legs(w, d, height, side, inset):
    """The boxes of four square legs under a top of w x d; all lengths in meters."""
    right = w - (inset + side)
    back = d - (inset + side)
    corners = itertools.product((inset, right), (inset, back))
    return [(x, y, 0, x + side, y + side, height) for x, y in corners]


def turn(box, quarter, origin):
    """Corners (2, 3) of a box (6,) after `quarter` turns of 90 degrees about z and a shift."""
    corners = np.reshape(box, (2, 3)) @ TURNS[quarter]
    return np.sort(corners + origin, 0)


def against_wall(room, side, along):
    """Where an object with its back to a wall stands, `along` meters from a corner of the room."""
    x, y, _ = room
    origins = [(along, 0, 0),
               (x, along, 0),
               (x - along, y, 0),
               (0, y - along, 0)]
    return np.array(origins[side], float)


def build_shell(room, rng):
    """Surfaces of walls, floor and ceiling, 10 cm thick."""
    surfaces = []
    wall = draw_look(rng, "wall")
    for i, kind in enumerate(("wall", "wall", "wall", "wall", "floor", "ceiling")):
        axis, end = divmod(i, 2)
        box = np.stack([np.full(3, -0.1), room + 0.1])
        box[1 - end, axis] = box[end, axis] + (0.1, -0.1)[end]
        look = wall if kind == "wall" else draw_look(rng, kind)
        surfaces.append((kind, -1, box, False, look))
    return surfaces


def hang_panels(room, surfaces, instances, rng):
    """Adds panels where the walls have space for them -> (side, left, right, bottom) of each."""
    panels = []
    more = rng.choice(PANELS, rng.integers(2, 5))
    for kind in rng.permutation([*PANELS, *more]):  # late ones find less space
        for _ in range(30):
            shape = "tall" if rng.random() < 0.4 else "wide"
            w, h, bottom = rng.uniform(*SIZES[shape])
            side = int(rng.integers(4))
            left = rng.uniform(0.05, room[side % 2] - w - 0.05)
            right = left + w
            beside = [panel for panel in panels if panel[0] == side]
            if any(left <= r + 0.1 and right >= l - 0.1 for _, l, r, _ in beside):
                continue
            panels.append((side, left, right, bottom))
            box = (0, 0, bottom, w, rng.uniform(0.002, 0.009), bottom + h)
            box = turn(box, side, against_wall(room, side, left))
            look = draw_look(rng, kind, w, h)
            surfaces.append((kind, next(instances), box, False, look))
            break
    return panels


def furnish(room, panels, surfaces, instances, rng):
    """Adds furniture that neither meets other pieces nor hides a panel, and clutter on the tables."""
    kinds = [*rng.permutation(BOXES), "bed", "sofa", "table", rng.choice(BOXES)]
    kinds += ["chair", "chair", "lamp", *rng.choice(MOVABLE, 3)]
    taken = []  # corners (2, 3) of the pieces in place
    for kind in kinds:
        for _ in range(40):
            size, parts = draw_furniture(rng, kind)
            side = int(rng.integers(4))
            origin = draw_origin(room, kind, size, side, panels, rng)
            if origin is None:
                continue
            box = turn((0, 0, 0, *size), side, origin)
            if is_free(box, room, taken):
                taken.append(box)
                add_furniture(surfaces, kind, size, parts, side, origin, next(instances), rng)
                break


def draw_origin(room, kind, size, side, panels, rng):
    """Where a piece may stand, somewhere or at a wall; None if it would hide a panel."""
    if kind in MOVABLE:
        return np.append(rng.uniform(0.1, room[:2] - 0.1), 0.0)
    width, _, height = size
    left = rng.uniform(0.02, room[side % 2] - width - 0.02)
    for wall, start, stop, bottom in panels:
        if wall == side and left < stop and left + width > start and height > bottom + 0.3:
            return None
    return against_wall(room, side, left)


def is_free(box, room, taken):
    """Whether a box lies in the room and, seen from above, 8 cm apart from others; corners (2, 3)."""
    low, high = box
    if (low < -1e-9).any() or (high > room + 1e-9).any():
        return False
    for other_low, other_high in taken:
        meets = (low <= other_high + 0.08) & (high >= other_low - 0.08)
        if meets[:2].all():
            return False
    return True


def add_furniture(surfaces, kind, size, parts, side, origin, instance, rng):
    """Appends the parts of a piece of furniture, turned to `side` at `origin`, to surfaces."""
    look = draw_look(rng, kind, size[0], size[2])
    for part in parts:
        is_shade = kind == "lamp" and part is parts[-1]
        surfaces.append((kind, instance, turn(part, side, origin), is_shade, look))
    if kind == "table":
        for _ in range(rng.integers(0, 4)):
            place = rng.uniform(0.05, size[:2] - 0.3)
            low = np.append(place, size[2])
            high = low + rng.uniform(*SIZES["clutter"])
            box = turn([low, high], side, origin)
            surfaces.append((None, -1, box, False, Look(draw_color(rng, "clutter"))))


def make_room(seed):
    """Seed (an int or a sequence of ints >= 0) -> scene, a dict of S surfaces.

    size (3,) meters of the room, which has a corner at the origin; corners (S, 2, 3) low and high;
    ellipsoid (S,) bool; label (S,) index into CLASSES, -1 for clutter; instance (S,) from 1, -1 for walls,
    floor, ceiling and clutter; look, S of `Look`; light (3,) and tint (3,), position and color of the
    lamp; ambient, the share of ambient light.
    """
    rng = np.random.default_rng(seed)
    room = rng.uniform([4.2, 4.2, 2.4], [6.0, 6.0, 2.8])
    instances = itertools.count(1)
    surfaces = build_shell(room, rng)
    panels = hang_panels(room, surfaces, instances, rng)
    furnish(room, panels, surfaces, instances, rng)
    kinds, instance, corners, ellipsoid, look = zip(*surfaces)
    label = [CLASSES.index(kind) if kind else -1 for kind in kinds]
    ambient = rng.uniform(0.5, 0.7)
    light = np.append(rng.uniform(0.3, 0.7, 2) * room[:2], room[2] - 0.2)
    return {
        "size": room,
        "corners": np.array(corners),
        "ellipsoid": np.array(ellipsoid),
        "label": np.array(label, np.int32),
        "instance": np.array(instance, np.int32),
        "look": look,
        "ambient": ambient,
        "light": light,
        "tint": rng.uniform(0.92, 1.08, 3)}


# ----------------------------------------------------------------------------------- camera and images


def look_at(eye, target, roll=0.0):
    """world2cam (4, 4) of a camera at `eye` (3,) that looks at `target` (3,); roll in radians."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    world2cam = np.eye(4)
    world2cam[0, :3] = c * right + s * down
    world2cam[1, :3] = c * down - s * right
    world2cam[2, :3] = forward
    world2cam[:3, 3] = -(world2cam[:3, :3] * eye).sum(1)
    return world2cam


def draw_camera(scene, rng):
    """world2cam (4, 4) of a camera at eye height, clear of furniture, that looks at some object."""
    small = np.array([[10.5, 0, 5.5], [0, 10.5, 4.0], [0, 0, 1]])  # intrinsics of an image (9, 12)
    low = scene["corners"][:, 0] - 0.3
    high = scene["corners"][:, 1] + 0.3
    x, y, _ = scene["size"] - 0.35
    while True:
        eye = rng.uniform([0.35, 0.35, 1.2], [x, y, 1.8])
        seen = rng.choice(np.unique(scene["instance"]))  # -1: wall, floor, ceiling or clutter
        surface = rng.choice(np.flatnonzero(scene["instance"] == seen))
        offset = rng.uniform(-1, 1, 3) * [0.5, 0.5, 0.8]
        target = scene["corners"][surface].mean(0) + offset
        roll = rng.uniform(-0.05, 0.05)
        dx, dy, dz = target - eye
        distance = np.hypot(dx, dy)
        inside = ((eye > low) & (eye < high)).all(1)
        if inside.any() or distance < 1.2 or not -0.7 < dz / distance < 0.35:
            continue
        world2cam = look_at(eye, target, roll)
        depth, *_ = cast(scene, world2cam, small, (9, 12))
        if depth.min() > 0.4 and np.median(depth) > 1.5:
            return world2cam


def combine(matrix, x, y, z):
    """Product of a matrix (3, 3) and vectors (x, y, z), summed in a fixed order, unlike `@`."""
    return [a * x + b * y + c * z for a, b, c in matrix]


def windows(corners, world2cam, intrinsics, size):
    """(S, 4) left, top, right, bottom of the pixels that boxes may cover, corners (S, 2, 3)."""
    vertices = [corners[:, k, range(3)].T for k in np.ndindex(2, 2, 2)]
    vertices = np.stack(vertices, 1)  # (3, 8, S)
    camera = np.stack(combine(world2cam[:3, :3], *vertices))
    camera += world2cam[:3, 3, None, None]
    z = camera[2]
    u, v, _ = combine(intrinsics, *camera)
    uv = np.stack([u, v]) / np.maximum(z, 1e-9)  # (2, 8, S)
    in_front = z.min(0) > 0.01
    start = np.where(in_front, np.floor(uv.min(1)), 0)
    stop = np.where(in_front, np.ceil(uv.max(1)) + 1, np.inf)
    limit = np.where(z.max(0) > 0.01, np.array(size)[::-1, None], 0)
    return np.concatenate([start.clip(0, limit), stop.clip(0, limit)]).astype(int).T


def hit_box(low, high, slope):
    """Depth (h, w) of a box, corners (3,) from the eye, on rays 1 / slope (3, h, w); whether it is hit."""
    near, far = -np.inf, np.inf
    for start, stop, inverse in zip(low, high, slope):
        a, b = start * inverse, stop * inverse
        near = np.maximum(near, np.minimum(a, b))
        far = np.minimum(far, np.maximum(a, b))
    return near, near <= far


def hit_ellipsoid(low, high, rays):
    """The same for the ellipsoid inscribed in a box; rays (3, h, w)."""
    # from the closest approach to the center: the textbook discriminant loses three digits in float32
    half = (high - low) / 2
    center = (high + low) / 2 / half
    o = center[:, None, None]
    d = rays / half[:, None, None]
    square = (d * d).sum(0)
    middle = (o * d).sum(0) / square
    inside = 1 - ((middle * d - o) ** 2).sum(0)
    half_chord = np.sqrt(np.maximum(inside, 0) / square)
    return middle - half_chord, inside > 0


def cast(scene, world2cam, intrinsics, size):
    """Depth (H, W), inf for no hit; surface (H, W), -1 for none; rays (3, H, W) and eye (3,) of a camera."""
    rotation = world2cam[:3, :3]
    eye = -(rotation * world2cam[:3, 3:]).sum(0)
    rows, columns = np.ogrid[:size[0], :size[1]]
    camera = combine(np.linalg.inv(intrinsics), columns, rows, 1)
    rays = np.array(combine(rotation.T, *camera), np.float32)
    tiny = np.float32(1e-9)
    slope = 1 / np.where(np.abs(rays) < tiny, tiny, rays)

    depth = np.full(size, np.inf, np.float32)
    surface = np.full(size, -1, np.int16)
    boxes = (scene["corners"] - eye).astype(np.float32)
    rectangles = windows(scene["corners"], world2cam, intrinsics, size)
    for index, (left, top, right, bottom) in enumerate(rectangles):
        if left >= right or top >= bottom:
            continue
        window = np.s_[..., top:bottom, left:right]
        if scene["ellipsoid"][index]:
            near, hit = hit_ellipsoid(*boxes[index], rays[window])
        else:
            near, hit = hit_box(*boxes[index], slope[window])
        hit &= near > 0
        hit &= near < depth[window]
        depth[window][hit] = near[hit]
        surface[window][hit] = index
    return depth, surface, rays, eye


def shade(scene, index, hit, rays):
    """Color (n, 3) of a surface at points (3, n) that rays (3, n) hit, and cosine (n,) to its normal."""
    low, high = scene["corners"][index, ..., None].astype(np.float32)
    extent = high - low
    local = (2 * hit - (low + high)) / extent  # (3, n) in [-1, 1]
    axis = np.abs(local).argmax(0)
    n = np.arange(len(axis))
    if scene["ellipsoid"][index]:
        normal = local / extent
        normal /= np.sqrt((normal * normal).sum(0))
    else:
        normal = np.zeros_like(local)
        normal[axis, n] = np.sign(local[axis, n])
    across = np.where(axis == 0, 1, 0)
    up = np.where(axis == 2, 1, 2)
    offset = hit - low
    u = offset[across, n]
    v = offset[up, n]
    color = texture(scene["look"][index], u, v, extent[across, 0], extent[up, 0])

    to_light = scene["light"].astype(np.float32)[:, None] - hit
    square = (to_light * to_light).sum(0)
    lambert = np.maximum((normal * to_light).sum(0), 0)
    lambert = lambert / np.sqrt(square) * 1.5 / (1 + square / 16)
    ambient = np.float32(scene["ambient"])
    light = ambient + (1 - ambient) * lambert
    color = color * light[:, None]
    color *= scene["tint"].astype(np.float32)
    cosine = np.abs((normal * rays).sum(0))
    return color, cosine / np.sqrt((rays * rays).sum(0))


def add_noise(color, depth, cosine, rng):
    """Noise on color (H, W, 3), in place, and on depth (H, W), with holes; cosine (H, W) to normals."""
    height, width = depth.shape
    gain = rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3)  # exposure, white balance
    color *= gain.astype(np.float32)
    color += 0.012 * rng.standard_normal(color.shape, np.float32)
    draw = rng.random(depth.shape, np.float32)
    kept = cosine > 0.15 * draw + 0.03
    kept &= depth < 8 - 2 * draw
    across = np.abs(np.diff(depth, axis=1, prepend=depth[:, :1]))
    down = np.abs(np.diff(depth, axis=0, prepend=depth[:1]))
    kept &= (np.maximum(across, down) <= 0.1) | (draw >= 0.5)
    rows, columns = np.ogrid[:height, :width]
    limits = [height, width, height / 12, height / 12]
    for _ in range(rng.integers(2, 7)):  # blobs
        v, u, a, b = rng.uniform(0, 1, 4) * limits
        dv = (rows - v) / (a + 2)
        du = (columns - u) / (b + 2)
        kept &= dv ** 2 + du ** 2 > 1
    sigma = 0.0012 + 0.0019 * (depth - 0.4) ** 2
    noisy = depth + sigma * rng.standard_normal(depth.shape, np.float32)
    return np.where(kept & (depth > 0), noisy, 0)


def render(scene, world2cam, intrinsics, size=(240, 320), rng=None):
    """A scene's color (H, W, 3) uint8 RGB, depth (H, W) float32, label and instance (H, W) int32.

    world2cam (4, 4) rigid, intrinsics (3, 3) in pixels. Depth is meters along the optical axis, 0 = hole;
    label and instance are -1 for none. With a Generator `rng`, depth has the noise of a structured-light
    sensor, sigma = 0.0012 + 0.0019 (z - 0.4)^2 (Nguyen, Izadi and Lovell, "Modeling Kinect sensor noise",
    3DIMPVT 2012), and holes at grazing angles, depth edges, large distances and in random blobs, none of
    which depends on the class; exposure, white balance and pixel values vary slightly. Labels are exact
    in any case, holes included.
    """
    depth, surface, rays, eye = cast(scene, world2cam, intrinsics, size)
    rays = rays.reshape(3, -1)
    eye = eye[:, None].astype(np.float32)
    color = np.zeros((depth.size, 3), np.float32)
    cosine = np.ones(depth.size, np.float32)
    order = np.argsort(surface, axis=None, kind="stable")
    found, starts = np.unique(surface.ravel()[order], return_index=True)
    groups = np.split(order, starts[1:])
    for index, pixels in zip(found, groups):
        if index >= 0:
            ray = rays[:, pixels]
            hit = ray * depth.ravel()[pixels] + eye
            color[pixels], cosine[pixels] = shade(scene, index, hit, ray)

    color = color.reshape(*size, 3)
    known = surface >= 0
    depth = np.where(known, depth, np.float32(0))
    if rng is not None:
        depth = add_noise(color, depth, cosine.reshape(size), rng)
    color = 255 * np.clip(color, 0, 1) + 0.5
    return {
        "color": color.astype(np.uint8),
        "depth": depth.astype(np.float32),
        "label": np.where(known, scene["label"][surface], -1),
        "instance": np.where(known, scene["instance"][surface], -1)}


def frames(split, num_rooms, frames_per_room, seed=0, size=(240, 320)):
    """Rooms of a split ("train", "val", "test"), each from `frames_per_room` cameras -> list of dicts.

    Each holds what `render` gives, name "<split>0003/2", world2cam (4, 4), and equal intrinsics and
    depth_intrinsics (3, 3), all float64. A room is drawn from (split, room, seed) and a frame from that
    and its own number, so splits share no room, and asking for more leaves the first ones unchanged.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    height, width = size
    result = []
    for room in range(num_rooms):
        # the seed comes last: however many words of 32 bits it has, no two of these lists have the same
        scene = make_room([SPLITS.index(split), room, 0, seed])
        for number in range(frames_per_room):
            rng = np.random.default_rng([SPLITS.index(split), room, 1 + number, seed])
            focal = 280 * width / 320 * rng.uniform(0.97, 1.03)
            cx = (width - 1) / 2 + 0.02 * width * rng.uniform(-1, 1)
            cy = (height - 1) / 2 + 0.02 * height * rng.uniform(-1, 1)
            intrinsics = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
            world2cam = draw_camera(scene, rng)
            frame = render(scene, world2cam, intrinsics, size, rng)
            frame["name"] = f"{split}{room:04d}/{number}"
            frame["world2cam"] = world2cam
            frame["intrinsics"] = frame["depth_intrinsics"] = intrinsics
            result.append(frame)
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
