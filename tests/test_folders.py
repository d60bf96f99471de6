"Folders of every kind: what they are taken for, what is refused, and one step of the recipe on each"
import json
import re
import shutil

import pytest
import torch
from diffusers import UNet3DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from t2v_turbo.core import UserError, make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.schedule import Schedule
from t2v_turbo.solver import DDIM
from t2v_turbo.student import Student, load_student
from t2v_turbo.teachers import folders
from t2v_turbo.teachers.folders import ScaledSchedule, load_teacher, tiny_modelscope
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.teachers.videocrafter2 import (convert_videocrafter2, tiny_videocrafter2, vc2_scheduler,
                                              x0_scale)

SMALL = dict(size=(16, 24), frames=3)


@pytest.fixture(scope='session')
def ms(tmp_path_factory): return tiny_modelscope(tmp_path_factory.mktemp('t')/'ms')


@pytest.fixture(scope='session')
def vc2(tmp_path_factory):
    at = tmp_path_factory.mktemp('t')
    torch.save(dict(state_dict=tiny_videocrafter2()), at/'model.ckpt')
    (at/'merges.txt').write_text('#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n')
    return convert_videocrafter2(at/'model.ckpt', at/'vc2', 16, at/'merges.txt')


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def test_modelscope(ms):
    t = load_teacher(ms)
    assert t.video_shape == (3, 16, 32, 32) and t.latent_shape == (4, 16, 4, 4)
    assert (t.fps, t.prediction_type, t.options) == (8, 'epsilon', {})
    assert isinstance(t.denoiser, UNet3DConditionModel) and not t.denoiser.training
    assert not t.denoiser.time_embedding.cond_proj.weight.any()
    assert t.tokenizer.pad_token_id == t.tokenizer.eos_token_id and t.tokenizer.model_max_length == 77
    stock = UNet3DConditionModel.from_pretrained(ms/'unet').eval()
    gen = make_gen(0)
    x, ctx, time = torch.randn(2, *t.latent_shape, generator=gen), t.encode_text(['a', 'b']), torch.tensor([19, 999])
    assert ctx.shape == (2, 77, 32)
    with torch.no_grad(): want, (_, eps) = stock(x, time, ctx).sample, t.denoise(x, time, ctx)
    torch.testing.assert_close(eps, want)
    frames = torch.rand(1, 3, 2, 32, 32, generator=gen)
    with torch.no_grad(): latent = t.vae.encode(frames[:, :, 1]*2 - 1).latent_dist.mean*.18215
    torch.testing.assert_close(t.encode(frames)[:, :, 1], latent)
    same = load_teacher(ms)
    assert same.fingerprint() == t.fingerprint()
    assert tiny_modelscope(ms.parent/'other', 1) and load_teacher(ms.parent/'other').fingerprint() != t.fingerprint()


def test_published_names_of_the_tokenizer_are_read(ms, tmp_path):
    "The published folder has vocab.json and merges.txt, newer ones tokenizer.json"
    folder = copy(ms, tmp_path/'ms')
    one = json.loads((folder/'tokenizer/tokenizer.json').read_text())['model']
    (folder/'tokenizer/tokenizer.json').unlink()
    (folder/'tokenizer/vocab.json').write_text(json.dumps(one['vocab']))
    (folder/'tokenizer/merges.txt').write_text('#version: 0.2\n')
    config = json.loads((folder/'tokenizer/tokenizer_config.json').read_text())
    config.pop('model_max_length')                      # then it would be 10**30
    (folder/'tokenizer/tokenizer_config.json').write_text(json.dumps(config))
    a, b = load_teacher(folder), load_teacher(ms)
    torch.testing.assert_close(a.encode_text(['ab']), b.encode_text(['ab']))


def test_videocrafter2_and_its_frame_rate(vc2):
    bias = lambda t: t.denoiser.time_embedding.linear_2.bias
    own, at16, at8 = (load_teacher(vc2, **SMALL, **k) for k in ({}, dict(fps=16), dict(fps=8)))
    assert own.fps == 16 and own.video_shape == (3, 3, 16, 24) and at8.fps == 8
    assert torch.equal(bias(own), bias(at16)) and not torch.equal(bias(own), bias(at8))
    assert at8.options == dict(SMALL, fps=8)
    assert load_teacher(vc2, frames=1).video_shape == (3, 1, 320, 512)
    with pytest.raises(UserError, match='nearest is 8'): load_teacher(vc2, fps=8.4)
    with pytest.raises(UserError, match='nearest is 1'): load_teacher(vc2, fps=0)


def test_fps_without_its_file_is_refused(vc2, tmp_path):
    folder = copy(vc2, tmp_path/'vc2')
    (folder/'fps_embedding.safetensors').unlink()
    with pytest.raises(UserError, match='frame rate cannot be changed'): load_teacher(folder, fps=8)
    assert load_teacher(folder, **SMALL).fps == 16


@pytest.mark.parametrize('more, words', [
    (dict(size=(30, 32)), 'nearest is 32x32'), (dict(size=(32, 3)), 'nearest is 32x8'),
    (dict(size=(32,)), 'height and width'), (dict(frames=0), 'nearest is 1'), (dict(frames=2.6), 'nearest is 3'),
    (dict(fps=-1), 'nearest is 1'), (dict(scale_x0=True), 'VideoCrafter2 only')])
