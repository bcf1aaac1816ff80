// Calls a Headrace router over mutual TLS with a bearer token, from the .proto files alone:
//
//     npm ci
//     node secured.js localhost:50051 ca.pem caller.pem caller.key TOKEN_FILE
//
// Streams an answer, cancels another one, and makes a call that its token does not permit. Prints a line of JSON for each
// when it ends. Where the router asks for no client certificates, pass "" for the certificate and its key.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [target, ca, cert, key, tokenFile] = process.argv.slice(2);

const definition = protoLoader.loadSync(
  ['headrace/v1/generation_service.proto', 'headrace/v1/admin_service.proto', 'error_info.proto'],
  {
    includeDirs: [path.join(__dirname, '../../protos'), __dirname],
    keepCase: true,
    enums: String,
    oneofs: true, // `event.event` is the name of the field that is set
    json: true, // decodes the details of errors
  },
);
const { GenerationService, AdminService } = grpc.loadPackageDefinition(definition).headrace.v1;

// The certificate of the server must contain the host of the target, which is a name: Node warns of addresses.
const tls = grpc.credentials.createSsl(read(ca), read(key), read(cert));
// The token is sent with each call. grpc-js sends it over TLS only.
const withToken = grpc.credentials.createFromMetadataGenerator((_, done) => {
  const metadata = new grpc.Metadata();
  // Read for each call: tokens are replaced while programs run.
  metadata.set('authorization', `Bearer ${fs.readFileSync(tokenFile, 'utf8').trim()}`);
  done(null, metadata);
});
const credentials = grpc.credentials.combineChannelCredentials(tls, withToken);
const generation = new GenerationService(target, credentials);
const admin = new AdminService(target, credentials);

function read(file) {
  return file ? fs.readFileSync(file) : null;
}

function deadline(seconds) {
  return { deadline: Date.now() + seconds * 1000 };
}

// Reads an answer to its end. *onDelta* is called with the call at each delta.
function answer(name, request, onDelta = () => {}) {
  return new Promise((done) => {
    const seen = { name, text: '', deltas: 0 };
    const call = generation.Generate(request, deadline(60));
    call.on('data', ({ accepted, delta, finish }) => {
      if (accepted) seen.tier = accepted.tier;
      if (delta) {
        seen.text += delta.text;
        seen.deltas += 1;
        onDelta(call);
      }
      if (finish) seen.finish = finish.reason;
    });
    call.on('error', () => {}); // `status` follows
    call.on('status', (status) => done({ ...seen, ...ending(status) }));
  });
}

// How a call ended: its status and, from the details of an error, why.
function ending({ code, details, metadata }) {
  const seen = { status: grpc.status[code] };
  if (code === grpc.status.OK) return seen;
  seen.message = details;
  const [encoded] = metadata.get('grpc-status-details-bin');
  if (encoded) {
    const status = definition['google.rpc.Status'].deserialize(encoded);
    const info = status.details.find((detail) => detail['@type'].endsWith('/google.rpc.ErrorInfo'));
    seen.reason = info.reason;
    seen.fields = info.metadata;
  }
  return seen;
}

async function main() {
  // One token per delta, so that the answer is a stream and not one message.
  print(await answer('answer', { prompt: 'Hello over TLS.', stream: { flush_tokens: 1 } }));
  const endless = { prompt: 'This is cancelled.', sampling: { ignore_eos: true, max_tokens: 100000 } };
  const { name, status } = await answer('cancelled', endless, (call) => call.cancel());
  print({ name, status });
  const inspected = await new Promise((done) => {
    admin.Inspect({}, deadline(60), (error) => done(ending(error ?? { code: grpc.status.OK })));
  });
  print({ name: 'inspect', ...inspected });
}

function print(line) {
  console.log(JSON.stringify(line));
}

main().finally(() => {
  generation.close();
  admin.close();
});
