// Hosts with their workers and gateways: both signals over time, verdict, recoveries, and orders for the watchdog.

import { ask } from "./dialogs.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import * as hosts from "./hosts.js";
import { button, empty, fact } from "./parts.js";
import { call, may } from "./server.js";

const SPAN_S = 900;
// A heartbeat of this age fills the strip.
const FULL_S = 30;
const DURATIONS = [
  [900, "15 minutes"],
  [3600, "1 hour"],
  [14_400, "4 hours"],
  [86_400, "24 hours"],
];
const GOOD = new Set(["healthy"]);
const CALM = new Set(["starting", "draining", "paused", "operator stop", "transition", "interrupted"]);

export const title = () => "Workers";
export const query = () => ({});
export function begin() {
  const state = { parts: {}, samples: {} };
  call("GET", "signals").then(
    (found) => {
      for (const [id, samples] of Object.entries(found)) state.samples[id] = [...samples, ...(state.samples[id] ?? [])];
      state.draw?.();
    },
    () => {},
  );
  return state;
}

export function changed(state) {
  const now = Date.now() / 1000;
  for (const process of state.parts.hosts?.flatMap((host) => host.processes) ?? []) {
    if (process.health === undefined) continue;
    const mine = (state.samples[process.worker_id] ??= []);
    mine.push([now, process.heartbeat_age_s, process.health, process.phase]);
    while (mine.length && mine[0][0] < now - SPAN_S) mine.shift();
  }
}

export function render(state) {
  const { events } = state.parts;
  if (!state.parts.hosts) return [h("h1", {}, "Workers"), h("p.empty", {}, "Loading…")];
  const all = allHosts(state.parts);
  return [
    h("h1", {}, "Workers"),
    state.parts.host_list?.next_page_token && h("p.muted", {}, "More hosts than are shown here: vllm-batch hosts lists all."),
    all.length ? all.map((host) => hostOf(state, host)) : empty("No worker was ever seen. Start one: scripts/start-all.sh"),
    h(
      "section",
      { "aria-labelledby": "recoveries" },
      h("h2", { id: "recoveries" }, "Last recoveries and orders"),
      events.length ? h("ul.rows.events", {}, events.map(eventOf)) : empty("None: nothing had to be restarted."),
    ),
  ];
}

// Operators see the hosts that HostService lists, others those whose watchdogs or workers are known.
function allHosts({ hosts: seen, host_list: list }) {
  if (!list) return seen;
  const byName = new Map(seen.map((host) => [host.host, host]));
  return list.hosts.map((listed) => ({ host: listed.name, processes: byName.get(listed.name)?.processes ?? [], listed }));
}

function hostOf(state, host) {
  return h(
    "section.host",
    { "aria-label": `Host ${host.host}`, "data-key": host.host },
    h(
      "div.bar-of-tools",
      {},
      h("h2", {}, host.host),
      host.listed ? hosts.pill(host.listed) : watchdog(host.watchdog_age_s),
      h("span.grow"),
      host.listed && hosts.buttons(host.listed),
    ),
    host.listed && hosts.about(host.listed),
    host.processes.length ? h("div.cards", {}, workersFirst(host.processes).map((each) => card(state, each))) : empty("No worker."),
  );
}

function watchdog(age) {
  const isGone = age === null || age > 60;
  const words = age === null ? "no watchdog" : isGone ? `watchdog last seen ${f.seconds(age)} ago` : "watchdog is there";
  return h(`span.pill.${isGone ? "is-bad" : "is-good"}`, {}, h("span.dot"), words);
}

const workersFirst = (processes) => [...processes].sort((one, other) => one.is_gateway - other.is_gateway);

function card(state, process) {
  const { status } = process;
  const said = f.verdict(status.verdict);
  const kind = !said ? "is-calm" : GOOD.has(said) ? "is-good" : CALM.has(said) ? "is-calm" : "is-bad";
  const isPaused = Boolean(status.pause_end_time);
  const data = { "data-worker": process.worker_id };
  return h(
    "article.card",
    { "data-key": process.worker_id, "aria-label": process.worker_id },
    h(
      "div.bar-of-tools",
      {},
      h("h3", {}, process.worker_id.split(":").pop()),
      h(`span.badge.${kind}`, {}, said || (process.is_gateway ? "gateway" : "no verdict")),
      isPaused && h("span.badge.is-waiting", {}, "recovery paused"),
      h("span.grow"),
      may("operate") && status.verdict !== undefined && (isPaused ? button("Resume", "resume", data) : button("Pause recovery", "pause", data)),
      may("operate") && status.gave_up && button("Reset budget", "reset", data, ".primary"),
    ),
    status.reason && h("p.reason", {}, status.reason),
    process.cause && h("p.wrong", {}, process.cause, process.advice && ` ${process.advice}`),
    process.ordered && h("p.muted", {}, `Ordered: ${process.ordered.replace("_", " ")}; the watchdog takes it within seconds.`),
    isPaused && h("p.muted", {}, `Paused until ${f.time(status.pause_end_time)}: ${status.pause_reason}`),
    process.health !== undefined && signals(state.samples[process.worker_id] ?? [], process),
    h(
      "dl.facts",
      {},
      process.phase && fact("Phase", process.phase.replace("_", " ")),
      process.models?.length ? fact("Models", process.models.join(", ")) : null,
      process.life_s !== undefined && fact("Up for", f.seconds(process.life_s)),
      fact("Process", status.process_state ? `${status.process_state.toLowerCase()}${status.pid ? `, pid ${status.pid}` : ""}` : ""),
      status.budget_limit !== undefined && fact("Restarts left", `${status.budget_left ?? 0} of ${status.budget_limit}`),
      fact("Address", process.address ?? ""),
    ),
  );
}

