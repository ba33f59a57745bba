// Numbers and moments as people read them; null is "not known".
const NB = "\u00a0";
export const UNKNOWN = "–";

function digits3(value) {
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  const text = value.toFixed(Math.min(digits, 12));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function scaled(value, units) {
  if (value == null || !Number.isFinite(value)) return UNKNOWN;
  let size = Math.abs(value), unit = 0;
  while (size >= 999.5 && unit < units.length - 1) { size /= 1000; unit += 1; }
  const text = (value < 0 ? "−" : "") + digits3(size);
  return units[unit] ? text + NB + units[unit] : text;
}

export const count = (value) => scaled(value, ["", "k", "M", "G", "T"]);
export const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"]);
export const rate = (value) => (value == null ? UNKNOWN : bytes(value) + "/s");
export const percent = (share, digits = 1) => (share == null ? UNKNOWN : (100 * share).toFixed(digits).replace("-", "−") + NB + "%");
export const loss = (value) => (value == null ? UNKNOWN : Math.abs(value) < 100 ? value.toFixed(3) : value.toPrecision(3));
export const times = (value) => (value == null || !Number.isFinite(value) ? UNKNOWN : (value >= 100 ? Math.round(value).toString() : digits3(value)) + "×");

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return UNKNOWN;
  const size = Math.abs(seconds);
  if (size < 0.9995) return digits3(1000 * seconds) + NB + "ms";
  if (size < 59.95) return digits3(seconds) + NB + "s";
  const whole = Math.round(seconds), pad = (value) => String(value).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)}${NB}min${NB}${pad(whole % 60)}${NB}s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)}${NB}h${NB}${pad(Math.floor((whole % 3600) / 60))}${NB}min`;
  return `${Math.floor(whole / 86400)}${NB}d${NB}${Math.floor((whole % 86400) / 3600)}${NB}h`;
}

export function clock(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return UNKNOWN;
  const tenths = Math.floor(seconds * 10 + 1e-6), whole = Math.floor(tenths / 10), pad = (value) => String(value).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)}:${pad(whole % 60)}.${tenths % 10}`;
  const days = Math.floor(whole / 86400), rest = `${Math.floor((whole % 86400) / 3600)}:${pad(Math.floor((whole % 3600) / 60))}:${pad(whole % 60)}`;
  return days ? `${days}${NB}d${NB}${rest}` : rest;
}

// A tick of a time axis: no tenths, no seconds where the step is minutes.
export function tick(seconds, step) {
  const whole = Math.round(seconds), pad = (value) => String(value).padStart(2, "0");
  if (step < 1) return seconds.toFixed(1) + "s";
  if (step < 60) return whole < 60 ? whole + "s" : `${Math.floor(whole / 60)}:${pad(whole % 60)}`;
  if (step < 3600) return whole < 3600 ? whole / 60 + "m" : `${Math.floor(whole / 3600)}h${pad(Math.floor((whole % 3600) / 60))}`;
  return step < 86400 ? whole / 3600 + "h" : (whole / 86400).toFixed(step % 86400 ? 1 : 0) + "d";
}

export const plural = (number, word) => `${count(number)}${NB}${word}${number === 1 ? "" : "s"}`;

// Elements without innerHTML: nothing that a run wrote is ever parsed as HTML.
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export function setText(element, text) { if (element.textContent !== text) element.textContent = text; }
