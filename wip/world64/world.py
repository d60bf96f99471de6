"""A small world worth watching: 12 nouns, 8 colours, 6 scenes and 8 motions in 64 x 64 pixels

Every clip comes with the exact attributes, the path of its sprite (hence the optical flow), and the
strengths of its flaws. Everything is a function of its arguments and of a generator.
"""
import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, FRAMES = 64, 8
NOUNS = ("fish", "rocket", "house", "tree", "car", "star", "heart", "moon", "flower", "boat",
         "cat", "balloon")
COLOURS = {"red": (.92, .18, .20), "orange": (1., .55, .10), "yellow": (1., .87, .18),
           "green": (.20, .74, .30), "blue": (.18, .40, .95), "purple": (.60, .28, .85),
           "pink": (1., .55, .76), "white": (.97, .97, .97)}
SCENES = ("sky", "sea", "meadow", "night", "desert", "wall")
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "spinning", "bouncing")
KINDS = (NOUNS, tuple(COLOURS), SCENES, MOTIONS)  # one word of each in a caption
COUNTS = tuple(len(k) for k in KINDS)
REVERSED = (1, 0, 3, 2, 5, 4, 6, 7)               # a motion as seen backwards
FLAWS = ("blur", "watermark", "flicker")
WHERE = ("in the sky", "in the sea", "in the meadow", "at night", "in the desert", "by the wall")
WORDS = ("a", "an", "moving", "in", "at", "by", "the", *COLOURS, *NOUNS, *SCENES, *MOTIONS)

# ---- captions --------------------------------------------------------------------------

HELD_PAIRS = tuple(pair.split() for pair in (
    "fish yellow", "rocket pink", "house blue", "tree red", "car purple", "star green",
    "moon orange", "cat white",
    "heart sea", "flower desert", "boat sky", "balloon night", "fish meadow", "star wall",
    "rocket down", "house spinning", "car bouncing", "flower left", "cat up", "balloon growing",
    "red night", "purple desert", "orange shrinking", "green right", "wall up"))


def caption(n: int, c: int, s: int, m: int) -> str:
    "The caption of a noun, colour, scene and motion, with the right article"
    colour = tuple(COLOURS)[c]
    article = "an" if colour[0] in "aeiou" else "a"
    verb = MOTIONS[m] if m >= 4 else f"moving {MOTIONS[m]}"
    return f"{article} {colour} {NOUNS[n]} {verb} {WHERE[s]}"


def all_attrs() -> Tensor:
    "All 4,608 combinations `(4608 4)`"
    return torch.cartesian_prod(*(torch.arange(n) for n in COUNTS))


def is_held(attrs: Tensor) -> Tensor:
    "Whether combinations `(n 4)` contain one of the held-out pairs of words `(n,)`"
    held = torch.zeros(len(attrs), dtype=torch.bool)
    for pair in HELD_PAIRS:
        at = [(k, words.index(w)) for w in pair for k, words in enumerate(KINDS) if w in words]
        held |= torch.stack([attrs[:, k] == i for k, i in at]).all(0)
    return held


@cache
def combos(split: str) -> Tensor:
    "The combinations of 'train', 'heldout' or 'all' `(n 4)`"
    attrs = all_attrs()
    return {"train": attrs[~is_held(attrs)], "heldout": attrs[is_held(attrs)], "all": attrs}[split]


def sample_attrs(n: int, split: str, gen: torch.Generator) -> Tensor:
    "Draw `n` combinations of a split, evenly and with replacement"
    every = combos(split)
    return every[torch.randint(len(every), (n,), generator=gen)]


# ---- signed distances; x to the right, y down ------------------------------------------

def circle(x, y, cx, cy, r):
    "Distance from a disc"
    return ((x - cx)**2 + (y - cy)**2).sqrt() - r


def ellipse(x, y, cx, cy, a, b):
    "About the distance from an ellipse with half axes `a`, `b`"
    return ((((x - cx) / a)**2 + ((y - cy) / b)**2).sqrt() - 1) * min(a, b)


def box(x, y, cx, cy, a, b, r=0.):
    "Distance from a box with half sides `a`, `b` and corners of radius `r`"
    dx, dy = (x - cx).abs() - a + r, (y - cy).abs() - b + r
    outside = (dx.clamp(min=0)**2 + dy.clamp(min=0)**2).sqrt()
    return torch.maximum(dx, dy).clamp(max=0) + outside - r


