// Who is connected to whom, and how well: a ring for a few members, a matrix for many.
import { bytes, colour, duration, el, rate, setText, svg } from "./format.js";

export const FEW = 14;
const SIZE = 420, MIDDLE = SIZE / 2, RADIUS = 142;

export const PHASE_OF = { computing: "compute", synchronising: "sync", evaluating: "evaluate", starting: "start", waiting: "wait", dead: "dead", left: "away", leaving: "wait", ended: "start", "cut off": "cut" };

export class Map_ {
  constructor(figure) {
    this.field = figure.querySelector(".field");
    this.note = figure.querySelector(".note");
    this.told = figure.querySelector(".told");
    this.shape = "";
  }

  set(members, links) {
    const machines = new Set(members.map((member) => member.node).filter(Boolean)).size;
    const fastest = Math.max(0, ...links.map(([, , speed]) => speed ?? 0));
    setText(this.note, links.length ? `${members.length} members on ${machines || "?"} machine${machines === 1 ? "" : "s"}; ${rate(fastest)} at best` : "no link measured yet");
    if (!members.length) { this.field.replaceChildren(); this.shape = ""; return; }
    if (members.length <= FEW) this.ring(members, links);
    else this.matrix(members, links);
  }

  ring(members, links) {
    const shape = `ring ${JSON.stringify([members, links.map(([a, b, s, r]) => [a, b, s && Math.round(s / 1e4), r && Math.round(r * 1e4)])])}`;
    if (shape === this.shape) return;
    this.shape = shape;
    const focus = document.activeElement?.dataset?.link;
    const ordered = [...members].sort((a, b) => a.node.localeCompare(b.node));
    const angle = (i) => (2 * Math.PI * i) / ordered.length - Math.PI / 2;
    const spot = Object.fromEntries(ordered.map((member, i) => [member.name, [MIDDLE + RADIUS * Math.cos(angle(i)), MIDDLE + RADIUS * Math.sin(angle(i))]]));
    const drawing = svg("svg", { viewBox: `-70 0 ${SIZE + 140} ${SIZE}`, role: "group", "aria-label": "Members and measured links" });
    drawing.append(...this.hosts(ordered, angle), ...this.links(links, spot, ordered.length));
    ordered.forEach((member, i) => {
      const [x, y] = spot[member.name], out = RADIUS + 26, a = angle(i), side = Math.cos(a);
      const anchor = Math.abs(side) < 0.3 ? "middle" : side > 0 ? "start" : "end";
      drawing.append(
        svg("circle", { class: `node p-${PHASE_OF[member.doing] ?? "start"}`, cx: x, cy: y, r: 12 }),
        text(MIDDLE + out * Math.cos(a), MIDDLE + out * Math.sin(a) - 5, `${member.name}`, "label", anchor),
        text(MIDDLE + out * Math.cos(a), MIDDLE + out * Math.sin(a) + 13, member.doing, "", anchor),
      );
    });
    this.field.replaceChildren(drawing);
    if (focus) drawing.querySelector(`[data-link="${CSS.escape(focus)}"]`)?.focus();
  }

  hosts(ordered, angle) {
    const arcs = [];
    for (let start = 0; start < ordered.length;) {
      let end = start;
      while (end + 1 < ordered.length && ordered[end + 1].node === ordered[start].node) end += 1;
      if (ordered[start].node && end > start && end - start + 1 < ordered.length) {
        const p = (i) => `${MIDDLE + RADIUS * Math.cos(angle(i))} ${MIDDLE + RADIUS * Math.sin(angle(i))}`;
        arcs.push(svg("path", { class: "host", d: `M${p(start)}A${RADIUS} ${RADIUS} 0 0 1 ${p(end)}` }));
      }
      start = end + 1;
    }
    return arcs;
  }

  // Both directions of a pair are one line; its width says the slower one.
  links(links, spot, num) {
    const pairs = new Map();
    for (const [source, target, speed, rtt] of links) {
      if (!spot[source] || !spot[target]) continue;
      const key = [source, target].sort().join(" ");
      const pair = pairs.get(key) ?? { key, ends: [source, target].sort(), ways: [] };
      pair.ways.push({ source, target, speed, rtt });
      pairs.set(key, pair);
    }
    const drawn = [], labels = [];
    for (const { key, ends, ways } of pairs.values()) {
      const [[x0, y0], [x1, y1]] = ends.map((name) => spot[name]);
      const known = ways.map(({ speed }) => speed).filter((speed) => speed != null);
      const slow = known.length ? Math.min(...known) : null;
      const trips = ways.map(({ rtt }) => rtt).filter((rtt) => rtt != null);
      const width = slow == null ? 1 : Math.max(1, Math.min(9, 1 + 1.5 * Math.log10(Math.max(slow, 1e4) / 1e4)));
      const d = `M${x0} ${y0}L${x1} ${y1}`;
      const line = svg("path", { class: "link", d, "stroke-width": width, "stroke-opacity": num > 6 ? 0.4 : 0.6 });
      const said = ways.map((way) => `${way.source} to ${way.target}: ${rate(way.speed)}, round trip ${duration(way.rtt)}`).join("; ");
      const hit = svg("path", { class: "hit", d, tabindex: 0, role: "img", "aria-label": said, "data-link": key });
      for (const event of ["mouseenter", "focus"]) hit.addEventListener(event, () => setText(this.told, said));
      drawn.push(line, hit);
      if (num <= 4) labels.push(text((x0 + x1) / 2, (y0 + y1) / 2 - 8, rate(slow), "rate label", "middle"), text((x0 + x1) / 2, (y0 + y1) / 2 + 19, trips.length ? duration(Math.min(...trips)) : "", "rate", "middle"));
    }
    return [...drawn, ...labels];
  }

