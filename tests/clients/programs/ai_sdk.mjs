// Runs the requests of a file as a batch of Vercel's AI SDK: BASE_URL INPUT OUTPUT.

import fs from "node:fs";
import { setTimeout } from "node:timers/promises";
import { createOpenAI } from "@ai-sdk/openai";
import {
  experimental_getBatchResults as getBatchResults,
  experimental_getBatchStatus as getBatchStatus,
  experimental_listBatches as listBatches,
  experimental_startBatch as startBatch,
} from "ai";

const [baseURL, source, target] = process.argv.slice(2);
const provider = createOpenAI({ baseURL, apiKey: "none" });
const requests = fs
  .readFileSync(source, "utf8")
  .trim()
  .split("\n")
  .map((line) => JSON.parse(line))
  .map(({ custom_id, body }) => ({ id: custom_id, type: "text", model: body.model, prompt: body.messages[0].content }));
const batch = await startBatch({ provider, requests });
let found = batch;
while (found.status === "pending") {
  await setTimeout(1000);
  found = await getBatchStatus({ provider, batch });
}
const { batches } = await listBatches({ provider, limit: 1 });
const output = fs.createWriteStream(target);
for await (const item of getBatchResults({ provider, batch })) {
  const status_code = item.status === "succeeded" && item.text ? 200 : 500;
  output.write(`${JSON.stringify({ custom_id: item.id, response: { status_code } })}\n`);
}
output.end();
const isWell = found.status === "completed" && found.requestCounts.completed === requests.length;
process.exitCode = isWell && batches[0].id === batch.id ? 0 : 1;
