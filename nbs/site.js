// Behaviour of the site's pages beyond Quarto's and smalldocs': letters of equations and code, the glossary, the keyboard.
// glossary.js (written by tools/docs.py from tutorials/glossary.ipynb) is loaded before and sets `glossary`.
(() => {
  "use strict";
  const all = (sel, root = document) => [...root.querySelectorAll(sel)];
  const { letters = [], words = [], page = "" } = window.glossary || {};
  const main = document.querySelector("main");
  const root = new URL(".", document.currentScript.src);

  // --- the keyboard: past the list of pages; paper is light ---------------------------------------
  if (main) {
    const skip = document.createElement("a");
    skip.className = "skip"; skip.textContent = "Skip to content"; skip.href = `#${main.id ||= "content"}`;
    main.tabIndex = -1;
    document.body.prepend(skip);
  }
  let dark = false;
  const toggle = () => document.querySelector(".quarto-color-scheme-toggle")?.click();
  addEventListener("beforeprint", () => { dark = document.body.classList.contains("quarto-dark") || document.documentElement.classList.contains("quarto-dark"); if (dark) toggle(); });
  addEventListener("afterprint", () => { if (dark) toggle(); });

  // --- one note for both -----------------------------------------------------------------------
  const note = document.createElement("div");
  note.className = "glossary-note"; note.id = "glossary-note"; note.setAttribute("role", "tooltip"); note.hidden = true;
  const say = (el, text) => {
    note.textContent = text; note.hidden = false;
    const r = el.getBoundingClientRect(), w = note.offsetWidth, h = note.offsetHeight;
    note.style.left = `${Math.max(8, Math.min(r.left, document.documentElement.clientWidth - w - 8)) + scrollX}px`;
    note.style.top = `${(r.bottom + h + 12 > innerHeight ? r.top - h - 8 : r.bottom + 8) + scrollY}px`;
    el.setAttribute("aria-describedby", note.id);
  };
  const quiet = (el) => { note.hidden = true; el.removeAttribute("aria-describedby"); };

  // --- words: the first of each on a page --------------------------------------------------------
  const markWords = () => {
    if (location.href.startsWith(new URL(page, root).href)) return;
    const left = new Map(words.map((w) => [w.word.toLowerCase(), w]));
    const some = words.map((w) => w.word).sort((a, b) => b.length - a.length).map((w) => w.replace(/[-]/g, "[- ]"));
    if (!some.length) return;
    const find = new RegExp(`(?<![\\w-])(${some.join("|")})(?![\\w-])`, "i");
    for (const block of all("main p, main li")) {
      if (block.closest("nav, figure, .cell-output, #title-block-header")) continue;
      const walk = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
      const nodes = [];
      while (walk.nextNode()) if (!walk.currentNode.parentElement.closest("a, code, pre, .katex, .math, em, button")) nodes.push(walk.currentNode);
      for (let node of nodes) {
        for (let m; (m = find.exec(node.data));) {
          const w = left.get(m[1].toLowerCase()) || left.get(m[1].toLowerCase().replace(" ", "-"));
          const rest = node.splitText(m.index);
          node = rest.splitText(m[1].length);
          if (!w) continue;
          left.delete(w.word.toLowerCase());
          const a = document.createElement("a");
          a.className = "term"; a.href = new URL(page, root).href + "#words"; a.textContent = m[1];
          for (const on of ["mouseenter", "focus"]) a.addEventListener(on, () => say(a, w.meaning));
          for (const off of ["mouseleave", "blur"]) a.addEventListener(off, () => quiet(a));
          rest.replaceWith(a);
        }
      }
    }
  };

  // --- letters: equations are set again, with a mark on each letter that the code has too ----------
  const pieces = (tex) => tex.match(/\\(?:text|textrm|mathrm|operatorname\*?|begin|end|tag|label|mathbb|mathcal)\s*\{[^{}]*\}|\\[a-zA-Z]+|\\[^a-zA-Z]|\s+|[^\\]/g) || [];
  const bare = (tex) => pieces(tex).filter((p) => p.trim() && p !== "{" && p !== "}").join(" ");
  const forms = letters.flatMap((l, i) => l.tex.map((t) => [bare(t).split(" "), i])).sort((a, b) => b[0].length - a[0].length);
  const mark = (tex, known) => {
    const p = pieces(tex); let out = "";
    for (let i = 0; i < p.length;) {
      let hit = null;
      for (const [form, letter] of forms) {
        if (!known.has(letter)) continue;
        let j = i, depth = 0, ok = true;
        for (const f of form) {
          while (j < p.length && (!p[j].trim() || p[j] === "{") && j > i) { depth += p[j] === "{"; j++; }
          if (p[j] !== f) { ok = false; break; }
          j++;
        }
        while (ok && depth > 0) { if (p[j] === "}") depth--; else if ((p[j] || "x").trim()) ok = false; j++; }
        if (ok) { hit = [j, letter]; break; }
      }
      if (hit) { out += `{\\htmlData{letter=${hit[1]}}{${p.slice(i, hit[0]).join("")}}}`; i = hit[0]; }
      else out += p[i++];
    }
    return out;
  };
  const names = new Map();
  letters.forEach((l, i) => l.code.forEach((c) => names.set(c, [...(names.get(c) || []), i])));
  const markCode = (pre, found) => {
    const walk = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT), nodes = [];
    while (walk.nextNode()) if (!walk.currentNode.parentElement.closest(".co, .st, .ss, .im")) nodes.push(walk.currentNode);
    for (const n of nodes) {
      const parts = n.data.split(/([A-Za-z_]\w*)/);
      if (!parts.some((s) => names.has(s))) continue;
      const to = document.createDocumentFragment();
      for (const s of parts) {
        if (!names.has(s)) { to.append(s); continue; }
        const e = document.createElement("span");
        e.className = "letter"; e.dataset.letter = names.get(s).join(" "); e.textContent = s;
        for (const i of names.get(s)) found.add(i);
        to.append(e);
      }
      n.replaceWith(to);
    }
  };
  const part = (code, from, to) => {                              // characters of a block of code, as a range
    const r = document.createRange(), walk = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    let at = 0;
    for (let n; (n = walk.nextNode()); at += n.length) {
      if (from >= at && from < at + n.length) r.setStart(n, from - at);
      if (to > at && to <= at + n.length) { r.setEnd(n, to - at); break; }
    }
    return r;
  };
  // The lines that make the letter of this mark: `x =`, `x, y =`, or the whole of `def x(`; none if it is only used here
  const madeBy = (e) => {
    const code = e.closest("code"), text = code.textContent, ahead = document.createRange();
    ahead.selectNodeContents(code); ahead.setEndBefore(e);
    const at = ahead.toString().length, from = text.lastIndexOf("\n", at - 1) + 1;
    const before = text.slice(from, at), lines = text.slice(from).split("\n"), after = lines[0].slice(at - from + e.textContent.length);
    if (/^\s*def $/.test(before)) {
      const own = before.search(/\S/), end = lines.findIndex((l, i) => i && l.trim() && l.search(/\S/) <= own);
      return part(code, from, from + lines.slice(0, end < 0 ? lines.length : end).join("\n").trimEnd().length);
    }
    const open = before.split("(").length - before.split(")").length;
    if (open > 0 && !/^\s*\([\w, ]*$/.test(before) || !/^(.*: )?[\w\s,.(]*$/.test(before) || !/^[\w\s,.)]*=(?!=)/.test(after)) return null;
    return part(code, from, from + lines[0].length);
  };
  const clear = () => { for (const e of all(".letter-on, .letter-line")) e.classList.contains("letter-line") ? e.remove() : e.classList.remove("letter-on"); };
  const show = (from) => {
    clear();
    const own = from.dataset.letter.split(" ");
    for (const i of own) for (const e of all(`[data-letter~="${i}"]`)) {
      e.classList.add("letter-on");
      const made = e.matches("code .letter") && madeBy(e);
      if (!made) continue;
      const pre = e.closest("pre"), r = made.getBoundingClientRect(), box = pre.getBoundingClientRect(), bar = document.createElement("i");
      bar.className = "letter-line"; bar.setAttribute("aria-hidden", "true");
      bar.style.top = `${r.top - box.top - pre.clientTop + pre.scrollTop}px`; bar.style.height = `${r.height}px`;
      pre.append(bar);
    }
    say(from, own.map((i) => `${letters[i].code.join(", ")}: ${letters[i].meaning}`).join("; "));
  };
  const hide = (from) => { clear(); quiet(from); };
  const step = (box, by) => {                                     // the arrow keys, inside an equation or a block of code
    const marks = all("[data-letter]", box), at = marks.findIndex((e) => e.classList.contains("letter-here"));
    const to = marks[Math.max(0, Math.min(marks.length - 1, at < 0 ? (by > 0 ? 0 : marks.length - 1) : at + by))];
    marks.forEach((e) => e.classList.toggle("letter-here", e === to));
    if (to) show(to);
  };
  const markLetters = () => {
    const blocks = all("main .cell pre.sourceCode code, main div.sourceCode pre.python code");
    const inCode = new Set();
    for (const code of blocks) markCode(code, inCode);
    const inMath = new Set();
    if (window.katex) for (const k of all("main .katex")) {
      const note = k.querySelector("annotation"), display = k.parentElement.matches(".katex-display");
      if (!note) continue;
      const tex = mark(note.textContent, inCode);
      if (!tex.includes("\\htmlData")) continue;
      const at = document.createElement("span");
      try { katex.render(tex, at, { displayMode: display, strict: false, trust: (c) => c.command === "\\htmlData" }); }
      catch (e) { continue; }
      const old = at.querySelector("annotation"), fresh = at.querySelector(".katex");
      if (!fresh) continue;
      if (old) old.textContent = note.textContent;
      k.replaceWith(fresh);
      for (const e of all("[data-letter]", fresh)) inMath.add(+e.dataset.letter);
    }
    for (const e of all("code [data-letter]")) {
      const own = e.dataset.letter.split(" ").filter((i) => inMath.has(+i));
      if (own.length) e.dataset.letter = own.join(" "); else e.replaceWith(...e.childNodes);
    }
    for (const e of all("main [data-letter]")) {
      e.addEventListener("mouseenter", () => show(e));
      e.addEventListener("mouseleave", () => hide(e));
    }
    for (const box of all("main .katex-display, main pre.sourceCode")) {
      if (!box.querySelector("[data-letter]")) continue;
      box.tabIndex = 0;
      if (box.matches(".katex-display")) { box.setAttribute("role", "group"); box.setAttribute("aria-label", "equation; the arrow keys step through its letters"); }
      box.addEventListener("keydown", (ev) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[ev.key];
        if (by && box.scrollWidth <= box.clientWidth + 1) { ev.preventDefault(); step(box, by); }
        if (ev.key === "Escape") { for (const e of all(".letter-here")) e.classList.remove("letter-here"); hide(box); }
      });
      box.addEventListener("blur", () => { for (const e of all(".letter-here", box)) { e.classList.remove("letter-here"); hide(e); } });
    }
  };

  // --- what scrolls can be scrolled by keyboard ----------------------------------------------------
  const reach = () => {
    for (const e of all("main pre, main table, main .katex-display, main .math.display, main .cell-output-display, .smalldocs-search-results")) {
      const scrolls = e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX);
      if (scrolls && !e.hasAttribute("tabindex")) { e.tabIndex = 0; e.dataset.reach = ""; }
      else if (!scrolls && "reach" in e.dataset) { e.removeAttribute("tabindex"); delete e.dataset.reach; }
    }
  };

  // --- a moving picture stops, and goes on, by a button; it stands where less motion is asked for ------
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const moving = () => {
    for (const img of all('main img[src$=".gif"], main img[alt^="Animation"]')) {
      if (img.parentElement.matches(".moving")) continue;
      const box = document.createElement("span"), b = document.createElement("button"), at = document.createElement("canvas");
      box.className = "moving"; b.type = "button"; b.textContent = "Pause"; at.hidden = true;
      img.replaceWith(box); box.append(img, at, b);
      const set = (stop) => {
        if (stop) {
          at.width = img.naturalWidth; at.height = img.naturalHeight; at.style.width = `${img.clientWidth}px`;
          at.getContext("2d").drawImage(img, 0, 0);
        }
        at.hidden = !stop; img.hidden = stop; b.textContent = stop ? "Play" : "Pause"; b.setAttribute("aria-pressed", stop);
      };
      const ready = () => { set(still); b.onclick = () => set(at.hidden); };
      img.complete && img.naturalWidth ? ready() : img.addEventListener("load", ready, { once: true });
    }
  };
  if (still) for (const v of all("main video")) { v.removeAttribute("autoplay"); v.pause(); }

  const start = () => {
    document.body.append(note);
    document.addEventListener("keydown", (ev) => { if (ev.key === "Escape") note.hidden = true; });
    if (main) { markWords(); markLetters(); moving(); reach(); addEventListener("resize", reach); }
    for (const d of all("details")) d.addEventListener("toggle", reach);
    document.documentElement.dataset.ready = "";
  };
  document.readyState === "complete" ? start() : addEventListener("load", start);
})();
