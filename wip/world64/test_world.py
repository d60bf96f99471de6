"""Checks of the world: `pytest wip/world64`"""
import torch
import torch.nn.functional as F

import world
from rewards import parse


def test_captions_can_be_read_back():
    "Every caption names its own combination, with the right article"
    for row in world.all_attrs().tolist():
        assert parse(world.caption(*row)) == tuple(row)
    assert world.caption(10, 1, 3, 6) == "an orange cat spinning at night"


def test_no_training_clip_holds_a_held_out_pair():
    "Neither what is shown nor what is said"
    for step in range(4):
        b = world.batch(0, step, 64)
        assert not world.is_held(b.attrs).any() and not world.is_held(b.said).any()
    assert len(world.combos("train")) + len(world.combos("heldout")) == len(world.combos("all"))


def test_the_same_step_gives_the_same_clips():
    "A batch is a function of seed and step"
    a, b, c = (world.batch(1, step, 4) for step in (5, 5, 6))
    assert torch.equal(a.video, b.video) and a.captions() == b.captions()
    assert not torch.equal(a.video, c.video)


def test_flow_leads_to_the_next_frame():
    "The next frame, fetched along the flow, shows the sprite as it is now"
    b = world.batch(2, 0, 32, clean=True)
    flow, (n, t) = b.flow(), (32, 7)
    here = F.affine_grid(torch.eye(2, 3)[None], (1, 1, 64, 64), False)
    grid = here + flow.permute(0, 2, 3, 4, 1).flatten(0, 1) * 2 / 64
    after = b.video[:, :, 1:].transpose(1, 2).flatten(0, 1)
    fetched = F.grid_sample(after, grid, align_corners=False).view(n, t, 3, 64, 64)
    inside = (b.alpha[:, :-1] > .99) & (grid.abs().amax(-1).view(n, t, 64, 64) < 1)
    now, still = b.video[:, :, :-1].transpose(1, 2), b.video[:, :, 1:].transpose(1, 2)
    error = lambda x: (x - now).abs().mean(2)[inside].mean()
    assert error(fetched) < .25 * error(still)
