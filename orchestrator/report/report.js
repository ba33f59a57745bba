"use strict";
(() => {
  const tip = document.getElementById("tip");
  const NBSP = "\u00a0";

  // --- numbers, as the Python side writes them ---
  const three = (v) => (v === 0 ? "0" : String(Number(v.toPrecision(3))));
  const scaled = (v, units) => {
    let size = Math.abs(v), unit = 0;
    while (size >= 999.5 && unit < units.length - 1) { size /= 1000; unit += 1; }
    return three(Math.sign(v) * size) + (units[unit] ? NBSP + units[unit] : "");
  };
  const count = (v) => scaled(v, ["", "k", "M", "G", "T"]);
  const clock = (s) => {
    const pad = (n, w) => String(n).padStart(w, "0");
    if (s < 3600) {
      const tenths = Math.round(s * 10);
      return Math.floor(tenths / 600) + ":" + pad(((tenths % 600) / 10).toFixed(1), 4);
    }
    const w = Math.round(s);
    return Math.floor(w / 3600) + ":" + pad(Math.floor((w % 3600) / 60), 2) + ":" + pad(w % 60, 2);
  };
  const duration = (s) => (s < 0.9995 ? three(s * 1000) + NBSP + "ms" : s < 59.95 ? three(s) + NBSP + "s" : clock(s));
  const write = {
    progress: (v) => (100 * v).toFixed(1) + NBSP + "%",
    time: clock,
    count,
    rate: (v) => count(v) + "/s",
    bytes: (v) => scaled(v, ["B", "kB", "MB", "GB", "TB", "PB"]),
    loss: (v) => (Math.abs(v) < 100 ? v.toFixed(3) : three(v)),
    seconds: duration,
    index: (v) => String(v),
  };

  // --- the tooltip ---
  const line = (css, ...texts) => {
    const row = document.createElement("div");
    row.className = css;
    for (const text of texts) row.append(text);
    return row;
  };
  const entry = (css, name, value) => {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    const strong = document.createElement("b");
    strong.textContent = value;
    return line("row " + css, swatch, name, strong);
  };
  const show = (svg, x, y, rows) => {
    tip.replaceChildren(...rows);
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const px = box.left + x * scale, py = box.top + y * scale;
    const left = px + 16 + tip.offsetWidth > innerWidth - 8 ? px - 16 - tip.offsetWidth : px + 16;
    const top = Math.min(Math.max(8, py - tip.offsetHeight / 2), innerHeight - tip.offsetHeight - 8);
    tip.style.transform = `translate(${Math.max(8, left)}px, ${top}px)`;
  };

  const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
  // Index of the last value at or below x (values ascend), -1 if there is none.
  const atOrBelow = (values, x) => {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] <= x) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
  const toPixel = (a, v) => {
    const f = a.log ? Math.log : (n) => n;
    return a.start + ((f(v) - f(a.low)) / (f(a.high) - f(a.low))) * (a.end - a.start);
  };
  const toValue = (a, px) => {
    const share = (px - a.start) / (a.end - a.start);
    return a.log ? a.low * (a.high / a.low) ** share : a.low + share * (a.high - a.low);
  };

  // --- one reader per kind of chart: place(x, y) and move(key) pick what the tooltip shows ---
  const lines = (svg, data, hover) => {
    const cross = hover.querySelector(".cross"), spots = [...hover.querySelectorAll(".spot")];
    let at = data.x.high;
    const isOff = (i) => svg.querySelector(`g.series[data-series="${i}"]`).classList.contains("off");
    const reading = (one, x) => {
      const left = atOrBelow(one.x, x);
      if (one.hold) return left;
      const right = left + 1;
      const nearest = left < 0 || (right < one.x.length && one.x[right] - x < x - one.x[left]) ? right : left;
      return Math.abs(one.x[nearest] - x) > 0.015 * (data.x.high - data.x.low) ? -1 : nearest;
    };
    const place = (px, py) => {
      at = clamp(toValue(data.x, px), data.x.low, data.x.high);
      const found = [];
      data.series.forEach((one, i) => {
        const k = isOff(i) ? -1 : reading(one, at);
        spots[i].setAttribute("visibility", k < 0 ? "hidden" : "inherit");
        if (k < 0) return;
        spots[i].setAttribute("cx", toPixel(data.x, one.x[k]));
        spots[i].setAttribute("cy", toPixel(data.y, one.y[k]));
        found.push([one, one.y[k], one.x[k]]);
      });
      const x = toPixel(data.x, at);
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      const rows = [line("head", write[data.x.unit](at))];
      const crowd = found.filter(([one]) => one.css === "crowd").sort((a, b) => a[1] - b[1]);
      for (const [one, value, seen] of found) {
        if (one.css === "crowd" && crowd.length > 3) continue;
        const late = one.hold && one.x.length < 60 ? ` (${write[data.x.unit](seen)})` : "";
        rows.push(entry(one.css, one.name + late, write[data.y.unit](value)));
      }
      if (crowd.length > 3) {
        for (const [word, k] of [["lowest", 0], ["middle", crowd.length >> 1], ["highest", crowd.length - 1]]) {
          rows.push(entry("crowd", `${word}: ${crowd[k][0].name}`, write[data.y.unit](crowd[k][1])));
        }
      }
      for (const [moment, label] of data.markers) {
        if (Math.abs(toPixel(data.x, moment) - x) < 5) rows.push(line("head", label));
      }
      if (found.length === 0) rows.push(line("head", "no value here"));
      show(svg, x, py ?? (data.y.start + data.y.end) / 2, rows);
    };
    const move = (key) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[key];
      const px = key === "Home" ? data.x.start : key === "End" ? data.x.end
        : toPixel(data.x, at) + (step * (data.x.end - data.x.start)) / 100;
      place(clamp(px, data.x.start, data.x.end));
    };
    return { place, move };
  };

  const bars = (svg, data, hover) => {
    const outline = hover.querySelector("path");
    let at = -1;
    const pick = (i) => {
      at = clamp(i, 0, data.bars.length - 1);
      const [label, value, detail] = data.bars[at], x = data.left + at * data.slot;
      outline.setAttribute("d", `M${x} ${data.top}h${data.slot}V${data.bottom}h${-data.slot}z`);
      show(svg, x + data.slot, (data.top + data.bottom) / 2, [
        line("head", `${data.title} ${label}`), entry("s0", data.name, write[data.unit](value)), line("head", detail),
      ]);
    };
    return {
      place: (px) => pick(Math.floor((px - data.left) / data.slot)),
      move: (key) => pick(key === "Home" ? 0 : key === "End" ? data.bars.length - 1
        : at + { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[key]),
    };
  };

  const timeline = (svg, data, hover) => {
    const box = hover.querySelector("rect"), axis = { low: 0, high: data.end_s, start: data.start, end: data.end };
    let row = 0, item = -1;
    const items = () => (data.rows[row].slots.length ? data.rows[row].slots : data.rows[row].spans);
    const pick = () => {
      const chosen = items();
      item = clamp(item, 0, chosen.length - 1);
      const [start, end, what, incarnation] = chosen[item];
      const left = toPixel(axis, start), top = data.top + row * data.pitch + data.gap / 2;
      box.setAttribute("x", left);
      box.setAttribute("y", top);
      box.setAttribute("width", Math.max(1, toPixel(axis, end) - left));
      const name = data.rows[row].name;
      const rows = [];
      if (Array.isArray(what)) {
        rows.push(line("head", `${name}, ${clock(start)} to ${clock(end)}`));
        what.forEach((share, k) => {
          if (share > 0) rows.push(entry("phase " + data.phases[k], data.words[k], (100 * share).toFixed(0) + NBSP + "%"));
        });
      } else {
        rows.push(line("head", `${name}, incarnation ${incarnation}`));
        rows.push(entry("phase " + data.phases[what], data.words[what], duration(end - start)));
        rows.push(line("head", `${clock(start)} to ${clock(end)}`));
      }
      for (const [member, kind, at] of data.faults) {
        const x = toPixel(axis, at);
        if (member === name && x > left - 6 && x < toPixel(axis, end) + 6) {
          rows.push(line("head", `${kind} at ${clock(at)}`));
        }
      }
      show(svg, Math.min(toPixel(axis, end), left + 200), top + data.pitch / 2, rows);
    };
    const place = (px, py) => {
      row = clamp(Math.floor((py - data.top) / data.pitch), 0, data.rows.length - 1);
      item = atOrBelow(items().map((one) => one[0]), toValue(axis, px));
      pick();
    };
    const move = (key) => {
      if (key === "ArrowUp" || key === "ArrowDown") {
        const start = item < 0 ? 0 : items()[item][0];
        row = clamp(row + (key === "ArrowUp" ? -1 : 1), 0, data.rows.length - 1);
        item = atOrBelow(items().map((one) => one[0]), start);
      } else if (key === "Home") item = 0;
      else if (key === "End") item = items().length - 1;
      else item += { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[key];
      pick();
    };
    return { place, move };
  };

  const readers = { lines, bars, timeline };
  const keys = ["ArrowLeft", "ArrowRight", "PageUp", "PageDown", "Home", "End"];
  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const svg = figure.querySelector(".plot svg"), hover = svg.querySelector(".hover");
    const reader = readers[data.kind](svg, data, hover);
    const leave = () => { tip.hidden = true; hover.setAttribute("visibility", "hidden"); };
    const point = (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      hover.setAttribute("visibility", "visible");
      reader.place((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { leave(); return; }
      const vertical = data.kind === "timeline" && (event.key === "ArrowUp" || event.key === "ArrowDown");
      if (!keys.includes(event.key) && !vertical) return;
      event.preventDefault();
      hover.setAttribute("visibility", "visible");
      reader.move(event.key);
    });
    for (const button of figure.querySelectorAll("button.key")) {
      const series = svg.querySelector(`g.series[data-series="${button.dataset.series}"]`);
      const light = (on) => {
        svg.classList.toggle("dimming", on && !series.classList.contains("off"));
        series.classList.toggle("lit", on);
      };
      button.addEventListener("click", () => {
        const off = series.classList.toggle("off");
        button.setAttribute("aria-pressed", String(!off));
        light(!off);
      });
      button.addEventListener("pointerenter", () => light(true));
      button.addEventListener("pointerleave", () => light(false));
      button.addEventListener("focus", () => light(button.matches(":focus-visible")));
      button.addEventListener("blur", () => light(false));
    }
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
