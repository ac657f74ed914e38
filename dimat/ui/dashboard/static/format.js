// Numbers and times as text, and elements made without HTML: text from outside is only ever a text node.

export const NONE = "–";

export function metric(value) {
  if (value === null || value === undefined) return NONE;
  return Math.abs(value) < 1000 ? value.toFixed(3) : value.toPrecision(4);
}

export function bytes(count) {
  let value = count ?? 0;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 100) return `${value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function percent(share, digits = 0) {
  return share === null || share === undefined ? NONE : `${(100 * share).toFixed(digits)} %`;
}

export function number(value) {
  return (value ?? 0).toLocaleString("en");
}

export function clock(value, simulated) {
  return simulated ? seconds(value) : new Date(1000 * value).toLocaleTimeString([], { hour12: false });
}

export function count(value, what) {
  return `${number(value)} ${what}${value === 1 ? "" : "s"}`;
}

// Make an element: el("td", { class: "num" }, "text", otherElement)
export function el(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

// Set text only where it differs, so that readers of a live region are not told the same again.
export function say(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text;
}
