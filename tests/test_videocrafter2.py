"VideoCrafter2: round trips, and what the conversion refuses; recorded numbers: test_golden.py"
import gzip
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from t2v_turbo import standins, text
from t2v_turbo.files import UserError
from t2v_turbo.teachers import videocrafter2 as vc2
from t2v_turbo.weights import published, wanted

TOY = "#version: toy\np a\npa n\nd a</w>\npan da</w>\na n\nr e\n"


def split(state):
    "The parts of a checkpoint by name, without prefix"
    return {p: {k.removeprefix(pre): v for k, v in state.items() if k.startswith(pre)}
            for p, pre in vc2.PREFIXES.items()}


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path/"merges.txt"
    path.write_text(TOY)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    "Write a state dict as the published file nests it"
    def write(state, name="model.ckpt", **other):
        torch.save(dict(state_dict=state, **other), tmp_path/name)
        return tmp_path/name
    return write


# --- names ---------------------------------------------------------------------------------------

def test_full_size_names():
    "The published sizes: every layer of the stock UNet is hit once, 575 of them in a LoRA list"
    with torch.device("meta"): unet = UNet3DConditionModel(time_cond_proj_dim=256)
    layers = vc2.vc2_layers(unet.config, fps=False)
    ours = {k.rpartition(".")[0] for k in unet.state_dict()}
    assert sorted(map(vc2.vc2_to_diffusers, layers)) == sorted(ours)
    assert len(vc2.vc2_lora_layers(unet.config)) == 575
    assert vc2.vc2_layers(unet.config)[2:5] == ["fps_embedding.0", "fps_embedding.2",
                                                "time_cond_proj"]
    assert vc2.vc2_to_diffusers("output_blocks.2.1.conv.weight") == \
        "up_blocks.0.upsamplers.0.conv.weight"


def test_full_size_configs_are_read_from_shapes():
    "The published shapes, without memory, give the published sizes"
    with torch.device("meta"):
        unet, vae = UNet3DConditionModel(), AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=4,
            down_block_types=["DownEncoderBlock2D"]*4, up_block_types=["UpDecoderBlock2D"]*4,
            layers_per_block=2)
    for model, table, read_config in ((unet, vc2.unet_table, vc2.unet_config),
                                      (vae, vc2.vae_table, vc2.vae_config)):
        shapes = wanted(table(model, {}), model)
        state = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
        got = read_config(state)
        for k in ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types"):
            assert list(got[k]) == list(model.config[k]) if k != "layers_per_block" \
                else got[k] == model.config[k]
        assert len(shapes) == len(model.state_dict())
    assert vc2.unet_config({k: torch.empty(s, device="meta") for k, s in wanted(
        vc2.unet_table(unet, {}), unet).items()})["attention_head_dim"] == 64


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 64, 96)])
def test_unet_round_trip(layers, widths):
    "A random stock UNet under the published names comes back unchanged"
    n = len(widths)
    config = dict(block_out_channels=widths, layers_per_block=layers, cross_attention_dim=24,
                  attention_head_dim=8, time_cond_proj_dim=16,
                  down_block_types=["CrossAttnDownBlock3D"] + ["DownBlock3D"]*(n - 1),
                  up_block_types=["UpBlock3D"]*(n - 1) + ["CrossAttnUpBlock3D"])
    unet = UNet3DConditionModel(**config)
    before = unet.state_dict()
    got, after = vc2.unet_from_vc2(published(unet, vc2.unet_table(unet, {})))
    assert set(after) == set(before)
    for k, v in before.items(): assert torch.equal(after[k], v)
    for k in config: assert got[k] == (list(config[k]) if isinstance(config[k], tuple) else config[k])


# --- the whole conversion ------------------------------------------------------------------------

