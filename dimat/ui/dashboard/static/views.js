// The views that are tables: agents, links, merges, lineage, alignment, data, log.

import { byId, bytes, clock, count, el, metric, NONE, number, percent, say } from "./format.js";
import { byName } from "./store.js";
import { fill, heat, Pager, rowsShown, share } from "./tables.js";

const SHOWN = 100;
const CLASSES = 40;
const STATE_FIRST = { lost: 0, late: 1, unknown: 2, running: 3, left: 4 };

async function ask(path, query) {
  const words = new URLSearchParams(query.filter(([, value]) => value !== "" && value !== null));
  const answer = await fetch(`api/${path}?${words}`);
  if (!answer.ok && answer.status !== 404) throw new Error(`the server answers with ${answer.status}`);
  return answer.json();
}

export class Agents {
  constructor(store, choose) {
    this.store = store;
    this.choose = choose;
    this.pager = new Pager("agents-pager", () => this.draw());
    this.links = new Pager("links-pager", () => this.drawLinks());
    byId("links-box").addEventListener("toggle", () => this.drawLinks());
  }

  draw(chosen = this.chosen) {
    this.chosen = chosen;
    const { store } = this;
    const many = store.agents.size > rowsShown();
    const all = store.sorted();
    // where not all fit, those that need a look come first
    if (many) all.sort((a, b) => STATE_FIRST[a.state] - STATE_FIRST[b.state] || byName(a.name, b.name));
    say("agents-note", many ? "Lost and late ones first." : "");
    const first = this.pager.show(all.length, rowsShown(), "agent");
    const name = store.run.metric || "metric";
    const heads = ["Agent", "State", "Round", "Doing", capital(name), "Loss", "Heard", "Received", "Sent", "Why"];
    const rows = all.slice(first, first + rowsShown()).map((agent) => ({
      key: agent.name,
      state: agent.state,
      chosen: agent.name === chosen,
      cells: [
        this.button(agent),
        el("span", { class: "state" }, agent.state === "unknown" ? "no news" : agent.why === "done" ? "done" : agent.state),
        agent.round || NONE,
        agent.state === "left" || agent.state === "lost" ? "" : agent.phase,
        metric(agent.metric),
        metric(agent.loss),
        agent.expected ? `${agent.heard} of ${agent.expected}` : NONE,
        bytes(agent.received),
        bytes(agent.sent),
        agent.why === "done" ? "" : agent.why,
      ],
    }));
    fill("agents", heads, rows, { numbers: [2, 4, 5, 6, 7, 8], optional: [3, 9] });
    this.drawLinks();
  }

  button(agent) {
    const made = el("button", { type: "button" }, agent.name);
    made.addEventListener("click", () => this.choose(agent.name));
    return made;
  }

  drawLinks() {
    if (!byId("links-box").open) return;
    const words = { fresh: "in the last merge", stale: "older", missing: "missing", unused: "not merged yet" };
    const links = [...this.store.links()].filter((edge) => !this.chosen || [edge.source, edge.reader].includes(this.chosen));
    links.sort((a, b) => byName(a.reader, b.reader) || byName(a.source, b.source));
    const first = this.links.show(links.length, rowsShown(), "link");
    const rows = links.slice(first, first + rowsShown()).map((edge) => {
      const kind = this.store.freshness(edge);
      const cells = [edge.reader, edge.source, edge.used ?? NONE, bytes(edge.bytes), words[kind], kind === "missing" ? `round ${edge.late}: ${edge.fault}` : ""];
      return { key: `${edge.reader} ${edge.source}`, state: kind === "missing" ? "late" : null, cells };
    });
    fill("links", ["Agent", "Listens to", "Last round merged", "Received", "State", "Why"], rows, { numbers: [2, 3], empty: "No links are known." });
  }
}

export class Merges {
  constructor(store) {
    this.store = store;
    this.pager = new Pager("merge-pager", () => this.draw());
    byId("merge-filter").addEventListener("submit", (event) => event.preventDefault());
    byId("merge-round").addEventListener("input", () => this.pager.go(0, () => this.draw()));
  }

