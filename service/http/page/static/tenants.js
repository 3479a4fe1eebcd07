// What each tenant has in the queue, its share of the workers, and its limits.

import { h } from "./dom.js";
import * as f from "./format.js";
import { empty, share } from "./parts.js";

export const title = () => "Tenants";
export const query = () => ({});
export const begin = () => ({ parts: {} });

export function render({ parts: { tenants } }) {
  if (!tenants) return [h("h1", {}, "Tenants"), h("p.empty", {}, "Loading…")];
  return [
    h("h1", {}, "Tenants"),
    h("p.muted", {}, "The share is that of the workers while all tenants with open batches have work waiting."),
    tenants.length ? h("ul.rows.tenants", { "aria-label": "Tenants" }, tenants.map(row)) : empty("None yet."),
  ];
}

function row(tenant) {
  const part = Number(tenant.share);
  const isBusy = Number(tenant.open_batches) > 0;
  const percent = `${Math.round(100 * part)} %`;
  const limits = tenant.limits ?? {};
  const of = (value, limit) => `${f.number(value)}${limit === undefined || limit === null ? "" : ` of ${f.number(limit)}`}`;
  return h(
    "li.row",
    { "data-key": tenant.name },
    h("strong.row-name", {}, tenant.name),
    h("div.row-progress", {}, share(isBusy ? part : 0, `share ${percent}`), h("span.muted", {}, `${isBusy ? percent : `idle, ${percent} if it had work`} · weight ${tenant.weight}`)),
    h("span", {}, h("span.muted", {}, "open "), of(tenant.open_batches, limits.open_batches)),
    h("span", {}, h("span.muted", {}, "queued "), of(tenant.queued_requests, limits.queued_requests)),
    h("span", {}, h("span.muted", {}, "used "), `${f.short(Number(tenant.usage?.prompt_tokens ?? 0) + Number(tenant.usage?.completion_tokens ?? 0))} tokens`),
  );
}
