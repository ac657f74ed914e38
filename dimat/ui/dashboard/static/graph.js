// The network as a picture. Everything in it is also in the tables below it.

import cytoscape from "./vendor/cytoscape.esm.min.mjs";
import { byId, metric, say } from "./format.js";

const RAMP = ["#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"];
const LOST = "#d0202a";
const MANY = 150; // from so many agents on: a grid without names
const SHAPES = { running: "ellipse", late: "diamond", lost: "triangle", left: "round-rectangle", unknown: "ellipse" };

export class Graph {
  constructor(store, choose) {
    this.store = store;
    this.laid = "";
    this.cy = null;
    this.choose = choose;
    for (const [id, factor] of [["zoom-in", 1.3], ["zoom-out", 1 / 1.3]]) {
      byId(id).addEventListener("click", () => this.zoom(factor));
    }
    byId("zoom-fit").addEventListener("click", () => this.cy?.fit(undefined, 30));
    byId("layout").addEventListener("change", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.cy?.style(style()));
  }

  zoom(factor) {
    if (!this.cy) return;
    const box = this.cy.container().getBoundingClientRect();
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: { x: box.width / 2, y: box.height / 2 } });
  }

  draw(chosen = this.chosen) {
    this.chosen = chosen;
    const agents = this.store.sorted();
    if (!agents.length) return;
    if (!this.cy) this.open();
    const many = agents.length > MANY;
    const [low, high] = range(agents);
    say("legend-metric", `${this.store.run.metric || "metric"} after the last merge`);
    say("legend-low", low === null ? "none yet" : metric(low));
    say("legend-high", high === null ? "" : metric(high));
    this.cy.batch(() => {
      this.drawAgents(agents, low, high, many, chosen);
      this.drawLinks();
    });
    this.arrange(agents.length, many);
    byId("graph").setAttribute("aria-label", described(agents));
  }

  open() {
    this.cy = cytoscape({
      container: byId("graph"),
      style: style(),
      userZoomingEnabled: false, // the wheel scrolls the page
      userPanningEnabled: !matchMedia("(pointer: coarse)").matches,
      boxSelectionEnabled: false,
      autoungrabify: true,
      minZoom: 0.05,
      maxZoom: 4,
      hideEdgesOnViewport: true,
      textureOnViewport: true,
    });
    this.cy.on("tap", "node", (event) => this.choose(event.target.id()));
    new ResizeObserver(() => {
      this.cy.resize();
      this.cy.fit(undefined, 30);
    }).observe(byId("graph"));
  }

  drawAgents(agents, low, high, many, chosen) {
    for (const agent of agents) {
      const state = agent.state;
      const value = agent.metric;
      const told = value === null ? "" : metric(value);
      const word = state === "running" || state === "left" ? told : state === "unknown" ? "no news" : state;
      const data = {
        id: agent.name,
        label: many ? "" : [agent.name, word].filter(Boolean).join("\n"),
        colour: state === "lost" ? LOST : value === null ? "unknown" : ramp(value, low, high),
        shape: SHAPES[state] ?? "ellipse",
        state,
        chosen: agent.name === chosen ? "yes" : "no",
      };
      const node = this.cy.$id(agent.name);
      if (node.empty()) this.cy.add({ group: "nodes", data });
      else if (differs(node.data(), data)) node.data(data);
    }
  }

  drawLinks() {
    const joined = new Map();
    for (const edge of this.store.links()) {
      const ends = [edge.source, edge.reader].sort();
      const id = `link ${ends[0]} ${ends[1]}`;
      const found = joined.get(id) ?? { id, source: ends[0], target: ends[1], bytes: 0, kind: "unused" };
      found.bytes += edge.bytes;
      found.kind = worse(found.kind, this.store.freshness(edge));
      joined.set(id, found);
    }
    const most = Math.max(1, ...[...joined.values()].map((edge) => edge.bytes));
    for (const edge of joined.values()) {
      const data = { ...edge, width: Math.round(10 * (1 + 5 * Math.sqrt(edge.bytes / most))) / 10 };
      const found = this.cy.$id(edge.id);
      if (found.empty()) this.cy.add({ group: "edges", data });
      else if (differs(found.data(), data)) found.data(data);
    }
  }

  arrange(count, many) {
    const wanted = byId("layout").value;
    const key = `${wanted} ${this.cy.nodes().length} ${this.cy.edges().length} ${this.store.mark}`;
    if (key === this.laid) return;
    this.laid = key;
    const name = wanted !== "auto" ? wanted : many ? "grid" : count <= 16 ? "circle" : "cose";
    const common = { animate: false, fit: true, padding: 30 };
    if (name === "cose") {
      this.cy.layout({ ...common, name: "circle" }).run();
      this.cy.layout({ ...common, name, randomize: false, numIter: count > 400 ? 50 : 400, nodeRepulsion: () => 20000 }).run();
    } else {
      // room for the names at the sides of a circle, so that they need not be made smaller
      const boundingBox = { x1: 0, y1: 0, w: Math.max(80, this.cy.width() - 120), h: Math.max(80, this.cy.height() - 100) };
      this.cy.layout({ ...common, name, ...(name === "circle" && { boundingBox }), avoidOverlap: name !== "circle", condense: false }).run();
    }
    this.name(name === "circle");
    this.cy.fit(undefined, 30);
  }

  name(onCircle) {
    const box = this.cy.nodes().boundingBox({ includeLabels: false });
    let moved = false;
    this.cy.batch(() => {
      for (const node of this.cy.nodes()) {
        const side = onCircle ? outward(node.position(), box) : "bottom";
        if (side === (node.data("side") ?? "bottom")) continue;
        moved = true;
        node.data("side", side);
      }
    });
    if (moved) this.cy.style(style()); // else names are drawn within the bounds that they had on the other side
  }
}