def test_checkpoint_to_pipeline(checkpoint, vocabulary, tmp_path, capsys):
    state = standins.tiny_videocrafter2(seed=1)
    out = vc2.convert_videocrafter2(checkpoint(state, global_step=7), tmp_path/"new/out",
                                    vocabulary=vocabulary)
    printed, bar = capsys.readouterr()
    for k in ("13 schedule buffers", "betas", "posterior_mean_coef2", "scale_arr"): assert k in printed
    assert "convert: 100%" in bar and "/12.5M" in bar and "text_encoder" in bar     # bytes, part by part
    assert not list(out.parent.glob(".tmp*")) and not list(out.rglob("*.bin"))
    parts = split(state)
    for p, cls, convert in (("unet", UNet3DConditionModel, vc2.unet_from_vc2),
                            ("vae", AutoencoderKL, vc2.vae_from_vc2),
                            ("text_encoder", CLIPTextModel, vc2.text_from_vc2)):
        have, want = cls.from_pretrained(out/p).state_dict(), convert(parts[p])[1]
        assert set(have) == set(want)
        for k, v in want.items(): assert torch.equal(have[k], v), k
    text = parts["text_encoder"]["transformer.resblocks.0.attn.in_proj_weight"]
    layer = CLIPTextModel.from_pretrained(out/"text_encoder").state_dict()
    rows = [v for k, v in layer.items() if "layers.0.self_attn.k_proj.weight" in k][0]
    assert torch.equal(rows, text[64:128])
    pipe = TextToVideoSDPipeline.from_pretrained(out)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.tokenizer.pad_token_id == 0
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a panda", height=16, width=16, num_frames=3, num_inference_steps=2,
                  output_type="pt", generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape[:2] == (1, 3) and frames.isfinite().all()


def test_schedule_is_the_published_one():
    s, want = vc2.vc2_scheduler(), standins.tiny_videocrafter2()["alphas_cumprod"]
    torch.testing.assert_close(s.alphas_cumprod, want, atol=1e-6, rtol=0)
    assert s.config.prediction_type == "epsilon"


@torch.no_grad()
def test_fps_can_be_chosen_again(checkpoint, vocabulary, tmp_path):
    "Folding 8 at once, or 16 first and 8 afterwards, is the same bias to the last bit"
    path = checkpoint(standins.tiny_videocrafter2())
    a, b = (vc2.convert_videocrafter2(path, tmp_path/str(fps), fps, vocabulary) for fps in (8, 16))
    at8, at16 = (UNet3DConditionModel.from_pretrained(p/"unet") for p in (a, b))
    bias = lambda net: net.time_embedding.linear_2.bias
    assert not torch.equal(bias(at8), bias(at16))
    assert torch.equal(bias(vc2.set_fps(at16, b, 8)), bias(at8))
    with pytest.raises(UserError, match="nearest is 1"): vc2.set_fps(at16, b, 0)
    with pytest.raises(UserError, match="fps_embedding.safetensors"): vc2.set_fps(at16, tmp_path, 8)


def test_checkpoint_without_fps(checkpoint, vocabulary, tmp_path):
    "An older checkpoint has no fps embedding: nothing is folded and no file promises a choice"
    state = {k: v for k, v in standins.tiny_videocrafter2().items() if "fps_embedding" not in k}
    out = vc2.convert_videocrafter2(checkpoint(state), tmp_path/"out", vocabulary=vocabulary)
    assert not (out/"fps_embedding.safetensors").exists()
    bias = UNet3DConditionModel.from_pretrained(out/"unet").time_embedding.linear_2.bias
    assert torch.equal(bias, state["model.diffusion_model.time_embed.2.bias"])


def test_legacy_file_format(vocabulary, tmp_path):
    "A file from before the zip format cannot be mapped into memory, but it is read"
    path = tmp_path/"old.ckpt"
    torch.save(dict(state_dict=standins.tiny_videocrafter2()), path, _use_new_zipfile_serialization=False)
    out = vc2.convert_videocrafter2(path, tmp_path/"out", vocabulary=vocabulary)
    assert (out/"unet/config.json").is_file()


# --- what is refused -----------------------------------------------------------------------------

U, V, T = vc2.PREFIXES.values()


def refused(state, checkpoint, vocabulary, tmp_path, **k):
    "The one sentence with which a checkpoint is refused; nothing is left behind"
    path = checkpoint(state, **k)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as e:
        vc2.convert_videocrafter2(path, tmp_path/"out", vocabulary=vocabulary)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(e.value) and len(str(e.value)) < 1500
    return str(e.value)


