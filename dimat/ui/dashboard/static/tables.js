// Tables: filled anew in place, and pages of them where they are long.

import { byId, count, el, number } from "./format.js";

// cards on a narrow screen are long: fewer at a time
const narrow = matchMedia("(max-width: 46rem)");
export const rowsShown = () => (narrow.matches ? 20 : 100);

// Fill a table. rows: { key, cells, state, chosen, head }; a cell is text, a number, or an element.
// A row that says the same as before stays as it is, so that focus and selection stay too.
// optional: columns that are left out while no row has anything in them.
export function fill(id, heads, rows, { numbers = [], optional = [], head = 0, empty = "" } = {}) {
  const table = byId(id);
  const without = new Set(optional.filter((i) => rows.every((row) => !row.cells[i])));
  const right = new Set(numbers);
  const signature = JSON.stringify(heads.filter((_, i) => !without.has(i)));
  if (table.dataset.heads !== signature) {
    table.dataset.heads = signature;
    table.tHead?.remove();
    const cells = heads.map((text, i) => (without.has(i) ? null
      : el("th", { scope: "col", role: "columnheader", class: right.has(i) ? "num" : null }, text)));
    const top = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...cells));
    table.setAttribute("role", "table"); // kept where style makes cards of the rows
    table.querySelectorAll("tbody").forEach((body) => body.remove());
    table.append(top, el("tbody", { role: "rowgroup" }));
  }
  const body = table.tBodies[0];
  table.hidden = !rows.length && !empty;
  if (!rows.length) {
    body.replaceChildren(...(empty ? [el("tr", { role: "row" }, el("td", { role: "cell", colspan: heads.length, class: "soft" }, empty))] : []));
    return;
  }
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const made = rows.map((row) => {
    const key = String(row.key);
    const said = JSON.stringify([row.cells.map(plain), row.state, row.chosen]);
    const before = old.get(key);
    if (before && before.said === said) return before;
    const cells = row.cells.map((cell, i) => {
      if (without.has(i)) return null;
      const kind = i === head ? "th" : "td";
      const role = i === head ? "rowheader" : "cell";
      const attributes = { role, scope: i === head ? "row" : null, "data-label": heads[i], class: right.has(i) ? "num" : null };
      const holder = el(kind, attributes);
      if (cell !== null && cell !== undefined && cell !== "") holder.append(el("span", {}, cell));
      return holder;
    });
    const tr = el("tr", { role: "row", "data-key": key, "data-state": row.state, class: row.chosen ? "chosen" : null }, ...cells);
    tr.said = said;
    return tr;
  });
  if (made.length !== body.rows.length || made.some((row, i) => body.rows[i] !== row)) {
    const active = document.activeElement;
    const key = body.contains(active) ? active.closest("tr")?.dataset.key : null;
    body.replaceChildren(...made);
    if (key !== null && key !== undefined && document.activeElement !== active) {
      made.find((row) => row.dataset.key === key)?.querySelector("button")?.focus();
    }
  }
}

function plain(cell) {
  return cell instanceof Node ? `${cell.className ?? ""}|${cell.textContent}` : cell;
}

// Buttons for the pages of a long table.
export class Pager {
  constructor(id, changed) {
    this.box = byId(id);
    this.page = 0;
    this.before = el("button", { type: "button" }, "Previous");
    this.after = el("button", { type: "button" }, "Next");
    this.note = el("span", { class: "soft" });
    this.before.addEventListener("click", () => this.go(this.page - 1, changed));
    this.after.addEventListener("click", () => this.go(this.page + 1, changed));
  }

  go(page, changed) {
    this.page = Math.max(0, page);
    changed();
  }

  show(total, size, what) {
    this.page = Math.min(this.page, Math.max(0, Math.ceil(total / size) - 1));
    const first = this.page * size;
    this.note.textContent = `${number(first + 1)} to ${number(Math.min(total, first + size))} of ${count(total, what)}`;
    this.before.disabled = this.page === 0;
    this.after.disabled = first + size >= total;
    if (total <= size) this.box.replaceChildren();
    else if (!this.box.childElementCount) this.box.append(this.before, this.after, this.note);
    return first;
  }
}

// A share as a bar and a number.
export function share(value, text) {
  const bar = el("i");
  bar.style.width = `${Math.round(1000 * Math.min(1, value ?? 0)) / 10}%`;
  return el("span", { class: "share" }, el("span", {}, text), el("b", { "aria-hidden": "true" }, bar));
}

// A table of shares, darker where there is more, darkest at `most`. rows: { name, values }, values from 0 to 1 or null.
export function heat(id, heads, rows, text, most = 1) {
  const table = byId(id);
  table.querySelectorAll("thead, tbody").forEach((part) => part.remove());
  const top = el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head))));
  const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name),
    ...row.values.map((value) => {
      const cell = el("td", {}, value === null || value === undefined ? "" : text(value));
      if (value) cell.style.backgroundColor = `rgba(var(--heat), ${Math.min(0.45, 0.05 + (0.4 * value) / most)})`;
      return cell;
    }))));
  table.append(top, body);
}
