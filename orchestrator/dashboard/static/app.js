// The page: asks for the figures (events while live, requests in a replay), then for curves as often as they are looked at.
import { Chart, bridge, onGrid } from "./charts.js";
import { bytes, clock, count, duration, el, loss, percent, setText } from "./format.js";
import { Map_ } from "./map.js";
import { eventsList, exchangesPart, ledgerPart, membersTable, stagesPart, tiles } from "./parts.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const CURVES_MS = 1500, LINKS_MS = 5000, PLAY_MS = 120, PLAY_S = 12, MOST_STEPS = 4;
const SERIES = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"];
const ACTIONS = { pause: "Islands finish their step and wait; nothing is lost.", resume: "Islands go on.", save: "A snapshot of the anchor is written to disk.", stop: "Islands finish their step and save everything; atoll train --resume goes on from there.", drain: "It finishes its step, hands over what it has and leaves the run.", kill: "Its process ends at once, as if it had crashed. What it has not handed in is lost and done again." };

const page = { run: null, at: null, playing: null, picked: new Set(), window: 0, curvesDue: 0, linksDue: 0, busy: false, stale: true };
const charts = {
  loss: new Chart($("c-loss"), { say: loss, short: (value) => String(Math.round(value * 1000) / 1000), label: "Loss over time, nats per token" }),
  rate: new Chart($("c-rate"), { say: count, low: 0, label: "Tokens per second" }),
  use: new Chart($("c-use"), { say: (value) => percent(value, 0), low: 0, high: 1, label: "Compute utilisation" }),
  bytes: new Chart($("c-bytes"), { say: bytes, log: true, label: "Bytes on the wire" }),
};
const timeline = new Timeline($("timeline")), map = new Map_($("map"));

// ---------------------------------------------------------------- asking

async function ask(path, body) {
  const how = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, { credentials: "same-origin", ...how });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error ?? value.outcome ?? answer.statusText);
  return value;
}

async function enter() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  history.replaceState(null, "", location.pathname);
  await ask("/api/login", { token });
}

