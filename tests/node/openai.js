// Uses a Headrace gateway with OpenAI's own package:
//
//     npm ci
//     node openai.js http://127.0.0.1:8080/v1
//
// Prints a line of JSON for each call.
'use strict';

const { OpenAI } = require('openai');

const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none', maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hello from Node – 🚀' }];

function print(name, facts) {
  console.log(JSON.stringify({ name, ...facts }));
}

async function whole() {
  const answer = await client.chat.completions.create({ model: 'auto', messages, n: 2, seed: 7 });
  print('whole', {
    texts: answer.choices.map((choice) => choice.message.content),
    reasons: answer.choices.map((choice) => choice.finish_reason),
    tokens: answer.usage.total_tokens,
  });
}

async function streamed() {
  const options = { model: 'small', messages, stream: true, stream_options: { include_usage: true } };
  let text = '';
  let last;
  for await (const chunk of await client.chat.completions.create(options)) {
    text += chunk.choices[0]?.delta.content ?? '';
    last = chunk;
  }
  print('streamed', { text, tokens: last.usage.total_tokens, tier: last.headrace.tier });
}

async function helped() {
  const final = await client.chat.completions.stream({ model: 'auto', messages }).finalChatCompletion();
  print('helped', { text: final.choices[0].message.content });
}

async function abandoned() {
  const long = [{ role: 'user', content: 'word '.repeat(500) }];
  const stream = await client.chat.completions.create({ model: 'auto', messages: long, stream: true });
  for await (const chunk of stream) {
    if (chunk.choices[0].delta.content) {
      break; // closes the connection
    }
  }
  print('abandoned', {});
}

async function refused() {
  try {
    await client.chat.completions.create({ model: 'none', messages });
  } catch (error) {
    print('refused', { kind: error.constructor.name, status: error.status, code: error.code });
  }
}

async function listed() {
  const names = [];
  for await (const model of client.models.list()) {
    names.push(model.id);
  }
  print('listed', { names });
}

(async () => {
  for (const call of [whole, streamed, helped, abandoned, refused, listed]) {
    await call();
  }
})();