  async draw(chosen = this.chosen) {
    if (chosen !== this.chosen) this.pager.page = 0;
    this.chosen = chosen;
    const size = Math.min(50, rowsShown());
    const query = [["agent", chosen ?? ""], ["round", byId("merge-round").value], ["offset", this.pager.page * size], ["limit", size]];
    const found = await ask("merges", query);
    const name = found.metric || "metric";
    this.pager.show(found.total, size, "merge");
    say("merges-note", count(found.total, "merge"));
    const heads = ["Agent", "Round", "Heard", "Weights", `${capital(name)} before`, `${capital(name)} after`, "Verdict", "Notes"];
    const rows = found.merges.map((merge) => ({
      key: `${merge.round} ${merge.agent}`,
      cells: [
        merge.agent,
        merge.round,
        `${merge.heard} of ${merge.expected}`,
        merge.parts.map(([who, round, weight, verdict]) => part(merge, who, round, weight, verdict)).join(", "),
        metric(merge.before),
        after(merge),
        merge.verdict,
        [...Object.entries(merge.missing).map(([who, why]) => `${who} ${why}`), ...merge.notes].join("; "),
      ],
    }));
    fill("merge-table", heads, rows, { numbers: [1, 2, 4, 5], optional: [7], empty: "No merges yet." });
  }
}

function part(merge, who, round, weight, verdict) {
  const more = [];
  if (round !== merge.round) more.push(`round ${round}`);
  if (verdict && verdict !== "own" && verdict !== "same basis") more.push(verdict);
  return `${who} ${metric(weight)}${more.length ? ` (${more.join(", ")})` : ""}`;
}

function after(merge) {
  if (merge.before === null || merge.after === null) return metric(merge.after);
  const step = merge.after - merge.before;
  // whether more is better depends on the metric: the change is told by its sign
  return `${metric(merge.after)} (${step >= 0 ? "+" : "−"}${Math.abs(step).toFixed(3)})`;
}

export class Lineage {
  constructor(store) {
    this.store = store;
  }

  async draw(chosen) {
    const agent = chosen || this.store.run.view || this.store.names()[0];
    if (!agent) return;
    const found = await ask("lineage", [["agent", agent]]);
    byId("lineage-rounds-box").hidden = true;
    byId("lineage-terms").hidden = Boolean(found.error);
    if (found.error) {
      say("lineage-note", `${agent}: ${found.error}.`);
      fill("lineage-table", ["Agent"], []);
      return;
    }
    say("lineage-note", `Contributions to the model of ${agent} after round ${found.round}.${chosen ? "" : " Choose an agent above to see another one's."}`);
    const earlier = found.contributors.some((row) => row.earlier > 0);
    const heads = ["Agent", "Share of training", "Rounds", "First network", ...(earlier ? ["Earlier models"] : [])];
    const rows = found.contributors.map((row) => ({
      key: row.agent,
      cells: [row.agent, share(row.training, percent(row.training, 1)), row.rounds || NONE, percent(row.first, 1), ...(earlier ? [percent(row.earlier, 1)] : [])],
    }));
    fill("lineage-table", heads, rows, { numbers: [3, 4] });
    const rounds = [...new Set(found.updates.map(([, round]) => round))].sort((a, b) => a - b).slice(-40);
    const names = found.contributors.map((row) => row.agent).slice(0, 60);
    const weights = new Map(found.updates.map(([who, round, weight]) => [`${round} ${who}`, weight]));
    const table = names.map((who) => ({ name: who, values: rounds.map((round) => weights.get(`${round} ${who}`) ?? null) }));
    heat("lineage-rounds", ["Agent", ...rounds.map((round) => `${round}`)], table, (value) => (100 * value).toFixed(0), Math.max(...table.flatMap((row) => row.values)));
    byId("lineage-rounds-box").hidden = !rounds.length;
  }
}