// A browser opens six connections to a server at most, and each page that listens holds one: hidden pages let go.
function listen() {
  if (document.hidden) { document.addEventListener("visibilitychange", listen, { once: true }); return; }
  const events = new EventSource("/api/events");
  const hide = () => { if (!document.hidden) return; events.close(); document.removeEventListener("visibilitychange", hide); listen(); };
  document.addEventListener("visibilitychange", hide);
  events.onmessage = (event) => {
    problem("");
    page.newest = JSON.parse(event.data);
    if (page.at === null) show(page.newest);
    else scrubber(page.run ?? page.newest);
  };
  events.onerror = async () => {
    state("no connection", "bad");
    if (events.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    events.close();
    try {
      await ask("/api/run");
      setTimeout(listen, 2000);
    } catch (error) {
      problem(error instanceof TypeError ? "The dashboard does not answer. This page tries again." : `${error.message}: open the link that atoll dashboard printed.`);
      setTimeout(listen, 3000);
    }
  };
}

// ---------------------------------------------------------------- showing

function show(run) {
  page.run = run;
  page.stale = true;
  setText($("name"), run.run_id);
  document.title = `${run.run_id} · Atoll`;
  const about = run.about;
  const kind = about.pipeline ? "pipeline" : "islands";
  if (document.documentElement.dataset.kind !== kind) document.documentElement.dataset.kind = kind;
  setText($("about"), [about.pipeline && "pipeline", about.strategy, about.codec, about.inner_steps && !about.pipeline && `${about.inner_steps} steps a round`, about.params && `${count(about.params)} parameters`].filter(Boolean).join(" · "));
  const tones = { running: "good pulse", done: "good", failed: "bad", stopped: "warn", interrupted: "warn", "no answer": "bad" };
  if (run.reading) state("reading the history", "pulse");
  else state(page.at === null ? run.state : "replay", page.at === null ? tones[run.state] ?? "" : "warn");
  document.documentElement.dataset.reading = String(run.reading);
  problem(run.problem);
  tiles(run);
  membersTable(run.members, run.able, page.picked, act, pick);
  eventsList(run.events);
  exchangesPart(run.exchanges, run.ledger);
  ledgerPart(run.ledger);
  stagesPart(run.stages);
  actions(run.able);
  scrubber(run);
  map.set(run.members, page.links ?? []);
  curves();
}

function state(word, tone) { const pill = $("state"); setText(pill, word); pill.className = `pill ${tone ?? ""}`; }
function problem(text) { setText($("problem"), text); $("problem").hidden = !text; }

function scrubber(run) {
  const end = Math.max((page.newest ?? run).end_s, 0.001), at = page.at ?? end;
  if (document.activeElement !== $("slider") || page.playing || page.at === null) $("slider").value = String(Math.round((1000 * at) / end));
  $("slider").setAttribute("aria-valuetext", clock(at));
  $("done").style.width = `${(100 * at) / end}%`;
  setText($("clock"), clock(at));
  $("live").setAttribute("aria-pressed", String(page.at === null));
  setText($("live"), run.state === "running" ? "live" : "end");
  const f = run.figures, left = f.eta_s == null ? "" : `, ${duration(f.eta_s)} left`;
  setText($("eta"), f.progress == null ? "" : `${percent(f.progress)} of ${count(run.about.tokens_target)} tokens, ${run.about.pipeline ? "step" : "round"} ${f.rounds}${left}`);
  setText($("fresh"), `Newest row at ${clock((page.newest ?? run).end_s)}.`);
  const faults = (page.newest ?? run).events.filter((event) => event.tone === "bad" && event.after), said = faults.map(({ t_s }) => t_s).join() + Math.round(end);
  if ($("marks").dataset.said !== said) {
    $("marks").dataset.said = said;
    $("marks").replaceChildren(...faults.map(({ t_s }) => { const mark = el("i"); mark.style.left = `${(100 * t_s) / end}%`; return mark; }));
  }
}

function actions(able) {
  const box = $("acts"), said = able.join();
  if (box.dataset.said === said) return;
  box.dataset.said = said;
  const shown = able.length ? ["pause", "resume", "save", "stop"] : [];
  box.replaceChildren(...shown.map((name) => el("button", { type: "button", class: name === "stop" ? "danger" : "", disabled: !able.includes(name), title: able.includes(name) ? ACTIONS[name] : "not available in this run", onclick: () => act(name, "") }, name)));
}

// ---------------------------------------------------------------- curves

function moment() {
  const end = page.at ?? page.run.end_s, whole = (page.newest ?? page.run).end_s;
  const from = page.window ? Math.max(0, end - page.window) : 0;
  return { from, to: Math.max(end, from + 0.01), range: [from, Math.max(page.window || page.at === null ? end : whole, from + 0.5)] };
}

const many = () => page.run.members.length > 60;

async function curves(force = false) {
  if (!page.run || page.busy || document.hidden || !page.stale || (!force && performance.now() < page.curvesDue)) return;
  page.busy = true;
  page.stale = false;
  const { from, to, range } = moment(), share = (to - from) / (range[1] - range[0]);
  const query = (bins) => `from=${from.toFixed(3)}&to=${to.toFixed(3)}&bins=${Math.max(2, Math.round(bins * share))}`;
  try {
    const pick = [...page.picked].map(encodeURIComponent).join(",");
    const [series, lanes] = await Promise.all([ask(`/api/series?${query(many() ? Math.min(500, charts.loss.bins) : charts.loss.bins)}&pick=${pick}`), ask(`/api/timeline?${query(timeline.bins)}`)]);
    page.series = series;
    draw(series, range);
    timeline.set(lanes, range);
    if (performance.now() > page.linksDue) {
      page.linksDue = performance.now() + LINKS_MS * (many() ? 3 : 1);
      const { names, links } = await ask(`/api/links?at=${to.toFixed(3)}`);
      page.links = links.map(([a, b, ...rest]) => [names[a], names[b], ...rest]);
      map.set(page.run.members, page.links);
    }
    document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn ?? 0) + 1);
  } catch (error) {
    problem(error.message);
  } finally {
    page.busy = false;
    page.curvesDue = performance.now() + (page.at === null ? CURVES_MS * (many() ? 2 : 1) : 0);
  }
}

function draw(series, range) {
  const { x, faults, band } = series, pipeline = page.run.about.pipeline, many = "p90" in band;
  const names = Object.keys(series.loss).filter((name) => !pipeline || series.loss[name].some((value) => value != null)); // of peers nobody knows a loss
  const lines = [{ key: "high", quiet: true }, { key: "low", quiet: true }], values = [bridge(band.high), bridge(band.low)], bands = [[0, 1, "band"]];
  if (many) {
    lines.push({ key: "p90", quiet: true }, { key: "p10", quiet: true }, { key: "p50", label: "median of the members", colour: "s0", width: 1.8 });
    values.push(bridge(band.p90), bridge(band.p10), bridge(band.p50));
    bands.push([2, 3, "band2"]);
  }
  names.forEach((name, i) => { lines.push({ key: name, label: name, colour: SERIES[(i + (many ? 1 : 0)) % 8], width: 1.4, dash: i > 7 ? [6, 3] : undefined }); values.push(bridge(series.loss[name])); });
  lines.push({ key: "anchor", label: "anchor (validation)", colour: "ink", width: 2.4, points: series.anchor.length < 60 });
  values.push(onGrid(x, series.anchor));
  charts.loss.set({ x, lines, values, bands, faults, range });
  charts.rate.set({ x, faults, range, lines: [{ key: "capacity", label: "inside steps", colour: "s6", width: 1, dash: [4, 4] }, ...(pipeline ? [] : [{ key: "rate", label: "committed", colour: "accent", width: 2, fill: "band" }])], values: [bridge(series.capacity), bridge(series.rate)].slice(0, pipeline ? 1 : 2) });
  charts.use.set({ x, faults, range, lines: [{ key: "use", label: "computing", colour: "accent", width: 2, fill: "band" }], values: [bridge(series.utilization)] });
  charts.bytes.set({ x, faults, range, lines: [{ key: "dp", label: "data parallel", colour: "soft", width: 1.6, dash: [6, 4] }, { key: "sent", label: "sent", colour: "accent", width: 2.2 }], values: [bridge(series.bytes.data_parallel), bridge(series.bytes.sent)] });
}

