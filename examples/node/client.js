/**
 * Client of the reranker service for Node.js: one ranking in one call, and the scores of a grid over a stream.
 *
 * The messages are read from the .proto file at run time, so no code is generated. Names of fields are in camel case:
 * `top_n` of the contract is `topN` here. Names of enum values are strings, such as 'SCORE_TYPE_RAW'.
 */

import { readFileSync } from 'node:fs';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));

const definition = protoLoader.loadSync('reranker/v1/reranker.proto', {
  // The contract, and google/rpc/status.proto, which it imports.
  includeDirs: [path('../../protos'), path('protos')],
  defaults: true,
  enums: String,
  longs: Number,
  oneofs: true,
});
const { RerankerService } = grpc.loadPackageDefinition(definition).reranker.v1;

/**
 * Connects to a server.
 *
 * @param {string} address 'HOST:PORT', or 'grpcs://HOST:PORT' for TLS.
 * @param {object} [security]
 * @param {string} [security.token] Token of the server's --token-file; sent only over TLS.
 * @param {string} [security.ca] PEM file of the authority that signed the server's certificate.
 * @param {string} [security.cert] PEM file of the client's certificate, for a server with --tls-client-ca.
 * @param {string} [security.key] PEM file of its private key.
 * @returns {grpc.Client} The client; close() ends its connection.
 */
export function connect(address, { token, ca, cert, key } = {}) {
  const secure = address.startsWith('grpcs://');
  let credentials = grpc.credentials.createInsecure();
  if (secure) {
    const read = (file) => (file ? readFileSync(file) : null);
    credentials = grpc.credentials.createSsl(read(ca), read(key), read(cert));
  }
  if (token) {
    if (!secure) throw new Error('A token needs TLS: write the address as grpcs://HOST:PORT.');
    const metadata = new grpc.Metadata();
    metadata.set('authorization', `Bearer ${token}`);
    const withToken = grpc.credentials.createFromMetadataGenerator((_, callback) => callback(null, metadata));
    credentials = grpc.credentials.combineChannelCredentials(credentials, withToken);
  }
  return new RerankerService(address.replace(/^grpcs?:\/\//, ''), credentials, {
    // A server sends messages of up to --limits.max-message-bytes; gRPC's own limit is 4 MiB.
    'grpc.max_receive_message_length': 8 * 1024 * 1024,
    // Finds a server that vanished without closing the connection.
    'grpc.keepalive_time_ms': 30_000,
  });
}

/**
 * Ranks the documents of one query.
 *
 * @param {grpc.Client} client
 * @param {object} request A RerankRequest, such as {query, documents, topN: 3, options: {scoreType: 'SCORE_TYPE_RAW'}}.
 * @param {number} [seconds] Deadline of the call.
 * @returns {Promise<object>} A RerankResponse: results of {index, score}, best first.
 */
export function rerank(client, request, seconds = 30) {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + 1000 * seconds };
    client.rerank(request, options, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/**
 * Scores every query with every document over one stream. Each text is sent once.
 *
 * @param {grpc.Client} client
 * @param {string[]} queries
 * @param {string[]} documents
 * @param {object} [settings]
 * @param {object} [settings.options] RerankOptions of all pairs.
 * @param {number} [settings.seconds] Deadline of the whole job.
 * @param {number} [settings.queriesPerChunk] Queries of one chunk; the chunk has all documents of each of them.
 * @returns {Promise<Float32Array[]>} One row for each query, one score for each document.
 */
export async function scoreGrid(client, queries, documents, settings = {}) {
  const { options = {}, seconds = 600, queriesPerChunk = 16 } = settings;
  const stream = client.rerankStream({ deadline: Date.now() + 1000 * seconds });
  const rows = queries.map(() => new Float32Array(documents.length));
  // Both sides wait for each other unless results are read while chunks are written.
  await Promise.all([read(stream, rows, queriesPerChunk), write(stream, queries, documents, options, queriesPerChunk)]);
  return rows;
}

async function write(stream, queries, documents, options, queriesPerChunk) {
  const send = async (message) => {
    if (!stream.write(message)) await once(stream, 'drain');
  };
  await send({ open: { options } });
  for (const texts of messages(queries)) await send({ texts: { texts } });
  for (const texts of messages(documents)) await send({ texts: { texts } });
  // A text's id is its position among all texts of the stream.
  const documentIds = documents.map((_, position) => queries.length + position);
  for (let first = 0; first < queries.length; first += queriesPerChunk) {
    const queryIds = queries.slice(first, first + queriesPerChunk).map((_, position) => first + position);
    await send({ chunk: { id: first / queriesPerChunk, grid: { queryIds, documentIds } } });
  }
  stream.end();
}

/** Splits texts into messages of at most about 1 MB. */
function* messages(texts) {
  let part = [];
  let bytes = 0;
  for (const text of texts) {
    part.push(text);
    bytes += Buffer.byteLength(text);
    if (bytes > 1_000_000) {
      yield part;
      part = [];
      bytes = 0;
    }
  }
  if (part.length) yield part;
}

async function read(stream, rows, queriesPerChunk) {
  let missing = Math.ceil(rows.length / queriesPerChunk);
  for await (const { message, result } of stream) {
    if (message !== 'result') continue;
    if (result.outcome === 'error') throw new Error(`chunk ${result.id}: ${result.error.message}`);
    const { values } = result.scores;
    const first = result.id * queriesPerChunk;
    const width = rows[first].length;
    for (let row = first; (row - first) * width < values.length; row++) {
      rows[row].set(values.slice((row - first) * width, (row - first + 1) * width));
    }
    missing--;
  }
  if (missing) throw new Error(`The server ended the stream with ${missing} chunks unanswered.`);
}
