// What several views are made of.

import { h } from "./dom.js";
import * as f from "./format.js";

// Results per second: as they came in while this page watched, or else as the server's estimate says.
const seen = new Map();
const WINDOW_MS = 30_000;

export function note(batch) {
  const done = Number(batch.counts.completed) + Number(batch.counts.failed);
  const marks = seen.get(batch.id) ?? [];
  const now = Date.now();
  marks.push([now, done]);
  while (marks.length > 2 && now - marks[1][0] > WINDOW_MS) marks.shift();
  seen.set(batch.id, marks);
}

export function speed(batch) {
  const total = Number(batch.counts.total);
  const done = Number(batch.counts.completed) + Number(batch.counts.failed);
  if (!f.isOpen(batch.state)) {
    const took = (new Date(batch.end_time) - new Date(batch.start_time)) / 1000;
    return batch.start_time && took > 0 ? done / took : null;
  }
  if (batch.estimated_end_time) {
    const left = (new Date(batch.estimated_end_time) - Date.now()) / 1000;
    if (left > 1) return (total - done) / left;
  }
  const marks = seen.get(batch.id) ?? [];
  if (marks.length < 2) return null;
  const [[firstAt, first], [lastAt, last]] = [marks[0], marks[marks.length - 1]];
  return lastAt - firstAt > 3000 ? ((last - first) * 1000) / (lastAt - firstAt) : null;
}

export function badge(batch) {
  const name = f.state(batch.state);
  const waits = hasWait(batch) && name === "in_progress";
  return h(`span.badge.is-${waits ? "waiting" : name}`, {}, waits ? "waiting" : f.stateWords(batch.state));
}

export const hasWait = (batch) => Boolean(batch.wait?.message);

export function bar(batch) {
  const total = Math.max(1, Number(batch.counts.total));
  const [completed, failed, running] = ["completed", "failed", "running"].map((name) => Number(batch.counts[name]));
  const done = completed + failed;
  const percent = Number(batch.counts.total) ? Math.floor((100 * done) / total) : 0;
  const width = (count) => ((1000 * count) / total).toFixed(2);
  return h(
    "svg.bar",
    {
      viewBox: "0 0 1000 10",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `${percent} % done, ${f.number(failed)} failed`,
    },
    h("rect.bar-completed", { x: 0, y: 0, height: 10, width: width(completed) }),
    h("rect.bar-failed", { x: width(completed), y: 0, height: 10, width: width(failed) }),
    h("rect.bar-running", { x: width(done), y: 0, height: 10, width: width(Math.min(running, total - done)) }),
  );
}

// A batch whose file is being checked, or was refused, has no requests.
export function counts(batch, done) {
  if (Number(batch.counts.total)) return `${f.number(done)} of ${f.plural(batch.counts.total, "request")}`;
  return f.isOpen(batch.state) ? "its file is being checked" : "nothing of its file ran";
}

export function share(part, label) {
  return h(
    "svg.bar",
    { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": label },
    h("rect.bar-share", { x: 0, y: 0, height: 10, width: (1000 * part).toFixed(1) }),
  );
}

export function ending(batch) {
  if (batch.end_time) return f.moment(batch.end_time);
  if (!batch.estimated_end_time) return "";
  return `in ${f.seconds(-f.since(batch.estimated_end_time))}`;
}

export const button = (text, action, data = {}, kind = "") =>
  h(`button${kind}`, { type: "button", "data-do": action, ...data }, text);

export const fact = (name, value) => (value === "" || value === null ? null : h("div", {}, h("dt", {}, name), h("dd", {}, value)));

export const empty = (text) => h("p.empty", {}, text);
