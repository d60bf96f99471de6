// The sum of notebook 61 over the same table: keys of the parts, a chain, its peak
(held => {
  "use strict";
  const root = document.getElementById("will-it-fit"), form = root.querySelector("form"), f = form.elements;
  const find = s => root.querySelector(s), GB = 2 ** 30;
  const COLOURS = {denoiser: "#0072b2", adapters: "#56b4e9", vae: "#009e73", text: "#f0e442", rewards: "#cc79a7", optimizer: "#999999", "kept for backward, and working memory": "#d55e00"};

  const asked = () => {
    const own = held.teachers[f.teacher.value], [frames, h, w] = f.clip.value.split("x").map(Number);
    const video = f.video.value, m = f.image.value ? own.image_frames : 0, n = video ? held.rewards[video].frames : 0;
    return {teacher: f.teacher.value, own, frames, h, w, image: f.image.value, video, rank: +f.rank.value, cached: f.cached.value,
      seen: `${m}+${n}=${Math.min(own.window || frames, frames, m + n)}`,
      denoiser: f.denoiser.checked, decode: f.decode.checked, save_rewards: f.save_rewards.checked, optimizer: f.optimizer.checked ? "adamw8bit" : "adamw"};
  };
  const keys = a => {
    const kind = "bfloat16 b1", size = `${a.h}x${a.w}`, at = `${a.teacher} ${a.frames}x${size} ${kind}`, lone = a.image || a.video ? "" : " alone";
    const found = {head: `head ${at} ${a.cached || "clips"}`, student: `student ${at} rank${a.rank} ${a.denoiser ? "again" : "kept"}${lone}`};
    if (lone) return found;
    found.decode = `decode ${at} ${a.seen} ${a.decode ? 1 : "all"}`;
    for (const k of ["image", "video"]) if (a[k]) found[k] = `${k} ${a[k]} ${size} ${kind} ${a.seen} ${a.save_rewards ? "again" : "kept"}`;
    return found;
  };
  const chained = parts => {
    let live = 0, peak = 0, flops = 0;
    for (const [name, left, reached, work] of parts) {
      peak = Math.max(peak, live + reached);
      if (name !== "start" && !name.startsWith("after ")) flops += work;
      live += left;
    }
    return {peak, flops};
  };
  const plan = a => {
    const p = {};
    for (const [n, k] of Object.entries(keys(a))) { if (!(k in held.pieces)) return null; p[n] = held.pieces[k]; }
    const named = (name, of) => of.map((v, i) => [i ? `after ${name}` : name, ...v]);
    const kinds = ["image", "video"].filter(k => p[k]), back = kinds.toReversed().map(k => p[k].backward);
    const steps = [...p.head.parts, ...named("target", p.student.target), ...named("student", p.student.forward)];
    if (kinds.length) { steps.push(...named("decode", p.decode.forward)); back.push(p.decode.backward); }
    for (const k of kinds) steps.push(...named(`${k} reward`, p[k].forward));
    const [left, reached, work] = p.student.backward;
    back.push([left, reached + (a.cached === "pairs" ? p.head.latent : 0), work]);
    const {peak, flops} = chained([...steps, ...back.map(b => ["backward", ...b])]);
    const weights = {denoiser: p.student.denoiser, adapters: p.student.adapters, vae: p.head.vae, text: a.cached ? 0 : p.head.text,
      rewards: kinds.reduce((s, k) => s + p[k].weights, 0), optimizer: p.student[a.optimizer]};
    return {weights, peak, flops, total: Object.values(weights).reduce((x, y) => x + y, peak)};
  };

  const commands = a => {
    const c = held.commands[a.teacher], own = held.teachers[a.teacher], half = f.card.value === "16" ? "float16" : "bfloat16", lines = [];
    const clip = (a.frames !== own.frames || a.h !== own.size[0] || a.w !== own.size[1] || c.size) ? ` --frames ${a.frames} --height ${a.h} --width ${a.w}` : "";
    const fps = c.fps ? ` --fps ${c.fps}` : "", data = a.cached ? `cache/${a.cached}` : "clips";
    if (a.cached) for (const [kind, to] of [[a.cached, data], ["text", "cache/texts"]])
      lines.push(`t2v-turbo cache ${kind} ${to} --teacher ${c.teacher} --data clips${clip}${fps}`);
    const saved = [["denoiser", a.denoiser], ["decode", a.decode], ["rewards", a.save_rewards]].filter(s => s[1]).map(s => s[0]);
    const rewards = [a.image, a.video].filter(Boolean).join(",");
    lines.push(`t2v-turbo distill --teacher ${c.teacher}${c.more} --data ${data}` + (a.cached ? " --texts cache/texts" : "") + clip + fps
      + (rewards ? ` --reward ${rewards} --vocabulary ${c.vocabulary}` : "") + (a.image ? "" : " --beta_img 0") + (a.video ? "" : " --beta_vid 0")
      + ` --batch 8 --accumulate 8 --dtype ${half}` + (saved.length ? ` --save_memory ${saved.length === 3 ? "all" : saved.join(",")}` : "")
      + (a.rank === own.rank ? "" : ` --rank ${a.rank}`) + (a.optimizer === "adamw" ? "" : " --optimizer adamw8bit") + ` --out runs/${a.teacher}`);
    return lines.join("\n");
  };

  const shown = n => (n / GB).toFixed(n / GB < 9.995 ? 2 : 1);
  const draw = (switched = false) => {
    const a = asked(), p = plan(a), gpu = +f.gpu.value, card = held.cards[f.card.value];
    const verdict = find(".verdict"), bar = find(".bar"), rows = find("tbody");
    bar.replaceChildren(); rows.replaceChildren();
    find("pre code").textContent = commands(a);
    delete root.dataset.total;
    if (!p) {
      const rewards = [a.image, a.video].filter(Boolean).join(",");
      verdict.textContent = "This combination is not in the table of the page.";
      find(".time").textContent = `Ask the command line: t2v-turbo plan --teacher ${a.teacher} --rewards ${rewards || '""'} --frames ${a.frames} --height ${a.h} --width ${a.w} --gpu ${gpu}`;
      bar.setAttribute("aria-label", "no prediction");
      return;
    }
    const need = p.total / GB + held.reserve, full = Math.max(gpu, need);
    root.dataset.total = p.total / GB;
    root.dataset.tflop = p.flops / 1e12;
    verdict.textContent = need <= gpu ? `Fits: ${shown(p.total)} GB of ${gpu} GB, with ${held.reserve} GB left for the driver` :
      `Does not fit: ${shown(p.total)} GB and ${held.reserve} GB for the driver are more than ${gpu} GB` +
        (switched ? ", whatever the switches" : ": press “Set the switches for this GPU”");
    find(".time").textContent = `${(p.flops / 1e12).toFixed(1)} TFLOP a clip; ` + (card ?
      `about ${(8 * p.flops / 1e12 / held.speed / card.tflops).toFixed(0)} s a step of 8 clips on a ${card.name}, at ${100 * held.speed} % of its data sheet: an assumption, not a measurement` :
      "seconds are not predicted for this GPU");
    const parts = {...p.weights, "kept for backward, and working memory": p.peak};
    for (const [name, n] of Object.entries(parts)) {
      const i = bar.appendChild(document.createElement("i")), row = rows.insertRow(), head = row.appendChild(document.createElement("th"));
      i.style.cssText = `width: ${100 * n / GB / full}%; background: ${COLOURS[name]}`;
      i.title = `${name}: ${shown(n)} GB`;
      head.scope = "row";
      const key = head.appendChild(document.createElement("span"));
      key.className = "key"; key.style.background = COLOURS[name];
      head.append(name === "text" ? "text encoder" : name === "optimizer" ? "optimiser" : name);
      row.insertCell().textContent = `${shown(n)} GB`;
    }
    const sum = rows.insertRow(), head = sum.appendChild(document.createElement("th"));
    sum.className = "sum"; head.scope = "row"; head.textContent = "in all"; sum.insertCell().textContent = `${shown(p.total)} GB`;
    const mark = bar.appendChild(document.createElement("b"));
    mark.style.left = `calc(${100 * gpu / full}% - 3px)`;
    bar.setAttribute("aria-label", `${shown(p.total)} GB in all, the GPU has ${gpu} GB; the parts are in the table below`);
  };

  const fill = (select, options, chosen) => {
    select.replaceChildren(...options.map(([v, t]) => new Option(t, v)));
    select.disabled = options.length < 2;                    // there is nothing to choose
    select.value = options.some(([v]) => v === chosen) ? chosen : options[0][0];
  };
  const sort = names => [...new Set(names)].sort((x, y) => x.localeCompare(y, "en", {numeric: true}));
  const all = Object.keys(held.pieces);
  const clips = () => {
    const own = held.teachers[f.teacher.value], first = [own.frames, ...own.size].join("x"), at = `student ${f.teacher.value} `;
    const found = sort(all.filter(k => k.startsWith(at)).map(k => k.slice(at.length).split(" ")[0]));
    fill(f.clip, [first, ...found.filter(c => c !== first)].map(c => [c, c.replace(/^(\d+)x(\d+)x(\d+)$/, "$1, $2 x $3") + (c === first ? " (the teacher's own)" : "")]), first);
    rewards(true);
  };
  const rewards = fresh => {
    const a = asked(), own = held.teachers[a.teacher], size = ` ${a.h}x${a.w} `;
    for (const k of ["image", "video"]) {
      const names = sort(all.filter(s => s.startsWith(`${k} `) && s.includes(size)).map(s => s.split(" ")[1]));
      const mine = own.rewards.find(n => held.rewards[n].kind === k) || "";
      fill(f[k], [...names.map(n => [n, n + (n === mine ? " (recommended)" : "")]), ["", "none"]], fresh ? mine : f[k].value);
    }
    const ranks = sort(all.filter(s => s.startsWith(`student ${a.teacher} ${f.clip.value} `)).map(s => s.match(/rank(\d+)/)[1]));
    fill(f.rank, ranks.reverse().map(r => [r, r === "0" ? "every weight" : `LoRA of rank ${r}`]), String(own.rank));
  };
  const SWITCHES = ["denoiser", "decode", "save_rewards", "cached", "optimizer"];
  let mine = false;                                           // whether a person changed one
  const set = on => {
    for (const n of ["denoiser", "decode", "save_rewards"]) f[n].checked = on[n];
    f.cached.value = on.cached; f.optimizer.checked = on.optimizer;
  };
  const search = () => {
    for (const on of held.switches) { set(on); const p = plan(asked()); if (p && p.total / GB + held.reserve <= +f.gpu.value) break; }
    draw(true);
  };

  fill(f.teacher, Object.keys(held.commands).map(n => [n, n]), "modelscope");
  fill(f.card, [...Object.entries(held.cards).map(([gb, c]) => [gb, `${gb} GB, like ${c.name}`]), ["", "another"]], "24");
  f.gpu.value = held.cards[f.card.value].memory;
  clips(); search();
  form.addEventListener("input", e => {
    if (e.target === f.teacher) clips();
    if (e.target === f.clip) rewards(false);
    if (e.target === f.card && f.card.value) f.gpu.value = held.cards[f.card.value].memory;
    if (e.target === f.gpu) f.card.value = "";
    if (SWITCHES.includes(e.target.name)) mine = true;
    if (e.target === f.teacher) mine = false;
    if (!mine && [f.teacher, f.card, f.gpu].includes(e.target)) search(); else draw();
  });
  form.addEventListener("submit", e => e.preventDefault());
  find("[name=find]").addEventListener("click", () => { mine = false; search(); });
  find("[name=copy]").addEventListener("click", () => {
    const code = find("pre code"), told = find("[role=status]");
    const select = () => { const s = getSelection(); s.removeAllRanges(); const r = document.createRange(); r.selectNodeContents(code); s.addRange(r); };
    const old = () => { select(); return document.execCommand("copy"); };
    const done = ok => { told.textContent = ok ? "copied" : "selected: press Ctrl+C"; };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(() => done(true), () => done(old()));
    else done(old());
  });
})(HELD);
