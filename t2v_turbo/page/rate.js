"use strict";
const $ = id => document.getElementById(id);
const study = JSON.parse($("study").textContent), questions = Object.entries(study.questions);
const place = `t2v-turbo-rate ${study.id} ${study.part}`;

function dice(text) {                       // repeatable numbers in [0,1): FNV-1a, then xorshift
  let h = 2166136261;
  for (const c of text) h = Math.imul(h ^ c.codePointAt(0), 16777619);
  const roll = () => {
    h ^= h << 13; h ^= h >>> 17; h ^= h << 5;
    return (h >>> 0) / 4294967296;
  };
  h = h || 1;
  for (let i = 0; i < 20; i++) roll();
  return roll;
}

function trials(rater) {                    // [{pair, rep, left}], the same for the same rater
  const roll = dice(place + rater), n = study.pairs.length, half = Math.ceil(n / 2);
  const shuffle = x => {
    for (let i = x.length - 1; i > 0; i--) {
      const j = Math.floor(roll() * (i + 1));
      [x[i], x[j]] = [x[j], x[i]];
    }
    return x;
  };
  const sides = shuffle(study.pairs.map((_, i) => "ab"[i % 2]));
  const list = shuffle([...study.pairs.keys()]).map((pair, i) => ({pair, rep: 0, left: sides[i]}));
  for (const t of shuffle(list.slice(0, half)).slice(0, study.repeats))
    list.splice(half + Math.floor(roll() * (list.length + 1 - half)), 0,
                {pair: t.pair, rep: 1, left: t.left === "a" ? "b" : "a"});
  return list;
}

let state = {rater: "", answers: []}, list = [], since = 0, shown = -1;

function save() {
  try { localStorage.setItem(place, JSON.stringify(state)); return true; }
  catch { $("nostore").hidden = false; return false; }
}
function restore() {
  try {
    const s = JSON.parse(localStorage.getItem(place));
    if (/^[\w-]{1,40}$/.test(s.rater) && Array.isArray(s.answers)
        && s.answers.every(a => "012".includes(a[0]) && a[0] !== "" && a[1] >= 0)) state = s;
  } catch { /* nothing there, or not ours */ }
}
function newRater() {
  const hex = [...crypto.getRandomValues(new Uint8Array(4))]
    .map(b => b.toString(16).padStart(2, "0")).join("");
  const name = $("name").value.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "");
  state = {rater: name ? `${name}-${hex}` : hex, answers: []};
}
function rows() {
  return state.answers.map(([choice, seconds], i) => {
    const t = list[Math.floor(i / questions.length)], q = questions[i % questions.length][0];
    return {study: study.id, rater: state.rater, pair: study.pairs[t.pair].id, question: q,
            rep: t.rep, left: t.left, choice: Number(choice), seconds};
  });
}
const csvText = () => [study.columns.join(","),
  ...rows().map(r => study.columns.map(c => r[c]).join(","))].join("\n") + "\n";
function download(kind) {
  const text = kind === "csv" ? csvText() : JSON.stringify(rows(), null, 1);
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([text], {type: kind === "csv" ? "text/csv"
                                                                      : "application/json"}));
  a.download = `ratings-${study.id}-${state.rater}.${kind}`;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10000);
}

function load(video, id) {                  // from the data URI in the page to a video
  const [head, body] = $(id).textContent.split(",");
  const bytes = Uint8Array.from(atob(body.trim()), c => c.charCodeAt(0));
  if (video.src) URL.revokeObjectURL(video.src);
  const ready = new Promise(ok => { video.onloadeddata = ok; });
  video.src = URL.createObjectURL(new Blob([bytes], {type: head.slice(5, head.indexOf(";"))}));
  return ready;
}
const both = f => [$("v1"), $("v2")].forEach(f);
function play() { both(v => { v.currentTime = 0; v.play().catch(() => {}); }); }
function showPair(i) {
  const t = list[i], other = t.left === "a" ? "b" : "a";
  $("broken").hidden = true;
  $("caption").textContent = study.pairs[t.pair].caption;
  Promise.all([load($("v1"), t.left + t.pair), load($("v2"), other + t.pair)]).then(play);
  shown = i;
}
function show() {
  const n = state.answers.length, q = n % questions.length, i = Math.floor(n / questions.length);
  const over = i >= list.length;
  $("start").hidden = true; $("trial").hidden = over; $("end").hidden = !over;
  $("bar").style.width = `${100 * n / (list.length * questions.length)}%`;
  if (over) {
    both(v => v.pause()); shown = -1;
    $("done").textContent = `${n} answers by ${state.rater}. Download the file and hand it over.`;
    $("text").value = csvText();
    return;
  }
  if (i !== shown) showPair(i);
  $("at").textContent = `pair ${i + 1} of ${list.length}, question ${q + 1} of ${questions.length}`;
  $("question").textContent = questions[q][1];
  $("back").disabled = n === 0;
  since = performance.now();
}

function answer(choice) {
  if ($("trial").hidden) return;
  state.answers.push([choice, Math.round((performance.now() - since) / 100) / 10]);
  save(); show();
}
function back() { if (state.answers.length) { state.answers.pop(); save(); show(); } }
function begin() {
  if (!state.rater) newRater();
  list = trials(state.rater);
  state.answers = state.answers.slice(0, list.length * questions.length);
  save(); show();
}
document.querySelectorAll("[data-choice]").forEach(b => {
  b.onclick = () => { b.blur(); answer(b.dataset.choice); };
});
document.onkeydown = e => {
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey || e.target.matches("input, textarea")) return;
  if ("012".includes(e.key)) answer(e.key);
  else if (e.key === "Backspace" || e.key === "ArrowLeft") back();
};
both(v => { v.onerror = () => { if (v.src) $("broken").hidden = false; }; v.onclick = play; });
$("go").onclick = begin; $("back").onclick = $("undo").onclick = back;
$("csv").onclick = $("some").onclick = () => download("csv");
$("json").onclick = () => download("json");
$("next").onclick = () => {
  if (!confirm("Has the file been downloaded? The answers on this device will be removed.")) return;
  state = {rater: "", answers: []}; save(); $("name").value = "";
  $("name").parentElement.hidden = false; $("go").textContent = "Start";
  $("end").hidden = true; $("start").hidden = false;
};
restore();
const many = study.pairs.length + study.repeats;
$("much").textContent = `${many} pairs of videos, three questions each.`;
if (state.rater) {
  $("name").parentElement.hidden = true;
  $("go").textContent = `Go on as ${state.rater} (${state.answers.length} answers so far)`;
}