// ---------------------------------------------------------------- doing

async function act(action, member) {
  const dialog = $("ask");
  setText(dialog.querySelector("h2"), `${action}${member ? ` ${member}` : " the run"}?`);
  setText(dialog.querySelector("p"), ACTIONS[action]);
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "yes") return;
  try {
    toast(`${action} ${member}: ${(await ask("/api/act", { action, member })).outcome}`);
  } catch (error) {
    toast(`${action} ${member}: ${error.message}`);
  }
}

function toast(text) {
  setText($("toast"), text);
  $("toast").hidden = false;
  clearTimeout(page.toast);
  page.toast = setTimeout(() => { $("toast").hidden = true; }, 6000);
}

function pick(name) {
  if (!page.picked.delete(name)) page.picked.add(name);
  while (page.picked.size > 8) page.picked.delete(page.picked.values().next().value);
  page.stale = true;
  membersTable(page.run.members, page.run.able, page.picked, act, pick);
  curves(true);
}

// ---------------------------------------------------------------- replay

async function moveTo(at) {
  if (at !== "now") page.at = at;
  page.wanted = at;
  if (page.moving) return;
  page.moving = true;
  try {
    while (page.wanted !== null) {
      const to = page.wanted;
      page.wanted = null;
      const run = to === "now" ? await ask("/api/run") : await ask(`/api/run?at=${to.toFixed(3)}`);
      if (to === "now") { page.at = null; page.newest = run; }
      page.linksDue = 0;
      show(run);
      page.stale = true;
      await curves(true);
    }
  } catch (error) {
    problem(error.message);
  } finally {
    page.moving = false;
  }
}

function play(on) {
  clearInterval(page.playing);
  page.playing = null;
  $("play").setAttribute("aria-label", on ? "Pause the replay" : "Replay the run");
  setText($("play"), on ? "pause" : "replay");
  if (!on) return;
  const end = (page.newest ?? page.run).end_s;
  let at = page.at === null || page.at >= end ? 0 : page.at, shown = performance.now();
  page.playing = setInterval(() => {
    if (page.moving) return;
    const now = performance.now();
    at += (end * Math.min(now - shown, MOST_STEPS * PLAY_MS)) / (1000 * PLAY_S);  // slower rather than with gaps
    shown = now;
    if (at >= end) { play(false); moveTo("now"); } else moveTo(at);
  }, PLAY_MS);
}

$("slider").addEventListener("input", (event) => {
  play(false);
  const share = Number(event.target.value) / 1000;
  moveTo(share >= 1 ? "now" : share * page.newest.end_s);
});
$("live").addEventListener("click", () => { play(false); moveTo("now"); });
$("play").addEventListener("click", () => play(!page.playing));
$("window").addEventListener("change", (event) => { page.window = Number(event.target.value); page.stale = true; curves(true); });
document.addEventListener("visibilitychange", () => curves());
setInterval(curves, 500);

// ---------------------------------------------------------------- theme

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const wanted = localStorage.getItem("theme") ?? "auto";
  document.documentElement.dataset.theme = wanted === "auto" ? (dark.matches ? "dark" : "light") : wanted;
  setText($("theme"), wanted);
  $("theme").setAttribute("aria-label", `Colours: ${wanted}`);
  if (page.series) { draw(page.series, moment().range); timeline.draw(); map.shape = ""; map.set(page.run.members, page.links ?? []); }
}
$("theme").addEventListener("click", () => {
  const order = ["auto", "light", "dark"];
  localStorage.setItem("theme", order[(order.indexOf(localStorage.getItem("theme") ?? "auto") + 1) % 3]);
  theme();
});
dark.addEventListener("change", theme);
theme();

try {
  await enter();
} catch (error) {
  problem(`${error.message}.`);
}
listen();