@pytest.mark.parametrize("name", [
    U + "input_blocks.0.0.bias", U + "input_blocks.1.0.out_layers.3.bias", U + "out.2.weight",
    U + "init_attn.0.proj_in.weight", U + "fps_embedding.2.bias", U + "input_blocks.3.0.op.weight",
    U + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", V + "quant_conv.weight",
    V + "encoder.down.0.block.0.conv1.bias", V + "post_quant_conv.bias", T + "ln_final.weight",
    T + "transformer.resblocks.0.attn.in_proj_bias", T + "transformer.resblocks.2.ln_1.bias"])
def test_a_missing_tensor_is_named(name, checkpoint, vocabulary, tmp_path):
    state = standins.tiny_videocrafter2()
    del state[name]
    assert f"1 missing ({name})" in refused(state, checkpoint, vocabulary, tmp_path)


@pytest.mark.parametrize("name", [U + "input_blocks.0.0.weight", V + "encoder.conv_in.weight",
                                  T + "positional_embedding", T + "token_embedding.weight"])
def test_a_missing_tensor_that_tells_a_size_is_named(name, checkpoint, vocabulary, tmp_path):
    state = standins.tiny_videocrafter2()
    del state[name]
    said = refused(state, checkpoint, vocabulary, tmp_path)
    assert name in said or f"no tensor {name.removeprefix(U).removeprefix(V).removeprefix(T)}" in said


def test_missing_and_unknown_of_all_parts_in_one_sentence(checkpoint, vocabulary, tmp_path):
    state = standins.tiny_videocrafter2()
    gone = [U + "out.0.bias", V + "decoder.conv_out.bias", T + "ln_final.bias"]
    for k in gone: del state[k]
    state |= {U + "motion_cond_proj.weight": torch.ones(2, 2), "model_ema.decay": torch.ones(())}
    said = refused(state, checkpoint, vocabulary, tmp_path)
    assert "3 missing" in said and "2 unknown" in said
    for k in (*gone, "motion_cond_proj.weight", "model_ema.decay"): assert k in said


def test_a_wrong_shape_is_named(checkpoint, vocabulary, tmp_path):
    state = standins.tiny_videocrafter2()
    state[U + "input_blocks.2.0.emb_layers.1.bias"] = torch.zeros(5)
    said = refused(state, checkpoint, vocabulary, tmp_path)
    assert "1 of another shape" in said and "(5,), not (32,)" in said


@pytest.mark.parametrize("prefix", [U, V, T])
def test_a_missing_part_is_named(prefix, checkpoint, vocabulary, tmp_path):
    state = {k: v for k, v in standins.tiny_videocrafter2().items() if not k.startswith(prefix)}
    assert prefix in refused(state, checkpoint, vocabulary, tmp_path)


class Program:
    "Runs when it is unpickled without care"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_a_pickle_with_more_than_tensors_is_refused(checkpoint, vocabulary, tmp_path):
    said = refused(standins.tiny_videocrafter2(), checkpoint, vocabulary, tmp_path,
                   callbacks=Program(tmp_path/"ran"))
    assert "holds more than tensors" in said and not (tmp_path/"ran").exists()


def test_entries_that_are_no_tensors_are_refused(checkpoint, vocabulary, tmp_path):
    said = refused(standins.tiny_videocrafter2() | {"note": "hello"}, checkpoint, vocabulary, tmp_path)
    assert "1 of its entries are not named tensors (note)" in said


@pytest.mark.parametrize("data", [b"", b"hello world", b"cut"])
def test_a_file_that_is_no_checkpoint(data, checkpoint, vocabulary, tmp_path):
    path = checkpoint(standins.tiny_videocrafter2())
    path.write_bytes(path.read_bytes()[:100_000] if data == b"cut" else data)
    with pytest.raises(UserError, match="cut off"):
        vc2.convert_videocrafter2(path, tmp_path/"out", vocabulary=vocabulary)