export class Alignment {
  async draw(chosen) {
    const found = await ask("alignment", [["agent", chosen ?? ""]]);
    if (found.error) {
      say("alignment-note", found.error);
      return;
    }
    const grouped = [...found.moves, ...found.adoptions.map((row) => ({ ...row, adopted: true }))]
      .filter((row) => Object.keys(row.groups).length)
      .sort((a, b) => b.round - a.round || byName(a.agent, b.agent));
    say("alignment-note", grouped.length
      ? "The peer after the arrow was permuted for a merge of the agent before it; “taken over”: the agent put its own units into the peer's order."
      : "Nothing was permuted, or not by group.");
    const moves = found.moves.slice(0, 200).map((row) => ({
      key: `${row.round} ${row.agent} ${row.peer}`,
      cells: [row.agent, row.round, row.peer, share(row.moved, percent(row.moved))],
    }));
    const none = "No peer was aligned: the method does not align, or the ledger is not in this folder.";
    fill("moves", ["Agent", "Round", "Peer", "Units moved"], moves, { numbers: [1], empty: none });
    const adoptions = [...found.adoptions].sort((a, b) => b.round - a.round || byName(a.agent, b.agent)).slice(0, 200).map((row) => ({
      key: `${row.round} ${row.agent} ${row.peer}`,
      cells: [row.agent, row.round, row.peer, row.moved === null ? NONE : share(row.moved, percent(row.moved))],
    }));
    fill("adoptions", ["Agent", "Round", "From", "Units moved"], adoptions, { numbers: [1], empty: "None so far." });
    byId("groups-box").hidden = !grouped.length;
    if (grouped.length) {
      const newest = grouped.slice(0, 40);
      const groups = [...new Set(newest.flatMap((row) => Object.keys(row.groups)))];
      const rows = newest.map((row) => ({ name: `${row.agent} ← ${row.peer}, round ${row.round}${row.adopted ? ", taken over" : ""}`, values: groups.map((group) => row.groups[group] ?? null) }));
      heat("groups", ["Aligned", ...groups], rows, (value) => (100 * value).toFixed(0));
    }
  }
}

export class Data {
  constructor(store) {
    this.store = store;
  }

  draw(chosen) {
    const agents = this.store.sorted().filter((agent) => (!chosen || agent.name === chosen) && agent.histogram.length);
    const table = byId("histogram");
    table.querySelectorAll("thead, tbody").forEach((part) => part.remove());
    byId("histogram-box").hidden = !agents.length;
    if (!agents.length) {
      const samples = this.store.sorted().filter((agent) => agent.samples && (!chosen || agent.name === chosen));
      const told = samples.map((agent) => `${agent.name} ${number(agent.samples)}`).join(", ");
      say("data-note", `This run's events do not contain the agents' samples by class.${told ? ` Samples in all: ${told}.` : ""}`);
      return;
    }
    const shown = agents.slice(0, SHOWN);
    const classes = Math.min(CLASSES, Math.max(...shown.map((agent) => agent.histogram.length)));
    const names = this.store.run.classes ?? [];
    const most = Math.max(1, ...shown.flatMap((agent) => agent.histogram.slice(0, classes)));
    const left = agents.length > SHOWN ? ` The first ${SHOWN} of ${count(agents.length, "agent")}; choose one above to see another.` : "";
    say("data-note", `Samples of each class that an agent trains on.${left}`);
    const heads = ["Agent", ...Array.from({ length: classes }, (_, i) => names[i] ?? `${i}`), "All"];
    table.append(
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...shown.map((agent) => el("tr", {}, el("th", { scope: "row" }, agent.name),
        ...Array.from({ length: classes }, (_, i) => bar(agent.histogram[i] ?? 0, most)),
        el("td", {}, number(agent.samples))))),
    );
  }
}

function bar(samples, most) {
  const made = el("i", { "aria-hidden": "true" });
  made.style.height = `${(3.2 * samples) / most}rem`;
  return el("td", {}, made, number(samples));
}

export class Log {
  constructor(store) {
    this.store = store;
    byId("level").addEventListener("change", () => this.draw());
  }

  draw(chosen = this.chosen) {
    this.chosen = chosen;
    const level = Number(byId("level").value);
    const rows = this.store.log.filter((row) => row[2] <= level && (!chosen || row[3] === chosen)).reverse();
    say("log-note", `${count(rows.length, "line")}, newest first`);
    byId("log-lines").replaceChildren(...rows.map(([, time, loud, , text]) =>
      el("li", { class: loud < 0 ? "warning" : loud === 1 ? "trouble" : null }, el("time", {}, clock(time, this.store.run.simulated)), el("span", {}, text))));
  }
}

function capital(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}