def test_what_modelscope_cannot_take(ms, more, words):
    with pytest.raises(UserError, match=words): load_teacher(ms, **more)


@pytest.mark.parametrize('more', [dict(frames=9), dict(size=(64, 64)), dict(fps=7)])
def test_what_the_tiny_teacher_cannot_take(more):
    with pytest.raises(UserError, match='is not possible'): load_teacher('tiny', **more)
    assert load_teacher('tiny', frames=8, size=[32, 32], fps=8).video_shape == (3, 8, 32, 32)


def test_a_tiny_teacher_without_all_its_tensors(tmp_path):
    "Not filled up with random ones"
    at = tmp_path/'t'
    shutil.copytree(WEIGHTS/'tiny', at)
    file, = (at/'denoiser').glob('*.safetensors')
    held = load_file(file)
    gone = sorted(held)[0]
    save_file({k: v for k, v in held.items() if k != gone}, file, dict(format='pt'))
    with pytest.raises(UserError, match=f'does not have the tensors of a TinyVideoDenoiser: 1 missing .{re.escape(gone)}.'): load_teacher(at)


def test_what_is_no_teacher(ms, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='not a diffusers model'): load_teacher(tmp_path)
    (tmp_path/'model.ckpt').touch()
    with pytest.raises(UserError, match='convert videocrafter2'): load_teacher(tmp_path/'model.ckpt')
    with pytest.raises(UserError, match="no folder 'no-such'"): load_teacher('no-such')
    other = copy(ms, tmp_path/'other')
    config = json.loads((other/'unet/config.json').read_text())
    (other/'unet/config.json').write_text(json.dumps(config | dict(_class_name='UNet2DModel')))
    with pytest.raises(UserError, match='holds a UNet2DModel'): load_teacher(other)
    for part in ('vae', 'text_encoder', 'tokenizer', 'scheduler'):
        folder = copy(ms, tmp_path/part)
        shutil.rmtree(folder/part)
        with pytest.raises(UserError, match=f'has no {part}/'): load_teacher(folder)


def test_pickles_and_broken_files_are_refused(ms, tmp_path):
    folder = copy(ms, tmp_path/'bin')
    file = folder/'unet/diffusion_pytorch_model.safetensors'
    torch.save(load_file(file), file.with_suffix('.bin'))
    file.unlink()
    with pytest.raises(UserError, match='cannot be loaded as a UNet3DConditionModel'): load_teacher(folder)
    folder = copy(ms, tmp_path/'cut')
    file = folder/'vae/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match='cannot be loaded as a AutoencoderKL'): load_teacher(folder)


def test_hub_id(ms, monkeypatch):
    "From the hub come configurations and safetensors only; what cannot be had is one sentence"
    asked = []
    def fetch(name, **more):
        asked.append((name, more))
        if name == 'some/model': return str(ms)
        raise LocalEntryNotFoundError('offline')
    monkeypatch.setattr(folders, 'snapshot_download', fetch)
    t = load_teacher('some/model')
    assert t.name == 'some/model' and t.latent_shape == (4, 16, 4, 4)
    assert asked[0][1]['allow_patterns'] == ['*.json', '*.txt', '*.model', '*.safetensors']
    with pytest.raises(UserError, match='LocalEntryNotFoundError'): load_teacher('some/other')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['ms', 'vc2', 'tiny'])
def test_half_precision(name, dtype, request):
    "Weights in half, latents and predictions in single precision, and about the same numbers"
    at = name if name == 'tiny' else request.getfixturevalue(name)
    more = SMALL if name == 'vc2' else {}
    half, full = load_teacher(at, dtype=dtype, **more), load_teacher(at, **more)
    assert {p.dtype for p in half.vae.parameters()} == {dtype} and half.denoiser.dtype == dtype
    gen = make_gen(0)
    clip, t = torch.rand(1, *half.video_shape, generator=gen), torch.tensor([499])
    got, want = [], []
    for model, out in ((half, got), (full, want)):
        with torch.no_grad():
            z, ctx = model.encode(clip), model.encode_text(['a red circle'])
            zt = model.schedule.add_noise(want[0] if want else z, torch.ones_like(z), t)
            out += [z, ctx, *model.denoise(zt, t, ctx), model.decode(z)]
    assert {v.dtype for i, v in enumerate(got) if i != 1} == {torch.float32}
    for i, (a, b) in enumerate(zip(got, want)):
        if i in (2, 3): continue                       # their inputs differ
        assert (a.float() - b).norm()/b.norm() < .05, i


