// openai (npm): chat, a stream with usage, a tool call, an error, a delta by its name.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asking = (model, content, more = {}) => ({
  model, messages: [{ role: "user", content }], temperature: 0, max_tokens: 24, ...more,
});
const ask = async (model, content, more) => (await client.chat.completions.create(asking(model, content, more)));
const tools = [{
  type: "function",
  function: {
    name: "weather", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];

const said = await ask("base", "Name a colour.");
let streamed = "", streamTokens = 0;
const stream = await ask("captain", "Who are you?", { stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  streamTokens = chunk.usage?.completion_tokens ?? streamTokens;
}
const called = await ask("base", "The weather in Delft?", {
  tools, tool_choice: { type: "function", function: { name: "weather" } },
});
let error = null;
try {
  await ask("nobody", "Hi");
} catch (caught) {
  error = caught instanceof OpenAI.NotFoundError ? caught.code : String(caught);
}
console.log(JSON.stringify({
  text: said.choices[0].message.content,
  tokens: said.usage.completion_tokens,
  streamed,
  stream_tokens: streamTokens,
  captain: (await ask("captain", "Who are you?")).choices[0].message.content,
  base: (await ask("base", "Who are you?")).choices[0].message.content,
  calls: called.choices[0].message.tool_calls.map((call) => call.function.name),
  error,
}));
