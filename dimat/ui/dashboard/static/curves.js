// Curves by round: a line for each agent where they are few, else the mean, the range and the chosen agent.

import { byId, el, metric, NONE, say } from "./format.js";
import { byName } from "./store.js";
import { fill } from "./tables.js";

// Okabe and Ito's colours, told apart with any colour vision; dashes tell the lines apart without colour
const LIGHT = ["#0072b2", "#d55e00", "#007a5a", "#a8457e", "#8a6d00", "#2a7fb0", "#5b6675", "#000000"];
const DARK = ["#56b4e9", "#ff9a57", "#2fd0a0", "#e39bc6", "#f0e442", "#9ad4f5", "#a3aebb", "#ffffff"];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const FEW = 8;

export class Curves {
  constructor(store) {
    this.store = store;
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.redraw());
    this.fetched = new Map(); // whole curves of agents in large runs
    this.charts = [new Chart(byId("chart-metric")), new Chart(byId("chart-loss"))];
  }

  redraw() {
    for (const chart of this.charts) chart.forget();
    this.draw(this.chosen);
  }

  async draw(chosen) {
    this.chosen = chosen;
    const { store } = this;
    const name = store.run.metric || "metric";
    say("t-metric", `${capital(name)} after the merge`);
    if (chosen && !store.run.few) await this.fetch(chosen);
    const lines = this.lines(chosen);
    const rounds = [...new Set([...store.means.keys(), ...lines.flatMap((line) => [...line.rows.keys()])])].sort((a, b) => a - b);
    this.charts[0].draw(rounds, lines, this.column(3, 1));
    this.charts[1].draw(rounds, lines, this.column(1, 4));
    this.keys(lines);
    const some = store.agents.size > FEW;
    const thick = some && !chosen ? "Thick: mean of all agents. Choose an agent above to see its own line. " : "";
    say("curves-note", `${thick}Beside a name: the last ${name} after a merge.`);
    this.table(rounds, chosen);
  }

  // own: place in an agent's row; mean: place in a row of means
  column(own, mean) {
    return (line, round) => line.rows.get(round)?.[line.mean ? (line.place ?? mean) : own] ?? null;
  }

  lines(chosen) {
    const colours = this.dark.matches ? DARK : LIGHT;
    const { store } = this;
    const many = store.agents.size > FEW;
    const names = [...store.curves.keys()].sort(byName);
    const lines = [];
    if (!many) {
      names.forEach((name, i) => lines.push({
        name, rows: store.curves.get(name), colour: colours[i % colours.length], dash: DASHES[i % DASHES.length],
        width: name === chosen ? 3.5 : chosen ? 1.2 : 2,
      }));
      return lines;
    }
    for (const name of names) {
      if (name !== chosen) lines.push({ name, rows: store.curves.get(name), colour: this.dark.matches ? "#4a5561" : "#c3cad2", dash: [], width: 1, quiet: true });
    }
    lines.push({ name: "mean of all agents", rows: store.means, mean: true, colour: colours[7], dash: [], width: 3 });
    if (!names.length) {
      lines.push({ name: "lowest", rows: store.means, mean: true, place: 2, colour: colours[6], dash: [6, 4], width: 1.5 });
      lines.push({ name: "highest", rows: store.means, mean: true, place: 3, colour: colours[6], dash: [2, 3], width: 1.5 });
    }
    const rows = store.curves.get(chosen) ?? this.fetched.get(chosen)?.rows;
    if (chosen && rows) lines.push({ name: chosen, rows, colour: colours[1], dash: [8, 4], width: 3 });
    return lines;
  }

  async fetch(name) {
    const round = this.store.agents.get(name)?.merged;
    if (this.fetched.get(name)?.round === round) return;
    const answer = await fetch(`api/curves?agent=${encodeURIComponent(name)}`);
    if (!answer.ok) return;
    const rows = (await answer.json()).curves[name] ?? [];
    this.fetched.set(name, { round, rows: new Map(rows.map((row) => [row[0], row])) });
  }

  keys(lines) {
    const shown = lines.filter((line) => !line.quiet);
    const quiet = lines.length - shown.length;
    const list = byId("curve-keys");
    list.replaceChildren(...shown.map((line) => {
      const last = [...line.rows.values()].at(-1);
      const value = last ? last[line.mean ? (line.place ?? 1) : 3] : null;
      return el("li", {}, sample(line), line.name, el("b", {}, value === null ? "" : metric(value)));
    }));
    if (quiet) list.append(el("li", { class: "soft" }, `thin: ${quiet} agents`));
  }

  table(rounds, chosen) {
    const own = this.store.curves.get(chosen) ?? this.fetched.get(chosen)?.rows;
    const heads = own ? ["Round", "Before merge", "After merge", "Loss"] : ["Round", "Mean", "Lowest", "Highest", "Mean loss"];
    const rows = [...rounds].reverse().slice(0, 200).map((round) => {
      const row = own ? own.get(round) : this.store.means.get(round);
      const values = row ? (own ? [row[2], row[3], row[1]] : [row[1], row[2], row[3], row[4]]) : [];
      return { key: round, cells: [round, ...values.map((value) => metric(value))] };
    });
    fill("means", heads, rows, { numbers: [1, 2, 3, 4] });
  }
}

class Chart {
  constructor(box) {
    this.box = box;
    this.plot = null;
    this.made = "";
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(box);
  }

  forget() {
    this.made = "";
  }

  size() {
    return { width: Math.max(200, this.box.clientWidth - 10), height: 280 };
  }

  draw(rounds, lines, value) {
    const used = lines.filter((line) => rounds.some((round) => value(line, round) !== null));
    // the mean of losses has no range
    const kept = used.filter((line) => line.place === undefined || this.box.id === "chart-metric");
    const data = [rounds, ...kept.map((line) => rounds.map((round) => value(line, round)))];
    this.box.dataset.points = String(Math.max(0, ...data.slice(1).map((row) => row.filter((v) => v !== null).length)));
    const made = JSON.stringify(kept.map((line) => [line.name, line.colour, line.dash, line.width]));
    if (made === this.made && this.plot) {
      this.plot.setData(data);
      return;
    }
    this.plot?.destroy();
    this.made = made;
    this.plot = new window.uPlot(options(this.size(), kept), data, this.box);
  }
}

function options(size, lines) {
  const css = getComputedStyle(document.documentElement);
  const soft = css.getPropertyValue("--soft").trim();
  const grid = { stroke: css.getPropertyValue("--line").trim(), width: 1 };
  const ticks = { ...grid, size: 4 };
  return {
    ...size,
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, points: { show: false } },
    scales: { x: { time: false, range: (_, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) } },
    axes: [
      { label: "round", stroke: soft, grid, ticks, labelSize: 22, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] },
      { stroke: soft, grid, ticks, size: 56, values: (_, values) => values.map((v) => (v === null ? NONE : String(Number(v.toPrecision(6))))) },
    ],
    series: [
      { label: "round" },
      ...lines.map((line) => ({
        label: line.name, stroke: line.colour, width: line.width, dash: line.dash, spanGaps: true,
        points: { show: !line.quiet, size: 5, fill: line.colour },
      })),
    ],
  };
}

function sample(line) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 28 10");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [key, value] of [["d", "M0 5h28"], ["stroke", line.colour], ["stroke-width", "3"], ["stroke-dasharray", line.dash.join(" ")]]) path.setAttribute(key, value);
  svg.append(path);
  return svg;
}

function capital(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}
