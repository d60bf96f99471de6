"What ships: small, without pickle, and loadable"
import torch
from diffusers import DDIMScheduler, UNet3DConditionModel

from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher, zero_w_projection
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher


def test_weights_are_small_and_safe():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 18e6          # two teachers of 2.4 M parameters
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}, files
    assert "t2v-turbo pretrain" in (WEIGHTS / "README.md").read_text()


def test_the_recipe_runs_on_the_denoiser_of_the_real_teachers():
    "UNet3DConditionModel, the class of ModelScopeT2V: same student, same step, gradients only where they belong"
    tiny = load_teacher("tiny")
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1, cross_attention_dim=64, attention_head_dim=8, time_cond_proj_dim=256)
    sched = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    teacher = Teacher("unet3d", zero_w_projection(unet), tiny.vae, tiny.text_encoder, tiny.tokenizer, sched, frames=4)
    z, t = torch.randn(2, *teacher.latent_shape, generator=make_gen(0)), torch.tensor([19, 999])
    prompts = ["a red circle moving left", ""]
    ctx, null = teacher.encode_text(prompts), teacher.encode_text(["", ""])
    with torch.no_grad(): before, _ = teacher.denoise(z, t, ctx)
    student = Student(teacher, rank=4)
    kinds = {type(m.get_base_layer()).__name__ for m in unet.modules() if hasattr(m, "get_base_layer")}
    assert kinds == {"Linear", "Conv2d", "Conv3d"}
    with torch.no_grad():
        torch.testing.assert_close(student(z, t, ctx, torch.tensor([4., 4.]))[1], before[1], rtol=1e-3, atol=1e-3)
    reward = lambda frames, texts: frames.mean((1, 2, 3, 4))
    cfg = Objective(video_frames=2)
    out = Distillation(student, cfg, reward, reward)(z, ctx, null, prompts, draw(cfg, z.shape, make_gen(1)))
    out.loss.mean().backward()
    grads = {n for n, p in unet.named_parameters() if p.grad is not None}
    assert grads and all("lora" in n or "cond_proj" in n for n in grads)
    names = {n.split(".lora")[0] for n in grads if "lora_B" in n}
    assert any("temp_convs" in n for n in names) and any("attn2.to_k" in n for n in names) and "conv_in" in names
    with student.as_teacher(), torch.no_grad():
        torch.testing.assert_close(teacher.denoise(z, t, ctx)[0], before)
    merged = student.merged()
    assert not any("lora" in k for k in merged.state_dict())
