"Parity with numbers recorded from the published implementations; sizes are read from the files"
import json, os, re
from inspect import signature
from pathlib import Path
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from t2v_turbo.consistency import (boundary, consistency_fn, few_step_grid, few_step_sample,
                                   pseudo_huber, w_embedding)
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import DDIM, ddim_grid
from t2v_turbo.teachers import videocrafter2 as vc2

FOLDER = Path(os.environ.get('T2V_TURBO_GOLDEN',
                             Path(__file__).resolve().parents[2]/'shared/golden'))
SUFFIXES = '.safetensors', '.pt'
FILES = sorted(p for p in FOLDER.iterdir() if p.suffix in SUFFIXES) if FOLDER.is_dir() else []


def near(got, want, atol=1e-5):
    "Largest absolute difference at most `atol`, compared in float64"
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


def check_schedule(d):
    near(vp_abar(T=len(d['alphas_cumprod'])), d['alphas_cumprod'])


def check_guidance(d):
    for key in [k for k in d if k.startswith('guidance.emb')]:
        near(w_embedding(d['guidance.w'], dim=int(key.removeprefix('guidance.emb'))), d[key])


def check_boundary(d):
    c_skip, c_out = boundary(d['boundary.t'])
    near(c_skip, d['boundary.c_skip'])
    near(c_out, d['boundary.c_out'])


def check_huber(d):
    for key in [k for k in d if k.startswith('huber.loss_c')]:
        c = float(key.removeprefix('huber.loss_c'))
        near(pseudo_huber(d['huber.pred'], d['huber.target'], c=c).mean(), d[key])


def check_x0eps(d):
    sched, z, out, t = Schedule(d['alphas_cumprod']), *(d[f'x0eps.{k}'] for k in ('z', 'eps', 't'))
    x0, eps = sched.x0_eps(z, out, t, 'epsilon')
    near(x0, d['x0eps.x0_from_eps'])
    near(eps, out)
    x0, eps = sched.x0_eps(z, out, t, 'v_prediction')
    near(x0, d['x0eps.x0_from_v'])
    near(eps, d['x0eps.eps_from_v'])


def check_ddim(d, n):
    p, ddim = f'ddim{n}.', DDIM(Schedule(d['alphas_cumprod']), n)
    assert ddim_grid(n, len(d['alphas_cumprod'])).tolist() == d[p+'timesteps'].tolist()
    near(ddim.step(d[p+'x0'], d[p+'eps'], d[p+'index']), d[p+'x_prev'])
    near(ddim.invert(d[p+'rev_in'], d[p+'eps'], d[p+'rev_t']), d[p+'rev_out'])


CORE = dict(alphas_cumprod=check_schedule, guidance=check_guidance, boundary=check_boundary,
            huber=check_huber, x0eps=check_x0eps)


def core_parts(path):
    "One test per group of keys; a group we do not know must not pass unseen"
    d = load_file(path)
    for group in sorted({k.split('.')[0] for k in d}):
        n = re.fullmatch(r'ddim(\d+)', group)
        check = (lambda d, n=int(n[1]): check_ddim(d, n)) if n else CORE.get(group)
        yield group, (lambda check=check: check(d)) if check else None


def scheduler_parts(path):
    "One test per trajectory: same timesteps, same latents at every stage"
    with safe_open(path, 'pt') as f: formula = (f.metadata() or {}).get('model')
    m = re.fullmatch(r'eps = ([\d.]+) \* z \+ ([\d.]+) \* cos\(t/(\d+)\)', formula or '')
    assert m, f'{path.name}: unknown model formula {formula!r}'
    a, b, c = map(float, m.groups())
    d, sched = load_file(path), Schedule(vp_abar())

    def f(z, t):
        eps = a*z + b*torch.cos(t.view(-1, *[1]*(z.ndim-1))/c)
        return consistency_fn(z, sched.x0_from_eps(z, eps, t), t)

    def check(origin, n):
        p = f'o{origin}.n{n}.'
        steps = few_step_grid(n, origin)
        assert steps == d[p+'timesteps'].tolist()
        noise = lambda i: d[f'{p}noise{i}']
        for i, (t, x, z) in enumerate(few_step_sample(f, d[p+'z_init'], steps, sched, noise)):
            near(x, d[f'{p}denoised{i}'])
            if i < n-1: near(z, d[f'{p}z{i}'])  # the last z is never used: the sample is `denoised`
        assert i == n-1

    for key in sorted(k for k in d if k.endswith('.timesteps')):
        o, n = map(int, re.fullmatch(r'o(\d+)\.n(\d+)\.timesteps', key).groups())
        yield f'o{o}.n{n}', lambda o=o, n=n: check(o, n)


def read(path, prefix):
    "All tensors, those under `prefix` without it, and the metadata with its JSON read"
    with safe_open(path, 'pt') as f: meta = f.metadata() or {}
    d = load_file(path)
    state = {k.removeprefix(prefix): v for k, v in d.items() if k.startswith(prefix)}
    return d, state, {k: json.loads(v) if v[:1] in '{[' else v for k, v in meta.items()}


