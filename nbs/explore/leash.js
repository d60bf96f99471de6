"use strict";
// Reward against KL with the score term's leash on and off: the picture to drag of nbs/17_leash.ipynb, in plain JavaScript.
// `<div class="leash" data-k="0.88,11.04">` becomes one; data-k is the stiffness of the score term in the wide and the thin direction.
(() => {
const STD = [1, .1], SLOPE = [Math.SQRT1_2, Math.SQRT1_2], C = 1e-3, N = 2;

// --- the mathematics: landing, tilt_linear and price of the notebook ------------------------------

function landing(push, hold, loss) {                         // displacement of one coordinate
  if (loss === "square") return push/(2/N + hold);
  if (hold === 0 && N*push >= 1) return Infinity;            // nothing holds
  const f = N*push;
  let lo = 0, hi = hold > 0 ? push/hold : C*f/Math.sqrt(1 - f*f);
  for (let i = 0; i < 80; i++) {
    const d = (lo + hi)/2;
    if (d/Math.hypot(d, C)/N + hold*d < push) lo = d; else hi = d;
  }
  return hi;
}
const land = (beta, lam, loss, k) => SLOPE.map((a, i) => landing(beta*a, lam*k[i], loss));
function price(d) {                                          // gain in reward, KL, standard deviations
  const square = d.reduce((s, x, i) => s + (x/STD[i])**2, 0);
  return {reward: d.reduce((s, x, i) => s + x*SLOPE[i], 0), kl: square/2, off: Math.sqrt(square)};
}
const SA = SLOPE.map((a, i) => a*STD[i]**2), UNIT = price(SA).reward;
const optimum = reward => SA.map(x => x*reward/UNIT);        // the tilted optimum of this reward

// --- pieces of a page ----------------------------------------------------------------------------

function make(tag, attrs = {}, ...inside) {
  const svg = tag.startsWith("svg:");
  const el = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
  el.append(...inside);
  return el;
}
const number = (x, digits) => Number.isFinite(x) ? x.toFixed(digits).replace("-", "\u2212") : "\u221e";
function slider(name, label, max, step, value) {
  const input = make("input", {type: "range", name, min: 0, max, step, value}), out = make("output");
  return {el: make("label", {class: "leash-slider"}, make("span", {}, label), input, out), input, out};
}

const ROWS = {reward: "reward gained", kl: "KL to the teacher", off: "standard deviations off the data",
              along: "moved along the data", thin: "moved off the data", best: "KL of the optimum, same reward"};

function start(box) {
  box.dataset.ready = "";
  const k = box.dataset.k.split(",").map(Number), outs = {};
  const beta = slider("beta", "reward weight \u03b2", 3, .05, .5), lam = slider("lam", "score term \u03bb", 4, .1, 0);
  const radios = ["square", "huber"].map(v => make("input", {type: "radio", name: `loss-${box.id || "leash"}`, value: v}));
  radios[0].checked = true;
  const loss = make("fieldset", {class: "leash-loss"}, make("legend", {}, "loss of CD"),
    ...radios.map((r, i) => make("label", {}, r, ["square", "pseudo-Huber"][i])));
  const place = make("svg:svg", {class: "leash-plot", role: "img"}), front = make("svg:svg", {class: "leash-plot", role: "img"});
  const table = make("dl", {class: "leash-numbers"}, ...Object.entries(ROWS).map(([name, text]) =>
    make("div", {}, make("dt", {}, text), make("dd", {}, outs[name] = make("output", {"data-name": name})))));
  const verdict = make("p", {class: "leash-verdict", "aria-live": "polite"});
  const key = make("ul", {class: "leash-key"}, ...[["teacher", "teacher"], ["student", "student"], ["best", "optimum of the same reward"], ["off", "student, \u03bb = 0"]].map(([c, text]) => {
    const mark = make("svg:svg", {width: 26, height: 10, "aria-hidden": "true"}, make("svg:line", {x1: 1, x2: 25, y1: 5, y2: 5, class: c}));
    return make("li", {}, mark, text);
  }));
  box.replaceChildren(beta.el, lam.el, loss, make("div", {class: "leash-plots"}, place, front), key, verdict, table);

  function frame(svg, wide, tall, label) {                   // empty, with its size in pixels
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    svg.setAttribute("height", tall);
    svg.setAttribute("aria-label", label);
    return (tag, attrs, ...inside) => { const el = make(`svg:${tag}`, attrs, ...inside); svg.append(el); return el; };
  }

  function drawPlace(d, best, far) {                         // the thin Gaussian and where the student lands
    const wide = place.clientWidth || 480, scale = wide/8.6, tall = Math.max(scale*3.6, 90);
    const x = u => (u + 2.4)*scale, y = v => tall - (v + .65)*scale;
    const add = frame(place, wide, tall, far ? "The student has left the picture"
      : `The student is at ${number(d[0], 2)} along and ${number(d[1], 2)} off the data`);
    add("line", {class: "axis", x1: 0, x2: wide, y1: y(0), y2: y(0)});
    for (const m of [1, 2]) add("ellipse", {class: "teacher", cx: x(0), cy: y(0), rx: m*scale*STD[0], ry: m*scale*STD[1]});
    const around = (c, at) => add("ellipse", {class: c, cx: x(at[0]), cy: y(at[1]), rx: 2*scale*STD[0], ry: 2*scale*STD[1]});
    if (!far) { around("best", best); around("student", d); add("circle", {class: "student-dot", cx: x(d[0]), cy: y(d[1]), r: 3}); }
    add("text", {x: 4, y: 14}, far ? "runs away: out of the picture" : "where samples lie (2 std)");
    const tip = [x(.9), y(1.9)], tail = [x(.5), y(1.5)];
    add("line", {class: "arrow", x1: tail[0], y1: tail[1], x2: tip[0], y2: tip[1]});
    add("path", {class: "arrow-head", d: `M${tip[0] + 4} ${tip[1] - 4}l-9 3l6 6z`});
    add("text", {x: tip[0] + 8, y: tip[1] + 4}, "reward");
  }

  function drawFront(p, kind) {                              // reward against KL
    const wide = front.clientWidth || 300, tall = 230, left = 40, bottom = 34, top = 8, right = 8;
    const x = g => left + g/1.5*(wide - left - right), y = n => top + (2 - Math.log10(n))/5*(tall - top - bottom);
    const add = frame(front, wide, tall, Number.isFinite(p.kl) ? `Reward ${number(p.reward, 2)} at a KL of ${number(p.kl, 2)}` : "No balance");
    for (const e of [-3, -2, -1, 0, 1, 2]) {
      add("line", {class: "rule", x1: left, x2: wide - right, y1: y(10**e), y2: y(10**e)});
      add("text", {x: left - 5, y: y(10**e) + 4, "text-anchor": "end"}, String(10**e));
    }
    for (const g of [0, .5, 1, 1.5]) add("text", {x: x(g), y: tall - bottom + 15, "text-anchor": g < 1.5 ? "middle" : "end"}, String(g));
    add("text", {x: (left + wide)/2, y: tall - 3, "text-anchor": "middle"}, "reward");
    add("text", {x: left + 5, y: top + 12}, "KL, nats");
    const curve = (cls, at) => {
      const points = [];
      for (let i = 1; i <= 120; i++) {
        const q = at(4*(i/120)**2);
        if (q.reward <= 1.5 && q.kl >= 1e-3 && q.kl <= 100) points.push(`${x(q.reward).toFixed(1)} ${y(q.kl).toFixed(1)}`);
      }
      if (points.length > 1) add("path", {class: cls, d: `M${points.join("L")}`});
    };
    curve("best", g => price(optimum(g/2)));
    curve("off", b => price(land(b, 0, kind, k)));
    if (+lam.input.value) curve("student", b => price(land(4*b, +lam.input.value, kind, k)));
    if (p.reward <= 1.5 && p.kl >= 1e-3 && p.kl <= 100) add("circle", {class: "student-dot", cx: x(p.reward), cy: y(p.kl), r: 5});
  }

  function show() {
    const b = +beta.input.value, l = +lam.input.value, kind = radios.find(r => r.checked).value;
    const d = land(b, l, kind, k), far = d.some(v => !Number.isFinite(v));
    const p = far ? {reward: Infinity, kl: Infinity, off: Infinity} : price(d), best = far ? d : optimum(p.reward);
    beta.out.value = b.toFixed(2);
    lam.out.value = l.toFixed(1);
    const values = {reward: p.reward, kl: p.kl, off: p.off, along: d[0], thin: d[1], best: far ? Infinity : price(best).kl};
    for (const name in outs) outs[name].value = number(values[name], 4);
    const edge = 1/(N*Math.max(...SLOPE));
    verdict.textContent = far ? `Above \u03b2 = ${edge.toFixed(3)} this loss holds nothing: there is no balance, and the student runs away.`
      : kind === "huber" && l === 0 ? `Below \u03b2 = ${edge.toFixed(3)} this loss holds everything: the student stays within ${number(p.off, 2)} standard deviations.`
      : `At this reward the optimum is ${number(price(best).off, 2)} standard deviations off the data, the student ${number(p.off, 2)}.`;
    box.dataset.far = far;
    drawPlace(d, best, far);
    drawFront(p, kind);
  }
  for (const input of [beta.input, lam.input, ...radios]) input.addEventListener("input", show);
  new ResizeObserver(show).observe(box);
  show();
}

const STYLE = `
.leash { --l-student: #0072b2; --l-best: #00735a; --l-off: #b04a00; --l-line: var(--bs-border-color, #bbb); max-width: 48rem;
  border: 1px solid var(--l-line); border-radius: .4rem; padding: .8rem; margin: .6rem 0 1rem; font-size: .9rem; line-height: 1.4; }
.quarto-dark .leash { --l-student: #6cc0f0; --l-best: #3fd0a8; --l-off: #f0a050; }
.leash-slider { display: flex; gap: .6rem; align-items: center; margin: .2rem 0; min-height: 2rem; }
.leash-slider span { flex: 0 0 8.5rem; } .leash-slider output { flex: 0 0 3rem; text-align: right; font-variant-numeric: tabular-nums; }
.leash-slider input { flex: 1 1 6rem; min-width: 5rem; width: auto; accent-color: var(--l-student); }
.leash-loss { display: flex; flex-wrap: wrap; gap: .3rem 1rem; border: 0; margin: 0; padding: 0; min-width: 0; }
.leash-loss legend { float: left; width: 8.5rem; flex: 0 0 8.5rem; font-size: inherit; margin: 0; padding: .3rem 0; line-height: inherit; }
.leash-loss label { white-space: nowrap; padding: .3rem 0; min-height: 2rem; } .leash-loss input { margin: 0 .35rem 0 0; accent-color: var(--l-student); }
.leash :is(input):focus-visible { outline: 3px solid var(--l-off); outline-offset: 2px; }
.leash-plots { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
.leash .leash-plot, .quarto-dark .cell-output .leash svg { background: none; border-radius: 0; }
.leash .leash-plot { flex: 1 1 16rem; min-width: 0; width: 100%; display: block; overflow: hidden; }
.leash .leash-plot:first-child { flex: 1.6 1 19rem; }
.leash-plot text { font-size: 12px; fill: currentColor; }
.leash :is(path, line, ellipse) { fill: none; }
.leash .teacher { stroke: currentColor; stroke-opacity: .55; stroke-width: 1.5; } .leash ellipse.teacher { fill: currentColor; fill-opacity: .1; }
.leash .student { stroke: var(--l-student); stroke-width: 2.5; } .leash ellipse.student { fill: var(--l-student); fill-opacity: .15; }
.leash .student-dot { fill: var(--l-student); } .leash .best { stroke: var(--l-best); stroke-width: 2; stroke-dasharray: 6 3; }
.leash .off { stroke: var(--l-off); stroke-width: 2; stroke-dasharray: 2 3; }
.leash :is(.axis, .rule) { stroke: var(--l-line); stroke-width: .8; } .leash .arrow { stroke: currentColor; stroke-width: 1.5; } .leash .arrow-head { fill: currentColor; }
.leash-key { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .8rem; margin: .3rem 0; padding: 0; }
.leash-key svg { vertical-align: middle; margin-right: .3rem; background: none; }
@media (max-width: 500px) { .leash-slider span { flex-basis: 7.5rem; } .leash-loss { gap: .3rem .8rem; } .leash-loss legend { flex-basis: 5rem; width: 5rem; } }
.leash-verdict { margin: .3rem 0; }
.leash-numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .1rem 1.2rem; margin: 0; }
.leash-numbers > div { display: flex; justify-content: space-between; gap: .6rem; border-bottom: 1px dotted var(--l-line); }
.leash-numbers dt { font-weight: normal; } .leash-numbers dd { margin: 0; font-variant-numeric: tabular-nums; white-space: nowrap; }
`;
if (!document.getElementById("leash-style")) document.head.append(make("style", {id: "leash-style"}, STYLE));
for (const box of document.querySelectorAll(".leash:not([data-ready])")) start(box);
})();
