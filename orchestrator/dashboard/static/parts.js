// Tiles, tables and lists: what the figures say, in words.
import { bytes, clock, count, duration, el, loss, percent, plural, setText, times, UNKNOWN } from "./format.js";
import { PHASE_OF } from "./map.js";

const $ = (id) => document.getElementById(id);
const FAULT_WORDS = { kill: "killed", hang: "hung", crash: "crashed", preempted: "taken away", given_up: "given up", cut: "cut off", lost: "lost", died: "died", suspect: "silent", fenced: "fenced", non_finite: "not finite", revoked: "revoked", operator: "operator" };

function tile(id, value, unit, note, tone) {
  const box = $(id), [shown, told] = [box.querySelector(".value"), box.querySelector(".note")];
  if (shown.dataset.said !== value + unit) {
    shown.dataset.said = value + unit;
    shown.replaceChildren(value, ...(unit ? [" ", el("small", {}, unit)] : []));
  }
  setText(told, note);
  box.dataset.tone = tone;
}

export function tiles({ figures: f, members, events, state, at_s, about }) {
  const [value, note, tone] = learning(f);
  tile("t-learning", value, f.val_loss == null ? "" : "validation loss", note, tone);
  const use = f.utilization == null ? "" : `${percent(f.utilization)} computing, goodput ${percent(f.goodput)}`;
  tile("t-fast", count(f.tokens_per_s), "tokens/s", use || (f.tokens_per_s == null ? "no two commits yet" : "committed in the last steps"), f.utilization == null ? "plain" : f.utilization > 0.7 ? "good" : "warn");
  const doing = states(members), gone = members.filter((member) => !member.here && !["left", "ended"].includes(member.doing)).length;
  const over = members.length > 0 && members.every((member) => member.doing === "ended");
  tile("t-here", over ? String(members.length) : `${f.num_live}`, over ? "members took part" : `of ${plural(f.num_members, "member")}`, doing, over ? "plain" : gone ? "bad" : members.some((m) => m.doing === "cut off") ? "warn" : "good");
  const last = events.find((event) => event.tone === "bad");
  const told = last ? `${last.member || "the run"} ${FAULT_WORDS[last.kind] ?? last.kind} at ${clock(last.t_s)}${back(last, state)}` : "";
  tile("t-broke", f.num_faults ? String(f.num_faults) : "nothing", f.num_faults ? (f.num_faults === 1 ? "fault" : "faults") : "", told || `in ${duration(at_s)}`, !f.num_faults ? "good" : gone ? "bad" : "warn");
  const less = f.bytes_data_parallel && f.bytes_sent ? f.bytes_data_parallel / f.bytes_sent : null;
  tile("t-cost", bytes(f.bytes_sent), "sent", about.pipeline ? "by all peers: boundaries, sums and copies" : less ? `${times(less)} less than data parallel (${bytes(f.bytes_data_parallel)})` : "data parallel: not known yet", less == null ? "plain" : less > 1 ? "good" : "warn");
}

function learning(f) {
  if (f.diverged) return ["diverged", "the last validation loss is not finite", "bad"];
  if (f.val_loss == null) return [UNKNOWN, f.train_loss == null ? "nothing trained yet" : `training loss ${loss(f.train_loss)}`, "plain"];
  const change = f.val_loss / f.val_loss_first - 1, from = `from ${loss(f.val_loss_first)}`;
  if (f.val_loss === f.val_loss_first) return [loss(f.val_loss), `the only evaluation so far; training loss ${loss(f.train_loss)}`, "plain"];
  if (change > -0.005) return [loss(f.val_loss), `not learning: ${from} (${percent(change)})`, "bad"];
  if (f.val_loss > 1.02 * f.val_loss_best) return [loss(f.val_loss), `rising again: the best was ${loss(f.val_loss_best)}`, "warn"];
  return [loss(f.val_loss), `falling ${from} (${percent(change)}); training ${loss(f.train_loss)}`, "good"];
}

function back(event, state) {
  const after = event.after ?? {};
  if (after.back_s != null) return `, back after ${duration(after.back_s)}`;
  return state === "running" ? ", not back yet" : "";
}

export function states(members) {
  const found = {};
  for (const member of members) found[member.doing] = (found[member.doing] ?? 0) + 1;
  return Object.entries(found).sort((a, b) => b[1] - a[1]).map(([word, number]) => `${number} ${word}`).join(", ") || "nobody yet";
}

// Rows are kept by name and changed in place: focus and scroll position stay.
const rows = new Map();

export function membersTable(members, able, picked, act, pick) {
  const body = $("members").querySelector("tbody"), ordered = [...members];
  if (ordered.length > 14) ordered.sort((a, b) => trouble(b) - trouble(a));
  const names = new Set(ordered.map(({ name }) => name));
  for (const [name, row] of rows) if (!names.has(name)) { row.remove(); rows.delete(name); }
  ordered.forEach((member, i) => {
    let row = rows.get(member.name);
    if (!row) {
      row = memberRow(member.name, act, pick);
      rows.set(member.name, row);
    }
    fillMember(row, member, able, picked);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
  });
  setText($("states"), states(members));
}

function trouble(member) { return ["dead", "cut off", "leaving", "left", "starting"].includes(member.doing) ? 1 : 0; }

