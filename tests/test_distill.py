"One step of distillation: the sum of its terms, what each weight pulls at, and the ranges of what is drawn"
import pytest
import torch
from torch import nn

from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.world import caption, combos

PROMPTS = [caption(*a) for a in combos("train")[:2].tolist()]


class Brightness(nn.Module):
    "A reward whose score is the mean of a colour channel"
    def __init__(self, channel): super().__init__(); self.channel = channel
    def forward(self, frames, prompts): return frames[:, self.channel].flatten(1).mean(1)


@pytest.fixture(scope="module")
def step():
    "A function from an objective's settings to a step's output and the gradient of its loss"
    teacher = load_teacher("tiny")
    student = Student(teacher, rank=2)
    with torch.no_grad():
        for n, p in student.named_parameters():
            if p.requires_grad: p += .02 * torch.randn(p.shape, generator=make_gen(len(n)))
    ctx, null = teacher.encode_text(PROMPTS), teacher.encode_text([""] * 2)
    z0 = torch.randn((2, *teacher.latent_shape), generator=make_gen(1))

    def go(**settings):
        cfg = Objective(image_frames=2, video_frames=2, **settings)
        model = Distillation(student, cfg, Brightness(0), Brightness(2))
        out = model(z0, ctx, null, PROMPTS, draw(cfg, z0.shape, make_gen(2)))
        grads = torch.autograd.grad(out.loss.sum(), [p for p in student.parameters() if p.requires_grad])
        return out, torch.cat([g.flatten() for g in grads]).double()
    return go


@pytest.mark.parametrize("shape", ["raw", "log_sigmoid"])
def test_the_loss_is_the_sum_of_its_terms(step, shape):
    out, _ = step(beta_img=.3, beta_vid=.7, shape=shape)
    assert out.j_img.abs().min() > .01 and (out.j_img - out.j_vid).abs().min() > 1e-3
    torch.testing.assert_close(out.loss.detach(), out.cd - .3 * out.j_img - .7 * out.j_vid)
    J = {"raw": lambda R: R, "log_sigmoid": torch.nn.functional.logsigmoid}[shape]
    torch.testing.assert_close(out.j_vid, J(out.r_vid))


def test_each_weight_pulls_at_its_own_reward(step):
    "The gradient is linear in both weights, and a step against it raises the reward that is weighted"
    cd, img, vid, both = (step(beta_img=i, beta_vid=v, shape="raw")[1] for i, v in ((0., 0.), (1., 0.), (0., 1.), (.3, .7)))
    pull_img, pull_vid = img - cd, vid - cd
    assert pull_img.norm() > 1e-4 and pull_vid.norm() > 1e-4 and (pull_img - pull_vid).norm() > .1 * pull_img.norm()
    torch.testing.assert_close(both, cd + .3 * pull_img + .7 * pull_vid, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", ["beta_img", "beta_vid"])
def test_a_step_down_the_loss_raises_the_reward(beta):
    teacher = load_teacher("tiny")
    student = Student(teacher, rank=2)
    cfg = Objective(**(dict(beta_img=0., beta_vid=0., image_frames=2, video_frames=2, shape="raw") | {beta: 1000.}))
    model, z0 = Distillation(student, cfg, Brightness(0), Brightness(2)), torch.randn((2, *teacher.latent_shape), generator=make_gen(1))
    ctx, null, params = teacher.encode_text(PROMPTS), teacher.encode_text([""] * 2), [p for p in student.parameters() if p.requires_grad]
    go = lambda: model(z0, ctx, null, PROMPTS, draw(cfg, z0.shape, make_gen(2)))
    before = go()
    grads = torch.autograd.grad(before.loss.mean(), params)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(params, grads): p -= .05 * g / norm
    r = {"beta_img": "r_img", "beta_vid": "r_vid"}[beta]
    assert (getattr(go(), r) > getattr(before, r)).all()


def test_draws_fill_their_ranges():
    cfg = Objective(w_min=5., w_max=15., k=20)
    d = draw(cfg, (4096, 1, 1, 1, 1), make_gen(0))
    assert 5 <= d.w.min() < 5.05 and 14.95 < d.w.max() <= 15 and abs(d.w.mean() - 10) < .2
    assert d.index.unique().tolist() == list(range(1000 // 20))
    assert abs(d.noise.mean()) < .06 and abs(d.noise.std() - 1) < .04
    assert torch.equal(d.noise, draw(cfg, (4096, 1, 1, 1, 1), make_gen(0)).noise)
