// The one dialog of the page: a question, or something to look at.

import { h, show } from "./dom.js";

const dialog = document.getElementById("dialog");

// Resolves with the entries of the form, or null when it is dismissed.
export function ask(title, content, submit, isDanger = false) {
  return new Promise((resolve) => {
    const form = h(
      "form",
      { method: "dialog" },
      h("h2", { id: "dialog-title" }, title),
      content,
      h(
        "div.actions",
        {},
        h("button", { value: "", formnovalidate: true }, "Back"),
        h(isDanger ? "button.danger" : "button.primary", { value: "yes" }, submit),
      ),
    );
    open(form, "", () => resolve(dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null));
  });
}

// Shows something until it is closed. Returns what shows something else in its place.
export function look(title, content, onClose = () => {}) {
  const body = h("div.look-body", {}, content);
  const form = h(
    "form.look",
    { method: "dialog" },
    h("div.look-head", {}, h("h2", { id: "dialog-title" }, title), h("button", { value: "", "aria-label": "Close" }, "Close")),
    body,
  );
  open(form, "wide", onClose);
  return (...wanted) => show(body, ...wanted);
}

export const close = () => dialog.close("");

function open(form, kind, onClose) {
  if (dialog.open) dialog.close("");
  dialog.returnValue = "";
  dialog.className = kind;
  dialog.replaceChildren(form);
  dialog.addEventListener("close", () => onClose(), { once: true });
  dialog.showModal();
}
