// What the server has told so far. `apply` takes in what is new since the version before, or everything.

export class Store {
  constructor() {
    this.mark = "";
    this.reset();
  }

  reset() {
    this.version = 0;
    this.run = {};
    this.agents = new Map();
    this.edges = new Map(); // reader → source → edge
    this.curves = new Map(); // agent → round → [round, loss, before, after]
    this.means = new Map(); // round → [round, mean, low, high, loss]
    this.log = [];
    this.nodes = 0; // grows when an agent or link is new: the picture is laid out anew
  }

  apply(told) {
    if (told.mark !== this.mark || told.since === 0) {
      this.reset();
      this.mark = told.mark;
    } else if (told.since > this.version) {
      return false; // something is missing: ask for everything
    }
    this.version = told.version;
    this.run = told.run;
    this.time_s = told.time_s;
    for (const agent of told.agents) {
      if (!this.agents.has(agent.name)) this.nodes += 1;
      this.agents.set(agent.name, agent);
    }
    for (const [source, reader, bytes, used, late, fault] of told.edges) {
      if (!this.edges.has(reader)) this.edges.set(reader, new Map());
      const inward = this.edges.get(reader);
      if (!inward.has(source)) this.nodes += 1;
      inward.set(source, { source, reader, bytes, used, late, fault });
    }
    for (const [name, rows] of Object.entries(told.curves)) {
      if (!this.curves.has(name)) this.curves.set(name, new Map());
      for (const row of rows) this.curves.get(name).set(row[0], row);
    }
    for (const row of told.means) this.means.set(row[0], row);
    if (told.log.length) {
      const known = new Set(told.log.map((row) => row[0]));
      this.log = this.log.filter((row) => !known.has(row[0])).concat(told.log);
      this.log.sort((a, b) => a[1] - b[1] || a[0] - b[0]);
      this.log = this.log.slice(-400);
    }
    return true;
  }

  names() {
    return [...this.agents.keys()].sort(byName);
  }

  sorted() {
    return [...this.agents.values()].sort((a, b) => byName(a.name, b.name));
  }

  *links() {
    for (const inward of this.edges.values()) yield* inward.values();
  }

  // How fresh a link is: "missing" in the reader's last merge, "stale" by some rounds, "fresh", or "unused" so far.
  freshness(edge) {
    const merged = this.agents.get(edge.reader)?.merged ?? 0;
    if (edge.late && edge.late >= merged) return "missing";
    if (edge.used === null) return "unused";
    return merged - edge.used > 0 ? "stale" : "fresh";
  }
}

const collator = new Intl.Collator("en", { numeric: true });

export function byName(a, b) {
  return collator.compare(a, b);
}
