// All batches, newest first, page by page.

import { h } from "./dom.js";
import * as f from "./format.js";
import { badge, bar, button, counts, empty, ending, hasWait, note, speed } from "./parts.js";
import { may, session } from "./server.js";

const FILTERS = [
  ["", "All"],
  ["open", "Open"],
  ["ended", "Ended"],
  ["failed", "Failed"],
];

export const title = () => "Batches";
export const query = (at) => ({ states: at.query.states ?? "", page: at.query.page ?? "" });
export const begin = (at) => ({ at, parts: {} });

export function changed(state, names) {
  for (const name of names) if (name.startsWith("batch:") && state.parts[name]) note(state.parts[name]);
}

export function render(state) {
  const { list } = state.parts;
  if (!list) return [h("h1", {}, "Batches"), h("p.empty", {}, "Loading…")];
  const found = list.ids.map((id) => state.parts[`batch:${id}`]).filter(Boolean);
  const states = state.at.query.states ?? "";
  const link = (more) => `#/batches?${new URLSearchParams({ ...(states && { states }), ...more })}`;
  return [
    h(
      "div.bar-of-tools",
      {},
      h("h1", {}, "Batches"),
      h(
        "div.tabs",
        { role: "group", "aria-label": "Which batches" },
        FILTERS.map(([name, text]) =>
          h("a", { href: name ? `#/batches?states=${name}` : "#/batches", "aria-current": states === name && "true" }, text),
        ),
      ),
      h("span.grow"),
      may("submit") && button("Submit a file", "submit", {}, ".primary"),
    ),
    found.length
      ? h("ul.rows.batches", { "aria-label": "Batches" }, found.map(row))
      : empty(states ? "No batch in this state." : may("submit") ? "No batch yet. Drag a .jsonl file onto this page to submit one." : "No batch yet."),
    (list.next || state.at.query.page) &&
      h(
        "nav.pages",
        { "aria-label": "Pages" },
        state.at.query.page && h("a.button", { href: link({}) }, "Newest"),
        list.next && h("a.button", { href: link({ page: list.next }) }, "Older"),
      ),
  ];
}

function row(batch) {
  const done = Number(batch.counts.completed) + Number(batch.counts.failed);
  const failed = Number(batch.counts.failed);
  return h(
    "li.row",
    { "data-key": batch.id },
    h(
      "div.row-name",
      {},
      h("a.row-link", { href: `#/batches/${batch.id}` }, batch.id),
      h("span.muted", {}, [batch.models.join(", "), session.sees_all && batch.tenant !== "default" && batch.tenant].filter(Boolean).join(" · ")),
    ),
    badge(batch),
    h(
      "div.row-progress",
      {},
      bar(batch),
      h(
        "span.muted",
        {},
        counts(batch, done),
        failed > 0 && h("span.bad", {}, ` · ${f.number(failed)} failed`),
      ),
    ),
    h("div.row-rate", {}, f.isOpen(batch.state) ? f.rate(speed(batch)) : ""),
    h("div.row-end", { title: f.time(batch.end_time ?? batch.estimated_end_time) }, ending(batch)),
    hasWait(batch) && h("p.row-wait", {}, batch.wait.message),
  );
}