def close(got, want): assert (got - want).norm()/want.norm() < 1e-4


def vc2_unet_parts(path):
    "The converted UNet; and that the LoRA list has the layers and shapes that our order says"
    d, state, meta = read(path, 'unet.')

    @torch.no_grad()
    def plain():
        fps, cfg = d['io.fps'].flatten(), meta['config']
        assert (fps == fps[0]).all()
        config, new = vc2.unet_from_vc2(state, fps[0].item())
        got = [config[k] for k in ('block_out_channels', 'layers_per_block', 'attention_head_dim',
                                   'cross_attention_dim', 'time_cond_proj_dim')]
        assert got == [[cfg['model_channels']*m for m in cfg['channel_mult']],
                       cfg['num_res_blocks'], cfg['num_head_channels'], cfg['context_dim'], None]
        unet = UNet3DConditionModel.from_config(config).eval()
        unet.load_state_dict(new)
        close(unet(d['io.x'], d['io.t'], d['io.context']).sample, d['io.out'])

    def lora_layout():
        student = state | {'time_cond_proj.weight': d['student.time_cond_proj.weight']}
        config, _ = vc2.unet_from_vc2(student)
        assert config['time_cond_proj_dim'] == student['time_cond_proj.weight'].shape[1]
        lora = torch.load(FOLDER/meta['lora_file'], weights_only=True)
        layers = vc2.vc2_lora_layers(config)
        assert len(lora) == 2*len(layers)
        for up, down, name in zip(lora[::2], lora[1::2], layers):
            assert (up.shape[0], *down.shape[1:]) == tuple(student[f'{name}.weight'].shape), name

    yield 'plain', plain
    yield 'lora_layout', lora_layout


def vc2_vae_parts(path):
    "The converted VAE: moments and decoded frames"
    d, state, meta = read(path, 'first_stage_model.')

    @torch.no_grad()
    def check():
        config, new = vc2.vae_from_vc2(state)
        cfg = meta['ddconfig']
        got = [config[k] for k in ('block_out_channels', 'layers_per_block', 'latent_channels')]
        assert got == [[cfg['ch']*m for m in cfg['ch_mult']], cfg['num_res_blocks'],
                       cfg['z_channels']]
        vae = AutoencoderKL.from_config(config).eval()
        vae.load_state_dict(new)
        close(vae.encode(d['io.image']).latent_dist.parameters, d['io.moments'])
        close(vae.decode(d['io.latent']).sample, d['io.decoded'])

    yield 'moments_and_frames', check


def vc2_text_parts(path):
    "The converted text tower, and the token ids of its tokenizer"
    d, state, meta = read(path, 'cond_stage_model.model.')

    @torch.no_grad()
    def embeddings():
        cfg = meta['config']['text_cfg']
        config, new = vc2.text_from_vc2(state, heads=cfg['heads'])
        assert config['num_hidden_layers'] == cfg['layers'] - 1
        text = CLIPTextModel(CLIPTextConfig(**config)).eval()
        text.load_state_dict(new)
        near(text(d['io.input_ids']).last_hidden_state, d['io.prompt_embeds'])

    def token_ids(clip_vocabulary, tmp_path):
        words, length = len(state['token_embedding.weight']), d['io.input_ids'].shape[1]
        vc2.clip_tokenizer(vc2.read_merges(clip_vocabulary), words, length).save_pretrained(tmp_path)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
        ids = tokenizer(meta['prompts'], padding='max_length', truncation=True, return_tensors='pt')
        assert torch.equal(ids.input_ids, d['io.input_ids'])
        assert tokenizer('wow!').input_ids[-2] == 256 and tokenizer.pad_token_id == 0

    yield 'embeddings', embeddings
    yield 'token_ids', token_ids


PARTS = dict(core=core_parts, scheduler=scheduler_parts, vc2_unet=vc2_unet_parts,
             vc2_vae=vc2_vae_parts, vc2_text=vc2_text_parts)


def prefix(path): return next((k for k in PARTS if path.name.startswith(k + '_')
                               and path.suffix == '.safetensors'), None)


CASES = [pytest.param(check, id=f'{p.name}:{name}') for p in FILES if prefix(p)
         for name, check in PARTS[prefix(p)](p)]
NOT_COVERED = [p.name for p in FILES if not prefix(p)]


@pytest.mark.skipif(not FILES, reason=f'no recorded numbers in {FOLDER}; set T2V_TURBO_GOLDEN')
def test_folder_is_read():
    "Every file with a known prefix gives at least one test"
    names = {c.id.split(':')[0] for c in CASES}
    assert names == {p.name for p in FILES if prefix(p)}


@pytest.mark.parametrize('check', CASES)
def test_parity(check, request):
    "Our numbers are the recorded ones"
    assert check is not None, 'this group of keys has no check'
    check(**{k: request.getfixturevalue(k) for k in signature(check).parameters
             if k in ('clip_vocabulary', 'tmp_path')})


@pytest.mark.parametrize('name', NOT_COVERED)
def test_not_yet_covered(name):
    "Files of parts that are not written yet are named, not hidden"
    pytest.skip(f'not yet covered: {name}')
