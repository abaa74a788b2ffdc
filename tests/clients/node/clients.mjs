// The JavaScript clients of the client table: node clients.mjs BASE_URL MODEL; prints JSON like python_clients.py.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [base, model] = process.argv.slice(2);
const KEY = "not-needed";
const QUESTION = "What is the weather in Lisbon?";
const RESULT = "18 degrees and sunny";
const PERSON = "Alice is 30 years old. Her name and age?";
const DEADLINE = { "x-request-timeout-seconds": "0.001" };
const CITY = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

function expect(condition, what) {
  if (!condition) throw new Error(`not seen: ${what}`);
}

async function fails(call, status) {
  try {
    await call;
  } catch (error) {
    const seen = error.status ?? error.statusCode ?? error.lastError?.statusCode;
    if (status !== undefined) expect(seen === status, `${status}, but ${seen}: ${error}`);
    return error;
  }
  throw new Error("the call did not fail");
}

async function quickly(call) {
  const started = Date.now();
  await fails(call);
  expect(Date.now() - started < 1000, "a deadline without retries");
}

const openai = new OpenAI({ apiKey: KEY, baseURL: `${base}/v1` });
const hello = [{ role: "user", content: "What is the capital of France?" }];
const long = "word ".repeat(60_000);

const openaiNode = {
  async stream() {
    let text = "";
    const stream = await openai.chat.completions.create({ model, messages: hello, stream: true, max_tokens: 30 });
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    expect(text, "text");
    const response = openai.responses.stream({ model, input: "What is the capital of France?", max_output_tokens: 30 });
    expect((await response.finalResponse()).output_text, "text of the response");
  },
  async tools() {
    const function_ = { name: "get_weather", parameters: CITY };
    const tools = [{ type: "function", function: function_ }];
    const messages = [{ role: "user", content: QUESTION }];
    const first = await openai.chat.completions.create({ model, messages, tools, max_tokens: 80 });
    const call = first.choices[0].message.tool_calls[0];
    expect("city" in JSON.parse(call.function.arguments), "a call");
    messages.push(first.choices[0].message, { role: "tool", tool_call_id: call.id, content: RESULT });
    const second = await openai.chat.completions.create({ model, messages, tools, max_tokens: 80 });
    expect(second.choices[0].message.content.includes("18"), "the result in the answer");
    const input = [{ role: "user", content: QUESTION }];
    const functions = [{ type: "function", ...function_, strict: false }];
    const response = await openai.responses.stream({ model, input, tools: functions }).finalResponse();
    const item = response.output[0];
    expect(item.type === "function_call" && "city" in JSON.parse(item.arguments), "a call of the response");
    const { parsed_arguments: _, ...plain } = item;
    input.push(plain, { type: "function_call_output", call_id: item.call_id, output: RESULT });
    const last = await openai.responses.create({ model, input, tools: functions, max_output_tokens: 80 });
    expect(last.output_text.includes("18"), "the result in the response");
  },
  async structured() {
    const json_schema = { name: "person", schema: SCHEMA, strict: true };
    const messages = [{ role: "user", content: PERSON }];
    const response_format = { type: "json_schema", json_schema };
    const chat = await openai.chat.completions.parse({ model, messages, response_format, max_tokens: 80 });
    expect(Number.isInteger(JSON.parse(chat.choices[0].message.content).age), "a person");
    const text = { format: { type: "json_schema", ...json_schema } };
    const response = await openai.responses.create({ model, input: PERSON, text });
    expect(Number.isInteger(JSON.parse(response.output_text).age), "a person of the response");
  },
  async errors() {
    const create = (body, options) => openai.chat.completions.create({ model, messages: hello, ...body }, options);
    expect((await fails(create({ model: "nothing" }), 404)) instanceof OpenAI.NotFoundError, "NotFoundError");
    await fails(create({ messages: [{ role: "user", content: long }] }), 400);
    await quickly(create({}, { headers: DEADLINE }));
  },
};

function vercel(make) {
  const weather = tool({
    description: "The weather in a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => RESULT,
  });
  return {
    async stream() {
      let text = "";
      for await (const part of streamText({ model: make(model), prompt: "What is the capital of France?", maxOutputTokens: 30 }).textStream)
        text += part;
      expect(text, "text");
    },
    async tools() {
      const asked = { model: make(model), prompt: QUESTION, tools: { get_weather: weather }, stopWhen: stepCountIs(3) };
      expect((await generateText(asked)).text.includes("18"), "the result in the answer");
      expect((await streamText(asked).text).includes("18"), "the result in the streamed answer");
    },
    async structured() {
      const output = Output.object({ schema: z.object({ name: z.string(), age: z.number().int() }) });
      const made = await generateText({ model: make(model), prompt: PERSON, output });
      expect(Number.isInteger(made.output.age), "a person");
    },
    async errors() {
      const error = await fails(generateText({ model: make("nothing"), prompt: "hello" }), 404);
      expect(APICallError.isInstance(error), "APICallError");
      await fails(generateText({ model: make(model), prompt: long }), 400);
      // It retries every 408, whatever x-should-retry says; maxRetries is the only remedy.
      await quickly(generateText({ model: make(model), prompt: "hello", headers: DEADLINE, maxRetries: 0 }));
    },
  };
}

const provider = createOpenAI({ apiKey: KEY, baseURL: `${base}/v1` });
const compatible = createOpenAICompatible({
  name: "tierplane",
  apiKey: KEY,
  baseURL: `${base}/v1`,
  supportsStructuredOutputs: true,
});
const clients = {
  "openai-node": openaiNode,
  "Vercel AI SDK, responses": vercel((name) => provider.responses(name)),
  "Vercel AI SDK, chat": vercel((name) => provider.chat(name)),
  "Vercel AI SDK, openai-compatible": vercel((name) => compatible(name)),
};

const table = {};
for (const [client, checks] of Object.entries(clients)) {
  table[client] = {};
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check();
      table[client][name] = "ok";
    } catch (error) {
      table[client][name] = String(error).slice(0, 200);
    }
  }
}
console.log(JSON.stringify(table));