def poly(x, y, *points):
    "Distance from a polygon"
    d, sign = torch.full_like(x, 1e9), torch.ones_like(x)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        h = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        d = torch.minimum(d, (wx - ex * h)**2 + (wy - ey * h)**2)
        above, below, left = y >= ay, y < by, ex * wy > ey * wx
        sign = torch.where((above == below) & (above == left), -sign, sign)
    return sign * d.sqrt()


def union(*d):
    "Distance from several shapes together"
    return torch.stack(d).amin(0)


def both(*d):
    "Distance from what several shapes share"
    return torch.stack(d).amax(0)


def mirrored(x):
    "Fold the right half over the left"
    return x.abs()


# ---- sprites: parts from back to front, each a distance and a paint --------------------

INK, WHITE, GLASS = (.11, .09, .16), (1., 1., 1.), (.72, .91, 1.)
BROWN, GOLD, LEAF, BLUSH = (.50, .31, .16), (1., .80, .25), (.22, .60, .25), (1., .55, .55)
MAIN, DARK, LIGHT = "main", "dark", "light"  # the colour of the caption, and its shades


def eyes(x, y, cx, cy, r):
    "Two round eyes with a gleam"
    x = mirrored(x)
    gleam = circle(x, y, cx - .3 * r, cy - .35 * r, .38 * r)
    return [(circle(x, y, cx, cy, r), INK), (gleam, WHITE)]


def smile(x, y, cy, r):
    "A smiling mouth"
    return [(both(circle(x, y, 0, cy, r).abs() - .045, -(y - cy) + .25 * r), INK)]


def fish(x, y):
    tail = poly(x, y, (-.42, 0), (-1.12, -.66), (-.92, 0), (-1.12, .66))
    fins = union(poly(x, y, (-.25, -.45), (.05, -1.0), (.5, -.45)),
                 poly(x, y, (-.1, .45), (.0, .92), (.35, .45)))
    body = ellipse(x, y, .18, 0, .92, .64)
    bands = both(body, union(box(x, y, -.22, 0, .1, 1), box(x, y, .14, 0, .1, 1)))
    return [(tail, DARK), (fins, DARK), (body, MAIN), (bands, LIGHT),
            (circle(x, y, .66, -.14, .22), WHITE), (circle(x, y, .71, -.12, .12), INK)]


def rocket(x, y):
    flame = union(poly(x, y, (-.34, .6), (0, 1.25), (.34, .6)))
    fins = poly(mirrored(x), y, (.3, .05), (.95, .98), (.25, .7))
    hull = both(circle(x, y, -.62, .2, 1.15), circle(x, y, .62, .2, 1.15), y - .74)
    return [(flame, GOLD), (fins, DARK), (hull, MAIN), (both(hull, y + .5), LIGHT),
            (circle(x, y, 0, .02, .29), INK), (circle(x, y, 0, .02, .2), GLASS)]


def house(x, y):
    wall, roof = box(x, y, 0, .46, .82, .56), poly(x, y, (-1.12, .02), (0, -1.08), (1.12, .02))
    return [(box(x, y, .58, -.66, .16, .4), DARK), (wall, LIGHT), (roof, MAIN),
            (box(x, y, -.36, .62, .24, .4), BROWN), (box(x, y, .38, .42, .25, .23), INK),
            (box(x, y, .38, .42, .17, .15), GLASS)]


def tree(x, y):
    tier = lambda top, low, wide: poly(x, y, (-wide, low), (0, top), (wide, low))
    return [(box(x, y, 0, .85, .17, .32), BROWN), (tier(-.3, .72, .98), DARK),
            (tier(-.74, .22, .8), MAIN), (tier(-1.16, -.3, .58), LIGHT)]