def test_scaled_schedule(vc2):
    on, off = (load_teacher(vc2, scale_x0=v, **SMALL) for v in (True, False))
    assert type(off.schedule) is Schedule and on.options['scale_x0'] is True and 'scale_x0' not in off.options
    s, t = x0_scale(), torch.tensor([0, 199, 399, 999])
    z, e = torch.ones(4, 1), torch.zeros(4, 1)
    torch.testing.assert_close((on.schedule.add_noise(z, e, t)/off.schedule.add_noise(z, e, t))[:, 0], s[t])
    noise = torch.randn(4, 1, generator=make_gen(0))
    zt = on.schedule.add_noise(z, noise, t)
    torch.testing.assert_close(on.schedule.x0_from_eps(zt, noise, t), z, rtol=1e-3, atol=1e-3)
    moved = on.schedule.to('cpu')
    assert isinstance(moved, ScaledSchedule) and torch.equal(moved.scale, s) and len(moved) == 1000
    abar = vc2_scheduler().alphas_cumprod
    x0, eps = torch.full((1, 1), 2.), torch.full((1, 1), 3.)
    got = DDIM(on.schedule, 50).step(x0, eps, torch.tensor([30]))       # from 619 to 599
    torch.testing.assert_close(got, abar[599].sqrt()*.7*x0 + (1 - abar[599]).sqrt()*eps)


@pytest.mark.parametrize('name', ['ms', 'vc2'])
def test_one_step_of_the_recipe_and_a_saved_student(name, request, tmp_path):
    "Distillation runs on a UNet teacher as on any; the student comes back with the same options"
    at = request.getfixturevalue(name)
    options = dict(size=(16, 24), frames=3, fps=8) if name == 'vc2' else dict(frames=3)
    teacher = load_teacher(at, **options)
    student = Student(teacher, rank=2)
    cfg = Objective(beta_img=0, beta_vid=0, image_frames=1, video_frames=1)
    model, gen = Distillation(student, cfg), make_gen(0)
    ctx, null = teacher.encode_text(['a', 'b']), teacher.encode_text(['', ''])
    z0 = torch.randn(2, *teacher.latent_shape, generator=gen)
    d = draw(cfg, z0.shape, gen)
    params = student.trainable()
    opt = torch.optim.AdamW(params.values(), 1e-2)
    before = {n: p.detach().clone() for n, p in params.items()}
    losses = []
    for _ in range(3):
        out = model(z0, ctx, null, ['a', 'b'], d)
        out.loss.mean().backward()
        losses.append(out.loss.mean().item())
        assert all(p.grad is not None for p in params.values())
        opt.step(); opt.zero_grad()
    assert all(0 < v < 10 for v in losses) and any('cond_proj' in n for n in params)
    assert all(not torch.equal(before[n], p) for n, p in params.items() if 'lora_B' in n)
    student.save(tmp_path/'s')
    assert json.loads((tmp_path/'s/student.json').read_text())['options'] == json.loads(json.dumps(options))
    again = load_student(tmp_path/'s')
    assert again.teacher.video_shape == teacher.video_shape and again.teacher.fps == teacher.fps
    t, w = torch.tensor([999, 19]), torch.tensor([4., 7.5])
    with torch.no_grad():
        torch.testing.assert_close(again(z0, t, ctx, w), student(z0, t, ctx, w))


@pytest.mark.parametrize('part, cls', [('unet', 'UNet3DConditionModel'), ('vae', 'AutoencoderKL'), ('text_encoder', 'CLIPTextModel')])
def test_a_part_that_is_not_whole_is_refused(ms, tmp_path, part, cls):
    "The libraries would fill a missing tensor with random numbers; each difference is counted and named"
    folder = copy(ms, tmp_path/'ms')
    file = next((folder/part).glob('*.safetensors'))
    state = load_file(file)
    gone, odd = sorted(state)[2:4]
    shape = tuple(state.pop(gone).shape), tuple(state[odd].shape)
    save_file(state | {odd: torch.zeros(*shape[1], 1), 'extra.bias': torch.zeros(1)}, file, metadata={'format': 'pt'})
    with pytest.raises(UserError) as e: load_teacher(folder)
    assert (f"of a {cls}: 1 missing ({gone}), 1 unknown (extra.bias), 1 of another shape ({odd} is {(*shape[1], 1)}, not "
            f"{shape[1]})") in str(e.value)


def test_folders_of_older_versions_are_whole(ms, tmp_path):
    "ModelScopeT2V as published: older names in the VAE's attention, a buffer and a prefix in the text encoder"
    folder, names = copy(ms, tmp_path/'ms'), dict(to_q='query', to_k='key', to_v='value', to_out='proj_attn')
    file = folder/'vae/diffusion_pytorch_model.safetensors'
    def old(k):
        for a, b in names.items(): k = k.replace(f'attentions.0.{a}', f'attentions.0.{b}')
        return k.replace('proj_attn.0', 'proj_attn')
    state = {old(k): v for k, v in load_file(file).items()}
    assert any('proj_attn.weight' in k for k in state)
    save_file(state, file, metadata={'format': 'pt'})
    file = folder/'text_encoder/model.safetensors'
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(state | {'text_model.embeddings.position_ids': torch.arange(77)[None]}, file, metadata={'format': 'pt'})
    a, b = load_teacher(folder), load_teacher(ms)
    for n in ('vae', 'text_encoder'):
        for (k, v), w in zip(getattr(a, n).state_dict().items(), getattr(b, n).state_dict().values()): assert torch.equal(v, w), k
