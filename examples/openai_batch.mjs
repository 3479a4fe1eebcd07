// A program written for OpenAI's Batch API: a file of requests in, a file of results out.
//
// `npm install openai`, then `node openai_batch.mjs INPUT.jsonl OUTPUT.jsonl`

import fs from "node:fs";
import { setTimeout } from "node:timers/promises";
import OpenAI from "openai";

// const client = new OpenAI();
const client = new OpenAI({ baseURL: "http://127.0.0.1:50054/v1", apiKey: "none" });

const [source, target] = process.argv.slice(2);
const file = await client.files.create({ file: fs.createReadStream(source), purpose: "batch" });
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await setTimeout(1000);
  batch = await client.batches.retrieve(batch.id);
}
console.log(`${batch.id} ${batch.status}: ${JSON.stringify(batch.request_counts)}`);
for (const error of batch.errors?.data ?? []) console.error(`line ${error.line}: ${error.message}`);
const output = fs.createWriteStream(target);
for (const name of [batch.output_file_id, batch.error_file_id].filter(Boolean)) {
  const content = await client.files.content(name);
  for await (const piece of content.body) output.write(piece);
}
output.end();
process.exitCode = batch.status === "completed" && !batch.error_file_id ? 0 : 1;
