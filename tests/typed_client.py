"A user's script, as README and tutorials write it: `pyright` finds nothing in it, and `main` runs (test_types.py)"
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

from t2v_turbo.ablate import AblateOptions, ablate, ablation_table
from t2v_turbo.core import make_gen, show_strips, write_video
from t2v_turbo.distill import Distillation, Objective, StepOut, draw
from t2v_turbo.evaluate import Sampler, evaluate, markdown_table
from t2v_turbo.files import UserError
from t2v_turbo.judges import judge, load_judges
from t2v_turbo.pipeline import T2VTurboPipeline, sample_student, sample_teacher
from t2v_turbo.rate import find_pairs, make_page, rate_report
from t2v_turbo.rewards.base import Mix, mix
from t2v_turbo.rewards.tiny import TinyReward, load_reward
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.train import Config, Trainer
from t2v_turbo.vbench import aggregate, published, read_results, score_table
from t2v_turbo.watch import Watcher, WatchOptions, watch
from t2v_turbo.world import World

PROMPTS = ["a red fish moving left in the sea", "a green cat growing in the meadow"]


def steady(frames: Tensor, prompts: list[str]) -> Tensor:
    return -frames.mean((1, 3, 4)).diff(dim=1).pow(2).mean(1)


def teacher_and_student(folder: Path) -> Student:
    teacher = assert_type(load_teacher("tiny", frames=8), Teacher)
    clips, captions = World("train").batch(0, 2)
    z0 = assert_type(teacher.encode(clips, make_gen(0)), Tensor)
    ctx, null = teacher.encode_text(captions), teacher.encode_text([""])
    x0, eps = teacher.denoise(z0, torch.tensor([999, 19]), ctx)
    shown = assert_type(teacher.decode(x0, frames=torch.tensor([0, 7])), Tensor)
    show_strips(shown, titles=captions)
    student = Student(teacher, rank=4)
    assert_type(student.trainable(), dict)
    with student.as_teacher() as again: assert_type(again, Teacher)
    cfg = Objective(beta_vid=0., image_frames=2)
    step = Distillation(student, cfg, image_reward=load_reward("tiny-image"))
    out: StepOut = step(z0, ctx, null.expand_as(ctx), captions, draw(cfg, z0.shape, make_gen(1)))
    out.loss.mean().backward()
    save_student(student, folder / "student", about=dict(steps=1))
    save_student(student, str(folder / "again"))
    assert_type(student.merged(), nn.Module)
    return load_student(folder / "student")


def sampled(folder: Path, student: Student) -> Tensor:
    pipe = assert_type(T2VTurboPipeline.from_pretrained(WEIGHTS / "tiny-cd"), T2VTurboPipeline)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(PROMPTS, num_inference_steps=4, guidance_scale=2., generator=make_gen(0), output_type="pt").frames
    write_video(folder / "clip.mp4", video[0].transpose(0, 1), fps=8)
    assert_type(T2VTurboPipeline.from_student(student, guidance_scale=2.), T2VTurboPipeline)
    slow = sample_teacher(load_teacher(WEIGHTS / "tiny"), PROMPTS, make_gen(0), steps=2, w=2.)
    return torch.cat([slow, assert_type(sample_student(student, PROMPTS, make_gen(0)), Tensor)])


def trained(folder: Path) -> Trainer:
    reward = assert_type(mix({load_reward("tiny-video"): 1., steady: .5}), Mix)
    cfg = Config(out=str(folder / "run"), steps=2, batch=2, rank=4, track="", objective=Objective(beta_img=1., beta_vid=1.))
    trainer = Trainer(cfg, image_reward=load_reward("tiny-image"), video_reward=reward)
    assert_type(trainer.resume(), bool)
    rows = assert_type(trainer.fit(), Iterator[dict])
    for row in rows: print(row["step"], row["loss"], row["j_vid"])
    trainer.save()
    return trainer


def judged(trainer: Trainer, student: Student, clips: Tensor) -> str:
    look = assert_type(Watcher(trainer, WatchOptions(clips_each=1)).look(), dict)
    assert_type(watch(trainer, WatchOptions(eval_every=0)), int | None)
    judges = load_judges()
    scores: dict[str, Tensor] = judge(judges, clips[:2], PROMPTS)
    who = Sampler("turbo", 4, 4, lambda prompts, seed: sample_student(student, prompts, make_gen(seed), 4, 2.))
    row = evaluate(who, PROMPTS, judges, seed=0, repeats=1)
    return markdown_table([row]) + str(sorted(look)) + str(sorted(scores))


def gridded(folder: Path) -> str:
    cfg = Config(out=str(folder / "grid"), steps=1, batch=1, rank=4, track="")
    rows = ablate(cfg, AblateOptions(over="beta_vid=0", seeds="0", jobs=1), WatchOptions(eval_every=0, clips_each=1))
    return ablation_table(rows)


def summed(results: Path) -> str:
    row = next(r for r in published() if r.model.startswith("T2V-Turbo"))
    total = assert_type(aggregate(row.scores), dict)
    result = read_results(results)
    return score_table(published(), {result.model: aggregate(result.scores)}) + f"{total['total']:.2f}"


def asked(a: Path, b: Path, votes: list[Path], page: Path) -> dict:
    pages = make_page(find_pairs(a, b), page, repeats=0.)
    return rate_report(votes, pages, names=("mine", "theirs"))


def main(folder: Path) -> None:
    student = teacher_and_student(folder)
    clips = sampled(folder, student)
    reward: TinyReward = load_reward("tiny-image")
    print(reward(clips[:2, :, :1], PROMPTS))
    print(judged(trained(folder), student, clips))
    try: load_student(folder / "nowhere")
    except UserError as e: print(e)