// On a circle names stand outside of it, where no link passes.
function outward({ x, y }, box) {
  const across = (x - (box.x1 + box.x2) / 2) / box.w;
  const down = (y - (box.y1 + box.y2) / 2) / box.h;
  if (Math.abs(across) > 0.2) return across > 0 ? "right" : "left";
  return down > 0 ? "bottom" : "top";
}

function style() {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(`--${name}`).trim();
  return [
    {
      selector: "node",
      style: {
        "background-color": (node) => (node.data("colour") === "unknown" ? colour("unknown") : node.data("colour")),
        shape: "data(shape)",
        width: 30,
        height: 30,
        label: "data(label)",
        color: colour("ink"),
        "font-size": 12,
        "font-family": "system-ui, sans-serif",
        "text-wrap": "wrap",
        "text-valign": "bottom",
        "text-margin-y": 4,
        "text-background-color": colour("paper"),
        "text-background-opacity": 0.8,
        "text-background-padding": 2,
        "border-width": 1.5,
        "border-color": colour("node-line"),
      },
    },
    { selector: 'node[state = "late"]', style: { "border-width": 4, "border-color": colour("late-mark"), width: 34, height: 34 } },
    { selector: 'node[state = "lost"]', style: { "border-width": 2, width: 36, height: 34, "font-weight": "bold", color: colour("lost") } },
    { selector: 'node[state = "unknown"]', style: { "border-style": "dashed", "border-color": colour("edge") } },
    { selector: 'node[side = "top"]', style: { "text-valign": "top", "text-margin-y": -4 } },
    { selector: 'node[side = "left"]', style: { "text-valign": "center", "text-halign": "left", "text-margin-x": -4, "text-margin-y": 0 } },
    { selector: 'node[side = "right"]', style: { "text-valign": "center", "text-halign": "right", "text-margin-x": 4, "text-margin-y": 0 } },
    { selector: 'node[chosen = "yes"]', style: { "outline-width": 3, "outline-color": colour("link"), "outline-offset": 3 } },
    {
      selector: "edge",
      style: { width: "data(width)", "line-color": colour("edge"), "curve-style": "haystack", "haystack-radius": 0, opacity: 0.8 },
    },
    { selector: 'edge[kind = "unused"]', style: { "line-color": colour("line") } },
    { selector: 'edge[kind = "stale"]', style: { "line-style": "dashed" } },
    { selector: 'edge[kind = "missing"]', style: { "line-style": "dotted", "line-color": colour("late-mark") } },
  ];
}

function differs(old, now) {
  return Object.keys(now).some((key) => old[key] !== now[key]);
}

function worse(a, b) {
  const order = ["unused", "fresh", "stale", "missing"];
  return order[Math.max(order.indexOf(a), order.indexOf(b))];
}

function range(agents) {
  const values = agents.map((agent) => agent.metric).filter((value) => value !== null);
  return values.length ? [Math.min(...values), Math.max(...values)] : [null, null];
}

function ramp(value, low, high) {
  const at = high > low ? (value - low) / (high - low) : 0.5;
  return RAMP[Math.min(RAMP.length - 1, Math.floor(at * RAMP.length))];
}

function described(agents) {
  const counts = new Map();
  for (const agent of agents) counts.set(agent.state, (counts.get(agent.state) ?? 0) + 1);
  const parts = [...counts].map(([state, many]) => `${many} ${state}`);
  return `Network of ${agents.length} agents: ${parts.join(", ")}. The tables below hold the same.`;
}
