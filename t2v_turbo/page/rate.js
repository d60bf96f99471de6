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

// Both videos follow one clock: the first keeps time, and the speed of the second is adjusted to it.
// After a stall of a quarter of a second both wait, and both start again when both have ended.
const videos = [$("v1"), $("v2")], calm = matchMedia("(prefers-reduced-motion: reduce)");
const seen = new Set();                     // trials that have played long enough for an answer
let turn = 0, running = false, loading = false, frame = 0, watched = 0, times = [0, 0];

const over = v => v.ended || v.error;
const event = (v, name) => new Promise(ok => {
  for (const n of [name, "error"]) v.addEventListener(n, ok, {once: true});
});
function label() { $("pause").lastElementChild.textContent = running ? "pause" : "play"; gate(); }
function stop() { turn++; running = loading = false; videos.forEach(v => v.pause()); label(); }
function play() {
  if (videos.every(over)) { replay(); return; }
  running = true; loading = false; times = videos.map(v => v.currentTime);
  for (const v of videos.filter(v => !over(v))) {
    v.playbackRate = 1;
    v.play().catch(e => { if (e.name === "NotAllowedError") stop(); });
  }
  cancelAnimationFrame(frame); frame = requestAnimationFrame(tick);
  label();
}
async function seek(v, time) {
  if (v.error || v.currentTime === time) return;
  const done = event(v, "seeked");
  v.currentTime = time;
  await done;
}
async function playFrom(time) {             // both wait until both are there
  if (videos.every(v => v.error)) return;
  const mine = ++turn;
  running = false; videos.forEach(v => v.pause());
  await Promise.all(videos.map(v => seek(v, time)));
  if (mine === turn) play();
}
const replay = () => playFrom(0);
function follow(first, second) {
  const behind = first.currentTime - second.currentTime;
  if (Math.abs(behind) > .25) playFrom(first.currentTime);
  else second.playbackRate = Math.abs(behind) < .01 ? 1 : 1 + 4 * behind;
}
function tick() {
  if (!running) return;
  const [a, b] = videos, now = videos.map(v => v.currentTime);
  if (videos.every(over)) { watch(Infinity); calm.matches ? stop() : replay(); return; }
  if (!over(a) && !over(b)) follow(a, b);
  const moved = Math.min(...videos.map((v, i) => over(v) ? .25 : now[i] - times[i]));
  watch(Math.max(0, Math.min(.25, moved))); times = now;
  if (running) frame = requestAnimationFrame(tick);
}

function watch(seconds) { watched += seconds; gate(); }
function gate() {                           // answers count once both have played long enough
  const left = seen.has(shown) ? 0 : Math.max(0, study.view - watched);
  if (!left) seen.add(shown);
  const whole = Math.max(...videos.map(v => v.duration || 0)) || Infinity;
  const wait = Math.ceil(Math.min(left, whole));
  const text = !left ? "" : running || loading ? `answers open in ${wait} s` : "play both to answer";
  if ($("wait").textContent !== text) $("wait").textContent = text;
  for (const b of document.querySelectorAll("[data-choice]"))
    b.setAttribute("aria-disabled", left > 0);
}

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
  const ready = event(video, "loadeddata");
  video.src = URL.createObjectURL(new Blob([bytes], {type: head.slice(5, head.indexOf(";"))}));
  return ready;
}
function showPair(i) {
  const t = list[i], other = t.left === "a" ? "b" : "a";
  stop();
  const mine = turn;
  shown = i; watched = 0; loading = !calm.matches;
  $("broken").hidden = true;
  $("caption").textContent = study.pairs[t.pair].caption;
  Promise.all([load($("v1"), t.left + t.pair), load($("v2"), other + t.pair)])
    .then(() => { if (mine === turn && loading) play(); });
  gate();
}
function turnTo(id) {                       // show one section, and take the focus along
  const change = $(id).hidden;
  for (const s of ["start", "trial", "end"]) $(s).hidden = s !== id;
  if (change) $(id).focus({preventScroll: true});
}
function show() {
  const n = state.answers.length, q = n % questions.length, i = Math.floor(n / questions.length);
  const done = i >= list.length;
  turnTo(done ? "end" : "trial");
  $("bar").style.width = `${100 * n / (list.length * questions.length)}%`;
  if (done) {
    stop(); shown = -1;
    $("done").textContent = `${n} answers by ${state.rater}. Download the file and hand it over.`;
    $("text").value = csvText();
    return;
  }
  if (i !== shown) showPair(i);
  $("at").textContent = `pair ${i + 1} of ${list.length}, question ${q + 1} of ${questions.length}`;
  $("question").textContent = questions[q][1];
  $("back").setAttribute("aria-disabled", n === 0);
  since = performance.now();
}

function answer(choice) {
  if ($("trial").hidden || !seen.has(shown)) return;
  state.answers.push([choice, Math.round((performance.now() - since) / 100) / 10]);
  save(); show();
}
function back() { if (state.answers.length) { state.answers.pop(); save(); show(); } }
function begin() {
  if (!state.rater) newRater();
  list = trials(state.rater); seen.clear();
  state.answers = state.answers.slice(0, list.length * questions.length);
  save(); show();
}
document.querySelectorAll("[data-choice]").forEach(b => {
  b.onclick = () => answer(b.dataset.choice);
});
const pause = () => running ? stop() : play();
function keys() {                           // those of the section that is shown
  if ($("trial").hidden) return $("end").hidden ? {} : {Backspace: back, ArrowLeft: back};
  return {p: pause, r: replay, Backspace: back, ArrowLeft: back,
          0: () => answer("0"), 1: () => answer("1"), 2: () => answer("2")};
}
document.onkeydown = e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches("input, textarea")) return;
  if (e.repeat) { if (e.target.matches("button")) e.preventDefault(); return; }
  const act = keys()[e.key.length > 1 ? e.key : e.key.toLowerCase()];
  if (act) act();
};
videos.forEach(v => {
  v.onerror = () => { if (v.src) { $("broken").hidden = false; watch(Infinity); } };
  v.onclick = pause;
});
$("pause").onclick = pause; $("replay").onclick = replay;
$("name").onkeydown = e => { if (e.key === "Enter" && !e.repeat) begin(); };
$("go").onclick = begin; $("back").onclick = $("undo").onclick = back;
$("csv").onclick = $("some").onclick = () => download("csv");
$("json").onclick = () => download("json");
$("next").onclick = () => {
  if (!confirm("Has the file been downloaded? The answers on this device will be removed.")) return;
  state = {rater: "", answers: []}; save(); $("name").value = "";
  $("name").parentElement.hidden = false; $("go").textContent = "Start";
  turnTo("start");
};
restore();
const many = study.pairs.length + study.repeats;
$("much").textContent = `${many} pairs of videos, three questions each.` + (study.view
  ? ` Answers open once both videos have played for ${study.view} s, or once to the end.` : "");
if (state.rater) {
  $("name").parentElement.hidden = true;
  $("go").textContent = `Go on as ${state.rater} (${state.answers.length} answers so far)`;
}
