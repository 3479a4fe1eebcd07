// Calls of the server: the session, single calls, and what is sent as it changes.

export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export let session = null;

export async function call(method, path, body) {
  const headers = { "x-csrf-token": session?.proof ?? "" };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(`/page/api/${path}`, { method, headers, body: body === undefined ? null : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, "", "The server does not answer.");
  }
  return read(response.status, await response.text());
}

function read(status, text) {
  let found = null;
  try {
    found = text ? JSON.parse(text) : null;
  } catch {
    found = null;
  }
  if (status >= 200 && status < 300) return found;
  const error = found?.error ?? {};
  throw new Refusal(status, error.code ?? "", error.message ?? `The server answers with status ${status}.`);
}

// The session, or null for who has to sign in.
export async function find() {
  try {
    session = await call("GET", "session");
  } catch (error) {
    if (error.status !== 401) throw error;
    session = null;
  }
  return session;
}

export async function signIn(token) {
  await call("POST", "session", { token });
  return find();
}

export async function signOut() {
  await call("DELETE", "session");
  session = null;
}

export const may = (role) => {
  const order = ["read", "submit", "operate"];
  return session !== null && order.indexOf(session.role) >= order.indexOf(role);
};

// Sends a file with its progress, from 0 to 1. Fails as reading the file does, where that is why it ended.
export function upload(file, onProgress) {
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", file);
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => {
      try {
        resolve(read(request.status, request.responseText));
      } catch (error) {
        reject(error);
      }
    };
    request.onerror = () =>
      file.slice(0, 1).arrayBuffer().then(() => reject(new Refusal(0, "", "The connection broke off.")), reject);
    request.onabort = () => reject(new Refusal(0, "aborted", "Cancelled."));
  });
  request.open("POST", "/page/api/v1/files");
  request.setRequestHeader("x-csrf-token", session?.proof ?? "");
  request.send(form);
  return { done, abort: () => request.abort() };
}

// Keeps `parts` current until `end` is called. `on.refused`: the server ends it for this reason; `on.lost`: it is away.
export function follow(view, query, on) {
  const parts = {};
  let source = null;
  let timer = null;
  let isOver = false;

  function open() {
    const given = new URLSearchParams({ view, ...query });
    source = new EventSource(`/page/api/live?${given}`);
    let isFirst = true;
    source.addEventListener("parts", (event) => {
      const changes = JSON.parse(event.data);
      if (isFirst) for (const name of Object.keys(parts)) delete parts[name];
      isFirst = false;
      for (const [name, part] of Object.entries(changes)) {
        if (part === null) delete parts[name];
        else parts[name] = part;
      }
      on.parts(parts, Object.keys(changes));
    });
    source.addEventListener("refused", (event) => {
      end();
      on.refused(JSON.parse(event.data));
    });
    source.onopen = () => on.back();
    source.onerror = async () => {
      if (isOver) return;
      on.lost();
      isFirst = true;
      // A browser comes back by itself after a connection that broke, not after an answer that is an error.
      if (source.readyState !== EventSource.CLOSED) return;
      clearTimeout(timer);
      timer = setTimeout(async () => {
        try {
          if ((await find()) === null) {
            end();
            on.refused({ code: "UNAUTHENTICATED", message: "" });
            return;
          }
        } catch {
          // Still away.
        }
        if (!isOver) open();
      }, 2000);
    };
  }

  function end() {
    isOver = true;
    clearTimeout(timer);
    source?.close();
  }

  open();
  return end;
}
