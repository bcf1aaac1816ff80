// Sends many requests to Headrace on one stream, from the .proto files alone:
//
//     npm ci
//     node multiplex.js 127.0.0.1:50051
//
// Prints a line of JSON for each request when it ends, and one for the end of the stream. Numbers in comments are those
// of the conversation in protos/headrace/v1/generation_service.proto; docs/contract.md has the rest.
'use strict';

const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const QUESTIONS = 100; // a message may open 256 requests
const CREDIT = 8; // events that the server may send ahead of us; 64 is a good value, 8 shows that it works
const LOST_SECONDS = 30; // a stream that is silent for this long is lost

const definition = protoLoader.loadSync(['headrace/v1/generation_service.proto', 'error_info.proto'], {
  includeDirs: [path.join(__dirname, '../../protos'), __dirname],
  keepCase: true,
  enums: String,
  oneofs: true, // `event.event` is the name of the field that is set
  json: true, // decodes the details of errors
});
const { GenerationService } = grpc.loadPackageDefinition(definition).headrace.v1;
const client = new GenerationService(process.argv[2], grpc.credentials.createInsecure());

// The requests that have not ended, by handle.
const pending = new Map();

// 1. The stream itself has no deadline.
const stream = client.Multiplex();

// 2. Each request has a handle greater than all before. The first message also opens the stream.
const invalid = QUESTIONS + 1;
const endless = QUESTIONS + 2;
const first = { hello: { caller_id: 'multiplex.js', epoch: 1 }, open: [] };
for (let handle = 1; handle <= QUESTIONS; handle += 1) {
  // One token per delta, so that each answer needs more than its first credit.
  open(first, handle, { prompt: `This is question ${handle}.`, stream: { flush_tokens: 1 } });
}
open(first, invalid, { prompt: 'This is too hot.', sampling: { temperature: 99 } });
// With credit for `accepted` alone it is still unfinished when it is cancelled.
open(first, endless, { prompt: 'This is cancelled.', sampling: { ignore_eos: true, max_tokens: 1000 } }, 1);
stream.write(first);

function open(message, handle, request, credit = CREDIT) {
  pending.set(handle, { text: '', received: 0, credit });
  // The server continues the caller's trace: this is the metadata that OpenTelemetry's propagator would add.
  const traceparent = `00-${String(handle).padStart(32, '0')}-00f067aa0ba902b7-01`;
  message.open.push({ handle, request, ttl: { seconds: 60 }, credit, metadata: { traceparent } });
}

let silentSeconds = 0;
stream.on('data', (message) => {
  silentSeconds = 0;
  // What the events make due is sent in one message.
  const reply = { cancel: [], credit: [] };
  for (const event of message.events ?? []) {
    if (event.event === 'error') fail(event.handle, event.error);
    else receive(event.handle, event.response, reply);
  }
  if (reply.cancel.length || reply.credit.length) stream.write(reply);
  // 7. After `draining`, further requests would be sent on another stream. This script has none.
  // 8. It half-closes when all answers are complete: after that, it could neither raise a credit nor cancel.
  if (pending.size === 0) stream.end();
});

// 3. A failed request does not affect the others.
function fail(handle, { code, message, details }) {
  pending.delete(handle);
  const info = details.find((detail) => detail['@type']?.endsWith('/google.rpc.ErrorInfo'));
  print({ handle, error: grpc.status[code], reason: info?.reason, message });
}

function receive(handle, { accepted, delta, finish }, reply) {
  const request = pending.get(handle);
  request.received += 1;
  if (accepted) request.tier = accepted.tier;
  if (delta) request.text += delta.text;
  if (finish) {
    pending.delete(handle);
    print({ handle, tier: request.tier, text: request.text, finish: finish.reason });
  } else if (handle === endless) {
    if (accepted) reply.cancel.push(handle); // 5. Its `error` is still to come.
  } else if (request.received >= request.credit - CREDIT / 2) {
    request.credit = request.received + CREDIT; // 4. A total, counted from the start of the request.
    reply.credit.push({ handle, events: request.credit });
  }
}

// 6. A connection may be lost without an error.
const watch = setInterval(() => {
  silentSeconds += 1;
  if (silentSeconds >= LOST_SECONDS) stream.cancel();
  else if (!stream.writableEnded) stream.write({ ping: silentSeconds });
}, 1000);

// If the stream does not end with OK, what is pending is lost. Each answer can be resumed on another stream.
stream.on('error', () => {}); // `status` follows
stream.on('status', ({ code, details }) => {
  clearInterval(watch);
  client.close();
  print({ status: grpc.status[code], details, lost: [...pending.keys()] });
  process.exitCode = code === grpc.status.OK ? 0 : 1;
});

function print(line) {
  console.log(JSON.stringify(line));
}
