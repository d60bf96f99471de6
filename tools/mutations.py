"""Break the library in one place at a time and count what the fast suite finds: `python tools/mutations.py [N ...]`

Every row of MUTATIONS is a text that stands once in t2v_turbo/, what takes its place, and the test files that should fail. Only tests of the
fast suite run (`-m fast`). The table that is printed is what CONTRIBUTING quotes. Minutes: about 20 s a row.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = [
    ("return (1 - beta).cumprod(0)", "return (1 - beta).cumsum(0)", "golden oracle"),
    ("return a.sqrt(), (1-a).sqrt()", "return a.sqrt(), (1-a)", "golden oracle"),
    ("return alpha*noise.float() - sigma*z0.float()", "return alpha*noise.float() + sigma*z0.float()", "golden oracle notebooks"),
    ("return (zt.float() - sigma*eps.float()) / alpha", "return (zt.float() + sigma*eps.float()) / alpha", "golden oracle"),
    ("return torch.arange(1, n+1)*T//n - 1", "return torch.arange(1, n+1)*T//n", "golden sampling"),
    ("return self.t((index - 1).clamp_min(0)) * (index > 0)", "return self.t((index - 1).clamp_min(0))", "golden oracle notebooks"),
    ("return cond + w*(cond - uncond)", "return uncond + w*(cond - uncond)", "golden oracle"),
    ("return x0.chunk(2), eps.chunk(2)", "return x0.chunk(2)[::-1], eps.chunk(2)[::-1]", "golden oracle notebooks"),
    ("lt = timestep_scaling*t.float()", "lt = t.float()", "golden oracle"),
    ("return c_skip*zt.float() + c_out*x0.float()", "return c_out*zt.float() + c_skip*x0.float()", "golden oracle"),
    ("x = 1000*w.float()[:, None]", "x = w.float()[:, None]", "golden"),
    ("return torch.cat([x.sin(), x.cos()], 1)", "return torch.cat([x.cos(), x.sin()], 1)", "golden"),
    ("return ((d**2 + c**2).sqrt() - c).flatten(1).mean(1)", "return (d**2 + c**2).sqrt().flatten(1).mean(1)", "golden notebooks"),
    ("return ((d**2 + c**2).sqrt() - c).flatten(1).mean(1)", "return ((d**2 + c**2).sqrt() - c).flatten(1).sum(1)", "golden notebooks"),
    ("return pseudo_huber(f_student, f_target.detach(), c)", "return pseudo_huber(f_student, f_target, c)", "golden oracle notebooks"),
    ("flip(0)[::origin//n][:n]", "flip(0)[::origin//n][-n:]", "sampling golden"),
    ("z = schedule.add_noise(denoised, noise(i).to(z), at(steps[i+1]))", "z = schedule.add_noise(denoised, noise(i).to(z), at(t))", "sampling golden notebooks"),
    ("return int(key) * n // CLOCK", "return int(key) * n // (CLOCK + CLOCK)", "windows oracle notebooks"),
    ("return torch.arange(n) * (t // n) + place(", "return torch.arange(n) + place(", "oracle windows notebooks"),
    ("return min(max(place(t, key) - size // 2, 0), t - size)", "return max(place(t, key) - size // 2, 0)", "windows notebooks"),
    ("[p for p in prompts for _ in range(m)]", "[p for _ in range(m) for p in prompts]", "clip_rewards oracle notebooks"),
    ("return sum(rest, first)", "return first", "clip_rewards video_rewards notebooks"),
    ("loss = cd - self.cfg.beta_img * j_img - self.cfg.beta_vid * j_vid", "loss = cd + self.cfg.beta_img * j_img - self.cfg.beta_vid * j_vid", "distill golden notebooks"),
    ("loss = cd - self.cfg.beta_img * j_img - self.cfg.beta_vid * j_vid", "loss = cd - self.cfg.beta_img * j_img - self.cfg.beta_img * j_vid", "distill golden notebooks"),
    ("w = cfg.w_min + (cfg.w_max - cfg.w_min) * torch.rand(", "w = cfg.w_min + cfg.w_max * torch.rand(", "distill notebooks"),
    ("if not beta or n <= size: continue", "continue", "windows defaults notebooks"),
    ("return replace(self, noise=self.noise[s], index=self.index[s], w=self.w[s])", "return replace(self, noise=self.noise[s], index=self.index[s])", "distill notebooks"),
    ("return 1 - sigma, sigma", "return sigma, 1 - sigma", "wan golden notebooks"),
    ("return noise.float() - z0.float()", "return z0.float() - noise.float()", "wan golden notebooks"),
    ("return zt.float() - sigma*out.float(), zt.float() + alpha*out.float()", "return zt.float() - sigma*out.float(), zt.float() - alpha*out.float()", "wan golden notebooks"),
    ("return ms + vs*(zt - mt)/vt", "return ms + vt*(zt - mt)/vs", "oracle notebooks"),
    ("def _arrive(self, grad): return grad / self.scale if self.inside else grad", "def _arrive(self, grad): return grad", "train faults notebooks"),
    ("except BaseException: restore(path); raise", "except BaseException: raise", "core faults notebooks"),
    ("if sync: _flush(tmp)", "pass", "core faults files notebooks"),
    ("return torch.cat([checkpoint(f, part, use_reentrant=False) for part in x.split(n)])", "return torch.cat([checkpoint(f, part, use_reentrant=False) for part in x.split(n)][::-1])", "clip_rewards memory notebooks"),
    ("u = torch.stack([self._texts[p] for p in prompts])", "u = torch.stack([self._texts[p] for p in sorted(prompts)])", "clip_rewards video_rewards"),
]


def where(text):
    "The module that has `text`, once"
    found = [(p, p.read_text(encoding="utf-8").count(text)) for p in (ROOT / "t2v_turbo").rglob("*.py")]
    found = [(p, n) for p, n in found if n]
    if [n for _, n in found] != [1]: raise SystemExit(f"{text!r} stands {sum(n for _, n in found)} times in t2v_turbo/: mend tools/mutations.py")
    return found[0][0].relative_to(ROOT)


def tests(stems, module):
    "Test files that exist, and the notebook that exports the module"
    nb = next(line.split("../nbs/")[1].strip().rstrip(".") for line in (ROOT / module).read_text(encoding="utf-8").splitlines() if "AUTOGENERATED" in line)
    for s in stems.split():
        if s == "notebooks": yield f"tests/test_notebooks.py::test_notebook[{nb}]"
        elif (ROOT / f"tests/test_{s}.py").exists(): yield f"tests/test_{s}.py"


def run(row, folder):
    "Whether a test of the fast suite fails; what failed first; seconds"
    old, new, stems = row
    module = where(old)
    copy = folder / "repo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "_docs", "__pycache__", "runs", "dist", "build"))
    py = copy / module
    py.write_text(py.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if (shared := ROOT.parent / "shared").exists() and not (folder / "shared").exists(): (folder / "shared").symlink_to(shared)
    began = time.perf_counter()
    p = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "fast", "-p", "no:cacheprovider", *tests(stems, module)],
                       cwd=copy, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    failed = [line for line in p.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return p.returncode == 1 and bool(failed), (failed or p.stdout.splitlines()[-1:])[0][:110], time.perf_counter() - began, module


def main(numbers):
    rows = [MUTATIONS[int(n)] for n in numbers] or MUTATIONS
    for row in rows: where(row[0])
    found = 0
    for i, row in enumerate(rows):
        folder = Path(tempfile.mkdtemp())
        try: caught, what, seconds, module = run(row, folder)
        finally: shutil.rmtree(folder)
        found += caught
        print(f"{i:2} {'caught' if caught else 'MISSED':7} {seconds:4.0f} s  {module}: {row[0][:60]!r}\n    {what}", flush=True)
    print(f"{found} of {len(rows)} caught")
    return found < len(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
