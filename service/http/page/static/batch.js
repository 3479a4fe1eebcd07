// One batch: where it stands, its wrong lines, its errors by kind, single requests beside their results.

import { ask, look } from "./dialogs.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { badge, bar, button, counts, empty, ending, fact, hasWait, note, speed } from "./parts.js";
import { call, may } from "./server.js";

const FILTERS = [
  ["all", "All"],
  ["succeeded", "Succeeded"],
  ["failed", "Failed"],
];
// How much more has to have finished until lists that a person reads are read again.
const AGAIN_MS = 5000;

export const title = (at) => at.id;
export const query = (at) => ({ batch: at.id });

export const begin = (at) => ({
  id: at.id,
  parts: {},
  filter: "all",
  results: null,
  after: "",
  kinds: null,
  lines: null,
  readAt: 0,
  readDone: -1,
});

const of = (state) => state.parts[`batch:${state.id}`];

export function changed(state) {
  const batch = of(state);
  if (!batch) return;
  note(batch);
  const done = Number(batch.counts.completed) + Number(batch.counts.failed);
  const isDue = !f.isOpen(batch.state) || Date.now() - state.readAt > AGAIN_MS;
  if (done !== state.readDone && isDue && (state.results === null || state.results.length < 100)) {
    state.readAt = Date.now();
    state.readDone = done;
    refresh(state).catch((error) => state.tell(error.message));
  }
  if (state.parts.file?.wrong_lines && state.lines === null) {
    state.lines = [];
    call("GET", `batches/${state.id}/lines`).then(
      (found) => {
        state.lines = found;
        state.draw();
      },
      (error) => state.tell(error.message),
    );
  }
}

async function refresh(state) {
  const batch = of(state);
  const found = await call("GET", `batches/${state.id}/results?filter=${state.filter}`);
  const kinds = Number(batch.counts.failed) ? await call("GET", `batches/${state.id}/errors`) : null;
  state.results = found.results.slice(0, 100);
  state.after = found.results.length ? found.after : "";
  state.rest = found.results.slice(100);
  state.kinds = kinds;
  state.draw();
}

export function render(state) {
  const batch = of(state);
  if (!batch) return [h("h1", {}, state.id), h("p.empty", {}, "Loading…")];
  return [
    h("p.crumbs", {}, h("a", { href: "#/batches" }, "← Batches")),
    head(batch),
    hasWait(batch) && wait(batch),
    facts(batch, state.parts.file),
    state.lines?.length ? lines(state) : null,
    state.kinds?.kinds?.length ? kinds(state) : null,
    Number(batch.counts.total) > 0 && results(state, batch),
  ];
}

function head(batch) {
  const total = Number(batch.counts.total);
  const done = Number(batch.counts.completed) + Number(batch.counts.failed);
  const isOpen = f.isOpen(batch.state);
  const failed = Number(batch.counts.failed);
  const percent = total ? Math.floor((100 * done) / total) : 0;
  return h(
    "section.head",
    { "aria-label": "Progress" },
    h(
      "div.bar-of-tools",
      {},
      h("h1", {}, batch.id),
      badge(batch),
      h("span.grow"),
      isOpen && may("submit") && batch.state !== "BATCH_STATE_CANCELLING" && button("Cancel", "cancel", {}, ".danger"),
      !isOpen && may("submit") && Number(batch.counts.completed) < total && button("Retry failed", "retry"),
      !isOpen && may("submit") && button("Delete", "delete", {}, ".danger"),
      done > 0 && h("a.button.primary", { href: `/page/api/batches/${batch.id}/output`, download: `${batch.id}.jsonl` }, "Download"),
    ),
    h("div.big-bar", {}, bar(batch)),
    h(
      "p.head-line",
      {},
      total > 0 && h("strong", {}, `${percent} %`),
      ` ${counts(batch, done)}`,
      failed > 0 && h("span.bad", {}, ` · ${f.number(failed)} failed`),
      isOpen && Number(batch.counts.running) > 0 && ` · ${f.number(batch.counts.running)} running`,
      isOpen && f.rate(speed(batch)) && ` · ${f.rate(speed(batch))}`,
      isOpen && batch.estimated_end_time && ` · ends ${ending(batch)}`,
    ),
  );
}

