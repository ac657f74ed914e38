// The page: takes in what the server tells, and draws the view that is open.

import { Curves } from "./curves.js";
import { byId, bytes, count, el, metric, NONE, number, say } from "./format.js";
import { Graph } from "./graph.js";
import { Store } from "./store.js";
import { Agents, Alignment, Data, Lineage, Log, Merges } from "./views.js";

const store = new Store();
let chosen = "";
let source = null;
let last = "";
let drawing = false;
let again = false;

const agents = new Agents(store, choose);
const graph = new Graph(store, choose);
const views = {
  network: { draw: (who) => { graph.draw(who); agents.draw(who); } },
  curves: new Curves(store),
  merges: new Merges(store),
  lineage: new Lineage(store),
  alignment: new Alignment(),
  data: new Data(store),
  log: new Log(store),
};

function choose(name) {
  const box = byId("agent");
  chosen = chosen === name && name ? "" : name;
  box.value = chosen;
  draw();
}

function current() {
  const name = location.hash.slice(1);
  return Object.hasOwn(views, name) ? name : "network";
}

function open() {
  const name = current();
  for (const section of document.querySelectorAll("[data-view]")) section.hidden = section.dataset.view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    // not scrolled to: in newer browsers the first Tab would begin there, behind the skip link
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  draw();
}

// One drawing at a time; what comes meanwhile is drawn after it.
async function draw() {
  if (drawing) {
    again = true;
    return;
  }
  drawing = true;
  try {
    do {
      again = false;
      head();
      await views[current()].draw(chosen);
    } while (again);
    off("");
  } catch (error) {
    off(`This view could not be drawn: ${error.message}`);
  } finally {
    drawing = false;
  }
}

function off(text) {
  byId("notices").hidden = !text && !notices();
  say("notices", [notices(), text].filter(Boolean).join(" "));
}

function notices() {
  const { run } = store;
  const told = [];
  if (run.damaged) told.push(`${count(run.damaged, "damaged line")} of the log ${run.damaged === 1 ? "was" : "were"} passed over.`);
  if (run.left_out) told.push(`${number(run.left_out)} times an agent, link or event was left out, since there are too many.`);
  if (run.notice) told.push(run.notice);
  return told.join(" ");
}

function head() {
  const { run } = store;
  if (!store.agents.size) return;
  say("run", run.name || "dimat");
  document.title = `${run.name || "run"} · dimat`;
  const what = [run.method, run.simulated ? "simulated" : "", run.view ? `what ${run.view} knows` : "", run.finished ? `ended: ${run.finished}` : ""];
  say("about", what.filter(Boolean).join(" · "));
  say("version", `dimat ${run.dimat}`);
  const all = [...store.agents.values()];
  const states = (name) => all.filter((agent) => agent.state === name).length;
  const rounds = all.map((agent) => agent.round).filter((round) => round > 0);
  const low = rounds.length ? Math.min(...rounds) : 0;
  const high = rounds.length ? Math.max(...rounds) : 0;
  const values = all.map((agent) => agent.metric).filter((value) => value !== null);
  const mean = values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  const trouble = [["late", states("late")], ["lost", states("lost")]].filter(([, many]) => many).map(([word, many]) => `${many} ${word}`);
  facts([
    ["agents", `${number(all.length)}${trouble.length ? `, ${trouble.join(", ")}` : ""}`],
    ["round", `${low === high ? high : `${low} to ${high}`}${run.rounds ? ` of ${run.rounds}` : ""}`],
    [`mean ${run.metric || "metric"}`, metric(mean)],
    ["received in all", bytes(all.reduce((sum, agent) => sum + agent.received, 0))],
    ["parameters", run.parameters ? number(run.parameters) : NONE],
  ]);
  const box = byId("agent");
  if (box.options.length !== store.agents.size + 1) {
    box.replaceChildren(el("option", { value: "" }, "All agents"), ...store.names().map((name) => el("option", { value: name }, name)));
    box.value = chosen;
  }
}

function facts(pairs) {
  const list = byId("facts");
  pairs.forEach(([what, value], i) => {
    let box = list.children[i];
    if (!box) {
      box = el("div", {}, el("dt"), el("dd"));
      list.append(box);
    }
    if (box.firstChild.textContent !== what) box.firstChild.textContent = what;
    if (box.lastChild.textContent !== value) box.lastChild.textContent = value;
  });
}

function connection(text, bad = false) {
  say("connection", text);
  byId("connection").classList.toggle("off", bad);
}

function listen() {
  source?.close();
  source = new EventSource(`api/events${last ? `?since=${encodeURIComponent(last)}` : ""}`);
  source.addEventListener("message", (event) => {
    if (!store.apply(JSON.parse(event.data))) {
      last = "";
      listen();
      return;
    }
    last = event.lastEventId;
    connection(store.run.finished ? "The run has ended." : "Live");
    draw();
  });
  source.addEventListener("error", () => {
    connection("Not connected; trying again. The page may be out of date.", true);
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
}

byId("agent").addEventListener("change", (event) => {
  chosen = event.target.value;
  draw();
});
window.addEventListener("hashchange", open);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address's end names the view
  byId("main").focus();
});
open();
listen();