def car(x, y):
    cabin = poly(x, y, (-.8, 0), (-.5, -.72), (.4, -.72), (.8, 0))
    body, wheel = box(x, y, 0, .2, 1.14, .4, .2), circle(mirrored(x), y, .6, .6, .32)
    panes = both(poly(x, y, (-.6, -.05), (-.4, -.56), (.3, -.56), (.58, -.05)),
                 .07 - (x + .03).abs())
    return [(cabin, MAIN), (body, MAIN), (box(x, y, 0, .42, 1.1, .1), DARK), (panes, GLASS),
            (wheel, INK), (wheel + .18, WHITE), (circle(x, y, 1.0, .12, .13), GOLD)]


def star(x, y):
    r = lambda i: 1.2 if i % 2 == 0 else .58
    d = poly(x, y, *((r(i) * math.sin(i * math.pi / 5), .06 - r(i) * math.cos(i * math.pi / 5))
                     for i in range(10)))
    return [(d, MAIN), (d + .26, LIGHT), *eyes(x, y, .22, -.02, .13), *smile(x, y, .1, .2)]


def heart(x, y):
    d = union(circle(mirrored(x), y, .5, -.34, .58),
              poly(x, y, (-1.02, -.08), (0, 1.08), (1.02, -.08), (.5, -.4), (-.5, -.4)))
    return [(d, MAIN), (both(d + .16, .72 - circle(x, y, .1, -.1, 0)), LIGHT),
            (ellipse(x, y, -.52, -.48, .24, .15), WHITE)]


def moon(x, y):
    d = both(circle(x, y, -.06, 0, 1.08), -circle(x, y, .56, -.1, .8))
    return [(d, MAIN), (circle(x, y, -.55, .55, .15), DARK), (circle(x, y, -.35, -.72, .12), DARK),
            (circle(x, y, -.62, -.12, .13), INK), (circle(x, y, -.66, -.17, .05), WHITE),
            (circle(x, y, -.78, .2, .1), BLUSH)]


def flower(x, y):
    turn = [i * math.tau / 5 for i in range(5)]
    petals = union(*(circle(x, y, .56 * math.sin(a), -.22 - .56 * math.cos(a), .4) for a in turn))
    leaves = ellipse(mirrored(x), y, .34, .92, .34, .17)
    return [(box(x, y, 0, .75, .09, .42), LEAF), (leaves, LEAF), (petals, MAIN),
            (circle(x, y, 0, -.22, .42), GOLD), *eyes(x, y, .15, -.27, .09), *smile(x, y, -.2, .17)]


def boat(x, y):
    hull = poly(x, y, (-1.16, .4), (1.16, .4), (.72, 1.02), (-.72, 1.02))
    return [(box(x, y, 0, -.35, .07, .8), BROWN), (hull, BROWN),
            (both(hull, box(x, y, 0, .6, 2, .09)), WHITE),
            (poly(x, y, (.14, -1.1), (.14, .26), (1.02, .26)), MAIN),
            (poly(x, y, (-.14, -.86), (-.14, .26), (-.92, .26)), LIGHT)]


def cat(x, y):
    ears = poly(mirrored(x), y, (.98, -1.12), (1.0, .1), (.1, -.56))
    inner = poly(mirrored(x), y, (.84, -.82), (.86, -.3), (.46, -.52))
    head, whisker = ellipse(x, y, 0, .16, 1.06, .84), mirrored(x) - .86
    lines = both(union((y - .3).abs(), (y - .52).abs()) - .035, whisker.abs() - .2)
    return [(ears, MAIN), (inner, BLUSH), (head, MAIN), (ellipse(x, y, 0, .56, .52, .34), LIGHT),
            *eyes(x, y, .44, .04, .2), (poly(x, y, (-.15, .36), (.15, .36), (0, .54)), INK),
            (lines, INK)]


def balloon(x, y):
    neck = poly(x, y, (-.74, .1), (.74, .1), (.24, .68), (-.24, .68))
    bag = union(circle(x, y, 0, -.32, .86), neck)
    middle, rim = ellipse(x, y, 0, -.3, .28, 1.1), -ellipse(x, y, 0, -.3, .66, 1.2)
    ropes = box(mirrored(x), y, .19, .76, .04, .18)
    return [(ropes, INK), (bag, MAIN), (both(bag, middle), LIGHT),
            (both(bag, rim), DARK), (box(x, y, 0, 1.02, .27, .18, .06), BROWN)]


