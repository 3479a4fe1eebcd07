// Numbers, times and states as people read them.

const whole = new Intl.NumberFormat("en");
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const exact = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export const number = (value) => whole.format(Number(value ?? 0));

export function short(value) {
  const n = Number(value ?? 0);
  if (n < 10_000) return number(n);
  const [size, unit] = n < 1e6 ? [1e3, "k"] : n < 1e9 ? [1e6, "M"] : [1e9, "G"];
  return `${(n / size).toFixed(n / size < 100 ? 1 : 0)} ${unit}`;
}

export function size(bytes) {
  let n = Number(bytes ?? 0);
  for (const unit of ["B", "KiB", "MiB"]) {
    if (n < 1024) return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(1)} GiB`;
}

export function seconds(value) {
  const s = Math.max(0, Number(value));
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172_800) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  return `${Math.round(s / 86_400)} days`;
}

export const time = (text) => (text ? exact.format(new Date(text)) : "");
export const moment = (text) => (text ? day.format(new Date(text)) : "");
export const since = (text) => (Date.now() - new Date(text)) / 1000;

export function rate(perSecond) {
  if (perSecond === null || !Number.isFinite(perSecond) || perSecond <= 0) return "";
  if (perSecond >= 10) return `${number(Math.round(perSecond))}/s`;
  return perSecond >= 0.1 ? `${perSecond.toFixed(1)}/s` : `${(perSecond * 60).toFixed(1)}/min`;
}

export const plural = (count, one, many = `${one}s`) => `${number(count)} ${Number(count) === 1 ? one : many}`;
export const state = (name) => name.replace("BATCH_STATE_", "").toLowerCase();
export const stateWords = (name) => state(name).replace("_", " ");
export const isOpen = (name) => ["validating", "in_progress", "finalizing", "cancelling"].includes(state(name));
export const verdict = (name) => (name ?? "").replace("VERDICT_", "").toLowerCase().replaceAll("_", " ");

export function json(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