def test_existing_out_missing_file_bad_fps(checkpoint, vocabulary, tmp_path):
    path, go = checkpoint(standins.tiny_videocrafter2()), vc2.convert_videocrafter2
    (tmp_path/"there").mkdir()
    with pytest.raises(UserError, match="is there already"): go(path, tmp_path/"there", 16, vocabulary)
    with pytest.raises(UserError, match="no file"): go(tmp_path/"no", tmp_path/"out", 16, vocabulary)
    with pytest.raises(UserError, match="nearest is 8"): go(path, tmp_path/"out", 8.3, vocabulary)
    with pytest.raises(UserError, match="pip download"): go(path, tmp_path/"out", 16, tmp_path/"no")
    vocabulary.write_text("#version\np a\n")
    with pytest.raises(UserError, match="has 1 merges"): go(path, tmp_path/"out", 16, vocabulary)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "model.ckpt", "there"]


def test_a_long_list_of_names_is_cut_but_counted(checkpoint, vocabulary, tmp_path):
    state = standins.tiny_videocrafter2() | {f"extra.{i:02d}": torch.zeros(1) for i in range(12)}
    said = refused(state, checkpoint, vocabulary, tmp_path)
    assert "model.ckpt' does not have" in said
    assert "12 unknown (extra.00, extra.01, " in said and "extra.07, ...)" in said and "extra.08" not in said


@pytest.mark.parametrize("when", ["vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(when, error, checkpoint, vocabulary, tmp_path,
                                                  monkeypatch):
    cls = dict(vae=AutoencoderKL, text_encoder=CLIPTextModel, tokenizer=CLIPTokenizer)[when]
    path, seen = checkpoint(standins.tiny_videocrafter2()), []

    def stop(self, folder, **_):
        seen.extend(folder.parent.rglob("*.safetensors"))
        raise error
    monkeypatch.setattr(cls, "save_pretrained", stop)
    with pytest.raises(error): vc2.convert_videocrafter2(path, tmp_path/"out", vocabulary=vocabulary)
    assert seen, "the first part was not written yet"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "model.ckpt"]


# --- the vocabulary ------------------------------------------------------------------------------

def test_vocabulary_as_text_gz_and_wheel(vocabulary, tmp_path):
    want = text.read_merges(vocabulary)
    assert want[:2] == [("p", "a"), ("pa", "n")] and len(want) == 6
    packed = tmp_path/"bpe.txt.gz"
    packed.write_bytes(gzip.compress(TOY.encode()))
    assert text.read_merges(packed) == want
    with zipfile.ZipFile(tmp_path/"open_clip_torch-0-py3-none-any.whl", "w") as z:
        z.write(packed, "open_clip/bpe_simple_vocab_16e6.txt.gz")
    assert text.read_merges(tmp_path/"open_clip_torch-0-py3-none-any.whl") == want


def test_no_vocabulary_is_told(checkpoint, tmp_path, monkeypatch):
    "One sentence that says what to give, with a path that is not there and with none"
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    path = checkpoint(standins.tiny_videocrafter2())
    give = "give with --vocabulary the wheel that `pip download --no-deps open_clip_torch` brings, or the bpe_simple_vocab_16e6.txt.gz in it"
    for named, what in ((None, "CLIP's vocabulary was not given"), (tmp_path/"lost.whl", f"no vocabulary at {tmp_path}/lost.whl")):
        with pytest.raises(UserError) as e: vc2.convert_videocrafter2(path, tmp_path/"out", vocabulary=named)
        assert str(e.value) == f"{what}: {give}" and not (tmp_path/"out").exists()


def test_open_clip_is_never_imported(tmp_path):
    "Its wheel needs torchvision; only its data file is read"
    (tmp_path/"open_clip").mkdir()
    (tmp_path/"open_clip/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path/"open_clip/bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(TOY.encode()))
    code = "from t2v_turbo.text import read_merges; print(len(read_merges()))"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
                         text=True, capture_output=True)
    assert run.stdout.strip() == "6", run.stderr


# --- the x0 scale --------------------------------------------------------------------------------

def test_x0_scale():
    s = vc2.x0_scale()
    assert s.shape == (1000,) and s[0] == 1 and (s[400:] == s[999]).all()
    torch.testing.assert_close(s[[199, 279, 399, 999]],
                               torch.tensor([1 - .3*199/399, 1 - .3*279/399, .7, .7]))