DRAWN = dict(fish=fish, rocket=rocket, house=house, tree=tree, car=car, star=star, heart=heart,
             moon=moon, flower=flower, boat=boat, cat=cat, balloon=balloon)
EXTENT = 1.4            # half the side of a template, in radii of a sprite
CELLS = 64              # texels of a template's side
RADII = (.12, .17, .23, .31)  # each level is smoothed for sprites of this radius
_FINE = 5               # samples of a texel's side


def canvas(noun: str) -> Tensor:
    "A large drawing: weight of the caption's colour, r, g, b, alpha, premultiplied `(5 320 320)`"
    n = CELLS * _FINE
    g = ((torch.arange(n) + .5) / n * 2 - 1) * EXTENT
    y, x = torch.meshgrid(g, g, indexing="ij")
    parts, out = DRAWN[noun](x, y), torch.zeros(5, n, n)
    shades = {MAIN: (1., 0., 0., 0.), DARK: (.62, .02, .01, .05), LIGHT: (.48, .5, .5, .5)}
    outline = union(*(d for d, _ in parts)) - .11
    for d, paint in [(outline, INK), *parts]:
        source = shades[paint] if isinstance(paint, str) else (0., *paint)
        a = (.5 - d * n / (2 * EXTENT)).clamp(0, 1)
        out = out * (1 - a) + a * torch.tensor((*source, 1.)).view(5, 1, 1)
    return out