function memberRow(name, act, pick) {
  const row = el("tr", {}, ...Array.from({ length: 6 }, () => el("td")));
  const cells = row.children;
  cells[0].append(el("button", { class: "pick", type: "button", title: "its own curve", "aria-pressed": "false", onclick: () => pick(name) }));
  cells[1].append(el("span", { class: "dot" }), el("span"), el("span", { class: "why" }));
  cells[2].className = cells[3].className = "num";
  for (const action of ["drain", "kill"]) cells[5].append(el("button", { type: "button", class: action === "kill" ? "danger" : "", "aria-label": `${action} ${name}`, "data-act": action, hidden: true, onclick: () => act(action, name) }, action));
  return row;
}

function fillMember(row, member, able, picked) {
  const [name, does, lossCell, speed, node, acts] = row.children, button = name.firstChild;
  setText(button, `${member.name}.${member.incarnation}`);
  button.setAttribute("aria-pressed", String(picked.has(member.name)));
  const [dot, word, why] = does.children;
  dot.className = `dot p-${PHASE_OF[member.doing] ?? "start"}${member.here ? "" : " gone"}`;
  setText(word, member.doing);
  setText(why, member.why);
  setText(lossCell, loss(member.loss));
  setText(speed, member.here && member.doing !== "ended" ? count(member.tokens_per_s) : UNKNOWN);
  setText(node, member.node.slice(0, 8) || UNKNOWN);
  row.dataset.member = member.name;
  row.dataset.doing = member.doing;
  for (const one of acts.children) one.hidden = !able.includes(one.dataset.act) || !member.here || (one.dataset.act === "drain" && member.doing === "leaving");
}

export function eventsList(events) {
  const list = $("events").querySelector("ol"), said = JSON.stringify(events);
  if (list.dataset.said === said) return;
  list.dataset.said = said;
  if (!events.length) { list.replaceChildren(el("li", { class: "none" }, "Nothing broke, and nobody asked for anything.")); return; }
  list.replaceChildren(...events.map((event) => el("li", {},
    el("time", {}, clock(event.t_s)),
    el("div", {}, el("span", { class: `pill ${event.tone}` }, FAULT_WORDS[event.kind] ?? event.kind), event.member ? `${event.member} ` : "", el("span", { class: "soft" }, event.text ?? "")),
    event.after ? el("p", { class: "after" }, after(event.after)) : null)));
}

function after(a) {
  const told = [["noticed_s", "noticed after"], ["next_commit_s", "next commit after"], ["back_s", "back after"], ["contributed_s", "contributed after"]];
  return told.filter(([key]) => a[key] != null).map(([key, word]) => `${word} ${duration(a[key])}`).join(", ") || "not healed yet";
}

export function exchangesPart({ open, done }, ledger) {
  const box = $("exchanges");
  box.querySelector(".open").replaceChildren(...open.map((one) => el("li", {}, el("b", {}, `version ${one.version}${one.fragment ? `, fragment ${one.fragment}` : ""}: ${one.state}`), ` — ${one.why}${one.attempt > 1 ? `; attempt ${one.attempt}` : ""}`)));
  setText($("discarded"), ledger.discarded ? `${ledger.discarded} discarded` : "");
  const body = box.querySelector("tbody"), said = JSON.stringify(done);
  if (body.dataset.said === said) return;
  body.dataset.said = said;
  body.replaceChildren(...done.map((one) => el("tr", {},
    el("td", {}, `${one.version}${one.fragment ? `/${one.fragment}` : ""}`), el("td", { class: "long" }, one.why || UNKNOWN, one.attempts > 1 ? ` (${one.attempts} attempts)` : ""),
    el("td", { class: "num" }, String(one.roster)), el("td", { class: "num" }, duration(one.seconds)), el("td", { class: "num" }, bytes(one.bytes)))));
}

export function ledgerPart(ledger) {
  const told = [["committed", "committed"], ["under_way", "under way"], ["lost", "lost, to be redone"], ["reissued", "given out again"], ["dropped", "dropped by a rule"], ["partial", "in part only"]];
  const said = JSON.stringify(ledger), list = $("ledger").querySelector("dl");
  if (list.dataset.said === said) return;
  list.dataset.said = said;
  list.replaceChildren(...told.map(([key, word]) => el("div", {}, el("dt", {}, word), el("dd", {}, count(ledger[key])))), el("div", {}, el("dt", {}, "journal rows"), el("dd", {}, count(ledger.journal_rows))));
}

export function stagesPart(stages) {
  $("stages").hidden = !stages.length;
  const peers = (one) => Object.entries(one.peers).map(([name, rate]) => `${name} ${rate == null ? "not measured" : rate.toFixed(2)}`).concat(one.moving_here.map((name) => `${name} is coming`)).join(", ");
  $("stages").querySelector("tbody").replaceChildren(...stages.map((one) => el("tr", {}, el("td", {}, String(one.stage)), el("td", { class: "num" }, count(one.params)), el("td", { class: "num" }, bytes(one.bytes)), el("td", { class: "wrap" }, peers(one) || UNKNOWN), el("td", { class: "wrap" }, one.buddies.join(", ") || UNKNOWN))));
}
