"use strict";
// Names of files reach the page as text nodes only: nothing of them is ever read as markup.
const WORDS = { good: "GOOD", defect: "DEFECT", unknown: "NO VERDICT", error: "BROKEN" };
const LETTERS = { good: "G", defect: "D", unknown: "?", error: "!" };
const DRIFT = { unknown: "Unknown", "too few frames": "Too few", none: "None", some: "Some", strong: "Strong" };
const EVERY = 500, CROWDED = 1000, STALE = 10; // milliseconds; seconds
let crowded = false; // when many pages look, history shows letters: its pictures are most of what a page asks for
const byId = (id) => document.getElementById(id);
const set = (id, text) => { const node = byId(id); if (node.textContent !== text) node.textContent = text; };
const number = (value, digits) => value === null || value === undefined ? "–" : value.toFixed(digits);
const base = (name) => name.split(/[\\/]/).pop();

function ago(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s ago";
  return seconds < 5400 ? Math.round(seconds / 60) + " min ago" : Math.round(seconds / 3600) + " h ago";
}

function band(kind, word, score, detail, name) {
  byId("band").className = kind;
  set("word", word); set("score", score); set("detail", detail); set("name", name);
  document.title = word + " – Inspection";
}

function details(frame) {
  if (frame.error) return frame.error.startsWith(frame.name) ? frame.error.slice(frame.name.length).trim() : frame.error;
  const said = [];
  if (frame.boxes && frame.boxes.length) said.push(frame.boxes.slice(0, 3).join(", "));
  if (frame.verdict === "defect" && frame.area) said.push((100 * frame.area).toFixed(1) + " % of the area");
  if (frame.count_is_anomalous) said.push("count anomaly: part missing or extra");
  else if (frame.verdict === "defect" && frame.causes)
    said.push(frame.causes[0]);
  return said.join(" · ");
}

function picture(id, frame, none) {
  const image = byId(id), source = frame ? "/frame/" + frame.number + ".jpg" : "";
  image.hidden = !source;
  byId(id + "-none").hidden = Boolean(source);
  if (!source) set(id + "-none", none);
  else if (image.getAttribute("src") !== source) { image.src = source; image.alt = WORDS[frame.verdict] + " " + frame.name; }
}

function tile(frame) {
  const item = document.createElement("li"), letter = document.createElement("span");
  const hasPicture = frame.picture && !crowded;
  item.className = frame.verdict + (hasPicture ? "" : " empty");
  item.title = WORDS[frame.verdict] + " " + frame.name + (frame.error ? ": " + frame.error : "");
  item.dataset.number = frame.number; item.dataset.picture = hasPicture;
  if (hasPicture) {
    const image = document.createElement("img");
    image.src = "/frame/" + frame.number + ".jpg"; image.alt = "";
    item.append(image);
  }
  letter.textContent = LETTERS[frame.verdict];
  item.append(letter);
  return item;
}

function history(frames) {
  const list = byId("history"), newest = frames.slice().reverse();
  const known = new Map([...list.children].map((item) => [Number(item.dataset.number), item]));
  list.replaceChildren(...newest.map((frame) => {
    const item = known.get(frame.number);
    const stays = item && (item.dataset.picture === "true" ? frame.picture : !frame.picture || crowded);
    return stays ? item : tile(frame);
  }));
}

function show(state) {
  const last = state.history[state.history.length - 1], counts = state.counts;
  if (state.ended) band("wait", "ENDED", "", state.ended, last ? "last frame: " + WORDS[last.verdict] + " " + last.name : "");
  else if (!last) band("wait", "WAITING", "", "for the first frame", "");
  else if (state.age > STALE)
    band("wait", "WAITING", "", "no new frame for " + Math.round(state.age) + " s", "last: " + WORDS[last.verdict] + " " + last.name);
  else band(last.verdict, WORDS[last.verdict], last.score === null ? "" : "score " + number(last.score, 3), details(last), last.name);
  const shown = last && last.picture ? last : null;
  picture("now", shown, last && last.error ? last.error : "No picture yet");
  set("now-caption", shown ? WORDS[shown.verdict] + " · " + base(shown.name) : "This frame");
  const bad = state.last_defect;
  picture("defect", bad && bad.picture ? bad : null, bad ? bad.name : "None so far");
  set("defect-caption", bad ? "Last defect, " + ago(state.defect_age) + " · " + base(bad.name) : "Last defect");
  byId("defect-figure").className = bad ? "found" : "";
  set("frames", String(state.frames));
  set("counts", ["good", "defect", "error", "unknown"].filter((kind) => counts[kind])
    .map((kind) => counts[kind] + " " + WORDS[kind].toLowerCase()).join(", "));
  set("speed", state.ended ? "–" : number(state.per_second, 1) + " / s");
  set("latency", "Latency: median " + number(state.latency_median, 0) + " ms, 95 % below " + number(state.latency_95, 0) + " ms");
  const drift = state.drift;
  byId("drift-card").className = "card " + drift.word.split(" ")[0];
  set("drift", DRIFT[drift.word] + (drift.distance === null ? "" : " (" + number(drift.distance, 2) + ")"));
  set("meaning", drift.meaning + (drift.distance === null ? ""
    : " (0: all alike, 1: none; by chance up to " + number(drift.limit, 2) + "; last " + drift.frames + " frames)"));
  history(state.history);
  set("source", "Source: " + state.source); set("model", "Model: " + state.model);
}

async function follow() {
  let wait = EVERY; // the more pages look, the longer each is asked to wait
  try {
    const answer = await fetch("/state", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    wait = Math.max(EVERY, Number(answer.headers.get("Poll-After")) || EVERY);
    crowded = wait > CROWDED;
    show(await answer.json());
  } catch (error) {
    band("lost", "NO CONNECTION", "", "the inspection does not answer", "");
  }
  setTimeout(follow, wait);
}
follow();
