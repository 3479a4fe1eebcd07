// A file dragged onto the page, or chosen, becomes a batch.

import { close, look } from "./dialogs.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { call, may, upload } from "./server.js";

const overlay = document.getElementById("drop");
const HEAD_BYTES = 1 << 20;
const WINDOW = "24h";
// How browsers refuse to read a file that is not what was chosen any more.
const CHANGED = ["NotReadableError", "NotFoundError"];
let tell = () => {};
let depth = 0;

export function choose() {
  const field = h("input", { type: "file", accept: ".jsonl,.ndjson,application/jsonl" });
  field.addEventListener("change", () => field.files[0] && send(field.files[0]));
  field.click();
}

export function listen(told) {
  tell = told;
  const isFile = (event) => may("submit") && [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (!isFile(event)) return;
    depth += 1;
    overlay.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!isFile(event)) return;
    depth = Math.max(0, depth - 1);
    overlay.hidden = depth === 0;
  });
  document.addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    depth = 0;
    overlay.hidden = true;
    if (!isFile(event)) return;
    event.preventDefault();
    const [file, other] = event.dataTransfer.files;
    // While the event lasts; reading one would fail as reading a file does that is gone.
    const isFolder = [...event.dataTransfer.items].some((item) => item.webkitGetAsEntry()?.isDirectory);
    if (isFolder) tell("A folder cannot be submitted: drop a file.");
    else if (other) tell("One file at a time.");
    else if (file) send(file);
  });
}

async function send(file) {
  let sending = null;
  const replace = look(`Submitting ${file.name}`, h("p", {}, "Reading the first line…"), () => sending?.abort());
  const draw = (text, part) =>
    replace(
      h("p", { role: "status" }, text),
      h("progress", { value: part, max: 1, "aria-label": "Sent" }),
    );
  try {
    const endpoint = await endpointOf(file);
    sending = upload(file, (part) => draw(`${f.size(part * file.size)} of ${f.size(file.size)}`, part));
    const stored = await sending.done;
    sending = null;
    draw("Stored. Creating the batch…", 1);
    const batch = await call("POST", "v1/batches", { input_file_id: stored.id, endpoint, completion_window: WINDOW });
    close();
    location.hash = `#/batches/${batch.id}`;
  } catch (error) {
    sending = null;
    if (error.code === "aborted") return;
    const message = CHANGED.includes(error.name) ? "The file was changed or moved after it was chosen." : error.message;
    replace(h("p.wrong", { role: "alert" }, message));
  }
}

// All lines name the same endpoint; a first line that is wrong is told of when the file is checked.
async function endpointOf(file) {
  const [line] = (await file.slice(0, HEAD_BYTES).text()).replace(/^\uFEFF/, "").trimStart().split("\n");
  try {
    const { url } = JSON.parse(line);
    if (typeof url === "string" && url) return url;
  } catch {
    // Not JSON, or longer than what was read.
  }
  return /"url"\s*:\s*"(\/v1\/[a-z/]+)"/.exec(line)?.[1] ?? "/v1/chat/completions";
}
