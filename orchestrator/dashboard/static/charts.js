// Charts over time, drawn by uPlot; the server has reduced the data to about one point a pixel.
import { clock, colour, el, setText, tick, UNKNOWN } from "./format.js";

const { uPlot } = window;

// null is a gap (an island was dead), undefined is a bin without a row between two rows: the line goes on.
export function bridge(values) {
  const known = [];
  values.forEach((value, i) => { if (value != null) known.push(i); });
  if (known.length < 2) return values;
  const gaps = known.slice(1).map((at, i) => at - known[i]).sort((a, b) => a - b);
  const most = Math.max(4 * gaps[Math.floor(gaps.length / 2)], values.length / 60);
  const out = values.slice();
  for (let k = 1; k < known.length; k += 1) {
    if (known[k] - known[k - 1] <= most) for (let i = known[k - 1] + 1; i < known[k]; i += 1) out[i] = undefined;
  }
  return out;
}

// Points (t, y) as values on the grid of bins: the nearest bin, the last point of each wins.
export function onGrid(x, points) {
  const out = new Array(x.length).fill(null);
  if (!x.length) return out;
  const width = x.length > 1 ? x[1] - x[0] : 1;
  for (const [t, y] of points) out[Math.min(x.length - 1, Math.max(0, Math.round((t - x[0]) / width)))] = y;
  return bridgeAll(out);
}

function bridgeAll(values) {
  const first = values.findIndex((value) => value != null);
  const last = values.findLastIndex((value) => value != null);
  return values.map((value, i) => (value == null && i > first && i < last ? undefined : value));
}

