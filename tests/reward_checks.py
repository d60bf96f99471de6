"What every reward must do, and small random rewards to try it on"
import math
import warnings
from functools import partial

import torch
import transformers
from torch import nn

from t2v_turbo import standins, weights
from t2v_turbo.core import make_gen
from t2v_turbo.rewards import clip, loading, tiny, viclip
from t2v_turbo.rewards import imagereward as ir
from t2v_turbo.rewards import internvideo2 as iv2
from t2v_turbo.rewards import videoprism as prism
from t2v_turbo.text import clip_tokenizer

MERGES = [("p", "a"), ("pa", "n"), ("d", "a</w>"), ("pan", "da</w>"), ("a", "n"), ("r", "e")]
WORDS = "a red panda dog blue cat".split()
PROMPTS = ["a red panda", "a dog", "blue cat"]


class Bert:
    "A word tokenizer with BERT's marks: padding 0, begin 2, end 3"
    pad_token_id, model_max_length = 0, 40

    def __call__(self, prompts, truncation, max_length=40, padding=None, return_tensors=None):
        ids = [[2, *(5 + WORDS.index(w) for w in p.split()), 3] for p in prompts]
        if not truncation: return dict(input_ids=ids)
        return dict(input_ids=torch.tensor([(i[:max_length] + [0]*max_length)[:max_length] for i in ids]))

    def decode(self, ids, skip_special_tokens): return " ".join(WORDS[i - 5] for i in ids if i > 4)


class Prism(Bert):
    model_max_length = 64


def clip_reward(fit): return lambda: clip.CLIPReward(
    clip.HPS, standins.tiny_clip(), clip_tokenizer(MERGES, 520), getattr(clip, fit))


def aesthetic():
    torch.manual_seed(3)
    return clip.AestheticReward(clip.AESTHETIC, standins.tiny_clip(), nn.Linear(24, 1))


def imagereward():
    "Built from its published layout, as the loader does"
    state = standins.tiny_imagereward()
    net = ir.ImageReward(ir.IMAGEREWARD, *ir.imagereward_sizes(state, 2), Bert())
    net.head = loading.linear_head({k[4:]: state.pop(k) for k in list(state) if k[:4] == "mlp."}, "x")
    own = {f"head.{k}": v for k, v in net.head.state_dict().items()}
    table = ir.imagereward_table(net) | {k: [k] for k in own}
    return weights.fill(net, weights.convert(state | own, table, net, "ImageReward"))


def viclip_reward(): return viclip.viclip_model(
    standins.tiny_viclip(), tokenizer=clip_tokenizer(MERGES, 520, 32), heads=(2, 2))


def internvideo2(): return iv2.internvideo2_model(standins.tiny_internvideo2(), tokenizer=Bert(), **standins.TINY)




def videoprism(save_memory=False):
    return prism.VideoPrism(prism.PRISM_L, standins.tiny_videoprism(), Prism(), save_memory)


IMAGE = dict(hpsv2=clip_reward("letterbox"), clipscore=clip_reward("squash"),
             crop=clip_reward("crop"), aesthetic=aesthetic, imagereward=imagereward)
VIDEO = dict(viclip=viclip_reward, internvideo2=internvideo2) | (
    dict(videoprism=videoprism) if hasattr(transformers, "VideoPrismClipModel") else {})      # in transformers since 5.13
TINY = {name: partial(tiny.load_reward, name) for name in tiny.REWARD_KINDS}     # the shipped weights
ALL = IMAGE | VIDEO | TINY


def build(name, dtype=torch.float32): return ALL[name]().frozen(dtype)


def clips(rm, b=2, size=(40, 52), dtype=torch.float32, seed=0, t=None):
    "Smooth random clips away from 0 and 1, whose frames differ"
    t = t or (rm.facts.frames if rm.facts.frames > 1 else 3)
    x = torch.rand(b, 3, t, 5, 6, generator=make_gen(seed), dtype=dtype)
    x = nn.functional.interpolate(x, (t, *size), mode="trilinear")
    return .1 + .8*(x - x.amin()) / (x.amax() - x.amin())


def finite_difference(rm, h=1e-5, rtol=1e-5):
    "Along random directions, through the preprocessing; each clip's score moves with its own pixels"
    x = clips(rm, dtype=torch.float64).requires_grad_()
    for seed in range(3):
        u = torch.randn(x.shape, dtype=x.dtype, generator=make_gen(seed + 1))
        g, = torch.autograd.grad(rm(x, PROMPTS[:2]).sum(), x)
        with torch.no_grad():
            slope = (rm(x + h*u, PROMPTS[:2]) - rm(x - h*u, PROMPTS[:2])) / (2*h)
        torch.testing.assert_close(slope, (g*u).sum((1, 2, 3, 4)), rtol=rtol, atol=1e-8)
        assert slope.abs().min() > 1e-6, "a gradient of nothing would pass too"


@torch.no_grad()
def batch_equals_single(rm):
    x = clips(rm, 3)
    alone = torch.cat([rm(x[i:i + 1], [p]) for i, p in enumerate(PROMPTS)])
    rm._apply(lambda p: p)                    # forget the texts, so that they are read as a batch
    torch.testing.assert_close(rm(x, PROMPTS), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def nan_stays_with_its_clip(rm):
    x = clips(rm)
    x[0, 0, 0] = math.nan
    R = rm(x, PROMPTS[:2])
    assert R[0].isnan() and R[1].isfinite()


def a_prompt_is_read_once(rm):
    "Gives what has been read, so that a test can go on counting"
    seen, x = texts_read(rm), clips(rm, 3)
    for prompts in (["a dog", "a dog", "a cat"], ["a cat"]*3, ["a dog"]*3): rm(x, prompts)
    assert len(seen) == 2
    assert not rm.text_features(["a dog"]).requires_grad
    return seen


def texts_read(rm):
    "The prompts that go through the text tower from now on"
    inner, seen = rm.text, []
    def text(ids):
        seen.extend(ids.tolist())
        return inner(ids)
    rm.text = text
    return seen


def saved_bytes(rm, x, prompts):
    "What autograd keeps of activations, counted once per storage, and the gradient"
    kept = {}
    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    mine = {p.untyped_storage().data_ptr() for p in rm.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): R = rm(x, prompts).sum()
    n = sum(v for k, v in kept.items() if k not in mine)
    return n, torch.autograd.grad(R, x)[0]


def warned(f):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        f()
    return [str(w.message) for w in told if "it was cut to" in str(w.message)]
