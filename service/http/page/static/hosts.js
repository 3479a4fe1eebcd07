// A host as `vllm-batch hosts` shows it, in the same words; orders about it.

import { ask } from "./dialogs.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { button, fact } from "./parts.js";
import { call } from "./server.js";

const KINDS = { alive: "is-good", draining: "is-waiting", drained: "is-waiting", stopped: "is-calm", lost: "is-bad" };

export function state(host) {
  const name = host.state.replace("HOST_STATE_", "").toLowerCase();
  if (name !== "alive" || !host.drain) return name;
  return host.drain.is_complete ? "drained" : "draining";
}

export function pill(host) {
  const name = state(host);
  return h(`span.pill.${KINDS[name] ?? "is-calm"}`, { title: `seen ${ago(host.age)}` }, h("span.dot"), name);
}

export function buttons(host) {
  const data = { "data-host": host.name };
  return [
    host.drain ? button("Resume host", "resume-host", data) : button("Drain host", "drain-host", data),
    host.state !== "HOST_STATE_ALIVE" && button("Forget host", "forget-host", data, ".danger"),
  ];
}

export function about(host) {
  const models = new Set(host.workers.flatMap((worker) => worker.models));
  const versions = new Set(host.programs.map((program) => program.version).filter(Boolean));
  return [
    host.notes.length > 0 && h("ul.notes", { "aria-label": `Notes about ${host.name}` }, host.notes.map((note) => h("li", {}, note))),
    h(
      "dl.facts",
      {},
      fact("Seen", ago(host.age)),
      fact("Version", [...versions].sort().join(", ")),
      fact("Workers", host.workers.map(workerWords).join(", ")),
      fact("Models", [...models].sort().join(", ")),
      fact("GPUs", gpus(host.gpus)),
    ),
    h(
      "details.programs",
      { "data-key": "programs" },
      h("summary", {}, `Programs: ${host.programs.map((program) => program.name).join(", ")}`),
      h("ul.rows", {}, host.programs.map(row)),
    ),
  ];
}

const ago = (duration) => `${f.seconds(parseFloat(duration))} ago`;

function workerWords(worker) {
  const budget = worker.budget_limit ? `${worker.budget_left}/${worker.budget_limit}` : "";
  return [worker.worker_id.split(":").pop(), worker.phase, worker.verdict, budget].filter(Boolean).join(" ");
}

function gpus(found) {
  const names = found.map((gpu) => gpu.name);
  return [...new Set(names)].map((name) => `${names.filter((each) => each === name).length} × ${name}`).join(", ");
}

function row(program) {
  return h(
    "li.row",
    { "data-key": program.name },
    h("strong", {}, program.name),
    h("span", {}, program.state.toLowerCase()),
    h("span", {}, program.version),
    h("span", {}, program.address),
    h(`span.${program.is_alive ? "muted" : "wrong"}`, {}, program.age ? `seen ${ago(program.age)}` : ""),
  );
}

export const actions = {
  async "drain-host"(state, { host }) {
    const given = await ask(
      `Drain ${host}?`,
      [
        h("p", {}, "It gets no new work; its workers finish what is in their engines, and the rest runs elsewhere. Holds until it is resumed."),
        h("label", { for: "reason" }, "Reason"),
        h("input", { id: "reason", name: "reason", maxlength: 300, autocomplete: "off" }),
      ],
      "Drain",
    );
    if (given) await order(state, host, "drain", { reason: given.reason });
  },
  async "resume-host"(state, { host }) {
    if (await ask(`Resume ${host}?`, h("p", {}, "It gets work again."), "Resume")) await order(state, host, "resume");
  },
  async "forget-host"(state, { host }) {
    const text = "What is stored about it is removed. If it comes back, it is listed again.";
    if (await ask(`Forget ${host}?`, h("p", {}, text), "Forget", true)) await order(state, host, "forget");
  },
};

const DONE = { drain: "Ordered to drain", resume: "Resumed", forget: "Forgotten" };

async function order(state, name, what, more = {}) {
  await call("POST", `hosts/${what}`, { name, ...more });
  state.tell(`${DONE[what]}: ${name}.`);
}