export class Chart {
  // lines: [{key, label, colour, width, dash, fill, points, quiet, unit}]; say: a value as text.
  constructor(figure, { say, short = say, log = false, low = null, high = null, label }) {
    Object.assign(this, { figure, say, short, log, low, high, label, hidden: new Set(), lines: [], faults: [], bands: [] });
    this.box = figure.querySelector(".plot");
    this.keys = figure.querySelector(".keys");
    this.shape = "";
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "img");
    this.box.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.fit()).observe(this.box);
  }

  set({ x, lines, values, bands = [], faults, range }) {
    this.faults = faults;
    this.range = range;
    const shape = JSON.stringify([lines.map(({ key }) => key), bands, document.documentElement.dataset.theme]);
    const empty = !x.length || !values.some((row) => row.some((value) => value != null));
    this.box.setAttribute("aria-label", empty ? `${this.label}: nothing yet` : this.told(lines, values));
    if (empty) {
      this.plot?.destroy();
      this.plot = null;
      this.shape = "";
      this.keys.replaceChildren();
      return;
    }
    this.data = [x, ...values];
    if (shape !== this.shape) {
      this.shape = shape;
      this.lines = lines;
      this.bands = bands;
      this.build();
    } else {
      this.plot.setData(this.data, false);
      this.rescale();
    }
    this.tellKeys();
  }

  told(lines, values) {
    const last = (row) => row.findLast((value) => value != null);
    const said = lines.map((line, i) => [line, last(values[i])]).filter(([line, value]) => !line.quiet && value != null);
    return `${this.label}; at the end ${said.map(([line, value]) => `${line.label} ${this.say(value)}`).join(", ")}. Arrow keys read it.`;
  }

  build() {
    this.plot?.destroy();
    const axis = { stroke: colour("soft"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const options = {
      ...this.size(),
      padding: [12, 10, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "run" }, drag: { x: false, y: false }, points: { size: 7 }, y: false },
      scales: {
        x: { time: false, range: () => this.range },
        y: { distr: this.log ? 3 : 1, range: (_, low, high) => this.limits(low, high) },
      },
      axes: [
        { ...axis, size: 30, space: 64, values: (_, splits) => splits.map((s) => tick(s, splits[1] - splits[0])) },
        { ...axis, size: 58, values: (_, splits) => splits.map((s) => (s == null ? "" : this.short(s))), filter: this.log ? (_, splits) => splits.map((s) => (Number.isInteger(Math.log10(s)) ? s : null)) : undefined },
      ],
      series: [{}, ...this.lines.map((line) => this.line(line))],
      bands: this.bands.map(([above, below, name]) => ({ series: [above + 1, below + 1], fill: colour(name) })),
      hooks: { draw: [(plot) => this.marks(plot)], setCursor: [() => this.tellKeys()] },
    };
    this.plot = new uPlot(options, this.data, this.box);
    this.keys.replaceChildren(...this.lines.map((line, i) => (line.quiet ? null : this.key(line, i))).filter(Boolean));
  }

  line({ key, colour: name, width = 1.5, dash, fill, points = false }) {
    return {
      show: !this.hidden.has(key),
      stroke: name ? colour(name) : "transparent",
      width: name ? width : 0,
      dash,
      fill: fill ? colour(fill) : undefined,
      points: points ? { show: true, size: 5, fill: colour(name) } : { show: false },
    };
  }

  key(line, i) {
    const mark = el("i");
    mark.style.setProperty("--c", `var(--${line.colour})`);
    const button = el("button", { type: "button", "aria-pressed": String(!this.hidden.has(line.key)) }, mark, line.label, el("b"));
    button.addEventListener("click", () => {
      const shown = this.hidden.delete(line.key);
      if (!shown) this.hidden.add(line.key);
      button.setAttribute("aria-pressed", String(shown));
      this.plot.setSeries(i + 1, { show: shown });
    });
    button.dataset.line = i;
    return el("li", {}, button);
  }

  // Values under the cursor, or the last ones.
  tellKeys() {
    if (!this.plot) return;
    const at = this.plot.cursor.idx;
    for (const button of this.keys.querySelectorAll("button")) {
      const row = this.data[Number(button.dataset.line) + 1];
      const value = at == null ? row.findLast((one) => one != null) : near(row, at);
      setText(button.querySelector("b"), value == null ? UNKNOWN : this.say(value));
    }
  }

  limits(low, high) {
    if (low == null || high == null) return this.log ? [1, 10] : [0, 1];
    if (this.log) return [10 ** Math.floor(Math.log10(Math.max(low, 1))), 10 ** Math.ceil(Math.log10(Math.max(high, 2)) + 0.05)];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [this.low ?? low - room, Math.max(this.high ?? high + room, this.low == null ? -Infinity : this.low + 1e-9)];
  }

  marks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("dead");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const fault of this.faults) {
      const x = Math.round(plot.valToPos(fault.t_s, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.globalAlpha = this.faults.length > 40 ? 0.3 : 0.75;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  walk(event) {
    if (!this.plot || !["ArrowLeft", "ArrowRight", "Home", "End", "Escape"].includes(event.key)) return;
    event.preventDefault();
    const x = this.data[0], last = x.length - 1, step = Math.max(1, Math.round(x.length / 100));
    if (event.key === "Escape") { this.plot.setCursor({ left: -10, top: -10 }); return; }
    const now = this.plot.cursor.idx ?? last;
    const at = { ArrowLeft: Math.max(0, now - step), ArrowRight: Math.min(last, now + step), Home: 0, End: last }[event.key];
    this.plot.setCursor({ left: this.plot.valToPos(x[at], "x"), top: 20 });
    this.box.setAttribute("aria-label", `${clock(x[at])}: ${[...this.keys.querySelectorAll("button")].map((key) => key.textContent).join(", ")}`);
  }

  rescale() { this.plot.redraw(true, true); this.plot.setScale("x", { min: this.range[0], max: this.range[1] }); }
  size() { return { width: Math.max(120, this.box.clientWidth), height: Math.max(90, this.box.clientHeight) }; }
  fit() { if (this.plot && this.box.clientWidth) this.plot.setSize(this.size()); }
  get bins() { return Math.max(60, Math.min(1200, Math.round(this.box.clientWidth - 68))); }
}

function near(row, at) {
  for (let d = 0; d < 12; d += 1) {
    if (row[at - d] != null) return row[at - d];
    if (row[at + d] != null) return row[at + d];
  }
  return null;
}