const wait = (batch) =>
  h("section.wait", { "aria-label": "Why it waits" }, h("p", {}, h("strong", {}, "Waiting: "), batch.wait.message), batch.wait.advice && h("p", {}, batch.wait.advice));

function facts(batch, file) {
  const tokens = batch.usage ?? {};
  const metadata = Object.entries(batch.metadata ?? {});
  return h(
    "dl.facts",
    {},
    fact("Models", batch.models.join(", ")),
    fact("Endpoint", file?.endpoint ?? ""),
    fact("File", file?.filename ? `${file.filename} (${f.size(file.bytes)})` : ""),
    fact("Tenant", batch.tenant),
    fact("Priority", String(batch.priority)),
    fact("Created", f.time(batch.create_time)),
    fact("Started", f.time(batch.start_time)),
    fact("Ended", f.time(batch.end_time)),
    fact("Expires", f.isOpen(batch.state) ? f.time(batch.expire_time) : ""),
    fact("Speed", f.rate(speed(batch))),
    fact("Prompt tokens", `${f.short(tokens.prompt_tokens)}${Number(tokens.cached_tokens) ? `, ${f.short(tokens.cached_tokens)} cached` : ""}`),
    fact("Completion tokens", f.short(tokens.completion_tokens)),
    metadata.map(([name, value]) => fact(name, value)),
  );
}

function lines(state) {
  const name = state.parts.file?.filename ?? "the file";
  return h(
    "section",
    { "aria-labelledby": "wrong-lines" },
    h("h2", { id: "wrong-lines" }, `Wrong lines of ${name}`),
    h("p.muted", {}, "Nothing of the file runs until every line is right. Correct these, then submit it again."),
    h(
      "ol.source",
      {},
      state.lines.map((line) =>
        h(
          "li",
          { "data-key": `${line.line} ${line.param} ${line.code}` },
          h("span.source-number", {}, line.line ?? "–"),
          h("code.source-text", {}, line.text ?? "(this line is not shown)"),
          h("p.source-problem", {}, h("span.tag", {}, line.code), ` ${line.message}`),
        ),
      ),
    ),
  );
}

function kinds(state) {
  const { kinds: found, other_count: other, is_partial: isPartial } = state.kinds;
  return h(
    "section",
    { "aria-labelledby": "kinds" },
    h("h2", { id: "kinds" }, "Errors by kind"),
    h(
      "ul.rows.kinds",
      {},
      found.map((kind) =>
        h(
          "li.row",
          { "data-key": `${kind.code} ${kind.status_code} ${kind.message}` },
          h("strong.count", {}, f.number(kind.count)),
          h("span.tag", {}, kind.code || `${kind.status_code} ${kind.type}`),
          h("span.kind-message", {}, kind.message),
          button("Example", "look", { "data-name": kind.example_custom_id }, ".plain"),
        ),
      ),
    ),
    Number(other) > 0 && h("p.muted", {}, `${f.plural(other, "failure")} of other kinds.`),
    isPartial && h("p.muted", {}, "There are more failures than were counted."),
  );
}

function results(state, batch) {
  const found = state.results;
  const hasMore = Boolean(state.rest?.length || state.after);
  return h(
    "section",
    { "aria-labelledby": "results" },
    h(
      "div.bar-of-tools",
      {},
      h("h2", { id: "results" }, "Results"),
      h(
        "div.tabs",
        { role: "group", "aria-label": "Which results" },
        FILTERS.map(([name, text]) => h("button", { type: "button", "data-do": "filter", "data-filter": name, "aria-pressed": String(state.filter === name) }, text)),
      ),
      h("span.grow"),
      h(
        "form.search",
        { "data-submit": "find", role: "search" },
        h("label.hidden", { for: "name" }, "custom_id"),
        h("input", { id: "name", name: "name", placeholder: "custom_id", required: true, autocomplete: "off", spellcheck: "false" }),
        h("button", { type: "submit" }, "Look"),
      ),
      h("a.button", { href: `/page/api/batches/${batch.id}/output?filter=${state.filter}`, download: true }, state.filter === "all" ? "Download all" : `Download ${state.filter}`),
    ),
    found === null
      ? h("p.empty", {}, "Loading…")
      : found.length
        ? h("ul.rows.results", { "aria-label": "Results" }, found.map(result))
        : empty(f.isOpen(batch.state) ? "No result yet." : "None."),
    hasMore && found?.length > 0 && h("p.pages", {}, button("More", "more")),
  );
}

