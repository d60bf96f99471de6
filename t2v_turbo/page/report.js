"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent), root = document.documentElement;
  const one = (s, e = document) => e.querySelector(s), all = (s, e = document) => [...e.querySelectorAll(s)];
  const svg = (name, at) => { const e = document.createElementNS("http://www.w3.org/2000/svg", name); for (const k in at) e.setAttribute(k, at[k]); return e; };

  // Charts: the pointer or the arrow keys choose a step, and every chart shows its numbers there.
  const TOP = 10, FLOOR = 164, charts = all(".chart");
  const nearest = (v, steps) => { let best = 0; steps.forEach((s, i) => { if (Math.abs(s - v) < Math.abs(steps[best] - v)) best = i; }); return best; };
  const height = (v, c) => {
    const f = c.log ? Math.log10 : x => x;
    return FLOOR - (FLOOR - TOP) * (f(v) - f(c.y[0])) / ((f(c.y[1]) - f(c.y[0])) || 1);
  };
  const show = step => charts.forEach((e, n) => {
    const c = data.charts[n], i = nearest(step, c.steps), plot = one(".plot", e), at = c.values.map(v => v[i]);
    all("output[data-line]", e).forEach((o, k) => { o.textContent = at[k] === null ? "–" : String(at[k]); });
    one(".step", e).textContent = `at step ${c.steps[i]}`;
    const told = c.names.map((name, k) => `${name} ${at[k] === null ? "missing" : at[k]}`).join(", ");
    plot.setAttribute("aria-valuenow", c.steps[i]);
    plot.setAttribute("aria-valuetext", `step ${c.steps[i]}: ${told}`);
    const g = one(".cursor", e), x = c.x[i];
    g.replaceChildren(svg("path", {d: `M${x} ${TOP}V${FLOOR}`}));
    at.forEach(v => { if (v !== null && (!c.log || v > 0)) g.append(svg("circle", {cx: x, cy: height(v, c), r: 3})); });
  });
  charts.forEach((e, n) => {
    const c = data.charts[n], plot = one(".plot", e), picture = one("svg", plot);
    const label = document.createElement("span");
    label.className = "step"; label.textContent = `at step ${c.steps.at(-1)}`;
    one(".legend", e).append(label);
    picture.removeAttribute("role"); picture.setAttribute("aria-hidden", "true");
    Object.entries({tabindex: 0, role: "slider", "aria-label": `${one("figcaption", e).textContent}: step`, "aria-valuemin": c.steps[0], "aria-valuemax": c.steps.at(-1),
      "aria-valuenow": c.steps.at(-1)}).forEach(([k, v]) => plot.setAttribute(k, v));
    const point = p => {
      const box = picture.getBoundingClientRect(), x = (p.clientX - box.left) * 420 / box.width;
      show(c.steps[nearest(x, c.x)]);
    };
    plot.addEventListener("pointermove", point); plot.addEventListener("pointerdown", point);
    plot.addEventListener("keydown", k => {
      const now = nearest(+plot.getAttribute("aria-valuenow"), c.steps), last = c.steps.length - 1;
      const to = {ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: last}[k.key];
      if (to === undefined) return;
      k.preventDefault(); show(c.steps[Math.min(last, Math.max(0, to))]);
    });
  });

  // Clips: one frame number for all of them.
  const play = one("#play"), frame = one("#frame"), look = one("#look");
  if (data.frames) {
    let timer = null, f = 0;
    const set = n => { f = n; root.style.setProperty("--f", f); if (frame) frame.value = f; };
    const start = () => { timer = setInterval(() => set((f + 1) % data.frames), data.pause); if (play) play.textContent = "Pause"; };
    const stop = () => { clearInterval(timer); timer = null; if (play) play.textContent = "Play"; };
    if (play) play.addEventListener("click", () => timer === null ? start() : stop());
    if (frame) frame.addEventListener("input", () => { stop(); set(+frame.value); });
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) stop(); else start();
    addEventListener("beforeprint", stop);
  }

  // Looks: the slider, or a click on the timeline, chooses the look that is compared.
  const choose = n => {
    const l = data.looks[n];
    if (look) look.value = n;
    if (one("#at")) one("#at").textContent = `step ${l.step}`;
    all(".mine").forEach(e => {
      const clip = one(".clip", e), text = e.closest(".caption");
      clip.className = `clip ${l.sheet}`;
      clip.setAttribute("aria-label", `student, step ${l.step}: ${one("h3", text).textContent}`);
      one(".at", e).textContent = `step ${l.step}`;
      const scores = l.scores[text.dataset.caption] || {};
      all("[data-score]", text).forEach(b => { b.textContent = scores[b.dataset.score] ?? "–"; });
    });
    all(".timeline [data-look]").forEach(e => e.classList.toggle("now", +e.dataset.look === n));
  };
  if (look) {
    look.addEventListener("input", () => choose(+look.value));
    all(".timeline [data-look]").forEach(e => e.addEventListener("click", () => choose(+e.dataset.look)));
    choose(data.looks.length - 1);
  }

  // A run that goes on: the page may read itself again.
  const reload = one("#reload");
  if (reload) {
    let timer = null;
    const set = on => {
      clearTimeout(timer);
      if (on) timer = setTimeout(() => location.reload(), 30000);
      location.hash = on ? "live" : "";
    };
    reload.checked = location.hash === "#live";
    if (reload.checked) set(true);
    reload.addEventListener("change", () => set(reload.checked));
  }
})();
