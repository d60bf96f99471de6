"use strict";
// Pictures that a reader can drag. `<div class="explore" data-show="flow">` becomes one; other `data-`
// attributes are starting positions. No library, no server. Their data lie beside this file, one file each,
// written by bench/explorables.py; `flow` computes everything from the formulas of the notebooks.
(() => {
if (window.explore) return window.explore.start();           // a notebook may hold this file more than once
const home = document.currentScript && document.currentScript.src;
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// --- the mathematics: nbs/02_schedule, 03_gaussian, 04_solver, 05_consistency ---------------------

const T = 1000, abar = [];
for (let t = 0, a = 1; t < T; t++) {
  const root = Math.sqrt(.00085) + (Math.sqrt(.012) - Math.sqrt(.00085))*t/(T - 1);
  abar.push(a *= 1 - root*root);
}
const alpha = t => Math.sqrt(abar[t]), sigma = t => Math.sqrt(1 - abar[t]);
const addNoise = (x0, eps, t) => alpha(t)*x0 + sigma(t)*eps;
function boundary(t) {                                       // c_skip and c_out, eq. 5
  const lt = 10*t, d = .25;
  return [d/(lt*lt + d), lt/Math.sqrt(lt*lt + d)];
}
const range = n => [...Array(n).keys()];

class Mixture {                                              // the teacher in closed form, with guidance
  constructor(means, std, label = -1, w = 0) { Object.assign(this, {means, std, label, w}); }
  one(z, a, label) {                                         // best prediction of the noise, a = abar
    const v2 = a*this.std**2 + 1 - a, diff = this.means.map(m => z - Math.sqrt(a)*m);
    const logits = diff.map((d, k) => label < 0 || label === k ? -d*d/(2*v2) : -Infinity);
    const top = Math.max(...logits), r = logits.map(l => Math.exp(l - top));
    const mean = r.reduce((s, p, k) => s + p*diff[k], 0)/r.reduce((s, p) => s + p);
    return Math.sqrt(1 - a)/v2*mean;
  }
  at(z, a) {
    const cond = this.one(z, a, this.label);
    return this.label < 0 || !this.w ? cond : cond + this.w*(cond - this.one(z, a, -1));
  }
  eps(z, t) { return this.at(z, abar[t]); }
  flow(z, t, s, steps = 200) {                               // the ODE dx/drho = eps by Heun's rule
    const [lo, hi] = [t, s].map(u => Math.log(1/abar[u] - 1)/2);
    const slope = (x, r) => this.at(x/Math.sqrt(1 + r*r), 1/(1 + r*r));
    let r = Math.exp(lo), x = z*Math.sqrt(1 + r*r);
    for (let i = 1; i <= steps; i++) {
      const q = Math.exp(lo + (hi - lo)*i/steps), d = slope(x, r);
      x += (q - r)*(d + slope(x + (q - r)*d, q))/2;
      r = q;
    }
    return x/Math.sqrt(1 + r*r);
  }
  density(x) {
    const among = this.label < 0 ? this.means : [this.means[this.label]];
    return among.reduce((s, m) => s + Math.exp(-((x - m)**2)/(2*this.std**2)), 0)/among.length/this.std;
  }
}
class Gaussian extends Mixture {                             // its flow has a formula
  flow(z, t, s) {
    const v = u => Math.sqrt(abar[u]*this.std**2 + 1 - abar[u]), m = this.means[0];
    return alpha(s)*m + v(s)*(z - alpha(t)*m)/v(t);
  }
}
function ddimStep(model, z, t, s) {                          // eq. 11
  const eps = model.eps(z, t), x0 = (z - sigma(t)*eps)/alpha(t);
  return {eps, x0, z: addNoise(x0, eps, s)};
}
function walk(model, z, k) {                                 // from 999 to 0 in steps of k
  const path = [[T - 1, z]];
  for (let t = T - 1; t > 0;) {
    const s = Math.max(t - k, 0);
    path.push([s, z = ddimStep(model, z, t, s).z]);
    t = s;
  }
  return path;
}

// --- pieces of a page ----------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function make(tag, attrs = {}, ...inside) {
  const svg = tag.startsWith("svg:"), el = svg ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
  el.append(...inside);
  return el;
}
const number = (x, digits = 4) => x.toFixed(digits).replace("-", "\u2212");

function slider(label, values, value, text = String) {       // a range over a list of values
  const input = make("input", {type: "range", "aria-label": label, min: 0, max: values.length - 1, step: 1}), out = make("output", {"aria-live": "off"});
  const el = make("label", {class: "explore-slider"}, make("span", {}, label), input, out);
  const show = () => { out.value = text(el.value); input.setAttribute("aria-valuetext", text(el.value)); };
  Object.defineProperty(el, "value", {get: () => values[+input.value], set: v => {
    const gap = values.map(x => Math.abs(x - v));
    input.value = gap.indexOf(Math.min(...gap));
    show();
  }});
  el.input = input;
  el.over = (list, v) => { values = list; input.max = list.length - 1; el.value = v; };
  input.addEventListener("input", () => { show(); el.changed(); });
  el.value = value;
  return el;
}
function choice(label, options, value) {                     // a list to choose from; options: texts
  const select = make("select", {"aria-label": label}, ...options.map((o, i) => make("option", {value: i}, o)));
  const el = make("label", {class: "explore-choice"}, make("span", {}, label), select);
  Object.defineProperty(el, "value", {get: () => +select.value, set: v => { select.value = v; }});
  el.input = select;
  select.addEventListener("change", () => el.changed());
  el.value = value;
  return el;
}
function numbers(rows) {                                     // {name: label} -> a list of names and values
  const outs = {}, list = make("dl", {class: "explore-numbers"});
  for (const [name, label] of Object.entries(rows)) {
    const term = make("dt");
    term.innerHTML = label;
    list.append(make("div", {}, term, make("dd", {}, outs[name] = make("output", {"data-name": name, "aria-live": "off"}))));
  }
  list.show = values => { for (const k in values) outs[k].value = values[k]; };
  return list;
}

function player(box, frames, draw) {                         // play, pause, one frame; calls draw(frame)
  const pace = 125, button = make("button", {type: "button", class: "explore-play"});
  const at = slider("frame", range(frames), 0, i => `${i + 1} of ${frames}`);
  let playing = !calm, seen = false;
  const show = () => {
    button.textContent = playing ? "Pause" : "Play";
    box.dataset.playing = playing;
  };
  button.addEventListener("click", () => { playing = !playing; show(); });
  at.changed = () => { playing = false; show(); draw(at.value); };
  new IntersectionObserver(es => { seen = es[es.length - 1].isIntersecting; }).observe(box);
  setInterval(() => {
    if (!playing || !seen || document.hidden) return;
    at.value = (at.value + 1) % frames;
    draw(at.value);
  }, pace);
  show();
  const row = make("div", {class: "explore-row"}, button, at);
  row.draw = () => draw(at.value);
  return row;
}
function screen(title, sheet) {                              // one clip of a sheet; `show(clip, frame)`
  const canvas = make("canvas", {width: sheet.width, height: sheet.height, role: "img"});
  const el = make("figure", {class: "explore-screen"}, canvas, make("figcaption", {}, title));
  const pen = canvas.getContext("2d");
  el.describe = text => canvas.setAttribute("aria-label", text);
  el.show = (clip, frame) => {
    const n = clip*sheet.frames + frame, x = n % sheet.cols, y = Math.floor(n/sheet.cols);
    pen.drawImage(sheet.picture, x*sheet.width, y*sheet.height, sheet.width, sheet.height, 0, 0, sheet.width, sheet.height);
    canvas.dataset.clip = clip;
    canvas.dataset.frame = frame;
  };
  el.describe(title);
  return el;
}

const waiting = {};
function data(name) {                                        // a file beside this one, or already in the page
  return waiting[name] ??= new Promise((done, fail) => {
    const ready = value => {
      if (!value.sheet) return done(value);
      value.sheet.picture = new Image();
      value.sheet.picture.onload = () => done(value);
      value.sheet.picture.onerror = () => fail(new Error(`the pictures of ${name} cannot be read`));
      value.sheet.picture.src = value.sheet.image;
    };
    const files = window.exploreData ??= {};
    if (files[name]) return ready(files[name]);
    const tag = make("script", {src: new URL(`${name}.js`, home)});
    tag.onload = () => ready(files[name]);
    tag.onerror = () => fail(new Error(`${name}.js is missing`));
    document.head.append(tag);
  });
}

// --- the pictures --------------------------------------------------------------------------------

const shows = {};

const DATA = [["one Gaussian, mean 0.5", "gaussian"], ["two Gaussians, no prompt", "mixture"],
              ["two Gaussians, prompt \u22121", "minus"], ["two Gaussians, prompt +1", "plus"]];
const TIMES = [0, ...range(50).map(i => 20*i + 19)];         // the solver's grid of 50, and 0
const SKIPS = [20, 40, 100, 200, 500, 1000];

shows.flow = (box, start) => {
  const kind = choice("data", DATA.map(d => d[0]), Math.max(0, DATA.findIndex(d => d[1] === start.data)));
  const t = slider("noise level t", TIMES, +(start.t ?? 599));
  const w = slider("guidance w", range(21).map(i => i/2), +(start.w ?? 0));
  const k = slider("skip k", SKIPS, +(start.k ?? 200), v => `${v}, ${Math.ceil(1000/v)} steps`);
  let z = +(start.z ?? .6);
  const list = numbers({
    z: "start noise z", scales: "&alpha;<sub>t</sub>, &sigma;<sub>t</sub>", zt: "z<sub>t</sub>, on the exact curve",
    x0: "teacher\u2019s x<sub>0</sub>, the mean", eps: "teacher\u2019s &epsilon;, guided", step: "teacher\u2019s step to t \u2212 k",
    exact: "exact curve at t \u2212 k", error: "error of the step", f: "f(z<sub>t</sub>, t), end of the curve",
    target: "f at the step\u2019s end, the target", c_skip: "c<sub>skip</sub>(t)", c_out: "c<sub>out</sub>(t)",
    untrained: "c<sub>skip</sub> z<sub>t</sub> + c<sub>out</sub> x<sub>0</sub>", walked: "all steps of k from 999 end at"});
  const plot = make("svg:svg", {class: "explore-plot", role: "group", "aria-label": "Curves of the probability-flow ODE, noise on the left, data on the right"});
  const key = make("ul", {class: "explore-key"}, ...[["curve", "exact curve"], ["walk", "teacher\u2019s steps of k"],
    ["step", "the step from t"], ["mean", "teacher\u2019s x\u2080"], ["end", "f: end of the curve"]].map(([c, text]) => {
    const mark = make("svg:svg", {viewBox: "0 0 26 12", "aria-hidden": "true"});
    mark.append(c === "mean" || c === "end" ? mark_of(c, 13, 6) : make("svg:line", {x1: 1, x2: 25, y1: 6, y2: 6, class: c}));
    return make("li", {}, mark, text);
  }));
  function mark_of(c, x, y) {
    return c === "mean" ? make("svg:rect", {x: x - 4, y: y - 4, width: 8, height: 8, class: c, transform: `rotate(45 ${x} ${y})`})
                        : make("svg:circle", {cx: x, cy: y, r: 5, class: c});
  }
  const handle = make("svg:circle", {r: 9, class: "handle", tabindex: 0, role: "slider", "aria-label": "start noise z",
                                     "aria-valuemin": -3, "aria-valuemax": 3, "aria-orientation": "vertical"});
  const hit = make("svg:circle", {r: 24, class: "hit"}), drawn = make("svg:g");
  plot.append(drawn, handle, hit);                           // these stay: a drag goes on while all else is drawn anew
  const top = 3.2, tall = 300, left = 40, bottom = 34;
  let wide = 600, model, far = [], across, down;

  const line = (points, cls) => make("svg:path", {class: cls, d: points.map(([t, z], i) => `${i ? "L" : "M"}${across(t).toFixed(1)} ${down(z).toFixed(1)}`).join("")});
  function curve(z) {                                        // the exact curve through z at 999
    const path = [[T - 1, z]];
    for (let i = TIMES.length - 2; i >= 0; i--) path.push([TIMES[i], z = model.flow(z, TIMES[i + 1], TIMES[i], 8)]);
    return path;
  }
  function setModel() {
    const name = DATA[kind.value][1], label = {minus: 0, plus: 1}[name] ?? -1;
    model = name === "gaussian" ? new Gaussian([.5], .4) : new Mixture([-1, 1], .25, label, w.value);
    w.input.disabled = label < 0;
    far = range(13).map(i => curve(-2.4 + .4*i));
  }
  function draw() {
    const right = 46;
    across = t => left + (wide - left - right)*(1 - t/(T - 1));
    down = z => (tall - bottom)/2 - z*(tall - bottom)/2/top;
    const s = Math.max(t.value - k.value, 0), zt = model.flow(z, T - 1, t.value);
    const step = ddimStep(model, zt, t.value, s), exact = model.flow(zt, t.value, s);
    const f = model.flow(zt, t.value, 0), target = model.flow(step.z, s, 0), [skip, out] = boundary(t.value);
    const path = walk(model, z, k.value), walked = path[path.length - 1][1];
    list.show({z: number(z, 2), scales: `${number(alpha(t.value))}, ${number(sigma(t.value))}`, zt: number(zt), x0: number(step.x0), eps: number(step.eps),
      step: number(step.z), exact: number(exact), error: number(step.z - exact), f: number(f), target: number(target),
      c_skip: skip < .001 && skip ? skip.toExponential(2).replace("-", "\u2212") : number(skip), c_out: number(out), untrained: number(skip*zt + out*step.x0),
      walked: `${number(walked)}, f: ${number(model.flow(z, T - 1, 0))}`});
    handle.setAttribute("aria-valuenow", z.toFixed(2));
    handle.setAttribute("aria-valuetext", `${z.toFixed(2)}, ends at ${model.flow(z, T - 1, 0).toFixed(2)}`);
    for (const c of [handle, hit]) { c.setAttribute("cx", across(T - 1)); c.setAttribute("cy", down(z)); }
    plot.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    plot.setAttribute("height", tall);
    const arc = range(21).map(i => { const u = Math.round(t.value + (s - t.value)*i/20); return [u, addNoise(step.x0, step.eps, u)]; });
    const hill = range(81).map(i => -top + top*i/40), peak = Math.max(...hill.map(x => model.density(x)));
    const text = (x, y, words, anchor = "middle") => make("svg:text", {x, y, "text-anchor": anchor}, words);
    drawn.replaceChildren(
      make("svg:path", {class: "hill", d: `M${across(0)} ${down(-top)}` + hill.map(x => `L${(across(0) + 40*model.density(x)/peak).toFixed(1)} ${down(x).toFixed(1)}`).join("") + "Z"}),
      ...[-2, 0, 2].flatMap(v => [make("svg:line", {class: "rule", x1: left, x2: across(0), y1: down(v), y2: down(v)}), text(left - 14, down(v) + 4, number(v, 0), "end")]),
      ...[999, 750, 500, 250, 0].map(v => text(across(v), tall - bottom + 16, v)), text((left + across(0))/2, tall - 4, "t"), text(10, 14, "z"), text(across(0) + 22, tall - bottom + 16, "data"),
      ...far.map(p => line(p, "far")), make("svg:line", {class: "now", x1: across(t.value), x2: across(t.value), y1: 0, y2: tall - bottom}),
      line(path, "walk"), ...path.slice(1).map(([u, v]) => make("svg:circle", {class: "walked", cx: across(u), cy: down(v), r: 2.5})),
      line(curve(z), "curve"), line(arc, "step"), make("svg:circle", {class: "point", cx: across(t.value), cy: down(zt), r: 5}),
      make("svg:circle", {class: "stepped", cx: across(s), cy: down(step.z), r: 5}),
      mark_of("mean", across(0), down(step.x0)), mark_of("end", across(0), down(f)));
  }
  const to = v => { z = Math.max(-3, Math.min(3, Math.round(v*100)/100)); draw(); };
  const drag = e => {
    const r = plot.getBoundingClientRect();
    to(((tall - bottom)/2 - (e.clientY - r.top)*tall/r.height)*2*top/(tall - bottom));
  };
  hit.addEventListener("pointerdown", e => { hit.setPointerCapture(e.pointerId); handle.focus({preventScroll: true}); drag(e); e.preventDefault(); });
  hit.addEventListener("pointermove", e => { if (hit.hasPointerCapture(e.pointerId)) drag(e); });
  handle.addEventListener("keydown", e => {
    const by = {ArrowUp: .05, ArrowRight: .05, ArrowDown: -.05, ArrowLeft: -.05, PageUp: .5, PageDown: -.5}[e.key];
    const goal = by ? z + by : {Home: -3, End: 3}[e.key];
    if (goal !== undefined) { to(goal); e.preventDefault(); }
  });
  t.changed = k.changed = draw;
  kind.changed = w.changed = () => { setModel(); draw(); };
  box.append(make("p", {class: "explore-hint"}, "Drag the ring on the left, or focus it and press the arrow keys."), plot, key,
             make("div", {class: "explore-controls"}, kind, t, w, k), list);
  setModel();
  new ResizeObserver(() => { wide = Math.max(280, plot.clientWidth || 600); draw(); }).observe(plot);
  draw();
};

const decibel = t => `${number(10*Math.log10(abar[t]/(1 - abar[t])), 1)} dB`;

shows.levels = async (box, start) => {                       // one clip at all noise levels
  const d = await data("levels"), parts = start.only ? [start.only] : d.parts.map(p => p.name);
  const t = slider("noise level t", d.times, +(start.t ?? d.times[Math.floor(d.times.length/2)]));
  const screens = parts.map(n => screen(d.parts.find(p => p.name === n).title, d.sheet));
  const measured = parts.map(n => d.parts.find(p => p.name === n)).filter(p => p.distance);
  const list = numbers({scales: "&alpha;<sub>t</sub>, &sigma;<sub>t</sub>", snr: "signal to noise",
    ...Object.fromEntries(measured.map(p => [p.name, `${p.title}: distance to the clean clip`]))});
  const play = player(box, d.sheet.frames, frame => {
    parts.forEach((n, i) => screens[i].show(d.times.indexOf(t.value)*d.parts.length + d.parts.findIndex(p => p.name === n), frame));
  });
  t.changed = () => {
    const at = d.times.indexOf(t.value);
    list.show({scales: `${number(alpha(t.value))}, ${number(sigma(t.value))}`, snr: decibel(t.value),
      ...Object.fromEntries(measured.map(p => [p.name, `${number(p.distance[at], 2)} grey levels`]))});
    screens.forEach((s, i) => s.describe(`${d.parts.find(p => p.name === parts[i]).title}, t = ${t.value}: ${d.caption}`));
    play.draw();
  };
  box.append(make("p", {class: "explore-hint"}, `\u201c${d.caption}\u201d`), make("div", {class: "explore-screens"}, ...screens),
             make("div", {class: "explore-controls"}, t, play), list);
  t.changed();
};

shows.players = async (box, start) => {                      // the same noise and caption, several models
  const d = await data("players");
  const caption = choice("caption", d.captions, +(start.caption ?? 0));
  const seed = choice("seed", d.seeds.map(String), +(start.seed ?? 0));
  const screens = d.models.map(m => screen(m, d.sheet));
  const list = numbers(Object.fromEntries(d.models.map((m, i) => [`m${i}`, m])));
  const clip = i => (i*d.captions.length + caption.value)*d.seeds.length + seed.value;
  const play = player(box, d.sheet.frames, frame => screens.forEach((s, i) => s.show(clip(i), frame)));
  caption.changed = seed.changed = () => {
    list.show(Object.fromEntries(d.models.map((m, i) => [`m${i}`, `${number(d.scores[clip(i)], 3)}, ${d.calls[i]} network calls`])));
    screens.forEach((s, i) => s.describe(`${d.models[i]}: ${d.captions[caption.value]}, seed ${d.seeds[seed.value]}`));
    play.draw();
  };
  box.append(make("div", {class: "explore-controls"}, caption, seed), make("div", {class: "explore-screens"}, ...screens),
             make("div", {class: "explore-controls"}, play), make("p", {class: "explore-hint"}, d.about), list);
  caption.changed();
};

shows.guidance = async (box, start) => {                     // steps and guidance of each model
  const d = await data("guidance");
  const model = choice("model", d.models.map(m => m.name), Math.max(0, d.models.findIndex(m => m.name === start.model)));
  const steps = slider("steps", d.models[model.value].steps, +(start.steps ?? 4));
  const w = slider("guidance w", d.w, +(start.w ?? 2));
  const view = screen(d.caption, d.sheet);
  const list = numbers({calls: "network calls a clip", ...d.columns});
  const cell = () => d.models.slice(0, model.value).reduce((n, m) => n + m.steps.length*d.w.length, 0)
    + d.models[model.value].steps.indexOf(steps.value)*d.w.length + d.w.indexOf(w.value);
  const play = player(box, d.sheet.frames, frame => view.show(cell(), frame));
  steps.changed = w.changed = () => {
    const row = d.rows[cell()], m = d.models[model.value];
    list.show({calls: steps.value*m.calls, ...Object.fromEntries(Object.keys(d.columns).map(c => [c, number(row[c], 3)]))});
    view.describe(`${m.name}, ${steps.value} steps, w = ${w.value}: ${d.caption}`);
    play.draw();
  };
  model.changed = () => { steps.over(d.models[model.value].steps, steps.value); steps.changed(); };
  box.append(make("div", {class: "explore-screens"}, view), make("div", {class: "explore-controls"}, model, steps, w, play),
             make("p", {class: "explore-hint"}, d.about), list);
  steps.changed();
};

shows.ablation = async (box, start) => {                     // students under the weights of both rewards
  const d = await data("ablation"), [x, y] = d.axes;
  const sx = slider(x, d.values[0], +(start[x] ?? 1)), sy = slider(y, d.values[1], +(start[y] ?? 1));
  const screens = d.captions.map(c => screen(c, d.sheet));
  const body = make("tbody"), head = make("tr", {}, ...["", "this student", "without rewards"].map(s => make("th", {scope: "col"}, s)));
  const table = make("table", {class: "explore-table"}, make("caption", {}, d.about), make("thead", {}, head), body);
  const at = (i, j) => i*d.values[1].length + j;
  const here = () => at(d.values[0].indexOf(sx.value), d.values[1].indexOf(sy.value));
  const play = player(box, d.sheet.frames, frame => screens.forEach((s, i) => s.show(here()*d.captions.length + i, frame)));
  const told = v => `${number(v[0], 3)} \u00b1 ${number(v[1], 2)}`;
  sx.changed = sy.changed = () => {
    body.replaceChildren(...Object.entries(d.columns).map(([c, name]) => make("tr", {}, make("th", {scope: "row"}, name),
      make("td", {}, make("output", {"data-name": c, "aria-live": "off"}, told(d.rows[here()][c]))), make("td", {}, told(d.rows[at(0, 0)][c])))));
    screens.forEach((s, i) => s.describe(`${x} = ${sx.value}, ${y} = ${sy.value}: ${d.captions[i]}`));
    play.draw();
  };
  box.append(make("div", {class: "explore-controls"}, sx, sy), make("div", {class: "explore-screens"}, ...screens),
             make("div", {class: "explore-controls"}, play), table);
  sx.changed();
};

// --- start ---------------------------------------------------------------------------------------

const STYLE = `
.explore { --e-curve: #0072b2; --e-walk: #b04a00; --e-mean: #00735a; --e-end: #9a3d7d; --e-line: var(--bs-border-color, #bbb);
  border: 1px solid var(--e-line); border-radius: .4rem; padding: .8rem; margin: .6rem 0 1rem; font-size: .9rem; line-height: 1.4; max-width: 48rem; }
.quarto-dark .explore { --e-curve: #6cc0f0; --e-walk: #f0a050; --e-mean: #3fd0a8; --e-end: #e8a0cc; }
.explore :is(p, ul, dl, dd, dt, figure) { margin: 0; max-width: none; padding: 0; }
.explore .explore-hint { font-size: .85rem; margin-bottom: .4rem; }
.explore-controls { display: grid; grid-template-columns: minmax(0, 1fr); gap: .35rem; margin: .5rem 0; }
.explore label { display: flex; gap: .6rem; align-items: center; margin: 0; min-height: 2rem; }
.explore label > span { flex: 0 0 6.2rem; }
.explore input[type=range] { flex: 1 1 6rem; min-width: 5rem; width: auto; accent-color: var(--e-curve); }
.explore select { flex: 1 1 8rem; min-width: 0; max-width: 24rem; padding: .25rem; font: inherit; color: inherit; background: var(--bs-body-bg, transparent); border: 1px solid var(--e-line); border-radius: .25rem; }
.explore option { color: initial; background: initial; }
.explore label > output { flex: 0 0 6.2rem; font-variant-numeric: tabular-nums; }
.explore :is(input, select):disabled { opacity: .4; }
.explore-row { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; }
.explore-row > label { flex: 1 1 12rem; }
.explore .explore-row > label > span { flex-basis: 2.8rem; } .explore .explore-row > label > output { flex-basis: 3.6rem; }
.explore-play { font: inherit; color: inherit; background: none; border: 1px solid currentColor; border-radius: .25rem; min-width: 5rem; min-height: 2.2rem; }
.explore :is(input, select, button, .handle):focus-visible { outline: 3px solid var(--e-walk); outline-offset: 2px; }
.explore-screens { display: flex; gap: .7rem; flex-wrap: wrap; margin: .4rem 0; }
.explore-screen { flex: 1 1 7rem; max-width: 9.5rem; }
.explore-screen canvas { width: 100%; image-rendering: pixelated; border-radius: .25rem; display: block; }
.explore-screen figcaption { font-size: .8rem; }
.explore-numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .1rem 1.2rem; }
.explore-numbers > div { display: flex; justify-content: space-between; gap: .6rem; border-bottom: 1px dotted var(--e-line); }
.explore-numbers dt { font-weight: normal; } .explore sub { line-height: 0; }
.explore-numbers dd, .explore-table td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.explore-table { border-collapse: collapse; font-size: .86rem; }
.explore-table :is(td, th) { text-align: left; font-weight: normal; padding: .15rem .8rem .15rem 0; border-bottom: 1px dotted var(--e-line); color: inherit; background: none; }
.explore-table caption { caption-side: bottom; color: inherit; font-size: .8rem; }
.explore-key { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .8rem; }
.explore .explore-key svg { width: 26px; height: 12px; vertical-align: middle; margin-right: .3rem; }
.explore svg, .quarto-dark .cell-output .explore svg { background: none; border-radius: 0; overflow: visible; }
.explore-plot { display: block; width: 100%; max-width: 100%; }
.explore-plot text { font-size: 12px; fill: currentColor; }
.explore path, .explore line { fill: none; }
.explore .rule { stroke: var(--e-line); stroke-width: .7; } .explore .far { stroke: currentColor; stroke-opacity: .28; stroke-width: 1; }
.explore .now { stroke: currentColor; stroke-width: 1; stroke-dasharray: 2 4; } .explore .hill { fill: currentColor; fill-opacity: .18; }
.explore .curve { stroke: var(--e-curve); stroke-width: 3; } .explore .walk { stroke: var(--e-walk); stroke-width: 1.5; stroke-dasharray: 5 3; }
.explore .walked { fill: var(--e-walk); } .explore .step { stroke: var(--e-walk); stroke-width: 4; } .explore .stepped { fill: var(--e-walk); }
.explore .point { fill: var(--e-curve); } .explore .mean { fill: var(--e-mean); } .explore .end { fill: none; stroke: var(--e-end); stroke-width: 3; }
.explore .handle { fill: var(--bs-body-bg, transparent); stroke: var(--e-curve); stroke-width: 4; } .explore .hit { fill: transparent; cursor: ns-resize; touch-action: none; }
`;

window.explore = {
  start() {
    for (const box of document.querySelectorAll(".explore:not([data-ready])")) {
      const show = shows[box.dataset.show];
      box.dataset.ready = "";
      if (!show) continue;
      const began = () => {
        box.replaceChildren();
        Promise.resolve(show(box, {...box.dataset})).catch(e => box.replaceChildren(make("p", {}, `This picture does not work: ${e.message}.`)));
      };
      const near = new IntersectionObserver(es => { if (es.some(e => e.isIntersecting)) { near.disconnect(); began(); } }, {rootMargin: "600px"});
      near.observe(box);
    }
  },
};
document.head.append(make("style", {}, STYLE));
window.explore.start();
})();
