// What every member did, one lane each; each pixel column is the longest phase in it, death before all others.
import { clock, colour, el, setText, tick } from "./format.js";

const PHASES = { c: ["compute", "computing"], s: ["sync", "synchronising"], w: ["wait", "waiting"], e: ["evaluate", "evaluating"], x: ["start", "starting"], d: ["dead", "dead"], a: ["away", "left"] };
const TOP = 22, BOTTOM = 22, RIGHT = 8;

export class Timeline {
  constructor(figure) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.told = figure.querySelector(".told");
    this.box = figure.querySelector(".lanes");
    this.at = null;
    const keys = Object.values(PHASES).filter(([name]) => name !== "away").map(([name, word]) => key(`p-${name}`, word));
    figure.querySelector(".keys").replaceChildren(...keys, key("p-cut", "cut off (hatched)"));
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => { this.at = null; this.draw(); });
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  get left() { return this.box.clientWidth < 520 ? 66 : 96; }
  get bins() { return Math.max(60, Math.min((this.data?.rows.length ?? 0) > 60 ? 800 : 1600, this.box.clientWidth - this.left - RIGHT)); }
  get pitch() { const n = this.data?.rows.length ?? 1; return n <= 6 ? 30 : n <= 14 ? 24 : n <= 40 ? 15 : n <= 100 ? 8 : 5; }

  set(data, range) {
    this.data = data;
    this.range = range;
    this.draw();
  }

  draw() {
    const { data, canvas, pitch } = this;
    if (!data || !this.box.clientWidth) return;
    const width = this.box.clientWidth, height = TOP + pitch * data.rows.length + BOTTOM, ratio = devicePixelRatio;
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.style.height = `${height}px`;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    this.ctx = ctx;
    this.colours = Object.fromEntries(Object.entries(PHASES).map(([letter, [name]]) => [letter, colour(name)]));
    this.axis(width, height);
    data.rows.forEach((row, i) => this.lane(row, i));
    this.place = Object.fromEntries(data.rows.map((row, i) => [row.name, i]));
    for (const [member, start, end] of data.silences) this.silence(member, start, end);
    for (const fault of data.faults) this.fault(fault);
    if (this.at) this.ring();
    canvas.setAttribute("aria-label", `Timeline of ${data.rows.length} members. Arrow keys read it.`);
  }

  x(t) { return this.left + ((t - this.range[0]) / Math.max(this.range[1] - this.range[0], 1e-9)) * (this.box.clientWidth - this.left - RIGHT); }

  axis(width, height) {
    const { ctx } = this, span = this.range[1] - this.range[0], few = Math.max(2, Math.floor((width - this.left) / 90));
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800].find((one) => span / one <= few) ?? 604800;
    ctx.font = "12px system-ui, sans-serif";
    ctx.textAlign = "center";
    for (let t = Math.ceil(this.range[0] / step) * step; t <= this.range[1] + 1e-9; t += step) {
      const x = Math.round(this.x(t)) + 0.5;
      ctx.strokeStyle = colour("grid");
      ctx.beginPath();
      ctx.moveTo(x, TOP - 3);
      ctx.lineTo(x, height - BOTTOM + 3);
      ctx.stroke();
      ctx.fillStyle = colour("soft");
      ctx.fillText(tick(t, step), Math.min(x, width - 14), height - 5);
    }
    ctx.fillStyle = colour("accent");
    for (const t of this.data.commits) ctx.fillRect(this.x(t) - 0.6, 7, 1.2, 8);
    if (this.data.commits.length) {
      ctx.fillStyle = colour("soft");
      ctx.textAlign = "right";
      ctx.fillText("commits", this.left - 10, 15);
    }
  }

  lane(row, i) {
    const { ctx, pitch, data } = this, gap = pitch > 20 ? 8 : pitch > 10 ? 4 : 1;
    const top = TOP + i * pitch + gap / 2, height = pitch - gap, bins = row.phases.length;
    const from = this.x(data.from_s), scale = (this.x(data.to_s) - from) / bins;
    if (pitch >= 14 || i % Math.ceil(14 / pitch) === 0) {
      ctx.fillStyle = colour("ink");
      ctx.textAlign = "right";
      ctx.font = pitch >= 14 ? "13px system-ui, sans-serif" : "10px system-ui, sans-serif";
      ctx.fillText(short(row.name, this.left), this.left - 10, top + height / 2 + 4);
    }
    for (let start = 0; start < bins;) {
      const letter = row.phases[start];
      let end = start + 1;
      while (end < bins && row.phases[end] === letter) end += 1;
      if (letter !== ".") {
        ctx.fillStyle = this.colours[letter] ?? this.colours.x;
        ctx.fillRect(from + start * scale, top, (end - start) * scale + 0.4, height);
      }
      start = end;
    }
    ctx.fillStyle = this.colours.s;
    for (let at = 0; at < bins; at += 1) {
      const tenth = row.waits.charCodeAt(at) - 48;
      if (tenth > 0) ctx.fillRect(from + at * scale, top, scale + 0.4, (height * tenth) / 10);
    }
  }

  silence(member, start, end) {
    const { ctx, pitch } = this, i = this.place[member];
    if (i === undefined) return;
    const x0 = Math.max(this.x(start), this.left), x1 = Math.max(this.x(Math.min(end, this.range[1])), x0 + 2), top = TOP + i * pitch;
    ctx.save();
    ctx.beginPath();
    ctx.rect(x0, top + 1, x1 - x0, pitch - 2);
    ctx.clip();
    ctx.strokeStyle = colour("ink");
    ctx.lineWidth = 1.3;
    for (let x = x0 - pitch; x < x1; x += 6) {
      ctx.beginPath();
      ctx.moveTo(x, top + pitch);
      ctx.lineTo(x + pitch, top);
      ctx.stroke();
    }
    ctx.restore();
  }

  fault(fault) {
    const { ctx, pitch } = this, i = this.place[fault.member];
    if (i === undefined) return;
    const x = this.x(fault.t_s), y = TOP + (i + 0.5) * pitch, r = Math.min(7, Math.max(2.5, pitch / 2 - 1));
    if (x < this.left) return;
    ctx.fillStyle = colour("dead");
    ctx.strokeStyle = colour("card");
    ctx.lineWidth = r > 4 ? 1.6 : 0.8;
    ctx.beginPath();
    ctx.arc(x, y, r, 0, 7);
    ctx.fill();
    ctx.stroke();
    if (r > 4) {
      ctx.beginPath();
      for (const s of [-1, 1]) { ctx.moveTo(x - 2.4, y - 2.4 * s); ctx.lineTo(x + 2.4, y + 2.4 * s); }
      ctx.stroke();
    }
  }

  point(event) {
    const bounds = this.canvas.getBoundingClientRect();
    if (!this.data) return;
    const row = Math.floor((event.clientY - bounds.top - TOP) / this.pitch);
    const t = this.range[0] + ((event.clientX - bounds.left - this.left) / (this.box.clientWidth - this.left - RIGHT)) * (this.range[1] - this.range[0]);
    this.at = row >= 0 && row < this.data.rows.length && t >= this.range[0] ? { row, t } : null;
    this.draw();
    this.tell();
  }

  walk(event) {
    if (!this.data || !/^(Arrow|Home|End|Escape)/.test(event.key)) return;
    event.preventDefault();
    const span = this.range[1] - this.range[0], rows = this.data.rows.length - 1;
    const at = this.at ?? { row: 0, t: this.data.to_s };
    if (event.key === "Escape") this.at = null;
    else {
      const dt = { ArrowLeft: -span / 60, ArrowRight: span / 60 }[event.key] ?? 0, dr = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
      const t = event.key === "Home" ? this.range[0] : event.key === "End" ? this.data.to_s : at.t + dt;
      this.at = { row: Math.min(rows, Math.max(0, at.row + dr)), t: Math.min(this.data.to_s, Math.max(this.range[0], t)) };
    }
    this.draw();
    this.tell();
  }

  tell() {
    if (!this.at) { setText(this.told, "\u00a0"); return; }
    const row = this.data.rows[this.at.row], { from_s, to_s } = this.data;
    const bin = Math.min(row.phases.length - 1, Math.max(0, Math.floor(((this.at.t - from_s) / Math.max(to_s - from_s, 1e-9)) * row.phases.length)));
    const letter = this.at.t > to_s ? "." : row.phases[bin];
    const cut = this.data.silences.some(([member, a, b]) => member === row.name && a <= this.at.t && this.at.t < b);
    const fault = this.data.faults.find((one) => one.member === row.name && Math.abs(this.x(one.t_s) - this.x(this.at.t)) < 7);
    setText(this.told, `${row.name} at ${clock(this.at.t)}: ${PHASES[letter]?.[1] ?? "not known"}${cut ? ", cut off from the controller" : ""}${fault ? `; ${fault.kind} at ${clock(fault.t_s)}` : ""}`);
  }

  ring() {
    const { ctx, pitch } = this;
    ctx.strokeStyle = colour("ink");
    ctx.lineWidth = 1;
    const x = this.x(this.at.t), y = TOP + this.at.row * pitch;
    ctx.strokeRect(x - 1, y, 2, pitch);
  }
}

function key(name, word) { return el("li", {}, el("span", { class: "key" }, el("i", { class: `box ${name}` }), word)); }
function short(name, room) { return room < 80 && name.length > 9 ? name.replace("island-", "i-") : name; }
