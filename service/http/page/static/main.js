// The frame of the page: who is signed in, which view is shown, and what happens when something is pressed.

import * as batch from "./batch.js";
import * as batches from "./batches.js";
import { close } from "./dialogs.js";
import { h, show } from "./dom.js";
import * as server from "./server.js";
import * as submit from "./submit.js";
import * as tenants from "./tenants.js";
import * as workers from "./workers.js";

const VIEWS = { batches, batch, workers, tenants };
const NAV = [
  ["batches", "Batches"],
  ["workers", "Workers"],
  ["tenants", "Tenants"],
];
const main = document.getElementById("main");
const said = document.getElementById("said");
const problem = document.getElementById("problem");

// How long a message is shown.
const TOLD_MS = 10_000;

let current = null;
let service = null;
let telling = null;
// What was pressed and is not done yet: it is not done twice.
const busy = new Set();

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/");
  const view = name === "batches" && id ? "batch" : Object.hasOwn(VIEWS, name) ? name : "batches";
  return { view, id: id ?? "", query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

function header() {
  const { view } = place();
  const shown = view === "batch" ? "batches" : view;
  show(
    document.getElementById("top"),
    h("a.brand", { href: "#/batches" }, "vLLM batch server"),
    server.session &&
      h(
        "nav",
        { "aria-label": "Views" },
        NAV.map(([name, text]) => h("a", { href: `#/${name}`, "aria-current": shown === name && "page" }, text)),
      ),
    h("span.grow"),
    server.session && service && pill(),
    server.session?.is_signed_in &&
      h(
        "span.who",
        {},
        h("span", { title: `tenant ${server.session.tenant}, role ${server.session.role}` }, server.session.name),
        h("button.plain", { type: "button", "data-do": "sign-out" }, "Sign out"),
      ),
  );
}

function pill() {
  return service.reason
    ? h("span.pill.is-bad", { title: service.message }, h("span.dot"), `not ready: ${service.reason.toLowerCase().replaceAll("_", " ")}`)
    : h("span.pill.is-good", {}, h("span.dot"), "ready for work");
}

function tell(text) {
  said.textContent = text;
  clearTimeout(telling);
  telling = setTimeout(() => (said.textContent = ""), TOLD_MS);
}

function trouble(text) {
  problem.textContent = text;
  problem.hidden = text === "";
}

function leave() {
  current?.end();
  current = null;
}

function enter() {
  leave();
  close();
  tell("");
  header();
  if (server.session === null) {
    signIn();
    return;
  }
  const at = place();
  const view = VIEWS[at.view];
  const state = view.begin(at);
  const draw = () => current?.state === state && show(main, ...[view.render(state)].flat());
  state.draw = draw;
  state.tell = tell;
  const end = server.follow(at.view, view.query(at), {
    parts(parts, changed) {
      service = parts.service;
      trouble(parts.problem ?? "");
      state.parts = parts;
      view.changed?.(state, changed);
      header();
      draw();
    },
    refused({ code, message }) {
      if (code === "UNAUTHENTICATED") {
        server.find().then(enter, enter);
      } else {
        show(main, h("h1", {}, "Not there"), h("p", {}, message), h("p", {}, h("a", { href: "#/batches" }, "All batches")));
      }
    },
    back: () => trouble(""),
    lost: () => trouble("The server does not answer; what is shown is what it said last."),
  });
  // What is relative to now.
  const timer = setInterval(draw, 1000);
  current = {
    state,
    view,
    end() {
      end();
      clearInterval(timer);
      view.end?.(state);
    },
  };
  document.title = `${view.title(at)} – vLLM batch server`;
  show(main, h("h1", {}, view.title(at)), h("p.empty", {}, "Loading…"));
}

function signIn(message = "") {
  trouble("");
  document.title = "Sign in – vLLM batch server";
  show(
    main,
    h(
      "form.sign-in",
      { id: "sign-in", action: "/", method: "post" },
      h("h1", {}, "Sign in"),
      h("p", {}, "With a token of this server, as programs send it."),
      h("label", { for: "token" }, "Token"),
      h("input", { id: "token", name: "token", type: "password", autocomplete: "current-password", required: true, spellcheck: "false" }),
      h("p.wrong", { role: "alert" }, message),
      h("button.primary", { type: "submit" }, "Sign in"),
    ),
  );
  document.getElementById("token").focus();
}

document.addEventListener("submit", async (event) => {
  if (event.target.id === "sign-in") {
    event.preventDefault();
    const field = document.getElementById("token");
    try {
      await server.signIn(field.value);
      field.value = "";
      enter();
    } catch (error) {
      signIn(error.status === 401 ? "This token is not known here." : error.message);
    }
    return;
  }
  const action = event.target.dataset.submit;
  if (action) {
    event.preventDefault();
    await act(action, event.target);
  }
});

document.addEventListener("click", async (event) => {
  const target = event.target.closest("[data-do]");
  if (target) await act(target.dataset.do, target);
});

async function act(action, target) {
  if (action === "sign-out") {
    try {
      await server.signOut();
    } catch (error) {
      if (error.status !== 401) return tell(error.message);
    }
    await server.find();
    return enter();
  }
  if (action === "submit") return submit.choose();
  const what = JSON.stringify(target.dataset);
  if (busy.has(what)) return;
  busy.add(what);
  try {
    await current?.view.actions?.[action]?.(current.state, target.dataset, target);
  } catch (error) {
    if (error.status === 401) return enter(await server.find());
    tell(error.message);
  } finally {
    busy.delete(what);
  }
}

window.addEventListener("hashchange", () => {
  if (location.hash === "#main") return;
  enter();
  main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
});

submit.listen(tell);

async function start() {
  try {
    await server.find();
    trouble("");
    enter();
  } catch (error) {
    header();
    trouble(error.message);
    setTimeout(start, 2000);
  }
}

start();