function signals(samples, process) {
  const now = Date.now() / 1000;
  const x = (at) => (1000 * (1 - (now - at) / SPAN_S)).toFixed(1);
  const health = [];
  const beat = [];
  samples.forEach(([at, age, state], place) => {
    const until = samples[place + 1]?.[0] ?? now;
    const last = health[health.length - 1];
    // After a gap nothing is known.
    const end = Math.min(until, at + 10);
    if (last && last.state === state && at - last.end < 1) last.end = end;
    else health.push({ state, begin: at, end });
    beat.push(`${beat.length ? "L" : `M${x(at)} 24L`}${x(at)} ${(24 - 22 * Math.min(1, age / FULL_S)).toFixed(1)}`);
  });
  if (samples.length) beat.push(`L${x(samples[samples.length - 1][0])} 24Z`);
  const box = { viewBox: "0 0 1000 24", preserveAspectRatio: "none", role: "img" };
  return h(
    "div.signals",
    {},
    h("span.signal-name", {}, "Health"),
    h(
      "svg.strip",
      { ...box, "aria-label": `Health over the last 15 minutes; now ${process.health.replace("_", " ")}` },
      health.map((each) => h(`rect.health-${each.state}`, { x: x(each.begin), y: 2, height: 20, width: Math.max(1, x(each.end) - x(each.begin)).toFixed(1) })),
    ),
    h("span.signal-now", { title: process.health_cause }, process.health.replace("_", " ")),
    h("span.signal-name", {}, "Heartbeat"),
    h(
      "svg.strip",
      { ...box, "aria-label": `Age of the heartbeat over the last 15 minutes; now ${f.seconds(process.heartbeat_age_s)}` },
      h("path.beat", { d: beat.join("") }),
    ),
    h("span.signal-now", {}, `${f.seconds(process.heartbeat_age_s)} old`),
    h("span.axis", {}, h("span", {}, "15 min ago"), h("span", {}, "now")),
  );
}

function eventOf(event) {
  const total = event.timings.reduce((sum, [, seconds]) => sum + seconds, 0);
  const outcome = event.outcome === "open" ? `running: ${event.step}` : event.outcome;
  return h(
    "li.row",
    { "data-key": String(event.id) },
    h("time", { datetime: event.start_time, title: f.time(event.start_time) }, f.moment(event.start_time)),
    h("strong", {}, event.kind.replaceAll("_", " ")),
    h("span.event-who", {}, event.worker_id),
    outcome ? h(`span.tag.${event.outcome === "recovered" ? "good" : event.outcome === "failed" ? "bad" : "calm"}`, {}, outcome) : h("span"),
    h("p.event-reason", {}, event.verdict && h("span.tag", {}, f.verdict(event.verdict)), ` ${event.reason}`),
    total > 0 && phases(event.timings, total),
    Object.keys(event.evidence).length > 0 &&
      h("details", {}, h("summary", {}, "Evidence"), h("pre", { tabindex: 0 }, JSON.stringify(event.evidence, null, 2))),
  );
}

function phases(timings, total) {
  let at = 0;
  const rects = timings.map(([phase, seconds], place) => {
    const rect = h(`rect.phase-${place % 4}`, { x: ((1000 * at) / total).toFixed(1), y: 0, height: 10, width: ((1000 * seconds) / total).toFixed(1) });
    at += seconds;
    return rect;
  });
  const words = timings.filter(([, seconds]) => seconds >= 0.05).map(([phase, seconds]) => `${phase} ${f.seconds(seconds)}`);
  return h(
    "div.phases",
    {},
    h("svg.bar", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": "Phases" }, rects),
    h("span.muted", {}, `${f.seconds(total)} in all: ${words.join(", ")}`),
  );
}

async function order(state, worker, kind, reason, lasts = 0) {
  await call("POST", "orders", { worker_id: worker, kind, reason, lasts_s: lasts });
  state.tell(`Left for the watchdog of ${worker}.`);
}

const reasonField = () => [
  h("label", { for: "reason" }, "Reason"),
  h("input", { id: "reason", name: "reason", required: true, maxlength: 300, autocomplete: "off" }),
];

export const actions = {
  ...hosts.actions,
  async pause(state, { worker }) {
    const given = await ask(
      `Pause recovery of ${worker}?`,
      [
        h("p", {}, "Whatever happens to it, the watchdog does not restart it until then."),
        h("label", { for: "lasts" }, "For"),
        h("select", { id: "lasts", name: "lasts" }, DURATIONS.map(([value, text]) => h("option", { value }, text))),
        reasonField(),
      ],
      "Pause",
    );
    if (given) await order(state, worker, "paused", given.reason, Number(given.lasts));
  },
  resume: (state, { worker }) => order(state, worker, "resumed", "resumed by an operator"),
  async reset(state, { worker }) {
    const given = await ask(`Reset the restart budget of ${worker}?`, reasonField(), "Reset");
    if (given) await order(state, worker, "budget_reset", given.reason);
  },
};
