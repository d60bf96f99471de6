"use strict";
// Pictures that a reader can drag. `<div class="explore" data-show="flow">` becomes one; its other
// `data-` attributes are starting positions. No library, no server. The data lie beside this file,
// written by bench/explorables.py; `flow` computes everything from the formulas of the notebooks.
(() => {
if (window.explore) return window.explore.start();       // a notebook may hold this file repeatedly
const home = document.currentScript && document.currentScript.src;
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// --- the mathematics: nbs/03_schedule, 04_gaussian, 05_solver, 06_consistency --------------------

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

class Mixture {                                          // the teacher in closed form, guided
  constructor(means, std, label = -1, w = 0) { Object.assign(this, {means, std, label, w}); }
  one(z, a, label) {                                     // best prediction of the noise; a: abar
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
    const bells = among.map(m => Math.exp(-((x - m)**2)/(2*this.std**2)));
    return bells.reduce((a, b) => a + b)/among.length/this.std;
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

// --- pieces of a page ---------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function fill(el, attrs, inside) {
  for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
  el.append(...inside);
  return el;
}
const make = (tag, attrs = {}, ...inside) => fill(document.createElement(tag), attrs, inside);
const svg = (tag, attrs, ...inside) => fill(document.createElementNS(SVG, tag), attrs, inside);
const div = (cls, ...inside) => make("div", {class: `explore-${cls}`}, ...inside);
const hint = text => make("p", {class: "explore-hint"}, text);
const output = name => make("output", {"aria-live": "off", ...(name && {"data-name": name})});
const number = (x, digits = 4) => x.toFixed(digits).replace("-", "\u2212");

function slider(label, values, value, text = String) {   // a range over a list of values
  const input = make("input", {type: "range", "aria-label": label, min: 0}), out = output();
  const el = make("label", {class: "explore-slider"}, make("span", {}, label), input, out);
  const show = () => {
    out.value = text(el.value);
    input.setAttribute("aria-valuetext", text(el.value));
  };
  Object.defineProperty(el, "value", {get: () => values[+input.value], set: v => {
    const gap = values.map(x => Math.abs(x - v));
    input.value = gap.indexOf(Math.min(...gap));         // the nearest
    show();
  }});
  el.over = (list, v) => { values = list; input.max = list.length - 1; el.value = v; };
  el.at = () => +input.value;
  el.input = input;
  input.addEventListener("input", () => { show(); el.changed(); });
  el.over(values, value);
  return el;
}
function choice(label, options, value) {                 // a list to choose from; options: texts
  const list = options.map((o, i) => make("option", {value: i}, o));
  const select = make("select", {"aria-label": label}, ...list);
  const el = make("label", {class: "explore-choice"}, make("span", {}, label), select);
  Object.defineProperty(el, "value", {get: () => +select.value});
  select.value = Math.max(0, value);
  select.addEventListener("change", () => el.changed());
  return el;
}
const math = text => text.split(/(_\{\w+\}|_\w)/).map(part =>    // c_{skip} z_t, with subscripts
  part[0] === "_" ? make("sub", {}, part.replace(/[_{}]/g, "")) : part);
function numbers(rows) {                                 // {name: label} -> a list to read
  const outs = {}, list = make("dl", {class: "explore-numbers"});
  for (const [name, label] of Object.entries(rows)) {
    const term = make("dt", {}, ...[].concat(label));
    list.append(make("div", {}, term, make("dd", {}, outs[name] = output(name))));
  }
  list.show = values => { for (const k in values) outs[k].value = values[k]; };
  return list;
}

function player(box, frames, draw) {                     // play, pause, or one frame by hand
  const button = make("button", {type: "button", class: "explore-play"});
  const at = slider("frame", range(frames), 0, i => `${i + 1} of ${frames}`);
  let playing = !calm, seen = false;
  const show = () => { button.textContent = playing ? "Pause" : "Play"; };
  button.addEventListener("click", () => { playing = !playing; show(); });
  at.changed = () => { playing = false; show(); draw(at.value); };
  new IntersectionObserver(es => { seen = es.at(-1).isIntersecting; }).observe(box);
  setInterval(() => {
    if (!playing || !seen || document.hidden) return;
    at.value = (at.value + 1) % frames;
    draw(at.value);
  }, 125);
  show();
  const row = div("row", button, at);
  row.draw = () => draw(at.value);
  return row;
}
function screen(title, sheet) {                          // shows one frame of one clip of a sheet
  const {width, height, frames, cols} = sheet;
  const canvas = make("canvas", {width, height, role: "img", "aria-label": title});
  const el = make("figure", {class: "explore-screen"}, canvas, make("figcaption", {}, title));
  const pen = canvas.getContext("2d");
  el.describe = text => canvas.setAttribute("aria-label", text);
  el.show = (clip, frame) => {
    const n = clip*frames + frame, x = n % cols*width, y = Math.floor(n/cols)*height;
    pen.drawImage(sheet.picture, x, y, width, height, 0, 0, width, height);
    Object.assign(canvas.dataset, {clip, frame});
  };
  return el;
}

const waiting = {};
function data(name) {                                    // beside this file, or already in the page
  return waiting[name] ??= new Promise((done, fail) => {
    const files = window.exploreData ??= {};
    const ready = () => {
      const sheet = files[name].sheet, picture = sheet.picture = new Image();
      picture.onload = () => done(files[name]);
      picture.onerror = () => fail(new Error(`the pictures of ${name} cannot be read`));
      picture.src = sheet.image;
    };
    if (files[name]) return ready();
    const tag = make("script", {src: new URL(`${name}.js`, home)});
    tag.onload = ready;
    tag.onerror = () => fail(new Error(`${name}.js is missing`));
    document.head.append(tag);
  });
}

// --- curves: noise on the left, data on the right ------------------------------------------------

const shows = {};

const DATA = {gaussian: "one Gaussian, mean 0.5", mixture: "two Gaussians, no prompt",
              minus: "two Gaussians, prompt \u22121", plus: "two Gaussians, prompt +1"};
const TIMES = [0, ...range(50).map(i => 20*i + 19)];     // 0, and the solver's grid of 50
const SKIPS = [20, 40, 100, 200, 500, 1000];
const NUMBERS = {
  z: "start noise z", scales: "\u03b1_t, \u03c3_t", zt: "z_t, on the exact curve",
  x0: "teacher\u2019s x_0, the mean", eps: "teacher\u2019s \u03b5, guided",
  step: "teacher\u2019s step to t \u2212 k", exact: "exact curve at t \u2212 k",
  error: "error of the step", f: "f(z_t, t), end of the curve",
  target: "f at the step\u2019s end, the target", c_skip: "c_{skip}(t)", c_out: "c_{out}(t)",
  untrained: "c_{skip} z_t + c_{out} x_0", walked: "all steps of k from 999 end at"};
const KEY = {curve: "exact curve", walk: "teacher\u2019s steps of k", step: "the step from t",
             mean: "teacher\u2019s x\u2080", end: "f: end of the curve"};
const symbols = {
  mean: (x, y) => svg("path", {class: "mean", d: `M${x - 6} ${y}l6 -6l6 6l-6 6Z`}),
  end: (x, y) => svg("circle", {class: "end", cx: x, cy: y, r: 5})};

function compute(model, z, t, k) {                       // all numbers of the picture
  const s = Math.max(t - k, 0), zt = model.flow(z, T - 1, t), step = ddimStep(model, zt, t, s);
  const path = walk(model, z, k), [skip, out] = boundary(t);
  return {s, zt, step, path, skip, out, exact: model.flow(zt, t, s), f: model.flow(zt, t, 0),
          target: model.flow(step.z, s, 0), end: model.flow(z, T - 1, 0)};
}
function told(z, t, n) {                                 // and their texts
  const tiny = n.skip && n.skip < .001;
  return {
    z: number(z, 2), scales: `${number(alpha(t))}, ${number(sigma(t))}`, zt: number(n.zt),
    x0: number(n.step.x0), eps: number(n.step.eps), step: number(n.step.z),
    exact: number(n.exact), error: number(n.step.z - n.exact), f: number(n.f),
    target: number(n.target), c_out: number(n.out),
    c_skip: tiny ? n.skip.toExponential(2).replace("-", "\u2212") : number(n.skip),
    untrained: number(n.skip*n.zt + n.out*n.step.x0),
    walked: `${number(n.path.at(-1)[1])}, f: ${number(n.end)}`};
}
function exactCurve(model, z) {                          // through z at 999: [[t, z], ..]
  const path = [[T - 1, z]];
  for (let i = TIMES.length - 2; i >= 0; i--)
    path.push([TIMES[i], z = model.flow(z, TIMES[i + 1], TIMES[i], 8)]);
  return path;
}

class Plot {                                             // axes, curves and the ring
  constructor() {
    Object.assign(this, {wide: 600, tall: 300, left: 40, right: 46, floor: 266, top: 3.2});
    this.ring = svg("circle", {
      r: 9, class: "handle", tabindex: 0, role: "slider", "aria-label": "start noise z",
      "aria-valuemin": -3, "aria-valuemax": 3, "aria-orientation": "vertical"});
    this.hit = svg("circle", {r: 24, class: "hit"});
    this.drawn = svg("g", {});                           // drawn anew; the ring stays
    this.el = svg("svg", {class: "explore-plot", role: "group",
                          "aria-label": "Curves of the probability-flow ODE"},
                  this.drawn, this.ring, this.hit);
  }
  x(t) { return this.left + (this.wide - this.left - this.right)*(1 - t/(T - 1)); }
  y(z) { return this.floor/2*(1 - z/this.top); }
  z(y) { return this.top*(1 - 2*y/this.floor); }
  line(points, cls) {
    const at = points.map(([t, z]) => `${this.x(t).toFixed(1)} ${this.y(z).toFixed(1)}`);
    return svg("path", {class: cls, d: "M" + at.join("L")});
  }
  dot(t, z, cls, r = 5) { return svg("circle", {class: cls, cx: this.x(t), cy: this.y(z), r}); }
  rule(t, z, s, v, cls) {
    return svg("line", {class: cls, x1: this.x(t), x2: this.x(s), y1: this.y(z), y2: this.y(v)});
  }
  text(x, y, words, anchor = "middle") {
    return svg("text", {x, y, "text-anchor": anchor}, words);
  }
  axes() {
    const end = this.x(0), low = this.floor + 16;
    return [
      ...[-2, 0, 2].map(v => this.rule(T - 1, v, 0, v, "rule")),
      ...[-2, 0, 2].map(v => this.text(this.left - 14, this.y(v) + 4, number(v, 0), "end")),
      ...[999, 750, 500, 250, 0].map(v => this.text(this.x(v), low, v)),
      this.text((this.left + end)/2, this.tall - 2, "t"), this.text(10, 14, "z"),
      this.text(end + 24, low, "data")];
  }
  hill(model) {                                          // the density of the data
    const at = range(81).map(i => this.top*(i/40 - 1)), p = at.map(z => model.density(z));
    const most = Math.max(...p), end = this.x(0);
    const edge = at.map((z, i) => `L${(end + 40*p[i]/most).toFixed(1)} ${this.y(z).toFixed(1)}`);
    return svg("path", {class: "hill", d: `M${end} ${this.y(-this.top)}${edge.join("")}Z`});
  }
  draw(model, far, z, t, n) {
    const arc = range(21).map(i => Math.round(t + (n.s - t)*i/20));
    const step = arc.map(u => [u, addNoise(n.step.x0, n.step.eps, u)]);
    this.el.setAttribute("viewBox", `0 0 ${this.wide} ${this.tall}`);
    for (const c of [this.ring, this.hit]) {
      c.setAttribute("cx", this.x(T - 1));
      c.setAttribute("cy", this.y(z));
    }
    this.ring.setAttribute("aria-valuenow", z.toFixed(2));
    this.ring.setAttribute("aria-valuetext", `${z.toFixed(2)}, ends at ${n.end.toFixed(2)}`);
    this.drawn.replaceChildren(
      this.hill(model), ...this.axes(), ...far.map(p => this.line(p, "far")),
      this.rule(t, this.top, t, -this.top, "now"), this.line(n.path, "walk"),
      ...n.path.slice(1).map(([u, v]) => this.dot(u, v, "walked", 2.5)),
      this.line(exactCurve(model, z), "curve"), this.line(step, "step"),
      this.dot(t, n.zt, "point"), this.dot(n.s, n.step.z, "stepped"),
      symbols.mean(this.x(0), this.y(n.step.x0)), symbols.end(this.x(0), this.y(n.f)));
  }
  dragged(z, to) {                                       // by mouse, finger or keyboard; z: now
    const at = e => {
      const r = this.el.getBoundingClientRect();
      to(this.z((e.clientY - r.top)*this.tall/r.height));
    };
    this.hit.addEventListener("pointerdown", e => {
      this.hit.setPointerCapture(e.pointerId);
      this.ring.focus({preventScroll: true});
      at(e);
      e.preventDefault();
    });
    this.hit.addEventListener("pointermove", e => {
      if (this.hit.hasPointerCapture(e.pointerId)) at(e);
    });
    const by = {ArrowUp: .05, ArrowRight: .05, ArrowDown: -.05, ArrowLeft: -.05,
                PageUp: .5, PageDown: -.5};
    this.ring.addEventListener("keydown", e => {
      const goal = e.key in by ? z() + by[e.key] : {Home: -3, End: 3}[e.key];
      if (goal === undefined) return;
      to(goal);
      e.preventDefault();
    });
  }
}

shows.flow = (box, start) => {
  const names = Object.keys(DATA);
  const kind = choice("data", Object.values(DATA), names.indexOf(start.data));
  const t = slider("noise level t", TIMES, start.t ?? 599);
  const w = slider("guidance w", range(21).map(i => i/2), start.w ?? 0);
  const steps = k => `${k}, ${k < 1000 ? `${1000/k} steps` : "1 step"}`;
  const k = slider("skip k", SKIPS, start.k ?? 200, steps);
  const labels = Object.entries(NUMBERS).map(([n, text]) => [n, math(text)]);
  const list = numbers(Object.fromEntries(labels)), plot = new Plot();
  let z = +(start.z ?? .6), model, far;
  const key = Object.entries(KEY).map(([c, text]) => make("li", {}, svg(
    "svg", {viewBox: "0 0 26 12", "aria-hidden": "true"},
    symbols[c] ? symbols[c](13, 6) : svg("path", {class: c, d: "M1 6H25"})), text));
  const choose = () => {
    const name = names[kind.value], label = {minus: 0, plus: 1}[name] ?? -1;
    model = name === "gaussian" ? new Gaussian([.5], .4)
                                : new Mixture([-1, 1], .25, label, w.value);
    w.input.disabled = label < 0;
    far = range(13).map(i => exactCurve(model, -2.4 + .4*i));
  };
  const draw = () => {
    const n = compute(model, z, t.value, k.value);
    list.show(told(z, t.value, n));
    plot.draw(model, far, z, t.value, n);
  };
  plot.dragged(() => z, v => { z = Math.max(-3, Math.min(3, Math.round(v*100)/100)); draw(); });
  t.changed = k.changed = draw;
  kind.changed = w.changed = () => { choose(); draw(); };
  box.append(hint("Drag the ring on the left, or focus it and press the arrow keys."), plot.el,
             make("ul", {class: "explore-key"}, ...key), div("controls", kind, t, w, k), list);
  choose();
  draw();
  new ResizeObserver(() => {
    plot.wide = plot.el.getBoundingClientRect().width || 600;
    draw();
  }).observe(plot.el);
};

// --- stored clips --------------------------------------------------------------------------------

shows.levels = async (box, start) => {                   // one clip at all noise levels
  const d = await data("levels"), all = d.parts.length;
  const wanted = p => !start.only || p.name === start.only;
  const parts = d.parts.map((p, i) => ({...p, i})).filter(wanted);
  const t = slider("noise level t", d.times, start.t ?? d.times[d.times.length >> 1]);
  const screens = parts.map(p => screen(p.title, d.sheet));
  const measured = parts.filter(p => p.distance);
  const far = measured.map(p => [p.name, `${p.title}: distance to the clean clip`]);
  const list = numbers({scales: math("\u03b1_t, \u03c3_t"), snr: "signal to noise",
                        ...Object.fromEntries(far)});
  const play = player(box, d.sheet.frames, frame =>
    screens.forEach((s, i) => s.show(t.at()*all + parts[i].i, frame)));
  t.changed = () => {
    const a = abar[t.value], snr = 10*Math.log10(a/(1 - a));
    list.show({scales: `${number(alpha(t.value))}, ${number(sigma(t.value))}`,
               snr: `${number(snr, 1)} dB`});
    for (const p of measured)
      list.show({[p.name]: `${number(p.distance[t.at()], 2)} grey levels`});
    screens.forEach((s, i) => s.describe(`${parts[i].title}, t = ${t.value}: ${d.caption}`));
    play.draw();
  };
  box.append(hint(`\u201c${d.caption}\u201d`), div("screens", ...screens),
             div("controls", t, play), list);
  t.changed();
};

shows.players = async (box, start) => {                  // the same noise and caption for all
  const d = await data("players");
  const caption = choice("caption", d.captions, +(start.caption ?? 0));
  const seed = choice("seed", d.seeds, +(start.seed ?? 0));
  const screens = d.models.map(m => screen(m, d.sheet));
  const list = numbers(Object.fromEntries(d.models.map((m, i) => [`m${i}`, m])));
  const clip = i => (i*d.captions.length + caption.value)*d.seeds.length + seed.value;
  const play = player(box, d.sheet.frames, frame =>
    screens.forEach((s, i) => s.show(clip(i), frame)));
  caption.changed = seed.changed = () => {
    d.models.forEach((m, i) => {
      list.show({[`m${i}`]: `${number(d.scores[clip(i)], 3)}, ${d.calls[i]} network calls`});
      screens[i].describe(`${m}: ${d.captions[caption.value]}, seed ${d.seeds[seed.value]}`);
    });
    play.draw();
  };
  box.append(div("controls", caption, seed), div("screens", ...screens), div("controls", play),
             hint(d.about), list);
  caption.changed();
};

shows.guidance = async (box, start) => {                 // steps and guidance of each model
  const d = await data("guidance"), names = d.models.map(m => m.name);
  const model = choice("model", names, names.indexOf(start.model));
  const steps = slider("steps", d.models[model.value].steps, start.steps ?? 4);
  const w = slider("guidance w", d.w, start.w ?? 2);
  const view = screen(d.caption, d.sheet);
  const list = numbers({calls: "network calls a clip", ...d.columns});
  const row = () => {                                    // rows: by model, then steps, then w
    const before = d.models.slice(0, model.value).reduce((n, m) => n + m.steps.length, 0);
    return (before + steps.at())*d.w.length + w.at();
  };
  const play = player(box, d.sheet.frames, frame => view.show(row(), frame));
  steps.changed = w.changed = () => {
    const m = d.models[model.value];
    list.show({calls: steps.value*m.calls});
    for (const c in d.columns) list.show({[c]: number(d.rows[row()][c], 3)});
    view.describe(`${m.name}, ${steps.value} steps, w = ${w.value}: ${d.caption}`);
    play.draw();
  };
  model.changed = () => { steps.over(d.models[model.value].steps, steps.value); steps.changed(); };
  box.append(div("screens", view), div("controls", model, steps, w, play), hint(d.about), list);
  steps.changed();
};

shows.ablation = async (box, start) => {                 // students under both rewards' weights
  const d = await data("ablation");
  const [x, y] = d.axes.map((a, i) => slider(a, d.values[i], start[a] ?? 1));
  const screens = d.captions.map(c => screen(c, d.sheet)), body = make("tbody");
  const head = ["", "this student", "without rewards"].map(s => make("th", {scope: "col"}, s));
  const table = make("table", {class: "explore-table"}, make("caption", {}, d.about),
                     make("thead", {}, make("tr", {}, ...head)), body);
  const here = () => x.at()*d.values[1].length + y.at();
  const play = player(box, d.sheet.frames, frame =>
    screens.forEach((s, i) => s.show(here()*d.captions.length + i, frame)));
  const mean = ([m, sd]) => `${number(m, 3)} \u00b1 ${number(sd, 2)}`;
  x.changed = y.changed = () => {
    body.replaceChildren(...Object.entries(d.columns).map(([c, name]) => {
      const out = output(c);
      out.value = mean(d.rows[here()][c]);
      return make("tr", {}, make("th", {scope: "row"}, name), make("td", {}, out),
                  make("td", {}, mean(d.rows[0][c])));
    }));
    const at = d.axes.map((a, i) => `${a} = ${[x, y][i].value}`).join(", ");
    screens.forEach((s, i) => s.describe(`${at}: ${d.captions[i]}`));
    play.draw();
  };
  box.append(div("controls", x, y), div("screens", ...screens), div("controls", play), table);
  x.changed();
};

// --- start ---------------------------------------------------------------------------------------

const STYLE = `
.explore { --e-curve: #0072b2; --e-walk: #b04a00; --e-mean: #00735a; --e-end: #9a3d7d; --e-line:
  var(--bs-border-color, #bbb);
  border: 1px solid var(--e-line); border-radius: .4rem; padding: .8rem; margin: .6rem 0 1rem;
  font-size: .9rem; line-height: 1.4; max-width: 48rem; }
.quarto-dark .explore { --e-curve: #6cc0f0; --e-walk: #f0a050; --e-mean: #3fd0a8; --e-end:
  #e8a0cc; }
.explore :is(p, ul, dl, dd, dt, figure) { margin: 0; max-width: none; padding: 0; }
.explore .explore-hint { font-size: .85rem; margin-bottom: .4rem; }
.explore-controls { display: grid; grid-template-columns: minmax(0, 1fr); gap: .35rem; margin:
  .5rem 0; }
.explore label { display: flex; gap: .6rem; align-items: center; margin: 0; min-height: 2rem; }
.explore label > span { flex: 0 0 6.2rem; }
.explore input[type=range] { flex: 1 1 6rem; min-width: 5rem; width: auto; accent-color:
  var(--e-curve); }
.explore select { flex: 1 1 8rem; min-width: 0; max-width: 24rem; padding: .25rem; font: inherit;
  color: inherit; background: var(--bs-body-bg, transparent); border: 1px solid var(--e-line);
  border-radius: .25rem; }
.explore option { color: initial; background: initial; }
.explore label > output { flex: 0 0 6.2rem; font-variant-numeric: tabular-nums; }
.explore :is(input, select):disabled { opacity: .4; }
.explore-row { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; }
.explore-row > label { flex: 1 1 12rem; }
.explore .explore-row > label > span { flex-basis: 2.8rem; }
.explore .explore-row > label > output { flex-basis: 3.6rem; }
.explore-play { font: inherit; color: inherit; background: none; border: 1px solid currentColor;
  border-radius: .25rem; min-width: 5rem; min-height: 2.2rem; }
.explore :is(input, select, button, .handle):focus-visible { outline: 3px solid var(--e-walk);
  outline-offset: 2px; }
.explore-screens { display: flex; gap: .7rem; flex-wrap: wrap; margin: .4rem 0; }
.explore .explore-screen { flex: 1 1 7rem; max-width: 10rem; }
.explore-screen canvas { width: 100%; image-rendering: pixelated; border-radius: .25rem; display:
  block; }
.explore-screen figcaption { font-size: .8rem; }
.explore-numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr));
  gap: .1rem 1.2rem; }
.explore-numbers > div { display: flex; justify-content: space-between; gap: .6rem; border-bottom:
  1px dotted var(--e-line); }
.explore-numbers dt { font-weight: normal; }
.explore sub { line-height: 0; }
.explore-numbers dd, .explore-table td { font-variant-numeric: tabular-nums; white-space: nowrap;
  }
.explore-table { border-collapse: collapse; font-size: .86rem; }
.explore-table :is(td, th) { text-align: left; font-weight: normal; padding: .15rem .8rem .15rem
  0; border-bottom: 1px dotted var(--e-line); color: inherit; background: none; }
.explore-table caption { caption-side: bottom; color: inherit; font-size: .8rem; }
.explore-key { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size:
  .8rem; }
.explore .explore-key svg { width: 26px; height: 12px; vertical-align: middle; margin-right:
  .3rem; }
.explore svg, .quarto-dark .cell-output .explore svg { background: none; border-radius: 0;
  overflow: visible; }
.explore-plot { display: block; width: 100%; max-width: 100%; }
.explore-plot text { font-size: 12px; fill: currentColor; }
.explore path, .explore line { fill: none; }
.explore .rule { stroke: var(--e-line); stroke-width: .7; }
.explore .far { stroke: currentColor; stroke-opacity: .28; stroke-width: 1; }
.explore .now { stroke: currentColor; stroke-width: 1; stroke-dasharray: 2 4; }
.explore .hill { fill: currentColor; fill-opacity: .18; }
.explore .curve { stroke: var(--e-curve); stroke-width: 3; }
.explore .walk { stroke: var(--e-walk); stroke-width: 1.5; stroke-dasharray: 5 3; }
.explore .walked { fill: var(--e-walk); }
.explore .step { stroke: var(--e-walk); stroke-width: 4; }
.explore .stepped { fill: var(--e-walk); }
.explore .point { fill: var(--e-curve); }
.explore .mean { fill: var(--e-mean); }
.explore .end { fill: none; stroke: var(--e-end); stroke-width: 3; }
.explore .handle { fill: var(--bs-body-bg, transparent); stroke: var(--e-curve); stroke-width: 4;
  }
.explore .hit { fill: transparent; cursor: ns-resize; touch-action: none; }
`;

window.explore = {
  start() {
    for (const box of document.querySelectorAll(".explore:not([data-ready])")) {
      const show = shows[box.dataset.show];
      box.dataset.ready = "";
      if (!show) continue;
      const fill = async () => {
        near.disconnect(); removeEventListener("beforeprint", fill);
        box.replaceChildren();
        try { await show(box, {...box.dataset}); } catch (e) {
          box.replaceChildren(make("p", {}, `This picture does not work: ${e.message}.`));
        }
      };
      const near = new IntersectionObserver(es => { if (es.some(e => e.isIntersecting)) fill(); }, {rootMargin: "600px"});
      near.observe(box);                                             // what comes into view
      addEventListener("beforeprint", fill);
    }
  },
};
document.head.append(make("style", {}, STYLE));
window.explore.start();
})();
