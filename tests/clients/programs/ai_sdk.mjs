// Vercel's AI SDK with @ai-sdk/openai-compatible: chat, a stream with usage, a tool call, an error, a delta by its name.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({ name: "deltaworks", baseURL: process.argv[2], includeUsage: true });
const asking = (model, prompt, more = {}) => ({
  model: provider(model), prompt, temperature: 0, maxOutputTokens: 24, maxRetries: 0, ...more,
});
const ask = (model, prompt, more) => generateText(asking(model, prompt, more));

const said = await ask("base", "Name a colour.");
const stream = streamText(asking("captain", "Who are you?"));
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const called = await ask("base", "The weather in Delft?", {
  tools: { weather: tool({ description: "The weather in a city", inputSchema: z.object({ city: z.string() }) }) },
  toolChoice: { type: "tool", toolName: "weather" },
});
let error = null;
try {
  await ask("nobody", "Hi");
} catch (caught) {
  error = APICallError.isInstance(caught) && caught.statusCode === 404 ? caught.data.error.code : String(caught);
}
console.log(JSON.stringify({
  text: said.text,
  tokens: said.usage.outputTokens,
  streamed,
  stream_tokens: (await stream.usage).outputTokens,
  captain: (await ask("captain", "Who are you?")).text,
  base: (await ask("base", "Who are you?")).text,
  calls: called.toolCalls.map((call) => call.toolName),
  error,
}));