@cache
def templates() -> Tensor:
    "Sprites smoothed for each of `RADII` `(levels nouns 5 64 64)`"
    fine = torch.stack([canvas(noun) for noun in NOUNS])
    dots = CELLS * _FINE / (2 * EXTENT)                # samples of a radius
    widths = [2 * round(dots / (r * SIZE) / 2 - .5) + 1 for r in RADII]
    return torch.stack([F.avg_pool2d(fine, k, _FINE, (k - _FINE) // 2) for k in widths])


# ---- scenes ----------------------------------------------------------------------------

def grid(n: int) -> tuple[Tensor, Tensor]:
    "Coordinates of the pixels of `n` frames, x and y in 0..1, each `(n 64 64)`"
    g = (torch.arange(SIZE) + .5) / SIZE
    return g.view(1, 1, -1).expand(n, SIZE, SIZE), g.view(1, -1, 1).expand(n, SIZE, SIZE)


def gradient(top, low, y):
    "Blend two colours from top to bottom `(n 3 64 64)`"
    return torch.lerp(*(torch.tensor(c).view(1, 3, 1, 1) for c in (top, low)), y[:, None])


def over(below, rgb, a):
    "Paint a colour over pictures where `a` is 1"
    return torch.lerp(below, torch.tensor(rgb).view(1, 3, 1, 1), a[:, None])


def soft(d, sharp=SIZE):
    "1 inside (d > 0), 0 outside, one pixel wide at `sharp` = 64"
    return (d * sharp + .5).clamp(0, 1)


def wave(x, phase, times=1.):
    "A sine along x"
    return torch.sin((x * times + phase) * math.tau)


def sky(u, x, y):
    "Clouds on blue"
    out = gradient((.32, .63, .96), (.80, .93, 1.), y)
    for k, row in enumerate((.16, .52, .86)):
        cx, cy, w = (u[k] + .37 * k) % 1.2 - .1, row + .06 * u[k + 3], .10 + .05 * u[5 - k]
        puffs = [1 - (((x - cx - a * w) / w)**2 + ((y - cy - b * w) / (.75 * w))**2).sqrt()
                 for a, b in ((0, 0), (.95, .22), (-.95, .22))]
        out = over(out, (1., 1., 1.), soft(union(*(-p for p in puffs)) * -1, 7))
    return out


def sea(u, x, y):
    "Light from above, waves, sand and bubbles"
    out = gradient((.20, .72, .84), (.04, .26, .55), y)
    for k in range(3):
        crest = .14 + .24 * k + .03 * wave(x, u[k], 2)
        out = over(out, (.62, .90, .95), .7 * soft(.016 - (y - crest).abs()))
    sand = .88 + .03 * wave(x, u[3])
    out = over(out, (.93, .83, .58), soft(y - sand))
    for k in range(4):
        cx, cy = (u[k] + .29 * k) % 1, (u[(k + 2) % 6] + .23 * k) % .8
        out = over(out, (.80, .96, 1.), .8 * soft(.026 - .006 * (k % 2) - circle(x, y, cx, cy, 0)))
    return out


def meadow(u, x, y):
    "Hills with daisies under a pale sky"
    out = gradient((.58, .84, .98), (.90, .97, 1.), y * 1.6)
    out = over(out, (.56, .80, .42), soft(y - .44 - .07 * wave(x, u[0])))
    out = over(out, (.36, .67, .30), soft(y - .66 - .05 * wave(x, u[1], 1.3)))
    for k in range(6):
        cx, cy = (u[k] + .17 * k) % 1, .78 + .18 * ((3 * u[(k + 2) % 6] + .29 * k) % 1)
        petal = ((1., .97, .75), (1., .72, .80))[k % 2]
        out = over(out, petal, soft(.02 - circle(x, y, cx, cy, 0)))
    return out


def night(u, x, y):
    "A town under stars"
    out = gradient((.05, .05, .20), (.28, .20, .48), y)
    for k in range(10):
        cx, cy = (u[k % 6] * (1 + k // 6) + .113 * k * k) % 1, (u[(k + 1) % 6] + .271 * k) % .8
        out = over(out, (1., .96, .78), soft(.012 + .005 * (k % 2) - circle(x, y, cx, cy, 0)))
    block = torch.floor((x + u[2]) * 8)
    roof = .88 - .06 * (block * 2.4).sin()
    out = over(out, (.03, .03, .10), soft(y - roof))
    across = (((x + u[2]) * 8) % 1 - .5).abs() / 8
    lit = torch.minimum(.026 - across, .02 - (y - .945).abs())
    return over(out, (1., .82, .36), soft(lit) * ((block * 1.7).sin() > -.2))


def desert(u, x, y):
    "Dunes and a low sun"
    out = gradient((1., .72, .50), (1., .93, .72), y * 1.5)
    out = over(out, (1., .97, .82), soft(.12 - circle(x, y, .15 + .7 * u[0], .22, 0)))
    out = over(out, (.94, .70, .42), soft(y - .54 - .07 * wave(x, u[1], .8)))
    return over(out, (.84, .56, .31), soft(y - .76 - .06 * wave(x, u[2], 1.1)))


def wall(u, x, y):
    "Bricks; their rows keep to the grid of 8 pixels, so that a small autoencoder finds them easy"
    row = torch.floor(y * 8)
    along = x * 4 + u[0] * 4 + .5 * (row % 2)
    tone = .10 * torch.sin(torch.floor(along) * 3.7 + row * 5.1)
    out = torch.tensor((.72, .42, .36)).view(1, 3, 1, 1) * (1 + tone[:, None])
    joint = torch.maximum(soft(.5 / 64 - (y * 8 % 1 - .03) / 8), soft(.6 / 64 - (along % 1) / 4))
    return over(out, (.88, .78, .70), .9 * joint)


PAINTED = (sky, sea, meadow, night, desert, wall)


def backgrounds(s: Tensor, gen: torch.Generator) -> Tensor:
    "Pictures `(b 3 64 64)` of scenes `(b,)`"
    u, bright = (torch.rand(k, len(s), 1, 1, generator=gen) for k in (6, 1))
    out = torch.empty(len(s), 3, SIZE, SIZE)
    for i, paint in enumerate(PAINTED):
        rows = (s == i).nonzero()[:, 0]
        if len(rows):
            out[rows] = paint(u[:, rows], *grid(len(rows)))
    return (out * (.94 + .10 * bright[0][:, None])).clamp(0, 1)


# ---- motion ----------------------------------------------------------------------------

@dataclass
class Path:
    "Where a sprite is in each frame"
    centre: Tensor  # x and y in 0..1 `(b 2 t)`
    half: Tensor    # half width and half height, in units of the frame `(b 2 t)`
    angle: Tensor   # clockwise, in radians `(b t)`


STEP, RADIUS = 4 / SIZE, .235  # sprites stand on a grid of 4 pixels, all of one size
HOPS = torch.tensor((0., .75, 1., .75)).repeat(2)  # heights of two hops, of 16 pixels


def paths(m: Tensor, gen: torch.Generator) -> Path:
    """Move, grow, spin or bounce: one path for each motion `(b,)`

    Places are multiples of 4 pixels and sprites stand upright, so that a small network meets each
    sprite in few positions against its 8 x 8 patches.
    """
    b, tau = len(m), torch.arange(FRAMES) / (FRAMES - 1)
    is_a = lambda name: (m == MOTIONS.index(name)).float()[:, None]
    push = torch.stack([is_a("right") - is_a("left"), is_a("down") - is_a("up")], 1)  # (b 2 1)
    free = torch.randint(-2, 3, (b, 2, 1), generator=gen)              # where it stands
    side = torch.randint(-1, 2, (b, 2, 1), generator=gen) * (push == 0)  # beside a moving path
    late = torch.randint(0, 2, (b, 1, 1), generator=gen)               # which end is longer
    moved = push * (torch.arange(FRAMES) - 4 + late) + side
    centre = .5 + STEP * torch.where(push.abs().sum(1, keepdim=True) > 0, moved, free.float())
    phase = torch.randint(0, 4, (b, 1), generator=gen)
    height = HOPS[(torch.arange(FRAMES) + phase) % 4] * is_a("bouncing")
    centre = centre.expand(b, 2, FRAMES) - torch.stack([0 * height, (4 * height - 2) * STEP], 1)
    centre[:, 1] -= 2 * STEP * (1 - is_a("bouncing"))                  # only what bounces sinks
    radius = RADIUS + (is_a("growing") - is_a("shrinking")) * .10 * (2 * tau - 1)
    squash = (height == 0) * is_a("bouncing")
    half = torch.stack([radius * (1 + .16 * squash), radius * (1 - .20 * squash)], 1)
    return Path(centre, half, is_a("spinning") * math.radians(280) * tau)


def to_sprite(path: Path) -> Tensor:
    "Matrices `(b t 2 3)` from pixels in [-1,1] to a template's coordinates in [-1,1]"
    co, si = path.angle.cos(), path.angle.sin()
    turn = torch.stack([torch.stack([co, si], -1), torch.stack([-si, co], -1)], -2)   # (b t 2 2)
    linear = turn / (EXTENT * path.half.transpose(1, 2)[..., None])
    shift = linear @ (.5 - path.centre.transpose(1, 2))[..., None]
    return torch.cat([linear / 2, shift], -1)


def optical_flow(path: Path, alpha: Tensor) -> Tensor:
    "Pixels that each point moves to the next frame, x and y `(b 2 t-1 64 64)`; scenes stand still"
    b, t = path.angle.shape
    forth = F.pad(to_sprite(path), (0, 0, 0, 1))
    forth[..., 2, 2] = 1
    step = torch.linalg.inv(forth[:, 1:]) @ forth[:, :-1]              # this frame to the next
    there = F.affine_grid(step[..., :2, :].flatten(0, 1), (b * (t - 1), 1, SIZE, SIZE), False)
    here = F.affine_grid(torch.eye(2, 3)[None], (1, 1, SIZE, SIZE), False)
    flow = ((there - here) * SIZE / 2).view(b, t - 1, SIZE, SIZE, 2).permute(0, 4, 1, 2, 3)
    return flow * (alpha[:, None, :-1] > .5)


def compose(attrs: Tensor, gen: torch.Generator) -> tuple[Tensor, Path, Tensor]:
    "Clips without flaws `(b 3 t 64 64)` in [0,1], paths, and how far sprites cover `(b t 64 64)`"
    n, c, s, m = attrs.T
    b, behind, path = len(attrs), backgrounds(s, gen), paths(m, gen)
    bright = .94 + .12 * torch.rand(b, 1, generator=gen)
    rgb = (torch.tensor(list(COLOURS.values()))[c] * bright).view(b, 3, 1, 1, 1)
    level = (path.half.mean(1)[..., None].log() - torch.tensor(RADII).log()).abs().argmin(-1)
    places = F.affine_grid(to_sprite(path).flatten(0, 1), (b * FRAMES, 1, SIZE, SIZE), False)
    picked = templates()[level.flatten(), n.repeat_interleave(FRAMES)]
    part = F.grid_sample(picked, places, align_corners=False).unflatten(0, (b, FRAMES))
    part = part.transpose(1, 2)                                        # (b 5 t h w)
    clips = torch.addcmul(part[:, 1:4], part[:, :1], rgb)
    clips = torch.addcmul(clips, 1 - part[:, 4:], behind[:, :, None])
    return clips.clamp(0, 1), path, part[:, 4]


# ---- flaws -----------------------------------------------------------------------------

@cache
def _blur_matrix(sigma):
    at = torch.arange(SIZE)
    k = torch.exp(-(at[:, None] - at[None]).float()**2 / (2 * sigma**2))
    return k / k.sum(1, keepdim=True)


def blur(clips: Tensor, sigma: float = 1.6) -> Tensor:
    "Blur every frame with a Gaussian"
    k = _blur_matrix(sigma)
    return k @ clips @ k.T


_LOGO = ("#...#.###.###.", "#...#.#...#..#", "#.#.#.##..###.", "#.#.#.#...#..#", ".#.#..###.###.")


@cache
def logo() -> Tensor:
    "1 where the watermark is `(64 64)`"
    mark = torch.tensor([[dot == "#" for dot in row] for row in _LOGO]).float()
    mark = mark.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return F.pad(mark, (SIZE - 3 - mark.shape[1], 3, SIZE - 3 - mark.shape[0], 3))


def watermark(clips: Tensor, alpha: float = .65) -> Tensor:
    "Paint the watermark over every frame"
    return torch.lerp(clips, torch.full_like(clips, .95), alpha * logo())


def flicker(clips: Tensor, gains: Tensor, amount: float = .45) -> Tensor:
    "Multiply every frame by its own brightness; `gains` `(b t)` in [-1,1]"
    return (clips * (1 + amount * gains[:, None, :, None, None])).clamp(0, 1)


def web(clips: Tensor, gen: torch.Generator, chance: tuple = (.4, .4, .45)):
    "Clips as found on the web: flaws with strengths in [.35,1], or 0 where there is none `(b 3)`"
    b = len(clips)
    gains = 2 * torch.rand(b, clips.shape[2], generator=gen) - 1
    on = torch.rand(b, 3, generator=gen) < torch.tensor(chance)
    strength = (.35 + .65 * torch.rand(b, 3, generator=gen)) * on
    out = clips.clone()
    for i, spoil in ((0, blur), (2, flicker), (1, watermark)):
        rows = on[:, i].nonzero()[:, 0]
        args, weight = (gains[rows],) if i == 2 else (), strength[rows, i].view(-1, 1, 1, 1, 1)
        out[rows] = torch.lerp(out[rows], spoil(out[rows], *args), weight)
    return out, strength


# ---- batches ---------------------------------------------------------------------------

@dataclass
class Clips:
    "A batch, and all that is known about it"
    video: Tensor  # `(b 3 t 64 64)` in [0,1]
    attrs: Tensor  # what is shown `(b 4)`
    said: Tensor   # what the caption says `(b 4)`; differs from `attrs` in a few wrong captions
    flaws: Tensor  # strengths of `FLAWS` `(b 3)`
    path: Path
    alpha: Tensor  # how far the sprite covers each pixel `(b t 64 64)`

    def captions(self) -> list[str]:
        "What is said, in words"
        return [caption(*a) for a in self.said.tolist()]

    def flow(self) -> Tensor:
        "Exact optical flow of the clips without flaws `(b 2 t-1 64 64)`, in pixels"
        return optical_flow(self.path, self.alpha)


def step_gen(seed: int, step: int) -> torch.Generator:
    "The generator of one step"
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def batch(seed: int, step: int, size: int, split: str = "train", clean: bool = False,
          wrong: float = .06) -> Clips:
    "The clips of one step, with flaws and a share of wrong captions unless `clean`"
    gen = step_gen(seed, step)
    attrs = sample_attrs(size, split, gen)
    video, path, alpha = compose(attrs, gen)
    if clean:
        return Clips(video, attrs, attrs, torch.zeros(size, 3), path, alpha)
    video, flaws = web(video, gen)
    swap = torch.rand(size, 1, generator=gen) < wrong
    said = torch.where(swap, sample_attrs(size, split, gen), attrs)
    return Clips(video, attrs, said, flaws, path, alpha)