  matrix(members, links) {
    this.shape = "matrix";
    const names = members.map(({ name }) => name), place = Object.fromEntries(names.map((name, i) => [name, i]));
    const cell = Math.max(2, Math.floor(Math.min(this.field.clientWidth - 8, 420) / names.length)), side = cell * names.length;
    let canvas = this.field.querySelector("canvas");
    if (!canvas) {
      canvas = el("canvas", { tabindex: 0, role: "img" });
      canvas.addEventListener("mousemove", (event) => this.read(canvas, event));
      canvas.addEventListener("keydown", (event) => this.walk(canvas, event));
      canvas.addEventListener("blur", () => { this.at = null; this.mark(canvas); });
      this.field.replaceChildren(canvas);
    }
    canvas.width = canvas.height = side;
    canvas.setAttribute("aria-label", `Bandwidth between ${names.length} members, row sends, column receives. Arrow keys read it.`);
    const ctx = canvas.getContext("2d");
    ctx.fillStyle = colour("plain-bg");
    ctx.fillRect(0, 0, side, side);
    const speeds = links.map(([, , speed]) => speed).filter(Boolean), low = Math.log(Math.min(...speeds)), high = Math.log(Math.max(...speeds));
    ctx.fillStyle = colour("accent");
    this.cells = new Map();
    for (const [source, target, speed, rtt] of links) {
      const y = place[source], x = place[target];
      if (x === undefined || y === undefined || !speed) continue;
      ctx.globalAlpha = 0.12 + 0.88 * ((Math.log(speed) - low) / Math.max(high - low, 1e-9));
      ctx.fillRect(x * cell, y * cell, cell, cell);
      this.cells.set(`${y} ${x}`, `${source} to ${target}: ${rate(speed)}, round trip ${duration(rtt)}`);
    }
    members.forEach((member, i) => {
      if (member.doing !== "dead") return;
      ctx.globalAlpha = 1;
      ctx.fillStyle = colour("dead");
      ctx.fillRect(i * cell, i * cell, cell, cell);
    });
    this.cell = cell;
    this.names = names;
    this.picture ??= el("canvas");
    this.picture.width = this.picture.height = side;
    this.picture.getContext("2d").drawImage(canvas, 0, 0);
    this.mark(canvas);
    if (this.at) return;
    if (!speeds.length) setText(this.told, "row sends, column receives; nothing measured yet");
    else setText(this.told, `row sends, column receives; ${bytes(Math.exp(low))}/s (faint) to ${bytes(Math.exp(high))}/s`);
  }

  read(canvas, event) {
    const bounds = canvas.getBoundingClientRect(), scale = canvas.width / bounds.width;
    const x = Math.floor(((event.clientX - bounds.left) * scale) / this.cell), y = Math.floor(((event.clientY - bounds.top) * scale) / this.cell);
    const said = this.cells.get(`${y} ${x}`);
    if (said) setText(this.told, said);
  }

  walk(canvas, event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!step) return;
    event.preventDefault();
    const last = this.names.length - 1, [row, column] = this.at ?? [0, 0], within = (value) => Math.min(last, Math.max(0, value));
    this.at = [within(row + step[0]), within(column + step[1])];
    this.mark(canvas);
    const [y, x] = this.at;
    setText(this.told, this.cells.get(`${y} ${x}`) ?? `${this.names[y]} to ${this.names[x]}: ${y === x ? "itself" : "not measured"}`);
  }

  mark(canvas) {
    const ctx = canvas.getContext("2d"), { cell } = this;
    ctx.globalAlpha = 1;
    ctx.drawImage(this.picture, 0, 0);
    if (!this.at) return;
    ctx.strokeStyle = colour("ink");
    ctx.lineWidth = 1.5;
    const [y, x] = this.at, room = Math.max(cell, 8);
    ctx.strokeRect(x * cell + (cell - room) / 2, y * cell + (cell - room) / 2, room, room);
  }
}

function text(x, y, said, name, anchor) {
  const made = svg("text", { x, y, class: name, "text-anchor": anchor });
  made.textContent = said;
  return made;
}