function result(each) {
  const isGood = each.status_code >= 200 && each.status_code < 300;
  return h(
    "li.row",
    { "data-key": String(each.index) },
    h("button.plain.row-link", { type: "button", "data-do": "look", "data-name": each.custom_id }, each.custom_id),
    h(`span.tag.${isGood ? "good" : "bad"}`, {}, each.code || each.status_code),
    h("span.result-said", {}, isGood ? answer(each.said) : each.said),
  );
}

// What a model said in the beginning of a body that may be cut.
function answer(text) {
  const found = /"content"\s*:\s*"((?:[^"\\]|\\.)*)/.exec(text);
  if (!found) return text;
  try {
    return JSON.parse(`"${found[1].replace(/\\[^"\\/bfnrtu]?$/, "")}"`);
  } catch {
    return found[1];
  }
}

async function show(state, name) {
  const replace = look(name, h("p.empty", {}, "Loading…"));
  try {
    const { request, result: got } = await call("GET", `batches/${state.id}/request?custom_id=${encodeURIComponent(name)}`);
    replace(h("div.panes", {}, pane("Request", request.url, request.body, Number(request.body_chars) > request.body.length), resultPane(got)));
  } catch (error) {
    replace(h("p.wrong", {}, error.message));
  }
}

function pane(name, note, text, isCut = false) {
  return h(
    "section.pane",
    { "aria-label": name },
    h("h3", {}, name, " ", h("span.muted", {}, note)),
    isCut && h("p.muted", {}, "Only the beginning is shown."),
    h("pre", { tabindex: 0 }, f.json(text)),
  );
}

function resultPane(got) {
  if (!got) return h("section.pane", { "aria-label": "Result" }, h("h3", {}, "Result"), empty("Not finished yet."));
  if (got.error) return pane("Result", got.error.code, got.error.message);
  if (Number(got.response.omitted_body_bytes)) {
    return pane("Result", `status ${got.response.status_code}`, `${f.size(got.response.omitted_body_bytes)}: download it to see it.`);
  }
  return pane("Result", `status ${got.response.status_code}`, got.response.body_json);
}

export const actions = {
  look: (state, { name }) => show(state, name),
  find: (state, _, form) => show(state, new FormData(form).get("name")),
  async filter(state, { filter }) {
    state.filter = filter;
    state.results = null;
    state.draw();
    await refresh(state);
  },
  async more(state) {
    if (!state.rest?.length) {
      const found = await call("GET", `batches/${state.id}/results?filter=${state.filter}&after=${encodeURIComponent(state.after)}`);
      state.rest = found.results;
      state.after = found.results.length ? found.after : "";
    }
    state.results.push(...state.rest.splice(0, 100));
    state.draw();
  },
  async cancel(state) {
    const text = "Requests that have not finished stay without a result. Results that are there are kept.";
    if (await ask(`Cancel ${state.id}?`, h("p", {}, text), "Cancel the batch", true)) {
      await call("POST", `batches/${state.id}/cancel`);
      state.tell(`${state.id} is cancelled.`);
    }
  },
  async retry(state) {
    const { batch } = await call("POST", `batches/${state.id}/retry`);
    location.hash = `#/batches/${batch.id}`;
  },
  async delete(state) {
    const text = "The batch and all its results are removed for good.";
    if (await ask(`Delete ${state.id}?`, h("p", {}, text), "Delete the batch", true)) {
      await call("DELETE", `batches/${state.id}`);
      location.hash = "#/batches";
    }
  },
};
